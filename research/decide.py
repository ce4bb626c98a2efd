"""What decides, by research/zero_shot_protocol.md: D1 to D4 from files of answers of the test, and on its parts.

    python research/decide.py test-0.jsonl.gz test-1.jsonl.gz test-2.jsonl.gz
    python research/decide.py test-*.jsonl.gz --instead multitask-description-*.jsonl.gz

`--instead` takes conditions of other weights, such as a second baseline or another training seed of T2L, in place of
those of the same name; items, prompts and evaluation seeds must be the same. With T2L_DATA set also on tasks with few
and with many different answers.
"""

import argparse
import os
import sys
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from common import exit_code

from t2l.errors import DataError
from t2l.eval import answers
from t2l.eval.results import Suite, gather
from t2l.eval.stats import Difference, Scores, difference, estimate
from t2l.tasks import load_sni, load_splits

FEW = 20
"""Different answers among the training examples of a task that has few."""


@dataclass(frozen=True)
class Rule:
    """A difference of two conditions, in points of exact match, and what it must be."""

    condition: str
    minus: tuple[str, ...]
    """The best of these."""
    at_least: float
    harmless: bool = False
    """Whether the one-sided lower end decides, in place of the mean and of an interval that excludes 0."""

    def reached(self, found: Difference) -> bool:
        """Whether a difference satisfies it."""
        if self.harmless:
            return 100 * found.one_sided_low >= self.at_least
        return 100 * found.mean >= self.at_least and found.mean > 0 and found.low > 0


RULES = {
    "D1": Rule("t2l+description", ("multitask+description",), 4.0),
    "D2": Rule("t2l+description", ("t2l-wrong+description",), 8.0),
    "D3": Rule("t2l+description", ("base+shots", "base+shots+description"), 0.0),
    "D4": Rule("t2l-random+description", ("multitask+description",), -2.0, harmless=True),
}


def the_test(paths: Sequence[Path]) -> Suite:
    """The suite `test` of files of answers.

    Raises:
        DataError: if they hold none.
    """
    for suite in gather([answers.read(path) for path in paths]):
        if suite.name == "test":
            return suite
    raise DataError("The files hold no answers of the suite test")


def in_place(suite: Suite, other: Suite) -> Suite:
    """The suite with the conditions of another in place of its own.

    Raises:
        DataError: if a condition of the other is of other prompts.
    """
    for condition, prompts in other.prompts.items():
        if condition in suite.conditions and prompts != suite.prompts[condition]:
            raise DataError(
                f"Condition {condition}: the files after --instead have other questions, prompts or judging seeds"
            )
    return replace(suite, conditions=suite.conditions | other.conditions, prompts=suite.prompts | other.prompts)


def parts() -> dict[str, Set[str]]:
    """Parts of the test that the protocol reports apart, without those that need data which is not there."""
    splits = load_splits()
    tasks, unseen = splits.test, splits.test_unseen_category
    found: dict[str, Set[str]] = {"categories without a training task": unseen, "other categories": tasks - unseen}
    if os.environ.get("T2L_DATA"):
        few = {
            task.name
            for task in load_sni(tasks, splits=("test", "train"))
            if len({output for example in task.examples["train"] for output in example.outputs}) <= FEW
        }
        found |= {"few different answers": few, "many different answers": tasks - few}
    return found


def only(suite: Suite, condition: str, tasks: Collection[str]) -> Scores:
    """A condition's scores on some tasks.

    Raises:
        DataError: if there is no such condition.
    """
    if condition not in suite.conditions:
        raise DataError(f"The files hold no condition {condition}; they hold {', '.join(suite.conditions)}")
    return {task: scores for task, scores in suite.conditions[condition].items() if task in tasks}


def decide(suite: Suite, tasks: Collection[str]) -> dict[str, tuple[str, Difference]]:
    """Rule to the condition that is subtracted and the difference, on some tasks."""
    found = {}
    for name, rule in RULES.items():
        best = max(rule.minus, key=lambda name: estimate(only(suite, name, tasks)).mean)
        found[name] = best, difference(only(suite, rule.condition, tasks), only(suite, best, tasks))
    return found


def markdown(suite: Suite) -> str:
    """A line for each rule and part."""
    lines = ["| rule | tasks | condition | minus | points | p | |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for part, tasks in {"all": set(suite.tasks), **parts()}.items():
        for name, (best, found) in decide(suite, tasks).items():
            rule = RULES[name]
            points = found.points + (f", one-sided {100 * found.one_sided_low:+.1f}" if rule.harmless else "")
            verdict = ("reached" if rule.reached(found) else "missed") if part == "all" else ""
            cells = [f"{name}, ≥ {rule.at_least:+.1f}", f"{part} ({found.tasks})", rule.condition, best, points]
            lines.append(f"| {' | '.join(cells)} | {found.p:.3f} | {verdict} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="answers of the suite test, of all training seeds")
    parser.add_argument("--instead", nargs="+", type=Path, help="answers of conditions that take the place of theirs")
    given = parser.parse_args(arguments)

    def run() -> None:
        suite = the_test(given.files)
        print(markdown(in_place(suite, the_test(given.instead)) if given.instead else suite))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
