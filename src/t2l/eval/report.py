"""Tables, intervals and paired tests from files of answers, and from nothing else; as Markdown, CSV and HTML.

Knows lines of answers and names of rows. Knows no models and no data.
"""

import csv
import html
import io
import math
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2l.errors import DataError, EvaluationError
from t2l.eval.answers import AnswerFile, merge
from t2l.eval.conditions import ADAPTERS, LEVERS, ROWS, Row

DRAWS = 2000
LOW_PARSED = 0.5
"""Share of answers that could be read below which a row is flagged."""
REQUIRED = {
    "base": "the base model",
    "base+description": "the description in the prompt",
    "multitask": "a multi-task LoRA",
    "t2l": "T2L",
    "t2l-wrong": "T2L with another task's description",
    "t2l-random": "T2L with random text",
}
"""Without these a table cannot say whether an adapter helps because of its description."""
PAIRS = (
    ("t2l", "t2l-wrong"),
    ("t2l", "t2l-random"),
    ("t2l", "multitask"),
    ("t2l-random", "multitask"),
    ("t2l", "base"),
)
"""Adapters whose rows are compared, in every form of the prompt."""
LEVER_PAIRS = tuple(
    pair
    for lever in LEVERS
    for pair in (
        (lever, "t2l"),
        (lever, f"{lever}-wrong"),
        (lever, f"{lever}-random"),
        (lever, "multitask"),
        (f"{lever}-random", "multitask"),
    )
)
"""The same for what is made of T2L without training."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a report shows beyond its rows."""

    compare: tuple[tuple[str, str], ...] = ()
    """Further pairs of rows; where their prompts differ, the table says so."""
    score: str | None = None
    """Such as `rouge_l`; each suite's first score if not given."""
    without_controls: bool = False
    """Whether a table may lack control rows; it then says which."""


DEFAULT = Options()
Scores = dict[str, dict[str, list[float]]]
"""Task to item to its scores, one a seed."""


# ----------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Estimate:
    """A mean with a 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int
    """Answers."""
    tasks: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference of two rows, with a two-sided p from flipping signs of whole tasks (or items)."""

    p: float
    one_sided_low: float
    """The mean is above this with 95 % confidence."""

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}], {p_text(self.p)}"

    @property
    def points(self) -> str:
        """Mean and interval in points of a hundred."""
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def p_text(p: float) -> str:
    """`p < 0.001` or `p = 0.012`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def clusters(scores: Scores) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the bootstrap draws from, as sums and counts, one pair a stratum.

    Several tasks stand for more tasks of their kind: tasks are drawn, each with all its answers, which are not
    independent. A single task stands for its items: items are drawn, each with its answers under all seeds.
    """
    if len(scores) > 1:
        sums = [sum(sum(values) for values in items.values()) for items in scores.values()]
        counts = [sum(len(values) for values in items.values()) for items in scores.values()]
        return [(np.array(sums), np.array(counts))]
    return strata(scores)


def strata(scores: Scores) -> list[tuple[np.ndarray, np.ndarray]]:
    """As `clusters`, where the tasks are all there are, such as the ten benchmarks: items are drawn within each."""
    return [
        (np.array([sum(values) for values in items.values()]), np.array([len(values) for values in items.values()]))
        for items in scores.values()
    ]


