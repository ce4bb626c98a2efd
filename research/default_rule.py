"""What replaces the default checkpoint, by the last section of research/zero_shot_protocol.md: every line of its rule.

    python research/default_rule.py --new r-*.jsonl --multitask r-multitask-*.jsonl --ships ships-*.jsonl

Each takes files of answers of the suites far_dev, validation, held-back, seen and everyday. Exits with 1 where a line
that decides is missed. Lines of suites that the files do not hold are left out, and said to be.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import exit_code

from t2l.eval import answers
from t2l.eval.results import gather
from t2l.eval.stats import Difference, Scores, difference
from t2l.tasks import data_dir, load_own

SUITES = {"validation": "choosing", "held-back": "choosing"}
FORMS = {"plain": "", "described": "+description"}
MOST = 0.8
"""Share of a task's inputs that list options from which it counts as one with options."""

Conditions = dict[str, dict[str, Scores]]
"""Suite to condition to scores."""


@dataclass(frozen=True)
class Line:
    """A difference in points that the rule asks for."""

    suite: str
    minus: str
    at_least: dict[str, float]
    """For each form of the prompt."""
    decides: bool = True


LINES = (
    Line("far_dev", "multitask", {"plain": -1, "described": -1}),
    Line("far_dev", "random", {"plain": 0, "described": 0}),
    Line("far_dev with options", "multitask", {"plain": -1, "described": -1}),
    Line("choosing", "multitask", {"plain": 8, "described": 0}),
    Line("choosing", "wrong", {"plain": 8, "described": 8}),
    Line("seen", "ships", {"plain": -2, "described": -2}),
    Line("choosing", "ships", {"plain": 0, "described": 0}, decides=False),
    Line("everyday", "multitask", {"plain": 0, "described": 0}, decides=False),
    Line("everyday", "base", {"plain": 0, "described": 0}, decides=False),
    Line("far_dev", "ships", {"plain": 0, "described": 0}, decides=False),
)


def lists_options(text: str, output: str) -> bool:
    """Whether an input lists options: by dashes, by name, or by holding its answer on lines of its own."""
    named = any(mark in text for mark in ("\n- ", "\n* ", "ption", "hoice"))
    return named or ("\n" in text and output.strip().lower() in text.lower())


def tasks_with_options(path: Path) -> set[str]:
    """The tasks most of whose inputs list options."""
    found = set()
    for task in load_own(path):
        examples = [example for some in task.examples.values() for example in some]
        if sum(lists_options(e.input, e.outputs[0]) for e in examples) > MOST * len(examples):
            found.add(task.name)
    return found


def conditions(paths: Sequence[Path], options: set[str]) -> Conditions:
    """The scores in files of answers; choosing tasks are one suite, far tasks with options a further one."""
    found: Conditions = {}
    for path in paths:
        for suite in gather([answers.read(path)]):
            name = SUITES.get(suite.name, suite.name)
            for condition, scores in suite.conditions.items():
                found.setdefault(name, {}).setdefault(condition, {}).update(scores)
    far = found.get("far_dev", {})
    listed = {c: {t: v for t, v in scores.items() if t in options} for c, scores in far.items()}
    return found | ({"far_dev with options": listed} if listed else {})


def compare(line: Line, form: str, new: Conditions, multitask: Conditions, ships: Conditions) -> Difference | None:
    """The line's difference; None where the files do not hold both sides."""
    end, own = FORMS[form], new.get(line.suite, {})
    other = {
        "multitask": multitask.get(line.suite, {}).get(f"multitask{end}"),
        "random": own.get(f"t2l-random{end}"),
        "wrong": own.get(f"t2l-wrong{end}"),
        "ships": ships.get(line.suite, {}).get(f"t2l{end}"),
        # The base knows what to do from its prompt alone.
        "base": ships.get(line.suite, {}).get("base+description"),
    }[line.minus]
    right = own.get(f"t2l{end}")
    return difference(right, other) if right and other else None


def report(new: Conditions, multitask: Conditions, ships: Conditions) -> list[str]:
    """Prints every line; returns those that decide and are missed."""
    missed = []
    for line in LINES:
        for form, least in line.at_least.items():
            name = f"{line.suite}, {form}: T2L - {line.minus}"
            found = compare(line, form, new, multitask, ships)
            if found is None:
                print(f"{name}: the files do not hold both")
                continue
            reached = 100 * found.mean >= least
            interval = f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
            word = ("reached" if reached else "MISSED") if line.decides else ("" if reached else "below")
            print(f"{name}: {100 * found.mean:+.1f} {interval} n={found.n}, at least {least:+g}: {word}".rstrip(": "))
            if line.decides and not reached:
                missed.append(name)
    return missed


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--new", "--multitask", "--ships"):
        parser.add_argument(name, type=Path, nargs="+", required=True)
    parser.add_argument("--far", type=Path, help="far_dev.jsonl; that of T2L_DATA, if absent")
    given = parser.parse_args()
    missed: list[str] = []

    def run() -> None:
        options = tasks_with_options(given.far or data_dir() / "far_dev.jsonl")
        missed.extend(report(*(conditions(paths, options) for paths in (given.new, given.multitask, given.ships))))
        print(json.dumps({"missed": missed}))

    return exit_code(run) or bool(missed)


if __name__ == "__main__":
    sys.exit(main())
