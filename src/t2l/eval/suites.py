"""What is asked: tasks of a suite, their instances, and the texts that the conditions need for each of them.

Everything is drawn from seeds by name, so that a task's instances depend neither on the other tasks nor on how many
of them are asked. Knows tasks, benchmarks and what counts as a right answer. Knows no models and no adapters.
"""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from t2l.errors import DataError
from t2l.eval import code, metrics
from t2l.io import parse_json
from t2l.tasks import (
    Example,
    Task,
    as_sentence,
    data_dir,
    held_out_descriptions,
    load_everyday,
    load_own,
    load_sni,
    load_splits,
    made_up_words,
    read_parquet,
    written_descriptions,
)

SUITES = ("seen", "held-back", "validation", "test", "everyday", "benchmarks", "likelihood")
"""New instances of training tasks; tasks held back from training to choose settings; the validation and the zero-shot
test tasks of the frozen split; thirty tasks as an application developer would write them, never trained or tuned on;
the ten benchmarks answered in words; those with options by each option's likelihood."""
PACKED = tuple(suite for suite in SUITES if suite != "everyday")
"""Suites of other people's data, whose texts are not passed on."""
MOST_QUESTIONS = 20
"""So many questions of a suite stand in its file of answers, for a person to look at."""
MAX_SHOT_CHARACTERS = 1500
"""A longer example is not shown in a prompt."""

Kind = Literal["text", "option", "number", "code", "likelihood"]
SCORES: dict[Kind, tuple[str, ...]] = {
    "text": ("exact_match", "rouge_l"),
    "option": ("correct", "parsed"),
    "number": ("correct", "parsed"),
    "code": ("correct", "parsed"),
    "likelihood": ("correct", "correct_by_sum"),
}
"""Names of an answer's scores; the first is the one that tables show."""


@dataclass(frozen=True)
class Item:
    """One instance of a task."""

    id: str
    text: str
    outputs: tuple[str, ...]
    """Right answers; the first is the one that a worked example shows."""
    choices: tuple[str, ...] = ()
    target: int = -1
    """Position of the right choice."""
    tests: tuple[str, ...] = ()
    """Code that raises if the answer is wrong."""
    setup: str = ""
    """What the tests need to run."""
    function: str | None = None
    """Name of the function that `text` begins, where the answer goes on with it."""


@dataclass(frozen=True)
class EvalTask:
    """A task as it is evaluated."""

    suite: str
    name: str
    kind: Kind
    descriptions: tuple[str, ...]
    items: tuple[Item, ...]
    shots: tuple[Item, ...] = ()
    """Where few-shot examples come from; empty for a task that is always asked without."""
    family: str = ""
    """Tasks of one family are too alike for one's description to be wrong for another; by default each is its own."""
    prefill: str = ""
    """How every answer starts."""
    max_new_tokens: int = 64

    @property
    def chance(self) -> float:
        """Expected score of guessing among the options; 0 where there are none."""
        shares = [1 / len(item.choices) for item in self.items if item.choices]
        return sum(shares) / len(shares) if shares else 0.0

    @property
    def floor(self) -> float:
        """Score below which scoring itself must be wrong: chance, or the rarest label's share of fixed labels."""
        if len({frozenset(item.choices) for item in self.items}) > 1 or not self.items[0].choices:
            return self.chance
        targets = [item.choices[item.target] for item in self.items]
        return min(targets.count(choice) for choice in self.items[0].choices) / len(targets)


@dataclass(frozen=True)
class EvalInstance:
    """An item under a seed: with the texts that conditions put into its prompt or write an adapter from."""

    task: EvalTask
    item: Item
    seed: int
    description: str
    """The seed's description of the task; it stands in prompts that show a description."""
    wrong_description: str
    """A description of another task."""
    random_text: str
    """Made-up words."""
    shots: tuple[tuple[str, str], ...]
    """Worked examples, as pairs of input and answer."""


def questions(tasks: Sequence[EvalTask]) -> list[dict[str, str]]:
    """Some questions of tasks for a person to look at: the first of each task, then the second, ..."""
    turns = range(max(len(task.items) for task in tasks))
    asked = [(task, task.items[turn]) for turn in turns for task in tasks if turn < len(task.items)][:MOST_QUESTIONS]
    return [
        {
            "task": task.name,
            "id": item.id,
            "description": task.descriptions[0],
            "input": _clipped(item.text),
            "expected": _clipped(" / ".join(item.outputs)),
        }
        for task, item in asked
    ]


def _clipped(text: str) -> str:
    return text if len(text) <= 600 else f"{text[:600]} …"


Pool = dict[str, tuple[str, tuple[str, ...]]]
"""Names of tasks to their family and their descriptions."""


