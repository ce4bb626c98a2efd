"""Tables from files of answers, and from nothing else; as Markdown and CSV.

Knows results and their statistics. Knows no models and no data.
"""

import csv
import io
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from t2l.errors import DataError, EvaluationError
from t2l.eval import stats
from t2l.eval.answers import AnswerFile
from t2l.eval.conditions import ADAPTERS, CONDITIONS, Condition, reasons
from t2l.eval.results import CONTROLS, Suite, below_floor, compared, gather, missing_controls, same_prompts
from t2l.eval.stats import Difference, Estimate, estimate, p_text

LOW_PARSED = 0.5
"""Share of answers that could be read below which a condition is flagged."""
FEW_TASKS = 6
"""With fewer tasks even a difference that all of them show has a p of 2 / 2**tasks > 0.05."""
MOST_TASKS = 30
"""Up to so many tasks of one's own, a report shows each of them by itself."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a report shows beyond its conditions."""

    compare: tuple[tuple[str, str], ...] = ()
    """Further pairs of conditions; where their prompts differ, the table says so."""
    score: str | None = None
    """Such as `rouge_l`; each suite's first score if not given."""
    without_controls: bool = False
    """Whether a table may lack controls; it then says which."""
    title: str | None = None
    """Heading of the whole report; what was evaluated on which base, if not given."""


DEFAULT = Options()


@dataclass(frozen=True)
class Table:
    """A heading, what to know about the table, and its cells; the first row is its head."""

    title: str
    notes: list[str]
    cells: list[list[str]]


def tables(files: Sequence[AnswerFile], options: Options = DEFAULT) -> tuple[list[Suite], list[Table]]:
    """Everything that a report shows, but its plots.

    Args:
        files: Files of answers of one table.
        options: What is compared and shown.

    Raises:
        DataError: if files do not go together, or one holds no answer.
        EvaluationError: if controls are missing.
    """
    for file in files:
        if not file.lines:
            raise DataError(f"{file.path} holds no answer yet; the same `t2l eval run` goes on with it")
    suites = gather(files, score=options.score)
    missing = missing_controls(suites)
    lacking = {name: [c for c in controls if c != "multitask"] for name, controls in missing.items()}
    if any(lacking.values()) and not options.without_controls:
        raise EvaluationError(
            "A table without its controls shows nothing: "
            + "; ".join(f"suite {name} lacks {', '.join(controls)}" for name, controls in lacking.items() if controls)
            + ". Run them (the same `t2l eval run` goes on with an unfinished file), or pass --without-controls"
        )
    apart = _by_checkpoint(files, options)
    found = []
    for suite in suites:
        notes = _notes(suite, missing.get(suite.name, []))
        found += _benchmarks_tables(suite, notes) if suite.fixed_tasks else [_tasks_table(suite, notes)]
        found += _each_task(suite) if suite.name not in TITLES and len(suite.tasks) <= MOST_TASKS else []
        pairs = compared(suite, options.compare)
        if differences := _differences_table(suite, pairs):
            found.append(differences)
        each = {weights: own[suite.name] for weights, own in apart.items() if suite.name in own}
        if len(each) > 1:
            found.append(_checkpoints_table(suite, each, [(one, other) for one, other, _ in pairs]))
    found.append(_facts_table(files))
    return suites, found


def _notes(suite: Suite, missing: Sequence[str]) -> list[str]:
    n, tasks = max(stats.size(scores) for scores in suite.conditions.values())
    seeds = ", ".join(map(str, suite.seeds))
    drawn = "items within each" if suite.fixed_tasks else "tasks"
    how = {
        "likelihood": "the choice of the highest likelihood per byte",
        "benchmarks": "the greedy answer",
        "tasks": "the greedy answer",
    }[suite.kind]
    notes = [
        f"{tasks} tasks, n = {n:,} answers a condition, seeds {seeds}; {suite.score} of {how}, with 95 % intervals "
        f"from {stats.DRAWS:,} bootstrap draws over {drawn}."
    ]
    if not suite.fixed_tasks and 1 < tasks < FEW_TASKS:
        notes.append(
            f"**{tasks} tasks are too few to speak of others**: with fewer than {FEW_TASKS} no p is below 0.05. Read "
            "the tables of each task."
        )
    if controls := [condition for condition in missing if condition != "multitask"]:
        notes.append(
            "**Controls are missing: " + "; ".join(f"{CONTROLS[name]} ({name})" for name in controls) + ".** Without "
            "them nothing here shows that an adapter helps because of its description."
        )
    if "multitask" in missing:
        notes.append(
            "**There is no multi-task LoRA here.** So nothing shows whether adapters from descriptions are worth more "
            "than one adapter for all tasks; train one (`hypernet.variant: none`) and run again with `--multitask`."
        )
    if suite.unscored:
        listed = ", ".join(f"{task} ({number})" for task, number in suite.unscored.items())
        notes.append(f"**Not scored, because code was not run: {listed}.**")
    low = [
        f"{condition} on {task} ({share:.0%})"
        for condition, by_task in suite.parsed.items()
        for task, share in by_task.items()
        if share < LOW_PARSED
    ]
    if low:
        shown = ", ".join(low[:8]) + (f" and {len(low) - 8} more" if len(low) > 8 else "")
        notes.append(
            f"**Few answers could be read:** {shown}. Their scores say more about the answers' form than about what "
            "the model knows."
        )
    if low := below_floor(suite):
        notes.append(f"**The floor check failed: the base model is below what guessing gives on {'; '.join(low)}.**")
    return notes


