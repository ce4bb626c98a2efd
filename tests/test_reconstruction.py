"""Reconstruction: that it learns, goes on where it stopped, and what it refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reconstruction_helpers import CPU, NAMES, make_config, make_library, make_spec, run, stacked
from transformers import LlamaConfig

from t2l import TextToLora
from t2l.config import EncoderConfig, HypernetConfig
from t2l.encoder import OneHotEncoder
from t2l.errors import ConfigError, DataError, DescriptionError, TrainingError
from t2l.library import AdapterLibrary, save_library
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.tasks import load_splits
from t2l.train import reconstruction, reconstruction_losses
from t2l.train.reconstruction import (
    ReconstructionConfig,
    new_hypernet,
    train_reconstruction,
)
from t2l.train.reconstruction_data import (
    ReconstructionDataConfig,
    choose_descriptions,
    open_library,
)
from t2l.train.reconstruction_losses import (
    ReconstructionLossConfig,
    compare,
    factor_loss,
    make_targets,
)
from t2l.train.reconstruction_losses import reconstruction_losses as reconstruction_losses_of


@pytest.fixture(scope="module")
def spec(tiny_config: LlamaConfig, base_folder: Path) -> AdapterSpec:
    return make_spec(tiny_config, base_folder)


@pytest.fixture(scope="module")
def library(spec: AdapterSpec, tmp_path_factory: pytest.TempPathFactory) -> AdapterLibrary:
    return make_library(spec, tmp_path_factory.mktemp("library") / "six")


@pytest.fixture(scope="module")
def config(library: AdapterLibrary, sentence_folder: Path) -> ReconstructionConfig:
    return make_config(library, sentence_folder)


def changed(config: ReconstructionConfig, **changes: Any) -> ReconstructionConfig:
    return replace(config, train=replace(config.train, **changes))


# ---------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize(
    ("variant", "loss", "limit", "steps"),
    [
        ("L", {}, 0.1, 1200),
        ("M", {}, 0.3, 1200),
        ("S", {}, 0.6, 1200),
        ("basis", {}, 0.1, 600),
        ("basis", {"factors": 0.0, "squares": 1.0}, 0.05, 600),
        ("L", {"factors": 0.0, "squares": 1.0}, 0.1, 600),
    ],
)
def test_a_library_is_reconstructed(
    variant: str,
    loss: dict[str, float],
    limit: float,
    steps: int,
    config: ReconstructionConfig,
    library: AdapterLibrary,
    tmp_path: Path,
) -> None:
    """From its description, through the saved checkpoint, each adapter comes back; another's text gives another.

    L, M and S have twice the steps that tell the texts apart on one kind of CPU: rounding decides when they do.
    """
    learning = changed(
        config, max_steps=steps, adapters_per_batch=6, logging_steps=100, eval_steps=2000, save_steps=2000
    )
    learning = replace(
        learning,
        hypernet=replace(config.hypernet, variant=variant, width=32, head_size=48),
        loss=ReconstructionLossConfig(**loss),
    )
    folder = run(learning, tmp_path / "run")
    t2l = TextToLora.from_pretrained(str(folder))
    assert t2l.prompt.description_in_prompt
    texts = [library.index[name]["descriptions"][0] for name in NAMES]
    written = LoraTensors.stack([adapter.lora for adapter in t2l.generate(texts)])
    errors = compare(written, library.stack())
    assert max(errors.relative) < limit and min(errors.cosine) > 1 - limit / 2
    swapped = compare(written.select(torch.arange(6).roll(1)), library.stack())
    assert min(swapped.relative) > max(errors.relative)
    # The checkpoint's own account is that of what was saved.
    told = t2l.config.training["errors"]
    assert told["trained/relative"] == pytest.approx(sum(errors.relative) / 6, rel=0.02, abs=5e-4)  # saved in fp16
    assert t2l.config.training["adapters"] == list(NAMES)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] > 2 * rows[-2]["loss"] if loss == {} else rows[0]["loss"] > rows[-2]["loss"]


@pytest.fixture(scope="module")
def shared(library: AdapterLibrary, tmp_path_factory: pytest.TempPathFactory) -> AdapterLibrary:
    """The library with the first adapter's A in all."""
    lora = library.stack()
    lora = LoraTensors(tuple(a[:1].repeat(6, 1, 1, 1) for a in lora.a), lora.b, lora.scaling)
    return save_library(tmp_path_factory.mktemp("library") / "shared", lora, library.spec, library.index)


