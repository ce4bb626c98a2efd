"""Several processes train as one does: two on the CPU, by gloo, against the same run in this process."""

import json
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import random_lora
from programs import Program, run
from safetensors.torch import load_file
from sft_helpers import Interrupted, interrupt_at, metrics, quiet, shorter
from transformers import LlamaConfig

from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, to_plain
from t2l.errors import ConfigError
from t2l.library import AdapterLibrary, save_library
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.train.config import SftConfig
from t2l.train.processes import OTHER_ENGINES, join
from t2l.train.reconstruction import ReconstructionConfig, ReconstructionTrainConfig, train_reconstruction
from t2l.train.reconstruction_data import ReconstructionDataConfig
from t2l.train.reconstruction_losses import ReconstructionLossConfig
from t2l.train.resume import read_facts, read_progress
from t2l.train.sft import train
from t2l.train.task_config import TaskLorasConfig, TaskLorasDataConfig, TaskLorasTrainConfig
from t2l.train.task_loras import train_task_loras

WORKER = Path(__file__).with_name("processes_worker.py")
ROUNDING = {"rel": 1e-5, "abs": 2e-5}
"""How far numbers may be apart: sums are rounded in another order."""


def launched(command: list[str], number: int = 2) -> list[str]:
    """By torchrun, which would read options such as `--run` as its own but for the dashes."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", *command]


def changed(config: TaskLorasConfig, **changes: Any) -> TaskLorasConfig:
    return replace(config, train=replace(config.train, **changes))


def losses(run: Path) -> dict[tuple[int, str], float]:
    """Every number of a run that does not depend on time."""
    kept = ("loss", "gradient_norm", "examples")
    return {
        (int(row["step"]), name): value
        for row in metrics(run)
        for name, value in row.items()
        if name in kept or "/" in name
    }


@pytest.fixture(scope="module")
def sft(sft_config: SftConfig) -> SftConfig:
    """Without dropout, whose masks are each process's own; with every term that a batch's rows share."""
    config = shorter(
        sft_config,
        tasks_per_batch=6,
        margin_loss_weight=0.5,
        l2_weight=0.1,
        logging_steps=1,
        eval_steps=3,
        eval_batches=1,
    )
    return replace(config, hypernet=replace(config.hypernet, dropout=0.0, token_dropout=0.0))


@pytest.fixture(scope="module")
def reconstruction(
    tiny_config: LlamaConfig, base_folder: Path, sentence_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> ReconstructionConfig:
    """Five adapters of a library in a batch, so that one process has more of them than the other."""
    spec = AdapterSpec.from_config(tiny_config, str(base_folder), LoraConfig(r=2, lora_alpha=4))
    names = ("add", "bark", "count", "dance", "echo", "fold", "greet")
    facts = {name: {"descriptions": [f"{verb} {name}." for verb in ("Do", "Please", "Now")]} for name in names}
    lora = LoraTensors.stack([random_lora(spec, n) for n in range(len(names))])
    library = save_library(tmp_path_factory.mktemp("library") / "seven", lora, spec, facts)
    return ReconstructionConfig(
        encoder=EncoderConfig(kind="sentence", model=str(sentence_folder), max_tokens=60),
        hypernet=HypernetConfig(width=24, head_size=16, dropout=0.0),
        data=ReconstructionDataConfig(library=str(library.folder), held_out_descriptions=1),
        loss=ReconstructionLossConfig(factors=1.0, squares=0.5),
        train=ReconstructionTrainConfig(
            max_steps=9,
            adapters_per_batch=5,
            learning_rate=5e-3,
            logging_steps=3,
            eval_steps=3,
            save_steps=3,
            report_to="none",
        ),
    )


@pytest.fixture(scope="module")
def task_loras(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TaskLorasConfig:
    """Four tasks in three slots: two of one process, one of the other."""
    answers = {"always_no": "no", "always_yes": "yes", "digit": "{n}", "shout": "Is it {n}!"}
    rows = [
        {"task": task, "description": f"Do {task}.", "input": f"Is it {n}?", "output": answer.format(n=n)}
        for task, answer in answers.items()
        for n in range(30, 60)
    ]
    path = tmp_path_factory.mktemp("tasks") / "own.jsonl"
    path.write_text("\n".join(json.dumps(row | {"split": "train"}) for row in rows))
    return TaskLorasConfig(
        base=str(base_folder),
        lora=LoraConfig(r=2, lora_alpha=4),
        data=TaskLorasDataConfig(tasks=(str(path),), validation_examples=6),
        train=TaskLorasTrainConfig(
            max_steps=9,
            tasks_per_batch=3,
            max_seq_length=110,
            max_target_length=40,
            learning_rate=1e-2,
            eval_steps=3,
            eval_rows=2,
            save_steps=3,
            report_to="none",
        ),
    )


@pytest.fixture(scope="module")
def runs(
    sft: SftConfig,
    reconstruction: ReconstructionConfig,
    task_loras: TaskLorasConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Runs of two processes, all in one start of them, and of one."""
    folder = tmp_path_factory.mktemp("processes")
    plan: list[dict[str, Any]] = []

    def add(trainer: str, config: Any, name: str, **options: Any) -> None:
        plain = to_plain(config)
        plan.append({"trainer": trainer, "config": plain, "run": str(folder / name), "options": options})

    train(sft, folder / "sft-1", device="cpu", log=quiet)
    train(sft, folder / "sft-1-2", device="cpu", log=quiet, max_minutes=0)
    train_reconstruction(reconstruction, folder / "reconstruction-1", device="cpu", log=quiet)
    train_task_loras(task_loras, folder / "task-loras-1", device="cpu", log=quiet)
    for name in ("reconstruction-1-2", "task-loras-1-2"):
        trainer, config = (train_task_loras, task_loras) if "task" in name else (train_reconstruction, reconstruction)
        with pytest.raises(Interrupted):
            trainer(config, folder / name, device="cpu", log=interrupt_at(6))

    add("reconstruction", reconstruction, "reconstruction-2")
    add("reconstruction", reconstruction, "reconstruction-1-2", resume=True)
    add("task-loras", changed(task_loras, fsdp="full_shard"), "task-loras-2")
    add("task-loras", task_loras, "task-loras-1-2", resume=True)
    add("task-loras", task_loras, "task-loras-2-1", max_minutes=0)
    add("sft", sft, "sft-2")
    add("sft", sft, "sft-1-2", resume=True)
    add("sft", sft, "sft-2-1", max_minutes=0)
    add("sft", shorter(sft, gradient_accumulation_steps=2, fsdp="full_shard"), "sft-sharded")
    (folder / "plan.json").write_text(json.dumps(plan))
    started = start_two([str(WORKER), str(folder / "plan.json")], folder)
    try:
        codes = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0], [(folder / f"{rank}.log").read_text() for rank in range(2)]
    assert read_progress(folder / "sft-2-1").step == 1
    train(sft, folder / "sft-2-1", device="cpu", log=quiet, resume=True)
    train_task_loras(task_loras, folder / "task-loras-2-1", device="cpu", log=quiet, resume=True)
    return folder


