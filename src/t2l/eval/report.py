"""Tables from per-answer JSONL files, and from nothing else: rows with n and intervals, and paired differences.

Knows the files' lines. Knows no models and no data.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2l.errors import DataError

Key = tuple[str, str, bool]
"""(suite, adapter, description in prompt)"""

NAMES = {
    "none": "base",
    "multi-task": "multi-task LoRA",
    "right": "T2L, right description",
    "wrong": "T2L, another task's description",
    "random": "T2L, random text",
}


@dataclass(frozen=True)
class Estimate:
    """A mean with a 95 % interval from a bootstrap over tasks."""

    mean: float
    low: float
    high: float
    n: int
    tasks: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def read_answers(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(facts about the run, one dict per answer).

    Raises:
        DataError: if the file is not what `t2l eval controls` writes.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return lines[0]["run"], lines[1:]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, IndexError) as error:
        raise DataError(f"{path} is not a file of answers: {error!r}") from error


def scores_by_row(answers: Sequence[Mapping[str, Any]]) -> dict[Key, dict[str, dict[str, float]]]:
    """For each row: task to instance to exact match."""
    rows: dict[Key, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for a in answers:
        row = rows[a["suite"], a["adapter"], a["description_in_prompt"]]
        row[a["task"]][f"{a['seed']}/{a['id']}"] = float(a["exact_match"])
    return rows


def estimate(by_task: Mapping[str, Mapping[str, float]], *, draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean over instances; tasks are drawn with replacement, because a task's instances are not independent."""
    tasks = sorted(by_task)
    sums = np.array([sum(by_task[task].values()) for task in tasks])
    counts = np.array([len(by_task[task]) for task in tasks])
    picks = np.random.default_rng(seed).integers(len(tasks), size=(draws, len(tasks)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high), int(counts.sum()), len(tasks))


def difference(
    one: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]], *, draws: int = 2000
) -> Estimate:
    """Paired difference of two rows over the same instances.

    Raises:
        DataError: if the rows do not hold the same instances.
    """
    paired: dict[str, dict[str, float]] = {}
    for task in one.keys() | other.keys():
        mine, theirs = one.get(task, {}), other.get(task, {})
        if mine.keys() != theirs.keys():
            raise DataError(f"Rows cannot be paired: task {task} has other instances in one than in the other")
        paired[task] = {instance: mine[instance] - theirs[instance] for instance in mine}
    return estimate(paired, draws=draws)


def summarize(answers: Sequence[Mapping[str, Any]]) -> dict[Key, Estimate]:
    """Every row's estimate."""
    return {key: estimate(by_task) for key, by_task in scores_by_row(answers).items()}


def markdown(answers: Sequence[Mapping[str, Any]]) -> str:
    """The table of every suite, with the paired differences that decide whether the description is used."""
    rows = scores_by_row(answers)
    seeds = sorted({a["seed"] for a in answers})
    parts = []
    for suite in dict.fromkeys(key[0] for key in rows):
        first = estimate(rows[suite, "none", False])
        parts += [
            f"Suite “{suite}”: {first.tasks} tasks, n = {first.n} answers a row, seeds {seeds}; exact match of the "
            "greedy answer, 95 % bootstrap interval over tasks.\n",
            "| adapter | description not in prompt | description in prompt |",
            "| --- | --- | --- |",
        ]
        for kind, name in NAMES.items():
            cells = [str(estimate(rows[suite, kind, mode])) for mode in (False, True)]
            parts.append(f"| {name} | {' | '.join(cells)} |")
        for text, one, other in (
            ("right − another task's", "right", "wrong"),
            ("right − random text", "right", "random"),
            ("right − multi-task LoRA", "right", "multi-task"),
        ):
            cells = [str(difference(rows[suite, one, mode], rows[suite, other, mode])) for mode in (False, True)]
            parts.append(f"| *{text}, paired* | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)
