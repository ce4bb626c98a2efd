"""Linear modules with a second copy of their weights, in the order in which oneDNN reads them.

PyTorch's own float32 product reads a weight matrix for a few rows at half the speed at which memory could give it (on
an AMD EPYC; the ordered copy makes a step over 8 rows 1.4 times as fast). The copy costs the weights' memory once more.

oneDNN compiles a program for each number of rows and shape of weights, of 0.6 MiB, and keeps 1,024 of them: prompts of
all lengths would fill 600 MiB by and by. So rows are padded to one of 29 numbers, and more than those are left to
PyTorch's own product, which compiles nothing.

Knows modules. Knows no adapters and no rows.
"""

import platform
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor, nn

MOST_BYTES = 2**31
"""Weights of larger models are not copied."""
ROWS = 8
"""The number of rows that the order is best for; other numbers are served as well."""
SIZES = (*range(1, ROWS), *range(ROWS, 64, ROWS), *range(64, 513, 32))
"""Numbers of rows that programs are compiled for, ascending."""


class PackedLinears:
    """Makes a model's float32 linear modules on an x86 CPU compute from ordered copies, until `release`.

    Args:
        model: The model. Its weights stay where they are, and must not change meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        linears = (module for module in model.modules() if isinstance(module, nn.Linear))
        self._modules = [module for module in linears if _can_be_packed(module)]
        if sum(module.weight.nbytes for module in self._modules) > MOST_BYTES:
            self._modules.clear()
        for module in self._modules:
            module.forward = _packed(module)  # type: ignore[method-assign, assignment]

    def release(self) -> None:
        """The modules compute from their own weights again, and the copies' memory goes back."""
        for module in self._modules:
            del module.forward
        self._modules.clear()


def _can_be_packed(module: nn.Linear) -> bool:
    # Quantised modules are subclasses; what has a `forward` of its own is somebody else's already.
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    there = platform.machine() in ("x86_64", "AMD64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _packed(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), ROWS)
    bias = None if module.bias is None else module.bias.detach()

    def forward(input: Tensor) -> Tensor:
        rows, features = input.shape[:-1].numel(), input.shape[-1]
        if not 0 < rows <= SIZES[-1]:
            return nn.functional.linear(input, module.weight, bias)
        size = SIZES[bisect_left(SIZES, rows)]
        if size != rows:
            input_NI = nn.functional.pad(input.reshape(rows, features), (0, 0, 0, size - rows))
            return _product(input_NI, weight, bias)[:rows].view(*input.shape[:-1], -1)
        return _product(input, weight, bias)

    return forward


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return output
