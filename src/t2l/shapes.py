"""Modules without numbers, to be filled with those of a file. Knows torch alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def only_shapes() -> Iterator[None]:
    """Modules that are made inside have shapes and no numbers: they take no memory and no time.

    On the device `meta` alone, torch draws first numbers by a way that imports its compiler, which takes seconds.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class NoFirstNumbers(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__module__", "") == "torch.nn.init":
                return args[0] if args else kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    with torch.device("meta"), NoFirstNumbers():
        yield
