"""Bases people use, as tiny random models: what PEFT, Transformers and a merged model compute is what we compute.

For each: a generated-looking adapter on every linear module that the text model offers, written as a PEFT folder, read
by `PeftModel` and by `load_adapter` with nothing missing and nothing left over, merged into the weights, saved and read
again; all logits are those of the library's own hooks.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import SMALL, random_lora
from transformers import AutoConfig, AutoModelForCausalLM

from t2l import gguf_export
from t2l.apply import add_into, apply_adapters
from t2l.config import LoraConfig
from t2l.errors import SpecMismatchError
from t2l.peft_folder import open_adapter
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter

REPOSITORY = Path(__file__).resolve().parents[1]
CONVERTER = Path(
    os.environ.get("T2L_LLAMACPP_CONVERTER", REPOSITORY / ".venv-llamacpp" / "llama.cpp" / "convert_lora_to_gguf.py")
)
TOKENS = torch.tensor([[0, 17, 200, 33, 4, 90, 121], [0, 5, 6, 7, 8, 9, 10]])
WIDE = {"head_dim": 8, "max_position_embeddings": 128}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FULL = {"layer_types": ["full_attention"] * 3}
MIXED = {"layer_types": ["conv", "full_attention", "conv"]}

BASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": ({"tie_word_embeddings": True}, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")),
    "mistral": ({}, ("q_proj", "v_proj", "up_proj")),
    "qwen2": ({"tie_word_embeddings": True}, ("q_proj", "k_proj", "v_proj", "down_proj")),
    "qwen3": (WIDE, ("q_proj", "o_proj", "gate_proj")),
    "gemma": (WIDE, ("q_proj", "v_proj", "down_proj")),
    "gemma2": (WIDE | {"query_pre_attn_scalar": 8}, ("q_proj", "k_proj", "v_proj", "down_proj")),
    "gemma3_text": (WIDE | {"query_pre_attn_scalar": 8}, ("q_proj", "v_proj", "down_proj")),
    # A model that also reads images; its vision tower has modules of the same names.
    "gemma3": (
        {
            "text_config": SMALL | WIDE | {"query_pre_attn_scalar": 8, "model_type": "gemma3_text"},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            "mm_tokens_per_image": 4,
        },
        ("q_proj", "v_proj", "down_proj"),
    ),
    "phi3": ({}, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "smollm3": (WIDE, ("q_proj", "k_proj", "v_proj")),
    "olmo": ({}, ("q_proj", "k_proj", "v_proj", "up_proj")),
    "olmo2": ({}, ("q_proj", "k_proj", "v_proj", "up_proj")),
    "granite": ({"logits_scaling": 4.0, "residual_multiplier": 0.5}, ("q_proj", "k_proj", "down_proj")),
    "mixtral": (EXPERTS, ("q_proj", "k_proj", "o_proj")),
    "qwen3_moe": (WIDE | EXPERTS, ("q_proj", "v_proj")),
    # Its linear modules are `Conv1D`, whose weights are (I, O); queries, keys and values are one module.
    "gpt2": ({}, ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")),
    "lfm2": (FULL, ("q_proj", "k_proj", "v_proj", "self_attn.out_proj", "feed_forward.w2")),
    # The same with convolutions in the place of attention, as in the published models; what all layers have is adapted.
    "lfm2-conv": (MIXED, ("feed_forward.w1", "feed_forward.w2")),
}
"""For each type of model the settings that are its own, and the modules to adapt."""


def make_base(kind: str) -> Any:
    """A model of the tests' usual small sizes."""
    settings, _ = BASES[kind]
    if "text_config" not in settings:
        settings = SMALL | {"max_position_embeddings": 128} | settings
    config = AutoConfig.for_model(kind.removesuffix("-conv"), **settings)
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


