"""Freeze which tasks are trained on, which choose settings and which are the zero-shot test.

The split is computed from the data alone, with no look at any model: run again on the same files it writes
the same bytes. ``--check`` says whether the committed file is still what the rule gives.

    python research/make_splits.py --data DIR [--out FILE] [--check]
"""

import argparse
import difflib
import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from t2l.data.overlap import CONTAINMENT, GRAM_WORDS, MAX_SHARED, Corpus, Overlap, build_corpus
from t2l.errors import DataError

FORMAT_VERSION = 1
SEED = 20240
TEST_TASKS = 60
# Below 50 scored instances one answer moves a task's accuracy by more than 2 points; most tasks have 60.
MIN_TEST_INSTANCES = 50
# At most a twelfth of the test from one category, so that question answering does not decide the average.
CATEGORY_CAP = 5
MIN_UNSEEN, MAX_UNSEEN = 12, 14

TASKS_FILE = "sni_tasks.parquet"
BENCHMARKS_FILE = "benchmarks.parquet"
# Benchmarks stand in the corpus as tasks of this name, to be compared with and never to be listed.
BENCHMARK_PREFIX = "benchmark "
EXAMPLE_FILES = {"train": "sni_train.parquet", "validation": "sni_val.parquet", "test": "sni_test.parquet"}
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "src" / "t2l" / "data" / "splits.json"

RULE = f"""\
Overlap: the inputs of a task are those of its training, validation and test examples together. An input is \
normalised (lower case, punctuation dropped, white space collapsed). It occurs in another task 'exact' if one of that \
task's normalised inputs has the same hash, and 'ngram' if at least {CONTAINMENT:.0%} of its distinct word \
{GRAM_WORDS}-grams occur among all inputs of that one task (an input of fewer than {GRAM_WORDS} words is compared \
whole). Task A shares p % with task B if p % of A's inputs, or of its test inputs alone, occur in B, by whichever of \
the two measures and of the two sets of inputs gives most; 'too much' is more than {MAX_SHARED:.0%}.
Never trained on nor tested: tasks whose benchmark_overlap is set and tasks whose lol_split is 'removed'. The \
validation tasks are the paper's; one that overlaps a benchmark stays among them and is named in \
validation_with_benchmark_overlap. Tasks without examples here are not listed at all.
Benchmarks: an 'other' task that shares too much with a benchmark (all its splits here) is excluded even if its \
benchmark_overlap is not set.
Validation: an 'other' task that shares too much with a validation task, in either direction, is excluded. Tasks of \
the paper's train split are kept whatever they share; overlap_validation reports it.
Candidates for the test: 'other' tasks with at least {MIN_TEST_INSTANCES} test instances that share too much neither \
with any task of the paper's train split nor with a validation task. Difficulty, answer length and model scores play \
no part.
Unseen categories: every category (a named one; tasks without a category never count) that has candidates and no task \
in the paper's train split is held out, and all its candidates are test tasks. As long as they are fewer than \
{MIN_UNSEEN}, categories with exactly one task in the paper's train split are held out as well, those with the most \
candidates first (ties by name), passing over one that would make them more than {MAX_UNSEEN}; that one task is then \
excluded from training. Whatever else such a category has is excluded too, so that no task of it is trained on. A \
category is what Super-NaturalInstructions calls one: a held-out category can have a near neighbour in training under \
another name, and a validation task may belong to it.
The rest of the {TEST_TASKS} seats go to the other categories (no category counts as one of its own) in proportion to \
their numbers of candidates, by the Sainte-Laguë method, at most {CATEGORY_CAP} each. Within a category tasks are \
taken in the order of sha256('seed:task'); ties between categories fall in the order of sha256('seed:category').
After the choice an 'other' task with which a test task shares too much is excluded. All remaining tasks of the \
paper's train split and of 'other' are the training set. The overlap figures are taken against this training set: by \
each measure the largest share with one training task, and the share of the test inputs that occur, by either measure, \
in any training task at all."""


@dataclass(frozen=True)
class Task:
    """What the choice looks at: where a task comes from, its category and how much can be scored."""

    name: str
    split: str
    category: str | None
    benchmark: str | None
    n_test: int


