"""The hypernetwork's heads: features of every layer and target in, changes of A and B out.

L, M and S are those of Text-to-LoRA (arXiv 2506.06105), here and as the authors' checkpoints have them; `HeadBasis`
mixes adapters that all descriptions share. Their last matrices start at zero, so a fresh head changes nothing.

Knows tensors only. Shape letters as in `spec.py`; D is the head size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2l.config import HypernetConfig

Sizes = list[tuple[int, int]]
"""For each target I and O as a head writes them: I is 0 where A is not written."""
Changes = tuple[list[Tensor], list[Tensor]]
"""Changes of A (N, L, R, I) and of B (N, L, O, R), one of each for each target; none of A where it is not written."""


def feed_forward(width: int, dropout: float) -> list[nn.Module]:
    """The layers of the paper's MLP, with its SiLU after both matrices."""
    wide = 4 * width
    layers = [nn.Linear(width, wide), nn.SiLU(), nn.Dropout(dropout), nn.Linear(wide, width), nn.SiLU()]
    return [*layers, nn.Dropout(dropout)]


class Residual(nn.Module):
    """x + MLP(LayerNorm(x))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(*feed_forward(width, dropout))

    def forward(self, x: Tensor) -> Tensor:
        """(…, H) to (…, H)."""
        return x + self.mlp(self.norm(x))


class _Head(nn.Module):
    """What all heads share: the second residual block, the widening MLP, one zero-initialised matrix a target.

    Args:
        sizes: I and O of each target; I is 0 where A is not written.
        num_layers: L.
        rank: R.
        config: The hypernetwork's sizes.
    """

    in_turn = False
    """Whether A and B are written in turn, by one matrix that both share."""

    def __init__(self, sizes: Sizes, *, num_layers: int, rank: int, config: HypernetConfig) -> None:
        super().__init__()
        width = config.width
        self.sizes, self.num_layers, self.rank = sizes, num_layers, rank
        self.block = Residual(width, config.dropout)
        self.widen = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(4 * width, config.head_size),
            nn.SiLU(),
        )
        self.write = nn.ModuleList(nn.Linear(config.head_size, self.outputs(i, o), bias=False) for i, o in sizes)
        for linear in self.write:
            nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
        self.write_parts = self.in_turn and any(i for i, _ in sizes)
        if self.write_parts:
            # Tells A from B; one vector a target and part, normalised like the depth and type embeddings.
            self.part_a = nn.Parameter(torch.randn(len(sizes), width))
            self.part_b = nn.Parameter(torch.randn(len(sizes), width))
            self.part_norm = nn.LayerNorm(width)

    def outputs(self, i: int, o: int) -> int:
        """Output size of the matrix of a target with I and O."""
        return self.rank * (i + o)

    def features(self, x: Tensor) -> Tensor:
        """(N, …, H) to (N, …, D)."""
        features: Tensor = self.widen(self.block(x))
        return features

    def parts(self, features_NLMH: Tensor) -> Tensor:
        """(N, L, M, H) to (N, L, M, P, H): the features marked as A's and as B's; P is 1 where B alone is written."""
        if not self.write_parts:
            return features_NLMH[:, :, :, None]
        part_M2H = self.part_norm(torch.stack([self.part_a, self.part_b], dim=1))
        return features_NLMH[:, :, :, None] + part_M2H

    def split(self, written: Sequence[Tensor]) -> Changes:
        """What is written of A and B together, (N, L, R·(I + O)) for each target, as changes of each."""
        change_a, change_b = [], []
        for flat, (i, o) in zip(written, self.sizes, strict=True):
            a, b = flat.split([self.rank * i, self.rank * o], dim=-1)
            if i:
                change_a.append(a.unflatten(-1, (self.rank, i)))
            change_b.append(b.unflatten(-1, (o, self.rank)))
        return change_a, change_b

    def written(self, x: Tensor, m: int, part: int, number: int) -> Tensor:
        """The first numbers that target m's shared matrix writes for a part, (N, L, …, number): no others are computed.

        Args:
            x: Features of all targets and parts, (N, L, M, P, …, D).
            m: The target.
            part: 0 for A, -1 for B.
            number: How many numbers the part has.
        """
        # Contiguous: a matrix that meets a view is repeated for every row of it, which took ten times as long.
        return F.linear(x[:, :, m, part].contiguous(), self.write[m].weight[:number])  # type: ignore[index]

    def cut(self, written: Sequence[Tensor]) -> Changes:
        """What is written of A and of B, (N, L, P, R, max(I, O)) for each target, cut to each part's size."""
        change_a = [parts[:, :, 0, :, :i] for parts, (i, _) in zip(written, self.sizes, strict=True) if i]
        change_b = [parts[:, :, -1, :, :o].mT for parts, (_, o) in zip(written, self.sizes, strict=True)]
        return change_a, change_b


class HeadL(_Head):
    """A and B of a target and layer from one matrix: (D → R·(I + O))."""

    def forward(self, features_NLMH: Tensor) -> Changes:
        """Features to changes of A and B."""
        x_NLMD = self.features(features_NLMH)
        return self.split([matrix(x_NLMD[:, :, m]) for m, matrix in enumerate(self.write)])