def _groups(scores: Scores, fixed_tasks: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    return strata(scores) if fixed_tasks else clusters(scores)


def _bootstrap(groups: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Means under resampling; the mean of the strata's means where there are several."""
    means = np.zeros(DRAWS)
    for sums, counts in groups:
        # The same picks for every row of the same size: rows are compared on the same draws.
        picks = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
        means += sums[picks].sum(1) / counts[picks].sum(1)
    return means / len(groups)


def _mean(groups: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    return float(np.mean([sums.sum() / counts.sum() for sums, counts in groups]))


def _size(scores: Scores) -> tuple[int, int]:
    return sum(len(values) for items in scores.values() for values in items.values()), len(scores)


def estimate(scores: Scores, *, fixed_tasks: bool = False) -> Estimate:
    """Mean and interval.

    Args:
        scores: Of one row.
        fixed_tasks: Whether the tasks are all there are, and count alike; otherwise answers count alike.
    """
    groups = _groups(scores, fixed_tasks)
    low, high = np.quantile(_bootstrap(groups), [0.025, 0.975])
    return Estimate(_mean(groups), float(low), float(high), *_size(scores))


def _paired(one: Scores, other: Scores) -> Scores:
    """Answer by answer the difference of two rows, on the tasks that both have."""
    shared = [task for task in one if task in other]
    if not shared:
        raise DataError("Rows cannot be paired: they share no task")
    paired: Scores = {}
    for task in shared:
        mine, theirs = one[task], other[task]
        if {i: len(v) for i, v in mine.items()} != {i: len(v) for i, v in theirs.items()}:
            raise DataError(f"Rows cannot be paired: of task {task} one holds answers that the other lacks")
        paired[task] = {
            item: [x - y for x, y in zip(values, theirs[item], strict=True)] for item, values in mine.items()
        }
    return paired


def difference(one: Scores, other: Scores, *, fixed_tasks: bool = False) -> Difference:
    """Paired difference of two rows over the tasks that both have.

    Raises:
        DataError: if they share no task, or one lacks answers that the other has in a shared task.
    """
    paired = _paired(one, other)
    groups = _groups(paired, fixed_tasks)
    draws = _bootstrap(groups)
    low, one_sided, high = np.quantile(draws, [0.025, 0.05, 0.975])
    p = _sign_flip([sums / (counts.sum() * len(groups)) for sums, counts in groups])
    return Difference(_mean(groups), float(low), float(high), *_size(paired), p, float(one_sided))


def _sign_flip(parts: Sequence[np.ndarray], *, draws: int = 20_000) -> float:
    """Two-sided p of a permutation test: were the rows alike, each cluster's difference could have either sign."""
    values = np.concatenate(parts)
    values = values[values != 0]
    observed = abs(values.sum()) - 1e-12
    if 2 ** len(values) <= draws:
        signs = 1 - 2 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
        return float(np.mean(np.abs(signs @ values) >= observed))
    generator, hits = np.random.default_rng(1), 0
    for _ in range(draws // 1000):
        signs = 1 - 2 * generator.integers(0, 2, size=(1000, len(values)), dtype=np.int8)
        hits += int(np.sum(np.abs(signs @ values) >= observed))
    return (hits + 1) / (draws + 1)


# ------------------------------------------------------------------------------------------------- from the lines


@dataclass(frozen=True)
class Suite:
    """Answers of one suite, and what the files say about it."""

    name: str
    kind: str
    """`benchmarks`, `likelihood` or `tasks`."""
    score: str
    """Name of the score that is shown."""
    rows: dict[str, Scores]
    parsed: dict[str, dict[str, float]]
    """Row to task to the share of answers that could be read; only where answers are read."""
    prompts: dict[str, dict[tuple[int, str, str], str]]
    """Row to (seed, task, id) to the prompt's hash."""
    unscored: dict[str, int]
    """Task to the number of answers that were not scored."""
    chance: dict[str, float]
    floor: dict[str, float]
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def fixed_tasks(self) -> bool:
        """Whether the tasks are all there are."""
        return self.kind != "tasks"

    def above_chance(self) -> list[str]:
        """Tasks on which some row's interval lies above chance."""
        found = []
        for task in self.tasks:
            rows = [estimate({task: scores[task]}) for scores in self.rows.values() if task in scores]
            if any(row.low > self.chance.get(task, 0.0) for row in rows):
                found.append(task)
        return found

    @property
    def tasks(self) -> list[str]:
        """In the order of the file's facts, or by name."""
        found = {task for scores in self.rows.values() for task in scores}
        order = {task: i for i, task in enumerate(BENCHMARK_ORDER)}
        return sorted(found, key=lambda task: (order.get(task, len(order)), task))


BENCHMARK_ORDER = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "hellaswag",
    "openbookqa",
    "piqa",
    "winogrande",
    "mbpp",
    "gsm8k",
    "humaneval",
)


def gather(files: Sequence[AnswerFile], *, score: str | None = None, partial: bool = False) -> list[Suite]:
    """Sorts answers by suite, row, task and item.

    Args:
        files: Files of answers of one table.
        score: Which of the answers' scores; the first if not given.
        partial: Whether answers may be missing, as while a run is going on.

    Raises:
        DataError: if files do not go together, or a row lacks answers within a task that it has.
    """
    lines = merge(files)
    by_suite: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_suite[line["suite"]].append(line)
    suites = [_suite(name, mine, files, score) for name, mine in by_suite.items()]
    for suite in suites if not partial else ():
        _require_complete(suite)
    return suites


def _suite(name: str, lines: Sequence[Mapping[str, Any]], files: Sequence[AnswerFile], score: str | None) -> Suite:
    score = score or next(iter(lines[0]["scores"]))
    facts: dict[str, dict[str, float]] = {"chance": {}, "floor": {}}
    for file in files:
        found = file.header["suites"].get(name, {})
        for part in ("chance", "floor"):
            facts[part] |= found.get(part, {})
    rows: dict[str, Scores] = {row: defaultdict(lambda: defaultdict(list)) for row in ROWS}
    read: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    prompts: dict[str, dict[tuple[int, str, str], str]] = defaultdict(dict)
    unscored: dict[str, int] = defaultdict(int)
    # By seed, so that the scores of one item stand in the same order in every row.
    for line in sorted(lines, key=lambda line: (line["seed"], line["task"], line["id"])):
        row, task = line["row"], line["task"]
        if row not in ROWS:
            raise DataError(f"There is no row '{row}'; there are: {', '.join(ROWS)}")
        if score not in line["scores"]:
            raise DataError(f"Suite {name} has no score '{score}'; it has: {', '.join(line['scores'])}")
        value = line["scores"][score]
        if value is None:
            unscored[task] += 1
            continue
        prompts[row][line["seed"], task, line["id"]] = line["prompt"]
        rows[row][task][line["id"]].append(float(value))
        if "parsed" in line["scores"]:
            read[row][task].append(line["scores"]["parsed"])
    kept = {row: {task: dict(items) for task, items in scores.items()} for row, scores in rows.items() if scores}
    kind = {"benchmarks": "benchmarks", "likelihood": "likelihood"}.get(name, "tasks")
    return Suite(
        name=name,
        kind=kind,
        score=score.replace("_", " "),
        rows=kept,
        parsed={row: {task: float(np.mean(v)) for task, v in by_task.items()} for row, by_task in read.items()},
        prompts=dict(prompts),
        unscored=dict(unscored),
        chance=facts["chance"],
        floor=facts["floor"],
        seeds=tuple(sorted({line["seed"] for line in lines})),
    )


def _require_complete(suite: Suite) -> None:
    """A row may lack whole tasks (no library holds them), but no answers of a task that it has."""
    expected: dict[str, set[tuple[int, str, str]]] = defaultdict(set)
    for keys in suite.prompts.values():
        for key in keys:
            expected[key[1]].add(key)
    for row, keys in suite.prompts.items():
        missing = sum(len(expected[task] - keys.keys()) for task in {key[1] for key in keys})
        if missing:
            raise DataError(
                f"Suite {suite}, row {row}: {missing} answers are missing that other rows have; run the same command "
                "again to finish the file"
            )


def same_prompts(suite: Suite, one: str, other: str) -> bool:
    """Whether two rows saw the same prompt wherever both answered."""
    mine, theirs = suite.prompts[one], suite.prompts[other]
    return all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys())


def compared(suite: Suite, asked: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str, Difference]]:
    """Paired differences: those of `PAIRS` and `LEVER_PAIRS` in each form of the prompt, and those that are asked for.

    Raises:
        DataError: if rows that must have seen the same prompts did not, or a row that is asked for is not there.
    """
    found = []
    for one, other in (*PAIRS, *LEVER_PAIRS):
        for shots, description in ((False, False), (False, True), (True, False), (True, True)):
            names = Row(one, description, shots).name, Row(other, description, shots).name
            if all(name in suite.rows for name in names):
                if not same_prompts(suite, *names):
                    raise DataError(f"Suite {suite}: rows {' and '.join(names)} saw different prompts")
                found.append(names)
    for names in asked:
        for name in names:
            if name not in ROWS:
                raise DataError(f"There is no row '{name}'; there are: {', '.join(ROWS)}")
        if all(name in suite.rows for name in names):
            found.append(names)
    return [
        (one, other, difference(suite.rows[one], suite.rows[other], fixed_tasks=suite.fixed_tasks))
        for one, other in dict.fromkeys(found)
    ]


def missing_controls(suites: Sequence[Suite]) -> dict[str, list[str]]:
    """Suite to the rows of `REQUIRED` that it lacks in every form of the prompt."""
    missing = {}
    for suite in suites:
        there = {ROWS[name].adapter for name in suite.rows} | suite.rows.keys()
        if lacking := [row for row in REQUIRED if row not in there]:
            missing[suite.name] = lacking
    return missing


def below_floor(suite: Suite) -> list[str]:
    """Benchmarks on which the base model, scored by likelihood, does worse than guessing does: its exact binomial
    95 % interval (Clopper and Pearson) lies below the floor. The bootstrap's would be empty where no answer is right.
    """
    found = []
    for task, scores in suite.rows.get("base", {}).items() if suite.kind == "likelihood" else ():
        floor = suite.floor.get(task, 0.0)
        right = sum(sum(values) / len(values) for values in scores.values())
        if floor and _binomial_tail(round(right), len(scores), floor) < 0.025:
            found.append(f"{task} ({right / len(scores):.3f} of {len(scores)} items, floor {floor:.3f})")
    return found


def _binomial_tail(right: int, n: int, p: float) -> float:
    """Chance of at most `right` of `n`, each with probability p."""
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
        for k in range(right + 1)
    ]
    return math.fsum(math.exp(value) for value in logs)


