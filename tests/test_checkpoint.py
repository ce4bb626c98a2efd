"""Checkpoint folders: what was saved is what is loaded, and anything else is refused with a reason."""

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_hypernet
from safetensors.torch import load_file, save_file

from t2l.checkpoint import CheckpointConfig, load_checkpoint, read_config, save_checkpoint
from t2l.config import EncoderConfig, HypernetConfig, LoraConfig, PromptConfig
from t2l.errors import CheckpointError, ConfigError, OutputError, T2LError
from t2l.hypernet import Hypernet
from t2l.io import sha256
from t2l.spec import AdapterSpec

SIZES: dict[str, Any] = {"width": 24, "head_size": 16, "token_blocks": 2, "attention_heads": 4}
WEIGHTS = "hypernet.safetensors"


@pytest.fixture(scope="module")
def spec(tiny_config: Any) -> AdapterSpec:
    return AdapterSpec.from_config(tiny_config, "tiny/base", LoraConfig(r=4, lora_alpha=8, layers_to_transform=(0, 2)))


def make(spec: AdapterSpec, kind: str = "sentence", variant: str = "L", **changes: Any) -> tuple[Hypernet, Any]:
    # Without gradients, as a loaded one: torch picks another matrix kernel for weights that require them.
    hypernet = make_hypernet(spec, kind=kind, variant=variant, **changes).requires_grad_(False)
    config = CheckpointConfig.current(
        {"seed": 7, "nested": {"steps": [1, 2]}},
        embedding_size=32,
        encoder=EncoderConfig(kind="sentence", model="x/y")
        if kind == "sentence"
        else EncoderConfig(kind="tokens", layers=(2,), max_tokens=64),
        encoder_revision="sha256:0",
        hypernet=HypernetConfig(variant=variant, **SIZES, **changes),
        prompt=PromptConfig(description_in_prompt=True),
    )
    return hypernet, config


def write(hypernet: Hypernet, kind: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(*((2, 32) if kind == "sentence" else (2, 5, 32)), generator=generator)
    with torch.no_grad():
        lora = hypernet(states, None if kind == "sentence" else torch.ones(2, 5, dtype=torch.bool))
    return (*lora.a, *lora.b)


@pytest.fixture
def folder(spec: AdapterSpec, tmp_path: Path) -> Path:
    """A sound checkpoint to damage."""
    hypernet, config = make(spec)
    save_checkpoint(tmp_path / "checkpoint", hypernet, spec, config, card="A card.\n", dtype=torch.float32)
    return tmp_path / "checkpoint"


# ------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("changes", [{}, {"freeze_a": True, "output_std": True}], ids=["AB", "B"])
@pytest.mark.parametrize("kind", ["sentence", "tokens"])
@pytest.mark.parametrize("variant", ["L", "M", "S", "basis", "none"])
def test_same_adapters_after_saving(
    variant: str, kind: str, changes: dict[str, Any], spec: AdapterSpec, tmp_path: Path
) -> None:
    """Bit for bit in float32; in float16 the adapters of the rounded weights."""
    hypernet, config = make(spec, kind, variant, **changes)
    before = write(hypernet, kind)
    save_checkpoint(tmp_path / "full", hypernet, spec, config, dtype=torch.float32)
    save_checkpoint(tmp_path / "half", hypernet, spec, config)
    full, half = load_checkpoint(tmp_path / "full"), load_checkpoint(tmp_path / "half")
    assert all(torch.equal(x, y) for x, y in zip(write(full.hypernet, kind), before, strict=True))
    for x, y in zip(write(half.hypernet, kind), before, strict=True):
        assert (x - y).abs().max() <= 5e-3 * y.abs().max()
    rounded = {name: value.half().float() for name, value in hypernet.state_dict().items()}
    assert all(torch.equal(value, rounded[name]) for name, value in half.hypernet.state_dict().items())
    for loaded in (full, half):
        assert loaded.spec == spec
        assert loaded.config == replace(config, weights_sha256=loaded.config.weights_sha256)
        assert not loaded.hypernet.training
        assert not any(p.requires_grad for p in loaded.hypernet.parameters())


def test_saved_loaded_saved_is_byte_equal(folder: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(folder)
    again = tmp_path / "again"
    save_checkpoint(again, loaded.hypernet, loaded.spec, loaded.config, card="A card.\n", dtype=torch.float32)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "config.json", WEIGHTS, "spec.json"]
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_settings_are_read_without_weights(folder: Path, spec: AdapterSpec) -> None:
    (folder / WEIGHTS).unlink()
    assert read_config(folder)[0] == spec
    assert read_config(folder)[1].training == {"seed": 7, "nested": {"steps": [1, 2]}}


# ------------------------------------------------------------------------------------------------- strictness


def resign(folder: Path) -> None:
    """Makes the checksum right again, so that only the check under test can find the change."""
    change_config(weights_sha256=sha256(folder / WEIGHTS))(folder)


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any], *, sign: bool = True) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        (folder / WEIGHTS).unlink()  # the tensors may be views of the file
        save_file(state, folder / WEIGHTS)
        if sign:
            resign(folder)

    return damage


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
    resign(folder)