TITLES = {
    "seen": "Tasks of training, new instances and descriptions",
    "held-back": "Tasks held back from training, to choose settings",
    "validation": "Validation tasks, not trained on",
    "test": "Test tasks, not trained on",
    "benchmarks": "Benchmarks, answered in words",
    "likelihood": "Benchmarks, by the likelihood of the choices",
}
"""Headings of the tables of suites that need packed data."""


def suite_title(suite: Suite) -> str:
    """The heading of a suite's table."""
    return TITLES.get(suite.name, f"Suite {suite.name}")


FORMS = {
    (False, False): "plain prompt",
    (True, False): "description in prompt",
    (False, True): "3 examples in prompt",
    (True, True): "3 examples + description",
}
"""Whether description and examples stand in a prompt, and what tables call it."""


def _tasks_table(suite: Suite, notes: list[str]) -> Table:
    """A row for each adapter, a column for each form of the prompt."""
    return Table(suite_title(suite), notes, _by_form(suite, lambda name: _cell(suite, name)))


def _each_task(suite: Suite) -> list[Table]:
    """For each form of the prompt that can be compared, a row for each task and a column for each adapter."""
    found = []
    for form, title in FORMS.items():
        names = [name for adapter in ADAPTERS if (name := Condition(adapter, *form).name) in suite.conditions]
        cells = [["", "items", *(ADAPTERS[CONDITIONS[name].adapter] for name in names)]]
        for task in suite.tasks:
            scores = [suite.conditions[name].get(task, {}) for name in names]
            means = (f"{stats.mean({task: items}):.2f}" if items else "" for items in scores)
            cells.append([task, str(max(map(len, scores), default=0)), *means])
        if len(names) > 1:
            notes = [
                "With twenty items a difference must be some 0.45 to be told from chance, with two hundred some 0.14."
            ]
            found.append(Table(f"{suite_title(suite)}: each task, {title}", notes, cells))
    return found


def _by_form(suite: Suite, cell: Callable[[str], str]) -> list[list[str]]:
    """Cells of a table with a row for each adapter and a column for each form of the prompt that has answers."""
    rows = []
    for adapter, title in ADAPTERS.items():
        names = [Condition(adapter, *form).name for form in FORMS]
        if any(name in suite.conditions for name in names):
            rows.append([title, *(cell(name) if name in suite.conditions else "" for name in names)])
    used = [0, *(i for i in range(1, len(FORMS) + 1) if any(row[i] for row in rows))]
    return [[row[i] for i in used] for row in [["", *FORMS.values()], *rows]]


def _cell(suite: Suite, name: str) -> str:
    most = max(len(scores) for scores in suite.conditions.values())
    found = estimate(suite.conditions[name])
    return str(found) + (f" ({found.tasks} tasks)" if found.tasks < most else "")


