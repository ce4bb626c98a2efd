"""What is asked: tasks of a suite, their questions, and the texts that the rows need for each of them.

Everything is drawn from seeds by name, so that a task's questions depend neither on the other tasks nor on how many
of them are asked. Knows tasks, benchmarks and what counts as a right answer. Knows no models and no adapters.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from t2l.errors import DataError
from t2l.eval import code, metrics
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
    written_descriptions,
)

SUITES = ("seen", "held-back", "validation", "test", "everyday", "benchmarks", "likelihood")
"""New instances of training tasks; tasks held back from training to choose settings; the validation and the zero-shot
test tasks of the frozen split; thirty tasks as an application developer would write them, never trained or tuned on;
the ten benchmarks answered in words; those with options by each option's likelihood."""
MAX_SHOT_CHARACTERS = 1500
"""A longer example is not shown in a prompt."""
TEXTS = 3
"""Descriptions that a row may read at most, or texts in their place."""
INPUTS = 8
"""Unlabelled inputs of a task that a row may read."""

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
    """Right answers; as few-shot examples show them."""
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
class JudgedTask:
    """A task as it is judged."""

    suite: str
    name: str
    kind: Kind
    descriptions: tuple[str, ...]
    items: tuple[Item, ...]
    shots: tuple[Item, ...] = ()
    """Where few-shot examples come from; empty for a task that is always asked without."""
    inputs: tuple[str, ...] = ()
    """Inputs of its training examples, none of them a test input; empty for a task that has no other inputs."""
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
class Question:
    """An item under a seed: with the texts that rows put into its prompt or adapter."""

    task: JudgedTask
    item: Item
    seed: int
    descriptions: tuple[str, ...]
    """Up to three of the task's; the first is the seed's own, which stands in prompts."""
    wrong_descriptions: tuple[str, ...]
    """Of one other task, no more of them than there are descriptions."""
    random_texts: tuple[str, ...]
    """As many as there are descriptions."""
    shots: tuple[tuple[str, str], ...]

    @property
    def description(self) -> str:
        """The seed's description."""
        return self.descriptions[0]


def questions(
    tasks: Sequence[JudgedTask], seeds: Sequence[int], *, fits: Callable[[str], bool] = lambda text: True
) -> list[Question]:
    """Every item of every task under every seed.

    A seed decides the descriptions, those of the other task, the random texts and the examples; the items are the
    same for all seeds, and within a seed all items of a task share those texts.

    Args:
        tasks: Each with descriptions that fit, see `readable`.
        seeds: In judging; they have nothing to do with training.
        fits: Whether an encoder can read a text; random texts are shortened until they fit.

    Raises:
        DataError: if a task is alone and every benchmark is of its family, so that no other task's description is
            left.
    """
    found = []
    strangers = {name: (name, texts) for name, texts in written_descriptions("benchmarks").items()}
    for task in tasks:
        others = {t.name: (t.family or t.name, t.descriptions) for t in tasks if t.suite == task.suite}
        for pool in (others, strangers):
            family = task.family or task.name
            wrong = sorted(name for name, (theirs, _) in pool.items() if theirs != family and name != task.name)
            if wrong:
                break
        else:
            raise DataError(f"Suite {task.suite} has no other task whose description would be wrong for {task.name}")
        for seed in seeds:
            # Apart from each other, so that what is drawn of one does not depend on another.
            draw, made_up, shown_first = (
                random.Random(f"{seed}/{task.name}/{what}") for what in ("wrong", "random", "shots")
            )
            # In turn, so that as many seeds as there are descriptions use them all.
            order = random.Random(task.name).sample(task.descriptions, len(task.descriptions))
            turned = [order[(seed + n) % len(order)] for n in range(min(TEXTS, len(order)))]
            wrong_texts: list[str] = []
            while not wrong_texts or wrong_texts[0] in task.descriptions:  # two tasks may share a summary
                theirs = pool[draw.choice(wrong)][1]
                first = draw.choice(theirs)
                wrong_texts = [first, *(x for x in theirs if x != first and x not in task.descriptions)]
            texts = [random_text(made_up, fits) for _ in turned]
            # One more than needed, in case the item itself is among them.
            drawn = shown_first.sample(task.shots, min(4, len(task.shots)))
            for item in task.items:
                shown = [shot for shot in drawn if shot.text != item.text][:3]
                pairs = tuple((shot.text, f"{task.prefill} {shot.outputs[0]}".strip()) for shot in shown)
                wrongs = tuple(wrong_texts[: len(turned)])
                found.append(Question(task, item, seed, tuple(turned), wrongs, tuple(texts), pairs))
    return found


def random_text(draw: random.Random, fits: Callable[[str], bool] = lambda text: True) -> str:
    """Made-up words in the length of a usual description, or as many of them as an encoder can read."""
    words = made_up_words(draw, words=(12, 28), letters=(2, 9))
    while len(words) > 1 and not fits(as_sentence(words)):
        words.pop()  # made-up words take more tokens than real ones
    return as_sentence(words)


def readable(tasks: Sequence[JudgedTask], fits: Callable[[str], bool]) -> tuple[list[JudgedTask], list[str]]:
    """The tasks with the descriptions that an encoder can read, and the names of those that are left with none."""
    kept = [replace(task, descriptions=tuple(filter(fits, task.descriptions))) for task in tasks]
    return [task for task in kept if task.descriptions], [task.name for task in kept if not task.descriptions]


