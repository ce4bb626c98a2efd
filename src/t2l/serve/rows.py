"""One adapter a row on live modules: rows come and go, and each meets its own A and B or none.

Adapters in one batch may have different targets, layers, ranks and scalings. All A of one target lie in one tensor, a
row each, padded with zeros up to the largest rank; what an adapter does not have is zero there, so it adds exactly
nothing. Rows hold copies: once a row is set, nobody needs to keep the adapter alive for it.

Knows modules and tensors. Knows no tokens, no requests and no files. Shape letters as in `t2l.spec`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from t2l.apply import HasLora, target_modules
from t2l.errors import AdapterNotAppliedError
from t2l.spec import AdapterSpec, Target


class _Slot:
    """The hook of one module: adds B(Ax) of each row, or leaves the output alone where `lora` is None."""

    def __init__(self) -> None:
        self.lora: tuple[Tensor, Tensor] | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.lora is None:
            return None
        x_BTI, (a_BIR, b_BRO) = inputs[0], self.lora
        if x_BTI.dim() != 3 or x_BTI.shape[0] != a_BIR.shape[0]:
            raise AdapterNotAppliedError(
                f"{a_BIR.shape[0]} rows with adapters met a batch of shape {tuple(x_BTI.shape)}; this base model does "
                "not pass whole sequences to its linear modules, and adapters cannot be served on it"
            )
        return torch.baddbmm(output, torch.bmm(x_BTI, a_BIR), b_BRO)


class _Stack:
    """A and B of one target for all rows: A (L, B, I, R) and B (L, B, R, O), scaled already."""

    def __init__(self, target: Target, like: Tensor) -> None:
        self.target, self._like = target, like
        self.slots: dict[int, _Slot] = {}
        self.rows: set[int] = set()
        self._a = self._b = like.new_zeros(0, 0, 0, 0)

    def put(self, row: int, layers: tuple[int, ...], a_LRI: Tensor, b_LOR: Tensor, scaling: float) -> None:
        """Writes a row; its rank and layers beyond the adapter's become zero."""
        self._grow(max(layers) + 1, row + 1, a_LRI.shape[1])
        self.clear(row)
        device, rank = self._like.device, a_LRI.shape[1]
        # All layers from the first one, as most adapters have them, are a slice: nothing else goes to the device.
        whole = layers == tuple(range(len(layers)))
        at = slice(len(layers)) if whole else torch.tensor(layers, device=device)
        # Moved first: the device changes types faster. B is scaled before the model's type takes digits away, and once.
        self._a[at, row, :, :rank] = a_LRI.to(device).to(self._like.dtype).mT
        self._b[at, row, :rank] = (b_LOR.to(device) * scaling).to(self._like.dtype).mT
        self.rows.add(row)

    def clear(self, row: int) -> None:
        """Makes a row's adapter zero: what the next adapter in it lacks must not be the last one's."""
        if row < self._a.shape[1]:
            self._a[:, row], self._b[:, row] = 0, 0
        self.rows.discard(row)

    def move(self, source: int, to: int) -> None:
        """Row `source` becomes row `to` and is empty itself."""
        if source in self.rows:
            self._a[:, to], self._b[:, to] = self._a[:, source], self._b[:, source]
            self.rows.add(to)
        elif to in self.rows:
            self.clear(to)
        self.clear(source)

    def select(self, start: int, stop: int) -> None:
        """Rows `start` to `stop` are the batch of the coming forward pass."""
        active = any(start <= row < stop for row in self.rows)
        if active:
            self._grow(0, stop, 0)  # rows after the last one with an adapter
        for layer, slot in self.slots.items():
            covered = active and layer < self._a.shape[0]
            slot.lora = (self._a[layer, start:stop], self._b[layer, start:stop]) if covered else None

    def _grow(self, layers: int, rows: int, rank: int) -> None:
        old = (*self._a.shape[:2], self._a.shape[3])
        if layers <= old[0] and rows <= old[1] and rank <= old[2]:
            return
        # Twice the rows at a time, so that a filling batch copies each adapter a few times at most.
        wanted = max(layers, old[0]), rows if rows <= old[1] else max(rows, 2 * old[1]), max(rank, old[2])
        wanted = (wanted[0], max(wanted[1], old[1]), wanted[2])
        a = self._like.new_zeros(wanted[0], wanted[1], self.target.in_features, wanted[2])
        b = self._like.new_zeros(wanted[0], wanted[1], wanted[2], self.target.out_features)
        if old[0]:
            a[: old[0], : old[1], :, : old[2]], b[: old[0], : old[1], : old[2]] = self._a, self._b
        self._a, self._b = a, b

    @property
    def nbytes(self) -> int:
        """Memory that the rows take."""
        return self._a.nbytes + self._b.nbytes


class RowAdapters:
    """The adapters of a batch's rows on one model.

    Args:
        model: The base model; hooks are put on a module when the first adapter needs it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._like = model, next(model.parameters())
        self._stacks: dict[tuple[str, int, int], _Stack] = {}
        self._handles: list[Any] = []
        self._selected: tuple[int, int] | None = None
        self._fits: AdapterSpec | None = None  # the newest adapter's, whose modules are hooked

    def set(self, row: int, adapter: HasLora | None) -> None:
        """Gives a row its adapter, or none.

        Raises:
            SpecMismatchError: if the adapter does not fit the model; the row then has none.
        """
        self.clear(row)
        if adapter is None:
            return
        if adapter.spec != self._fits:
            self._hook(adapter.spec)
        lora = adapter.lora
        for m, target in enumerate(adapter.spec.targets):
            self._stack(target).put(row, adapter.spec.layers, lora.a[m], lora.b[m], lora.scaling)

    def _hook(self, spec: AdapterSpec) -> None:
        for m, position, module in target_modules(self._model, spec):
            stack, layer = self._stack(spec.targets[m]), spec.layers[position]
            if layer not in stack.slots:
                stack.slots[layer] = _Slot()
                self._handles.append(module.register_forward_hook(stack.slots[layer]))
        self._fits = spec

    def clear(self, row: int) -> None:
        """The row has no adapter."""
        self._selected = None
        for stack in self._stacks.values():
            if row in stack.rows:
                stack.clear(row)

    def move(self, source: int, to: int) -> None:
        """The adapter of row `source` becomes that of row `to`; `source` has none then."""
        self._selected = None
        for stack in self._stacks.values():
            stack.move(source, to)

    def select(self, start: int, stop: int) -> None:
        """The coming forward passes have rows `start` to `stop` as their batch; with no rows it is the plain model."""
        if self._selected != (start, stop):
            self._selected = (start, stop)
            for stack in self._stacks.values():
                stack.select(start, stop)

    def release(self) -> None:
        """Takes all hooks off and gives the memory back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stacks.clear()
        self._selected = self._fits = None

    @property
    def nbytes(self) -> int:
        """Memory that the rows' adapters take."""
        return sum(stack.nbytes for stack in self._stacks.values())

    def _stack(self, target: Target) -> _Stack:
        # Two adapters may call modules of one path by different names, and cover different layers of it.
        key = (target.path, target.in_features, target.out_features)
        if key not in self._stacks:
            self._stacks[key] = _Stack(target, self._like)
        return self._stacks[key]
