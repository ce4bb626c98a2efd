"""Reconstruction: a hypernetwork that writes the adapters of a library from their descriptions.

    description ─ frozen encoder (cached) ─▶ hypernetwork ─▶ A, B against the library's, all of it on the device

Complete in this file: settings, targets, losses, the step, the loop, saving and resuming. After section 3.2 of
Text-to-LoRA (arXiv 2506.06105): L1 on A and B, each element z-scored over the library. The library's mean is the
hypernetwork's shared LoRA and the standard deviations its `output_std`, both saved with the weights, so what a
checkpoint writes is a plain LoRA. Losses on ΔW = B·A come on top or in place of it; none of them builds a dense ΔW.
Shape letters as in `spec.py`; N adapters of the library, n of a step.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from t2l.checkpoint import CheckpointConfig, save_checkpoint
from t2l.config import EncoderConfig, HypernetConfig, PromptConfig, to_plain
from t2l.encoder import Encoded, Encoder, OneHotEncoder, encoder_revision, load_encoder
from t2l.errors import ConfigError, DataError, TrainingError
from t2l.hypernet import HeadBasis, Hypernet
from t2l.library import AdapterLibrary
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.tasks import Task, held_out_descriptions, require_trainable
from t2l.train.embeddings import EmbeddingCache
from t2l.train.running import schedule, versions
from t2l.train.state import Progress, begin_run, first_step, load_state, save_state
from t2l.train.watch import Watch, memory_gb


@dataclass(frozen=True, kw_only=True)
class ReconDataConfig:
    """What is reconstructed, and from what."""

    library: str
    """Folder of an adapter library."""
    adapters: tuple[str, ...] = ()
    """Only these of it; empty means all."""
    descriptions: int = 0
    """How many descriptions of each task are trained on, the first ones; 0 means all that are not held out."""
    held_out_descriptions: int = 4
    """Descriptions of each task that are kept for judging, where it has enough of them."""
    canonical: bool = False
    """Replaces A and B by the canonical factors of the same ΔW (singular value decomposition), for adapters that do
    not share a start."""


@dataclass(frozen=True, kw_only=True)
class ReconLossConfig:
    """Weights of the losses; at least one must be positive."""

    factors: float = 1.0
    """Mean absolute difference of z-scored A and B (the paper's)."""
    delta: float = 0.0
    """Mean absolute difference of ΔW's entries, over the library's mean absolute entry (the paper's other loss, scaled
    by the library in place of 10,000); estimated without bias from random columns."""
    squares: float = 0.0
    """Squared Frobenius distance of ΔW and its target, over its mean for the library's mean adapter: the share of the
    adapters' variance that is lost."""
    angular: float = 0.0
    """1 - cosine of ΔW and its target, for each layer and module."""
    spectral: float = 0.0
    """Squared difference of ΔW's singular values and its target's, over the target's."""
    columns: int = 16
    """Columns of ΔW that `delta` looks at in a step, for each module."""

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("factors", "delta", "squares", "angular", "spectral")}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ConfigError(f"loss: weights must not be negative, and one must be positive; got {weights}")
        if self.columns < 1:
            raise ConfigError(f"loss.columns must be at least 1, got {self.columns}")

    @property
    def needs_product(self) -> bool:
        """Whether any loss looks at ΔW."""
        return bool(self.delta or self.squares or self.angular or self.spectral)

    @property
    def only_squares(self) -> bool:
        """Whether `squares` is the only loss."""
        return not (self.factors or self.delta or self.angular or self.spectral)


@dataclass(frozen=True, kw_only=True)
class ReconTrainConfig:
    """How it is trained."""

    steps: int
    adapters_per_step: int = 32
    """n; with fewer adapters in the library, each step has all of them."""
    learning_rate: float = 1e-3
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls linearly to zero."""
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    compile: bool = False
    """Compile the step: a minute at the start, then faster on a GPU."""
    log_every: int = 200
    evaluate_every: int = 2000
    save_every: int = 10000
    tensorboard: bool = True
    """Write TensorBoard files too, if it is installed."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Report to this tracker too."""

    def __post_init__(self) -> None:
        for name in ("steps", "adapters_per_step", "log_every", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"train.warmup must be in [0, 1], got {self.warmup}")


