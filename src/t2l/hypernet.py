"""The hypernetwork: an encoded description in, the LoRA adapter of every target and layer out, in one pass.

    encoding ─ trunk ─▶ features (N, L, M, H) ─ head L | M | S | basis ─▶ change of A and B ─ + offset ─▶ LoraTensors

After Charakorn et al., Text-to-LoRA (arXiv 2506.06105), section 3 and appendix; three departures, all for SFT:
- Every adapter is the *offset* plus what the head says. The offset is one LoRA shared by all descriptions, with
  A drawn as PEFT draws it and B zero, and the head's weights start at zero, so a fresh hypernetwork changes
  nothing. (The reference puts both into one bias of the head; shared by A and B, as M and S need it, that bias
  makes B ≠ 0.) Because A ≠ 0 the head gets a gradient from the first step. Load a trained multi-task LoRA into the
  offset and the hypernetwork starts from it.
- `TokenTrunk` reads the states of all tokens of the description in place of one pooled embedding.
- A `Pointer` copies the description's own words into B, so that an adapter can answer with words it was never
  trained on.

Knows tensors only. Knows no text, no module names and no files. Shape letters as in `spec.py`; D is the head size.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2l.config import HypernetConfig
from t2l.errors import ConfigError, SpecMismatchError
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec


class Hypernet(nn.Module):
    """Writes adapters from encoded descriptions.

    Args:
        spec: The adapters' targets, layers, sizes, rank and scaling.
        embedding_size: E of the encoder.
        kind: `sentence` for encodings (N, E), `tokens` for (N, S, E) with a mask.
        config: Variant and sizes.
    """

    def __init__(
        self, spec: AdapterSpec, *, embedding_size: int, kind: Literal["sentence", "tokens"], config: HypernetConfig
    ) -> None:
        super().__init__()
        sizes = [(t.in_features, t.out_features) for t in spec.targets]
        written = [(i if config.writes == "AB" else 0, o) for i, o in sizes]
        num_layers = len(spec.layers)
        grid = (1, 1) if config.variant == "basis" else (num_layers, len(spec.targets))
        self.scaling, self.max_change = spec.scaling, config.max_change
        self.offset = Offset(sizes, num_layers=num_layers, rank=spec.rank, trainable=config.train_offset)
        self.standard = Standard(embedding_size) if config.standardize else None
        self.trunk: SentenceTrunk | TokenTrunk | None = None
        self.units = Units(written, num_layers=num_layers, rank=spec.rank) if config.own_units else None
        self.head: HeadL | HeadM | HeadS | HeadBasis | None = None
        if config.variant != "none":
            if kind == "tokens" and config.codebook != "none":
                raise ConfigError(f"hypernet.codebook '{config.codebook}' needs one vector a text: a sentence encoder")
            self.trunk = (
                TokenTrunk(
                    embedding_size,
                    grid,
                    width=config.width,
                    blocks=config.token_blocks,
                    attention_heads=config.attention_heads,
                    dropout=config.dropout,
                    token_dropout=config.token_dropout,
                    prompt_aware=config.prompt_aware,
                )
                if kind == "tokens"
                else SentenceTrunk(
                    embedding_size,
                    grid,
                    width=config.width,
                    dropout=config.dropout,
                    codebook=config.codebook,
                    codebook_size=config.codebook_size,
                    prompt_aware=config.prompt_aware,
                )
            )
            heads: dict[str, Callable[..., HeadL | HeadM | HeadS | HeadBasis]] = {
                "L": HeadL,
                "M": HeadM,
                "S": HeadS,
                "basis": partial(HeadBasis, num_layers=num_layers),
            }
            self.head = heads[config.variant](
                written, rank=spec.rank, width=config.width, head_size=config.head_size, dropout=config.dropout
            )
            if config.centre:
                parts = 2 if self.head.write_parts else 1
                places = {"L": grid, "M": (*grid, parts), "S": (*grid, parts, spec.rank), "basis": ()}
                self.head.centre = Centre((*places[config.variant], config.head_size))
        self.pointers = nn.ModuleDict()
        for m, target in enumerate(spec.targets):
            if target.name in config.pointer:
                if kind != "tokens" or embedding_size % target.out_features:
                    what = "token" if kind == "tokens" else "text"
                    raise ConfigError(
                        f"hypernet.pointer '{target.name}' takes vectors of {target.out_features} numbers from the "
                        f"description's tokens; this encoder gives {embedding_size} a {what}"
                    )
                self.pointers[str(m)] = Pointer(config.width, embedding_size, target.out_features, rank=spec.rank)
        self.gate = Gate(config.width) if config.pointer_gate else None
        if len(self.pointers) < len(config.pointer):
            raise ConfigError(
                f"hypernet.pointer names {', '.join(config.pointer)}, the targets are "
                f"{', '.join(target.name for target in spec.targets)}"
            )

    def forward(
        self,
        states: Tensor,
        mask: Tensor | None = None,
        scale: Tensor | None = None,
        in_prompt: Tensor | None = None,
    ) -> LoraTensors:
        """Writes one adapter per description.

        Args:
            states: Encoded descriptions, (N, E) or (N, S, E).
            mask: For (N, S, E), True where there is a token, (N, S).
            scale: How much of the description's change is added to the offset, (N,): 1 all of it, 0 none.
            in_prompt: Whether the prompts that an adapter is for show the description, (N,) of bool; needed where
                `prompt_aware` is set, of no consequence elsewhere.

        Returns:
            A batch of N adapters: A (N, L, R, I) and B (N, L, O, R) for each target.
        """
        offset_a, offset_b = self.offset()
        shared_a, shared_b = (tuple(x.expand(len(states), *x.shape) for x in part) for part in (offset_a, offset_b))
        if self.trunk is None or self.head is None:
            return LoraTensors(shared_a, shared_b, self.scaling)
        words = states
        if self.standard is not None:
            states = self.standard(states)
        features_NLMH = self.trunk(states, mask, in_prompt)
        change_a, change_b = self.head(features_NLMH)
        open_N = None if self.gate is None else self.gate(features_NLMH)
        for m, pointer in self.pointers.items():
            pointed = pointer(features_NLMH[:, :, int(m)], states, words, mask)
            change_b[int(m)] = change_b[int(m)] + (pointed if open_N is None else open_N * pointed)
        if self.max_change is not None:
            change_a, change_b = ([_capped(x, self.max_change) for x in change] for change in (change_a, change_b))
        if scale is not None:
            factor = scale[:, None, None, None]
            change_a, change_b = [factor * x for x in change_a], [factor * x for x in change_b]
        return LoraTensors(
            _added(offset_a, change_a, None if self.units is None else self.units.a) if change_a else shared_a,
            _added(offset_b, change_b, None if self.units is None else self.units.b),
            self.scaling,
        )

    @property
    def commitment(self) -> Tensor | None:
        """Distance of the last batch's embeddings to their codes, for the loss; None without a VQ codebook."""
        codebook = self.trunk.codebook if isinstance(self.trunk, SentenceTrunk) else None
        return codebook.commitment if isinstance(codebook, VectorQuantizer) else None

    def offset_lora(self) -> LoraTensors:
        """The LoRA that all descriptions share, as a single adapter; its tensors are the parameters themselves."""
        a, b = self.offset()
        return LoraTensors(a, b, self.scaling)

    def load_offset(self, lora: LoraTensors) -> None:
        """Starts from a trained LoRA: with untrained heads every description then gives exactly this adapter.

        Args:
            lora: A single adapter of this hypernetwork's spec.

        Raises:
            SpecMismatchError: if shapes or scaling differ.
        """
        mine = [tuple(x.shape) for x in (*self.offset.a, *self.offset.b)]
        theirs = [tuple(x.shape) for x in (*lora.a, *lora.b)]
        if mine != theirs or lora.scaling != self.scaling:
            raise SpecMismatchError(
                f"The offset needs tensors {mine} scaled by {self.scaling}, the adapter has {theirs} scaled by "
                f"{lora.scaling}. Train it with the same targets, layers, rank and alpha."
            )
        with torch.no_grad():
            for parameter, value in zip((*self.offset.a, *self.offset.b), (*lora.a, *lora.b), strict=True):
                parameter.copy_(value)


