"""Looks for what would spoil a training: leaks into held-out tasks, blank answers, empty tasks, repeats.

Knows tasks, the packed files and the overlap measures. Knows nothing of training and prints nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from t2l.data import packed
from t2l.errors import DataError
from t2l.tasks import SPLITS, Example, Task, data_dir, load_own, load_sni, load_splits, read_parquet

Count = Callable[[list[str]], list[int]]

HELD_OUT, BENCHMARK = "held-out ", "benchmark "
MANY_LABELS = 20
"""A task with more different answers than this is not taken for a classification."""
LISTED = 5


@dataclass
class Report:
    """What was found. Problems would make training wrong; warnings may be meant."""

    path: str
    kind: str
    totals: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check(path: str, *, count_tokens: Count | None = None, manifest: bool = False) -> Report:
    """Examines a folder of packed files, or own tasks (anything that `t2l.tasks.load_own` reads).

    Args:
        path: A folder, a JSONL file or `hf:NAME`.
        count_tokens: Token counts of texts; lengths are in characters only if it is not given.
        manifest: Also compare a packed folder's files with its manifest's checksums.

    Raises:
        DataError: if the data cannot be read at all.
    """
    is_packed = (Path(path) / packed.TASKS).is_file() or (Path(path) / packed.BENCHMARKS).is_file()
    report = Report(path, "packed folder" if is_packed else "own tasks")
    if manifest:
        if not is_packed and not (Path(path) / packed.MANIFEST).exists():
            raise DataError(f"{path} is no folder of packed files; --manifest has nothing to compare")
        report.problems += [f"{name} {problem}" for name, problem in packed.verify_manifest(Path(path)).items()]
        if report.problems:
            return report  # nothing that is read from such files would mean anything
    if is_packed:
        tasks = _read_packed(Path(path), report)
    else:
        tasks = load_own(path)
        _check_names(tasks, report)
    _check_tasks(tasks, report, count_tokens)
    held_out, benchmarks = _protected(Path(path) if is_packed else None, report)
    _check_leaks(tasks, held_out, benchmarks, report, own=not is_packed)
    return report


# ------------------------------------------------------------------------------------------------- reading


def _read_packed(folder: Path, report: Report) -> list[Task]:
    rows = {name: packed.check_schema(folder / name, name) for name in packed.FILES if (folder / name).is_file()}
    report.totals["rows"] = rows
    absent = [name for name in packed.SNI_FILES if name not in rows]
    if len(absent) == len(packed.SNI_FILES):
        return []
    if absent:
        report.problems.append(f"{', '.join(absent)} missing, without which tasks cannot be read")
        return []
    table = read_parquet(folder / packed.TASKS, ("task", "n_train", "n_validation", "n_test")).to_pylist()
    repeated = [name for name, count in Counter(row["task"] for row in table).items() if count > 1]
    if repeated:
        report.problems.append(f"{packed.TASKS} lists {_some(repeated)} more than once")
    tasks = load_sni([row["task"] for row in table], folder=folder)
    found = {task.name: task for task in tasks}
    wrong = []
    for row in table:
        examples = found[row["task"]].examples
        for column, split in (("n_train", "train"), ("n_validation", "val"), ("n_test", "test")):
            if row[column] != len(examples.get(split, ())):
                wrong.append(f"{row['task']} ({column} is {row[column]}, {len(examples.get(split, ()))} are there)")
    if wrong:
        report.problems.append(f"examples are missing or too many: {_some(wrong)}")
    listed = set(found)
    for name in packed.EXAMPLES.values():
        unlisted = set(read_parquet(folder / name, ["task"])["task"].unique().to_pylist()) - listed
        if unlisted:
            report.problems.append(f"{name} has examples of tasks that {packed.TASKS} does not list: {_some(unlisted)}")
    without = [task.name for task in tasks if not task.examples]
    report.totals["tasks_without_examples"] = len(without)
    splits = load_splits()
    needed = [name for name in without if name in splits.train | splits.validation | splits.test]
    if needed:
        report.problems.append(f"empty tasks that the frozen split uses: {_some(needed)}")
    elif without:
        report.warnings.append(f"{len(without)} listed tasks have no examples; the frozen split uses none of them")
    return [task for task in tasks if task.examples]


def _check_names(tasks: Sequence[Task], report: Report) -> None:
    splits = load_splits()
    for part, names in (("test", splits.test), ("validation", splits.validation), ("excluded", splits.excluded)):
        taken = [task.name for task in tasks if task.name in names]
        if taken:
            report.problems.append(f"tasks of the frozen split ({part}), which no trainer takes: {_some(taken)}")


# --------------------------------------------------------------------------------------------- task by task


def _lengths(texts: Sequence[str], count: Count | None) -> dict[str, Any]:
    def figures(values: Sequence[int]) -> dict[str, Any]:
        ordered = sorted(values)
        return {
            "mean": round(mean(ordered), 1),
            "median": ordered[len(ordered) // 2],
            "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
            "max": ordered[-1],
        }

    if not texts:
        return {}
    found = {"characters": figures([len(text) for text in texts])}
    return found if count is None else {**found, "tokens": figures(count(list(texts)))}


@dataclass
class _Counts:
    """What is wrong with examples, task by task."""

    blank: list[str] = field(default_factory=list)
    no_input: list[str] = field(default_factory=list)
    repeated: Counter[str] = field(default_factory=Counter)
    conflicting: Counter[str] = field(default_factory=Counter)
    train_in_test: Counter[str] = field(default_factory=Counter)
    train_in_validation: Counter[str] = field(default_factory=Counter)

    def add(self, task: Task, examples: Sequence[Example]) -> None:
        """Looks at a task's examples."""
        self.blank += [f"{task.name} {e.id}" for e in examples if not all(o.strip() for o in e.outputs or ("",))]
        self.no_input += [f"{task.name} {e.id}" for e in examples if not e.input.strip()]
        for found in task.examples.values():
            answers: dict[str, set[tuple[str, ...]]] = {}
            for example in found:
                known = answers.setdefault(example.input, set())
                if example.outputs in known:
                    self.repeated[task.name] += 1
                elif known:
                    self.conflicting[task.name] += 1
                known.add(example.outputs)
        trained = {example.input for example in task.examples.get("train", ())}
        for split, counter in (("test", self.train_in_test), ("val", self.train_in_validation)):
            if shared := trained & {example.input for example in task.examples.get(split, ())}:
                counter[task.name] += len(shared)


