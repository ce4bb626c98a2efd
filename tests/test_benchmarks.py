"""Benchmarks run as they stand, and what they compare computes the same thing."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import make_hypernet
from loading import load

from t2l.apply import hooked
from t2l.config import LoraConfig
from t2l.spec import AdapterSpec
from t2l.train.loss import answer_losses

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def train_step() -> ModuleType:
    return load("benchmarks", "train_step")


def test_generate_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--device cpu --variants S --layers 1 --batches 1,2 --dtypes float32 --seconds 0 --shard-seconds 0"
    more = f"--shard-mb 1 --disk-files 0 --folder {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["generate.py", *options.split(), *more.split()])
    load("benchmarks", "generate").main()
    out = capsys.readouterr().out
    assert out.count("| S | float32 |") == 3 and "shards, float16" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_train_step_runs(
    train_step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--tiny", "--out", str(tmp_path / "steps.json")])
    train_step.main()
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    steps = ["lora", "t2l sentence", "t2l tokens"]
    assert [row["step"] for row in rows] == [*steps, *(f"{s} checkpoint" for s in steps), "reference", "peft eager"]
    assert len({row["tokens"] for row in rows}) == 1
    lora, peft = rows[0], rows[-1]
    assert lora["to_lora"] == 1 and lora["parameters"] == peft["parameters"]
    assert all(row["milliseconds"] > 0 for row in rows)
    assert capsys.readouterr().out.count("| tiny |") == len(rows)


def test_packed_and_reference_step_cost_the_same_loss(train_step: ModuleType) -> None:
    """Same documents, same adapters, same loss and same gradient: only the way differs."""
    shape, device = train_step.TINY, torch.device("cpu")
    base = train_step.make_base(shape, device)
    spec = AdapterSpec.from_config(base.config, "tiny", LoraConfig())
    packed = train_step.packed_batch(shape, 4, device)
    padded = train_step.padded_batch(packed)
    assert len(padded.rows.tokens) > len(packed.rows.tokens)
    assert (padded.rows.documents >= 0).sum() == (packed.rows.documents >= 0).sum()
    hypernet = make_hypernet(spec, embedding_size=8)
    states = torch.randn(4, 8)
    found = []
    for way, batch in (("packed", packed), ("reference", padded)):
        lora = hypernet(states[batch.read])
        with ExitStack() as stack:
            if way == "packed":
                function = answer_losses(base, stack.enter_context(hooked(base, spec)))
            else:
                function = train_step.repeated_losses(base, spec, stack)
            losses, _ = function(batch.rows, lora)
        loss = (losses * batch.rows.weights).sum()
        hypernet.zero_grad()
        loss.backward()
        found.append((loss, [p.grad.clone() for p in hypernet.parameters()]))
    assert packed.rows.weights.sum().item() == pytest.approx(1)
    (one, grads), (other, other_grads) = found
    assert abs(one.item() - other.item()) <= 1e-4
    assert any(g.abs().max() > 1e-3 for g in grads)
    assert all((x - y).abs().max() <= 1e-4 for x, y in zip(grads, other_grads, strict=True))


@pytest.mark.slow
def test_scaling_runs(tmp_path: Path) -> None:
    """Two processes on the CPU: one alone, both with the whole base each, and both with a sharded one."""
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--tiny", "--out", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    steps = [("alone", 1), ("base replicated", 2), ("base sharded (FSDP2)", 2)]
    assert [(row["step"], row["devices"]) for row in rows] == steps
    for row in rows[1:]:
        assert row["scaling"] == pytest.approx(2 * row["tokens_per_second"] / rows[0]["tokens_per_second"])