@dataclass(frozen=True, kw_only=True)
class ReconConfig:
    """One run of `t2l train recon`."""

    seed: int = 0
    encoder: EncoderConfig
    hypernet: HypernetConfig = field(default_factory=lambda: HypernetConfig(dropout=0.0, token_dropout=0.0))
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """How the adapters' users render prompts: as the adapters were trained."""
    data: ReconDataConfig
    loss: ReconLossConfig = field(default_factory=ReconLossConfig)
    train: ReconTrainConfig

    def __post_init__(self) -> None:
        if self.hypernet.variant == "none":
            raise ConfigError("hypernet.variant 'none' reads no description and cannot tell adapters apart")
        for name in ("codebook", "pointer", "normalize_inputs"):
            if getattr(self.hypernet, name) != getattr(HypernetConfig(), name):
                raise ConfigError(f"hypernet.{name} has no place in reconstruction; leave it out")
        if self.data.canonical and self.hypernet.freeze_a:
            raise ConfigError(
                "data.canonical gives each adapter an A of its own, which hypernet.freeze_a leaves nobody to write"
            )
        if self.encoder.names:
            raise ConfigError("encoder.names is filled in by training; leave it out")

    @property
    def conditioning(self) -> Literal["description", "task"]:
        """What the hypernetwork reads, see `t2l.checkpoint.CheckpointConfig.conditioning`."""
        return "task" if self.encoder.kind == "onehot" else "description"


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
    size: tuple[Tensor, ...]
    """For each target the mean absolute entry of ΔW, over layers and adapters, as its columns show it."""
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
        f"{apart[worst]:.2g} of its largest element. Train the library with train.train_a false, or leave freeze_a out"
    )


def make_targets(
    lora: LoraTensors,
    names: Sequence[str],
    *,
    canonical: bool,
    device: torch.device,
    freeze_a: bool = False,
) -> Targets:
    """Puts a batch of N adapters on the device and z-scores what is to be written of it."""
    lora = lora.map(lambda x: x.to(device))
    if canonical:
        # A chunk at a time: float64 doubles the size.
        chunks = torch.arange(len(names), device=device).split(16)
        parts = [lora.select(chunk).canonical() for chunk in chunks]
        lora = LoraTensors(
            tuple(torch.cat([part.a[m] for part in parts]) for m in range(len(lora.a))),
            tuple(torch.cat([part.b[m] for part in parts]) for m in range(len(lora.b))),
            lora.scaling,
        )
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

    size = []
    for a, b in zip(lora.a, lora.b, strict=True):
        every = max(1, a.shape[-1] // 16)
        size.append(torch.stack([(y @ x[..., ::every]).abs().mean() for x, y in zip(a, b, strict=True)]).mean())
    middle = mean.map(lambda x: x.expand(len(names), *x.shape))
    variance = torch.stack([x.sum(-1).mean() for x in lora.squared_distances(middle)]).sum()
    z = LoraTensors(z_score(lora.a, mean.a, deviation.a), z_score(lora.b, mean.b, deviation.b), lora.scaling)
    if freeze_a:
        z, deviation = (LoraTensors((), x.b, x.scaling) for x in (z, deviation))
    size = [lora.scaling * x.clamp_min(1e-30) for x in size]
    return Targets(tuple(names), z, mean, deviation, tuple(size), variance.clamp_min(1e-30))


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
    hypernet: Hypernet, targets: Targets, config: ReconLossConfig
) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    """The function that is compiled: encoded descriptions and the positions of their adapters, (n,), to the loss."""
    assert hypernet.trunk is not None and hypernet.head is not None
    trunk, head = hypernet.trunk, hypernet.head
    if isinstance(head, HeadBasis) and not targets.z.a and config.only_squares:
        return share_loss(trunk, head, targets, config.squares)

    def function(states: Tensor, mask: Tensor | None, index_n: Tensor) -> Tensor:
        z_a, z_b = head(trunk(states, mask))
        total = torch.zeros((), device=index_n.device)
        if config.factors:
            total = total + config.factors * factor_loss([*z_a, *z_b], [*targets.z.a, *targets.z.b], index_n)
        if config.needs_product:
            written, wanted = targets.restore(z_a, z_b), targets.adapters(index_n)
            if config.delta:
                columns = [torch.randint(a.shape[-1], (config.columns,), device=a.device) for a in wanted.a]
                total = total + config.delta * delta_loss(written, wanted, columns, targets.size)
            if config.squares:
                total = total + config.squares * square_loss(written, wanted, targets.variance)
            if config.angular:
                total = total + config.angular * angular_loss(written, wanted)
            if config.spectral:
                total = total + config.spectral * spectral_loss(written, wanted)
        return total

    return function


