"""Writes the tables of README.md and docs/findings.md from files of answers: `python research/readme_table.py`.

The files are those of the checkpoint that ships; a test compares the tables with them. Where another checkpoint ships,
replace the files and run this again.
"""

import functools
from pathlib import Path

from t2l.eval import answers
from t2l.eval.results import gather
from t2l.eval.stats import Scores, estimate

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "research" / "results"
NEW_TASKS = tuple(sorted((RESULTS / "test").glob("*.jsonl.gz")))
"""`t2l eval run --suite test --conditions minimum,base+shots,base+shots+description`, three judging seeds."""
EVERYDAY = (RESULTS / "everyday.jsonl.gz",)
"""`t2l eval run --suite everyday --conditions minimum --seeds 0`."""
BEGIN, END = "<!-- by research/readme_table.py -->\n", "<!-- end -->"
ROWS = {
    "base model": ("base", "base+description"),
    "base model, three examples in the prompt": ("base+shots", "base+shots+description"),
    "one LoRA for all tasks": ("multitask", "multitask+description"),
    "**T2L, the right description**": ("t2l", "t2l+description"),
    "T2L, another task's description": ("t2l-wrong", "t2l-wrong+description"),
    "T2L, random text": ("t2l-random", "t2l-random+description"),
}
ANOTHER = "another's"
COLUMNS = {
    "base": "base+description",
    "one LoRA for all": "multitask+description",
    "T2L": "t2l+description",
    "T2L, plain": "t2l",
    ANOTHER: "t2l-wrong+description",
    "random text": "t2l-random+description",
}
"""Of the table of everyday tasks; the prompt shows the description but where it says plain."""


@functools.cache
def scores_of(paths: tuple[Path, ...]) -> dict[str, Scores]:
    """Scores of each condition, all suites of some files together."""
    rows: dict[str, Scores] = {}
    for suite in gather([answers.read(path) for path in paths]):
        for name, scores in suite.conditions.items():
            rows.setdefault(name, {}).update(scores)
    return rows


def short(text: object) -> str:
    return str(text).replace("0.", ".")


def new_tasks() -> str:
    """A row an adapter, a column a kind of prompt; exact match with its interval over tasks."""
    scores = scores_of(NEW_TASKS)
    lines = ["| who answers | plain prompt | description in the prompt |", "| --- | --- | --- |"]
    for title, names in ROWS.items():
        plain, described = (short(estimate(scores[name])) for name in names)
        lines.append(f"| {title} | {plain} | {described} |")
    return "\n".join(lines) + "\n"


def right(condition: str) -> dict[str, int]:
    """How many inputs of each everyday task are answered right."""
    tasks = scores_of(EVERYDAY)[condition]
    return {task.replace("_", " "): round(sum(sum(seeds) for seeds in items.values())) for task, items in tasks.items()}


def everyday_in_words() -> str:
    """What works and what does not, and how the controls do."""
    counts = right("t2l+description")
    works = sorted(task for task, count in counts.items() if count >= 7)
    fails = sorted(task for task, count in counts.items() if count <= 1)
    mean = {title: f"{estimate(scores_of(EVERYDAY)[name]).mean:.2f}".lstrip("0") for title, name in COLUMNS.items()}
    return (
        f"\n{len(counts)} everyday tasks, ten inputs each, none trained on, the description in the prompt: base "
        f"{mean['base']}, one LoRA for all tasks {mean['one LoRA for all']}, **T2L {mean['T2L']}** "
        f"({mean['T2L, plain']} in a plain prompt), another's description {mean[ANOTHER]}, "
        f"random text {mean['random text']}. T2L has seven or more right in {len(works)} ({', '.join(works)}), none "
        f"or one in {len(fails)} ({', '.join(fails)}).\n"
    )


def everyday_tasks() -> str:
    """Right answers of ten for each everyday task, best first."""
    counts = {title: right(name) for title, name in COLUMNS.items()}
    tasks = sorted(counts["T2L"], key=lambda task: (-counts["T2L"][task], task))
    lines = [f"| task | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {task} | {' | '.join(str(count[task]) for count in counts.values())} |" for task in tasks]
    return "\n".join(lines) + "\n"


PAGES = {
    ROOT / "README.md": lambda: new_tasks() + everyday_in_words(),
    ROOT / "docs" / "findings.md": everyday_tasks,
}


def fresh(page: Path) -> str:
    """A page with what stands between its two marks made anew."""
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    return head + BEGIN + PAGES[page]() + END + rest.partition(END)[2]


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(fresh(path), encoding="utf-8")
