"""What reconstruction trains towards: a library's adapters as z-scores, the losses, and the errors that are reported.

The paper's loss (arXiv 2506.06105, section 3.2) is L1 on A and B, each element z-scored over the library. A loss on
ΔW = B·A comes on top or in its place, without building a dense ΔW. Knows tensors and the hypernetwork. Knows no
files, no descriptions and no optimiser. Shape letters as in `spec.py`; N adapters of the library, n of a step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from t2l.config import NotNegative, check_ranges
from t2l.errors import ConfigError, DataError
from t2l.heads import HeadBasis
from t2l.hypernet import Hypernet
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec


@dataclass(frozen=True, kw_only=True)
class ReconstructionLossConfig:
    """Weights of the losses; at least one must be positive."""

    factors: NotNegative = 1.0
    """Mean absolute difference of z-scored A and B (the paper's)."""
    squares: NotNegative = 0.0
    """Squared Frobenius distance of ΔW and its target, over its mean for the library's mean adapter: the share of the
    adapters' variance that is lost."""

    def __post_init__(self) -> None:
        check_ranges(self, "loss")
        if not (self.factors or self.squares):
            raise ConfigError("loss: all weights are 0; give factors or squares one above 0")


# ------------------------------------------------------------------------------------------------ the targets


@dataclass(frozen=True)
class Targets:
    """The library on the device, and what undoes its scaling."""

    names: tuple[str, ...]
    z: LoraTensors
    """z-scored over the N adapters, element by element: A (N, L, R, I), B (N, L, O, R); A only where it is written."""
    mean: LoraTensors
    """A single adapter."""
    deviation: LoraTensors
    """Standard deviations, of what has z-scores; 0 where all adapters agree, whose z is 0 too."""
    variance: Tensor
    """Mean over the adapters of their ΔW's squared distance from the mean adapter's, over all layers and targets."""

    def adapters(self, index_n: Tensor) -> LoraTensors:
        """Adapters by their positions, as they are in the library."""
        return self.restore([x[index_n] for x in self.z.a], [x[index_n] for x in self.z.b])

    def restore(self, z_a: Sequence[Tensor], z_b: Sequence[Tensor]) -> LoraTensors:
        """Adapters (n of them) from their z-scores."""
        mean, unit = self.mean, self.deviation
        shared_a = tuple(m.expand(len(z_b[0]), *m.shape) for m in mean.a)
        return LoraTensors(
            tuple(m + u * z for m, u, z in zip(mean.a, unit.a, z_a, strict=True)) if z_a else shared_a,
            tuple(m + u * z for m, u, z in zip(mean.b, unit.b, z_b, strict=True)),
            mean.scaling,
        )


def require_shared_a(lora: LoraTensors, spec: AdapterSpec) -> None:
    """Checks that a batch of adapters can be written by its B alone.

    Raises:
        DataError: if A differs, naming the target where it does most and by how much.
    """
    if lora.shares_a:
        return
    apart = [float((a - a[:1]).abs().max() / a.abs().max().clamp_min(1e-30)) for a in lora.a]
    worst = max(range(len(apart)), key=apart.__getitem__)
    raise DataError(
        f"hypernet.freeze_a is true, but the adapters' A differ: those of {spec.targets[worst].name} by up to "
        f"{apart[worst]:.2g} of its largest element. Train the library with train.freeze_a true, or leave freeze_a out"
    )


def make_targets(
    lora: LoraTensors,
    names: Sequence[str],
    *,
    device: torch.device,
    freeze_a: bool = False,
) -> Targets:
    """Puts a batch of N adapters on the device and z-scores what is to be written of it."""
    lora = lora.map(lambda x: x.to(device))
    # Where all agree, exactly what they agree on: a mean is rounded.
    mean = lora.map(lambda x: torch.where((x == x[0]).all(0), x[0], x.mean(0)))

    def deviation_of(x: Tensor) -> Tensor:
        # Elements on which all agree up to rounding are constants.
        d = x.std(0, correction=0)
        return torch.where(d > 1e-6 * x.abs().amax(0), d, 0.0)

    deviation = lora.map(deviation_of)

    def z_score(values: Sequence[Tensor], means: Sequence[Tensor], devs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            torch.where(d > 0, (x - m) / torch.where(d > 0, d, 1.0), 0.0)
            for x, m, d in zip(values, means, devs, strict=True)
        )

    middle = mean.map(lambda x: x.expand(len(names), *x.shape))
    variance = torch.stack([x.sum(-1).mean() for x in lora.squared_distances(middle)]).sum()
    z = LoraTensors(z_score(lora.a, mean.a, deviation.a), z_score(lora.b, mean.b, deviation.b), lora.scaling)
    if freeze_a:
        z, deviation = (LoraTensors((), x.b, x.scaling) for x in (z, deviation))
    return Targets(tuple(names), z, mean, deviation, variance.clamp_min(1e-30))


def products(b: Sequence[Tensor], a: Sequence[Tensor]) -> Iterator[Tensor]:
    """B (N, L, O, R), so transformed that its inner products are those of ΔW = BA, for one A (L, R, I); in float64.

    ⟨BA, B'A⟩ = ⟨BRᵀ, B'Rᵀ⟩ for Aᵀ = QR. One target at a time, since they are large.
    """
    for each_b, one_a in zip(b, a, strict=True):
        yield each_b.double() @ torch.linalg.qr(one_a.mT.double(), mode="r").R.mT


def principal_directions(lora: LoraTensors, number: int) -> Tensor:
    """How N adapters share their first principal components: orthonormal columns (N, number), float64.

    Of all ways to write N adapters as mixtures of `number` tensors of an adapter's size and their mean, the one with
    the least squared error is the mean plus each adapter's projection on these. The error is that of ΔW where all
    adapters have one A, otherwise that of A and B.
    """
    parts = products(lora.b, [a[0] for a in lora.a]) if lora.shares_a else iter((*lora.a, *lora.b))
    centred = ((x - x.mean(0)).flatten(1).double() for x in parts)
    _, vectors = torch.linalg.eigh(torch.stack([x @ x.mT for x in centred]).sum(0))  # the largest come last
    return vectors[:, vectors.shape[1] - number :].flip(1)


def components(targets: Targets, number: int) -> LoraTensors:
    """The library's first principal components, in z-scores; shares of them in the adapters have mean square 1."""
    unit = targets.deviation
    number_of_all = len(targets.names)
    raw = LoraTensors(
        tuple(z * u for z, u in zip(targets.z.a, unit.a, strict=True))
        or tuple(m.expand(number_of_all, *m.shape) for m in targets.mean.a),
        tuple(z * u for z, u in zip(targets.z.b, unit.b, strict=True)),
        targets.z.scaling,
    )
    shares = principal_directions(raw, number) / number_of_all**0.5
    return targets.z.map(lambda z: torch.einsum("nk,n...->k...", shares.to(z.dtype), z))


# ------------------------------------------------------------------------------------------------- the losses


def reconstruction_losses(
    hypernet: Hypernet, targets: Targets, config: ReconstructionLossConfig
) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    """The function that is compiled: encoded descriptions and the positions of their adapters, (n,), to the loss."""
    assert hypernet.trunk is not None and hypernet.head is not None
    trunk, head = hypernet.trunk, hypernet.head
    if isinstance(head, HeadBasis) and not targets.z.a and not config.factors:
        return share_loss(trunk, head, targets, config.squares)

    def function(states: Tensor, mask: Tensor | None, index_n: Tensor) -> Tensor:
        z_a, z_b = head(trunk(states, mask))
        total = torch.zeros((), device=index_n.device)
        if config.factors:
            total = total + config.factors * factor_loss([*z_a, *z_b], [*targets.z.a, *targets.z.b], index_n)
        if config.squares:
            written, wanted = targets.restore(z_a, z_b), targets.adapters(index_n)
            total = total + config.squares * square_loss(written, wanted, targets.variance)
        return total

    return function


def factor_loss(written: Sequence[Tensor], targets: Sequence[Tensor], index_n: Tensor) -> Tensor:
    """Mean absolute difference over all elements of A and B of all targets (arXiv 2506.06105, equation 4)."""
    total = sum((x - t[index_n]).abs().sum() for x, t in zip(written, targets, strict=True))
    assert isinstance(total, Tensor)
    return total / sum(x.numel() for x in written)


def square_loss(written: LoraTensors, wanted: LoraTensors, variance: Tensor) -> Tensor:
    """Squared distance of ΔW and its target over all layers and targets, over `variance`; the mean over adapters."""
    return torch.stack([x.sum(-1).mean() for x in written.squared_distances(wanted)]).sum() / variance


def share_loss(
    trunk: nn.Module, head: HeadBasis, targets: Targets, weight: float
) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    """`square_loss` of mixtures of fixed adapters that share A, from the shares alone: no adapter is written for it.

    ΔW is then linear in the shares, so with C the mixed adapters, s the shares, and s' those of the nearest mixture,
    ‖ΔW - ΔW'‖² = (s - s')CCᵀ(s - s')ᵀ + what no mixture reaches.
    """

    def flat(z_b: Sequence[Tensor]) -> Tensor:
        changes = [z * u for z, u in zip(z_b, targets.deviation.b, strict=True)]
        return targets.mean.scaling * torch.cat([x.flatten(1) for x in products(changes, targets.mean.a)], dim=1)

    with torch.no_grad():
        mixed = flat(head.basis()[1])
        wanted = flat(targets.z.b)
        gram, inner = mixed @ mixed.mT, mixed @ wanted.mT
        nearest = torch.linalg.pinv(gram, hermitian=True) @ inner  # equal adapters make components of no size
        rest_N = (wanted.square().sum(1) - (nearest * inner).sum(0)) / targets.variance
        shares_ND, gram = nearest.mT.float(), (gram / targets.variance).float()

    def function(states: Tensor, mask: Tensor | None, index_n: Tensor) -> Tensor:
        apart_nD = head.shares(trunk(states, mask)) - shares_ND[index_n]
        return weight * (((apart_nD @ gram) * apart_nD).sum(1) + rest_N[index_n]).mean()

    return function


# ------------------------------------------------------------------------------------------- what it is worth


@dataclass(frozen=True)
class AdapterErrors:
    """How far written adapters are from their targets, one number an adapter, over all its layers and targets."""

    relative: list[float]
    """‖ΔW - ΔW'‖ / ‖ΔW'‖ (Frobenius); 1 is as far as writing zeros."""
    cosine: list[float]
    """Of ΔW and ΔW', all of it as one vector."""
    element_l1: list[float]
    """Mean absolute difference of the elements of A and B, the paper's measure."""

    def means(self) -> dict[str, float]:
        """Over the adapters."""
        return {name: float(np.mean(values)) for name, values in vars(self).items()}


def compare(written: LoraTensors, wanted: LoraTensors) -> AdapterErrors:
    """Errors of a batch of N adapters, in float64."""
    written, wanted = (x.map(Tensor.double) for x in (written, wanted))
    distance = torch.stack([x.sum(-1) for x in written.squared_distances(wanted)]).sum(0)
    mine, theirs = (torch.stack([x.square().sum(-1) for x in lora.norms()]).sum(0) for lora in (written, wanted))
    inner = torch.stack([x.sum(-1) for x in written.inner(wanted)]).sum(0)
    pairs = list(zip((*written.a, *written.b), (*wanted.a, *wanted.b), strict=True))
    l1 = sum((x - y).abs().flatten(1).sum(1) for x, y in pairs)
    assert isinstance(l1, Tensor)
    tiny = torch.finfo(torch.float64).tiny
    return AdapterErrors(
        relative=(distance / theirs.clamp_min(tiny)).sqrt().tolist(),
        cosine=(inner / (mine * theirs).sqrt().clamp_min(tiny)).tolist(),
        element_l1=(l1 / sum(x[0].numel() for x, _ in pairs)).tolist(),
    )
