"""The hypernetwork: an encoded description in, the LoRA adapter of every target and layer out, in one pass.

    encoding ─ trunk ─▶ features (N, L, M, H) ─ head L | M | S | basis ─▶ change of A and B ─▶ + shared LoRA

After Charakorn et al., Text-to-LoRA (arXiv 2506.06105), section 3 and appendix; three departures, all for SFT:
- Every adapter is the *shared LoRA* plus what the head says. The shared LoRA is one for all descriptions, with A drawn
  as PEFT draws it and B zero, and the head's weights start at zero, so a fresh hypernetwork changes nothing. (The
  reference puts both into one bias of the head; shared by A and B, as M and S need it, that bias makes B ≠ 0.) Because
  A ≠ 0 the head gets a gradient from the first step. Load a trained multi-task LoRA into the shared LoRA and the
  hypernetwork starts from it.
- `TokenTrunk` reads the states of all tokens of the description in place of one pooled embedding.
- A `Pointer` copies the description's own words into B, so that an adapter can answer with words it was never
  trained on.

Knows tensors only. Knows no text, no module names and no files. Shape letters as in `spec.py`.
The heads, which write A and B, stand in `heads`.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2l.config import HypernetConfig
from t2l.errors import ConfigError, SpecMismatchError
from t2l.heads import HEADS, HeadBasis, HeadL, HeadM, HeadS, Residual, Sizes, feed_forward
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec

Kind = Literal["sentence", "tokens"]
"""Kind of encoding: one vector (N, E), or one for each token (N, S, E) with a mask (N, S)."""
Grid = tuple[int, int]
"""Numbers of (layers, targets) that get features of their own."""


class Hypernet(nn.Module):
    """Writes adapters from encoded descriptions.

    Args:
        spec: The adapters' targets, layers, sizes, rank and scaling.
        embedding_size: E of the encoder.
        kind: `sentence` for encodings (N, E), `tokens` for (N, S, E) with a mask.
        config: Variant and sizes.
    """

    def __init__(self, spec: AdapterSpec, *, embedding_size: int, kind: Kind, config: HypernetConfig) -> None:
        super().__init__()
        sizes = [(t.in_features, t.out_features) for t in spec.targets]
        written = [(0 if config.freeze_a else i, o) for i, o in sizes]
        num_layers, rank = len(spec.layers), spec.rank
        self.scaling = spec.scaling
        # The order of construction decides which random numbers each part starts from.
        self.shared_lora = SharedLora(sizes, num_layers=num_layers, rank=rank, trainable=config.train_shared_lora)
        self.normalizer = InputNormalizer(embedding_size) if config.normalize_inputs else None
        self.trunk: SentenceTrunk | TokenTrunk | None = None
        self.head: HeadL | HeadM | HeadS | HeadBasis | None = None
        if config.variant != "none":
            grid = (1, 1) if config.variant == "basis" else (num_layers, len(sizes))
            self.trunk = (SentenceTrunk if kind == "sentence" else TokenTrunk)(embedding_size, grid, config)
            self.head = HEADS[config.variant](written, num_layers=num_layers, rank=rank, config=config)
        self.output_std = OutputStd(written, num_layers=num_layers, rank=rank) if config.output_std else None
        self.pointers = _build_pointers(spec, embedding_size, kind, config)
        self.gate = PointerGate(config.width) if config.pointer_gate else None

    def forward(self, states: Tensor, mask: Tensor | None = None, scale: Tensor | None = None) -> LoraTensors:
        """Writes one adapter per description.

        Args:
            states: Encoded descriptions, (N, E) or (N, S, E).
            mask: For (N, S, E), True where there is a token, (N, S).
            scale: How much of the description's change is added to the shared LoRA, (N,): 1 all of it, 0 none.

        Returns:
            A batch of N adapters: A (N, L, R, I) and B (N, L, O, R) for each target.
        """
        own_a, own_b = self.shared_lora()
        shared_a, shared_b = (tuple(x.expand(len(states), *x.shape) for x in part) for part in (own_a, own_b))
        if self.trunk is None or self.head is None:
            return LoraTensors(shared_a, shared_b, self.scaling)
        words = states
        if self.normalizer is not None:
            states = self.normalizer(states)
        features_NLMH = self.trunk(states, mask)
        change_a, change_b = self.head(features_NLMH)
        open_N111 = None if self.gate is None else self.gate(features_NLMH)
        for m, pointer in self.pointers.items():
            pointed = pointer(features_NLMH[:, :, int(m)], states, words, mask)
            change_b[int(m)] = change_b[int(m)] + (pointed if open_N111 is None else open_N111 * pointed)
        if scale is not None:
            factor = scale[:, None, None, None]
            change_a, change_b = [factor * x for x in change_a], [factor * x for x in change_b]
        std = self.output_std
        return LoraTensors(
            _added(own_a, change_a, None if std is None else std.a) if change_a else shared_a,
            _added(own_b, change_b, None if std is None else std.b),
            self.scaling,
        )

    def shared_adapter(self) -> LoraTensors:
        """The LoRA that all descriptions share, as a single adapter; its tensors are the parameters themselves."""
        a, b = self.shared_lora()
        return LoraTensors(a, b, self.scaling)

    def load_shared_lora(self, lora: LoraTensors) -> None:
        """Starts from a trained LoRA: with untrained heads every description then gives exactly this adapter.

        Args:
            lora: A single adapter of this hypernetwork's spec.

        Raises:
            SpecMismatchError: if shapes or scaling differ.
        """
        parameters = (*self.shared_lora.a, *self.shared_lora.b)
        expected = [tuple(x.shape) for x in parameters]
        given = [tuple(x.shape) for x in (*lora.a, *lora.b)]
        if expected != given or lora.scaling != self.scaling:
            raise SpecMismatchError(
                f"The shared LoRA needs tensors {expected} scaled by {self.scaling}, the adapter has {given} scaled by "
                f"{lora.scaling}. Train it with the same targets, layers, rank and alpha."
            )
        with torch.no_grad():
            for parameter, value in zip(parameters, (*lora.a, *lora.b), strict=True):
                parameter.copy_(value)


def _build_pointers(spec: AdapterSpec, embedding_size: int, kind: Kind, config: HypernetConfig) -> nn.ModuleDict:
    """One pointer for each target that `config.pointer` names, under the target's number."""
    pointers = nn.ModuleDict()
    for m, target in enumerate(spec.targets):
        if target.name not in config.pointer:
            continue
        if kind != "tokens" or embedding_size % target.out_features:
            what = "token" if kind == "tokens" else "text"
            raise ConfigError(
                f"hypernet.pointer '{target.name}' takes vectors of {target.out_features} numbers from the "
                f"description's tokens; this encoder gives {embedding_size} a {what}"
            )
        pointers[str(m)] = Pointer(config.width, embedding_size, target.out_features, rank=spec.rank)
    if len(pointers) < len(config.pointer):
        raise ConfigError(
            f"hypernet.pointer names {', '.join(config.pointer)}, the targets are "
            f"{', '.join(target.name for target in spec.targets)}"
        )
    return pointers


