"""Arithmetic of adapters: scaling and interpolation change ΔW as they say they do."""

import pytest
import torch

from t2l.errors import SpecMismatchError
from t2l.lora import LoraTensors, interpolate, trust

SIZES = ((12, 20), (30, 7))  # (I, O) of each target
LAYERS = 3


def make(rank: int, *, scaling: float = 2.0, batch: tuple[int, ...] = ()) -> LoraTensors:
    return LoraTensors(
        tuple(torch.randn(*batch, LAYERS, rank, i) for i, _ in SIZES),
        tuple(torch.randn(*batch, LAYERS, o, rank) for _, o in SIZES),
        scaling,
    )


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
