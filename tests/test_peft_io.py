"""Adapter folders: what PEFT makes of ours, what we refuse of others', and that nothing is left half-written."""

import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base, make_config, random_lora
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from t2l.apply import apply_adapters
from t2l.config import LoraConfig
from t2l.errors import CheckpointError, OutputError, SpecMismatchError
from t2l.peft_io import load_adapter, save_adapter
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter

SPEC_CONFIGS = {
    "q,v": LoraConfig(r=4, lora_alpha=8),
    "q,v rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True),
    "all-linear": LoraConfig(target_modules=("all-linear",), r=3, lora_alpha=9),
    "all-linear rslora": LoraConfig(target_modules=("all-linear",), r=3, lora_alpha=2.5, use_rslora=True),
    "some layers": LoraConfig(
        target_modules=("v_proj", "q_proj", "down_proj"), layers_to_transform=(0, 2), r=4, lora_alpha=8
    ),
}
TOKENS = torch.tensor([[0, 17, 93, 240, 5, 66, 31]])


def make_adapter(config: Any, lora: LoraConfig, seed: int = 0, base_model: str = "tiny/base") -> LoraAdapter:
    spec = AdapterSpec.from_config(config, base_model, lora)
    return LoraAdapter(random_lora(spec, seed), spec, "Answer in verse.", {"checkpoint": "none"})


@pytest.fixture
def adapter(tiny_config: Any) -> LoraAdapter:
    return make_adapter(tiny_config, LoraConfig(r=4, lora_alpha=8))


@pytest.mark.parametrize("lora", SPEC_CONFIGS.values(), ids=SPEC_CONFIGS.keys())
def test_peft_gives_our_logits_and_our_keys(
    lora: LoraConfig, tiny_config: Any, tiny_base: LlamaForCausalLM, base_folder: Path, tmp_path: Path
) -> None:
    """PEFT must load exactly our tensors (no silently missing key) and compute what `apply_adapters` computes."""
    from peft import PeftModel, get_peft_model_state_dict

    adapter = make_adapter(tiny_config, lora, base_model=str(base_folder))
    adapter.save_pretrained(tmp_path / "adapter")
    plain = tiny_base(TOKENS).logits
    with apply_adapters(tiny_base, adapter):
        ours = tiny_base(TOKENS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing adapter keys
        model = PeftModel.from_pretrained(make_base(tiny_config), tmp_path / "adapter")
    theirs = model(TOKENS).logits
    assert (ours - plain).abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5

    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    read = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in written)


