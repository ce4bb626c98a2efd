"""The loss of packed rows is the base's own, whatever its attention and whatever it does with its logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from t2l import hub
from t2l.apply import AdapterHooks
from t2l.errors import ConfigError
from t2l.tasks import Example
from t2l.train.batches import Batches, Pool
from t2l.train.loss import answer_losses, attention_masks, document_gap, require_packable
from t2l.train.packing import SHARED, PackedRows

BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 16},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 2.0},
    "gemma2": {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16},
    "cohere": {"logit_scale": 0.25},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "n_inner": 48},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48},
}
"""Bases that cap or scale logits, see a window, have attention of their own, learn positions."""
REFUSED: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "rwkv": {},
    "bloom": {"n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
}
"""Bases without attention, or with one that knows no positions or takes no mask of its own."""


def make(kind: str, attention: str | None = None) -> Any:
    """A random base of an architecture; skips where it has no such attention."""
    config = AutoConfig.for_model(kind, **(SMALL | {"max_position_embeddings": 512} | (BASES | REFUSED)[kind]))
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])
    return model.eval().requires_grad_(False)


def packed_rows(gap: int = 0) -> PackedRows:
    """Two rows of documents of different lengths, with and without a beginning that they share."""
    pool = Pool("a", tuple(Example(f"{n}", "in " + "x" * n, (f"out {n}",)) for n in range(9)), (0,))
    room: dict[str, Any] = {"rows": 2, "tokens": 120, "answer_tokens": 30, "in_prompt": 0.5, "seed": 1}
    batches = Batches([pool], ["Do."], make_tokenizer(), **room, gap=gap)
    return batches[0].rows


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", BASES)
def test_packed_documents_lose_what_the_base_itself_loses_on_each_of_them(kind: str, attention: str) -> None:
    base = make(kind, attention)
    rows = packed_rows(document_gap(base.config))
    require_packable(base, kind)
    with torch.no_grad():
        losses, correct = answer_losses(base, AdapterHooks((), "unused"))(rows, None)
        seen = 0
        for row in range(len(rows.tokens)):
            for number in range(int(rows.documents[row].max()) + 1):
                tokens = rows.tokens[row][(rows.documents[row] == number) | (rows.documents[row] == SHARED)]
                own = rows.label_documents[row] == number
                labels = rows.labels[row][own]
                logits = base(input_ids=tokens[None]).logits[0, -len(labels) :].float()
                alone = F.cross_entropy(logits, labels, reduction="none")
                assert (losses[row][own] - alone).abs().max() <= 1e-4
                assert torch.equal(correct[row][own], logits.argmax(-1) == labels)
                seen += 1
    assert seen > 4


def test_masks_of_truth_values_only_where_attention_reads_them() -> None:
    rows = packed_rows()
    for attention, dtype in (("sdpa", torch.bool), ("eager", torch.bfloat16)):
        config = make("llama", attention).config
        mask = attention_masks(config, rows, torch.bfloat16)
        assert isinstance(mask, torch.Tensor) and mask.dtype == dtype and mask.shape == (2, 1, 120, 120)
    both = attention_masks(make("gemma2", "eager").config, rows, torch.float32)
    assert isinstance(both, dict)
    full, near = (both[kind] == 0 for kind in ("full_attention", "sliding_attention"))
    assert (full & near).sum() == near.sum() < full.sum()


def test_a_base_with_broken_weights_is_refused_as_that() -> None:
    base = make("llama")
    base.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"its own losses are not finite, without any adapter"):
        require_packable(base, "broken")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_base_that_cannot_keep_documents_apart_is_refused(kind: str) -> None:
    base = make(kind)
    with pytest.raises(ConfigError, match=rf"^{kind}-base \(\w+\) cannot be trained on: .*attention"):
        require_packable(base, f"{kind}-base")


def test_the_check_draws_no_random_numbers() -> None:
    base, before = make("llama"), torch.get_rng_state()
    require_packable(base, "llama")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "gptj", "mamba"])
def test_a_base_is_loaded_with_the_attention_that_it_has(kind: str, tmp_path: Path) -> None:
    base = make(kind)
    base.save_pretrained(tmp_path / kind)
    loaded, tokens = hub.load_causal_lm(str(tmp_path / kind)), torch.tensor([[0, 17, 93, 240, 5]])
    with torch.no_grad():
        assert (loaded(tokens).logits - base(tokens).logits).abs().max() <= 1e-5
