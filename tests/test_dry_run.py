"""A dry run says what the run then needs: parameters and bytes exactly, time loosely; and it leaves nothing."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import load
from safetensors.torch import load_file
from sft_helpers import metrics, quiet, shorter
from typer.testing import CliRunner

from t2l.checkpoint import load_checkpoint
from t2l.cli import app
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig
from t2l.errors import TrainingError
from t2l.train import dry_run, sft
from t2l.train import estimate as estimates
from t2l.train.config import SftConfig
from t2l.train.dry_run import dry_run_reconstruction, dry_run_sft, dry_run_task_loras
from t2l.train.estimate import SavedBytes, Work, estimate, tensor_bytes
from t2l.train.reconstruction import (
    ReconstructionConfig,
    ReconstructionDataConfig,
    ReconstructionTrainConfig,
    train_reconstruction,
)
from t2l.train.sft import train
from t2l.train.task_config import TaskLorasConfig, TaskLorasDataConfig, TaskLorasTrainConfig
from t2l.train.task_loras import train_task_loras

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def task_loras_config(base_folder: Path, sft_jsonl: Path) -> TaskLorasConfig:
    return TaskLorasConfig(
        base=str(base_folder),
        lora=LoraConfig(r=2, lora_alpha=4),
        data=TaskLorasDataConfig(tasks=(str(sft_jsonl),)),
        train=TaskLorasTrainConfig(
            max_steps=4,
            tasks_per_batch=2,
            max_seq_length=96,
            max_target_length=24,
            eval_steps=2,
            report_to="none",
        ),
    )


@pytest.fixture(scope="module")
def task_loras_run(task_loras_config: TaskLorasConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("task-loras") / "run"
    train_task_loras(task_loras_config, run, device="cpu", log=quiet)
    return run


def bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*.safetensors"))


# ---------------------------------------------------------------------------------------- against the runs themselves


def test_fine_tuning_needs_what_its_dry_run_says(
    sft_config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = dry_run_sft(sft_config, device="cpu", log=quiet)
    assert list(tmp_path.iterdir()) == []
    started = time.perf_counter()
    folder = train(sft_config, tmp_path / "run", device="cpu", log=quiet)
    spent = time.perf_counter() - started
    network = load_checkpoint(folder).hypernet
    base = load_file(Path(sft_config.base) / "model.safetensors")
    assert found.trained == sum(p.numel() for p in network.parameters())
    assert found.frozen == sum(x.numel() for x in base.values())
    assert found.disk["state"] == (tmp_path / "run" / "state.safetensors").stat().st_size
    assert found.disk["checkpoint"] == bytes_of(folder)
    assert found.memory["base"] == pytest.approx(4 * found.frozen, abs=100)  # its buffers too
    assert found.memory["moments"] == 2 * found.memory["gradients"] == 8 * found.trained
    really = sum(row["seconds_per_step"] for row in metrics(tmp_path / "run") if "seconds_per_step" in row) / 6
    assert 0.2 < found.seconds_per_step / really < 5
    assert 0.2 < found.seconds / spent < 5
    assert found.fits and found.peak == pytest.approx(1e9 * metrics(tmp_path / "run")[-2]["memory_gb"], rel=0.15)


def test_early_stopping_is_counted_too(sft_config: SftConfig, tmp_path: Path) -> None:
    stopping = shorter(sft_config, early_stopping_patience=3, eval_steps=3)
    found = dry_run_sft(stopping, device="cpu", log=quiet)
    train(stopping, tmp_path / "run", device="cpu", log=quiet)
    # The facts beside the tensors hold a loss, whose digits nobody knows.
    assert found.disk["state"] == pytest.approx((tmp_path / "run" / "state.safetensors").stat().st_size, abs=64)


def test_task_loras_need_what_their_dry_run_says(task_loras_config: TaskLorasConfig, task_loras_run: Path) -> None:
    found = dry_run_task_loras(task_loras_config, device="cpu", log=quiet)
    assert found.steps == 4
    assert found.trained * 4 == found.disk["library"]
    assert found.disk["finished adapters"] == bytes_of(task_loras_run / "finished")
    assert found.disk["library"] == pytest.approx(bytes_of(task_loras_run / "library"), abs=1000)
    row = json.loads((task_loras_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found.peak == pytest.approx(1e9 * row["memory_gb"], rel=0.15)


def test_compressing_has_a_dry_run_too(task_loras_run: Path, sentence_folder: Path, tmp_path: Path) -> None:
    library, out = task_loras_run / "library", tmp_path / "out"
    settings = [f"encoder.model={sentence_folder}", "encoder.max_tokens=60", "hypernet.width=24", "train.max_steps=20"]
    options = [x for setting in settings for x in ("--set", setting)]
    done = CliRunner().invoke(app, ["compress", str(library), "-o", str(out), "--dry-run", "--device", "cpu", *options])
    assert done.exit_code == 0, done.output
    assert "for 20 steps" in done.stdout and list(tmp_path.iterdir()) == []


def test_a_base_that_the_gpu_cannot_hold_is_said_with_its_size(
    sft_config: SftConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(sft, "setup", full)
    monkeypatch.setattr(dry_run, "device_name", lambda device: "Pretended GPU")
    monkeypatch.setattr(dry_run, "memory_available", lambda device: 10**5)
    with pytest.raises(TrainingError, match=r"has 40,160 parameters, 161 kB .*; Pretended GPU has 100 kB\. Take"):
        dry_run_sft(sft_config, device="cpu", log=quiet)


def test_reconstruction_needs_what_its_dry_run_says(
    task_loras_run: Path, sentence_folder: Path, tmp_path: Path
) -> None:
    config = ReconstructionConfig(
        encoder=EncoderConfig(kind="sentence", model=str(sentence_folder), max_tokens=60),
        hypernet=HypernetConfig(width=24, head_size=16, dropout=0.0),
        data=ReconstructionDataConfig(library=str(task_loras_run / "library"), held_out_descriptions=1),
        train=ReconstructionTrainConfig(max_steps=20, eval_steps=10, logging_steps=10, report_to="none"),
    )
    found = dry_run_reconstruction(config, device="cpu", log=quiet)
    folder = train_reconstruction(config, tmp_path / "run", device="cpu", log=quiet)
    assert found.disk["checkpoint"] == bytes_of(folder)
    assert found.disk["state"] == (tmp_path / "run" / "state.safetensors").stat().st_size
    assert found.rows == 2, "the library holds no more"
    assert 0.1 < found.seconds_per_step * metrics(tmp_path / "run")[-2]["steps_per_second"] < 10


def test_the_command_prints_a_table_and_writes_nothing(
    sft_config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t2l.config import to_plain

    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(to_plain(sft_config)))
    options = ["train", "sft", "--config", "config.yaml", "--dry-run", "--device", "cpu"]
    done = CliRunner().invoke(app, [*options, "--run", "run"])
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        *("device", "parameters", "memory", "step", "time", "disk", "fits")
    ]
    assert list(tmp_path.iterdir()) == [config]
    plain = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert plain["trained"] > 0 and plain["peak"] == sum(plain["memory"].values()) and plain["disk_free"] > 0
    missing = CliRunner().invoke(app, options[:4])
    assert missing.exit_code == 2 and "--run DIR" in missing.output


# ------------------------------------------------------------------------------- where the run's own steps are too much


def make_work(step: Callable[[int, int], None], **changes: Any) -> Work:
    values: dict[str, Any] = {
        "device": torch.device("cpu"),
        "setting": "train.tasks_per_batch",
        "rows": 8,
        "tokens": 64,
        "step": step,
        "steps": 100,
        "evaluate": None,
        "evaluations": 0,
        "passes": 1,
        "trained": 10,
        "frozen": 100,
        "held": {"base": 1000},
        "disk": dict,
    }
    return Work(**(values | changes))


@pytest.mark.parametrize(
    ("rows", "per_token", "limit"), [(8, 10, 5000), (500, 3, 60_000), (2, 40, 5000), (4, 100, 3500)]
)
def test_advice_is_the_most_that_fits(rows: int, per_token: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended GPU that holds so much: what is advised is taken without an error, and a third more is not."""
    highest = [1000]

    def step(rows: int, tokens: int) -> None:
        needed = 1000 + per_token * rows * tokens
        if needed > limit:
            raise torch.cuda.OutOfMemoryError("out of memory")
        highest[0] = max(highest[0], needed)

    def reset(*_: Any) -> None:
        highest[0] = 1000

    monkeypatch.setattr(estimates, "peak_bytes", lambda device: highest[0])
    monkeypatch.setattr(estimates, "memory_available", lambda device: limit)
    monkeypatch.setattr(estimates, "synchronize", lambda device: None)
    monkeypatch.setattr(estimates, "device_name", lambda device: "pretended")
    monkeypatch.setattr(estimates, "_forget", reset)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    found = estimate(make_work(step, device=torch.device("cuda"), rows=rows), budget=0.01)
    assert not found.fits and found.peak == pytest.approx(1000 + per_token * rows * 64, rel=0.01)
    assert "too large" in found.table() and found.advice in found.line()
    words = dict(word.split("=") for word in found.advice.split() if "=" in word)
    rows, tokens = int(words["train.tasks_per_batch"]), int(words.get("train.max_seq_length", 64))
    step(rows, tokens)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        step(rows + (tokens == 64), round(tokens * 1.35) if tokens < 64 else tokens + rows)