def _benchmarks_tables(suite: Suite, notes: list[str]) -> list[Table]:
    """The averages, those of benchmarks above chance, and for each form of the prompt every benchmark."""
    tasks, above = suite.tasks, suite.above_chance()
    unit = "In per cent, ± half the interval's width."

    def average(name: str, of: Sequence[str]) -> str:
        scores = suite.conditions[name]
        complete = of and all(task in scores for task in of)
        return _percent(estimate({task: scores[task] for task in of}, fixed_tasks=True)) if complete else ""

    notes = [*notes, f"Averages, in which benchmarks count alike. {unit}"]
    found = [Table(suite_title(suite), notes, _by_form(suite, lambda name: average(name, tasks)))]
    if above != tasks:
        left = ", ".join(task for task in tasks if task not in above)
        notes = [f"This average leaves out benchmarks on which no condition's interval lies above chance: {left}."]
        cells = _by_form(suite, lambda name: average(name, above))
        found.append(Table(f"{suite_title(suite)}: average above chance", notes, cells))
    for form, title in FORMS.items():
        names = [name for adapter in ADAPTERS if (name := Condition(adapter, *form).name) in suite.conditions]
        if names:
            found.append(Table(f"{suite_title(suite)}: each, {title}", [unit], _each_benchmark(suite, names)))
    return found


def _each_benchmark(suite: Suite, names: Sequence[str]) -> list[list[str]]:
    """Cells of a table with a row for each benchmark and a column for each of some conditions."""
    cells = [["", *(ADAPTERS[CONDITIONS[name].adapter] for name in names), *(["chance"] if suite.chance else [])]]
    for task in suite.tasks:
        found = [suite.conditions[name].get(task) for name in names]
        row = [task, *(_percent(estimate({task: scores})) if scores else "" for scores in found)]
        chance = f"{100 * suite.chance[task]:.1f}" if task in suite.chance else ""
        cells.append([*row, *([chance] if suite.chance else [])])
    if suite.parsed:
        shares = [list(suite.parsed.get(name, {}).values()) for name in names]
        read = [f"{np.mean(values):.0%}" if values else "" for values in shares]
        cells.append(["answers read", *read, *([""] if suite.chance else [])])
    return cells


def _percent(value: Estimate) -> str:
    return f"{100 * value.mean:.1f} ± {50 * (value.high - value.low):.1f}"


def _differences_table(suite: Suite, found: Sequence[tuple[str, str, Difference]]) -> Table | None:
    cells = [["condition", "minus", "prompt", "difference", "p", "n", "tasks"]]
    for one, other, value in found:
        same = same_prompts(suite, one, other)
        form = {"plain": "plain", "description": "with description"}.get(CONDITIONS[one].prompt, CONDITIONS[one].prompt)
        cells.append(
            [
                one,
                other,
                form if same else "**different prompts**",
                f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]",
                p_text(value.p).removeprefix("p = ").removeprefix("p "),
                f"{value.n:,}",
                str(value.tasks),
            ]
        )
    if len(cells) == 1:
        return None
    unit = "items" if suite.fixed_tasks else "tasks"
    notes = [
        "Paired: the same instances under the same prompt, only the adapter differs. Intervals from the bootstrap "
        f"above, p (two-sided) from a sign-flip permutation test over {unit}."
    ]
    return Table(f"{suite_title(suite)}: paired differences", notes, cells)


def _by_checkpoint(files: Sequence[AnswerFile], options: Options) -> dict[str, dict[str, Suite]]:
    """Weights' sha256 to the suites that they were evaluated on, by name."""
    by_weights: dict[str, list[AnswerFile]] = defaultdict(list)
    for file in files:
        if weights := file.header.get("checkpoint_sha256"):
            by_weights[weights].append(file)
    if len(by_weights) < 2:
        return {}
    return {
        weights: {suite.name: suite for suite in gather(own, score=options.score, partial=True)}
        for weights, own in by_weights.items()
    }


def _checkpoints_table(suite: Suite, each: Mapping[str, Suite], pairs: Sequence[tuple[str, str]]) -> Table:
    """Means and differences of each of several checkpoints."""

    def everywhere(*names: str) -> bool:
        return all(name in one.conditions for one in each.values() for name in names)

    scores = {name: [x.conditions[name] for x in each.values()] for name in suite.conditions if everywhere(name)}
    scores |= {
        f"{one} − {other}": [stats.paired(x.conditions[one], x.conditions[other]) for x in each.values()]
        for one, other in pairs
        if everywhere(one, other)
    }
    means = {name: [stats.mean(x, fixed_tasks=suite.fixed_tasks) for x in found] for name, found in scores.items()}
    head = ["condition", *(f"`{weights[:8]}`" for weights in each), "standard deviation"]
    cells = [[name, *(f"{x:.3f}" for x in found), f"{np.std(found, ddof=1):.3f}"] for name, found in means.items()]
    notes = [
        "Checkpoints by their weights' sha256, each on its own seeds: how trainings differ, which no interval holds."
    ]
    return Table(f"{suite_title(suite)}: by checkpoint", notes, [head, *cells])


