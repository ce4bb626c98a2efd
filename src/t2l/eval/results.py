"""Answers of files sorted by suite, condition, task and item, and what may be compared among them.

Knows lines of answers and names of conditions. Knows no models, no data and no formats of reports.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from t2l.errors import DataError
from t2l.eval.answers import AnswerFile, merge
from t2l.eval.conditions import CONDITIONS, Condition
from t2l.eval.stats import Difference, Scores, below, difference, estimate

CONTROLS = {
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
"""Adapters whose conditions are compared, in every form of the prompt."""
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


@dataclass(frozen=True)
class Suite:
    """Answers of one suite, and what the files say about it."""

    name: str
    kind: str
    """`benchmarks`, `likelihood` or `tasks`."""
    score: str
    """Name of the score that is shown."""
    conditions: dict[str, Scores]
    parsed: dict[str, dict[str, float]]
    """Condition to task to the share of answers that could be read; only where answers are read."""
    prompts: dict[str, dict[tuple[int, str, str], str]]
    """Condition to (seed, task, id) to the prompt's hash."""
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
        """Tasks on which some condition's interval lies above chance."""
        found = []
        for task in self.tasks:
            estimates = [estimate({task: s[task]}) for s in self.conditions.values() if task in s]
            if any(one.low > self.chance.get(task, 0.0) for one in estimates):
                found.append(task)
        return found

    @property
    def tasks(self) -> list[str]:
        """In the order of the file's facts, or by name."""
        found = {task for scores in self.conditions.values() for task in scores}
        order = {task: i for i, task in enumerate(BENCHMARK_ORDER)}
        return sorted(found, key=lambda task: (order.get(task, len(order)), task))


def gather(files: Sequence[AnswerFile], *, score: str | None = None, partial: bool = False) -> list[Suite]:
    """Sorts answers by suite, condition, task and item.

    Args:
        files: Files of answers of one table.
        score: Which of the answers' scores; the first if not given.
        partial: Whether answers may be missing, as while a run is going on.

    Raises:
        DataError: if files do not go together, or a condition lacks answers within a task that it has.
    """
    lines = merge(files)
    by_suite: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_suite[line["suite"]].append(line)
    suites = [_suite(name, own, files, score) for name, own in by_suite.items()]
    for suite in suites if not partial else ():
        _require_complete(suite)
    return suites


def _suite(name: str, lines: Sequence[Mapping[str, Any]], files: Sequence[AnswerFile], score: str | None) -> Suite:
    score = score or next(iter(lines[0]["scores"]))
    scores: dict[str, Scores] = {name: defaultdict(lambda: defaultdict(list)) for name in CONDITIONS}
    read: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    prompts: dict[str, dict[tuple[int, str, str], str]] = defaultdict(dict)
    unscored: dict[str, int] = defaultdict(int)
    # By seed, so that the scores of one item stand in the same order in every condition.
    for line in sorted(lines, key=lambda line: (line["seed"], line["task"], line["id"])):
        condition, task = line["condition"], line["task"]
        require_condition(condition)
        if score not in line["scores"]:
            raise DataError(f"Suite {name} has no score '{score}'; it has: {', '.join(line['scores'])}")
        value = line["scores"][score]
        if value is None:
            unscored[task] += 1
            continue
        prompts[condition][line["seed"], task, line["id"]] = line["prompt"]
        scores[condition][task][line["id"]].append(float(value))
        if "parsed" in line["scores"]:
            read[condition][task].append(line["scores"]["parsed"])
    return Suite(
        name=name,
        kind=name if name in ("benchmarks", "likelihood") else "tasks",
        score=score.replace("_", " "),
        conditions={c: {task: dict(items) for task, items in found.items()} for c, found in scores.items() if found},
        parsed={c: {task: float(np.mean(v)) for task, v in by_task.items()} for c, by_task in read.items()},
        prompts=dict(prompts),
        unscored=dict(unscored),
        chance=_facts(files, name, "chance"),
        floor=_facts(files, name, "floor"),
        seeds=tuple(sorted({line["seed"] for line in lines})),
    )


def _facts(files: Sequence[AnswerFile], suite: str, fact: str) -> dict[str, float]:
    """What the files' first lines say of a suite's tasks."""
    found: dict[str, float] = {}
    for file in files:
        found |= file.header["suites"].get(suite, {}).get(fact, {})
    return found


def require_condition(name: str) -> None:
    """Raises DataError where there is no condition of a name, naming those there are."""
    if name not in CONDITIONS:
        raise DataError(f"There is no condition '{name}'; there are: {', '.join(CONDITIONS)}")


def _require_complete(suite: Suite) -> None:
    """A condition may lack whole tasks (no library holds them), but no answers of a task that it has."""
    expected: dict[str, set[tuple[int, str, str]]] = defaultdict(set)
    for keys in suite.prompts.values():
        for key in keys:
            expected[key[1]].add(key)
    for condition, keys in suite.prompts.items():
        missing = sum(len(expected[task] - keys.keys()) for task in {key[1] for key in keys})
        if missing:
            raise DataError(
                f"Suite {suite}, condition {condition}: {missing} answers are missing that other conditions have; run "
                "the same command again to finish the file"
            )


def same_prompts(suite: Suite, one: str, other: str) -> bool:
    """Whether two conditions saw the same prompt wherever both answered."""
    left, right = suite.prompts[one], suite.prompts[other]
    return all(left[key] == right[key] for key in left.keys() & right.keys())


def compared(suite: Suite, asked: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str, Difference]]:
    """Paired differences: those of `PAIRS` in each form of the prompt, and those that are asked for.

    Raises:
        DataError: if conditions that must have seen the same prompts did not, or one that is asked for does not exist.
    """
    found = []
    for one, other in PAIRS:
        for shots, description in ((False, False), (False, True), (True, False), (True, True)):
            names = Condition(one, description, shots).name, Condition(other, description, shots).name
            if all(name in suite.conditions for name in names):
                if not same_prompts(suite, *names):
                    raise DataError(f"Suite {suite}: conditions {' and '.join(names)} saw different prompts")
                found.append(names)
    for names in asked:
        for name in names:
            require_condition(name)
        if all(name in suite.conditions for name in names):
            found.append(names)
    return [
        (one, other, difference(suite.conditions[one], suite.conditions[other], fixed_tasks=suite.fixed_tasks))
        for one, other in dict.fromkeys(found)
    ]


def missing_controls(suites: Sequence[Suite]) -> dict[str, list[str]]:
    """Suite to the conditions of `CONTROLS` that it lacks in every form of the prompt."""
    missing = {}
    for suite in suites:
        there = {CONDITIONS[name].adapter for name in suite.conditions} | suite.conditions.keys()
        if lacking := [condition for condition in CONTROLS if condition not in there]:
            missing[suite.name] = lacking
    return missing


def below_floor(suite: Suite) -> list[str]:
    """Benchmarks on which the base model, scored by likelihood, does significantly worse than guessing does."""
    found = []
    for task, scores in suite.conditions.get("base", {}).items() if suite.kind == "likelihood" else ():
        floor = suite.floor.get(task, 0.0)
        right = sum(sum(values) / len(values) for values in scores.values())
        if floor and below(round(right), len(scores), floor):
            found.append(f"{task} ({right / len(scores):.3f} of {len(scores)} items, floor {floor:.3f})")
    return found
