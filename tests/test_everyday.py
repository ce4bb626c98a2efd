"""The everyday tasks: thirty, ten inputs each, readable by the shipped checkpoint, none of them a training task."""

import os
from pathlib import Path

import pytest

from t2l.eval.suites import load_suite
from t2l.tasks import load_everyday


def test_thirty_tasks_with_one_description_and_ten_different_inputs_each() -> None:
    tasks = load_everyday()
    assert len(tasks) == 30
    for task in tasks:
        assert len(task.descriptions) == 1, task.name
        assert set(task.examples) == {"test"}, "everyday tasks are for evaluation alone"
        assert len({example.input for example in task.examples["test"]}) == 10, task.name


def test_suite_everyday_asks_all_of_them() -> None:
    judged = load_suite("everyday", per_task=None)
    assert len(judged) == 30
    assert sum(len(task.items) for task in judged) == 300
    assert len({task.descriptions for task in judged}) == 30


def test_no_task_is_answered_by_one_word_alone() -> None:
    for task in load_everyday():
        answers = [set(example.outputs) for example in task.examples["test"]]
        for answer in set().union(*answers):
            assert sum(answer in right for right in answers) <= 7, f"{task.name}: {answer} is nearly always right"


def test_far_tasks_are_read_as_own_tasks() -> None:
    folder = Path(os.environ.get("T2L_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (folder / "far_dev.jsonl").is_file():
        pytest.skip(f"no far_dev.jsonl in {folder}")
    judged = load_suite(str(folder / "far_dev.jsonl"), per_task=None)
    assert len(judged) == 49
    assert {task.suite for task in judged} == {"far_dev"}
    assert all(task.shots for task in judged)
