"""Greedy answers and choices' likelihoods of one batch, and how sequences become batches. One adapter a sequence.

Knows a causal model, its tokenizer and adapters. Knows no tasks, no rows and no files.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from t2l.apply import HasLora, applied
from t2l.errors import DataError

MAX_SEQUENCES = 1024
"""Of a batch, however short they are."""


def batches(lengths: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Positions of sequences of like length, longest first, so that a batch too large for memory fails at once.

    Args:
        lengths: Tokens of each sequence, prompt and answer together.
        max_tokens: Of a batch, padding included; a longer sequence is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batch: list[int] = []
    for i in order:
        if batch and ((len(batch) + 1) * lengths[batch[0]] > max_tokens or len(batch) == MAX_SEQUENCES):
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


@torch.no_grad()
def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[HasLora] | None,
    *,
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations of a batch of prompts.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        adapters: One for each prompt; None for the plain base model.
        max_new_tokens: Limit of an answer; a batch ends early once all its answers have.

    Returns:
        The answers without special tokens, white space as it came.
    """
    from transformers import GenerationConfig

    tokens_BT, mask_BT = _left_padded(prompts, tokenizer.pad_token_id, next(model.parameters()).device)
    # A configuration of our own: a model folder's would bring its sampling settings along.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with _with(model, adapters):
        output_BT = model.generate(tokens_BT, attention_mask=mask_BT, generation_config=config)
    answers: list[str] = tokenizer.batch_decode(output_BT[:, tokens_BT.shape[1] :], skip_special_tokens=True)
    return answers


@torch.no_grad()
def log_likelihoods(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    adapters: Sequence[HasLora] | None,
) -> list[float]:
    """Summed log-probabilities of continuations, each after its prompt.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        continuations: Token ids, at least one each.
        adapters: One for each prompt; None for the plain base model.
    """
    device = next(model.parameters()).device
    both = [[*prompt, *rest] for prompt, rest in zip(prompts, continuations, strict=True)]
    tokens_BT, mask_BT = _left_padded(both, tokenizer.pad_token_id, device)
    kept = max(map(len, continuations))
    targets_BK, wanted_BK = tokens_BT[:, -kept:], torch.zeros(len(both), kept, dtype=torch.bool)
    for row, rest in enumerate(continuations):
        wanted_BK[row, kept - len(rest) :] = True
    positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
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
    """Tokens and mask (B, T)."""
    longest = max(map(len, ids))
    tokens_BT = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in ids])
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    return tokens_BT.to(device), mask_BT.to(device)


def _with(model: Any, adapters: Sequence[HasLora] | None) -> AbstractContextManager[Any]:
    return nullcontext() if adapters is None else applied(model, list(adapters))