@pytest.mark.parametrize("name", ["sft-2", "sft-1-2", "sft-2-1", "sft-sharded"])
def test_fine_tuning_in_several_processes_is_the_same_run(name: str, runs: Path) -> None:
    """Losses, validation and weights; started in two, gone on in two, or started in two and gone on in one."""
    require_same("sft-1", name, runs)


@pytest.mark.parametrize("name", ["reconstruction-2", "reconstruction-1-2"])
def test_reconstruction_in_several_processes_is_the_same_run(name: str, runs: Path) -> None:
    """Losses, errors of all adapters and weights."""
    require_same("reconstruction-1", name, runs)


@pytest.mark.parametrize("name", ["task-loras-2", "task-loras-1-2", "task-loras-2-1"])
def test_task_loras_of_several_processes_are_those_of_one(name: str, runs: Path) -> None:
    """The same tasks in the same slots, ended by the same losses after the same steps: the same adapters."""
    one, other = (AdapterLibrary.open(runs / n / "library") for n in ("task-loras-1", name))
    assert one.names == other.names and len(one.names) == 4
    for task in one.names:
        mine, theirs = one.index[task], other.index[task]
        assert {k: v for k, v in mine.items() if isinstance(v, str | int | list)} == {
            k: v for k, v in theirs.items() if isinstance(v, str | int | list)
        }
        assert mine["loss"] == pytest.approx(theirs["loss"], **ROUNDING)
    stacks = [library.stack(library.names) for library in (one, other)]
    pairs = zip(*((*lora.a, *lora.b) for lora in stacks), strict=True)
    assert all((x - y).abs().max() <= 1e-3 for x, y in pairs)
    facts = [read_facts(runs / n) for n in ("task-loras-1", name)]
    assert facts[0] == facts[1]


def require_same(one_name: str, name: str, runs: Path) -> None:
    one, other = losses(runs / one_name), losses(runs / name)
    if name in ("sft-1-2", "sft-2-1"):  # stopped after the first step, which was then evaluated
        other = {key: value for key, value in other.items() if key[0] > 1 or "/" not in key[1]}
    assert one.keys() == other.keys()
    assert {key: value for key, value in other.items() if value != pytest.approx(one[key], **ROUNDING)} == {}
    mine, theirs = (load_file(runs / n / "checkpoint/hypernet.safetensors") for n in (one_name, name))
    assert all((x.float() - theirs[key].float()).abs().max() <= 1e-3 for key, x in mine.items())


def command_for(config: SftConfig, folder: Path) -> list[str]:
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(to_plain(config)))))
    files = ["--config", str(folder / "config.yaml"), "--run", str(folder / "run")]
    return ["-m", "t2l", "train", "sft", *files, "--device", "cpu"]