# --------------------------------------------------------------------------------------------------------- tables


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
        EvaluationError: if control rows are missing.
    """
    suites = gather(files, score=options.score)
    missing = missing_controls(suites)
    if missing and not options.without_controls:
        raise EvaluationError(
            "A table without its controls shows nothing: "
            + "; ".join(f"suite {name} lacks {', '.join(rows)}" for name, rows in missing.items())
            + ". Run them, or pass --without-controls"
        )
    apart = _by_checkpoint(files, options)
    found = []
    for suite in suites:
        notes = _notes(suite, missing.get(suite.name, []), files[0].header)
        found.append(_rows_table(suite, notes) if suite.fixed_tasks else _tasks_table(suite, notes))
        pairs = compared(suite, options.compare)
        if differences := _differences_table(suite, pairs):
            found.append(differences)
        each = {weights: own[suite.name] for weights, own in apart.items() if suite.name in own}
        if len(each) > 1:
            found.append(_checkpoints_table(suite, each, [(one, other) for one, other, _ in pairs]))
    found.append(_facts_table(files))
    return suites, found


def _notes(suite: Suite, missing: Sequence[str], header: Mapping[str, Any]) -> list[str]:
    largest = max(suite.rows.values(), key=lambda scores: _size(scores))
    n, tasks = _size(largest)
    seeds = ", ".join(map(str, suite.seeds))
    drawn = "items within each" if suite.fixed_tasks else "tasks"
    how = {
        "likelihood": "the choice of the highest likelihood per byte",
        "benchmarks": "the greedy answer",
        "tasks": "the greedy answer",
    }[suite.kind]
    notes = [
        f"{tasks} tasks, n = {n:,} answers a row, seeds {seeds}; {suite.score} of {how}, with 95 % intervals from "
        f"{DRAWS:,} bootstrap draws over {drawn}."
    ]
    if number := header.get("examples"):
        some = "1 example" if number == 1 else f"up to {number} examples"
        where = "in prompts too" if header.get("examples_in_prompt") else "in prompts it stands alone"
        notes.append(f"**What T2L reads comes with {some}**, another task's and random text as well; {where}.")
    if missing:
        notes.append(
            "**Controls are missing: " + "; ".join(f"{REQUIRED[row]} ({row})" for row in missing) + ".** Without them "
            "nothing here shows that an adapter helps because of its description."
        )
    if suite.unscored:
        listed = ", ".join(f"{task} ({number})" for task, number in suite.unscored.items())
        notes.append(f"**Not scored, because code was not run: {listed}.**")
    low = [
        f"{row} on {task} ({share:.0%})"
        for row, by_task in suite.parsed.items()
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


def _title(suite: Suite) -> str:
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
    names = ["plain prompt", "description in prompt", "3 examples in prompt", "3 examples + description"]
    cells = []
    for adapter, title in ADAPTERS.items():
        row = [Row(adapter, *form).name for form in forms]
        if any(name in suite.rows for name in row):
            cells.append([title, *(_cell(suite, name) for name in row)])
    used = [0, *(i for i in range(1, 5) if any(row[i] for row in cells))]
    head = ["", *names]
    return Table(_title(suite), notes, [[row[i] for i in used] for row in [head, *cells]])


def _cell(suite: Suite, name: str) -> str:
    if name not in suite.rows:
        return ""
    most = max(_size(scores)[1] for scores in suite.rows.values())
    row = estimate(suite.rows[name])
    return str(row) + (f" ({row.tasks} tasks)" if row.tasks < most else "")


def _rows_table(suite: Suite, notes: list[str]) -> Table:
    """A row for each row, a column for each benchmark, in per cent with half an interval's width."""
    tasks, above = suite.tasks, suite.above_chance()
    head = ["", "average", *(["average above chance"] if above != tasks else []), *tasks]
    cells = []
    for name, scores in suite.rows.items():
        row = ROWS[name]
        forms = {"plain": "", "description": " + description in prompt", "shots": " + 3 examples in prompt"}
        form = forms.get(row.prompt, " + 3 examples and description in prompt")
        complete = len(scores) == len(tasks)
        averages = [_percent(estimate(scores, fixed_tasks=True)) if complete else ""]
        if above != tasks:
            part = {task: scores[task] for task in above if task in scores}
            averages.append(_percent(estimate(part, fixed_tasks=True)) if part and len(part) == len(above) else "")
        each = [_percent(estimate({task: scores[task]})) if task in scores else "" for task in tasks]
        shares = suite.parsed.get(name)
        parsed = [f"{np.mean(list(shares.values())):.0%}"] if shares else []
        cells.append([ADAPTERS[row.adapter] + form, *averages, *each, *parsed])
    notes = [*notes, "In per cent, ± half the interval's width; an average counts benchmarks alike."]
    if above != tasks:
        notes.append(
            "The average above chance leaves out benchmarks on which no row's interval lies above chance: "
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
    return Table(_title(suite), notes, [[*head, *(["answers read"] if suite.parsed else [])], *cells])


def _percent(row: Estimate) -> str:
    return f"{100 * row.mean:.1f} ± {50 * (row.high - row.low):.1f}"


def _differences_table(suite: Suite, found: Sequence[tuple[str, str, Difference]]) -> Table | None:
    cells = [["row", "minus", "prompt", "difference", "p", "n", "tasks"]]
    for one, other, value in found:
        same = same_prompts(suite, one, other)
        form = {"plain": "plain", "description": "with description"}.get(ROWS[one].prompt, ROWS[one].prompt)
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
        "Paired: the same questions under the same prompt, only the adapter differs. Intervals from the bootstrap "
        f"above, p (two-sided) from a sign-flip permutation test over {unit}."
    ]
    return Table(f"{_title(suite)}: paired differences", notes, cells)