@pytest.mark.parametrize("lora", SPEC_CONFIGS.values(), ids=SPEC_CONFIGS.keys())
def test_saved_loaded_saved_is_byte_equal(lora: LoraConfig, tiny_config: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_config, lora)
    adapter.save_pretrained(tmp_path / "first")
    loaded = load_adapter(tmp_path / "first", adapter.spec)
    assert all(
        torch.equal(x, y) for x, y in zip((*loaded.a, *loaded.b), (*adapter.lora.a, *adapter.lora.b), strict=True)
    )
    LoraAdapter(loaded, adapter.spec, adapter.description, adapter.provenance).save_pretrained(tmp_path / "second")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors", "t2l.json"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_folder_that_peft_wrote_is_read(tiny_config: Any, base_folder: Path, tmp_path: Path) -> None:
    """The other direction: PEFT's own folder, with its many config keys, loads as the same adapter."""
    import peft

    adapter = make_adapter(tiny_config, LoraConfig(r=4, lora_alpha=8), base_model=str(base_folder))
    adapter.save_pretrained(tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(make_base(tiny_config), tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(tmp_path / "theirs", adapter.spec)
    assert all(
        torch.equal(x, y) for x, y in zip((*loaded.a, *loaded.b), (*adapter.lora.a, *adapter.lora.b), strict=True)
    )


@pytest.mark.parametrize("lora", SPEC_CONFIGS.values(), ids=SPEC_CONFIGS.keys())
def test_config_names_what_readers_need(lora: LoraConfig, tiny_config: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_config, lora)
    adapter.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == lora.r
    assert config["lora_alpha"] == lora.lora_alpha
    assert config["use_rslora"] is lora.use_rslora
    assert config["target_modules"] == [t.name for t in adapter.spec.targets]
    assert config["base_model_name_or_path"] == "tiny/base"
    assert config["layers_to_transform"] == (None if lora.layers_to_transform is None else [0, 2])
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "base_model: tiny/base" in card and "> Answer in verse." in card


def test_half_precision_folder_is_half_the_size_and_close(adapter: LoraAdapter, tmp_path: Path) -> None:
    adapter.save_pretrained(tmp_path / "half", dtype=torch.float16)
    loaded = load_adapter(tmp_path / "half", adapter.spec)
    for mine, read in zip((*adapter.lora.a, *adapter.lora.b), (*loaded.a, *loaded.b), strict=True):
        assert read.dtype == torch.float32
        assert torch.equal(read, mine.half().float())


# ------------------------------------------------------------------------------------------------ bad inputs


def change_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        state = load_file(path)
        change(state)
        path.unlink()  # the tensors may be views of the file
        save_file(state, path, metadata={"format": "pt"})

    return damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": [1.0]}))


def torch_pickle(path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, path)


def set_nan(state: dict[str, torch.Tensor]) -> None:
    next(iter(state.values()))[0, 0] = float("nan")


def drop_one(state: dict[str, torch.Tensor]) -> None:
    state.pop("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight")


def add_one(state: dict[str, torch.Tensor]) -> None:
    state["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"] = torch.ones(4, 32)


def add_a_whole_matrix(state: dict[str, torch.Tensor]) -> None:
    state["base_model.model.lm_head.weight"] = torch.ones(256, 32)


def to_integers(state: dict[str, torch.Tensor]) -> None:
    for name in state:
        state[name] = state[name].int()


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (truncate, CheckpointError, "damaged or not a safetensors file"),
        (cut_header, CheckpointError, "damaged or not a safetensors file"),
        (bare_pickle, CheckpointError, "is a pickle"),
        (torch_pickle, CheckpointError, "is a pickle"),
        (Path.unlink, CheckpointError, "adapter_model.safetensors is missing"),
        (change_weights(set_nan), CheckpointError, "NaN"),
        (change_weights(to_integers), CheckpointError, "only floats"),
        (change_weights(drop_one), SpecMismatchError, r"lacks .*layers\.1\.self_attn\.v_proj\.lora_B.*1 missing"),
        (change_weights(add_one), SpecMismatchError, r"unknown .*layers\.1\.mlp\.up_proj\.lora_A"),
        (change_weights(add_a_whole_matrix), SpecMismatchError, r"unknown .*lm_head\.weight"),
    ],
    ids=[
        "truncated",
        "header cut",
        "pickle",
        "torch.save",
        "absent",
        "nan",
        "integers",
        "missing key",
        "unknown key",
        "lm_head in full",
    ],
)
def test_bad_weights_are_refused(
    damage: Callable[[Path], None], error: type[Exception], match: str, adapter: LoraAdapter, tmp_path: Path
) -> None:
    # The folder's name must not be mistaken for a reason.
    folder = adapter.save_pretrained(tmp_path / "lacks-shape")
    damage(folder / "adapter_model.safetensors")
    with pytest.raises(error, match=match) as caught:
        load_adapter(folder, adapter.spec)
    assert type(caught.value) is error


def test_the_format_is_written_and_not_needed(adapter: LoraAdapter, tmp_path: Path) -> None:
    """Some readers refuse a file without `format`; some writers leave it out."""
    from safetensors import safe_open

    folder = adapter.save_pretrained(tmp_path / "adapter")
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    again = load_adapter(folder, adapter.spec)
    assert all(torch.equal(x, y) for x, y in zip(again.b, adapter.lora.b, strict=True))