def instances(
    tasks: Sequence[EvalTask], seeds: Sequence[int], *, fits: Callable[[str], bool] = lambda text: True
) -> list[EvalInstance]:
    """Makes an instance of every item of every task under every seed.

    A seed decides the description, the other task's description, the random text and the examples; the items are the
    same for all seeds, and within a seed all items of a task share those texts.

    Args:
        tasks: Each with descriptions that fit, see `readable`.
        seeds: Of the evaluation; they have nothing to do with training.
        fits: Whether an encoder can read a text; random texts are shortened until they fit.

    Raises:
        DataError: if no other task, nor any benchmark, has a description that would be wrong for a task.
    """
    written = written_descriptions("benchmarks")
    benchmarks: Pool = {name: (name, tuple(filter(fits, texts))) for name, texts in written.items()}
    found = []
    for task in tasks:
        suite: Pool = {t.name: (t.family or t.name, t.descriptions) for t in tasks if t.suite == task.suite}
        # A task that is alone, or shares all its descriptions with the others, gets those of the benchmarks.
        negatives = _negatives(task, suite) or _negatives(task, benchmarks)
        if not negatives:
            raise DataError(f"Suite {task.suite} has no other task whose description would be wrong for {task.name}")
        for seed in seeds:
            # Apart from each other, so that what is drawn of one does not depend on another.
            wrong, made_up, shown_first = (
                random.Random(f"{seed}/{task.name}/{what}") for what in ("wrong", "random", "shots")
            )
            # In turn, so that as many seeds as there are descriptions use them all.
            order = random.Random(task.name).sample(task.descriptions, len(task.descriptions))
            texts = (
                order[seed % len(order)],
                _draw_negative(wrong, task, negatives),
                random_text(made_up, fits),
            )
            # One more than needed, in case the item itself is among them.
            drawn = shown_first.sample(task.shots, min(4, len(task.shots)))
            for item in task.items:
                shown = [shot for shot in drawn if shot.text != item.text][:3]
                pairs = tuple((shot.text, f"{task.prefill} {shot.outputs[0]}".strip()) for shot in shown)
                found.append(EvalInstance(task, item, seed, *texts, pairs))
    return found


def _negatives(task: EvalTask, pool: Pool) -> dict[str, tuple[str, ...]]:
    """Finds the tasks of a pool that have a description which would be wrong for a task, with all their texts."""
    family = task.family or task.name
    return {
        name: texts
        for name, (theirs, texts) in sorted(pool.items())
        if theirs != family and name != task.name and not set(texts) <= set(task.descriptions)
    }


def _draw_negative(draw: random.Random, task: EvalTask, negatives: dict[str, tuple[str, ...]]) -> str:
    """Draws one of the negatives' descriptions that is none of the task's own, as two tasks may share a summary."""
    while True:  # ends, as every negative has a description that the task has not
        text = draw.choice(negatives[draw.choice(list(negatives))])
        if text not in task.descriptions:
            return text


def random_text(draw: random.Random, fits: Callable[[str], bool] = lambda text: True) -> str:
    """Draws made-up words in the length of a usual description, or as many of them as an encoder can read."""
    words = made_up_words(draw, words=(12, 28), letters=(2, 9))
    while len(words) > 1 and not fits(as_sentence(words)):
        words.pop()  # made-up words take more tokens than real ones
    return as_sentence(words)


def readable(tasks: Sequence[EvalTask], fits: Callable[[str], bool]) -> tuple[list[EvalTask], list[str]]:
    """Keeps the descriptions that an encoder can read; returns also the names of tasks that are left with none."""
    kept = [replace(task, descriptions=tuple(filter(fits, task.descriptions))) for task in tasks]
    return [task for task in kept if task.descriptions], [task.name for task in kept if not task.descriptions]


