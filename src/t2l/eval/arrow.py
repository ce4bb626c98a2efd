"""Arrow routing (arXiv 2405.11157): every token goes through the few adapters of a library that are nearest to it.

Nearest is whose update's first right singular vector the token is most along. PEFT has the same
(`peft.create_arrow_model`, which a test compares with) but takes every token through every adapter, (T, N, O) numbers a
module; here the adapters' A stand one under another, as their B do, and a token's shares come in between, (T, N·R)
numbers, so that hundreds of adapters can be routed over. Knows a model and a library. Knows no tasks and no conditions.
Shape letters as in `t2l.spec`; N adapters, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from t2l.apply import target_modules
from t2l.errors import AdapterNotAppliedError
from t2l.library import AdapterLibrary

NEAREST = 3
"""Adapters that a token goes through."""


def prototypes(a: Tensor, b: Tensor) -> Tensor:
    """Computes the first right singular vectors of ΔW = BA without forming it; their sign is arbitrary.

    Args:
        a: (…, R, I).
        b: (…, O, R).

    Returns:
        (…, I), of length 1.
    """
    basis, upper = torch.linalg.qr(a.mT.double())  # A = upperᵀ basisᵀ, so that AᵀBᵀBA = basis (upper BᵀB upperᵀ) basisᵀ
    gram = upper @ (b.mT.double() @ b.double()) @ upper.mT
    return (basis @ torch.linalg.eigh(gram).eigenvectors[..., -1:]).squeeze(-1).to(a.dtype)


@contextmanager
@torch.no_grad()
def arrow(model: Any, library: AdapterLibrary) -> Iterator[Any]:
    """Routes a model's tokens over a library's adapters for the length of a `with` block.

    Args:
        model: The base model.
        library: Which adapters.

    Yields:
        The same model.

    Raises:
        SpecMismatchError: if the adapters are of another base.
        AdapterNotAppliedError: if the routed model's logits are the base's.
    """
    parameter = next(model.parameters())
    tokens = torch.tensor([[1, 2, 3, 4]], device=parameter.device) % model.config.vocab_size
    plain = model(tokens).logits
    lora = library.stack()
    near = [prototypes(a, b) for a, b in zip(lora.a, lora.b, strict=True)]
    handles = []
    try:
        for m, layer, module in target_modules(model, library.spec):
            own = near[m][:, layer], lora.a[m][:, layer].flatten(0, 1), lora.b[m][:, layer] * lora.scaling
            route = _Route(*(x.to(parameter.device, parameter.dtype) for x in own))
            handles.append(module.register_forward_hook(route))
        if torch.equal(model(tokens).logits, plain):
            raise AdapterNotAppliedError("Arrow routing leaves the base model's logits as they are")
        yield model
    finally:
        for handle in handles:
            handle.remove()


class _Route:
    """The forward hook of one module, which adds what the token's adapters write.

    Args:
        near_NI: What tokens are compared with.
        a_nI: A of all adapters, one under another, n = N·R.
        b_NOR: Their B, scaled.
    """

    def __init__(self, near_NI: Tensor, a_nI: Tensor, b_NOR: Tensor) -> None:
        self.near_IN, self.a_In = near_NI.mT.contiguous(), a_nI.mT.contiguous()
        self.b_nO = b_NOR.mT.flatten(0, 1).contiguous()
        self.nearest = min(NEAREST, len(near_NI))

    def __call__(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs
        along = (x @ self.near_IN).abs()
        most, which = along.topk(self.nearest, dim=-1)
        shares = torch.zeros_like(along).scatter(-1, which, most.softmax(-1))
        low_rank = (x @ self.a_In).unflatten(-1, (shares.shape[-1], -1)) * shares[..., None]
        return output + low_rank.flatten(-2) @ self.b_nO