def of(
    config: ReconstructionConfig, library: AdapterLibrary, freeze_a: bool, loss: dict[str, float]
) -> ReconstructionConfig:
    """The same for another library."""
    return replace(
        config,
        hypernet=replace(config.hypernet, freeze_a=freeze_a, width=32, head_size=48),
        data=replace(config.data, library=str(library.folder)),
        loss=ReconstructionLossConfig(**loss),
    )


def written_by(folder: Path, library: AdapterLibrary) -> LoraTensors:
    texts = [library.index[name]["descriptions"][0] for name in NAMES]
    return LoraTensors.stack([adapter.lora for adapter in TextToLora.from_pretrained(str(folder)).generate(texts)])


LOSSES = {"factors": {}, "both": {"squares": 1.0}}


def test_squares_of_a_basis_are_the_same_from_its_shares(config: ReconstructionConfig, shared: AdapterLibrary) -> None:
    """Loss and gradient, with components too few for the library, and with ones that are nothing."""
    lora = shared.stack()
    for number in (2, 5):
        torch.manual_seed(number)
        targets = make_targets(lora, shared.names, device=CPU, freeze_a=True)
        settings = HypernetConfig(variant="basis", freeze_a=True, width=16, head_size=number, dropout=0.0)
        encoder = OneHotEncoder(shared.names)
        net = new_hypernet(settings, shared.spec, encoder, targets)
        index = torch.tensor([4, 0, 4, 2])
        states = torch.eye(6)[[1, 2, 3, 0]]
        found = []
        for factors in (0.0, 1e-30):  # a trifle: written in full
            loss = reconstruction_losses_of(net, targets, ReconstructionLossConfig(factors=factors, squares=2.0))(
                states, None, index
            )
            learnt = [p for p in net.parameters() if p.requires_grad and p.dim() > 1]
            found.append((loss, *torch.autograd.grad(loss, learnt, allow_unused=True)))
        assert found[0][0] > 1
        for mine, theirs in zip(*found, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize(("loss", "steps"), [("factors", 1000), pytest.param("both", 1200, marks=pytest.mark.slow)])
def test_adapters_that_have_one_a_are_written_by_their_b(
    loss: str, steps: int, config: ReconstructionConfig, shared: AdapterLibrary, tmp_path: Path
) -> None:
    """Each with exactly that A, as a checkpoint saves it, and all but no error."""
    learning = changed(
        config, max_steps=steps, adapters_per_batch=6, logging_steps=200, eval_steps=1000, save_steps=1000
    )
    folder = run(of(learning, shared, True, LOSSES[loss]), tmp_path / "run")
    written, wanted = written_by(folder, shared), shared.stack()
    assert all(torch.equal(x, y.half().float()) for x, y in zip(written.a, wanted.a, strict=True))
    assert max(compare(written, wanted).relative) < 0.05


@pytest.mark.parametrize("loss", LOSSES)
def test_an_a_without_deviation_is_no_division_by_zero(
    loss: str, config: ReconstructionConfig, shared: AdapterLibrary, tmp_path: Path
) -> None:
    """Where A is written too, it still is the one of all."""
    written = written_by(run(of(config, shared, False, LOSSES[loss]), tmp_path / "run"), shared)
    assert all(torch.equal(x, y.half().float()) for x, y in zip(written.a, shared.stack().a, strict=True))
    assert all(x.isfinite().all() for x in written.b)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_targets_of_one_a_are_it_and_no_z_scores(shared: AdapterLibrary) -> None:
    """Written or not it is exact, which a mean is not."""
    lora = shared.stack()
    one, both = (make_targets(lora, NAMES, device=CPU, freeze_a=f) for f in (True, False))
    index = torch.tensor([4, 2])
    for targets in (one, both):
        back = targets.adapters(index)
        for m in range(2):
            assert torch.equal(targets.mean.a[m], lora.a[m][0]) and torch.equal(back.a[m], lora.a[m][index])
            torch.testing.assert_close(back.b[m], lora.b[m][index])
    assert one.z.a == one.deviation.a == ()
    assert not any(x.any() for x in (*both.z.a, *both.deviation.a))


def test_adapters_with_different_a_cannot_be_written_by_b(config: ReconstructionConfig, tmp_path: Path) -> None:
    alone = replace(config, hypernet=replace(config.hypernet, freeze_a=True))
    with pytest.raises(DataError, match=r"those of [qv]_proj by up to [0-9.]+ of its largest.*train\.freeze_a true"):
        run(alone, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_token_encoders_condition_too(config: ReconstructionConfig, tmp_path: Path) -> None:
    tokens = replace(
        config,
        encoder=EncoderConfig(kind="tokens", model="base", layers=(1, 3), max_tokens=60),
        hypernet=HypernetConfig(
            width=24, head_size=16, dropout=0.0, token_blocks=1, attention_heads=4, token_dropout=0.0
        ),
    )
    folder = run(tokens, tmp_path / "run")
    (adapter,) = TextToLora.from_pretrained(str(folder)).generate(["Do add, 1 times."])
    assert adapter.lora.a[0].isfinite().all()


def test_one_hot_conditioning_knows_names(
    config: ReconstructionConfig, library: AdapterLibrary, tmp_path: Path
) -> None:
    """Descriptions are neither needed nor understood."""
    bare = save_library(tmp_path / "bare", library.stack(), library.spec, {name: {} for name in NAMES})
    onehot = replace(
        changed(config, max_steps=300, adapters_per_batch=6, logging_steps=100),
        encoder=EncoderConfig(kind="onehot"),
        hypernet=replace(config.hypernet, width=32, head_size=48),
        data=ReconstructionDataConfig(library=str(bare.folder)),
    )
    t2l = TextToLora.from_pretrained(str(run(onehot, tmp_path / "run")))
    assert (t2l.config.conditioning, t2l.config.encoder.names) == ("task", NAMES)
    written = LoraTensors.stack([adapter.lora for adapter in t2l.generate(NAMES[::-1])])
    assert max(compare(written, bare.stack(NAMES[::-1])).relative) < 0.2
    with pytest.raises(DescriptionError, match="knows tasks by their names only, not 'Do add"):
        t2l.generate(["Do add, 1 times."])


def test_held_out_descriptions_are_not_trained_on(config: ReconstructionConfig, library: AdapterLibrary) -> None:
    def lengths(texts: list[str]) -> list[int]:
        return [len(text) for text in texts]

    chosen = choose_descriptions(library, NAMES, config.data, max_tokens=60, count_tokens=lengths)
    for name, mine, other in zip(NAMES, chosen.trained, chosen.held_out, strict=True):
        assert [chosen.texts[i] for i in mine] == library.index[name]["descriptions"][:4]
        assert chosen.texts[other] == library.index[name]["descriptions"][4]


@pytest.mark.parametrize("variant", ["L", "basis"])
def test_stopped_and_resumed_is_uninterrupted(variant: str, config: ReconstructionConfig, tmp_path: Path) -> None:
    """Bit for bit, dropout included, also from a state older than the last step."""
    config = replace(
        config,
        hypernet=replace(config.hypernet, variant=variant, dropout=0.1),
        loss=ReconstructionLossConfig(factors=1.0, squares=0.5),
    )
    whole = run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", max_minutes=0.0)

    class Killed(Exception):
        pass

    def dying(line: str) -> None:
        if line.startswith("step 9 "):
            raise Killed

    with pytest.raises(Killed):
        train_reconstruction(config, tmp_path / "parts", resume=True, device="cpu", log=dying)
    parts = run(config, tmp_path / "parts", resume=True)
    assert (parts / "hypernet.safetensors").read_bytes() == (whole / "hypernet.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="is finished: 12 of 12"):
        run(config, tmp_path / "parts", resume=True)
    with pytest.raises(TrainingError, match=r"train\.max_steps was 12, is 13"):
        run(changed(config, max_steps=13), tmp_path / "parts", resume=True)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(
    config: ReconstructionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    calls = 0
    trainers = []

    def spoiled(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return factor_loss(*arguments) * (math.nan if calls == 8 else 1.0)

    class Watched(reconstruction.Trainer):
        def step(self, step: int, index_n: torch.Tensor, texts_n: torch.Tensor) -> torch.Tensor:
            trainers.append([x.clone() for x in self.parameters])
            return super().step(step, index_n, texts_n)

    monkeypatch.setattr(reconstruction_losses, "factor_loss", spoiled)
    monkeypatch.setattr(reconstruction, "Trainer", Watched)
    with pytest.raises(TrainingError, match="between steps 6 and 9 was not finite"):
        run(config, tmp_path / "run")
    before, after = trainers[7], trainers[8]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(trainers[6], before, strict=True))


# -------------------------------------------------------------------------------------------------- what is refused


def test_libraries_that_may_not_be_trained_on(config: ReconstructionConfig, spec: AdapterSpec, tmp_path: Path) -> None:
    one = stacked(spec, 1)
    save_library(tmp_path / "evaluation", one, spec, {"x": {"descriptions": ["y"]}}, purpose="evaluation")
    with pytest.raises(DataError, match="was trained for evaluation only"):
        open_library(ReconstructionDataConfig(library=str(tmp_path / "evaluation")))
    name = min(load_splits().test)
    save_library(tmp_path / "test", one, spec, {name: {"descriptions": ["y"]}})
    with pytest.raises(DataError, match="zero-shot test task"):
        run(replace(config, data=ReconstructionDataConfig(library=str(tmp_path / "test"))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, r"has no description of x \(1 of 1 adapters\)"),
        ({"descriptions": ["y" * 200]}, "No description of x fits into encoder.max_tokens"),
        ({"descriptions": "text"}, "descriptions of x must be a list of texts"),
    ],
)
def test_adapters_without_a_usable_description_are_named(
    facts: dict[str, Any], message: str, config: ReconstructionConfig, spec: AdapterSpec, tmp_path: Path
) -> None:
    save_library(tmp_path / "bare", stacked(spec, 1), spec, {"x": facts})
    with pytest.raises(DataError, match=message):
        run(replace(config, data=ReconstructionDataConfig(library=str(tmp_path / "bare"))), tmp_path / "run")


def test_settings_that_do_not_go_together(config: ReconstructionConfig) -> None:
    for change, message in (
        ({"variant": "none"}, "reads no description"),
        ({"normalize_inputs": True}, "hypernet.normalize_inputs has no place"),
        ({"pointer": ("o_proj",)}, "hypernet.pointer has no place"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(config, hypernet=replace(config.hypernet, **change))
    with pytest.raises(ConfigError, match="all weights are 0"):
        ReconstructionLossConfig(factors=0.0)
    with pytest.raises(ConfigError, match=r"loss\.squares must be at least 0"):
        ReconstructionLossConfig(squares=-1.0)


@pytest.mark.slow
def test_compiled_is_the_same(config: ReconstructionConfig, tmp_path: Path) -> None:
    """One graph for all steps, for both losses at once."""
    config = replace(
        config,
        hypernet=replace(config.hypernet, variant="S"),
        loss=ReconstructionLossConfig(factors=1.0, squares=1.0),
    )
    plain = run(config, tmp_path / "plain")
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = run(changed(config, torch_compile=True), tmp_path / "compiled")
    one, other = (
        TextToLora.from_pretrained(str(folder)).generate(["Do add, 1 times."])[0].lora for folder in (plain, compiled)
    )
    assert max((x - y).abs().max().item() for x, y in zip((*one.a, *one.b), (*other.a, *other.b), strict=True)) <= 1e-3