def load_suite(suite: str, *, per_task: int | None, held_out: int = 4) -> list[EvalTask]:
    """Loads the tasks of a suite.

    Args:
        suite: One of `SUITES`, or what `t2l.tasks.load_own` reads: a JSONL file, a folder, or `hf:NAME`.
        per_task: Items of each task, a fixed subset that grows with the number; None for all.
        held_out: For `seen`: how many of a task's last descriptions training has not seen.

    Raises:
        DataError: if data are missing, or no task has test examples.
    """
    if suite in ("benchmarks", "likelihood"):
        return _benchmarks(suite, per_task)
    splits = load_splits()
    if suite == "seen":
        tasks = load_sni(splits.train - splits.held_back, splits=("train", "test"))
        described = {task.name: held_out_descriptions(task, held_out)[1] for task in tasks}
    elif suite in ("held-back", "validation"):
        chosen = splits.held_back if suite == "held-back" else splits.validation
        tasks = load_sni(chosen, splits=("train", "test"))
        described = written_descriptions("choosing")
    elif suite == "test":
        tasks = load_sni(splits.test, splits=("train", "test"))
        described = written_descriptions("test")
    elif suite == "everyday":
        tasks = load_everyday()
        described = {task.name: task.descriptions for task in tasks}
    else:
        if not suite.startswith("hf:") and not os.path.exists(suite):
            raise DataError(f"There is no suite and no file {suite!r:.200}; the suites are {', '.join(SUITES)}")
        tasks = load_own(suite)
        described = {task.name: task.descriptions for task in tasks}
        suite = suite if suite.startswith("hf:") else Path(suite).stem
        if suite in SUITES:
            raise DataError(f"Own tasks cannot be called '{suite}', which is a suite of its own; rename the file")
    found = [
        EvalTask(
            suite=suite,
            name=task.name,
            kind="text",
            descriptions=described[task.name],
            items=tuple(map(_from_example, _subset(task.examples["test"], f"{suite}/{task.name}", per_task))),
            shots=_short(tuple(map(_from_example, task.examples.get("train", ())))),
        )
        for task in tasks
        if task.examples.get("test") and described.get(task.name)
    ]
    if not found:
        raise DataError(f'Suite {suite} has no task with test examples; mark them with "split": "test"')
    return found


def _from_example(example: Example) -> Item:
    return Item(example.id, example.input, example.outputs)


def _short(items: tuple[Item, ...]) -> tuple[Item, ...]:
    return tuple(item for item in items if len(item.text) + len(item.outputs[0]) <= MAX_SHOT_CHARACTERS)


def _subset(items: Sequence[Any], key: str, number: int | None) -> list[Any]:
    """The first `number` in an order that is drawn once, so that a smaller subset is part of a larger one."""
    order = random.Random(f"items/{key}").sample(range(len(items)), len(items))
    return [items[i] for i in order[:number]]


# ------------------------------------------------------------------------------------------------- the benchmarks


@dataclass(frozen=True)
class Benchmark:
    """How one of the ten benchmarks is asked."""

    kind: Kind
    template: str = "{input}"
    lettered: bool = False
    """Whether options are listed under the input, marked by letters, and the answer is a letter."""
    family: str = ""
    shots: str | None = "train"
    """Split that few-shot examples come from; None if it is always asked without."""
    prefill: str = ""
    max_new_tokens: int = 16


BENCHMARKS = {
    "arc_challenge": Benchmark("option", "Question: {input}", lettered=True, family="science"),
    "arc_easy": Benchmark("option", "Question: {input}", lettered=True, family="science"),
    "boolq": Benchmark("option"),
    "gsm8k": Benchmark("number", prefill="Let's think step by step.", max_new_tokens=256),
    # There is no training set of it here: examples are test items, never the one that is asked.
    "hellaswag": Benchmark("option", "Text: {input}", lettered=True, shots="test"),
    "openbookqa": Benchmark("option", "Question: {input}", lettered=True, family="science"),
    "piqa": Benchmark("option", "Goal: {input}", lettered=True),
    "winogrande": Benchmark("option", "Sentence: {input}", lettered=True),
    "humaneval": Benchmark("code", family="code", shots=None, max_new_tokens=384),
    "mbpp": Benchmark("code", "{input}\nTests:\n{tests}", family="code", shots="prompt", max_new_tokens=256),
}


def _benchmarks(suite: str, per_task: int | None) -> list[EvalTask]:
    rows = _benchmark_rows()
    descriptions = written_descriptions("benchmarks")
    found = []
    for name, how in BENCHMARKS.items():
        likelihood = suite == "likelihood"
        if likelihood and how.kind != "option":
            continue
        items = {
            split: tuple(_benchmark_item(name, how, row, likelihood=likelihood) for row in found)
            for split, found in rows[name].items()
        }
        found.append(
            EvalTask(
                suite=suite,
                name=name,
                kind="likelihood" if likelihood else how.kind,
                descriptions=descriptions[name],
                items=tuple(_subset(items["test"], name, per_task)),
                shots=_short(items[how.shots]) if how.shots else (),
                family=how.family or name,
                prefill=how.prefill,
                max_new_tokens=how.max_new_tokens,
            )
        )
    return found


def benchmark_tasks() -> list[Task]:
    """The benchmarks as tasks with examples of all their splits, asked and answered as the suite does: for task LoRAs.

    A question that is also among the test questions is left out of the other splits.
    """
    rows, descriptions = _benchmark_rows(), written_descriptions("benchmarks")
    splits = {"train": "train", "validation": "val", "test": "test"}
    tasks = []
    for name, how in BENCHMARKS.items():
        examples = {}
        tested: set[str] = set()
        for split, ours in reversed(splits.items()):
            items = [_benchmark_item(name, how, row, likelihood=False) for row in rows[name].get(split, ())]
            if ours == "test":
                tested = {item.text for item in items}
            else:
                items = [item for item in items if item.text not in tested]
            answers = [f"{how.prefill} {item.outputs[0]}".strip() for item in items]
            examples[ours] = tuple(Example(i.id, i.text, (a,)) for i, a in zip(items, answers, strict=True))
        tasks.append(Task(name, descriptions[name], {split: found for split, found in examples.items() if found}))
    return tasks


