"""Tokens into text and logits into tokens, one row at a time."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2l.serve.sampling import Sampling, choose
from t2l.serve.text import TextStream


def streamed(tokenizer: Any, text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stops)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=3))
@settings(max_examples=200)
def test_pieces_are_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    """One token a byte: characters of several bytes come whole, and no piece holds what a stop string takes back."""
    from conftest import make_tokenizer

    global _tokenizer
    if _tokenizer is None:
        _tokenizer = make_tokenizer()
    pieces, stopped = streamed(_tokenizer, text, tuple(stops))
    found = "".join(pieces)
    cut = [text.index(stop) for stop in stops if stop in text]
    assert stopped == bool(cut)
    if len(stops) == 1 or not cut:
        assert found == text[: min(cut, default=len(text))]
    assert not any(stop in found for stop in stops)


_tokenizer: Any = None


def test_a_character_cut_short_is_shown_as_such(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("aé", add_special_tokens=False).input_ids
    stream = TextStream(tiny_tokenizer)
    assert [stream.push(token) for token in ids[:2]] == ["a", ""]
    assert stream.finish() == "\ufffd"


def test_special_tokens_are_no_text(tiny_tokenizer: Any) -> None:
    stream = TextStream(tiny_tokenizer, ("s>",))
    assert "".join(stream.push(token) for token in (0, 1, 2)) + stream.finish() == ""
    assert not stream.stopped


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8)])
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, 0.5, -1.0, 1.5, -4.0])
    expected = (logits / temperature).softmax(-1)
    if top_p < 1:
        order = expected.argsort(descending=True)
        kept = order[: int((expected[order].cumsum(-1) < top_p).sum()) + 1]
        mask = torch.zeros(5).index_fill_(0, kept, 1.0)
        expected = expected * mask / (expected * mask).sum()
    draws = random.Random(0)
    sampling = Sampling(temperature=temperature, top_p=top_p)
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[choose(logits, 0, sampling, draws).token] += 1
    assert (counts / 4000 - expected).abs().max() < 0.03
    assert not counts[expected == 0].any()


def test_greedy_draws_nothing_and_impossible_tokens_are_never_drawn() -> None:
    class NoDraws(random.Random):
        def random(self) -> float:
            raise AssertionError("a greedy choice takes no random number")

    assert choose(torch.tensor([0.0, 3.0]), 1, Sampling(), NoDraws()).token == 1

    class Ends(random.Random):
        def random(self) -> float:
            return 1 - 2**-53

    logits = torch.tensor([0.0, -float("inf")])
    assert choose(logits, 0, Sampling(temperature=1.0), Ends()).token == 0
    assert choose(logits, 0, Sampling(temperature=1.0, top_p=0.99), Ends()).token == 0