def _by_checkpoint(files: Sequence[AnswerFile], options: Options) -> dict[str, dict[str, Suite]]:
    """Weights' sha256 to the suites that they were judged on, by name."""
    by_weights: dict[str, list[AnswerFile]] = defaultdict(list)
    for file in files:
        if weights := file.header.get("checkpoint_sha256"):
            by_weights[weights].append(file)
    if len(by_weights) < 2:
        return {}
    return {
        weights: {suite.name: suite for suite in gather(mine, score=options.score, partial=True)}
        for weights, mine in by_weights.items()
    }


def _checkpoints_table(suite: Suite, each: Mapping[str, Suite], pairs: Sequence[tuple[str, str]]) -> Table:
    """Means and differences of each of several checkpoints."""

    def everywhere(*names: str) -> bool:
        return all(name in one.rows for one in each.values() for name in names)

    scores = {name: [x.rows[name] for x in each.values()] for name in suite.rows if everywhere(name)}
    scores |= {
        f"{one} − {other}": [_paired(x.rows[one], x.rows[other]) for x in each.values()]
        for one, other in pairs
        if everywhere(one, other)
    }
    means = {name: [_mean(_groups(x, suite.fixed_tasks)) for x in found] for name, found in scores.items()}
    head = ["row", *(f"`{weights[:8]}`" for weights in each), "standard deviation"]
    cells = [[name, *(f"{x:.3f}" for x in found), f"{np.std(found, ddof=1):.3f}"] for name, found in means.items()]
    notes = [
        "Checkpoints by their weights' sha256, each on its own seeds: how trainings differ, which no interval holds."
    ]
    return Table(f"{_title(suite)}: by checkpoint", notes, [head, *cells])


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
                ", ".join(f"{row}: {why}" for row, why in facts.get("left_out", {}).items()) or "–",
            ]
        )
    return Table("Where the answers came from", [], cells)


