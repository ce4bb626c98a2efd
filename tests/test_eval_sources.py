"""What an evaluation loads and refuses to load, odd tasks, and odd places for its answers."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_helpers import SETTINGS

from t2l import hub
from t2l.errors import CheckpointError, ConfigError, DataError, OutputError
from t2l.eval import answers, suites
from t2l.eval.run import Settings, run
from t2l.eval.sources import MultitaskLora, Sources, shipped_multitask
from t2l.io import only_writer
from t2l.tasks import written_descriptions
from t2l.text_to_lora import DEFAULT, TextToLora

# ---------------------------------------------------------------------------------------------- what is loaded


def test_one_base_serves_all_checkpoints(
    tasks_file: Path, checkpoint: str, multitask: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that answers is also the encoder of a checkpoint that reads its states; a multi-task LoRA has none."""
    loaded: list[str] = []
    real = hub.load_causal_lm

    def counting(reference: str, **options: Any) -> Any:
        loaded.append(reference)
        return real(reference, **options)

    monkeypatch.setattr(hub, "load_causal_lm", counting)
    monkeypatch.setattr(hub, "load_backbone", lambda *_, **__: pytest.fail("no other encoder is needed"))
    settings = SETTINGS | {"conditions": "t2l,multitask", "seeds": (0,), "suites": (str(tasks_file),)}
    run(Settings(checkpoint=checkpoint, multitask=multitask, **settings), tmp_path / "a.jsonl", log=lambda text: None)
    assert len(loaded) == 1
    run(Settings(multitask=multitask, **settings | {"conditions": "multitask"}), tmp_path / "b.jsonl")
    assert len(loaded) == 2


def test_a_multitask_lora_is_what_its_checkpoint_writes(multitask: str) -> None:
    """Read without an encoder, it is the adapter that the checkpoint writes from any description, bit for bit."""
    (written,) = TextToLora.from_pretrained(multitask).generate(["Every task."])
    read = MultitaskLora.from_pretrained(multitask).adapter
    assert all(map(torch.equal, (*written.lora.a, *written.lora.b), (*read.lora.a, *read.lora.b)))
    assert read.spec == written.spec


def test_checkpoints_of_the_wrong_kind_are_named(checkpoint: str, multitask: str) -> None:
    with pytest.raises(ConfigError, match=r"reads descriptions \(hypernet.variant 'L'\)"):
        MultitaskLora.from_pretrained(checkpoint)
    with pytest.raises(ConfigError, match="reads no description: its variant is 'none'"):
        Sources(checkpoint=TextToLora.from_pretrained(multitask))


def test_a_checkpoint_that_reads_another_version_of_the_base_is_refused(
    tasks_file: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", revision="sha256:of-another")
    settings = Settings(suites=(str(tasks_file),), checkpoint=str(other), **SETTINGS)
    with pytest.raises(CheckpointError, match="sha256:of-another"):
        run(settings, tmp_path / "answers.jsonl", log=lambda text: None)
    assert not (tmp_path / "answers.jsonl").exists()


def test_shipped_checkpoints_bring_their_multitask_lora(checkpoint: str) -> None:
    assert shipped_multitask(DEFAULT) == f"{DEFAULT}-multitask"
    assert shipped_multitask(None) is shipped_multitask(checkpoint) is shipped_multitask("t2l:no-such") is None


# -------------------------------------------------------------------------------------------------- odd own tasks


@pytest.mark.parametrize("names", [("one",), ("one", "two", "three")], ids=["alone", "together"])
def test_tasks_that_share_their_descriptions_get_wrong_ones_from_the_benchmarks(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    """No other own task has a description that would be wrong; looking for one until it is found has no end."""
    lines = [
        {"task": name, "description": ["Do it.", "Answer."], "input": f"{n}", "output": "x", "split": "test"}
        for name in names
        for n in range(2)
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = suites.load_suite(str(path), per_task=None)
    instances = suites.instances(tasks, range(3), fits=lambda text: len(text) < 90)
    benchmarks = {text for texts in written_descriptions("benchmarks").values() for text in texts}
    assert len(instances) == len(names) * 6
    assert {instance.wrong_description for instance in instances} <= {text for text in benchmarks if len(text) < 90}
    with pytest.raises(DataError, match="no other task whose description would be wrong for one"):
        suites.instances(tasks, [0], fits=lambda text: False)


def test_answers_go_into_nothing_but_a_regular_file(tasks_file: Path, checkpoint: str, tmp_path: Path) -> None:
    """Renaming a file over a device would replace it for the whole machine; a link leads to its file."""
    settings = Settings(suites=(str(tasks_file),), checkpoint=checkpoint, **SETTINGS | {"conditions": "base"})
    os.mkfifo(tmp_path / "pipe")
    for place in ("pipe", "."):
        with pytest.raises(OutputError, match="not a regular file"):
            run(settings, tmp_path / place, log=lambda text: None)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    run(settings, tmp_path / "link.jsonl", log=lambda text: None)
    assert (tmp_path / "link.jsonl").is_symlink() and answers.read(tmp_path / "real.jsonl").lines


def test_two_runs_never_write_to_one_file(tasks_file: Path, checkpoint: str, tmp_path: Path) -> None:
    """Both would append what the other has. A second one is refused while the first runs, and welcome afterwards."""
    out = tmp_path / "answers.jsonl"
    settings = Settings(suites=(str(tasks_file),), checkpoint=checkpoint, **SETTINGS | {"conditions": "base"})
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with only_writer(out):
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    with pytest.raises(OutputError, match="another process is writing to it"):
        run(settings, out, log=lambda text: None)
    assert not out.exists()
    os.kill(child, signal.SIGKILL)  # leaves its claim behind
    os.waitpid(child, 0)
    run(settings, out, log=lambda text: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl"]
