"""Bases people use, served: each row's answer is the one that it gets alone, or the base is refused."""

from typing import Any

import pytest
import torch
from conftest import SMALL
from serve_helpers import make_prompt, reference
from test_bases import BASES, make_adapter, make_base
from transformers import AutoConfig, AutoModelForCausalLM

from t2l.errors import ConfigError
from t2l.serve.answers import Generation
from t2l.serve.engine import Engine

MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {},
    "cohere": {},
    "glm": {"head_dim": 8},
    "stablelm": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "bloom": {"n_layer": 3, "n_head": 4},
    "mamba": {"state_size": 4},
    "qwen3_next": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
                   "shared_expert_intermediate_size": 16},
}  # fmt: skip


def make(kind: str) -> Any:
    config = AutoConfig.for_model(kind, **(SMALL | {"max_position_embeddings": 128} | MORE[kind]))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    model.generation_config.eos_token_id = 1
    return model


def serve(model: Any, tokenizer: Any, adapters: list[Any]) -> None:
    asked = [(make_prompt(n, 3 + 7 * n), adapters[n % len(adapters)], 6) for n in range(4)]
    expected = [reference(model, tokenizer, *request) for request in asked]
    engine = Engine(model, tokenizer)
    try:
        answers = [engine.submit(Generation(prompt=ids, adapter=a, max_tokens=most)) for ids, a, most in asked]
        assert [answer.text() for answer in answers] == expected
    finally:
        engine.close()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", BASES)
def test_rows_with_adapters_are_answered_as_alone(kind: str, attention: str, tiny_tokenizer: Any) -> None:
    if (kind, attention) == ("gemma2", "sdpa"):
        pytest.skip("gemma2 caps its scores, which this attention does not do, alone or in a batch")
    model = make_base(kind)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = 1
    serve(model, tiny_tokenizer, [None, make_adapter(model, BASES[kind][1])])


@pytest.mark.parametrize("kind", MORE)
def test_other_bases_are_served_right_or_refused(kind: str, tiny_tokenizer: Any) -> None:
    try:
        model = make(kind)
    except Exception as error:
        pytest.skip(f"this version of Transformers makes no tiny {kind}: {error}")
    try:
        serve(model, tiny_tokenizer, [None])
    except ConfigError as error:
        assert any(words in str(error) for words in ("keys and values", "another row is in", "masks"))
        print(f"refused: {error}")
