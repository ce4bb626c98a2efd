"""Scores of single answers: pure functions, with the mistakes that published harnesses made as examples."""

from decimal import Decimal
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2l.eval.metrics import exact_match, parse_number, parse_option, rouge_l

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=7)
LABELS = ["valid", "invalid"]
TEN = [str(n) for n in range(1, 11)]
ANIMALS = ["a dog", "a cat", "dogs and a cat", "fish"]


def test_exact_match_forgives_white_space_around_and_nothing_else() -> None:
    assert exact_match(" yes\n", ["no", "yes "])
    assert not exact_match("yes.", ["yes"])
    assert not exact_match("Yes", ["yes"])
    assert not exact_match("", ["yes"])


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        # A label inside another is not that label.
        ("invalid", LABELS, 1),
        ("valid", LABELS, 0),
        ("The argument is invalid.", LABELS, 1),
        ("It is valid, not invalid", LABELS, None),
        # Numbers are read whole.
        ("option 10", TEN, 9),
        ("The answer is option 10", TEN, 9),
        ("The answer is option 10", ["x", "y"], None),
        ("1", TEN, 0),
        ("2", ["2", "1"], 0),  # an option's own text comes before its position
        # Letters, as models write them.
        ("B", ANIMALS, 1),
        ("(b)", ANIMALS, 1),
        ("b) a cat", ANIMALS, 1),
        ("Answer: D.", ANIMALS, 3),
        ("The correct answer is (c).", ANIMALS, 2),
        ("answer is a", ANIMALS, 0),
        ("E", ANIMALS, None),
        # The article is no letter.
        ("A cat", ANIMALS, 1),
        ("The answer is a cat", ANIMALS, 1),
        ("the answer is a bird", ANIMALS, None),
        ("A big thing", ANIMALS, None),
        # Texts: an option inside a longer one that is there was not said; two options are none.
        ("I think it is fish!", ANIMALS, 3),
        ("dogs and a cat", ANIMALS, 2),
        ("dogs and a cat, surely", ANIMALS, 2),
        ("a cat or a dog", ANIMALS, None),
        ("YES.", ["no", "yes"], 1),
        ("yesterday", ["no", "yes"], None),
        ("", ["no", "yes"], None),
        ("same", ["same", "same"], None),
    ],
)
def test_options(answer: str, choices: list[str], expected: int | None) -> None:
    assert parse_option(answer, choices) == expected


@given(st.integers(0, 3), st.sampled_from(["{}", " {}.", "Answer: {}", "The answer is {}!", "({})"]))
def test_every_way_to_say_an_option_finds_it(target: int, form: str) -> None:
    choices = ["red apples", "green apples", "apples", "pears and more"]
    assert parse_option(form.format(choices[target]), choices) == target
    assert parse_option(form.format("ABCD"[target]), choices) == target


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("6 * 3 = 18. #### 18", "18"),
        ("#### 1,234.50", "1234.5"),
        ("She earns $1,200 in 3 months. The answer is $1,200.", "1200"),
        ("The answer is 3. Then 5 more words", "3"),
        ("first 3, then -4.", "-4"),
        ("10-4", "4"),
        ("1,2", "2"),
        ("no number", None),
        ("", None),
    ],
)
def test_numbers(answer: str, expected: str | None) -> None:
    assert parse_number(answer) == (None if expected is None else Decimal(expected))


def brute_force(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, by trying all of them."""
    subsequences = {c for n in range(len(one) + 1) for c in combinations(one, n)}
    return max(len(c) for c in subsequences if c in set(combinations(other, len(c))))


@given(WORDS, WORDS)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    expected = 2 * brute_force(one, other) / (len(one) + len(other)) if one and other else 0.0
    assert rouge_l(" ".join(one), [" ".join(other)]) == pytest.approx(expected)
    assert rouge_l(" ".join(one), ["x y z", " ".join(other)]) >= expected


def test_rouge_l_reads_words() -> None:
    assert rouge_l("The cat sat.", ["the CAT, sat"]) == 1
    assert rouge_l("the cat sat", ["the dog sat"]) == pytest.approx(2 / 3)
    assert rouge_l("猫", ["猫"]) == 1
    assert rouge_l("…", ["yes"]) == 0
