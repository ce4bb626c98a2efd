"""Adapters on a live model: one for all sequences, or one per sequence, without touching the model's weights.

The same code serves training, evaluation and chat: forward hooks add scaling · B(Ax) to each target module.
Knows modules and tensors. Knows no tasks and no training.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from t2l.errors import AdapterNotAppliedError, SpecMismatchError
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec


class HasLora(Protocol):
    """What `applied` needs of an adapter; `t2l.generate.Adapter` is one."""

    @property
    def lora(self) -> LoraTensors:
        """A single adapter's tensors."""

    @property
    def spec(self) -> AdapterSpec:
        """Where they belong."""


class LiveAdapters:
    """The hooks on a model. `lora` may be set again at any time; None means the plain base model."""

    def __init__(self) -> None:
        self.lora: LoraTensors | None = None
        """A single adapter for every sequence, or a batch with one adapter per sequence."""


@contextmanager
def live(model: nn.Module, spec: AdapterSpec) -> Iterator[LiveAdapters]:
    """Hooks the model's target modules and yields the place to put adapters into; always unhooks.

    Args:
        model: The base model.
        spec: Which modules to hook.

    Raises:
        SpecMismatchError: if the model lacks a target module or its sizes differ.
    """
    slots = LiveAdapters()
    modules = _target_modules(model, spec)
    handles = []
    try:
        for m, layer, module in modules:
            handles.append(module.register_forward_hook(_hook(slots, m, layer)))
        yield slots
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def applied(
    model: nn.Module, adapters: HasLora | Sequence[HasLora], *, rows: Sequence[int] | None = None
) -> Iterator[nn.Module]:
    """Puts adapters on a model for the length of a `with` block, and leaves the model as it was.

    Args:
        model: The base model the adapters were generated for.
        adapters: One adapter for every sequence, or one per sequence of the batch.
        rows: For each sequence the position of its adapter in `adapters`, where several share one.

    Yields:
        The same model.

    Raises:
        SpecMismatchError: if the adapters are for another base, or differ in shape among themselves.
        AdapterNotAppliedError: if there is no adapter or `rows` names none; in the forward pass, if the batch has
            another number of sequences.
    """
    listed = list(adapters) if isinstance(adapters, Sequence) else [adapters]
    if not listed:
        raise AdapterNotAppliedError("No adapter given: `applied` needs at least one")
    spec = listed[0].spec
    for other in listed[1:]:
        if other.spec is not spec:
            spec.require_same_shape(other.spec, this="The first adapter", that="another one in the batch")
    if len(listed) == 1 and rows is None:
        lora = listed[0].lora
    else:
        lora = LoraTensors.stack([x.lora for x in listed])
        if rows is not None:
            unknown = [row for row in rows if not 0 <= row < len(listed)]
            if unknown:
                raise AdapterNotAppliedError(f"`rows` names row {unknown[0]} of {len(listed)} adapters, counted from 0")
            lora = lora.select(torch.tensor(rows, device=lora.a[0].device))
    parameter = next(model.parameters())
    lora = lora.map(lambda x: x.to(parameter.device, parameter.dtype))
    # Sliced and transposed once, not in every forward pass: decoding calls each hook once a token.
    layer_axis = lora.a[0].dim() - 3
    a = [[x.mT for x in a_m.unbind(layer_axis)] for a_m in lora.a]
    b = [[x.mT for x in (b_m * lora.scaling).unbind(layer_axis)] for b_m in lora.b]
    handles = []
    try:
        for m, position, module in _target_modules(model, spec):
            handles.append(module.register_forward_hook(_fixed_hook(a[m][position], b[m][position])))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _target_modules(model: nn.Module, spec: AdapterSpec) -> list[tuple[int, int, nn.Linear]]:
    """(m, position in spec.layers, module) for every target module, checked."""
    modules = []
    for m, target in enumerate(spec.targets):
        for position, layer in enumerate(spec.layers):
            path = target.path.format(layer=layer)
            try:
                module: Any = model.get_submodule(path)
            except AttributeError as error:
                config = getattr(model, "config", None)
                raise SpecMismatchError(
                    f"The adapter is for {spec.base_model} ({spec.num_layers} layers) and changes {path}; this model "
                    f"({getattr(config, 'num_hidden_layers', '?')} layers) has no such module. "
                    "Use the base model the adapter was generated for."
                ) from error
            found = (getattr(module, "in_features", None), getattr(module, "out_features", None))
            if found != (target.in_features, target.out_features):
                raise SpecMismatchError(
                    f"The adapter is for {spec.base_model}, whose {path} is {target.in_features} x "
                    f"{target.out_features} (in x out); this model's is {found[0]} x {found[1]}. "
                    "Use the base model the adapter was generated for."
                )
            modules.append((m, position, module))
    return modules


def _hook(slots: LiveAdapters, m: int, layer: int) -> Any:
    def add_lora(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        lora = slots.lora
        if lora is None:
            return None
        (x_BTI,) = inputs
        a, b = lora.a[m], lora.b[m]
        if a.dim() == 3:  # one adapter for all: (R, I) and (O, R)
            a, b = a[layer], b[layer]
        else:  # one per sequence: (B, R, I) and (B, O, R)
            a, b = a[:, layer], b[:, layer]
            _require_one_each(x_BTI, a)
        update = (x_BTI @ a.mT.to(x_BTI.dtype)) @ b.mT.to(x_BTI.dtype)
        return output + update * lora.scaling

    return add_lora


def _fixed_hook(a: Tensor, b: Tensor) -> Any:
    """The hook of one adapter for all, A (I, R) and B (R, O), or one per sequence, (B, I, R) and (B, R, O); scaled."""

    def add_to_all(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (inputs[0] @ a) @ b

    def add_to_each(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x_BTI,) = inputs
        _require_one_each(x_BTI, a)
        return torch.baddbmm(output, torch.bmm(x_BTI, a), b)

    return add_to_all if a.dim() == 2 else add_to_each


def _require_one_each(x_BTI: Tensor, a: Tensor) -> None:
    if x_BTI.dim() != 3 or x_BTI.shape[0] != a.shape[0]:
        raise AdapterNotAppliedError(
            f"{a.shape[0]} adapters for a batch of {x_BTI.shape[0]} sequences: give one adapter, one per "
            "sequence, or `rows` that says which sequence uses which"
        )
