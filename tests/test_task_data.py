"""Which tasks get an adapter: sources, refusals, and what is kept for validation."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from t2l.errors import ConfigError, DataError
from t2l.tasks import Example, Task, load_splits
from t2l.train.task_config import TaskLorasConfig, TaskLorasDataConfig, TaskLorasTrainConfig
from t2l.train.task_data import load_tasks, tokenize_tasks
from t2l.train.task_loras import train_task_loras


@pytest.fixture
def config(base_folder: Path, tmp_path: Path) -> TaskLorasConfig:
    return TaskLorasConfig(
        base=str(base_folder),
        data=TaskLorasDataConfig(tasks=(str(write_task(tmp_path, "digit")),)),
        train=TaskLorasTrainConfig(max_seq_length=110, max_target_length=40),
    )


def write_task(folder: Path, name: str, **changes: Any) -> Path:
    rows = [{"task": name, "description": "Do it.", "input": f"{n}", "output": "yes"} | changes for n in range(12)]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_held_out_tasks_are_refused_unless_for_evaluation(config: TaskLorasConfig, tmp_path: Path) -> None:
    name = min(load_splits().test)
    held_out = replace(config, data=TaskLorasDataConfig(tasks=(str(write_task(tmp_path, name)),)))
    with pytest.raises(DataError, match=f"may not be trained on: {name} "):
        load_tasks(held_out)
    assert [task.name for task in load_tasks(replace(held_out, for_evaluation_only=True))] == [name]


@pytest.mark.parametrize(
    "name",
    [
        "{tmp}/precious",
        "../../precious",
        "sub/task",
        "back\\slash",
        "",
        ".",
        "..",
        ".hidden",
        "end.",
        "x" * 201,
        "a\nb",
    ],
)
def test_a_task_whose_name_is_no_file_name_is_refused(name: str, config: TaskLorasConfig, tmp_path: Path) -> None:
    """Before anything is written: a name is never followed to another folder."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    name = name.format(tmp=tmp_path)
    rows = [{"task": name, "description": "d", "input": f"{n}", "output": "yes"} for n in range(12)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = replace(config, data=TaskLorasDataConfig(tasks=(str(tmp_path / "own.jsonl"),)))
    with pytest.raises(DataError, match=r"cannot name a task: .* rename it"):
        train_task_loras(own, tmp_path / "run", device="cpu")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"only": ("digit", "polka")}, DataError, r"data\.only: polka is not in"),
        ({"tasks": ("sni-everything",)}, ConfigError, "there is no 'sni-everything'; known are sni-paper, sni"),
        ({"tasks": ("benchmarks",)}, ConfigError, "this caller does not provide them"),
    ],
)
def test_unknown_sources_and_tasks(data: dict[str, Any], error: type, message: str, config: TaskLorasConfig) -> None:
    with pytest.raises(error, match=message):
        load_tasks(replace(config, data=replace(config.data, **data)))


def test_tasks_without_a_usable_example_are_named(
    config: TaskLorasConfig, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for name, change in (("wordy", {"input": "x" * 200}), ("tiny", {})):
        write_task(tmp_path, name, **change)
    lines = (tmp_path / "tiny.jsonl").read_text().splitlines()
    (tmp_path / "tiny.jsonl").write_text("\n".join(lines[:4]))  # too few to keep a fifth for validation
    own = replace(config, data=TaskLorasDataConfig(tasks=(str(tmp_path),)))
    with pytest.raises(DataError) as caught:
        tokenize_tasks(load_tasks(own), own, tiny_tokenizer)
    assert "tiny (no validation example of 0), wordy (no training example of" in str(caught.value)


@pytest.mark.skipif("T2L_DATA" not in os.environ, reason="T2L_DATA is not set")
def test_the_papers_tasks_that_may_be_trained_on(config: TaskLorasConfig) -> None:
    """A task of the paper's 479 is there, one that only the frozen split added is not, nor one that overlaps."""
    names = ("task050_multirc_answerability", "task1398_obqa_question_generation")
    sni = replace(config, data=TaskLorasDataConfig(tasks=("sni-paper",), only=names[:1]))
    (task,) = load_tasks(sni)
    assert task.examples["train"] and task.examples["val"] and len(task.descriptions) > 100
    for name in (names[1], min(load_splits().test)):
        with pytest.raises(DataError, match=f"{name} is not in sni-paper"):
            load_tasks(replace(sni, data=replace(sni.data, only=(name,))))
    held_out = replace(sni, data=TaskLorasDataConfig(tasks=("sni-test",), only=(min(load_splits().test),)))
    with pytest.raises(DataError, match="zero-shot test task"):
        load_tasks(held_out)
    assert len(load_tasks(replace(held_out, for_evaluation_only=True))) == 1


def test_benchmarks_come_from_the_caller(config: TaskLorasConfig) -> None:
    """Those without training data are passed over."""
    examples = tuple(Example(str(n), f"{n}", ("yes",)) for n in range(5))
    given = [Task("with", ("d",), {"train": examples}), Task("without", ("d",), {"test": examples})]
    asked = replace(config, data=TaskLorasDataConfig(tasks=("benchmarks",)))
    assert [task.name for task in load_tasks(asked, lambda: given)] == ["with"]


def test_config_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"train\.max_steps \(10\) must be a multiple of train\.eval_steps \(4\)"):
        TaskLorasTrainConfig(max_steps=10, eval_steps=4)
    with pytest.raises(ConfigError, match=r"train\.early_stopping_patience must be at least 1, got 0"):
        TaskLorasTrainConfig(early_stopping_patience=0)
    with pytest.raises(ConfigError, match=r"train\.freeze_a is for adapters that have one A"):
        TaskLorasTrainConfig(freeze_a=True, shared_init=False)


@pytest.mark.skipif("T2L_DATA" not in os.environ, reason="T2L_DATA is not set")
def test_benchmark_task_loras_learn_what_is_asked_when_evaluated(config: TaskLorasConfig) -> None:
    """Prompt and answer of a training example are the evaluated questions' in form, and no test item is among them."""
    from t2l.eval.suites import benchmark_tasks, load_suite

    asked = replace(config, data=TaskLorasDataConfig(tasks=("benchmarks",)))
    tasks = {task.name: task for task in load_tasks(asked, benchmark_tasks)}
    judged = {task.name: task for task in load_suite("benchmarks", per_task=None)}
    assert sorted(tasks) == sorted(judged.keys() - {"hellaswag", "humaneval"})
    for name, task in tasks.items():
        texts = {item.text for item in judged[name].items}
        assert len(task.examples["train"]) >= 300 and len(task.descriptions) == 3
        assert not texts & {e.input for split in ("train", "val") for e in task.examples.get(split, ())}
        assert texts == {e.input for e in task.examples["test"]}
    piqa = tasks["piqa"].examples["train"][0]
    assert piqa.outputs[0] in ("A", "B") and "\nA) " in piqa.input
    assert tasks["gsm8k"].examples["train"][0].outputs[0].startswith("Let's think step by step. ")
    assert set(tasks["arc_easy"].examples) == {"train", "val", "test"} and "val" not in tasks["piqa"].examples
