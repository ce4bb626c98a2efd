"""One adapter a row on live modules: rows come and go, and each meets its own A and B or none.

Adapters in one batch may have different targets, layers, ranks and scalings. All A of one target lie in one tensor, a
row each, padded with zeros up to the largest rank; what an adapter does not have is zero there, so it adds exactly
nothing. Rows hold copies: once a row is set, nobody needs to keep the adapter alive for it. On a GPU adapters are kept
there beside the rows as long as somebody else keeps them alive, so that only the first row with one waits for the bus.

Knows modules and tensors. Knows no tokens, no requests and no files. Shape letters as in `t2l.spec`.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from t2l.apply import HasLora, target_modules
from t2l.errors import AdapterNotAppliedError
from t2l.lora import LoraTensors
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

    def put(self, row: int, layers: tuple[int, ...], a_LIR: Tensor, b_LRO: Tensor) -> None:
        """Writes a row that is empty; its rank and layers beyond the adapter's stay zero."""
        assert row not in self.rows, "rows are cleared before they are written"
        rank = a_LIR.shape[2]
        self._grow(max(layers) + 1, row + 1, rank)
        self.rows.add(row)  # before the first write: if one fails, the row is cleared
        # All layers from the first one, as most adapters have them, are a slice: nothing else goes to the device.
        whole = layers == tuple(range(len(layers)))
        at = slice(len(layers)) if whole else torch.tensor(layers, device=self._like.device)
        self._a[at, row, :, :rank], self._b[at, row, :rank] = a_LIR, b_LRO

    def clear(self, row: int) -> None:
        """Makes a row's adapter zero: what the next adapter in it lacks must not be the last one's."""
        if row in self.rows:
            self._a[:, row], self._b[:, row] = 0, 0
            self.rows.discard(row)

    def move(self, source: int, to: int) -> None:
        """Row `source` becomes row `to` and is empty itself."""
        if source in self.rows:
            self._a[:, to], self._b[:, to] = self._a[:, source], self._b[:, source]
            self.rows.add(to)
        else:
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


class _Ready:
    """Adapters as rows take them: on the model's device, in its type, B scaled.

    Args:
        like: A parameter of the model.
        keep: Whether they are kept for the next row, until nobody else has the adapter any more.
    """

    def __init__(self, like: Tensor, *, keep: bool) -> None:
        self._like, self._keep = like, keep
        self._kept: dict[int, tuple[Any, list[tuple[Tensor, Tensor]]]] = {}

    def get(self, lora: LoraTensors) -> list[tuple[Tensor, Tensor]]:
        """A (L, I, R) and B (L, R, O) of each target."""
        key = id(lora)
        if key in self._kept:
            return self._kept[key][1]
        made = [self._made(a_LRI, b_LOR, lora.scaling) for a_LRI, b_LOR in zip(lora.a, lora.b, strict=True)]
        if self._keep:
            made = [(a_LIR.contiguous(), b_LRO.contiguous()) for a_LIR, b_LRO in made]
            self._kept[key] = weakref.ref(lora, lambda _: self._kept.pop(key, None)), made
        return made

    def _made(self, a_LRI: Tensor, b_LOR: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        device, dtype = self._like.device, self._like.dtype
        # Moved first: the device changes types faster. B is scaled before the model's type takes digits away, and once.
        return a_LRI.to(device).to(dtype).mT, (b_LOR.to(device) * scaling).to(dtype).mT

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return sum(x.nbytes for _, made in list(self._kept.values()) for pair in made for x in pair)


class RowAdapters:
    """The adapters of a batch's rows on one model.

    Args:
        model: The base model; hooks are put on a module when the first adapter needs it.
        keep: Whether adapters stay on the model's device while they live; where it is a GPU, if absent.
    """

    def __init__(self, model: nn.Module, *, keep: bool | None = None) -> None:
        self._model, self._like = model, next(model.parameters())
        self._ready = _Ready(self._like, keep=self._like.device.type != "cpu" if keep is None else keep)
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
        for target, (a_LIR, b_LRO) in zip(adapter.spec.targets, self._ready.get(adapter.lora), strict=True):
            self._stack(target).put(row, adapter.spec.layers, a_LIR, b_LRO)

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

    @property
    def kept_nbytes(self) -> int:
        """Memory on the device of adapters that are kept ready for rows to come."""
        return self._ready.nbytes

    def _stack(self, target: Target) -> _Stack:
        # Two adapters may call modules of one path by different names, and cover different layers of it.
        key = (target.path, target.in_features, target.out_features)
        if key not in self._stacks:
            self._stacks[key] = _Stack(target, self._like)
        return self._stacks[key]
