"""Computed tasks: reproducible, right by their own rule, and none of them an everyday task."""

import json
import re

from t2l.tasks import load_everyday, require_trainable
from t2l.train.computed import DESCRIPTIONS, RULES, computed_tasks

GRAM_WORDS = 6


def grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + GRAM_WORDS]) for i in range(len(words) - GRAM_WORDS + 1)}


def test_the_same_tasks_every_time() -> None:
    assert computed_tasks() == computed_tasks()
    assert list(DESCRIPTIONS) == list(RULES)


def test_validation_inputs_are_no_training_inputs() -> None:
    for task in computed_tasks():
        train, val = ({e.input for e in task.examples[split]} for split in ("train", "val"))
        assert train and val and not train & val, task.name


def test_answers_follow_from_their_inputs() -> None:
    tasks = {task.name: task for task in computed_tasks()}
    for example in tasks["computed_order_json"].examples["train"]:
        record = json.loads(example.outputs[0])
        assert record["item"] in example.input and str(record["quantity"]) in example.input
    for example in tasks["computed_date_dotted"].examples["train"]:
        day, _, year = example.outputs[0].split(".")
        assert year in example.input and str(int(day)) in example.input
    for example in tasks["computed_packing_array"].examples["train"]:
        assert all(item in example.input for item in json.loads(example.outputs[0]))
    for example in tasks["computed_repeat"].examples["train"]:
        assert example.outputs == (example.input,)


def test_they_may_be_trained_on_and_each_has_descriptions_of_several_styles() -> None:
    require_trainable(task.name for task in computed_tasks())
    for name, texts in DESCRIPTIONS.items():
        assert len(set(texts)) >= 4, name
        assert min(len(text.split()) for text in texts) <= 5, f"{name} has no title"


def test_no_everyday_task_shares_its_description_or_an_input() -> None:
    everyday, computed = load_everyday(), computed_tasks()
    described = {" ".join(text.lower().split()) for task in computed for text in task.descriptions}
    asked = set[tuple[str, ...]]().union(*(grams(text) for task in computed for text in task.descriptions))
    for task in everyday:
        for text in task.descriptions:
            assert " ".join(text.lower().split()) not in described
            assert not grams(text) & asked, f"{task.name}: {grams(text) & asked}"
    inputs = {e.input for task in everyday for e in task.examples["test"]}
    words = {e.input for task in computed for examples in task.examples.values() for e in examples}
    assert not inputs & words
