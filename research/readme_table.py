"""Writes the table of README.md from files of answers: `python research/readme_table.py`. A test compares them.

The files are those of the checkpoint that ships. Give others where another checkpoint ships.
"""

import argparse
import functools
from pathlib import Path

from t2l.eval import answers
from t2l.eval.results import gather
from t2l.eval.stats import Scores, estimate

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
ANSWERS = tuple(sorted((ROOT / "research" / "results" / "test").glob("*.jsonl.gz")))
BEGIN, END = "<!-- results: python research/readme_table.py -->\n", "<!-- end of results -->"
ROWS = {
    "base model": ("base", "base+description"),
    "base model, three examples in the prompt": ("base+shots", "base+shots+description"),
    "one LoRA for all tasks": ("multitask", "multitask+description"),
    "**T2L, the right description**": ("t2l", "t2l+description"),
    "T2L, another task's description": ("t2l-wrong", "t2l-wrong+description"),
    "T2L, random text": ("t2l-random", "t2l-random+description"),
}


@functools.cache
def scores_of(paths: tuple[Path, ...]) -> dict[str, Scores]:
    """Scores of each condition, all suites of some files together."""
    rows: dict[str, Scores] = {}
    for suite in gather([answers.read(path) for path in paths]):
        for name, scores in suite.conditions.items():
            rows.setdefault(name, {}).update(scores)
    return rows


def table(paths: tuple[Path, ...]) -> str:
    """The table: a row an adapter, a column a kind of prompt; exact match with its interval over tasks.

    Raises:
        SystemExit: naming the conditions that the files lack.
    """
    scores = scores_of(paths)
    if missing := [name for names in ROWS.values() for name in names if name not in scores]:
        raise SystemExit(f"error: no answers for {', '.join(missing)} in {', '.join(map(str, paths))}")
    lines = ["| who answers | plain prompt | description in the prompt |", "| --- | --- | --- |"]
    for title, names in ROWS.items():
        plain, described = (str(estimate(scores[name])).replace("0.", ".") for name in names)
        lines.append(f"| {title} | {plain} | {described} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, new: str) -> str:
    """The README with another table between its two marks."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + new + END + rest.partition(END)[2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", nargs="*", type=Path, default=ANSWERS)
    README.write_text(with_table(README.read_text("utf-8"), table(tuple(parser.parse_args().answers))), "utf-8")