# ------------------------------------------------------------------------------------------------------- documents


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
    """Every estimate, one a line: rows over all tasks and by task, and differences. Arguments as of `tables`."""
    suites, _ = tables(files, options)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["suite", "task", "row", "minus", "score", "mean", "low", "high", "p", "one_sided_low", "n", "tasks", "parsed"]
    )
    for suite in suites:
        for name, scores in suite.rows.items():
            shares = suite.parsed.get(name, {})
            overall = estimate(scores, fixed_tasks=suite.fixed_tasks)
            mean_share = f"{np.mean(list(shares.values())):.4f}" if shares else ""
            writer.writerow(
                [
                    suite.name,
                    "all",
                    name,
                    "",
                    suite.score,
                    *_numbers(overall),
                    "",
                    "",
                    overall.n,
                    overall.tasks,
                    mean_share,
                ]
            )
            for task in scores:
                row = estimate({task: scores[task]})
                share = f"{shares[task]:.4f}" if task in shares else ""
                writer.writerow([suite.name, task, name, "", suite.score, *_numbers(row), "", "", row.n, 1, share])
        for one, other, value in compared(suite, options.compare):
            numbers = [*_numbers(value), f"{value.p:.5f}", f"{value.one_sided_low:.4f}"]
            writer.writerow([suite.name, "all", one, other, suite.score, *numbers, value.n, value.tasks, ""])
    return out.getvalue()