def seeded_order(text: str, seed: int = SEED) -> str:
    """A sort key that shuffles by the seed and depends on no library's random numbers."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def share_seats(sizes: dict[str, int], seats: int, cap: int, seed: int = SEED) -> dict[str, int]:
    """Sainte-Laguë: each seat goes to the stratum with the highest size / (2 * seats so far + 1)."""
    given = dict.fromkeys(sizes, 0)
    for _ in range(seats):
        open_strata = [name for name in sizes if given[name] < min(cap, sizes[name])]
        if not open_strata:
            raise DataError(f"{seats} test tasks are wanted, but the candidates give only {sum(given.values())}.")
        best = min(open_strata, key=lambda name: (-sizes[name] / (2 * given[name] + 1), seeded_order(name, seed)))
        given[best] += 1
    return given


def unseen_categories(candidates: Sequence[Task], paper_train: Sequence[Task]) -> list[str]:
    """The categories to hold out: those nothing of the paper's train split has, and more if these are too few."""
    candidate_count = Counter(task.category for task in candidates if task.category is not None)
    train_count = Counter(task.category for task in paper_train)
    chosen = [category for category in candidate_count if train_count[category] == 0]
    total = sum(candidate_count[category] for category in chosen)
    rare = [category for category in candidate_count if train_count[category] == 1]
    for category in sorted(rare, key=lambda name: (-candidate_count[name], name)):
        if total < MIN_UNSEEN and total + candidate_count[category] <= MAX_UNSEEN:
            chosen.append(category)
            total += candidate_count[category]
    if total < MIN_UNSEEN:
        raise DataError(f"Only {total} test tasks of unseen categories can be had; {MIN_UNSEEN} are wanted.")
    return sorted(chosen)


def choose_seen(candidates: Sequence[Task], seats: int) -> list[str]:
    """Fill the seats over the categories in proportion to their candidates."""
    strata: dict[str, list[str]] = defaultdict(list)
    for task in candidates:
        strata[task.category or "no category"].append(task.name)
    given = share_seats({category: len(names) for category, names in strata.items()}, seats, CATEGORY_CAP)
    return [name for category, names in strata.items() for name in sorted(names, key=seeded_order)[: given[category]]]


def permanent_exclusions(tasks: Iterable[Task]) -> dict[str, str]:
    """Tasks that come from a benchmark, or that the paper removed, and why they are out."""
    excluded = {}
    for task in tasks:
        if task.split == "removed":
            excluded[task.name] = f"removed by the paper: overlaps benchmark {task.benchmark or 'unknown'}"
        elif task.benchmark and task.split != "validation":
            excluded[task.name] = f"overlaps benchmark {task.benchmark}"
    return excluded


def worst_reason(task: str, against: Iterable[str], overlap: Overlap, kind: str) -> str | None:
    """The reason to exclude ``task``: of the tasks ``against`` whose inputs it has too many of, the worst."""
    shares = [(overlap.share(other, task), other) for other in against]
    share, other = max(shares)
    return f"shares inputs with {kind} task {other} ({share:.1%})" if share > MAX_SHARED else None


class SplitOverlap(Overlap):
    """Which tasks share too many inputs, and what is said of it in the split's file."""

    def too_much(self, task: str, others: Iterable[str]) -> list[str]:
        """Those of ``others`` in which more than the allowed share of ``task``'s inputs occur."""
        return [other for other in others if self.share(task, other) > MAX_SHARED]

    def report(self, task: str, training: Sequence[str]) -> dict[str, Any]:
        """The worst training task by each measure, and what all training tasks together share with the scored part."""
        number = self.number[task]
        trained = np.array([self.number[name] for name in training], dtype=np.int64)
        figures: dict[str, Any] = {}
        seen = np.zeros(len(self.corpus.owner), dtype=bool)
        for measure in self.hits:
            shares = self.shares[measure][number][trained]
            worst = int(shares.argmax())
            figures[measure] = {
                "share": round(float(shares[worst]), 4),
                "task": training[worst] if shares[worst] > 0 else None,
            }
            hits = self.hits[measure][number]
            seen[hits.inputs[np.isin(hits.tasks, trained)]] = True
        scored = self.corpus.scored & (self.corpus.owner == number)
        figures["test_inputs_in_any_training_task"] = round(float(seen[scored].mean()), 4)
        return figures


