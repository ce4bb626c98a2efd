"""The next token of one row, from its own logits and its own random numbers, whatever other rows do.

Knows logits. Knows no models, rows or text.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are drawn from."""
    seed: int | None = None
    """Two requests with the same seed and the same logits draw the same tokens; None draws anew each time."""
    top_logprobs: int | None = None
    """How many alternatives' log-probabilities are reported beside the chosen one's; None reports none at all."""


@dataclass(frozen=True)
class Choice:
    """A chosen token."""

    token: int
    logprob: float | None = None
    """Of the model's own distribution, before temperature and `top_p`; None if nobody asked."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log-probabilities, the likeliest first."""


def choose(logits_V: Tensor, likeliest: int, sampling: Sampling, draws: random.Random) -> Choice:
    """Chooses a token.

    Args:
        logits_V: Of one row, in float32.
        likeliest: The token with the largest of them.
        sampling: How.
        draws: The row's own random numbers; greedy choices take none.
    """
    token = likeliest if sampling.temperature <= 0 else _draw(logits_V, sampling, draws.random())
    if sampling.top_logprobs is None:
        return Choice(token)
    logprobs_V = logits_V.log_softmax(-1)
    values, tokens = logprobs_V.topk(min(sampling.top_logprobs, len(logprobs_V)))
    return Choice(token, float(logprobs_V[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


def _draw(logits_V: Tensor, sampling: Sampling, point: float) -> int:
    """The token at `point` of the cumulative distribution: one random number a token, the same on every device."""
    # In float64, so that the sums of a large vocabulary end at 1 and every token keeps its share.
    probs_V = (logits_V.double() / sampling.temperature).softmax(-1)
    if sampling.top_p >= 1:
        return _at(probs_V, point)
    sorted_V, order_V = probs_V.sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(-1) - sorted_V
    kept = max(1, int((before_V < sampling.top_p).sum()))
    return int(order_V[_at(sorted_V[:kept], point)])


def _at(probs: Tensor, point: float) -> int:
    sums = probs.cumsum(-1)
    index = int(torch.searchsorted(sums, sums[-1:] * point, right=True))
    # Rounding may put the point after the last sum; the last token with any probability is meant then.
    return min(index, int(probs.nonzero()[-1]))
