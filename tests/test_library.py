"""Libraries: what goes in comes out, to PEFT and back, and what does not fit is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base, random_lora
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from t2l import peft_io
from t2l.config import LoraConfig
from t2l.errors import CheckpointError, ConfigError, OutputError, SpecMismatchError
from t2l.library import AdapterLibrary, from_peft_folders, save_library
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter

NAMES = ("sum", "reverse", "shout")


@pytest.fixture
def spec(tiny_config: LlamaConfig) -> AdapterSpec:
    return AdapterSpec.from_config(
        tiny_config,
        "tiny",
        LoraConfig(target_modules=("v_proj", "down_proj"), layers_to_transform=(0, 2), r=4, lora_alpha=6),
    )


@pytest.fixture
def lora(spec: AdapterSpec) -> LoraTensors:
    return LoraTensors.stack([random_lora(spec, seed) for seed in range(3)])


@pytest.fixture
def library(tmp_path: Path, spec: AdapterSpec, lora: LoraTensors) -> AdapterLibrary:
    facts = {name: {"descriptions": [f"Do {name} – ok."], "steps": n} for n, name in enumerate(NAMES)}
    return save_library(tmp_path / "library", lora, spec, facts)


def equal(one: LoraTensors, other: LoraTensors) -> bool:
    pairs = zip((*one.a, *one.b), (*other.a, *other.b), strict=True)
    return one.scaling == other.scaling and all(torch.equal(x, y) for x, y in pairs)


def test_what_is_saved_is_read(library: AdapterLibrary, spec: AdapterSpec, lora: LoraTensors) -> None:
    found = AdapterLibrary.open(library.folder)
    assert found == library
    assert (found.names, found.spec, found.purpose) == (NAMES, spec, "training")
    assert found.index["reverse"] == {"descriptions": ["Do reverse – ok."], "steps": 1}
    assert equal(found.stack(), lora)
    rows = torch.tensor([2, 0, 2])
    assert equal(found.stack(["shout", "sum", "shout"]), lora.select(rows))


def test_saving_twice_gives_the_same_bytes(library: AdapterLibrary, spec: AdapterSpec, tmp_path: Path) -> None:
    save_library(tmp_path / "again", library.stack(), spec, library.index)
    for name in ("adapters.safetensors", "spec.json", "index.json"):
        assert (library.folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_exported_folders_are_what_peft_reads(
    library: AdapterLibrary, tiny_config: LlamaConfig, tmp_path: Path
) -> None:
    """The logits of PeftModel are those of the library's adapter; the folders make the same library again."""
    from t2l.apply import apply_adapters

    library.export(tmp_path / "peft", ["shout", "sum"])
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == ["shout", "sum"]
    tokens = torch.randint(3, 200, (2, 9))
    base = make_base(tiny_config).double()  # so that what differs is no rounding
    singles = dict(zip(library.names, library.stack().unbind(), strict=True))
    for name in ("shout", "sum"):
        with apply_adapters(base, LoraAdapter(singles[name], library.spec, "", {})), torch.no_grad():
            ours = base(tokens).logits
        with torch.no_grad():
            peft = PeftModel.from_pretrained(make_base(tiny_config), tmp_path / "peft" / name).double()
            theirs = peft(tokens).logits
        assert (ours - theirs).abs().max() <= 1e-5
        assert (ours - base(tokens).logits).abs().max() > 0.1
    again, refused = from_peft_folders(
        [tmp_path / "peft" / name for name in ("shout", "sum")], tmp_path / "again", tiny_config, "tiny"
    )
    assert refused == {}
    assert again.names == ("shout", "sum")
    kept = {name: [str(text) for text in library.index[name].get("descriptions", ())][:1] for name in again.names}
    assert {name: about.get("descriptions", []) for name, about in again.index.items()} == kept and any(kept.values())
    # Targets come in the order of their names: PEFT saves them as a set, in no order that lasts.
    assert [t.name for t in again.spec.targets] == ["down_proj", "v_proj"]
    ours, theirs = library.stack(["shout", "sum"]), again.stack()
    assert equal(theirs, LoraTensors(ours.a[::-1], ours.b[::-1], ours.scaling))


def test_export_is_all_or_nothing(library: AdapterLibrary, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter polka; it holds 3, such as sum, reverse, shout"):
        library.export(tmp_path / "peft", ["sum", "polka"])
    assert not (tmp_path / "peft").exists()
    (tmp_path / "peft").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        library.export(tmp_path / "peft")


# ------------------------------------------------------------------------------------------- what does not fit


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / peft_io.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / peft_io.WEIGHTS)
    change(state)
    save_file(state, folder / peft_io.WEIGHTS)


def drop_layer(state: dict[str, torch.Tensor]) -> None:
    for name in [name for name in state if ".layers.2." in name and "v_proj" in name]:
        del state[name]


def drop_b(state: dict[str, torch.Tensor]) -> None:
    del state[next(name for name in state if "lora_B" in name)]


def put_nan(state: dict[str, torch.Tensor]) -> None:
    state[max(state)][0, 0] = float("nan")