class Standard(nn.Module):
    """(x - mean) / deviation for every number of an encoding; both are constants, saved with the weights."""

    mean_E: Tensor
    scale_E: Tensor

    def __init__(self, embedding_size: int) -> None:
        super().__init__()
        self.register_buffer("mean_E", torch.zeros(embedding_size))
        self.register_buffer("scale_E", torch.ones(embedding_size))

    def fit(self, states_KE: Tensor) -> None:
        """Takes the constants from K encodings of texts or tokens; a number that never changes keeps its size."""
        deviation, self.mean_E[:] = torch.std_mean(states_KE.float(), dim=0, correction=0)
        self.scale_E[:] = torch.where(deviation > 1e-4, 1 / deviation, 1.0)

    def forward(self, states: Tensor) -> Tensor:
        """(…, E) to the same."""
        return (states - self.mean_E) * self.scale_E


class Centre(nn.Module):
    """x less what all texts have in common: a moving average over the batches of training, saved with the weights.

    The average takes no part in the gradient, so that no text's features depend on the others of its batch.
    """

    KEPT = 0.9
    """Of the average at each batch."""

    mean: Tensor
    begun: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("begun", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """(N, …) to the same."""
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0, dtype=torch.float32), 1 - self.KEPT * self.begun)  # the first one whole
                self.begun.fill_(1)
        return x - self.mean