def make_split(tasks: Sequence[Task], corpus: Corpus) -> dict[str, Any]:
    """Apply the rule. ``tasks`` are those with examples, sorted by name."""
    excluded = permanent_exclusions(tasks)
    paper_train = [task for task in tasks if task.split == "train"]
    others = [task for task in tasks if task.split == "other" and task.name not in excluded]
    validation = [task.name for task in tasks if task.split == "validation"]
    overlap = SplitOverlap(corpus, [*(task.name for task in others), *validation])

    benchmarks = [name for name in corpus.tasks if name.startswith(BENCHMARK_PREFIX)]
    for task in others:
        found = overlap.too_much(task.name, benchmarks)
        if found:
            worst = max(found, key=lambda name: overlap.share(task.name, name))
            excluded[task.name] = f"shares inputs with {worst} ({overlap.share(task.name, worst):.1%} of its own)"
            continue
        reason = worst_reason(task.name, validation, overlap, "validation")
        back = overlap.too_much(task.name, validation)
        if reason is None and back:
            reason = (
                f"shares inputs with validation task {back[0]} ({overlap.share(task.name, back[0]):.1%} of its own)"
            )
        if reason is not None:
            excluded[task.name] = reason
    candidates = [
        task
        for task in others
        if task.name not in excluded
        and task.n_test >= MIN_TEST_INSTANCES
        and not overlap.too_much(task.name, (train.name for train in paper_train))
    ]
    held_out = unseen_categories(candidates, [task for task in paper_train if task.name not in excluded])
    unseen = [task.name for task in candidates if task.category in held_out]
    seen = [task for task in candidates if task.category not in held_out]
    test = sorted(unseen + choose_seen(seen, TEST_TASKS - len(unseen)))

    for task in [*paper_train, *others]:
        if task.name in test or task.name in excluded:
            continue
        if task.category in held_out:
            excluded[task.name] = f"category {task.category} is held out for the test"
        elif task.split == "other":
            reason = worst_reason(task.name, test, overlap, "test")
            if reason is not None:
                excluded[task.name] = reason
    training = sorted({task.name for task in [*paper_train, *others]} - set(test) - set(excluded))
    return {
        "test": test,
        "test_unseen_category": unseen,
        "validation": validation,
        "validation_with_benchmark_overlap": [t.name for t in tasks if t.name in validation and t.benchmark],
        "excluded": dict(sorted(excluded.items())),
        "train": training,
        "overlap": {name: overlap.report(name, training) for name in test},
        "overlap_validation": {name: overlap.report(name, training) for name in validation},
    }


def read_tasks(folder: Path) -> list[Task]:
    """The tasks that have examples, sorted by name."""
    columns = ["task", "lol_split", "category", "benchmark_overlap", "n_train", "n_test"]
    rows = pq.read_table(folder / TASKS_FILE, columns=columns).to_pylist()
    tasks = [
        Task(row["task"], row["lol_split"], row["category"], row["benchmark_overlap"], row["n_test"])
        for row in rows
        if row["n_train"]
    ]
    return sorted(tasks, key=lambda task: task.name)


def read_examples(folder: Path) -> Iterable[tuple[str, str, bool]]:
    """Task, input and whether it is scored, of every example, the benchmarks' included."""
    for split, name in EXAMPLE_FILES.items():
        table = pq.read_table(folder / name, columns=["task", "input"])
        for task, text in zip(table["task"].to_pylist(), table["input"].to_pylist(), strict=True):
            yield task, text, split == "test"
    table = pq.read_table(folder / BENCHMARKS_FILE, columns=["benchmark", "input"])
    for benchmark, text in zip(table["benchmark"].to_pylist(), table["input"].to_pylist(), strict=True):
        yield BENCHMARK_PREFIX + benchmark, text, False


def build_document(folder: Path) -> str:
    """The text of the split file."""
    document = {
        "format_version": FORMAT_VERSION,
        "seed": SEED,
        "rule": RULE,
        "data": data_checksums(folder),
        **make_split(read_tasks(folder), build_corpus(read_examples(folder))),
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def data_checksums(folder: Path) -> dict[str, str]:
    """The sha256 of every data file.

    Raises:
        DataError: if one is missing.
    """
    names = [TASKS_FILE, *EXAMPLE_FILES.values(), BENCHMARKS_FILE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} has no {', '.join(missing)}; give the folder of the packed data with --data.")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def differences(path: Path, text: str) -> str:
    """A unified diff from the file to ``text``; empty if they agree."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = difflib.unified_diff(
        old.splitlines(keepends=True), text.splitlines(keepends=True), str(path), "recomputed", n=1
    )
    return "".join(lines)


def write_or_check(
    description: str, out: Path, build: Callable[[Path], str], parts: Sequence[str], arguments: Sequence[str] | None
) -> int:
    """The command line of a script that freezes a list: ``build`` gives the file's text from the data folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=os.environ.get("T2L_DATA"), help="data folder (default: T2L_DATA)")
    parser.add_argument("--out", type=Path, default=out, help="file to write (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 with a diff if the file differs")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("no data folder: give --data or set T2L_DATA")
    try:
        text = build(options.data)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        changes = differences(options.out, text)
        sys.stdout.write(changes)
        return 1 if changes else 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    document = json.loads(text)
    print(", ".join(f"{part}: {len(document[part])}" for part in parts))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parts = ("train", "test", "test_unseen_category", "validation", "excluded")
    description = "Write the frozen split of tasks, or check the committed one."
    return write_or_check(description, DEFAULT_OUT, build_document, parts, arguments)


if __name__ == "__main__":
    sys.exit(main())
