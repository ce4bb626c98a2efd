"""Tables from files of answers, and from nothing else; as Markdown and CSV.

Knows results and their statistics. Knows no models and no data.
"""

import csv
import io
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from t2l.errors import EvaluationError
from t2l.eval import stats
from t2l.eval.answers import AnswerFile
from t2l.eval.conditions import ADAPTERS, CONDITIONS, Condition
from t2l.eval.results import CONTROLS, Suite, below_floor, compared, gather, missing_controls, same_prompts
from t2l.eval.stats import Difference, Estimate, estimate, p_text

LOW_PARSED = 0.5
"""Share of answers that could be read below which a condition is flagged."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a report shows beyond its conditions."""

    compare: tuple[tuple[str, str], ...] = ()
    """Further pairs of conditions; where their prompts differ, the table says so."""
    score: str | None = None
    """Such as `rouge_l`; each suite's first score if not given."""
    without_controls: bool = False
    """Whether a table may lack controls; it then says which."""


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
        DataError: if files do not go together.
        EvaluationError: if controls are missing.
    """
    suites = gather(files, score=options.score)
    missing = missing_controls(suites)
    lacking = {name: [c for c in controls if c != "multitask"] for name, controls in missing.items()}
    if any(lacking.values()) and not options.without_controls:
        raise EvaluationError(
            "A table without its controls shows nothing: "
            + "; ".join(f"suite {name} lacks {', '.join(controls)}" for name, controls in lacking.items() if controls)
            + ". Run them, or pass --without-controls"
        )
    apart = _by_checkpoint(files, options)
    found = []
    for suite in suites:
        notes = _notes(suite, missing.get(suite.name, []))
        found.append(_benchmarks_table(suite, notes) if suite.fixed_tasks else _tasks_table(suite, notes))
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


def suite_title(suite: Suite) -> str:
    """The heading of a suite's table."""
    titles = {
        "seen": "Tasks of training, new instances and descriptions",
        "held-back": "Tasks held back from training, to choose settings",
        "validation": "Validation tasks, not trained on",
        "test": "Test tasks, not trained on",
        "benchmarks": "Benchmarks, answered in words",
        "likelihood": "Benchmarks, by the likelihood of the choices",
    }
    return titles.get(suite.name, f"Suite {suite.name}")


def _tasks_table(suite: Suite, notes: list[str]) -> Table:
    """A row for each adapter, a column for each form of the prompt."""
    forms = [(False, False), (True, False), (False, True), (True, True)]
    titles = ["plain prompt", "description in prompt", "3 examples in prompt", "3 examples + description"]
    cells = []
    for adapter, title in ADAPTERS.items():
        names = [Condition(adapter, *form).name for form in forms]
        if any(name in suite.conditions for name in names):
            cells.append([title, *(_cell(suite, name) for name in names)])
    used = [0, *(i for i in range(1, 5) if any(row[i] for row in cells))]
    head = ["", *titles]
    return Table(suite_title(suite), notes, [[row[i] for i in used] for row in [head, *cells]])


def _cell(suite: Suite, name: str) -> str:
    if name not in suite.conditions:
        return ""
    most = max(len(scores) for scores in suite.conditions.values())
    found = estimate(suite.conditions[name])
    return str(found) + (f" ({found.tasks} tasks)" if found.tasks < most else "")


def _benchmarks_table(suite: Suite, notes: list[str]) -> Table:
    """A row for each condition, a column for each benchmark, in per cent with half an interval's width."""
    tasks, above = suite.tasks, suite.above_chance()
    head = ["", "average", *(["average above chance"] if above != tasks else []), *tasks]
    cells = []
    for name, scores in suite.conditions.items():
        condition = CONDITIONS[name]
        forms = {"plain": "", "description": " + description in prompt", "shots": " + 3 examples in prompt"}
        form = forms.get(condition.prompt, " + 3 examples and description in prompt")
        complete = len(scores) == len(tasks)
        averages = [_percent(estimate(scores, fixed_tasks=True)) if complete else ""]
        if above != tasks:
            part = {task: scores[task] for task in above if task in scores}
            averages.append(_percent(estimate(part, fixed_tasks=True)) if part and len(part) == len(above) else "")
        each = [_percent(estimate({task: scores[task]})) if task in scores else "" for task in tasks]
        shares = suite.parsed.get(name)
        parsed = [f"{np.mean(list(shares.values())):.0%}"] if shares else []
        cells.append([ADAPTERS[condition.adapter] + form, *averages, *each, *parsed])
    notes = [*notes, "In per cent, ± half the interval's width; an average counts benchmarks alike."]
    if above != tasks:
        notes.append(
            "The average above chance leaves out benchmarks on which no condition's interval lies above chance: "
            + (", ".join(task for task in tasks if task not in above) or "none")
            + "."
        )
    if suite.chance:
        chances = [
            "chance",
            *[""] * (len(head) - 1 - len(tasks)),
            *(f"{100 * suite.chance[t]:.1f}" if t in suite.chance else "" for t in tasks),
        ]
        cells.append([*chances, *([""] if suite.parsed else [])])
    return Table(suite_title(suite), notes, [[*head, *(["answers read"] if suite.parsed else [])], *cells])


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


def _facts_table(files: Sequence[AnswerFile]) -> Table:
    """Where the answers came from."""
    cells = [["file", "checkpoint", "weights sha256", "base", "type", "device", "versions", "left out"]]
    for file in files:
        facts = file.header
        cells.append(
            [
                file.path.name,
                str(facts.get("checkpoint") or "–"),
                str(facts.get("checkpoint_sha256") or "–")[:16],
                f"{facts['base']} ({facts['base_revision']})",
                str(facts["dtype"]),
                str(facts.get("device", "–")),
                ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items()),
                ", ".join(f"{name}: {why}" for name, why in facts.get("left_out", {}).items()) or "–",
            ]
        )
    return Table("Where the answers came from", [], cells)


def markdown(files: Sequence[AnswerFile], options: Options = DEFAULT) -> str:
    """The report as Markdown; its first line is the command that makes it again. Arguments as of `tables`."""
    _, found = tables(files, options)
    command = ["t2l", "eval", "report", *(file.path.name for file in files)]
    command += [part for pair in options.compare for part in ("--compare", ":".join(pair))]
    command += ["--score", options.score] if options.score else []
    command += ["--without-controls"] * options.without_controls
    parts = [f"<!-- {shlex.join(command)} -->\n"]
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