def test_slow_steps_are_computed_from_smaller_ones() -> None:
    """Where eight rows take longer than one may wait, fewer are taken: the time is a straight line in the rows."""
    taken: list[int] = []

    def step(rows: int, tokens: int) -> None:
        taken.append(rows)
        time.sleep(0.02 + 0.03 * rows)

    found = estimate(make_work(step, rows=64), budget=1.0)
    assert max(taken) < 64 and found.measured.rows < 64 and "of 64 rows" in found.table()
    assert found.seconds_per_step == pytest.approx(0.02 + 0.03 * 64, rel=0.3)


def test_compiled_steps_have_one_shape() -> None:
    taken: list[int] = []
    estimate(make_work(lambda rows, tokens: taken.append(rows), compiled=True), budget=0.1)
    assert set(taken) == {8}


def test_building_batches_and_evaluations_count() -> None:
    calls: list[int] = []
    work = make_work(lambda rows, tokens: time.sleep(0.001), rows=1, least_seconds=0.5, setup_seconds=3.0)
    found = estimate(replace(work, evaluate=lambda: calls.append(1), evaluations=7), budget=1.0)
    assert found.seconds_per_step == 0.5 and found.time["steps"] == 50 and found.time["set-up"] >= 3
    assert len(calls) == 2
    slow = estimate(replace(work, evaluate=lambda: calls.append(1), evaluations=7, passes=30), budget=1.0)
    assert len(calls) == 2 and slow.time["evaluations"] > 0, "ten seconds are not waited for"