class HeadM(_Head):
    """A and B in turn from one shared matrix, cut to size: (D → R·max(I, O))."""

    in_turn = True

    def outputs(self, i: int, o: int) -> int:
        """As of all heads."""
        return self.rank * max(i, o)

    def forward(self, features_NLMH: Tensor) -> Changes:
        """Features to changes of A and B."""
        x_NLMPD = self.features(self.parts(features_NLMH))
        change_a, change_b = [], []
        for m, (i, o) in enumerate(self.sizes):
            if i:
                change_a.append(self.written(x_NLMPD, m, 0, self.rank * i).unflatten(-1, (self.rank, i)))
            change_b.append(self.written(x_NLMPD, m, -1, self.rank * o).unflatten(-1, (o, self.rank)))
        return change_a, change_b


class HeadS(_Head):
    """One rank of A or of B at a time from one shared matrix, cut to size: (D → max(I, O))."""

    in_turn = True
    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Sizes, *, num_layers: int, rank: int, config: HypernetConfig) -> None:
        super().__init__(sizes, num_layers=num_layers, rank=rank, config=config)
        cos, sin = _rotary(rank, config.width)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def outputs(self, i: int, o: int) -> int:
        """As of all heads."""
        return max(i, o)

    def forward(self, features_NLMH: Tensor) -> Changes:
        """Features to changes of A and B."""
        x = self.parts(features_NLMH)[..., None, :]  # (N, L, M, P, 1, H), turned by the rank's angle below
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.cat([even * self.cos - odd * self.sin, even * self.sin + odd * self.cos], dim=-1)
        x_NLMPRD = self.features(turned)
        change_a = [self.written(x_NLMPRD, m, 0, i) for m, (i, _) in enumerate(self.sizes) if i]
        change_b = [self.written(x_NLMPRD, m, -1, o).mT for m, (_, o) in enumerate(self.sizes)]
        return change_a, change_b


class PublishedHeadM(HeadM):
    """M as the authors' checkpoints have it: every rank has a stretch of max(I, O) numbers, and both parts are cut off
    its beginning. (`HeadM` takes the first R·I and R·O numbers, which leaves no gaps.)"""

    def forward(self, features_NLMH: Tensor) -> Changes:
        """Features to changes of A and B."""
        x_NLMPD = self.features(self.parts(features_NLMH))
        # Contiguous: a matrix that meets a view is repeated for every row of it, which took ten times as long.
        rows = [x.contiguous() for x in x_NLMPD.unbind(2)]
        written = [matrix(x).unflatten(-1, (self.rank, -1)) for matrix, x in zip(self.write, rows, strict=True)]
        return self.cut(written)


class PublishedHeadS(HeadS):
    """S as the authors' checkpoints have it: the second residual block runs before a rank's angle turns the features,
    and once more after it, and the angle turns number i of the first half with number i of the second."""

    def forward(self, features_NLMH: Tensor) -> Changes:
        """Features to changes of A and B."""
        x = self.block(self.parts(features_NLMH))[..., None, :]
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1)
        x_NLMPRD = self.features(turned)
        return self.cut([matrix(x_NLMPRD[:, :, m]) for m, matrix in enumerate(self.write)])


class HeadBasis(_Head):
    """Mixtures of D adapters that all descriptions share: one matrix a target for all layers, (D → L·R·(I + O)).

    Not the paper's: a description chooses D numbers in all, where L's choose as many for every layer and target, so the
    trunk hands over one place in all. Of the ways to write N adapters from so few numbers, principal components lose
    least, see `t2l.train.reconstruction`.
    """

    def __init__(self, sizes: Sizes, *, num_layers: int, rank: int, config: HypernetConfig) -> None:
        super().__init__(sizes, num_layers=num_layers, rank=rank, config=config)
        self.widen = nn.Sequential(*list(self.widen)[:-1])  # shares of a mixture have either sign

    def outputs(self, i: int, o: int) -> int:
        """As of all heads."""
        return self.num_layers * self.rank * (i + o)

    def forward(self, features_NLMH: Tensor) -> Changes:
        """Features (N, 1, 1, H), of the description as a whole, to changes of A and B."""
        shares_ND = self.shares(features_NLMH)
        return self.split([matrix(shares_ND).unflatten(-1, (self.num_layers, -1)) for matrix in self.write])

    def shares(self, features_NLMH: Tensor) -> Tensor:
        """Features to how much of each of the D adapters goes into the mixture, (N, D)."""
        return self.features(features_NLMH[:, 0, 0])

    def basis(self) -> Changes:
        """The D adapters: changes of A (D, L, R, I), none where it is not written, and of B (D, L, O, R)."""
        flat = [matrix.weight.mT for matrix in self.write]
        return self.split([x.unflatten(-1, (self.num_layers, -1)) for x in flat])  # type: ignore[operator]

    @torch.no_grad()
    def set_basis(self, change_a: Sequence[Tensor], change_b: Sequence[Tensor]) -> None:
        """Makes the D adapters these ones: A (D, L, R, I), none where it is not written, and B (D, L, O, R)."""
        parts_a = change_a or [b.new_zeros(*b.shape[:2], 0) for b in change_b]
        for matrix, a, b in zip(self.write, parts_a, change_b, strict=True):
            flat = torch.cat([a.flatten(2), b.flatten(2)], dim=-1).flatten(1)
            matrix.weight.copy_(flat.mT)  # type: ignore[operator]


HEADS: dict[str, type[HeadL | HeadM | HeadS | HeadBasis]] = {
    "L": HeadL,
    "M": HeadM,
    "S": HeadS,
    "basis": HeadBasis,
    "published-M": PublishedHeadM,
    "published-S": PublishedHeadS,
}


def _rotary(positions: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (positions, width / 2) of rotary position embedding (arXiv 2104.09864)."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(positions)[:, None] * frequency
    return angle.cos(), angle.sin()
