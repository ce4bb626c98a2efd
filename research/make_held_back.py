"""Freeze which training tasks are held back, so that settings of zero-shot training can be chosen on them.

Computed from the data and the frozen split alone, with no look at any model: run again on the same files it writes
the same bytes. ``--check`` says whether the committed file is still what the rule gives.

    python research/make_held_back.py --data DIR [--out FILE] [--check]
"""

import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from make_splits import (
    DEFAULT_OUT,
    MIN_TEST_INSTANCES,
    Task,
    data_checksums,
    read_examples,
    read_tasks,
    seeded_order,
    share_seats,
    write_or_check,
)

from t2l.data.overlap import MAX_SHARED, Overlap, build_corpus

FORMAT_VERSION = 1
SEED = 20241
HELD_BACK = 40
# The test's 13 of 60, of 40, rounded.
UNSEEN_CATEGORY = 9
CATEGORY_CAP = 3
OUT = DEFAULT_OUT.with_name("held_back.json")

RULE = f"""\
Held back are {HELD_BACK} tasks of the frozen split's training set. Overlap and 'too much' (more than \
{MAX_SHARED:.0%}) are as in splits.json, whose test tasks share too much with no training task, so with none of these.
Candidates: training tasks with at least {MIN_TEST_INSTANCES} test instances that share too much with no other \
training task, and with which no other training task shares too much. Difficulty, answer length and model scores play \
no part. So no training task has to go because of the choice.
Unseen categories: named categories all of whose training tasks are candidates are held back whole, those with the \
fewest tasks first, as long as they hold no more than {UNSEEN_CATEGORY} tasks together (the test's share of unseen \
categories); one that would make them more is passed over, and what is larger than {CATEGORY_CAP} is not considered.
The rest of the seats go to the other categories (no category counts as one of its own) in proportion to their \
numbers of candidates (one fewer where these are all training tasks of the category, so that one is left), by the \
Sainte-Laguë method, at most {CATEGORY_CAP} each. Within a category tasks are taken in the order of \
sha256('seed:task'); ties between categories fall in the order of sha256('seed:category').
The overlap figures are taken against the training tasks that remain: by each measure the largest share with one of \
them; the share of the test inputs that occur, by either measure, in any of them at all; and, as 'reverse', the \
largest share of one of their inputs that occur in the task."""


def whole_categories(candidates: Sequence[Task], training: Sequence[Task]) -> list[str]:
    """The categories that are held back with all their tasks."""
    sizes = Counter(task.category for task in training if task.category is not None)
    able = Counter(task.category for task in candidates)
    whole = [name for name, size in sizes.items() if able[name] == size and size <= CATEGORY_CAP]
    chosen: list[str] = []
    total = 0
    for name in sorted(whole, key=lambda name: (sizes[name], seeded_order(name, SEED))):
        if total + sizes[name] <= UNSEEN_CATEGORY:
            chosen.append(name)
            total += sizes[name]
    return sorted(chosen)


def choose(candidates: Sequence[Task], training: Sequence[Task]) -> tuple[list[str], list[str]]:
    """(all that are held back, those of them whose category is held back whole), each sorted."""
    whole = whole_categories(candidates, training)
    unseen = sorted(task.name for task in candidates if task.category in whole)
    in_training = Counter(task.category for task in training)
    strata: dict[str, list[str]] = defaultdict(list)
    for task in candidates:
        if task.category not in whole:
            strata[task.category or "no category"].append(task.name)
    in_training["no category"] = in_training.pop(None, 0)
    sizes = {name: min(len(tasks), in_training[name] - 1) for name, tasks in strata.items()}
    given = share_seats(sizes, HELD_BACK - len(unseen), CATEGORY_CAP, SEED)
    rest = [
        name
        for category, names in strata.items()
        for name in sorted(names, key=lambda name: seeded_order(name, SEED))[: given[category]]
    ]
    return sorted(unseen + rest), unseen


def build_document(folder: Path) -> str:
    """The text of the file."""
    checksums = data_checksums(folder)
    names = json.loads(DEFAULT_OUT.read_text(encoding="utf-8"))["train"]
    training = [task for task in read_tasks(folder) if task.name in set(names)]
    overlap = Overlap(build_corpus(read_examples(folder)), names)
    touched = {name for task in names for other in overlap.too_much(task, names) for name in (task, other)}
    candidates = [task for task in training if task.n_test >= MIN_TEST_INSTANCES and task.name not in touched]
    held_back, unseen = choose(candidates, training)
    remaining = [name for name in names if name not in held_back]
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "seed": SEED,
        "rule": RULE,
        "data": checksums,
        "splits_sha256": hashlib.sha256(DEFAULT_OUT.read_bytes()).hexdigest(),
        "held_back": held_back,
        "held_back_unseen_category": unseen,
        "overlap": {name: overlap.report(name, remaining) | _reverse(overlap, name, remaining) for name in held_back},
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _reverse(overlap: Overlap, name: str, remaining: Sequence[str]) -> dict[str, Any]:
    share, other = max((overlap.share(other, name), other) for other in remaining)
    return {"reverse": {"share": round(share, 4), "task": other if share > 0 else None}}


def main(arguments: Sequence[str] | None = None) -> int:
    description = "Write the list of held-back tasks, or check the committed one."
    return write_or_check(description, OUT, build_document, ("held_back", "held_back_unseen_category"), arguments)


if __name__ == "__main__":
    sys.exit(main())
