"""Greedy answers and choices' likelihoods of one batch, and how sequences become batches. One adapter a sequence.

Knows a causal model, its tokenizer and adapters. Knows no tasks, no conditions and no files.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from t2l.apply import HasLora, apply_adapters
from t2l.errors import DataError
from t2l.prompt import pad_id
from t2l.spec import AdapterSpec

MAX_SEQUENCES = 4096
"""A batch holds at most so many sequences, however short they are."""
ACTIVATIONS = 32
"""One layer holds so many numbers of a token at a time, in hidden sizes: most are the MLP's, 4 to 6 of them wide."""
ADAPTER_BYTES = 6
"""Memory of each parameter of an adapter: stacked in float32, then in the model's type, and B once more, scaled."""


def room(model: Any, spec: AdapterSpec | None) -> tuple[int, int]:
    """Computes how many tokens and sequences of a batch the model's device has room for.

    On a GPU half of the free memory is for tokens, their keys and values and one layer's activations, and a third for
    adapters.

    Args:
        model: The base model.
        spec: Of the adapters, one a sequence; None for the plain base model.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return {"cpu": 2**13, "meta": 2**16}.get(device.type, 2**18), MAX_SEQUENCES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    adapter_bytes = 0 if spec is None else ADAPTER_BYTES * spec.num_parameters
    sequences = min(MAX_SEQUENCES, free // 3 // max(1, adapter_bytes))
    return max(2**13, free // 2 // bytes_per_token(model)), max(1, sequences)


def bytes_per_token(model: Any) -> int:
    """Computes the memory of a token: its keys and values in all layers, and the activations of one layer."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * heads * head_size + ACTIVATIONS * config.hidden_size
    return int(numbers * next(model.parameters()).element_size())


def batches(lengths: Sequence[int], *, max_tokens: int, max_sequences: int = MAX_SEQUENCES) -> Iterator[list[int]]:
    """Puts sequences of like length together, longest first, so that a batch too large for memory fails at once.

    Args:
        lengths: Tokens of each sequence, prompt and answer together.
        max_tokens: Of a batch, padding included; a longer sequence is a batch of its own.
        max_sequences: Of a batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batch: list[int] = []
    for i in order:
        if batch and ((len(batch) + 1) * lengths[batch[0]] > max_tokens or len(batch) == max_sequences):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def require_room(model: Any, length: int, what: str) -> None:
    """Raises if a sequence is longer than the model's window.

    Raises:
        DataError: naming both lengths.
    """
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is not None and length > window:
        raise DataError(
            f"{what} takes {length:,} tokens, answer included; the base model reads at most {window:,}. Leave it out"
        )


def cache_argument(model: Any) -> str:
    """What a model's `forward` and its output call the keys and values: Transformers 5.24 renamed them."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[HasLora] | None,
    *,
    max_new_tokens: int,
) -> list[str]:
    """Continues a batch of prompts greedily; the answers are those of `model.generate`.

    Whenever a quarter of the batch has ended, it goes on without those.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        adapters: One for each prompt, or one for all; None for the plain base model.
        max_new_tokens: Limit of an answer, at least 1.

    Returns:
        The answers without special tokens, white space as it came.
    """
    assert adapters is None or len(adapters) in (1, len(prompts)), "one adapter for each prompt, or one for all"
    device = next(model.parameters()).device
    tokens_BT, mask_BT = _left_padded(prompts, pad_id(tokenizer), device)
    positions_BT = _positions(mask_BT)
    ends = _ends(model, tokenizer)
    cache: Any = None
    cache_name = cache_argument(model)
    said: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompts that the batch holds
    while rows:
        each = adapters if adapters is None or len(adapters) == 1 else [adapters[row] for row in rows]
        going = list(range(len(rows)))  # of `rows`, those whose answers have not ended
        with _with(model, each):
            while 4 * len(going) > 3 * len(rows):
                output = model(
                    tokens_BT,
                    attention_mask=mask_BT,
                    position_ids=positions_BT,
                    use_cache=True,
                    logits_to_keep=1,
                    **{cache_name: cache},
                )
                cache, next_B = output[cache_name], output.logits[:, -1].argmax(-1)
                chosen = next_B.tolist()
                for i in going:
                    said[rows[i]].append(chosen[i])
                going = [i for i in going if chosen[i] not in ends and len(said[rows[i]]) < max_new_tokens]
                tokens_BT, positions_BT = next_B[:, None], positions_BT[:, -1:] + 1
                mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
        rows = [rows[i] for i in going]
        kept = torch.tensor(going, dtype=torch.long, device=device)
        tokens_BT, positions_BT, mask_BT = tokens_BT[kept], positions_BT[kept], mask_BT[kept]
        # Beam search's method, as every kind of cache layer has it; `batch_select_indices` forgets recurrent states.
        cache.reorder_cache(kept)
    answers: list[str] = tokenizer.batch_decode(said, skip_special_tokens=True)
    return answers


@torch.no_grad()
def log_likelihoods(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    adapters: Sequence[HasLora] | None,
) -> list[float]:
    """Sums the log-probabilities of continuations, each after its prompt.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        continuations: Token ids, at least one each.
        adapters: One for each prompt; None for the plain base model.
    """
    device = next(model.parameters()).device
    both = [[*prompt, *rest] for prompt, rest in zip(prompts, continuations, strict=True)]
    tokens_BT, mask_BT = _left_padded(both, pad_id(tokenizer), device)
    kept = max(map(len, continuations))
    targets_BK, wanted_BK = tokens_BT[:, -kept:], torch.zeros(len(both), kept, dtype=torch.bool)
    for row, rest in enumerate(continuations):
        wanted_BK[row, kept - len(rest) :] = True
    positions_BT = _positions(mask_BT)
    with _with(model, adapters):
        # Padded on the left, all continuations end at the end: only there does the vocabulary's matrix have work.
        logits = model(
            tokens_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False, logits_to_keep=kept + 1
        ).logits[:, :-1]
    # In float32, some sequences at a time: a copy of all logits could be larger than the model.
    norms_BK = torch.cat([part.float().logsumexp(-1) for part in logits.split(32)])
    chosen_BK = logits.gather(-1, targets_BK[..., None])[..., 0].float() - norms_BK
    sums: list[float] = chosen_BK.masked_fill(~wanted_BK.to(device), 0.0).sum(1).tolist()
    return sums


def _left_padded(ids: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pads token ids on the left; returns tokens and mask, both (B, T)."""
    longest = max(map(len, ids))
    tokens_BT = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in ids])
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    return tokens_BT.to(device), mask_BT.to(device)


def _positions(mask_BT: Tensor) -> Tensor:
    """Counts each token's place in its own sequence, padding left out."""
    return (mask_BT.cumsum(1) - 1).clamp_min(0)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the model's, or the tokenizer's where the model names none."""
    named = model.generation_config.eos_token_id
    if named is None:
        named = tokenizer.eos_token_id
    return set() if named is None else set(named) if isinstance(named, Sequence) else {named}


def _with(model: Any, adapters: Sequence[HasLora] | None) -> AbstractContextManager[Any]:
    return nullcontext() if adapters is None else apply_adapters(model, list(adapters))