def _benchmark_rows() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Rows of `benchmarks.parquet` by benchmark and split."""
    path = data_dir() / "benchmarks.parquet"
    if not path.is_file():
        raise DataError(f"{path} is missing; `t2l data build --benchmarks` makes it")
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in BENCHMARKS}
    columns = ("benchmark", "split", "id", "input", "choices", "answer", "code")
    for row in read_parquet(path, columns).to_pylist():
        if row["benchmark"] in rows:
            rows[row["benchmark"]].setdefault(row["split"], []).append(row)
    for name, how in BENCHMARKS.items():
        missing = {"test", how.shots or "test"} - rows[name].keys()
        if missing:
            raise DataError(f"{path} has no {name} of split {', '.join(sorted(missing))}")
    return rows


def _benchmark_item(name: str, how: Benchmark, row: dict[str, Any], *, likelihood: bool) -> Item:
    """Makes an item of a packed row.

    Raises:
        DataError: naming a row whose answer is none of its options, or whose code's facts are incomplete.
    """
    try:
        return _item(name, how, row, likelihood=likelihood)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"benchmarks.parquet, {name} {row['id']} cannot be used: {error!r:.300}") from error


def _item(name: str, how: Benchmark, row: dict[str, Any], *, likelihood: bool) -> Item:
    choices, answer = tuple(map(str.strip, row["choices"])), row["answer"].replace("\r\n", "\n")
    facts = parse_json(row["code"], f"{name} {row['id']}", DataError) if row["code"] else {}
    tests = tuple(facts.get("test_list", ()))
    text = how.template.format(input=row["input"].strip("\n"), tests="\n".join(tests))
    if how.kind == "number":
        return Item(row["id"], text, (_without_calculator(answer), answer.rsplit("####", 1)[-1].strip()))
    if name == "humaneval":
        return Item(row["id"], row["input"], (answer,), tests=(facts["test"],), function=facts["entry_point"])
    if name == "mbpp":
        return Item(row["id"], text, (answer,), tests=tests, setup=facts.get("test_setup_code", ""))
    answer = answer.strip()
    target = choices.index(answer)
    if likelihood or not how.lettered:
        return Item(row["id"], text, (answer,), choices, target)
    listed = "\n".join(
        f"{letter}) {choice}" for letter, choice in zip(metrics.LETTERS[: len(choices)], choices, strict=True)
    )
    return Item(row["id"], f"{text}\n{listed}", (metrics.LETTERS[target],), choices, target)


def _without_calculator(solution: str) -> str:
    """Removes GSM8K's marks for a calculator, such as `<<3+4=7>>`, from a solution."""
    parts = solution.split("<<")
    return parts[0] + "".join(part.split(">>", 1)[-1] for part in parts[1:])


# --------------------------------------------------------------------------------------------------------- scores


def score(instance: EvalInstance, answer: str) -> dict[str, float | None]:
    """Scores an answer in words; `correct` of code is None until it is run."""
    task, item = instance.task, instance.item
    if task.kind == "text":
        return {
            "exact_match": float(metrics.exact_match(answer, item.outputs)),
            "rouge_l": round(metrics.rouge_l(answer, item.outputs), 4),
        }
    if task.kind == "option":
        option = metrics.parse_option(answer, item.choices)
        return {"correct": float(option == item.target), "parsed": float(option is not None)}
    if task.kind == "number":
        number = metrics.parse_number(answer)
        return {
            "correct": float(number is not None and number == metrics.parse_number(item.outputs[-1])),
            "parsed": float(number is not None),
        }
    assert task.kind == "code", f"{task.kind} is not scored from words"
    return {"correct": None, "parsed": float(code.parses(program(item, answer)))}


def program(item: Item, answer: str) -> str:
    """Builds the program that runs to its end if an answer in code is right."""
    if item.function:
        return code.humaneval_program(item.text, answer, item.tests[0], item.function)
    return code.mbpp_program(answer, item.tests, item.setup)


def score_likelihoods(instance: EvalInstance, log_likelihoods: Sequence[float]) -> dict[str, float | None]:
    """Scores the choices' summed log-likelihoods; `correct` divides each by the choice's length in bytes."""
    item = instance.item
    by_length = [value / len(text.encode()) for value, text in zip(log_likelihoods, item.choices, strict=True)]
    return {
        "correct": float(by_length.index(max(by_length)) == item.target),
        "correct_by_sum": float(list(log_likelihoods).index(max(log_likelihoods)) == item.target),
    }
