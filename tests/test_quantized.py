"""Bases in 4 and 8 bits: adapters on them are what PEFT makes of them, and nothing is merged into such weights.

They need bitsandbytes or torchao, which nothing else here does (`pip install bitsandbytes torchao`), and skip without.
"""

import importlib
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import make_base, make_config, make_tokenizer, random_lora

from t2l.apply import add_into, apply_adapters
from t2l.config import LoraConfig, PromptConfig
from t2l.errors import SpecMismatchError
from t2l.eval import decode
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter
from t2l.train.tune import TuneConfig, tune

TOKENS = torch.tensor([[0, 17, 200, 33, 4], [0, 5, 6, 7, 8]])
KINDS = {
    "nf4": ("bitsandbytes", "BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "fp4": ("bitsandbytes", "BitsAndBytesConfig", {"load_in_4bit": True}),
    # By default a column that is large in one sequence is computed in another way for all sequences of the batch.
    "int8": ("bitsandbytes", "BitsAndBytesConfig", {"load_in_8bit": True, "llm_int8_threshold": 0.0}),
    "torchao-int8": ("torchao", "TorchAoConfig", "Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": ("torchao", "TorchAoConfig", "Int8DynamicActivationInt8WeightConfig"),
}
pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's packages


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    package, name, options = KINDS[request.param]
    pytest.importorskip(package, reason=f"{package} is not installed")
    if isinstance(options, str):
        options = {"quant_type": getattr(importlib.import_module("torchao.quantization"), options)()}
    make_base(make_config(hidden_size=64, intermediate_size=64)).save_pretrained(tmp_path / "base")
    return transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=getattr(transformers, name)(**options), dtype=torch.float32
    ).eval()


def make_adapter(model: Any, seed: int = 0) -> LoraAdapter:
    spec = AdapterSpec.from_config(model.config, "tiny", LoraConfig(r=4, lora_alpha=8))
    return LoraAdapter(random_lora(spec, seed=seed), spec, "Say even or odd.", {})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


def test_adapters_are_those_of_peft(base: Any, tmp_path: Path) -> None:
    one, other = make_adapter(base), make_adapter(base, seed=1)
    plain = logits(base)
    weight = base.model.layers[0].self_attn.q_proj.weight
    assert weight.element_size() == 1 or type(weight) is not torch.nn.Parameter
    with apply_adapters(base, one):
        alone = logits(base)
    with apply_adapters(base, [one, other]):
        torch.testing.assert_close(logits(base)[0], alone[0], rtol=0.02, atol=0.02)
    assert torch.equal(logits(base), plain) and (alone - plain).abs().max() > 0.1 * plain.abs().max()
    (first, second) = decode.greedy(base, make_tokenizer(), TOKENS.tolist(), [one, other], max_new_tokens=4)
    assert first != second
    one.save_pretrained(tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(wrapped), alone, rtol=1e-4, atol=1e-4)


def test_tuning_leaves_the_base_as_it_was(base: Any, request: pytest.FixtureRequest) -> None:
    if "dynamic" in request.node.name:
        pytest.skip("torchao has no gradients through activations that it quantises")
    examples = [(f"number {n}", "even" if n % 2 == 0 else "odd") for n in range(8)]
    plain = logits(base)
    config = TuneConfig(max_epochs=2, learning_rate=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tune(make_adapter(base), (base, make_tokenizer()), examples, prompt=PromptConfig(), config=config)
    assert len(found.held_out_losses) == 3
    assert torch.equal(logits(base), plain)


def test_nothing_is_merged_into_it(base: Any) -> None:
    before = logits(base)
    with pytest.raises(SpecMismatchError, match=r"is quantised or not in memory .* load the base in a floating type"):
        add_into(base, make_adapter(base))
    assert torch.equal(logits(base), before)