def flip_byte(folder: Path) -> None:
    """The lowest bit of the last float: finite, of the right shape, and wrong."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-4] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def bare_pickle(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({"weight": [1.0]}))
    resign(folder)


def torch_pickle(folder: Path) -> None:
    torch.save({"weight": torch.ones(2)}, folder / WEIGHTS)
    resign(folder)


def set_value(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["head.write.0.weight"][0, 0] = value

    return change


def transpose_one(state: dict[str, torch.Tensor]) -> None:
    state["head.write.0.weight"] = state["head.write.0.weight"].T.contiguous()


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write_file(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


DAMAGE: dict[str, tuple[Callable[[Path], None], type[T2LError], str]] = {
    "missing tensor": (
        change_weights(lambda s: s.pop("shared_lora.a.0")),
        CheckpointError,
        r"lacks shared_lora\.a\.0 \(1 miss",
    ),
    "extra tensor": (
        change_weights(lambda s: s.update(extra=torch.ones(1))),
        CheckpointError,
        r"has unknown extra \(0 missing, 1 unknown",
    ),
    "wrong shape": (
        change_weights(transpose_one),
        CheckpointError,
        r"head\.write\.0\.weight has shape \(16, 256\), expected \(256, 16\)",
    ),
    "integers": (
        change_weights(lambda s: s.update({"shared_lora.a.0": s["shared_lora.a.0"].int()})),
        CheckpointError,
        "type I32; only floats",
    ),
    "truncated": (truncate, CheckpointError, "damaged or not a safetensors file"),
    "flipped byte": (flip_byte, CheckpointError, "has sha256 .* was changed after it was written"),
    "swapped weights": (change_weights(set_value(0.5), sign=False), CheckpointError, "has sha256"),
    "pickle": (bare_pickle, CheckpointError, "is a pickle"),
    "torch.save": (torch_pickle, CheckpointError, "is a pickle"),
    "nan": (change_weights(set_value(float("nan"))), CheckpointError, "holds NaN or infinite"),
    "infinite": (change_weights(set_value(float("inf"))), CheckpointError, "holds NaN or infinite"),
    "unknown key": (
        change_config(embeding_size=3),
        ConfigError,
        "embeding_size: unknown key; did you mean 'embedding_",
    ),
    "wrong type": (change_config(embedding_size="32"), ConfigError, "embedding_size: expected int, got '32'"),
    "newer format": (change_config(format_version=3), CheckpointError, "format_version is 3, .* reads 2; update t2l"),
    "no format": (change_config(format_version=None), CheckpointError, "format_version is None"),
    "other sizes": (change_config(embedding_size=33), CheckpointError, r"shape \(12, 32\), expected \(12, 33\)"),
    "no weights": (remove(WEIGHTS), CheckpointError, "hypernet.safetensors is missing"),
    "no config": (remove("config.json"), CheckpointError, "config.json is missing"),
    "no spec": (remove("spec.json"), CheckpointError, "spec.json is missing"),
    "config is a list": (write_file("config.json", "[]"), CheckpointError, "must hold a JSON object, got list"),
    "config is cut": (write_file("config.json", '{"format_version": 1'), CheckpointError, "cannot be read as JSON"),
    "spec is cut": (write_file("spec.json", "{"), CheckpointError, "spec.json cannot be read as JSON"),
}


@pytest.mark.parametrize(("damage", "error", "match"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found(damage: Callable[[Path], None], error: type[T2LError], match: str, folder: Path) -> None:
    load_checkpoint(folder)
    damage(folder)
    with pytest.raises(error, match=match):
        load_checkpoint(folder)


def test_every_problem_of_a_config_is_told_at_once(folder: Path) -> None:
    path = folder / "config.json"
    plain = json.loads(path.read_text())
    plain["hypernet"]["variant"] = "XL"
    plain["encoder"]["max_token"] = 3
    path.write_text(json.dumps(plain))
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(folder)
    assert re.search("expected one of L, M, S, .* got 'XL'", str(caught.value))
    assert "did you mean 'max_tokens'" in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no folder"):
        load_checkpoint(tmp_path / "absent")


# ----------------------------------------------------------------------------------------------------- output


def test_value_beyond_half_precision_is_refused(spec: AdapterSpec, tmp_path: Path) -> None:
    """65,504 is float16's largest: silently infinite weights would only show when the checkpoint is used."""
    hypernet, config = make(spec)
    with torch.no_grad():
        hypernet.head.write[0].weight[0, 0] = 70_000
    with pytest.raises(CheckpointError, match=r"head\.write\.0\.weight is not finite in torch\.float16"):
        save_checkpoint(tmp_path / "checkpoint", hypernet, spec, config)
    assert not any(tmp_path.iterdir())
    save_checkpoint(tmp_path / "checkpoint", hypernet, spec, config, dtype=torch.float32)
    assert load_checkpoint(tmp_path / "checkpoint").hypernet.head.write[0].weight[0, 0] == 70_000


def test_existing_and_unwritable_targets_stay_as_they_are(folder: Path, spec: AdapterSpec) -> None:
    hypernet, config = make(spec)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputError, match="exists already"):
        save_checkpoint(folder, hypernet, spec, config)
    inside_a_file = folder / "README.md" / "checkpoint"
    with pytest.raises(OutputError, match=re.escape(f"Cannot write {inside_a_file}")):
        save_checkpoint(inside_a_file, hypernet, spec, config)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_failure_half_way_keeps_the_old_checkpoint(
    folder: Path, spec: AdapterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    hypernet, config = make(spec, variant="S")
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left"):
        save_checkpoint(folder, hypernet, spec, config, overwrite=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_overwrite_replaces_all(folder: Path, spec: AdapterSpec) -> None:
    (folder / "stray.txt").write_text("old")
    hypernet, config = make(spec, variant="S")
    save_checkpoint(folder, hypernet, spec, config, overwrite=True)
    assert load_checkpoint(folder).config.hypernet.variant == "S"
    assert not (folder / "stray.txt").exists()
    assert list(folder.parent.iterdir()) == [folder]