class InputNormalizer(nn.Module):
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


class SharedLora(nn.Module):
    """The LoRA that all descriptions share: A as PEFT initialises it, B zero."""

    def __init__(self, sizes: Sizes, *, num_layers: int, rank: int, trainable: bool) -> None:
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
        return tuple(self.a.parameters()), tuple(self.b.parameters())


class OutputStd(nn.Module):
    """What the head's output is multiplied by, for every element of A and B: constants, saved with the weights.

    There is none for A where the head does not write it.
    """

    def __init__(self, sizes: Sizes, *, num_layers: int, rank: int) -> None:
        super().__init__()
        self.a = nn.ParameterList(torch.ones(num_layers, rank, i) for i, _ in sizes if i).requires_grad_(False)
        self.b = nn.ParameterList(torch.ones(num_layers, o, rank) for _, o in sizes).requires_grad_(False)


def _added(shared: Sequence[Tensor], change: Sequence[Tensor], std: Iterable[Tensor] | None) -> tuple[Tensor, ...]:
    """shared + std · change, for each target."""
    # Under autocast the change has fewer digits than the shared LoRA, which must not be lost.
    if not torch.is_grad_enabled() and all(c.dtype == s.dtype for s, c in zip(shared, change, strict=True)):
        # In place: nobody else reads the change, and fresh memory of its size costs as much as writing it did.
        scaled = change if std is None else [c.mul_(d) for c, d in zip(change, std, strict=True)]
        return tuple(c.add_(s) for s, c in zip(shared, scaled, strict=True))
    if std is None:
        return tuple(s + c for s, c in zip(shared, change, strict=True))
    return tuple(s + d * c for s, d, c in zip(shared, std, change, strict=True))