def _check_tasks(tasks: Sequence[Task], report: Report, count: Count | None) -> None:
    texts: dict[str, list[str]] = {"input": [], "output": [], "description": []}
    counts = _Counts()
    for task in tasks:
        examples = [example for of_split in task.examples.values() for example in of_split]
        first = [len(e.outputs[0]) if e.outputs else 0 for e in examples]
        report.tasks[task.name] = entry = {
            "descriptions": len(task.descriptions),
            "examples": {split: len(found) for split, found in task.examples.items()},
            "mean_input_characters": round(mean(len(e.input) for e in examples), 1) if examples else None,
            "mean_output_characters": round(mean(first), 1) if examples else None,
        }
        texts["input"] += [e.input for e in examples]
        texts["output"] += [text for e in examples for text in e.outputs]
        texts["description"] += task.descriptions
        counts.add(task, examples)
        if labels := _labels(examples):
            entry["labels"] = labels
            if len(labels) == 1:
                report.warnings.append(f"{task.name}: every answer is “{next(iter(labels))}”")
    report.totals |= {
        "tasks": len(tasks),
        "tasks_with": {split: sum(bool(t.examples.get(split)) for t in tasks) for split in SPLITS},
        "examples": {split: sum(len(t.examples.get(split, ())) for t in tasks) for split in SPLITS},
        "descriptions": len(texts["description"]),
        "lengths": {kind: _lengths(found, count) for kind, found in texts.items()},
        "repeats": {
            "inside_a_split": counts.repeated.total(),
            "same_input_other_answer": counts.conflicting.total(),
            "train_inputs_in_own_test": counts.train_in_test.total(),
            "train_inputs_in_own_validation": counts.train_in_validation.total(),
        },
    }
    _report_tasks(tasks, counts, report)


