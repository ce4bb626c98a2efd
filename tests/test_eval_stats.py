"""Intervals, paired differences and sign flips: exact where they can be, and right as often as they say."""

import itertools

import numpy as np
import pytest

from t2l.errors import DataError
from t2l.eval.stats import Scores, difference, estimate, sign_flip_p


def test_mean_counts_answers_alike_and_intervals_come_from_tasks() -> None:
    """Answers of one task that are all alike are no more evidence than one."""
    generator = np.random.default_rng(0)
    rates = generator.random(200) < 0.3
    once: Scores = {f"t{n}": {"a": [float(rate)]} for n, rate in enumerate(rates)}
    often: Scores = {f"t{n}": {str(i): [float(rate)] * 3 for i in range(10)} for n, rate in enumerate(rates)}
    one, many = estimate(once), estimate(often)
    assert one.mean == many.mean == pytest.approx(rates.mean())
    assert (one.low, one.high) == (many.low, many.high)
    assert (one.n, many.n, one.tasks) == (200, 6000, 200)
    # As the normal approximation has it.
    assert one.high - one.low == pytest.approx(2 * 1.96 * rates.std() / 200**0.5, rel=0.1)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator, covered = np.random.default_rng(3), 0
    for _ in range(200):
        rates = generator.beta(2, 4, size=40)
        scores: Scores = {
            f"t{n}": {str(i): [float(generator.random() < rate)] for i in range(10)} for n, rate in enumerate(rates)
        }
        row = estimate(scores)
        covered += row.low <= 1 / 3 <= row.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_single_tasks_interval_comes_from_its_items() -> None:
    scores: Scores = {"only": {str(n): [float(n % 4 == 0)] * 3 for n in range(400)}}
    row = estimate(scores)
    assert row.mean == 0.25
    assert row.high - row.low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 400) ** 0.5, rel=0.1)


def test_benchmarks_count_alike_in_their_average() -> None:
    scores: Scores = {"small": {"0": [1.0], "1": [1.0]}, "large": {str(n): [0.0] for n in range(98)}}
    assert estimate(scores, fixed_tasks=True).mean == 0.5
    assert estimate(scores).mean == 0.02


def test_paired_difference_sees_what_unpaired_intervals_hide() -> None:
    generator = np.random.default_rng(1)
    easy = generator.random(60)
    one: Scores = {f"t{n}": {"a": [float(x) + 0.02]} for n, x in enumerate(easy)}
    other: Scores = {f"t{n}": {"a": [float(x)]} for n, x in enumerate(easy)}
    gap = difference(one, other)
    assert gap.mean == pytest.approx(0.02)
    assert gap.low > 0.019
    assert gap.p < 0.001
    assert estimate(one).low < estimate(other).high
    opposite = difference(other, one)
    assert opposite.mean == -gap.mean
    assert opposite.p == gap.p
    assert gap.low <= gap.one_sided_low <= gap.mean


def test_sign_flips_are_exact_for_few_tasks() -> None:
    one: Scores = {f"t{n}": {"a": [1.0]} for n in range(5)}
    other: Scores = {f"t{n}": {"a": [0.0]} for n in range(5)}
    assert difference(one, other).p == 2 / 2**5
    assert difference(one, one).p == 1.0


@pytest.mark.parametrize("count", range(9))
def test_p_is_the_share_of_sign_patterns_that_are_as_far_from_zero(count: int) -> None:
    """By counting all patterns, where there are few; values of 0 have no sign and change nothing."""
    values = np.random.default_rng(count).normal(0.5, 1.0, size=count)
    patterns = np.array(list(itertools.product((-1, 1), repeat=count))).reshape(2**count, count)
    share = np.mean(np.abs(patterns @ values) >= abs(values.sum()) - 1e-12)
    assert sign_flip_p(values) == sign_flip_p(np.array([0.0, *values, 0.0])) == pytest.approx(share)


def test_one_answer_has_an_interval_of_no_width() -> None:
    one: Scores = {"t": {"a": [0.5]}}
    assert (estimate(one).low, estimate(one).high, difference(one, {"t": {"a": [0.0]}}).p) == (0.5, 0.5, 1.0)


def test_p_is_uniform_where_rows_are_alike() -> None:
    generator = np.random.default_rng(2)
    found = []
    for _ in range(100):
        one, other = ({f"t{n}": {"a": [x]} for n, x in enumerate(generator.random(30).tolist())} for _ in range(2))
        found.append(difference(one, other).p)
    assert 0.35 < np.mean(found) < 0.65
    assert np.mean(np.array(found) < 0.05) <= 0.12


def test_rows_with_other_answers_are_not_paired() -> None:
    one: Scores = {"t": {"a": [1.0], "b": [0.0]}}
    with pytest.raises(DataError, match="of task t one holds answers that the other lacks"):
        difference(one, {"t": {"a": [1.0]}})
    with pytest.raises(DataError, match="share no task"):
        difference(one, {"u": {"a": [1.0]}})
    more = {**one, "u": {"a": [1.0]}}
    assert difference(more, one).tasks == 1