def start_two(command: list[str], folder: Path) -> list[Program]:
    """Two processes without a launcher that would look after them; each says its lines in a file of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    started = []
    for rank in range(2):
        own = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with (folder / f"{rank}.log").open("wb") as log:
            started.append(Program(command, env=own, stderr=log))
    return started


def wait_for_state(run: Path, started: list[Program]) -> None:
    waiting = time.monotonic() + 120
    while not (run / "state.safetensors").exists():
        assert time.monotonic() < waiting and started[0].poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_process_that_is_gone_ends_the_others_and_the_last_state_loads(
    how: signal.Signals, sft: SftConfig, tmp_path: Path
) -> None:
    """Killed, at once; stopped, when `ddp_timeout` is over. One process goes on afterwards, or two of torchrun."""
    config = shorter(sft, max_steps=100_000, save_steps=2, eval_steps=100_000, ddp_timeout=10)
    command = command_for(config, tmp_path)
    started = start_two(command, tmp_path)
    try:
        wait_for_state(tmp_path / "run", started)
        started[1].send_signal(how)
        started[0].wait(timeout=40)
    finally:
        for process in started:
            process.kill()
            process.wait()
    said = (tmp_path / "0.log").read_text()
    assert started[0].returncode == 1, said
    assert "another process has ended, or has not answered for 10 s (train.ddp_timeout)" in said
    done = read_progress(tmp_path / "run").step
    assert done >= 2
    if how == signal.SIGKILL:
        train(config, tmp_path / "run", resume=True, max_minutes=0, device="cpu", log=quiet)
    else:
        more = launched(["-m", "--", *command[1:], "--resume", "--max-minutes", "0"])
        went_on = run(more, timeout=120)
        assert went_on.returncode == 0, went_on.stderr
        assert went_on.stdout == f"{tmp_path / 'run' / 'checkpoint'}\n"
        assert went_on.stderr.count(f"resumed at step {done}") == 1
    assert read_progress(tmp_path / "run").step == done + 1


@pytest.mark.slow
def test_ctrl_c_in_one_process_stops_both_with_the_state_saved(sft: SftConfig, tmp_path: Path) -> None:
    """After the same step, whichever of them heard of it."""
    config = shorter(sft, max_steps=100_000, save_steps=2, eval_steps=100_000, ddp_timeout=30)
    started = start_two(command_for(config, tmp_path), tmp_path)
    try:
        wait_for_state(tmp_path / "run", started)
        started[1].send_signal(signal.SIGINT)
        assert [process.wait(timeout=40) for process in started] == [130, 130]
    finally:
        for process in started:
            process.kill()
            process.wait()
    done = read_progress(tmp_path / "run").step
    assert f"interrupted: the state after step {done} is saved" in (tmp_path / "0.log").read_text()
    assert "interrupted" not in (tmp_path / "1.log").read_text()


TOLD = """
import os, torch
from t2l.train.processes import join
with join("cpu", timeout=60) as processes:
    total = int(processes.sum(torch.tensor(1 + processes.rank)))
    os.write(1, f"{processes.rank} of {processes.number}: {total}{chr(10)}".encode())  # print may write twice
"""


def test_processes_that_a_launcher_starts_find_each_other(tmp_path: Path) -> None:
    """By what torchrun tells them; as `accelerate launch` does."""
    (tmp_path / "told.py").write_text(TOLD)
    done = run(launched([str(tmp_path / "told.py")]), timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 of 2: 3", "1 of 2: 3"]


def test_engines_and_numbers_that_do_not_fit_are_refused(
    sft: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with the setting and the way out."""
    for config, match in (
        (shorter(sft, gradient_accumulation_steps=7), r"train\.tasks_per_batch is .* gives 6; 1 of them in 7 turns"),
        (shorter(sft, fsdp="full_shard"), r"train\.fsdp shards the base over several processes, and there is one"),
    ):
        with pytest.raises(ConfigError, match=match):
            train(config, tmp_path / "run", device="cpu", log=quiet)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in OTHER_ENGINES:
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=f"{name} is set by accelerate's"):
            patch.setenv(name, "true")
            join("cpu", timeout=1)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"pip install 'text-to-lora\[train\]'"):
        patch.setitem(sys.modules, "accelerate", None)
        join("cpu", timeout=1)


def test_accumulated_gradients_are_those_of_the_whole_batch(sft: SftConfig, tmp_path: Path) -> None:
    """In four turns of one or two rows, of which but one have no row that the margin loss compares."""
    for name, steps in (("whole", 1), ("parts", 4)):
        config = shorter(sft, gradient_accumulation_steps=steps, max_steps=3)
        train(config, tmp_path / name, device="cpu", log=quiet)
    one, other = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert one == {key: pytest.approx(value, **ROUNDING) for key, value in other.items()}
