"""Options in inputs, choices among listed answers, terse texts: every right answer stays reachable and in its place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2l.tasks import Example, Task
from t2l.train.options import FIRST, LAYOUTS, TERSE, Listing, Pick, picks, placed, terse_descriptions

WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=2, max_size=5, unique=True)


def task(answers: list[str], category: str | None = "text quality") -> Task:
    examples = tuple(Example(str(n), f"input number {n}", (answer,)) for n, answer in enumerate(answers))
    return Task("own", ("Say which it is.", "Label the text."), {"train": examples}, category=category)


@given(WORDS, st.integers(0, 10_000))
def test_placed_inputs_hold_the_input_and_every_option(words: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = placed("ZZZ?", words, rng, Listing.drawn(rng))
    assert "ZZZ?" in text
    assert all(word in text for word in words)


def test_options_come_in_every_order() -> None:
    rng = np.random.default_rng(0)
    listing = Listing(LAYOUTS[8], first=False)
    assert {placed("x", ["p", "q", "r"], rng, listing).count("p, q") for _ in range(50)} == {0, 1}


def test_an_input_that_lists_its_options_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    text = "Is it Good or Bad?"
    assert placed(text, ["good", "bad"], rng, Listing.drawn(rng)) == text


@pytest.mark.parametrize("layout", FIRST)
def test_a_list_that_comes_first_stands_before_the_input(layout: tuple[str, str, str, str]) -> None:
    text = Listing(layout, first=True).put("the input", ["one", "two"])
    assert text.endswith("the input")
    assert text.index("one") < text.index("the input")


def test_a_pick_lists_the_right_answer_once_and_replies_in_its_words() -> None:
    found = picks(task(["red", "green", "blue", "red", "grey"] * 3), 8, seed=0)
    assert len(found) == 8
    rng = np.random.default_rng(1)
    for pick, texts in found:
        assert isinstance(pick, Pick) and texts
        for example in pick.examples:
            text, reply = pick(example, example.outputs[0], rng)
            assert reply == example.outputs[0]
            assert text.count(reply) == 1
            others = [word for word in ("red", "green", "blue", "grey") if word in text]
            assert 2 <= len(others) <= 6


def test_a_task_with_one_answer_has_no_picks() -> None:
    assert picks(task(["yes"] * 5), 3, seed=0) == []


def test_terse_texts_name_the_category_at_most() -> None:
    with_category, without = terse_descriptions(task(["a", "b"])), terse_descriptions(task(["a", "b"], None))
    assert without == TERSE
    assert set(with_category) > set(TERSE)
    assert all("text quality" in text.lower() for text in set(with_category) - set(TERSE))
    assert "Text quality task" in with_category