class Offset(nn.Module):
    """The LoRA that all descriptions share: A as PEFT initialises it, B zero."""

    def __init__(self, sizes: list[tuple[int, int]], *, num_layers: int, rank: int, trainable: bool) -> None:
        super().__init__()
        self.a = nn.ParameterList(torch.empty(num_layers, rank, i) for i, _ in sizes)
        self.b = nn.ParameterList(torch.zeros(num_layers, o, rank) for _, o in sizes)
        for a in self.a:
            # kaiming_uniform(a=sqrt(5)) over fan-in I, which is what PEFT does for each layer's (R, I).
            bound = a.shape[-1] ** -0.5
            nn.init.uniform_(a, -bound, bound)
        self.requires_grad_(trainable)

    def forward(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A (L, R, I) and B (L, O, R) for each target."""
        return tuple(self.a), tuple(self.b)


class Units(nn.Module):
    """The size of 1 in what the head writes, for every element of A and B: constants, saved with the weights.

    None for A where the head does not write it; its I is then 0.
    """

    def __init__(self, sizes: list[tuple[int, int]], *, num_layers: int, rank: int) -> None:
        super().__init__()
        self.a = nn.ParameterList(torch.ones(num_layers, rank, i) for i, _ in sizes if i).requires_grad_(False)
        self.b = nn.ParameterList(torch.ones(num_layers, o, rank) for _, o in sizes).requires_grad_(False)


def _added(offset: Sequence[Tensor], change: Sequence[Tensor], unit: Iterable[Tensor] | None) -> tuple[Tensor, ...]:
    """offset + unit · change, for each target."""
    if unit is None:
        return tuple(o + c for o, c in zip(offset, change, strict=True))
    return tuple(o + u * c for o, u, c in zip(offset, unit, change, strict=True))


def _capped(change: Tensor, limit: float) -> Tensor:
    """(…, L, X, Y) with each layer's root mean square brought down to `limit` where it exceeds it."""
    size = change.float().square().mean((-2, -1), keepdim=True)
    # Not sqrt first: its gradient at zero, where every head starts, is infinite.
    return change * (limit * size.clamp_min(limit**2).rsqrt()).to(change.dtype)


class Residual(nn.Module):
    """x + MLP(LayerNorm(x)) with the paper's SiLU after both layers."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.SiLU(),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(…, H) to (…, H)."""
        return x + self.mlp(self.norm(x))


class SentenceTrunk(nn.Module):
    """The paper's trunk: embedding, depth and module type are concatenated and mixed."""

    def __init__(
        self,
        embedding_size: int,
        grid: tuple[int, int],
        *,
        width: int,
        dropout: float,
        codebook: Literal["none", "vq", "softmax"],
        codebook_size: int,
        prompt_aware: bool,
    ) -> None:
        super().__init__()
        num_layers, num_targets = grid
        self.embedding = nn.Sequential(nn.Linear(embedding_size, width // 2), nn.LayerNorm(width // 2))
        self.codebook: nn.Module | None = None
        if codebook != "none":
            kinds = {"vq": VectorQuantizer, "softmax": SoftmaxCodebook}
            self.codebook = kinds[codebook](width // 2, codebook_size)
        self.prompts = _prompt_marks(width // 2) if prompt_aware else None
        self.depth = nn.Sequential(nn.Embedding(num_layers, width // 4), nn.LayerNorm(width // 4))
        self.target = nn.Sequential(nn.Embedding(num_targets, width // 4), nn.LayerNorm(width // 4))
        self.mixer = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(width, 4 * width),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.SiLU(),
            nn.Dropout(dropout),
        )
        self.block = Residual(width, dropout)
        self.register_buffer("layer_index", torch.arange(num_layers), persistent=False)
        self.register_buffer("target_index", torch.arange(num_targets), persistent=False)
        self.grid = grid

    def forward(self, states_NE: Tensor, mask: Tensor | None = None, in_prompt_N: Tensor | None = None) -> Tensor:
        """(N, E) to features (N, L, M, H)."""
        n, (num_layers, num_targets) = states_NE.shape[0], self.grid
        task_NH = self.embedding(states_NE)
        if self.codebook is not None:
            task_NH = self.codebook(task_NH)
        if self.prompts is not None:
            task_NH = task_NH + _marked(self.prompts, in_prompt_N)
        task = task_NH[:, None, None].expand(n, num_layers, num_targets, -1)
        depth = self.depth(self.layer_index)[None, :, None].expand(n, num_layers, num_targets, -1)
        target = self.target(self.target_index)[None, None].expand(n, num_layers, num_targets, -1)
        return self.block(self.mixer(torch.cat([task, depth, target], dim=-1)))


def _prompt_marks(width: int) -> nn.Parameter:
    """What tells adapters for prompts without the description from those for prompts with it, (2, H)."""
    return nn.Parameter(torch.randn(2, width))


def _marked(marks_2H: Tensor, in_prompt_N: Tensor | None) -> Tensor:
    if in_prompt_N is None:
        raise ConfigError("hypernet.prompt_aware: say whether the prompts that adapters are for show the description")
    return marks_2H[in_prompt_N.long()]


class VectorQuantizer(nn.Module):
    """Each vector becomes its nearest code (arXiv 1711.00937); codes are moving averages of the vectors they stand for.

    The gradient passes straight through to the vector, which `commitment` also draws towards its code.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, width: int, size: int, *, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        codes = F.layer_norm(torch.randn(size, width), (width,))  # as the vectors themselves are
        self.register_buffer("codes", codes)
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", codes.clone())
        self.commitment: Tensor | None = None

    def forward(self, x_NH: Tensor) -> Tensor:
        """(N, H) to the nearest codes (N, H)."""
        with torch.autocast(x_NH.device.type, enabled=False):  # averages over thousands of steps need every digit
            return self._quantize(x_NH.float()).to(x_NH.dtype)

    def _quantize(self, exact: Tensor) -> Tensor:
        nearest = torch.cdist(exact.detach(), self.codes).argmin(-1)
        if self.training:
            chosen = F.one_hot(nearest, len(self.codes)).to(exact.dtype)
            with torch.no_grad():
                self.counts.lerp_(chosen.sum(0), 1 - self.decay)
                self.sums.lerp_(chosen.T @ exact, 1 - self.decay)
        found = self.codes[nearest]
        self.commitment = F.mse_loss(exact, found)
        if self.training:
            with torch.no_grad():
                # A code that nothing has come near to for long stays where it was.
                used = self.counts[:, None] > 1e-6
                self.codes.copy_(torch.where(used, self.sums / self.counts[:, None], self.codes))
        return exact + (found - exact).detach()


class SoftmaxCodebook(nn.Module):
    """Each vector becomes a mixture of learned codes, weighted by a softmax that it decides."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.choose = nn.Linear(width, size)
        self.codes = nn.Parameter(torch.randn(size, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_NH: Tensor) -> Tensor:
        """(N, H) to mixtures of codes (N, H)."""
        return self.norm(self.choose(x_NH).softmax(-1) @ self.codes)


class TokenTrunk(nn.Module):
    """One learned query per (layer, target) reads the description's token states (a Perceiver, arXiv 2103.03206)."""

    def __init__(
        self,
        embedding_size: int,
        grid: tuple[int, int],
        *,
        width: int,
        blocks: int,
        attention_heads: int,
        dropout: float,
        token_dropout: float,
        prompt_aware: bool,
    ) -> None:
        super().__init__()
        if width % attention_heads:
            raise ConfigError(
                f"hypernet.width ({width}) must be divisible by hypernet.attention_heads ({attention_heads})"
            )
        num_layers, num_targets = grid
        self.grid = grid
        self.token_dropout = token_dropout
        self.read = nn.Sequential(nn.Linear(embedding_size, width), nn.LayerNorm(width))
        self.depth = nn.Parameter(torch.randn(num_layers, 1, width))
        self.target = nn.Parameter(torch.randn(1, num_targets, width))
        self.prompts = _prompt_marks(width) if prompt_aware else None
        self.blocks = nn.ModuleList(TokenBlock(width, attention_heads, dropout) for _ in range(blocks))

    def forward(self, states_NSE: Tensor, mask_NS: Tensor | None, in_prompt_N: Tensor | None = None) -> Tensor:
        """(N, S, E) with mask (N, S) to features (N, L, M, H)."""
        assert mask_NS is not None, "token states come with a mask"
        if self.training and self.token_dropout:
            kept = torch.rand(mask_NS.shape, device=mask_NS.device) >= self.token_dropout
            kept[:, 0] = True  # the first token always stays, so no description is ever empty
            mask_NS = mask_NS & kept
        tokens_NSH = self.read(states_NSE)
        queries = (self.depth + self.target).flatten(0, 1)
        x_NQH = queries.expand(states_NSE.shape[0], *queries.shape)
        if self.prompts is not None:
            x_NQH = x_NQH + _marked(self.prompts, in_prompt_N)[:, None]
        for block in self.blocks:
            x_NQH = block(x_NQH, tokens_NSH, mask_NS)
        return x_NQH.unflatten(1, self.grid)


class TokenBlock(nn.Module):
    """Cross-attention to the tokens, self-attention among the queries, MLP; pre-norm, residual."""

    def __init__(self, width: int, attention_heads: int, dropout: float) -> None:
        super().__init__()
        self.cross = Attention(width, attention_heads)
        self.self_ = Attention(width, attention_heads)
        self.cross_norm = nn.LayerNorm(width)
        self.self_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_NQH: Tensor, tokens_NSH: Tensor, mask_NS: Tensor) -> Tensor:
        """Queries (N, Q, H) after one reading of the tokens."""
        x_NQH = x_NQH + self.dropout(self.cross(self.cross_norm(x_NQH), tokens_NSH, mask_NS))
        normed = self.self_norm(x_NQH)
        x_NQH = x_NQH + self.dropout(self.self_(normed, normed, None))
        return x_NQH + self.dropout(self.mlp(x_NQH))


class Attention(nn.Module):
    """Multi-head attention from queries to a context."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_NQH: Tensor, context_NSH: Tensor, mask_NS: Tensor | None) -> Tensor:
        """(N, Q, H) attending to (N, S, H) where the mask (N, S) is True."""

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        key, value = self.key_value(context_NSH).chunk(2, dim=-1)
        mask = None if mask_NS is None else mask_NS[:, None, None, :]
        out = F.scaled_dot_product_attention(split(self.query(x_NQH)), split(key), split(value), attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(-2))


class Pointer(nn.Module):
    """Words of the description as columns of B, so that an adapter can bring in words that no training task had.

    Each rank of each layer attends to the description's tokens (a pointer, arXiv 1506.03134) and adds what it finds of
    their own embeddings, times a gain that starts at zero. Where the base's output embeddings are its input
    embeddings, a module that writes to the residual stream so makes the words that are pointed at more likely.

    Args:
        width: H of the features that ask.
        embedding_size: E of the tokens' states.
        size: O, of an embedding: the first O numbers of a state, of length √O as the encoder gives them.
        rank: R.
    """

    KEY = 64

    def __init__(self, width: int, embedding_size: int, size: int, *, rank: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self.query = nn.Linear(width, rank * self.KEY)
        self.key = nn.Linear(embedding_size, self.KEY)
        self.gain = nn.Linear(width, rank)
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.gain.bias)

    def forward(self, features_NLH: Tensor, states_NSE: Tensor, words_NSE: Tensor, mask_NS: Tensor | None) -> Tensor:
        """A change of B, (N, L, O, R); `states` as the trunk reads them, `words` as the encoder gave them."""
        assert mask_NS is not None, "token states come with a mask"
        query_NLRK = self.query(features_NLH).unflatten(-1, (self.rank, self.KEY))
        scores_NLRS = query_NLRK @ self.key(states_NSE).mT[:, None] * self.KEY**-0.5
        share_NLRS = scores_NLRS.masked_fill(~mask_NS[:, None, None], float("-inf")).softmax(-1)
        unit_NSO = words_NSE[..., : self.size] * self.size**-0.5
        found_NLRO = (share_NLRS * self.gain(features_NLH)[..., None]) @ unit_NSO[:, None].to(share_NLRS.dtype)
        return found_NLRO.mT


class Gate(nn.Module):
    """How much of what the pointers add is taken, a number in (0, 1) for each adapter that its features decide."""

    OPEN = 2.0
    """Where it starts, before the sigmoid: .88 for every description."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decide = nn.Linear(width, 1)
        nn.init.zeros_(self.decide.weight)
        nn.init.constant_(self.decide.bias, self.OPEN)

    def forward(self, features_NLMH: Tensor) -> Tensor:
        """(N, L, M, H) to (N, 1, 1, 1)."""
        return self.decide(features_NLMH.mean((1, 2))).sigmoid()[..., None, None]


Changes = tuple[list[Tensor], list[Tensor]]
"""Changes of A (N, L, R, I) and of B (N, L, O, R), one of each for each target; none of A where it is not written."""


class _Head(nn.Module):
    """What all heads share: the second residual block, the widening MLP, one zero-initialised matrix a target.

    In their sizes, I is 0 where A is not written.
    """

    def __init__(
        self,
        outputs: list[int],
        sizes: list[tuple[int, int]],
        *,
        rank: int,
        width: int,
        head_size: int,
        dropout: float,
        write_parts: bool = False,
    ) -> None:
        super().__init__()
        self.sizes, self.rank = sizes, rank
        self.centre: Centre | None = None
        self.block = Residual(width, dropout)
        self.widen = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, head_size),
            nn.SiLU(),
        )
        self.write = nn.ModuleList(nn.Linear(head_size, size, bias=False) for size in outputs)
        for linear in self.write:
            nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
        self.write_parts = write_parts
        if write_parts:
            # Tells A from B; one vector a target and part, normalised like the depth and type embeddings.
            self.part_a = nn.Parameter(torch.randn(len(outputs), width))
            self.part_b = nn.Parameter(torch.randn(len(outputs), width))
            self.part_norm = nn.LayerNorm(width)

    def features(self, x: Tensor) -> Tensor:
        """(N, …, H) to (N, …, D)."""
        x = self.widen(self.block(x))
        return x if self.centre is None else self.centre(x)

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


class HeadL(_Head):
    """A and B of a target and layer from one matrix: (D → R·(I + O))."""

    def __init__(self, sizes: list[tuple[int, int]], *, rank: int, width: int, head_size: int, dropout: float) -> None:
        outputs = [rank * (i + o) for i, o in sizes]
        super().__init__(outputs, sizes, rank=rank, width=width, head_size=head_size, dropout=dropout)

    def forward(self, features_NLMH: Tensor) -> Changes:
        """Features to changes of A and B."""
        x_NLMD = self.features(features_NLMH)
        return self.split([matrix(x_NLMD[:, :, m]) for m, matrix in enumerate(self.write)])


class HeadM(_Head):
    """A and B in turn from one shared matrix, cut to size: (D → R·max(I, O))."""

    def __init__(self, sizes: list[tuple[int, int]], *, rank: int, width: int, head_size: int, dropout: float) -> None:
        super().__init__(
            [rank * max(size) for size in sizes],
            sizes,
            rank=rank,
            width=width,
            head_size=head_size,
            dropout=dropout,
            write_parts=any(i for i, _ in sizes),
        )

    def forward(self, features_NLMH: Tensor) -> Changes:
        """Features to changes of A and B."""
        x_NLMPD = self.features(self.parts(features_NLMH))
        change_a, change_b = [], []
        for m, (i, o) in enumerate(self.sizes):
            parts = self.write[m](x_NLMPD[:, :, m])
            if i:
                change_a.append(parts[:, :, 0, : self.rank * i].unflatten(-1, (self.rank, i)))
            change_b.append(parts[:, :, -1, : self.rank * o].unflatten(-1, (o, self.rank)))
        return change_a, change_b


class HeadS(_Head):
    """One rank of A or of B at a time from one shared matrix, cut to size: (D → max(I, O))."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: list[tuple[int, int]], *, rank: int, width: int, head_size: int, dropout: float) -> None:
        super().__init__(
            [max(size) for size in sizes],
            sizes,
            rank=rank,
            width=width,
            head_size=head_size,
            dropout=dropout,
            write_parts=any(i for i, _ in sizes),
        )
        cos, sin = _rotary(rank, width)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, features_NLMH: Tensor) -> Changes:
        """Features to changes of A and B."""
        x = self.parts(features_NLMH)[..., None, :]  # (N, L, M, P, 1, H), turned by the rank's angle below
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.cat([even * self.cos - odd * self.sin, even * self.sin + odd * self.cos], dim=-1)
        x_NLMPRD = self.features(turned)
        change_a, change_b = [], []
        for m, (i, o) in enumerate(self.sizes):
            parts = self.write[m](x_NLMPRD[:, :, m])
            if i:
                change_a.append(parts[:, :, 0, :, :i])
            change_b.append(parts[:, :, -1, :, :o].mT)
        return change_a, change_b


class HeadBasis(_Head):
    """Mixtures of D adapters that all descriptions share: one matrix a target for all layers, (D → L·R·(I + O)).

    Not the paper's: a description chooses D numbers in all, where L's choose as many for every layer and target, so the
    trunk hands over one place in all. Of the ways to write N adapters from so few numbers, principal components lose
    least, see `t2l.train.recon`.
    """

    def __init__(
        self,
        sizes: list[tuple[int, int]],
        *,
        rank: int,
        width: int,
        head_size: int,
        dropout: float,
        num_layers: int,
    ) -> None:
        outputs = [num_layers * rank * (i + o) for i, o in sizes]
        super().__init__(outputs, sizes, rank=rank, width=width, head_size=head_size, dropout=dropout)
        self.widen = nn.Sequential(*list(self.widen)[:-1])  # shares of a mixture have either sign
        self.num_layers = num_layers

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


def _rotary(positions: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (positions, width / 2) of rotary position embedding (arXiv 2104.09864)."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(positions)[:, None] * frequency
    return angle.cos(), angle.sin()
