"""The suite of words to answer with: the script writes what was measured, and the second file has words of its own."""

import hashlib
import json
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

MEASURED = {"words.jsonl": "aaae7c95320b9c0b", "words-new.jsonl": "18af007577c93e57"}
"""Checksums of the files behind the numbers in experiments.md; the files themselves are not kept."""


@pytest.fixture
def script(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("make_words")


@pytest.fixture
def lines(script: ModuleType) -> dict[str, list[dict[str, Any]]]:
    files = script.files()
    assert {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in files.items()} == MEASURED
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}


def test_new_words_stand_nowhere_in_training(lines: dict[str, list[dict[str, Any]]]) -> None:
    trained = {word for line in lines["words.jsonl"] for word in re.findall(r"\w+", json.dumps(line).lower())}
    labels = {line["output"] for line in lines["words-new.jsonl"]}
    assert len(labels) > 20 and any(" " in label for label in labels)
    # A label of two words may have one that is known, such as "not".
    assert not {label for label in labels if set(label.lower().split()) <= trained}


def test_only_the_description_says_the_answer(lines: dict[str, list[dict[str, Any]]]) -> None:
    """Both labels stand in each description, each is right as often, and one input has many answers over the tasks."""
    answers: dict[str, set[str]] = {}
    for some in lines.values():
        for task in {line["task"] for line in some}:
            mine = [line for line in some if line["task"] == task]
            labels = sorted(line["output"] for line in mine)
            assert len(set(labels)) == 2 and labels.count(labels[0]) == len(mine) / 2
            assert all(label in line["description"] for line in mine for label in labels)
        for line in some:
            answers.setdefault(line["input"], set()).add(line["output"])
    assert min(len(found) for found in answers.values()) > 5


def test_labels_of_two_words(script: ModuleType) -> None:
    for text in script.files(two_words=0.7).values():
        found = [json.loads(line) for line in text.splitlines()]
        assert all(line["output"] in line["description"] for line in found)
        assert 0.6 < sum(" " in line["output"] for line in found) / len(found) < 0.9
