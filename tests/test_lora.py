"""Arithmetic of adapters: averages and scaling change ΔW as they say they do."""

import pytest
import torch

from t2l.errors import SpecMismatchError
from t2l.lora import LoraTensors, interpolate, merge, trust

SIZES = ((12, 20), (30, 7))  # (I, O) of each target
LAYERS = 3


def make(rank: int, *, scaling: float = 2.0, batch: tuple[int, ...] = ()) -> LoraTensors:
    return LoraTensors(
        tuple(torch.randn(*batch, LAYERS, rank, i) for i, _ in SIZES),
        tuple(torch.randn(*batch, LAYERS, o, rank) for _, o in SIZES),
        scaling,
    )


def deltas(lora: LoraTensors) -> list[torch.Tensor]:
    return [lora.delta(m) for m in range(len(SIZES))]


def mean_deltas(adapters: list[LoraTensors]) -> list[torch.Tensor]:
    return [torch.stack(list(of_target)).mean(0) for of_target in zip(*map(deltas, adapters), strict=True)]


@pytest.mark.parametrize("batch", [(), (4,)])
def test_merging_is_the_mean_where_the_rank_is_enough(batch: tuple[int, ...]) -> None:
    """Of adapters with other ranks and scalings, and where the sum of ranks exceeds a target's sizes."""
    adapters = [make(4, batch=batch), make(2, scaling=0.5, batch=batch), make(5, scaling=1.0, batch=batch)]
    merged = merge(adapters, 11)
    assert merged.scaling == 2.0
    assert [tuple(x.shape) for x in merged.a] == [(*batch, LAYERS, 11, i) for i, _ in SIZES]
    assert [tuple(x.shape) for x in merged.b] == [(*batch, LAYERS, o, 11) for _, o in SIZES]
    for found, expected in zip(deltas(merged), mean_deltas(adapters), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_merging_cuts_as_little_as_the_rank_allows() -> None:
    """What is lost is the rest of the singular values, which no matrix of that rank can better."""
    adapters = [make(3) for _ in range(4)]
    for rank in (1, 3, 6):
        for found, expected in zip(deltas(merge(adapters, rank)), mean_deltas(adapters), strict=True):
            rest = torch.linalg.svdvals(expected)[:, rank:].square().sum(-1).sqrt()
            torch.testing.assert_close((found - expected).norm(dim=(-2, -1)), rest, atol=1e-3, rtol=1e-3)
            assert torch.linalg.matrix_rank(found, atol=1e-3).max() <= rank


def test_merging_equal_adapters_changes_nothing_and_order_does_not_matter() -> None:
    one, two, three = make(3), make(3), make(3)
    for found, expected in zip(deltas(merge([one] * 5, 3)), deltas(one), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for found, expected in zip(deltas(merge([one, two, three], 4)), deltas(merge([three, one, two], 4)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_merging_keeps_type_and_zero() -> None:
    zero = make(3).map(torch.zeros_like)
    merged = merge([zero.map(torch.Tensor.bfloat16), zero.map(torch.Tensor.bfloat16)], 5)
    assert {x.dtype for x in (*merged.a, *merged.b)} == {torch.bfloat16}
    assert all(torch.equal(x, torch.zeros_like(x)) for x in deltas(merged))


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(SpecMismatchError, match="got 0 and 2"):
        merge([], 2)
    with pytest.raises(SpecMismatchError, match="got 1 and 0"):
        merge([make(2)], 0)
    with pytest.raises(SpecMismatchError, match="Adapter 1 has targets"):
        merge([make(2), make(2, batch=(2,))], 2)


def test_interpolation_starts_at_one_and_ends_at_the_other() -> None:
    start, end = make(2), make(2, batch=(3,))
    mixed = interpolate(start, end, torch.tensor([0.0, 1.0, 0.5])).unbind()
    for part in ("a", "b"):
        for m in range(len(SIZES)):
            one, other = getattr(start, part)[m], getattr(end, part)[m]
            assert torch.equal(getattr(mixed[0], part)[m], one)
            assert torch.equal(getattr(mixed[1], part)[m], other[1])
            torch.testing.assert_close(getattr(mixed[2], part)[m], (one + other[2]) / 2)
    with pytest.raises(SpecMismatchError, match="one shape and scaling"):
        interpolate(make(3), end, torch.ones(3))
    with pytest.raises(SpecMismatchError, match=r"scalings 1\.0 and 2\.0"):
        interpolate(make(2, scaling=1.0), end, torch.ones(3))


def test_trust_falls_with_the_distance_of_the_nearest() -> None:
    known = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    angles = torch.tensor([0.0, 30.0, 45.0, 90.0, 180.0]).deg2rad()
    texts = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [9.0], [0.1], [2.0], [1.0]])
    nearest = torch.tensor([1.0, 0.75**0.5, 0.5**0.5, 1.0, 0.0])
    torch.testing.assert_close(trust(texts, known, low=0.0, high=1.0), nearest)
    torch.testing.assert_close(trust(texts, known, low=0.75, high=0.85), torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]))