def _report_tasks(tasks: Sequence[Task], counts: _Counts, report: Report) -> None:
    """Says what was counted: what training must not meet is a problem, the rest a warning."""
    if counts.blank:
        report.problems.append(f"{len(counts.blank)} examples have no or a blank answer: {_some(counts.blank)}")
    if found := counts.train_in_test:
        report.problems.append(
            f"{found.total()} training inputs stand in the test examples of their own task: {_some(found)}"
        )
    undescribed = [task.name for task in tasks if not task.descriptions]
    untrained = [task.name for task in tasks if report.kind == "own tasks" and not task.examples.get("train")]
    for what, names, number in (
        ("tasks have no description, without which no adapter can be written", undescribed, len(undescribed)),
        ("tasks have no training examples and are only watched", untrained, len(untrained)),
        ("examples have a blank input", counts.no_input, len(counts.no_input)),
        ("examples repeat another of their split word for word", counts.repeated, counts.repeated.total()),
        ("examples give an input again with another answer", counts.conflicting, counts.conflicting.total()),
        (
            "training inputs stand in the validation examples of their own task",
            counts.train_in_validation,
            counts.train_in_validation.total(),
        ),
    ):
        if number:
            report.warnings.append(f"{number} {what}: {_some(names)}")


def _labels(examples: Sequence[Example]) -> dict[str, int]:
    """Answers and how often each occurs, if the task looks like a classification."""
    counts = Counter(e.outputs[0].strip() for e in examples if e.outputs)
    short = all(len(label) <= 60 for label in counts)
    few = len(counts) <= MANY_LABELS and counts.total() >= 5 * len(counts)
    return dict(counts.most_common()) if short and few and counts.total() >= 10 else {}


# ---------------------------------------------------------------------------------------------------- leaks


def _protected(folder: Path | None, report: Report) -> tuple[list[Task], dict[str, list[str]]]:
    """The held-out tasks and the benchmarks' test inputs, from a packed folder itself and from T2L_DATA."""
    folders = [] if folder is None else [folder]
    try:
        folders.append(data_dir())
    except DataError as error:
        if folder is None:
            report.warnings.append(f"leaks into held-out tasks and benchmarks were not looked for: {error}")
            return [], {}
    splits = load_splits()
    held_out: dict[str, Task] = {}
    benchmarks: dict[str, list[str]] = {}
    for place in folders:
        if all((place / name).is_file() for name in packed.SNI_FILES):
            present = set(read_parquet(place / packed.TASKS, ["task"])["task"].to_pylist())
            wanted = (present & (splits.test | splits.validation)) - held_out.keys()
            held_out |= {task.name: task for task in load_sni(wanted, folder=place) if task.examples}
        if (place / packed.BENCHMARKS).is_file() and not benchmarks:
            table = read_parquet(place / packed.BENCHMARKS, ("benchmark", "split", "input"))
            for row in table.to_pylist():
                if row["split"] == "test":
                    benchmarks.setdefault(row["benchmark"], []).append(row["input"])
    if lacking := len(splits.test | splits.validation) - len(held_out):
        report.warnings.append(f"{lacking} of the held-out tasks are not here: leaks into them were not looked for")
    if not benchmarks:
        report.warnings.append("there is no benchmarks.parquet: leaks into benchmarks were not looked for")
    return list(held_out.values()), benchmarks


def _check_leaks(
    tasks: Sequence[Task],
    held_out: Sequence[Task],
    benchmarks: Mapping[str, Sequence[str]],
    report: Report,
    *,
    own: bool,
) -> None:
    splits = load_splits()
    # A packed folder holds the held-out tasks as well; only what is trained on can leak.
    trained = [t for t in tasks if t.examples.get("train") and (own or t.name in splits.train)]
    if not trained or not (held_out or benchmarks):
        return
    from t2l.data.overlap import MAX_SHARED, Overlap, build_corpus, normalise

    used = ("train",) if own else ("train", "val")

    def triples() -> Iterable[tuple[str, str, bool]]:
        for task in trained:
            for split in used:
                yield from ((task.name, example.input, False) for example in task.examples.get(split, ()))
        for task in held_out:
            for found in task.examples.values():
                yield from ((HELD_OUT + task.name, example.input, False) for example in found)
        for name, inputs in benchmarks.items():
            yield from ((BENCHMARK + name, text, False) for text in inputs)

    inputs_of = {HELD_OUT + t.name: [e.input for found in t.examples.values() for e in found] for t in held_out}
    inputs_of |= {BENCHMARK + name: list(inputs) for name, inputs in benchmarks.items()}
    # Whole inputs that are the same, whatever task they are in; short ones ("yes", "3 + 4") may be so by chance.
    whole = {normalise(example.input) for task in trained for s in used for example in task.examples.get(s, ())}
    same = {name: sum(normalise(text) in whole for text in inputs) for name, inputs in inputs_of.items()}
    report.totals["inputs_also_in_training"] = {name: count for name, count in same.items() if count}
    queries = [*inputs_of, *(t.name for t in trained)] if own else list(inputs_of)
    overlap = Overlap(build_corpus(triples()), queries)
    leaks = {}
    for task in trained:
        for other in inputs_of:
            shares = (overlap.share(task.name, other) if own else 0.0, overlap.share(other, task.name))
            if any(shares):
                leaks[task.name, other] = shares
    report.totals["leaks"] = [
        {"task": task, "into": other, "share_of_task": round(there, 4), "share_of_other": round(back, 4)}
        for (task, other), (there, back) in sorted(leaks.items(), key=lambda item: -max(item[1]))
    ]
    _report_leaks(leaks, report, MAX_SHARED)


