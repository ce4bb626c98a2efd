"""The same adapter at a higher rank, for engines that take certain ranks only. Knows tensors and specs."""

from dataclasses import replace

from torch.nn.functional import pad

from t2l.errors import SpecMismatchError
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for `max_lora_rank`, but 1, which no adapter has that is worth its place."""


def next_rank(rank: int) -> int:
    """The smallest of vLLM's ranks that holds an adapter of this rank.

    Raises:
        SpecMismatchError: if there is none.
    """
    fitting = [legal for legal in VLLM_RANKS if legal >= rank]
    if not fitting:
        raise SpecMismatchError(f"The adapter has rank {rank}; vLLM takes ranks up to {VLLM_RANKS[-1]}")
    return fitting[0]


def pad_rank(lora: LoraTensors, spec: AdapterSpec, rank: int) -> tuple[LoraTensors, AdapterSpec]:
    """The same ΔW with more rows of A and columns of B, all of them zero.

    Alpha grows with the rank, so that the scaling stays what it was.

    Args:
        lora: A single adapter or a batch.
        spec: Where it belongs.
        rank: The new rank.

    Raises:
        SpecMismatchError: if the new rank is lower than the adapter's.
    """
    more = rank - spec.rank
    if more < 0:
        raise SpecMismatchError(f"The adapter has rank {spec.rank}, which rank {rank} cannot hold; give a higher one")
    wider = tuple(pad(a, (0, 0, 0, more)) for a in lora.a), tuple(pad(b, (0, more)) for b in lora.b)
    alpha = spec.scaling * (rank**0.5 if spec.use_rslora else rank)
    padded = spec if not more else replace(spec, rank=rank, alpha=alpha)
    return LoraTensors(*wider, scaling=lora.scaling), padded
