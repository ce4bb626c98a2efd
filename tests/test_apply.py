"""Adapters on a live model: exact, per sample, and gone without a trace afterwards."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import SMALL, make_base, make_config, random_lora
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from t2l.apply import apply_adapters, compiled, hooked
from t2l.config import LoraConfig
from t2l.errors import AdapterNotAppliedError, SpecMismatchError
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter

TOKENS = torch.tensor([[0, 17, 93, 240, 5], [0, 8, 200, 41, 12], [0, 99, 98, 97, 96], [0, 50, 150, 250, 7]])


def make_adapter(config: Any, seed: int = 0, **lora: Any) -> LoraAdapter:
    spec = AdapterSpec.from_config(config, "tiny/base", LoraConfig(**({"r": 4, "lora_alpha": 8} | lora)))
    return LoraAdapter(random_lora(spec, seed), spec, "x", {})


@pytest.fixture(scope="module")
def adapters(tiny_config: Any) -> list[LoraAdapter]:
    return [make_adapter(tiny_config, seed) for seed in range(4)]


def hooks(model: nn.Module) -> int:
    """Ours; Transformers leaves its own on a model that was once asked for hidden states."""
    found = (hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return sum(hook.__module__ == "t2l.apply" for hook in found)


def logits(model: LlamaForCausalLM, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(tokens).logits


@pytest.mark.parametrize(
    "lora",
    [{}, {"target_modules": ("all-linear",)}, {"layers_to_transform": (1,)}, {"use_rslora": True}],
    ids=["q,v", "all-linear", "one layer", "rslora"],
)
def test_equals_weights_with_the_update_merged_in(
    lora: dict[str, Any], tiny_config: Any, tiny_base: LlamaForCausalLM
) -> None:
    """The hook computes what W + scaling B A computes, at the right module and layer."""
    adapter = make_adapter(tiny_config, **lora)
    merged = make_base(tiny_config)
    for m, target in enumerate(adapter.spec.targets):
        for position, layer in enumerate(adapter.spec.layers):
            merged.get_submodule(target.path.format(layer=layer)).weight.add_(adapter.lora.delta(m)[position])
    with apply_adapters(tiny_base, adapter) as model:
        assert model is tiny_base
        ours = logits(tiny_base)
    assert (ours - logits(merged)).abs().max() <= 1e-4
    assert (ours - logits(tiny_base)).abs().max() > 0.1


def test_one_adapter_serves_a_whole_batch(adapters: list[LoraAdapter], tiny_base: LlamaForCausalLM) -> None:
    with apply_adapters(tiny_base, adapters[0]):
        together = logits(tiny_base)
        for n in range(len(TOKENS)):
            assert (together[n] - logits(tiny_base, TOKENS[n : n + 1])[0]).abs().max() <= 1e-5
    with apply_adapters(tiny_base, [adapters[0]]):
        assert torch.equal(logits(tiny_base), together)


def test_per_sample_adapters_equal_each_alone(adapters: list[LoraAdapter], tiny_base: LlamaForCausalLM) -> None:
    with apply_adapters(tiny_base, adapters):
        together = logits(tiny_base)
    for n, adapter in enumerate(adapters):
        with apply_adapters(tiny_base, adapter):
            alone = logits(tiny_base, TOKENS[n : n + 1])[0]
            next_one = logits(tiny_base, TOKENS[n - 1 : n] if n else TOKENS[-1:])[0]
        assert (together[n] - alone).abs().max() <= 1e-5
        assert (together[n - 1] - next_one).abs().max() > 0.1


@pytest.mark.parametrize("chosen", [1, 2])
def test_rows_say_which_sequence_uses_which(
    chosen: int, adapters: list[LoraAdapter], tiny_base: LlamaForCausalLM
) -> None:
    rows = [chosen - 1, 0, 0, chosen - 1]
    with apply_adapters(tiny_base, adapters[:chosen], rows=rows):
        together = logits(tiny_base)
    for n, row in enumerate(rows):
        with apply_adapters(tiny_base, adapters[row]):
            alone = logits(tiny_base, TOKENS[n : n + 1])[0]
        # Of the largest logit: how far float32 sums of other orders differ depends on the processor.
        assert (together[n] - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_one_order_of_targets_is_not_taken_for_another(tiny_config: Any, tiny_base: LlamaForCausalLM) -> None:
    """As of a new adapter beside one from a folder; modules of one size would change places without a word."""
    orders = (("q_proj", "o_proj"), ("o_proj", "q_proj"))
    adapters = [make_adapter(tiny_config, seed, target_modules=names) for seed, names in enumerate(orders)]
    with apply_adapters(tiny_base, adapters, rows=[0, 1, 0, 1]):
        together = logits(tiny_base)
    for n, adapter in enumerate(adapters * 2):
        with apply_adapters(tiny_base, adapter):
            alone = logits(tiny_base, TOKENS[n : n + 1])[0]
        assert (together[n] - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_row_without_an_adapter_is_refused(adapters: list[LoraAdapter], tiny_base: LlamaForCausalLM) -> None:
    for row in (2, -1):
        with (
            pytest.raises(AdapterNotAppliedError, match=f"row {row}.*2 adapters"),
            apply_adapters(tiny_base, adapters[:2], rows=[0, row]),
        ):
            pass
    assert hooks(tiny_base) == 0


def test_exception_leaves_the_model_as_it_was(adapters: list[LoraAdapter], tiny_base: LlamaForCausalLM) -> None:
    plain = logits(tiny_base)
    weights = {name: value.clone() for name, value in tiny_base.state_dict().items()}
    with pytest.raises(ZeroDivisionError), apply_adapters(tiny_base, adapters):
        assert hooks(tiny_base) == 6
        assert not torch.equal(logits(tiny_base), plain)
        _ = 1 / 0
    assert hooks(tiny_base) == 0
    assert torch.equal(logits(tiny_base), plain)
    assert all(torch.equal(value, weights[name]) for name, value in tiny_base.state_dict().items())


def test_nested_use_adds_and_restores(adapters: list[LoraAdapter], tiny_base: LlamaForCausalLM) -> None:
    """Inside, both act (as PEFT's weighted sum would); leaving the inner block brings back the outer one alone."""
    one, other = adapters[:2]
    both = LoraAdapter(
        LoraTensors(
            tuple(torch.cat([x, y], dim=-2) for x, y in zip(one.lora.a, other.lora.a, strict=True)),
            tuple(torch.cat([x, y], dim=-1) for x, y in zip(one.lora.b, other.lora.b, strict=True)),
            one.lora.scaling,
        ),
        replace(one.spec, rank=8, alpha=16),
        "both",
        {},
    )
    plain = logits(tiny_base)
    with apply_adapters(tiny_base, both):
        sum_of_both = logits(tiny_base)
    with apply_adapters(tiny_base, one):
        outer = logits(tiny_base)
        with apply_adapters(tiny_base, other):
            assert (logits(tiny_base) - sum_of_both).abs().max() <= 1e-4
        assert torch.equal(logits(tiny_base), outer)
    assert torch.equal(logits(tiny_base), plain)


def test_another_batch_size_names_both_numbers(adapters: list[LoraAdapter], tiny_base: LlamaForCausalLM) -> None:
    plain = logits(tiny_base)
    message = "3 adapters for a batch of 4 sequences"
    with pytest.raises(AdapterNotAppliedError, match=message), apply_adapters(tiny_base, adapters[:3]):
        logits(tiny_base)
    assert torch.equal(logits(tiny_base), plain)


def test_no_adapter_is_refused(tiny_base: LlamaForCausalLM) -> None:
    with pytest.raises(AdapterNotAppliedError, match="at least one"), apply_adapters(tiny_base, []):
        pass


def test_adapter_of_another_base_names_both(adapters: list[LoraAdapter], tiny_config: Any) -> None:
    wide = make_base(make_config(hidden_size=64))
    message = r"tiny/base.*q_proj is 32 x 32 .*this model's is 64 x 64"
    with pytest.raises(SpecMismatchError, match=message), apply_adapters(wide, adapters[0]):
        pass
    shallow = make_base(make_config(num_hidden_layers=2))
    message = r"tiny/base \(3 layers\).*layers\.2\..*this model \(2 layers\)"
    with pytest.raises(SpecMismatchError, match=message), apply_adapters(shallow, adapters[0]):
        pass
    assert hooks(wide) == hooks(shallow) == 0


def test_adapters_of_different_shape_do_not_mix(
    adapters: list[LoraAdapter], tiny_config: Any, tiny_base: LlamaForCausalLM
) -> None:
    for lora, match in (({"r": 2}, "rank 4.*with 2"), ({"lora_alpha": 16}, r"scaling 2\.0.*with 4\.0")):
        both = [adapters[0], make_adapter(tiny_config, **lora)]
        with pytest.raises(SpecMismatchError, match=match), apply_adapters(tiny_base, both):
            pass
    assert hooks(tiny_base) == 0


def test_greedy_generation_with_cache_equals_each_alone(
    adapters: list[LoraAdapter], tiny_base: LlamaForCausalLM
) -> None:
    """With a KV cache every step is a forward pass of one token, and each must meet its own adapter."""
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    mask = torch.ones_like(TOKENS)
    with apply_adapters(tiny_base, adapters):
        together = tiny_base.generate(TOKENS, attention_mask=mask, **settings)
    assert together.shape == (4, 17)
    plain = tiny_base.generate(TOKENS, attention_mask=mask, **settings)
    for n, adapter in enumerate(adapters):
        with apply_adapters(tiny_base, adapter):
            alone = tiny_base.generate(TOKENS[n : n + 1], attention_mask=mask[:1], **settings)
            # Greedy without a cache, one whole forward pass a token.
            slow = TOKENS[n : n + 1]
            for _ in range(12):
                slow = torch.cat([slow, logits(tiny_base, slow)[:, -1:].argmax(-1)], dim=1)
        assert together[n].tolist() == alone[0].tolist() == slow[0].tolist()
        assert together[n].tolist() != plain[n].tolist()


def test_gradient_reaches_the_adapter_and_only_it(adapters: list[LoraAdapter], tiny_base: LlamaForCausalLM) -> None:
    lora = LoraTensors.stack([x.lora for x in adapters]).map(lambda x: x.clone().requires_grad_())
    with hooked(tiny_base, adapters[0].spec) as slots:
        slots.lora = lora
        logits(tiny_base)[:3].logsumexp(-1).sum().backward()
    for x in (*lora.a, *lora.b):
        assert (x.grad[:3].flatten(2).abs().sum(-1) > 0).all()  # every adapter in every layer
        assert not x.grad[3].any()  # the sequence that is in no loss
    assert all(p.grad is None for p in tiny_base.parameters())


def test_empty_slot_is_the_base_model(adapters: list[LoraAdapter], tiny_base: LlamaForCausalLM) -> None:
    plain = logits(tiny_base)
    with hooked(tiny_base, adapters[0].spec) as slots:
        assert torch.equal(logits(tiny_base), plain)
        slots.lora = adapters[0].lora
        assert not torch.equal(logits(tiny_base), plain)
        slots.lora = None
        assert torch.equal(logits(tiny_base), plain)


def test_half_precision_model_takes_a_float_adapter(tiny_config: Any, adapters: list[LoraAdapter]) -> None:
    model = make_base(tiny_config).bfloat16()
    with apply_adapters(model, adapters):
        assert logits(model).dtype == torch.bfloat16
        assert logits(model).isfinite().all()


@pytest.mark.parametrize("grad", [False, True], ids=["judging", "training"])
def test_compiled_layers_share_one_graph(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers: with a graph of its own for each, compiling would take minutes."""
    from torch._dynamo.utils import counters

    compile_ = nn.Module.compile  # graphs are made as ever, but not turned into kernels
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_(self, backend="aot_eager", **options))

    def graphs(num_layers: int, layers: tuple[int, ...] | None = None) -> int:
        torch._dynamo.reset()
        counters.clear()
        config = make_config(num_hidden_layers=num_layers)
        model, adapter = make_base(config), make_adapter(config, layers_to_transform=layers)
        lora = LoraTensors.stack([adapter.lora] * 4).map(lambda x: x.requires_grad_(grad))
        results = []
        with hooked(model, adapter.spec) as slots, torch.set_grad_enabled(grad):
            for how in (nullcontext(), compiled(model, adapter.spec), nullcontext()):
                with how:
                    slots.lora = lora
                    results.append(model(TOKENS, use_cache=False).logits)
        torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
        assert torch.equal(results[0], results[2])  # compiled no more
        return int(counters["stats"]["unique_graphs"])

    assert graphs(3) == graphs(5) > 0
    assert graphs(5, layers=(2, 4)) > 0, "layers without an adapter must not run the graph of those with one"


@pytest.mark.parametrize(
    ("kind", "sizes", "target"),
    [
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "fc1"),
        (
            "qwen2_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            | {"shared_expert_intermediate_size": 16},
            "shared_expert.down_proj",
        ),
    ],
)
def test_modules_that_get_all_tokens_in_one_row_are_named(kind: str, sizes: dict[str, int], target: str) -> None:
    """One adapter acts there as anywhere; one for each sequence cannot, and the message does not ask for it."""
    config = AutoConfig.for_model(kind, **(SMALL | {"max_position_embeddings": 64} | sizes))
    base = AutoModelForCausalLM.from_config(config).eval()
    adapters = [make_adapter(config, seed, target_modules=(target,)) for seed in (1, 2)]
    tokens = torch.tensor([[0, 17, 93, 240, 5], [0, 8, 200, 41, 12]])
    with torch.no_grad():
        plain = base(tokens).logits
        with apply_adapters(base, adapters[0]):
            assert not torch.equal(base(tokens).logits, plain)
        message = rf"{target} gets the tokens of all sequences in one row"
        with pytest.raises(AdapterNotAppliedError, match=message), apply_adapters(base, adapters):
            base(tokens)
        assert torch.equal(base(tokens).logits, plain)