def add_head(state: dict[str, torch.Tensor]) -> None:
    state["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 32)
    state["base_model.model.lm_head.lora_B.weight"] = torch.zeros(264, 4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit_config(f, base_model_name_or_path="other/base"), "for the base other/base, the library is for"),
        (lambda f: edit_weights(f, drop_layer), "but not v_proj of layer 2 (1 of 4 are missing)"),
        (lambda f: edit_weights(f, drop_b), "has only A of A and B"),
        (lambda f: edit_weights(f, put_nan), "holds NaN or infinite values"),
        (lambda f: edit_weights(f, add_head), "adapts lm_head, which is no linear module in a layer"),
        (lambda f: edit_config(f, r=8), "has rank 4 in A and 4 in B, adapter_config.json says 8"),
        (lambda f: edit_config(f, lora_alpha=32), "alpha is 32.0 against 6.0 in most of the others"),
        (lambda f: edit_config(f, use_rslora=True), "use_rslora is True against False"),
        (lambda f: edit_config(f, use_dora=True), "only plain LoRA is read"),
        (lambda f: edit_config(f, bias="all"), "only plain LoRA is read"),
        (lambda f: (f / peft_io.WEIGHTS).write_bytes(b"\x80\x04pickle"), "is a pickle"),
        (lambda f: (f / peft_io.WEIGHTS).write_bytes(b"\x10"), "is damaged"),
        (lambda f: (f / peft_io.CONFIG).unlink(), "is not a LoRA adapter"),
    ],
)
def test_a_folder_that_does_not_fit_is_named(
    spoil: Any, message: str, library: AdapterLibrary, tiny_config: LlamaConfig, tmp_path: Path
) -> None:
    """Alone refused with the whole import; on request left out and reported, the others untouched."""
    library.export(tmp_path / "peft")
    spoil(tmp_path / "peft" / "reverse")
    paths = [tmp_path / "peft" / name for name in NAMES]
    with pytest.raises(SpecMismatchError) as caught:
        from_peft_folders(paths, tmp_path / "new", tiny_config, "tiny")
    assert "1 of 3 PEFT folders do not fit into one library:\n  reverse: " in str(caught.value)
    assert message in str(caught.value)
    assert not (tmp_path / "new").exists()
    facts = {"sum": {"descriptions": ["Add."]}}
    kept, refused = from_peft_folders(paths, tmp_path / "new", tiny_config, "tiny", facts=facts, leave_out=True)
    assert kept.names == ("sum", "shout")
    assert kept.index == {"sum": {"descriptions": ["Add."]}, "shout": {"descriptions": ["Do shout – ok."]}}
    assert list(refused) == ["reverse"] and message in refused["reverse"]
    ours = library.stack(["sum", "shout"])
    assert equal(kept.stack(), LoraTensors(ours.a[::-1], ours.b[::-1], ours.scaling))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 2}, "r is 2 against 4 in most of the others"),
        ({"target_modules": ("v_proj",)}, "target_modules is v_proj against down_proj, v_proj in"),
        ({"layers_to_transform": (0, 1, 2)}, "layers_to_transform is 0-2 against 0, 2 in"),
    ],
)
def test_mixed_shapes_are_named(
    change: dict[str, Any], message: str, library: AdapterLibrary, tiny_config: LlamaConfig, tmp_path: Path
) -> None:
    library.export(tmp_path / "peft")
    values = {
        "target_modules": ("v_proj", "down_proj"),
        "layers_to_transform": (0, 2),
        "r": 4,
        "lora_alpha": 6,
    } | change
    other = AdapterSpec.from_config(tiny_config, "tiny", LoraConfig(**values))
    peft_io.save_adapter(tmp_path / "peft" / "odd", random_lora(other), other, card="")
    # The odd one comes first: the library's shape is that of most, not of the first.
    paths = [tmp_path / "peft" / name for name in ("odd", *NAMES)]
    with pytest.raises(SpecMismatchError, match=f"1 of 4 .*\n  odd: {message}"):
        from_peft_folders(paths, tmp_path / "new", tiny_config, "tiny")


def test_import_needs_distinct_folders(tmp_path: Path, tiny_config: LlamaConfig) -> None:
    with pytest.raises(ConfigError, match="several are named x"):
        from_peft_folders([tmp_path / "a" / "x", tmp_path / "b" / "x"], tmp_path / "new", tiny_config, "tiny")
    with pytest.raises(ConfigError, match="there are none"):
        from_peft_folders([], tmp_path / "new", tiny_config, "tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version is 2, this version of t2l reads 1"),
        ({"names": ["sum", "reverse"]}, "must name the same adapters"),
        ({"purpose": "fun"}, "purpose is 'fun', expected training or evaluation"),
        ({"sha256": "0"}, "the file was changed after it was written"),
    ],
)
def test_a_tampered_index_is_refused(changes: dict[str, Any], message: str, library: AdapterLibrary) -> None:
    path = library.folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        AdapterLibrary.open(library.folder)


def test_changed_tensors_are_refused(library: AdapterLibrary, tmp_path: Path) -> None:
    weights = library.folder / "adapters.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        AdapterLibrary.open(library.folder)
    shutil.rmtree(library.folder)
    with pytest.raises(CheckpointError, match="There is no folder"):
        AdapterLibrary.open(library.folder)


def test_what_cannot_be_saved_is_named(spec: AdapterSpec, lora: LoraTensors, tmp_path: Path) -> None:
    facts: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
    large = lora.map(torch.clone)
    large.b[1][1, 0, 0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"Adapter reverse \(1 of 3\) holds values in down_proj.B that are not"):
        save_library(tmp_path / "new", large, spec, facts, dtype=torch.float16)
    with pytest.raises(CheckpointError, match="'a/b' cannot name an adapter"):
        save_library(tmp_path / "new", lora, spec, {"sum": {}, "reverse": {}, "a/b": {}})
    with pytest.raises(CheckpointError, match="at least one adapter"):
        save_library(tmp_path / "new", lora, spec, {})
    with pytest.raises(SpecMismatchError, match=r"scaled by 1\.5, got .* scaled by 3"):
        save_library(tmp_path / "new", replace(lora, scaling=3.0), spec, facts)
    with pytest.raises(SpecMismatchError, match="2 adapters for tiny"):
        save_library(tmp_path / "new", lora, spec, {"sum": {}, "reverse": {}})
    assert not (tmp_path / "new").exists()