def load_suite(suite: str, *, per_task: int | None, held_out: int = 4) -> list[JudgedTask]:
    """The tasks of a suite.

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
        tasks = load_own(suite)
        described = {task.name: task.descriptions for task in tasks}
        suite = suite if suite.startswith("hf:") else Path(suite).stem
        if suite in SUITES:
            raise DataError(f"Own tasks cannot be called '{suite}', which is a suite of its own; rename the file")
    judged = [
        JudgedTask(
            suite=suite,
            name=task.name,
            kind="text",
            descriptions=described[task.name],
            items=tuple(map(_from_example, _subset(task.examples["test"], f"{suite}/{task.name}", per_task))),
            shots=_short(tuple(map(_from_example, task.examples.get("train", ())))),
            inputs=_unlabelled(
                (example.input for example in task.examples.get("train", ())),
                (example.input for example in task.examples["test"]),
                f"{suite}/{task.name}",
            ),
        )
        for task in tasks
        if task.examples.get("test") and described.get(task.name)
    ]
    if not judged:
        raise DataError(f'Suite {suite} has no task with test examples; mark them with "split": "test"')
    return judged


def _from_example(example: Example) -> Item:
    return Item(example.id, example.input, example.outputs)


def _short(items: tuple[Item, ...]) -> tuple[Item, ...]:
    return tuple(item for item in items if len(item.text) + len(item.outputs[0]) <= MAX_SHOT_CHARACTERS)


def _unlabelled(inputs: Iterable[str], tested: Iterable[str], key: str) -> tuple[str, ...]:
    """Some inputs, none of which is also asked."""
    others = set(map(str.strip, inputs)) - set(map(str.strip, tested)) - {""}
    return tuple(_subset(sorted(others), f"{key}/inputs", INPUTS))


def _subset(items: Sequence[Any], key: str, number: int | None) -> list[Any]:
    """The first `number` in an order that is drawn once, so that a smaller subset is part of a larger one."""
    order = random.Random(f"items/{key}").sample(range(len(items)), len(items))
    return [items[i] for i in order[:number]]


# ------------------------------------------------------------------------------------------------- the benchmarks


@dataclass(frozen=True)
class Benchmark:
    """How one of the ten is asked."""

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


def _benchmarks(suite: str, per_task: int | None) -> list[JudgedTask]:
    rows = _benchmark_rows()
    descriptions = written_descriptions("benchmarks")
    judged = []
    for name, how in BENCHMARKS.items():
        likelihood = suite == "likelihood"
        if likelihood and how.kind != "option":
            continue
        items = {
            split: tuple(_benchmark_item(name, how, row, likelihood=likelihood) for row in found)
            for split, found in rows[name].items()
        }
        judged.append(
            JudgedTask(
                suite=suite,
                name=name,
                kind="likelihood" if likelihood else how.kind,
                descriptions=descriptions[name],
                items=tuple(_subset(items["test"], name, per_task)),
                shots=_short(items[how.shots]) if how.shots else (),
                inputs=_unlabelled(
                    (item.text for item in items.get(how.shots or "test", ())),
                    (item.text for item in items["test"]),
                    name,
                ),
                family=how.family or name,
                prefill=how.prefill,
                max_new_tokens=how.max_new_tokens,
            )
        )
    return judged


def benchmark_tasks() -> list[Task]:
    """The benchmarks as tasks with examples of all their splits, asked and answered as the suite does: for oracles.

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
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError("Reading the benchmarks needs pyarrow: pip install 't2l[eval]'") from error
    path = data_dir() / "benchmarks.parquet"
    if not path.is_file():
        raise DataError(f"{path} is missing; `t2l data build --benchmarks` makes it")
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in BENCHMARKS}
    for row in pq.read_table(path).to_pylist():
        if row["benchmark"] in rows:
            rows[row["benchmark"]].setdefault(row["split"], []).append(row)
    for name, how in BENCHMARKS.items():
        missing = {"test", how.shots or "test"} - rows[name].keys()
        if missing:
            raise DataError(f"{path} has no {name} of split {', '.join(sorted(missing))}")
    return rows


def _benchmark_item(name: str, how: Benchmark, row: dict[str, Any], *, likelihood: bool) -> Item:
    choices, answer = tuple(map(str.strip, row["choices"])), row["answer"].replace("\r\n", "\n")
    facts = json.loads(row["code"]) if row["code"] else {}
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
    """GSM8K's solutions without the marks `<<3+4=7>>` for a calculator."""
    parts = solution.split("<<")
    return parts[0] + "".join(part.split(">>", 1)[-1] for part in parts[1:])


# --------------------------------------------------------------------------------------------------------- scores


def score(question: Question, answer: str) -> dict[str, float | None]:
    """Scores of an answer in words; `correct` of code is None until it is run."""
    task, item = question.task, question.item
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
    """What has to run to its end for an answer in code to be right."""
    if item.function:
        return code.humaneval_program(item.text, answer, item.tests[0], item.function)
    return code.mbpp_program(answer, item.tests, item.setup)


def score_likelihoods(question: Question, log_likelihoods: Sequence[float]) -> dict[str, float | None]:
    """Scores from the choices' summed log-likelihoods; `correct` divides each by the choice's length in bytes."""
    item = question.item
    by_length = [value / len(text.encode()) for value, text in zip(log_likelihoods, item.choices, strict=True)]
    return {
        "correct": float(by_length.index(max(by_length)) == item.target),
        "correct_by_sum": float(list(log_likelihoods).index(max(log_likelihoods)) == item.target),
    }