def make_adapter(model: Any, targets: tuple[str, ...]) -> LoraAdapter:
    spec = AdapterSpec.from_config(model.config, "tiny", LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    return LoraAdapter(random_lora(spec, size=0.15), spec, "Add the two numbers.", {})


@pytest.mark.parametrize("kind", BASES)
def test_peft_transformers_and_merged_weights_agree(kind: str, tmp_path: Path) -> None:
    model = make_base(kind)
    adapter = make_adapter(model, BASES[kind][1])
    plain = logits(model)
    with apply_adapters(model, adapter):
        expected = logits(model)
    assert torch.equal(logits(model), plain)
    size = float(plain.abs().max())
    assert (expected - plain).abs().max() > 0.01 * size
    model.save_pretrained(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "adapter")

    def close(found: torch.Tensor) -> None:
        assert (found - expected).abs().max() <= 1e-4 * size

    wrapped = peft.PeftModel.from_pretrained(make_base(kind), tmp_path / "adapter")
    state = peft.load_peft_weights(tmp_path / "adapter", device="cpu")
    result = peft.set_peft_model_state_dict(wrapped, state)
    assert not result.unexpected_keys and not [name for name in result.missing_keys if "lora_" in name]
    modules = sum("lora_A.default.weight" in name for name, _ in wrapped.named_parameters())
    assert modules == len(adapter.spec.targets) * 3
    close(logits(wrapped))

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.load_adapter(str(tmp_path / "adapter"))
    close(logits(loaded.eval()))

    assert add_into(model, adapter) == modules
    close(logits(model))
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    close(logits(again.eval()))


@pytest.mark.parametrize("kind", BASES)
def test_a_folder_tells_its_shape(kind: str, tmp_path: Path) -> None:
    model = make_base(kind)
    adapter = make_adapter(model, BASES[kind][1])
    model.config.save_pretrained(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "adapter")
    lora, spec = open_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert {t.path for t in spec.targets} == {t.path for t in adapter.spec.targets}
    with apply_adapters(model, adapter):
        expected = logits(model)
    with apply_adapters(model, LoraAdapter(lora, spec, "", {})):
        torch.testing.assert_close(logits(model), expected)


def test_a_folder_that_peft_wrote_for_gpt2(tmp_path: Path) -> None:
    """PEFT notes that the weights are transposed, which changes nothing about A and B."""
    model = make_base("gpt2")
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = LoraAdapter.from_pretrained(tmp_path / "adapter")
    with apply_adapters(model, adapter):
        torch.testing.assert_close(logits(model), logits(wrapped))


@pytest.mark.parametrize("kind", [kind for kind in BASES if kind in gguf_export.ARCHITECTURES])
def test_every_module_has_a_name_in_llamacpp(kind: str) -> None:
    pytest.importorskip("gguf")
    model = make_base(kind)
    adapter = make_adapter(model, BASES[kind][1])
    tensors = gguf_export.gguf_tensors(adapter.lora, adapter.spec, model.config)
    assert len(tensors) == 2 * 3 * len(adapter.spec.targets)
    assert all(name.startswith("blk.") for name in tensors)


@pytest.mark.slow
@pytest.mark.skipif(
    not CONVERTER.is_file(), reason=f"llama.cpp's converter is not there ({CONVERTER}): make test-llamacpp"
)
@pytest.mark.parametrize("kind", [kind for kind in BASES if kind in gguf_export.ARCHITECTURES and kind != "gpt2"])
def test_llamacpps_own_converter_writes_the_same(kind: str, tmp_path: Path) -> None:
    """From the PEFT folder, to the bit; it reads no rsLoRA, so the adapter has none.

    For GPT-2 it transposes A and B like the base's weights, which are the other way round, and llama.cpp refuses the
    file; what we write for GPT-2 is compared with Transformers in `test_gguf_export`.
    """
    gguf = pytest.importorskip("gguf")
    model = make_base(kind)
    adapter = make_adapter(model, BASES[kind][1])
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "adapter")
    command = [sys.executable, str(CONVERTER), str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]
    command += ["--outfile", str(tmp_path / "theirs.gguf"), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    gguf_export.save_gguf(tmp_path / "ours.gguf", adapter.lora, adapter.spec, model.config)
    theirs, ours = (gguf.GGUFReader(tmp_path / name) for name in ("theirs.gguf", "ours.gguf"))
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.fields[key].contents() == theirs.fields[key].contents()
    expected = {tensor.name: tensor.data for tensor in theirs.tensors}
    found = {tensor.name: tensor.data for tensor in ours.tensors}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_layers_left_open_are_those_that_have_the_modules(tmp_path: Path) -> None:
    config = make_base("lfm2-conv").config
    for targets, layers in (((), (1,)), (("in_proj",), (0, 2)), (("feed_forward.w1",), (0, 1, 2))):
        spec = AdapterSpec.from_config(config, "tiny", LoraConfig(target_modules=targets))
        assert spec.layers == layers
    assert [t.name for t in AdapterSpec.from_config(config, "tiny").targets] == ["q_proj", "v_proj"]
    with pytest.raises(SpecMismatchError, match="differs from layer to layer"):
        AdapterSpec.from_config(config, "tiny", LoraConfig(target_modules=("q_proj", "in_proj")))
    LoraAdapter(random_lora(spec), spec, "", {}).save_pretrained(tmp_path / "adapter")
    config.save_pretrained(tmp_path / "base")
    assert open_adapter(tmp_path / "adapter", str(tmp_path / "base"))[1].layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("kind", "target", "real"),
    [("phi3", "q_proj", "qkv_proj"), ("phi3", "gate_proj", "gate_up_proj"), ("mixtral", "w1", "q_proj")],
)
def test_modules_that_are_not_there_are_told_with_those_that_are(kind: str, target: str, real: str) -> None:
    with pytest.raises(SpecMismatchError, match=f"has no linear module '{target}'.*{real}"):
        make_adapter(make_base(kind), (target,))