class SentenceTrunk(nn.Module):
    """The paper's trunk: embedding, depth and module type are concatenated and mixed."""

    def __init__(self, embedding_size: int, grid: Grid, config: HypernetConfig) -> None:
        super().__init__()
        (num_layers, num_targets), width, dropout = grid, config.width, config.dropout
        self.embedding = nn.Sequential(nn.Linear(embedding_size, width // 2), nn.LayerNorm(width // 2))
        self.depth = nn.Sequential(nn.Embedding(num_layers, width // 4), nn.LayerNorm(width // 4))
        self.target = nn.Sequential(nn.Embedding(num_targets, width // 4), nn.LayerNorm(width // 4))
        self.mixer = nn.Sequential(nn.Dropout(dropout), *feed_forward(width, dropout))
        self.block = Residual(width, dropout)
        self.register_buffer("layer_index", torch.arange(num_layers), persistent=False)
        self.register_buffer("target_index", torch.arange(num_targets), persistent=False)
        self.grid = grid

    def forward(self, states_NE: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, E) to features (N, L, M, H)."""
        n, (num_layers, num_targets) = states_NE.shape[0], self.grid
        task = self.embedding(states_NE)[:, None, None].expand(n, num_layers, num_targets, -1)
        depth = self.depth(self.layer_index)[None, :, None].expand(n, num_layers, num_targets, -1)
        target = self.target(self.target_index)[None, None].expand(n, num_layers, num_targets, -1)
        return self.block(self.mixer(torch.cat([task, depth, target], dim=-1)))


class TokenTrunk(nn.Module):
    """One learned query per (layer, target) reads the description's token states (a Perceiver, arXiv 2103.03206)."""

    def __init__(self, embedding_size: int, grid: Grid, config: HypernetConfig) -> None:
        super().__init__()
        (num_layers, num_targets), width, heads = grid, config.width, config.attention_heads
        if width % heads:
            raise ConfigError(f"hypernet.width ({width}) must be divisible by hypernet.attention_heads ({heads})")
        self.grid, self.token_dropout = grid, config.token_dropout
        self.read = nn.Sequential(nn.Linear(embedding_size, width), nn.LayerNorm(width))
        self.depth = nn.Parameter(torch.randn(num_layers, 1, width))
        self.target = nn.Parameter(torch.randn(1, num_targets, width))
        self.blocks = nn.ModuleList(TokenBlock(width, heads, config.dropout) for _ in range(config.token_blocks))

    def forward(self, states_NSE: Tensor, mask_NS: Tensor | None) -> Tensor:
        """(N, S, E) with mask (N, S) to features (N, L, M, H)."""
        assert mask_NS is not None, "token states come with a mask"
        if self.training and self.token_dropout:
            kept = torch.rand(mask_NS.shape, device=mask_NS.device) >= self.token_dropout
            kept[:, 0] = True  # the first token always stays, so no description is ever empty
            mask_NS = mask_NS & kept
        tokens_NSH = self.read(states_NSE)
        queries = (self.depth + self.target).flatten(0, 1)
        x_NQH = queries.expand(states_NSE.shape[0], *queries.shape)
        for block in self.blocks:
            x_NQH = block(x_NQH, tokens_NSH, mask_NS)
        return x_NQH.unflatten(1, self.grid)


class TokenBlock(nn.Module):
    """Cross-attention to the tokens, self-attention among the queries, MLP; pre-norm, residual."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.cross, self.self_ = Attention(width, heads), Attention(width, heads)
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


class PointerGate(nn.Module):
    """How much of what the pointers add is taken: a number in (0, 1) for each adapter, decided by its features.

    Args:
        width: H.
    """

    OPEN = 2.0
    """What it starts from, before the sigmoid: .88 for every description."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decide = nn.Linear(width, 1)
        nn.init.zeros_(self.decide.weight)
        nn.init.constant_(self.decide.bias, self.OPEN)

    def forward(self, features_NLMH: Tensor) -> Tensor:
        """(N, L, M, H) to (N, 1, 1, 1)."""
        open_N1: Tensor = self.decide(features_NLMH.mean((1, 2))).sigmoid()
        return open_N1[..., None, None]
