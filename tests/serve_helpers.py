"""What the server's tests share: adapters of any shape, prompts, and the answer that Transformers alone would give."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from conftest import random_lora
from torch import nn

from t2l.apply import apply_adapters
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec, Target


@dataclass(frozen=True)
class TinyAdapter:
    """The least that the engine asks of an adapter."""

    lora: LoraTensors
    spec: AdapterSpec


def make_adapter(
    model: Any,
    seed: int = 0,
    *,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    rank: int = 4,
    alpha: float = 8.0,
    layers: tuple[int, ...] | None = None,
    use_rslora: bool = False,
) -> TinyAdapter:
    """A random adapter of a Llama-like model; no targets are all of its linear modules."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.0.")
    }
    chosen = {name.rpartition(".")[2]: name for name in linears}
    spec = AdapterSpec(
        base_model="tiny/base",
        model_type=model.config.model_type,
        num_layers=model.config.num_hidden_layers,
        layers=layers or tuple(range(model.config.num_hidden_layers)),
        targets=tuple(
            Target(
                name=name,
                path=chosen[name].replace(".0.", ".{layer}."),
                in_features=linears[chosen[name]].in_features,
                out_features=linears[chosen[name]].out_features,
            )
            for name in targets or chosen
        ),
        rank=rank,
        alpha=alpha,
        use_rslora=use_rslora,
    )
    return TinyAdapter(random_lora(spec, seed), spec)


SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"targets": ("q_proj", "k_proj", "v_proj", "o_proj"), "rank": 2},
    {"targets": ("down_proj",), "rank": 7, "layers": (1,)},
    {"targets": (), "rank": 1, "use_rslora": True},
)
"""Adapters that have hardly anything in common."""


def make_prompt(seed: int, length: int | None = None) -> list[int]:
    draw = random.Random(seed)
    return [0, *(draw.randrange(3, 263) for _ in range((length or draw.randrange(2, 40)) - 1))]


@torch.no_grad()
def reference(model: Any, tokenizer: Any, ids: list[int], adapter: Any, max_tokens: int) -> str:
    """By Transformers alone, one request at a time, the whole text read anew for each token."""
    tokens = torch.tensor([ids])
    for _ in range(max_tokens):
        if adapter is None:
            logits = model(tokens, use_cache=False).logits
        else:
            with apply_adapters(model, adapter):
                logits = model(tokens, use_cache=False).logits
        token = logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        if int(token) == 1:
            break
    return str(tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True))
