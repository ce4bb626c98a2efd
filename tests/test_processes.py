"""Several processes train as one does: two on the CPU, by gloo, against the same run in this process."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from sft_helpers import metrics, quiet, shorter

from t2l.config import to_plain
from t2l.train.config import SftConfig
from t2l.train.resume import read_progress
from t2l.train.sft import train

WORKER = Path(__file__).with_name("processes_worker.py")
ROUNDING = {"rel": 1e-5, "abs": 2e-5}
"""How far numbers may be apart: sums are rounded in another order."""


def launched(command: list[str], number: int = 2) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", *command]


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
        margin_loss_share=0.5,
        l2_weight=0.1,
        logging_steps=1,
        eval_steps=3,
        eval_batches=1,
    )
    return replace(config, hypernet=replace(config.hypernet, dropout=0.0, token_dropout=0.0))


@pytest.fixture(scope="module")
def runs(sft: SftConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, all in one start of them, and of one."""
    folder = tmp_path_factory.mktemp("processes")
    plan: list[dict[str, Any]] = []

    def add(trainer: str, config: Any, name: str, **options: Any) -> None:
        plain = to_plain(config)
        plan.append({"trainer": trainer, "config": plain, "run": str(folder / name), "options": options})

    train(sft, folder / "sft-1", device="cpu", log=quiet)
    train(sft, folder / "sft-1-2", device="cpu", log=quiet, max_minutes=0)
    add("sft", sft, "sft-2")
    add("sft", sft, "sft-1-2", resume=True)
    add("sft", sft, "sft-2-1", max_minutes=0)
    add("sft", shorter(sft, gradient_accumulation_steps=2, fsdp="full_shard"), "sft-sharded")
    (folder / "plan.json").write_text(json.dumps(plan))
    command = launched([str(WORKER), str(folder / "plan.json")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert read_progress(folder / "sft-2-1").step == 1
    train(sft, folder / "sft-2-1", device="cpu", log=quiet, resume=True)
    return folder


@pytest.mark.parametrize("name", ["sft-2", "sft-1-2", "sft-2-1", "sft-sharded"])
def test_fine_tuning_in_several_processes_is_the_same_run(name: str, runs: Path) -> None:
    """Losses, validation and weights; started in two, gone on in two, or started in two and gone on in one."""
    one, other = losses(runs / "sft-1"), losses(runs / name)
    if name in ("sft-1-2", "sft-2-1"):  # stopped after the first step, which was then evaluated
        other = {key: value for key, value in other.items() if key[0] > 1 or "/" not in key[1]}
    assert one.keys() == other.keys()
    assert {key: value for key, value in other.items() if value != pytest.approx(one[key], **ROUNDING)} == {}
    mine, theirs = (load_file(runs / n / "checkpoint" / "hypernet.safetensors") for n in ("sft-1", name))
    assert all((x.float() - theirs[key].float()).abs().max() <= 1e-3 for key, x in mine.items())
