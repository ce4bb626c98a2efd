"""LoraTensors: the A and B of one adapter, or of a batch of them, stacked over layers.

Knows shapes and arithmetic. Knows no module names (position m is target m of an AdapterSpec) and no files.
Shape letters as in `spec.py`; `…` is N for a batch and nothing for a single adapter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoraTensors:
    """Low-rank updates ΔW = scaling · B · A for M targets in L layers."""

    a: tuple[Tensor, ...]
    """For each target, (…, L, R, I)."""
    b: tuple[Tensor, ...]
    """For each target, (…, L, O, R)."""
    scaling: float

    @property
    def batch_size(self) -> int | None:
        """N, or None for a single adapter."""
        return self.a[0].shape[0] if self.a[0].dim() == 4 else None

    @property
    def shares_a(self) -> bool:
        """Whether all adapters of a batch have the same A."""
        return all(bool((a == a[:1]).all()) for a in self.a)

    def map(self, function: Callable[[Tensor], Tensor]) -> "LoraTensors":
        """The same adapter with every tensor passed through `function`."""
        return LoraTensors(tuple(map(function, self.a)), tuple(map(function, self.b)), self.scaling)

    def of_targets(self, places: Sequence[int]) -> "LoraTensors":
        """The same with the targets at `places`, in that order."""
        return LoraTensors(tuple(self.a[m] for m in places), tuple(self.b[m] for m in places), self.scaling)

    def unbind(self) -> list["LoraTensors"]:
        """A batch as N single adapters (views)."""
        assert self.batch_size is not None, "only a batch of adapters can be unbound"
        # One call a tensor: indexing each adapter's part costs many times as much.
        parts = zip(
            zip(*map(torch.unbind, self.a), strict=True), zip(*map(torch.unbind, self.b), strict=True), strict=True
        )
        return [LoraTensors(a, b, self.scaling) for a, b in parts]

    @staticmethod
    def stack(adapters: Sequence["LoraTensors"]) -> "LoraTensors":
        """N single adapters of one shape as a batch."""
        first = adapters[0]
        assert all(x.scaling == first.scaling for x in adapters), "adapters of one batch share their scaling"
        return LoraTensors(
            tuple(torch.stack([x.a[m] for x in adapters]) for m in range(len(first.a))),
            tuple(torch.stack([x.b[m] for x in adapters]) for m in range(len(first.b))),
            first.scaling,
        )

    def select(self, rows: Tensor) -> "LoraTensors":
        """The batch's adapters at `rows` (B,), with repeats: one adapter per sequence."""
        return self.map(lambda x: x.index_select(0, rows))

    def delta(self, m: int) -> Tensor:
        """Dense weight update of target m: (…, L, O, I). For tests and statistics; never on a hot path."""
        return self.scaling * (self.b[m] @ self.a[m])

    def norms(self) -> list[Tensor]:
        """Frobenius norm of ΔW for each target, (…, L), from R×R products only.

        ‖BA‖² = trace(AᵀBᵀBA) = sum((BᵀB) ∘ (AAᵀ)), so nothing of size O×I is built.
        """
        grams = [(b.mT @ b) * (a @ a.mT) for a, b in zip(self.a, self.b, strict=True)]
        return [self.scaling * g.sum((-2, -1)).clamp_min(0).sqrt() for g in grams]

    def total_norms(self) -> Tensor:
        """Frobenius norm of all weight updates together, (…,), computed in float32."""
        squares = [norm.square().sum(-1) for norm in self.map(Tensor.float).norms()]
        return torch.stack(squares).sum(0).sqrt()

    def inner(self, other: "LoraTensors") -> list[Tensor]:
        """Frobenius inner product of ΔW with another adapter's for each target, (…, L).

        ⟨BA, B'A'⟩ = trace(AᵀBᵀB'A') = sum((BᵀB') ∘ (AA'ᵀ)).
        """
        factor = self.scaling * other.scaling
        return [
            factor * ((b.mT @ other_b) * (a @ other_a.mT)).sum((-2, -1))
            for a, b, other_a, other_b in zip(self.a, self.b, other.a, other.b, strict=True)
        ]

    def squared_distances(self, other: "LoraTensors") -> list[Tensor]:
        """‖ΔW - ΔW'‖² for each target, (…, L), of adapters with one scaling.

        BA - B'A' = (B - B')A + B'(A - A') is one product of rank 2R. Its norm by `norms`' identity stays exact for
        adapters that are almost equal, where ‖BA‖² - 2⟨BA, B'A'⟩ + ‖B'A'‖² would leave nothing but rounding.
        """
        assert self.scaling == other.scaling, "distances are between adapters with one scaling"
        found = []
        for a, b, other_a, other_b in zip(self.a, self.b, other.a, other.b, strict=True):
            left, right = torch.cat([b - other_b, other_b], dim=-1), torch.cat([a, a - other_a], dim=-2)
            gram = (left.mT @ left) * (right @ right.mT)
            found.append(self.scaling**2 * gram.sum((-2, -1)).clamp_min(0))
        return found
