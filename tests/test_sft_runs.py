"""Runs of a training: they resume bit for bit, start from checkpoints, stop when they must, and are seen."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file
from sft_helpers import ANSWERS, Interrupted, interrupt_at, lengths, metrics, quiet, shorter

from t2l import TextToLora
from t2l.config import build, to_plain
from t2l.errors import CheckpointError, ConfigError, TrainingError
from t2l.train import sft
from t2l.train.batches import Batch
from t2l.train.config import SftConfig
from t2l.train.dataset import RunData, prepare_data
from t2l.train.monitor import require_finite, require_learning
from t2l.train.resume import read_progress
from t2l.train.sft import Trainer, train


@pytest.fixture(scope="module")
def config(sft_config: SftConfig) -> SftConfig:
    return sft_config


@pytest.fixture(scope="module")
def whole_run(config: SftConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one go."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(config, run, device="cpu", log=quiet)
    return run


def test_normalized_run_keeps_what_it_measured(config: SftConfig, tmp_path: Path) -> None:
    """By the tokens of the texts that are trained on; saved, resumed, and no start for a run that does not."""
    standardized = replace(config, hypernet=replace(config.hypernet, normalize_inputs=True))
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(standardized, run, device="cpu", log=interrupt_at(4))
    folder = train(standardized, run, resume=True, device="cpu", log=quiet)
    generator = TextToLora.from_pretrained(str(folder))
    encoded = generator.encoder.encode([text for texts in ANSWERS.values() for text in texts[:-1]])
    rows = encoded.states[encoded.mask].bfloat16().float()
    assert generator.hypernet.normalizer is not None
    assert torch.allclose(generator.hypernet.normalizer.mean_E, rows.mean(0), atol=2e-3)
    assert torch.allclose(1 / generator.hypernet.normalizer.scale_E, rows.std(0, correction=0), rtol=2e-3, atol=2e-3)
    other = shorter(config, init_from=str(folder))
    with pytest.raises(ConfigError, match=r"hypernet\.normalize_inputs is True, here False"):
        train(other, tmp_path / "other", device="cpu", log=quiet)
    on = shorter(standardized, init_from=str(folder), max_steps=1)
    again = TextToLora.from_pretrained(str(train(on, tmp_path / "on", device="cpu", log=quiet)))
    assert again.hypernet.normalizer is not None
    assert torch.equal(again.hypernet.normalizer.mean_E, generator.hypernet.normalizer.mean_E)


@pytest.mark.parametrize("noise", [b"", b"x"], ids=["same random state", "other random state"])
def test_resumed_run_is_the_same_run(noise: bytes, config: SftConfig, whole_run: Path, tmp_path: Path) -> None:
    """Six steps, or three, a crash in the fourth and three more: weights, optimiser and random state bit for bit."""
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(config, run, device="cpu", log=interrupt_at(4))
    assert read_progress(run).step == 3
    assert not (run / "checkpoint").exists()
    torch.rand(len(noise))
    train(config, run, resume=True, device="cpu", log=quiet)
    one, other = (load_file(folder / "state.safetensors") for folder in (whole_run, run))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    name = "checkpoint/hypernet.safetensors"
    assert (whole_run / name).read_bytes() == (run / name).read_bytes()
    last = [[row["loss"] for row in metrics(r) if row.get("step") == 6 and "loss" in row] for r in (whole_run, run)]
    assert last[0] == last[1]


def test_runs_of_one_seed_are_equal_and_of_another_differ(config: SftConfig, whole_run: Path, tmp_path: Path) -> None:
    for seed, same in ((config.seed, True), (config.seed + 1, False)):
        run = tmp_path / str(seed)
        train(replace(config, seed=seed), run, device="cpu", log=quiet)
        name = "checkpoint/hypernet.safetensors"
        assert ((whole_run / name).read_bytes() == (run / name).read_bytes()) is same


def test_time_budget_stops_saves_and_can_go_on(config: SftConfig, whole_run: Path, tmp_path: Path) -> None:
    """With no time at all one step is done, and what follows after resuming is the uninterrupted run."""
    run = tmp_path / "run"
    folder = train(config, run, max_minutes=0, device="cpu", log=quiet)
    assert read_progress(run).step == 1
    training = TextToLora.from_pretrained(str(folder)).config.training
    assert (training["steps"], training["planned_steps"], training["seed"]) == (1, 6, 0)
    train(config, run, resume=True, device="cpu", log=quiet)
    name = "checkpoint/hypernet.safetensors"
    assert (whole_run / name).read_bytes() == (run / name).read_bytes()


def test_resume_is_refused_where_it_would_be_another_run(config: SftConfig, whole_run: Path, tmp_path: Path) -> None:
    before = (whole_run / "config.json").read_bytes()
    for other, match in (
        (shorter(config, learning_rate=1e-4), r"other settings: train\.learning_rate was 0\.005, is 0\.0001\."),
        (replace(config, seed=3), "seed was 0, is 3"),
        (replace(config, lora=replace(config.lora, r=2)), r"lora\.r was 4, is 2"),
    ):
        with pytest.raises(TrainingError, match=match):
            train(other, whole_run, resume=True, device="cpu", log=quiet)
    with pytest.raises(TrainingError, match="is finished: 6 of 6"):
        train(config, whole_run, resume=True, device="cpu", log=quiet)
    with pytest.raises(TrainingError, match="no saved state"):
        train(config, tmp_path / "absent", resume=True, device="cpu", log=quiet)
    with pytest.raises(TrainingError, match="is not empty"):
        train(config, whole_run, device="cpu", log=quiet)
    assert (whole_run / "config.json").read_bytes() == before


def test_settings_are_read_strictly(config: SftConfig) -> None:
    plain = to_plain(config)
    assert build(SftConfig, plain) == config
    plain["train"]["lerning_rate"] = 1.0
    with pytest.raises(ConfigError, match=r"train\.lerning_rate: unknown key; did you mean 'learning_rate'"):
        build(SftConfig, plain)


def test_init_from_is_refused_where_the_checkpoint_is_of_another_kind(
    config: SftConfig, whole_run: Path, tmp_path: Path
) -> None:
    """Every difference that would make the weights mean something else is named with both values."""
    start = shorter(config, init_from=str(whole_run / "checkpoint"))
    for other, match in (
        (replace(start, encoder=replace(config.encoder, layers=(2, 3))), r"encoder\.layers is \[1, 2\], here \[2, 3\]"),
        (replace(start, lora=replace(config.lora, r=2, lora_alpha=4)), r"spec\.rank is 4, here 2"),
        (
            replace(start, lora=replace(config.lora, target_modules=("v_proj", "q_proj"))),
            r"spec\.targets is \['q_proj 32 x 32', 'v_proj 32 x 16'\], here \['v_proj 32 x 16', 'q_proj 32 x 32'\]",
        ),
        # The same shapes, another network.
        (
            replace(start, hypernet=replace(config.hypernet, attention_heads=2)),
            r"hypernet\.attention_heads is 4, here 2",
        ),
        (replace(start, hypernet=replace(config.hypernet, variant="none")), r"hypernet\.variant is 'L', here 'none'"),
        (
            shorter(config, init_from=str(tmp_path / "gone")),
            r"train\.init_from: there is no checkpoint .*gone; this run",
        ),
    ):
        with pytest.raises(ConfigError, match=match):
            train(other, tmp_path / "run", device="cpu", log=quiet)
    assert not (tmp_path / "run").exists()


def test_init_from_an_encoder_of_another_revision_is_refused(
    config: SftConfig, whole_run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole_run / "checkpoint", copy)
    plain = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(plain | {"encoder_revision": "sha256:other"}))
    with pytest.raises(
        ConfigError, match=r"encoder\.revision is 'sha256:other .*tiny-base\)', here 'sha256:.*tiny-base"
    ):
        train(shorter(config, init_from=str(copy)), tmp_path / "run", device="cpu", log=quiet)


def test_started_run_begins_with_the_checkpoints_adapters_and_says_so_without_a_path(
    config: SftConfig, whole_run: Path, tmp_path: Path
) -> None:
    """From a hypernetwork everything, from a multi-task LoRA the shared LoRA: at rate 0 adapters stay as they were."""
    blind = replace(config, hypernet=replace(config.hypernet, variant="none"))
    train(blind, tmp_path / "multitask", device="cpu", log=quiet)
    for source in (whole_run, tmp_path / "multitask"):
        still = shorter(
            config, init_from=str(source / "checkpoint"), max_steps=1, learning_rate=0.0, shared_lora_learning_rate=0.0
        )
        folder = train(still, tmp_path / f"from-{source.name}", device="cpu", log=quiet)
        before, after = (TextToLora.from_pretrained(str(f)) for f in (source / "checkpoint", folder))
        (one,), (other,) = before.generate(["Say yes."]), after.generate(["Say yes."])
        assert all(torch.equal(x, y) for x, y in zip(one.lora.b, other.lora.b, strict=True))
        assert all(b.abs().max() > 0 for b in other.lora.b)
        recorded = after.config.training["settings"]
        assert recorded["train"]["init_from"] == {
            "name": "checkpoint",
            "weights_sha256": before.config.weights_sha256,
        }
        assert recorded["data"]["tasks"] == "own.jsonl"


def test_loss_that_is_not_finite_stops_before_the_weights_change(
    config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third loss is NaN, found out later; the state on disk and the weights in memory are those before it."""
    original, kept = Trainer.loss, {}

    def loss(self: Trainer, batch: Batch) -> torch.Tensor:
        kept["trainer"] = self
        kept["calls"] = kept.get("calls", 0) + 1
        if kept["calls"] == 3:
            kept["before"] = {name: x.detach().clone() for name, x in self.hypernet.named_parameters()}
        return original(self, batch) * (float("nan") if kept["calls"] == 3 else 1)

    monkeypatch.setattr(Trainer, "loss", loss)
    with pytest.raises(
        TrainingError, match=r"Step 2: loss nan.*the batch is item 2 of seed 0, of tasks (no, yes|yes, no)\."
    ):
        train(shorter(config, logging_steps=6, save_steps=2), tmp_path / "run", device="cpu", log=quiet)
    assert kept["calls"] == 4, "found out when the state was to be saved"
    data = prepare_data(config, make_tokenizer(), lengths)
    with pytest.raises(
        TrainingError, match=r"Step 7: loss nan, gradient norm 1\.0, after 3 \(0\.5\), 2 \(0\.25\)\. The"
    ):
        require_finite([3.0, 2.0, float("nan")], [0.5, 0.25, 1.0], 5, data, config)
    after = dict(kept["trainer"].hypernet.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in kept["before"].items())
    assert read_progress(tmp_path / "run").step == 2
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_run_that_diverges_stops(config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One window worse than guessing may be a burst; the second in a row ends the run, what was saved before stays."""
    original, calls = Trainer.step, []

    def step(self: Trainer, batch: Batch, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(number)
        loss, norm = original(self, batch, number)
        return loss * 0 + (1.0, 20.0, 1.0, 20.0, 30.0, 1.0)[number], norm

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(
        TrainingError, match=r"diverged before step 5: mean losses of 20\.0 and 30\.0, .* this run had 1\.00\. Lower"
    ):
        train(shorter(config, max_steps=6, logging_steps=1, save_steps=4), tmp_path / "run", device="cpu", log=quiet)
    assert calls == [0, 1, 2, 3, 4]
    assert read_progress(tmp_path / "run").step == 4
    assert metrics(tmp_path / "run")[-1]["loss"] == 30.0
    require_learning([12.0, 13.0, 14.0], 100, 3)  # never better than guessing: not what this is about


@pytest.mark.parametrize("metric", ["margin", "loss"])
def test_early_stopping_keeps_the_best(
    metric: str, config: SftConfig, sft_jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations get better once, then worse twice: the run ends, and the checkpoint is of the best one."""
    scores = [1.0, 3.0, 2.0, 1.5, 9.0]
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(trainer: Trainer, data: RunData) -> dict[str, float]:
        seen.append({name: x.detach().clone() for name, x in trainer.hypernet.named_parameters()})
        value = scores[len(seen) - 1]
        margins = {"validation/adapter/margin": value - 1, "validation/adapter+prompt/margin": value + 1}
        found = {"seen/adapter/margin": 50.0, "validation/adapter/loss": -value if metric == "loss" else 50.0}
        return found | (margins if metric == "margin" else {})

    monkeypatch.setattr(sft, "evaluate", evaluate)
    rows = [json.loads(line) for line in sft_jsonl.read_text().splitlines()]
    rows += [row | {"task": f"{row['task']}2", "split": "val", "description": f"2 {row['task']}"} for row in rows[:80]]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = replace(
        shorter(config, early_stopping_patience=2, eval_steps=1, max_steps=6, save_steps=1),
        data=replace(config.data, tasks=str(tmp_path / "own.jsonl")),
    )
    folder = train(config, tmp_path / "run", device="cpu", log=quiet)
    assert len(seen) == 4
    saved = load_file(folder / "hypernet.safetensors")
    assert all(torch.equal(saved[name], value.half()) for name, value in seen[1].items())
    training = TextToLora.from_pretrained(str(folder)).config.training
    assert (training["steps"], training["chosen_by"], training["chosen_at"]) == (2, metric, 3.0)
    with pytest.raises(TrainingError, match="is finished: 4 of 6"):
        train(config, tmp_path / "run", resume=True, device="cpu", log=quiet)


def test_early_stopping_survives_an_interruption(
    config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second evaluation is the best: a run resumed after it chooses what the whole run chose."""
    stopping = shorter(config, early_stopping_patience=9, eval_steps=1, max_steps=5)

    def run(name: str, *, parts: int) -> bytes:
        scores = iter([3.0, 1.0, 2.0, 2.5, 2.0])
        monkeypatch.setattr(sft, "evaluate", lambda *_: {"seen/adapter/loss": next(scores)})
        for part in range(parts):
            train(stopping, tmp_path / name, resume=part > 0, max_minutes=0, device="cpu", log=quiet)
        train(stopping, tmp_path / name, resume=parts > 0, device="cpu", log=quiet)
        assert read_progress(tmp_path / name).best_step == 2
        return (tmp_path / name / "checkpoint" / "hypernet.safetensors").read_bytes()

    assert run("whole", parts=0) == run("parts", parts=3)


def test_evaluation_forced_by_a_time_budget_does_not_count(config: SftConfig, tmp_path: Path) -> None:
    """The uninterrupted run does not have it, and would choose and stop differently."""
    stopping = shorter(config, early_stopping_patience=3, eval_steps=2)
    train(stopping, tmp_path / "run", max_minutes=0, device="cpu", log=quiet)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 1]
    assert (read_progress(tmp_path / "run").step, read_progress(tmp_path / "run").best_step) == (1, 0)


def test_run_killed_before_its_checkpoint_can_still_write_it(
    config: SftConfig, whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "checkpoint")
    train(config, run, resume=True, device="cpu", log=quiet)
    name = "checkpoint/hypernet.safetensors"
    assert (whole_run / name).read_bytes() == (run / name).read_bytes()


def test_damaged_state_is_refused(config: SftConfig, whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "checkpoint")
    (run / "state.safetensors").write_bytes((whole_run / "state.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged"):
        train(config, run, resume=True, device="cpu", log=quiet)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_time_a_run_goes_on_bit_for_bit(config: SftConfig, tmp_path: Path) -> None:
    """SIGKILL at random moments, whatever the process is doing; what is left in the end is an uninterrupted run's."""
    long = shorter(config, max_steps=24, save_steps=3, eval_steps=5, early_stopping_patience=99)

    def start() -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(long, tmp_path / "run", resume=(tmp_path / "run").exists(), device="cpu", log=quiet)
                code = 0
            finally:
                os._exit(code)
        return child

    def steps() -> int:
        state = tmp_path / "run" / "state.safetensors"
        return read_progress(tmp_path / "run").step if state.exists() else 0

    whole = train(long, tmp_path / "whole", device="cpu", log=quiet)
    draw, killed, reached = random.Random(0), 0, []
    for goal in (1, 6, 12, 18):
        child = start()
        deadline = time.monotonic() + 60
        while steps() < goal and os.waitpid(child, os.WNOHANG) == (0, 0):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        reached.append(steps())
    assert killed >= 3 and len(set(reached)) >= 3, (killed, reached)
    _, status = os.waitpid(start(), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    one, other = (load_file(run / "state.safetensors") for run in (tmp_path / "whole", tmp_path / "run"))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert (whole / "hypernet.safetensors").read_bytes() == (
        tmp_path / "run" / "checkpoint" / "hypernet.safetensors"
    ).read_bytes()
    rows = [[r["loss"] for r in metrics(tmp_path / name) if "gradient_norm" in r] for name in ("whole", "run")]
    assert len(rows[0]) == 24 and rows[0] == rows[1]
    assert [path.name for path in (tmp_path / "run").glob(".*")] == []


def test_a_tracker_is_told_the_numbers_and_the_settings(
    config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as in the run's folder."""
    told: list[tuple[str, Any]] = []
    tracker = types.ModuleType("trackio")
    tracker.init = lambda **values: told.append(("init", values))
    tracker.log = lambda row, step: told.append(("log", (step, row)))
    tracker.finish = lambda: told.append(("finish", None))
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    watched = shorter(config, report_to="trackio", eval_steps=3)
    train(watched, tmp_path / "run", device="cpu", log=quiet)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert {"loss", "gradient_norm", "tokens_per_second", "minutes_left", "memory_gb"} <= rows[0].keys()
    assert rows[0]["memory_gb"] > 0.05 and rows[-2]["minutes_left"] == 0
    assert [what for what, _ in told] == ["init", *["log"] * 8, "finish"]
    assert told[0][1]["project"] == "t2l" and told[0][1]["config"]["seed"] == 0
    assert all({"step": step, **row} == rows[n] for n, (_, (step, row)) in enumerate(told[1:-1]))


def test_tensorboard_shows_the_numbers(config: SftConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(shorter(config, report_to="tensorboard"), tmp_path / "run", device="cpu", log=quiet)
    rows = metrics(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(
        [r["loss"] for r in rows if "loss" in r], rel=1e-6
    )


def test_missing_companions_are_named(config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker that was asked for is an error before the first step; TensorBoard's absence is said once."""
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"train\.report_to is wandb, which is not installed: pip install wandb"):
        train(shorter(config, report_to="wandb"), tmp_path / "one", device="cpu", log=quiet)
    assert metrics(tmp_path / "one") == []
    lines: list[str] = []
    train(shorter(config, report_to="tensorboard", max_steps=2), tmp_path / "two", device="cpu", log=lines.append)
    assert sum("TensorBoard is not installed" in line for line in lines) == 1
    assert (tmp_path / "two" / "checkpoint").exists()


def test_no_tracker_is_imported_unasked(config: SftConfig, tmp_path: Path) -> None:
    train(shorter(config, max_steps=1), tmp_path / "run", device="cpu", log=quiet)
    assert not {"wandb", "trackio"} & sys.modules.keys()


def test_bar_shows_numbers_in_place_of_lines(
    config: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    lines: list[str] = []
    train(shorter(config, eval_steps=3), tmp_path / "run", device="cpu", bar=True, log=lines.append)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "6/6 steps" in shown
    assert re.search(r"loss \d\S*  right answers \d+%  another's \d+%", shown)
    assert not any(line.startswith("step ") for line in lines)