def test_what_a_step_keeps_for_its_backward_pass_is_counted() -> None:
    linear = torch.nn.Linear(8, 4)
    saved = SavedBytes()
    with saved:
        x = torch.randn(3, 8, requires_grad=True)
        linear(x).sigmoid().sum().backward()
    assert saved.total == 4 * (3 * 8 + 3 * 4), "the input and the sigmoid's output; the weight is there anyway"


def test_sizes_of_files_are_exact(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {
        "ü": torch.zeros(3),
        "b": torch.zeros(2, 2, dtype=torch.float16),
        "a": torch.zeros((), dtype=torch.int64),
    }
    for metadata in ({"facts": '{"step": 3}'}, {}, None):
        save_file(tensors, tmp_path / "x", metadata=metadata)
        assert tensor_bytes(tensors, metadata) == (tmp_path / "x").stat().st_size
    halves = {name: x.half() for name, x in tensors.items()}
    save_file(halves, tmp_path / "x")
    assert tensor_bytes(halves, None) == tensor_bytes(tensors, None, torch.float16) == (tmp_path / "x").stat().st_size


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = load("benchmarks", "dry_run")
    monkeypatch.setattr(module, "STEPS", 10)
    monkeypatch.setattr(sys, "argv", ["dry_run.py", "--tiny", "--out", str(tmp_path / "found.json")])
    module.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ratios"]["peak"] == pytest.approx(1, abs=0.15) and 0.2 < found["ratios"]["seconds"] < 5
