"""The tasks held back for choosing settings are not trained on, and neither are their inputs."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from t2l.tasks import load_splits

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "src" / "t2l" / "data"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return json.loads((DATA / "held_back.json").read_text(encoding="utf-8"))


@pytest.fixture
def script(import_script: Callable[[str], ModuleType]) -> ModuleType:
    pytest.importorskip("pyarrow.parquet")
    return import_script("make_held_back")


def test_they_are_forty_training_tasks(document: dict[str, Any]) -> None:
    splits = load_splits()
    assert document["held_back"] == sorted(set(document["held_back"]))
    assert len(document["held_back"]) == 40
    assert splits.held_back == set(document["held_back"]) < splits.train
    assert not splits.held_back & (splits.test | splits.validation | splits.excluded.keys())
    assert set(document["held_back_unseen_category"]) < splits.held_back


def test_list_belongs_to_the_frozen_split(document: dict[str, Any]) -> None:
    splits = (DATA / "splits.json").read_bytes()
    assert document["splits_sha256"] == hashlib.sha256(splits).hexdigest()
    assert document["data"] == json.loads(splits)["data"]
    assert str(document["seed"]) and len(document["rule"]) > 500


def test_overlap_with_what_is_trained_on_is_within_the_limit(document: dict[str, Any]) -> None:
    remaining = load_splits().train - load_splits().held_back
    assert sorted(document["overlap"]) == document["held_back"]
    for name, figures in document["overlap"].items():
        for measure in ("exact", "ngram", "reverse"):
            assert 0 <= figures[measure]["share"] <= 0.05, name
            assert figures[measure]["task"] is None or figures[measure]["task"] in remaining, name
        assert 0 <= figures["test_inputs_in_any_training_task"] <= 0.1, name


def tasks(script: ModuleType, category: str | None, count: int) -> list[Any]:
    return [script.Task(f"{category}{i}", "train", category, None, 60) for i in range(count)]


def test_small_categories_are_held_back_whole(script: ModuleType) -> None:
    one, two, three = (tasks(script, name, size) for name, size in (("one", 1), ("two", 2), ("three", 3)))
    partly, large = tasks(script, "partly", 2), tasks(script, "large", 4)
    training = [*one, *two, *three, *partly, *large, *tasks(script, None, 1)]
    candidates = [task for task in training if task.name != "partly1"]
    assert script.whole_categories(candidates, training) == ["one", "three", "two"]
    many = [task for number in range(5) for task in tasks(script, f"pair{number}", 2)]
    assert len(script.whole_categories(many, many)) == 4  # a fifth pair would make ten tasks


def test_rest_is_balanced_and_leaves_every_category_a_task(script: ModuleType) -> None:
    training = [task for number in range(14) for task in tasks(script, f"kind{number}", 4)]
    training += [*tasks(script, "single", 1), *tasks(script, None, 9)]
    held_back, unseen = script.choose(training, training)
    counts = Counter(task.category for task in training if task.name in held_back)
    assert len(held_back) == 40
    assert unseen == ["single0"]
    assert max(counts.values()) == 3
    assert min(counts[f"kind{number}"] for number in range(14)) >= 2
    assert script.choose(training[::-1], training[::-1]) == (held_back, unseen)