SETTINGS = {
    "checkpoint": "checkpoint",
    "checkpoint_sha256": "its weights' sha256",
    "multitask_sha256": "multi-task LoRA's sha256",
    "base": "base",
    "base_revision": "base's version",
    "backend": "backend",
    "dtype": "type",
    "device": "device",
    "seeds": "seeds",
    "per_task": "items of a task",
    "max_new_tokens": "most new tokens",
    "versions": "versions",
    "left_out": "conditions left out",
}
"""Facts of a file of answers that a report shows, and what it calls them."""


def _facts_table(files: Sequence[AnswerFile]) -> Table:
    """Where the answers came from: a row for each fact, and where files differ what each of them says."""
    cells = [["", f"{len(files)} files of answers" if len(files) > 1 else files[0].path.name]]
    for fact, title in SETTINGS.items():
        said = {file.path.name: _fact(file.header, fact) for file in files}
        if any(said.values()):
            same = len(set(said.values())) == 1
            each = ", ".join(f"{value or '–'} ({name})" for name, value in said.items())
            cells.append([title, next(iter(said.values())) if same else each])
    return Table("Where the answers came from", [], cells)


def _fact(header: Mapping[str, Any], fact: str) -> str:
    """A fact as a report shows it; empty where there is none."""
    value = header.get(fact)
    if fact == "left_out":
        return "; ".join(reasons(value or {}))
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    text = "" if value is None else str(value)
    return text[:16] if fact.endswith("sha256") else text


def report_title(files: Sequence[AnswerFile], options: Options = DEFAULT) -> str:
    """The heading of the whole report: what the user calls it, or what was evaluated on which base."""
    names = dict.fromkeys(str(file.header.get("checkpoint") or "") for file in files)
    what = ", ".join(filter(None, names))
    base = files[0].header["base"]
    return options.title or (f"{what} on {base}" if what else f"Adapters on {base}")


def markdown(files: Sequence[AnswerFile], options: Options = DEFAULT) -> str:
    """The report as Markdown; its first line is the command that makes it again. Arguments as of `tables`."""
    _, found = tables(files, options)
    command = ["t2l", "eval", "report", *(file.path.name for file in files)]
    command += [part for pair in options.compare for part in ("--compare", ":".join(pair))]
    command += ["--score", options.score] if options.score else []
    command += ["--title", options.title] if options.title else []
    command += ["--without-controls"] * options.without_controls
    parts = [f"<!-- {shlex.join(command)} -->\n\n## {report_title(files, options)}\n"]
    for table in found:
        head, *body = table.cells
        lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in body)]
        parts.append("\n\n".join([f"### {table.title}", *table.notes, "\n".join(lines)]) + "\n")
    return "\n".join(parts)


def as_csv(files: Sequence[AnswerFile], options: Options = DEFAULT) -> str:
    """Every estimate, one a line: conditions over all tasks and by task, and differences. Arguments as of `tables`."""
    suites, _ = tables(files, options)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["suite", "task", "condition", "minus", "score", "mean", "low", "high", "p", "one_sided_low", "n", "tasks"]
    writer.writerow([*head, "parsed"])
    for suite in suites:
        for name, scores in suite.conditions.items():
            shares = suite.parsed.get(name, {})
            overall = estimate(scores, fixed_tasks=suite.fixed_tasks)
            share = f"{np.mean(list(shares.values())):.4f}" if shares else ""
            numbers = [*_numbers(overall), "", "", overall.n, overall.tasks, share]
            writer.writerow([suite.name, "all", name, "", suite.score, *numbers])
            for task in scores:
                one_task = estimate({task: scores[task]})
                share = f"{shares[task]:.4f}" if task in shares else ""
                numbers = [*_numbers(one_task), "", "", one_task.n, 1, share]
                writer.writerow([suite.name, task, name, "", suite.score, *numbers])
        for one, other, value in compared(suite, options.compare):
            numbers = [*_numbers(value), f"{value.p:.5f}", f"{value.one_sided_low:.4f}", value.n, value.tasks, ""]
            writer.writerow([suite.name, "all", one, other, suite.score, *numbers])
    return out.getvalue()


def _numbers(value: Estimate) -> list[str]:
    return [f"{number:.4f}" for number in (value.mean, value.low, value.high)]