def _report_leaks(leaks: Mapping[tuple[str, str], tuple[float, float]], report: Report, most: float) -> None:
    """Says which tasks share inputs; more than `most` of them with a test task or benchmark is a problem."""
    test = load_splits().test
    serious: dict[str, list[str]] = {"test": [], "validation": [], "benchmark": []}
    slight: Counter[str] = Counter()
    for (task_name, other), shares in leaks.items():
        kind = "test" if other.removeprefix(HELD_OUT) in test else "validation"
        if other.startswith(BENCHMARK):
            kind = "benchmark"
        if max(shares) > most:
            serious[kind].append(f"{task_name} and {other} ({max(shares):.1%})")
        else:
            slight[kind] += 1
    for kind, pairs in serious.items():
        if pairs:
            # The paper's own training tasks share inputs with its validation tasks: settings look too good there.
            found = report.warnings if kind == "validation" else report.problems
            found.append(f"training tasks share more than {most:.0%} of the inputs with a {kind} task: {_some(pairs)}")
    for kind, number in slight.items():
        report.warnings.append(
            f"{number} pairs of a training task and a {kind} task share inputs, up to {most:.0%} of them"
        )


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:LISTED]) + (f" and {len(listed) - LISTED} more" if len(listed) > LISTED else "")


def show(report: Report) -> None:
    """Prints the report's tables on standard output, of the first thirty tasks."""
    rows = 30
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    totals = report.totals
    if "examples" not in totals:
        return
    table = Table(title=escape(f"{report.path}: {report.kind}"), title_justify="left")
    for column in ("", "train", "val", "test"):
        table.add_column(column, justify="left" if not column else "right")
    for label, key in (("tasks with examples", "tasks_with"), ("examples", "examples")):
        table.add_row(label, *(f"{totals[key][split]:,}" for split in ("train", "val", "test")))
    console.print(table)

    table = Table(title="Lengths", title_justify="left")
    for column in ("text", "unit", "mean", "median", "p95", "max"):
        table.add_column(column, justify="right" if column not in ("text", "unit") else "left")
    for kind, units in totals["lengths"].items():
        for unit, figures in units.items():
            table.add_row(kind, unit, *(f"{figures[name]:,}" for name in ("mean", "median", "p95", "max")))
    console.print(table)

    table = Table(title="Tasks", title_justify="left")
    for column in ("task", "descriptions", "train", "val", "test", "answers"):
        table.add_column(column, justify="left" if column in ("task", "answers") else "right")
    for name, entry in list(report.tasks.items())[:rows]:
        labels = entry.get("labels", {})
        total = sum(labels.values())
        shown = ", ".join(f"{label} {count / total:.0%}" for label, count in list(labels.items())[:4])
        counts = (str(entry["examples"].get(split, 0)) for split in ("train", "val", "test"))
        more = f", {len(labels) - 4} more" if len(labels) > 4 else ""
        table.add_row(escape(name), str(entry["descriptions"]), *counts, escape(shown + more))
    console.print(table)
    if len(report.tasks) > rows:
        console.print(f"and {len(report.tasks) - rows} more tasks; --json lists all")