def factor_loss(written: Sequence[Tensor], targets: Sequence[Tensor], index_n: Tensor) -> Tensor:
    """Mean absolute difference over all elements of A and B of all targets (arXiv 2506.06105, equation 4)."""
    total = sum((x - t[index_n]).abs().sum() for x, t in zip(written, targets, strict=True))
    assert isinstance(total, Tensor)
    return total / sum(x.numel() for x in written)


def delta_loss(written: LoraTensors, wanted: LoraTensors, columns: Sequence[Tensor], size: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of ΔW's entries in some columns, over `size`; the mean over targets.

    Column j of BA is B times column j of A: with random columns this estimates the mean over all entries without bias.
    """
    parts = []
    for m, chosen in enumerate(columns):
        mine, theirs = (x.b[m] @ x.a[m].index_select(-1, chosen) for x in (written, wanted))
        parts.append(written.scaling * (mine - theirs).abs().mean() / size[m])
    return torch.stack(parts).mean()


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


def angular_loss(written: LoraTensors, wanted: LoraTensors) -> Tensor:
    """1 - cosine of ΔW and its target, the mean over adapters, layers and targets.

    As half the squared distance of both at length 1: exact also where the cosine is almost 1.
    """

    def unit(lora: LoraTensors) -> LoraTensors:
        norms = [(norm / lora.scaling).clamp_min(1e-20)[..., None, None] for norm in lora.norms()]
        return LoraTensors(lora.a, tuple(b / norm for b, norm in zip(lora.b, norms, strict=True)), 1.0)

    distances = unit(written).squared_distances(unit(wanted))
    return torch.stack([x.mean() for x in distances]).mean() / 2


def spectral_loss(written: LoraTensors, wanted: LoraTensors) -> Tensor:
    """Squared distance of the singular values over the target's squared norm, the mean over all."""
    pairs = zip(written.singular_values(), wanted.singular_values(), strict=True)
    return torch.stack([((s - t).square().sum(-1) / t.square().sum(-1)).mean() for s, t in pairs]).mean()


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


@torch.no_grad()
def judge(hypernet: Hypernet, targets: Targets, bank: EmbeddingCache, texts: Sequence[int]) -> AdapterErrors:
    """Errors of every adapter of the library, each written from the description at its place in `texts`."""
    hypernet.eval()
    device = targets.mean.a[0].device
    found = AdapterErrors([], [], [])
    for chunk in torch.arange(len(targets.names), device=device).split(32):
        encoded = bank[torch.tensor([texts[i] for i in chunk.tolist()], device=device)]
        errors = compare(hypernet(encoded.states, encoded.mask), targets.adapters(chunk))
        for name, values in vars(errors).items():
            getattr(found, name).extend(values)
    hypernet.train()
    return found


# ------------------------------------------------------------------------------------------------ what is read


@dataclass(frozen=True)
class Descriptions:
    """Texts of a run, and which belong to which adapter."""

    texts: list[str]
    trained: list[tuple[int, ...]]
    """For each adapter the positions of the descriptions it is trained on."""
    held_out: list[int]
    """For each adapter the position of one it is judged on: held out, or the first where none is."""
    dropped: int
    """Descriptions left out because they exceed the encoder's window."""


def choose_descriptions(
    library: AdapterLibrary, names: Sequence[str], config: ReconConfig, lengths: Callable[[list[str]], list[int]]
) -> Descriptions:
    """Picks descriptions of every adapter; `lengths` counts a text's tokens as the encoder does.

    Raises:
        DataError: naming the adapters without one that the encoder can read.
    """
    if config.conditioning == "task":
        return Descriptions(list(names), [(i,) for i in range(len(names))], list(range(len(names))), 0)
    listed = {name: _texts(library, name) for name in names}
    bare = [name for name, texts in listed.items() if not texts]
    if bare:
        raise DataError(
            f"{library.folder} has no description of {', '.join(bare[:5])} ({len(bare)} of {len(names)} adapters); "
            "import the library again with --descriptions, or condition on names (encoder.kind onehot)"
        )
    unique = sorted({text for texts in listed.values() for text in texts})
    fits = {t: n <= config.encoder.max_tokens for t, n in zip(unique, lengths(unique), strict=True)}
    kept = {name: tuple(text for text in texts if fits[text]) for name, texts in listed.items()}
    lost = [name for name, texts in kept.items() if not texts]
    if lost:
        raise DataError(
            f"No description of {', '.join(lost[:5])} fits into encoder.max_tokens ({config.encoder.max_tokens}); "
            "shorten them or raise it"
        )
    texts = sorted({text for found in kept.values() for text in found})
    place = {text: i for i, text in enumerate(texts)}
    trained, held_out = [], []
    for name, found in kept.items():
        mine, others = held_out_descriptions(Task(name, found, {}), config.data.held_out_descriptions)
        mine = mine[: config.data.descriptions or None]
        trained.append(tuple(place[text] for text in mine))
        held_out.append(place[(others or mine)[0]])
    dropped = sum(len(listed[name]) - len(kept[name]) for name in names)
    return Descriptions(texts, trained, held_out, dropped)


def _texts(library: AdapterLibrary, name: str) -> list[str]:
    found = library.index[name].get("descriptions", [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise DataError(f"{library.folder}: descriptions of {name} must be a list of texts")
    return found


def open_library(config: ReconDataConfig) -> tuple[AdapterLibrary, tuple[str, ...]]:
    """The library, and the adapters of it that are to be reconstructed.

    Raises:
        CheckpointError: if it is damaged or lacks one of them.
        DataError: if it may not be trained on.
    """
    library = AdapterLibrary.open(Path(config.library))
    if library.purpose == "judging":
        raise DataError(
            f"{library.folder} was trained for judging only, on tasks that no hypernetwork may see; reconstruct another"
        )
    names = config.adapters or library.names
    require_trainable(names)
    return library, names


# ----------------------------------------------------------------------------------------------------- the run


class Draws:
    """Which adapters and which of their descriptions each step sees: a function of seed and step.

    Args:
        descriptions: Of each adapter.
        per_step: n; adapters come in shuffled order, each once before any comes again.
        seed: Seed of the run.
    """

    def __init__(self, descriptions: Sequence[tuple[int, ...]], *, per_step: int, seed: int) -> None:
        self.descriptions, self.seed = descriptions, seed
        self.per_step = min(per_step, len(descriptions))
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def steps(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Positions of adapters and of descriptions, (steps, n) each."""
        adapters, texts = np.empty((2, stop - start, self.per_step), np.int64)
        for step in range(start, stop):
            rng = np.random.default_rng((self.seed, 0, step))
            for i in range(self.per_step):
                epoch, place = divmod(step * self.per_step + i, len(self.descriptions))
                if epoch != self.epoch:
                    self.epoch = epoch
                    self.order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.descriptions))
                adapters[step - start, i] = self.order[place]
            shares = rng.random(self.per_step)
            own = [self.descriptions[n] for n in adapters[step - start]]
            texts[step - start] = [mine[int(share * len(mine))] for mine, share in zip(own, shares, strict=True)]
        return torch.from_numpy(adapters), torch.from_numpy(texts)


def train_reconstruction(
    config: ReconConfig,
    run: Path,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    device: str | None = None,
    encoder: Encoder | None = None,
    bar: bool = False,
    log: Callable[[str], None] = print,
) -> Path:
    """Runs a reconstruction training to its end or its time budget.

    Args:
        config: Settings.
        run: Folder for `config.json`, `metrics.jsonl`, the state and, at the end, `checkpoint/`.
        resume: Go on from the folder's state.
        max_minutes: Wall time after which the state is saved and the run stops.
        device: `cuda`, `cpu`; the GPU if there is one.
        encoder: The encoder that the settings name, if in memory already.
        bar: Draw a progress bar on standard error in place of progress lines.
        log: Where progress lines go.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError, DataError: before the first step, if settings or data will not do.
        TrainingError: if the loss is not finite, or a resume has no state or other settings.
    """
    started = time.monotonic()
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_float32_matmul_precision("high")
    begin = first_step(to_plain(config), run, max_steps=config.train.steps, resume=resume)
    library, names = open_library(config.data)
    plain, config = to_plain(config), basis_of_library(config, len(names))
    spec, lora = library.spec, library.stack(names)
    if config.hypernet.freeze_a:
        require_shared_a(lora, spec)
    if config.conditioning == "task":
        encoder = OneHotEncoder(names, device=chosen)
    else:
        encoder = encoder or load_encoder(config.encoder, spec.base_model, device=str(chosen))
    texts = choose_descriptions(library, names, config, encoder.count_tokens)
    bank = EmbeddingCache(encoder, texts.texts, log=log)
    targets = make_targets(
        lora, names, canonical=config.data.canonical, device=chosen, freeze_a=config.hypernet.freeze_a
    )
    torch.manual_seed(config.seed)
    hypernet = new_hypernet(config.hypernet, spec, encoder, targets).to(chosen).train()
    log(
        f"{len(names)} adapters of {spec.num_parameters:,} parameters, {len(texts.texts)} descriptions "
        f"({texts.dropped} over the window); the network has {sum(p.numel() for p in hypernet.parameters()):,}"
    )
    trainer = Trainer(config, hypernet, targets, bank, texts, chosen)
    if not resume:
        begin_run(run, plain)
    elif begin:
        load_state(run, hypernet, trainer.optimizer)
        log(f"resumed at step {begin} of {config.train.steps}")
    log(f"ready after {time.monotonic() - started:.0f} s")
    watch = Watch(
        run,
        plain,
        steps=config.train.steps,
        first_step=begin,
        tensorboard=config.train.tensorboard,
        tracker=config.train.tracker,
        bar=bar,
        log=log,
    )
    with watch:
        step = trainer.train(run, begin, watch, started=started, max_minutes=max_minutes)
    return _save(trainer, encoder, library, run / "checkpoint", step, log)


def new_hypernet(config: HypernetConfig, spec: AdapterSpec, encoder: Encoder, targets: Targets) -> Hypernet:
    """A hypernetwork whose shared LoRA and output_std undo the targets' scaling.

    Its head starts as linear layers do, not at zero: the reference does so for reconstruction. A basis is the library's
    principal components and stays it: only what chooses among them is left to learn.
    """
    config = saved_config(config)
    hypernet = Hypernet(spec, embedding_size=encoder.embedding_size, kind=encoder.kind, config=config)
    assert hypernet.head is not None and hypernet.output_std is not None
    if isinstance(hypernet.head, HeadBasis):
        basis = components(targets, config.head_size).map(Tensor.cpu)
        hypernet.head.set_basis(basis.a, basis.b)
        hypernet.head.write.requires_grad_(False)
    else:
        for linear in hypernet.head.write:
            linear.reset_parameters()  # type: ignore[operator]
    hypernet.load_shared_lora(targets.mean.map(Tensor.cpu))
    with torch.no_grad():
        for parameter, value in zip(
            (*hypernet.output_std.a, *hypernet.output_std.b), (*targets.deviation.a, *targets.deviation.b), strict=True
        ):
            parameter.copy_(value)
    return hypernet


def basis_of_library(config: ReconConfig, number: int) -> ReconConfig:
    """N adapters and their mean are mixtures of N - 1: a larger basis would hold nothing more."""
    hypernet = config.hypernet
    if hypernet.variant != "basis" or hypernet.head_size < number:
        return config
    return replace(config, hypernet=replace(hypernet, head_size=max(1, number - 1)))


def saved_config(config: HypernetConfig) -> HypernetConfig:
    """The hypernetwork's settings with what reconstruction decides: statistics as constants."""
    return replace(config, output_std=True, train_shared_lora=False)


class Trainer:
    """What a run holds in memory.

    Args:
        config: Settings.
        hypernet: On `device`.
        targets: On `device`.
        bank: The descriptions, encoded, on `device`.
        texts: Which belong to which adapter.
        device: Where training happens.
    """

    def __init__(
        self,
        config: ReconConfig,
        hypernet: Hypernet,
        targets: Targets,
        bank: EmbeddingCache,
        texts: Descriptions,
        device: torch.device,
    ) -> None:
        self.config, self.hypernet, self.targets = config, hypernet, targets
        self.bank, self.texts, self.device = bank, texts, device
        self.parameters = [p for p in hypernet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": config.train.weight_decay},
                {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=config.train.learning_rate,
            fused=True,
        )
        self.stopped = torch.zeros((), device=device)
        """1 from the first gradient that is not finite: the fused optimiser then changes nothing any more, and the
        host need not wait for every step to find out."""
        self.optimizer.found_inf = self.stopped  # type: ignore[attr-defined]
        self.draws = Draws(texts.trained, per_step=config.train.adapters_per_step, seed=config.seed)

    @cached_property
    def loss(self) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
        """Made at the first step: a resumed run has its weights by then."""
        loss = reconstruction_losses(self.hypernet, self.targets, self.config.loss)
        return torch.compile(loss, dynamic=False) if self.config.train.compile else loss

    def step(self, step: int, index_n: Tensor, texts_n: Tensor) -> Tensor:
        """One optimiser step; returns the loss, on the device."""
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * schedule(step, train.steps, train.warmup)
        encoded: Encoded = self.bank[texts_n]
        loss = self.loss(encoded.states, encoded.mask, index_n)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, train.max_gradient_norm)
        self.stopped.copy_(torch.maximum(self.stopped, (~norm.isfinite()).float()))
        self.optimizer.step()
        return loss.detach()

    def train(self, run: Path, first: int, watch: Watch, *, started: float, max_minutes: float | None) -> int:
        """Trains from step `first`; returns the number of steps done in all."""
        train, done = self.config.train, first
        while done < train.steps:
            # To the next multiple, so that the rows of a resumed run are those of one that was not interrupted.
            stop = min(train.steps, done + train.log_every - done % train.log_every)
            clock = time.monotonic()
            adapters, texts = (x.to(self.device) for x in self.draws.steps(done, stop))
            total = torch.zeros((), device=self.device)
            for number, step in enumerate(range(done, stop)):
                total += self.step(step, adapters[number], texts[number])
            if self.stopped.item():
                raise TrainingError(
                    f"A gradient between steps {done} and {stop} was not finite; the weights were not changed from "
                    "there on, and the last saved state stands. Lower train.learning_rate"
                )
            row = {
                "step": stop,
                "loss": total.item() / (stop - done),
                "steps_per_second": (stop - done) / (time.monotonic() - clock),
                "memory_gb": memory_gb(self.device),
                "minutes": (time.monotonic() - started) / 60,
            }
            before, done = done, stop
            watch.record(row)
            watch.step(done)
            out_of_time = max_minutes is not None and time.monotonic() - started > 60 * max_minutes
            last = out_of_time or done == train.steps
            if last or before // train.evaluate_every != done // train.evaluate_every:
                watch.record({"step": done, **self.judge()})
            if last or before // train.save_every != done // train.save_every:
                save_state(run, self.hypernet, self.optimizer, Progress(step=done))
            if out_of_time:
                break
        return done

    def judge(self) -> dict[str, float]:
        """Mean errors with a description of training and with one that was held out."""
        report: dict[str, float] = {}
        for name, texts in (("trained", [mine[0] for mine in self.texts.trained]), ("held_out", self.texts.held_out)):
            errors = judge(self.hypernet, self.targets, self.bank, texts)
            report |= {f"{name}/{key}": value for key, value in errors.means().items()}
        return report


def _save(
    trainer: Trainer, encoder: Encoder, library: AdapterLibrary, folder: Path, step: int, log: Callable[[str], None]
) -> Path:
    config, spec = trainer.config, library.spec
    errors = trainer.judge()
    provenance: dict[str, Any] = {
        "seed": config.seed,
        "steps": step,
        "planned_steps": config.train.steps,
        "library_sha256": library.checksum,
        "adapters": list(trainer.targets.names),
        "errors": errors,
        # Where the library stood on this machine is nobody's business.
        "settings": to_plain(replace(config, data=replace(config.data, library=library.folder.name))),
        "versions": versions(),
    }
    saved = CheckpointConfig.current(
        provenance,
        embedding_size=encoder.embedding_size,
        encoder=replace(config.encoder, names=trainer.targets.names)
        if config.conditioning == "task"
        else config.encoder,
        encoder_revision=encoder_revision(config.encoder, spec.base_model),
        conditioning=config.conditioning,
        hypernet=saved_config(config.hypernet),
        prompt=config.prompt,
    )
    card = (
        f"# Text-to-LoRA hypernetwork for {spec.base_model}\n\n"
        f"Writes the {len(trainer.targets.names)} LoRA adapters of a library (sha256 {library.checksum}) from their "
        f"descriptions: rank {spec.rank}, alpha {spec.alpha:g}, targets {', '.join(t.name for t in spec.targets)}. "
        f"Relative error of ΔW {errors['trained/relative']:.3f}, with descriptions not trained on "
        f"{errors['held_out/relative']:.3f}.\n\n"
        f"Reconstruction training, {step} of {config.train.steps} steps, seed {config.seed}. All settings stand in "
        f"`config.json`.\n"
    )
    save_checkpoint(folder, trainer.hypernet, spec, saved, card=card, overwrite=True)
    log(f"checkpoint after step {step}: {folder}")
    return folder
