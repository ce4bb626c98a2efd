"""Bases people use, trained on: a hypernetwork learns, the base stays as it is, and half precision is kept.

For each: a short training on the frozen base, whose checkpoint then writes an adapter that PEFT and the merged model
read alike; in bfloat16 and float16 hooks, PEFT, merged weights and a saved model agree, and losses have gradients.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from sft_helpers import metrics, quiet
from test_bases import BASES, logits, make_adapter, make_base
from test_loss import packed_rows
from transformers import AutoModelForCausalLM

from t2l.apply import apply_adapters, hooked
from t2l.config import PromptConfig
from t2l.text_to_lora import TextToLora
from t2l.train import sft
from t2l.train.config import SftConfig
from t2l.train.loss import answer_losses
from t2l.train.tune import TuneConfig, tune

HALVES = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Types, and how far apart two ways to compute the same may be: some steps of rounding, of the largest logit."""


def half_base(kind: str, dtype: torch.dtype) -> Any:
    """The base with its weights in a type, as it is loaded: what is not a weight stays in float32."""
    whole = make_base(kind)
    base = AutoModelForCausalLM.from_config(whole.config, attn_implementation="eager", dtype=dtype).eval()
    base.load_state_dict(whole.state_dict())
    return base.requires_grad_(False)


@pytest.mark.parametrize("kind", BASES)
def test_a_hypernetwork_learns_on_the_frozen_base(
    kind: str, sft_config: SftConfig, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(kind)
    before = {name: x.clone() for name, x in base.state_dict().items()}
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(sft, "load_base", lambda *_: base)
    lora = replace(sft_config.lora, target_modules=BASES[kind][1])
    config = replace(sft_config, base=str(tmp_path / "base"), lora=lora)
    checkpoint = sft.train(config, tmp_path / "run", log=quiet)
    losses = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert len(losses) == 6 and losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(x, before[name]) for name, x in base.state_dict().items())

    plain = logits(base)
    (adapter,) = TextToLora.from_pretrained(checkpoint, base=(base, tiny_tokenizer)).generate(["Say yes."])
    with apply_adapters(base, adapter):
        expected = logits(base)
    close = 1e-4 * float(plain.abs().max())
    assert (expected - plain).abs().max() > 10 * close
    adapter.save_pretrained(tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(make_base(kind), tmp_path / "adapter")
    assert (logits(wrapped) - expected).abs().max() <= close
    adapter.merge_into(base)
    assert (logits(base) - expected).abs().max() <= close


@pytest.mark.parametrize("kind", ["gpt2", "lfm2-conv", "gemma3", "phi3"])
def test_an_adapter_is_tuned_on_the_frozen_base(kind: str, tiny_tokenizer: Any) -> None:
    """What is tuned once more begins with the loss at which it ended."""
    base = make_base(kind)
    before = {name: x.clone() for name, x in base.state_dict().items()}
    examples = [(f"number {n}", "even" if n % 2 == 0 else "odd") for n in range(8)]
    config = TuneConfig(learning_rate=3e-2, max_epochs=4, held_out=0.5)
    adapter, both = make_adapter(base, BASES[kind][1]), (base, tiny_tokenizer)
    tuned = tune(adapter, both, examples, prompt=PromptConfig(), config=config)
    again = tune(tuned.adapter, both, examples, prompt=PromptConfig(), config=config)
    assert min(tuned.held_out_losses) < 0.9 * tuned.held_out_losses[0]
    assert again.held_out_losses[0] == pytest.approx(min(tuned.held_out_losses), rel=1e-4)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in base.state_dict().items())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_half_precision(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = make_base(kind)
    adapter = make_adapter(whole, BASES[kind][1])
    with apply_adapters(whole, adapter):
        exact = logits(whole)
    base = half_base(kind, dtype)
    plain = logits(base)
    with apply_adapters(base, adapter):
        found = logits(base)
    assert found.dtype == dtype and torch.equal(logits(base), plain)
    # Rounding can send a token to other experts, so a median says what a largest difference would not.
    assert (plain.float() - exact).abs().median() > 4 * (found.float() - exact).abs().median()

    adapter.save_pretrained(tmp_path / "adapter", dtype=dtype)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False)
    assert (logits(wrapped).float() - found.float()).abs().max() <= HALVES[dtype] * exact.abs().max()
    base = wrapped.unload()

    paths = [target.path.format(layer=2) for target in adapter.spec.targets]
    changes = [adapter.lora.delta(m)[2] for m in range(len(paths))]
    changes = [x.mT if adapter.spec.fan_in_fan_out else x for x in changes]
    sums = [base.get_submodule(p).weight.float() + x for p, x in zip(paths, changes, strict=True)]
    assert adapter.merge_into(base) == 3 * len(paths) and {p.dtype for p in base.parameters()} == {dtype}
    assert all(torch.equal(base.get_submodule(p).weight, x.to(dtype)) for p, x in zip(paths, sums, strict=True))
    base.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager", dtype="auto")
    assert torch.equal(logits(again.eval()), logits(base))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_losses_on_a_base_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    """As a GPU trains: the base in half precision, the adapter's numbers in float32."""
    found = []
    for each in (torch.float32, dtype):
        base = half_base(kind, each)
        lora = make_adapter(base, BASES[kind][1]).lora.map(lambda x: x.detach().requires_grad_())
        with (
            hooked(base, make_adapter(base, BASES[kind][1]).spec) as slots,
            torch.autocast("cpu", each, enabled=each != torch.float32),
        ):
            losses = answer_losses(base, slots)(packed_rows(), lora.map(lambda x: x.expand(2, *x.shape))).losses
        loss = losses.mean()
        gradients = torch.autograd.grad(loss, (*lora.a, *lora.b))
        found.append((float(loss.detach()), torch.cat([x.flatten() for x in gradients])))
    (loss, gradient), (half_loss, half_gradient) = found
    assert half_loss == pytest.approx(loss, rel=0.03)
    assert torch.cosine_similarity(gradient, half_gradient, dim=0) > 0.85


@pytest.mark.parametrize("kind", BASES)
def test_training_sees_the_base_that_answers(kind: str) -> None:
    """A base that is turned into bfloat16 for training is the one that is loaded in bfloat16, to the bit."""
    base = make_base(kind)
    sft.to_bfloat16(base)
    assert base.dtype == torch.bfloat16
    assert torch.equal(logits(base), logits(half_base(kind, torch.bfloat16)))
