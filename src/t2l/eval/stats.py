"""Means with bootstrap intervals, paired differences and exact tests, by `scipy.stats`.

Knows scores by task and item. Knows no files, no models and no names of conditions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from t2l.errors import DataError, EvaluationError

DRAWS = 2000
"""Resamples of a bootstrap."""
SIGN_FLIPS = 20_000
"""Most sign patterns that a permutation test looks at: all of them where there are fewer, a random sample otherwise."""
Scores = dict[str, dict[str, list[float]]]
"""Task to item to its scores, one a seed."""
Clusters = list[tuple[np.ndarray, np.ndarray]]
"""For each stratum the sums and the numbers of answers of its clusters, which are what is resampled."""


@dataclass(frozen=True)
class Estimate:
    """A mean with a 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int
    """Number of answers."""
    tasks: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference of two conditions, with a two-sided p from flipping the signs of whole clusters."""

    p: float
    one_sided_low: float
    """The mean is above this with 95 % confidence."""

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}], {p_text(self.p)}"

    @property
    def points(self) -> str:
        """Mean and interval in points of a hundred."""
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def p_text(p: float) -> str:
    """A p value as `p < 0.001` or `p = 0.012`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def clusters(scores: Scores, *, fixed_tasks: bool = False) -> Clusters:
    """What the bootstrap resamples.

    Several tasks stand for more tasks of their kind: tasks are drawn, each with all its answers, because answers of one
    task are not independent. A single task stands for its items: items are drawn, each with its answers under all
    seeds. With `fixed_tasks` the tasks are all there are, such as the ten benchmarks: items are drawn within each task.
    """
    if len(scores) > 1 and not fixed_tasks:
        sums = [sum(sum(values) for values in items.values()) for items in scores.values()]
        counts = [sum(len(values) for values in items.values()) for items in scores.values()]
        return [(np.array(sums), np.array(counts))]
    return [
        (np.array([sum(values) for values in items.values()]), np.array([len(values) for values in items.values()]))
        for items in scores.values()
    ]


def mean(scores: Scores, *, fixed_tasks: bool = False) -> float:
    """The mean of all answers, or with `fixed_tasks` the mean of the tasks' means."""
    return _mean(clusters(scores, fixed_tasks=fixed_tasks))


def size(scores: Scores) -> tuple[int, int]:
    """The number of answers and the number of tasks."""
    return sum(len(values) for items in scores.values() for values in items.values()), len(scores)


def estimate(scores: Scores, *, fixed_tasks: bool = False) -> Estimate:
    """Mean and interval of one condition.

    Args:
        scores: The condition's scores.
        fixed_tasks: Whether the tasks are all there are and count alike; otherwise answers count alike.
    """
    strata = clusters(scores, fixed_tasks=fixed_tasks)
    low, high = np.quantile(_resampled_means(strata), [0.025, 0.975])
    return Estimate(_mean(strata), float(low), float(high), *size(scores))


def share(part: Mapping[str, float], whole: Mapping[str, float]) -> Estimate:
    """The share of one sum over tasks in another, with an interval over tasks.

    Args:
        part: A number for each task, such as what a condition gains over the base.
        whole: A number for each of the same tasks, such as what there is to gain; they sum to more than 0.
    """
    strata = [(np.array(list(part.values())), np.array([whole[task] for task in part]))]
    low, high = np.quantile(_resampled_means(strata), [0.025, 0.975])
    return Estimate(_mean(strata), float(low), float(high), len(part), len(part))


def paired(one: Scores, other: Scores) -> Scores:
    """The difference of two conditions answer by answer, on the tasks that both have.

    Raises:
        DataError: if they share no task, or one lacks answers that the other has in a shared task.
    """
    shared = [task for task in one if task in other]
    if not shared:
        raise DataError("Conditions cannot be paired: they share no task")
    differences: Scores = {}
    for task in shared:
        left, right = one[task], other[task]
        if {i: len(v) for i, v in left.items()} != {i: len(v) for i, v in right.items()}:
            raise DataError(f"Conditions cannot be paired: of task {task} one holds answers that the other lacks")
        differences[task] = {
            item: [x - y for x, y in zip(values, right[item], strict=True)] for item, values in left.items()
        }
    return differences


def difference(one: Scores, other: Scores, *, fixed_tasks: bool = False) -> Difference:
    """Paired difference of two conditions over the tasks that both have; arguments and errors as above."""
    differences = paired(one, other)
    strata = clusters(differences, fixed_tasks=fixed_tasks)
    low, one_sided, high = np.quantile(_resampled_means(strata), [0.025, 0.05, 0.975])
    p = sign_flip_p(np.concatenate([sums / (counts.sum() * len(strata)) for sums, counts in strata]))
    return Difference(_mean(strata), float(low), float(high), *size(differences), p, float(one_sided))


def sign_flip_p(values: np.ndarray) -> float:
    """Two-sided p of a permutation test: were two conditions alike, each difference could have either sign."""
    different = values[values != 0]
    if len(different) < 2:  # either sign of a single one is as far from 0; scipy refuses it
        return 1.0
    test = scipy_stats().permutation_test(
        (different,),
        lambda x, axis: x.sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=SIGN_FLIPS,
        batch=1000,  # all patterns of thousands of items at once would not fit into memory
        rng=np.random.default_rng(1),
    )
    return float(test.pvalue)


def below(right: int, n: int, share: float) -> bool:
    """Whether `right` of `n` lies below a share: its exact 95 % interval (Clopper and Pearson) ends under it.

    A bootstrap's interval would be empty where no answer is right.
    """
    return bool(scipy_stats().binomtest(right, n).proportion_ci(0.95, method="exact").high < share)


def _resampled_means(strata: Clusters) -> np.ndarray:
    """Means under resampling; the mean of the strata's means where there are several."""
    means = np.zeros(DRAWS)
    for sums, counts in strata:
        if len(sums) == 1:  # nothing to draw from; scipy refuses it
            means += sums[0] / counts[0]
            continue
        result = scipy_stats().bootstrap(
            (sums, counts),
            # Numbers of answers are never 0; what there is to gain may be, in a resample.
            lambda s, c, axis: s.sum(axis) / np.maximum(c.sum(axis), 1e-9),
            paired=True,
            vectorized=True,
            n_resamples=DRAWS,
            method="percentile",
            # The same draws for all conditions of one size, so that they are compared on the same resamples.
            rng=np.random.default_rng(0),
        )
        means += result.bootstrap_distribution
    return means / len(strata)


def _mean(strata: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    return float(np.mean([sums.sum() / counts.sum() for sums, counts in strata]))


def scipy_stats() -> Any:
    """Imports `scipy.stats`.

    Raises:
        EvaluationError: if scipy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise EvaluationError("Intervals and tests need scipy: pip install 'text-to-lora[eval]'") from error
    return stats
