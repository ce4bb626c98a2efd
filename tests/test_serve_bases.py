"""Bases people use, served: each row's answer is the one that it gets alone, or the base is refused."""

from collections.abc import Iterable
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
from t2l.serve.limits import Limits

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


def serve(model: Any, tokenizer: Any, adapters: list[Any], *, requests: int = 4, limits: Limits | None = None) -> None:
    asked = [(make_prompt(n, 3 + 7 * n), adapters[n % len(adapters)], 6 + n % 3) for n in range(requests)]
    expected = [reference(model, tokenizer, *request) for request in asked]
    engine = Engine(model, tokenizer, limits)
    try:
        answers = [engine.submit(Generation(prompt=ids, adapter=a, max_tokens=most)) for ids, a, most in asked]
        assert [answer.text() for answer in answers] == expected
    finally:
        engine.close()


def each(kinds: Iterable[str]) -> list[tuple[str, str]]:
    """Kinds with both attentions; Transformers itself runs these two with the first alone."""
    return [(k, way) for k in kinds for way in ("eager", "sdpa") if way == "eager" or k not in ("gemma2", "gpt_oss")]


@pytest.mark.parametrize(("kind", "attention"), each(BASES))
def test_rows_with_adapters_are_answered_as_alone(kind: str, attention: str, tiny_tokenizer: Any) -> None:
    model = make_base(kind)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = 1
    serve(model, tiny_tokenizer, [None, make_adapter(model, BASES[kind][1])])


def test_convolutions_see_the_tokens_before_a_piece_and_before_a_row_has_moved(tiny_tokenizer: Any) -> None:
    """Prompts in pieces shorter than a convolution, of rows that start, end and move at other times."""
    model = make_base("lfm2-conv")
    model.generation_config.eos_token_id = 1
    adapters = [make_adapter(model, targets) for targets in (("in_proj", "conv.out_proj"), BASES["lfm2-conv"][1])]
    for piece in (1, 7, 40):
        limits = Limits(rows=3, prompt_piece=piece)
        serve(model, tiny_tokenizer, [None, *adapters], requests=8, limits=limits)


WINDOWED = ["mistral", "phi3", "gemma2", "gemma3_text", "qwen3", "gpt_oss", "cohere2", "olmo3"]


@pytest.mark.parametrize(("kind", "attention"), each(WINDOWED))
def test_layers_that_see_a_window_see_it_in_a_batch_too(kind: str, attention: str, tiny_tokenizer: Any) -> None:
    """Windows shorter than the prompts, in all layers or in one of two; scores are capped where it shows."""
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    own: dict[str, dict[str, Any]] = {
        "gemma2": {"query_pre_attn_scalar": 8, "head_dim": 8, "attn_logit_softcapping": 0.3, **kinds},
        "gemma3_text": {"query_pre_attn_scalar": 8, "head_dim": 8, **kinds},
        "qwen3": {"use_sliding_window": True, "head_dim": 8, **kinds},
        "gpt_oss": MORE["gpt_oss"] | kinds,
        "cohere2": kinds,
        "olmo3": kinds,
    }
    settings = SMALL | {"max_position_embeddings": 128, "sliding_window": 5} | own.get(kind, {})
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().requires_grad_(False)
    model.generation_config.eos_token_id = 1
    plain = model(torch.tensor([make_prompt(3, 24)])).logits
    serve(model, tiny_tokenizer, [None])
    # Without the window, or without the caps, the same weights say something else.
    for setting, large in (("sliding_window", 100), ("attn_logit_softcapping", 100.0)):
        if getattr(config, setting, None):
            other = AutoConfig.for_model(kind, **settings | {setting: large})
            others = AutoModelForCausalLM.from_config(other, attn_implementation=attention).eval()
            others.load_state_dict(model.state_dict())
            assert not torch.allclose(others(torch.tensor([make_prompt(3, 24)])).logits, plain, atol=1e-3), setting


@pytest.mark.parametrize("kind", MORE)
def test_other_bases_are_served_right_or_refused(kind: str, tiny_tokenizer: Any) -> None:
    try:
        model = make(kind)
    except Exception as error:
        pytest.skip(f"this version of Transformers makes no tiny {kind}: {error}")
    try:
        serve(model, tiny_tokenizer, [None])
    except ConfigError as error:
        assert any(words in str(error) for words in ("short convolution", "another row is in", "masks"))
        print(f"refused: {error}")