@pytest.mark.parametrize("letters", [b"PK", b"\x80\x02", b"\x80\x04"])
def test_header_length_that_reads_like_a_pickle_is_no_pickle(
    letters: bytes, adapter: LoraAdapter, tmp_path: Path
) -> None:
    """A safetensors file starts with its header's length: 640 bytes of header are the first bytes of a pickle."""
    folder = adapter.save_pretrained(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    wanted = int.from_bytes(letters, "little")
    while wanted < length:
        wanted += 1 << 16
    path.write_bytes(wanted.to_bytes(8, "little") + data[8 : 8 + length].ljust(wanted) + data[8 + length :])
    assert path.read_bytes()[:2] == letters
    assert torch.equal(load_adapter(folder, adapter.spec).a[0], adapter.lora.a[0])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"r": 5}, SpecMismatchError, "r is 5, expected 4"),
        ({"lora_alpha": 16}, SpecMismatchError, "lora_alpha is 16, expected 8"),
        ({"use_rslora": True}, SpecMismatchError, "use_rslora is True, expected False"),
        ({"peft_type": "IA3"}, CheckpointError, "only 'LORA' is read"),
        ({"use_dora": True}, CheckpointError, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, CheckpointError, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, CheckpointError, "modules_to_save"),
    ],
)
def test_other_lora_settings_are_refused(
    change: dict[str, Any], error: type[Exception], match: str, adapter: LoraAdapter, tmp_path: Path
) -> None:
    """With the right shapes, another alpha or DoRA would silently give another adapter."""
    folder = adapter.save_pretrained(tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=match):
        load_adapter(folder, adapter.spec)


def test_wrong_rank_in_the_tensors_is_refused(adapter: LoraAdapter, tiny_config: Any, tmp_path: Path) -> None:
    """A config that lies about its tensors."""
    folder = adapter.save_pretrained(tmp_path / "adapter")
    other = make_adapter(tiny_config, LoraConfig(r=2, lora_alpha=8)).save_pretrained(tmp_path / "other")
    (folder / "adapter_model.safetensors").write_bytes((other / "adapter_model.safetensors").read_bytes())
    with pytest.raises(SpecMismatchError, match=r"has shape \(2, 32\), expected \(4, 32\)"):
        load_adapter(folder, adapter.spec)


def test_adapter_of_another_base_names_both_shapes(adapter: LoraAdapter, tmp_path: Path) -> None:
    wide = make_adapter(make_config(hidden_size=64), LoraConfig(r=4, lora_alpha=8), base_model="wide/base")
    folder = wide.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SpecMismatchError, match=r"does not fit tiny/base.*shape \(4, 64\), expected \(4, 32\)"):
        load_adapter(folder, adapter.spec)


# ---------------------------------------------------------------------------------------------------- output


def test_existing_folder_is_left_alone(adapter: LoraAdapter, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match=r"exists already.* pass overwrite=True$"):
        adapter.save_pretrained(tmp_path / "adapter")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["adapter", "adapter/mine.txt"]


def test_overwriting_replaces_an_adapter_and_nothing_else(adapter: LoraAdapter, tmp_path: Path) -> None:
    folder = adapter.save_pretrained(tmp_path / "adapter")
    (folder / "README.md").write_text("old")
    adapter.save_pretrained(folder, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert "old" not in (folder / "README.md").read_text().splitlines()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds other things .*\(notes.txt\); overwriting would delete them"):
        adapter.save_pretrained(folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_unwritable_place_is_a_clear_error(overwrite: bool, adapter: LoraAdapter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match=re.escape(f"Cannot write {tmp_path / 'file'}")):
        adapter.save_pretrained(tmp_path / "file" / "adapter", overwrite=overwrite)
    assert [p.name for p in tmp_path.rglob("*")] == ["file"]


def test_overwriting_a_file_is_refused(adapter: LoraAdapter, tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("a file")
    with pytest.raises(OutputError, match="is a file"):
        adapter.save_pretrained(tmp_path / "adapter", overwrite=True)
    assert (tmp_path / "adapter").read_text() == "a file"


@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_half_way_leaves_nothing(
    overwrite: bool, adapter: LoraAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up after the weights: the old folder stays, no temporary folder does."""
    if overwrite:
        adapter.save_pretrained(tmp_path / "adapter")
        before = (tmp_path / "adapter" / "adapter_config.json").read_bytes()

    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save_adapter(tmp_path / "adapter", random_lora(adapter.spec, 1), adapter.spec, card="", overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == (["adapter"] if overwrite else [])
    if overwrite:
        assert (tmp_path / "adapter" / "adapter_config.json").read_bytes() == before