def _numbers(row: Estimate) -> list[str]:
    return [f"{value:.4f}" for value in (row.mean, row.low, row.high)]


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:.85rem;display:block;overflow-x:auto}th,td{padding:.3rem .6rem;text-align:left;
border-bottom:1px solid #ddd;white-space:nowrap}th{background:#f6f6f6}tr:hover td{background:#fafafa}svg{max-width:100%;
height:auto}"""


def as_html(files: Sequence[AnswerFile], options: Options = DEFAULT) -> str:
    """The report as one page that needs no other file, with plots. Arguments as of `tables`.

    Raises:
        EvaluationError: if matplotlib is not installed, or as `tables`.
    """
    suites, found = tables(files, options)
    plots = {_title(suite): _plot(suite, compared(suite, options.compare)) for suite in suites}
    parts = []
    for table in found:
        head, *body = ([_inline(cell) for cell in row] for row in table.cells)
        parts.append(f"<h2>{html.escape(table.title)}</h2>")
        parts += [f"<p>{_inline(note)}</p>" for note in table.notes]
        parts.append(plots.get(table.title, ""))
        rows = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body]
        parts.append(
            f"<table><thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>"
        )
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>t2l eval report</title><style>{STYLE}</style>"
        f"</head><body><h1>Judged adapters</h1>{''.join(parts)}</body></html>\n"
    )


def _inline(text: str) -> str:
    """Escaped text with Markdown's bold."""
    parts = html.escape(text).split("**")
    return "".join(f"<strong>{part}</strong>" if i % 2 else part for i, part in enumerate(parts))


def _plot(suite: Suite, differences: Sequence[tuple[str, str, Difference]]) -> str:
    """Rows with their intervals, and paired differences with theirs, as an SVG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError(
            "Plots need matplotlib: pip install 'text-to-lora[eval]'; Markdown and CSV do without"
        ) from error

    rows = [(name, estimate(scores, fixed_tasks=suite.fixed_tasks)) for name, scores in suite.rows.items()]
    gaps: list[tuple[str, Estimate]] = [(f"{one} − {other}", value) for one, other, value in differences]
    figure = Figure(figsize=(11, 0.6 + 0.26 * max(len(rows), len(gaps))), layout="constrained")
    panels = [(rows, suite.score), *([(gaps, "paired differences")] if gaps else [])]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (points, title) in zip(axes, panels, strict=True):
        y = np.arange(len(points))[::-1]
        means = np.array([row.mean for _, row in points])
        around = np.array([[row.mean - row.low for _, row in points], [row.high - row.mean for _, row in points]])
        axis.errorbar(means, y, xerr=around.clip(0), fmt="o", markersize=4, capsize=2, color="#1f5fa8")
        axis.set_yticks(y, [name for name, _ in points], fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="x", labelsize=8)
    if gaps:
        axes[1].axvline(0, color="#888", linewidth=1)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


FORMATS = {".md": markdown, ".csv": as_csv, ".html": as_html}


def document_for(path: Path) -> Any:
    """The function that makes the document that a file's suffix names.

    Raises:
        DataError: if there is none for it.
    """
    if path.suffix not in FORMATS:
        raise DataError(f"{path}: reports are written as {', '.join(FORMATS)}")
    return FORMATS[path.suffix]
