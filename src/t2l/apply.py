"""Adapters on a live model: one for all sequences, or one per sequence, without touching the model's weights.

The same code serves training, evaluation and chat: forward hooks add scaling · B(Ax) to each target module.
Knows modules and tensors. Knows no tasks and no training.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from t2l.errors import AdapterNotAppliedError, SpecMismatchError
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec


class HasLora(Protocol):
    """What `apply_adapters` needs of an adapter; `t2l.text_to_lora.Adapter` is one."""

    @property
    def lora(self) -> LoraTensors:
        """A single adapter's tensors."""

    @property
    def spec(self) -> AdapterSpec:
        """Where they belong."""


class AdapterHooks:
    """The hooks on a model. `lora` may be set again at any time; None means the plain base model.

    Each hooked module carries its own A and B for as long as the hooks are on: all layers then run one and the same
    code on their own tensors, so that `torch.compile` of a decoder layer compiles once for all of them.
    """

    def __init__(self, modules: Sequence[tuple[int, int, nn.Linear]], attribute: str) -> None:
        self._modules, self._attribute = modules, attribute
        self._lora: LoraTensors | None = None

    @property
    def lora(self) -> LoraTensors | None:
        """A single adapter for every sequence, or a batch with one adapter per sequence."""
        return self._lora

    @lora.setter
    def lora(self, lora: LoraTensors | None) -> None:
        self._lora = lora
        if lora is None:
            for _, _, module in self._modules:
                setattr(module, self._attribute, None)
            return
        # Scaled, transposed and cut into layers once, not at every token: for each module (…, I, R) and (…, R, O).
        a = [x.mT.unbind(-3) for x in lora.a]
        b = [(x * lora.scaling).mT.unbind(-3) for x in lora.b]
        for m, layer, module in self._modules:
            setattr(module, self._attribute, (a[m][layer], b[m][layer]))


@contextmanager
def hooked(model: nn.Module, spec: AdapterSpec) -> Iterator[AdapterHooks]:
    """Hooks the model's target modules and yields the place to put adapters into; always unhooks.

    Args:
        model: The base model.
        spec: Which modules to hook.

    Raises:
        SpecMismatchError: if the model lacks a target module or its sizes differ.
    """
    modules = target_modules(model, spec)
    depth = 0
    while any(hasattr(module, f"_t2l_lora_{depth}") for _, _, module in modules):
        depth += 1
    attribute = f"_t2l_lora_{depth}"
    slots = AdapterHooks(modules, attribute)
    paths = {id(module): spec.targets[m].path.format(layer=spec.layers[n]) for m, n, module in modules}
    handles = []
    try:
        slots.lora = None
        for _, _, module in modules:
            handles.append(module.register_forward_hook(_hook(attribute, paths)))
        yield slots
    finally:
        for handle in handles:
            handle.remove()
        for _, _, module in modules:
            delattr(module, attribute)


@contextmanager
def apply_adapters(
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
        raise AdapterNotAppliedError("No adapter given: `apply_adapters` needs at least one")
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
    with hooked(model, spec) as slots:
        slots.lora = lora
        yield model


@contextmanager
def compiled(model: nn.Module, spec: AdapterSpec) -> Iterator[None]:
    """Runs the decoder layers that bear adapters compiled for the length of a `with` block: one graph for all of them.

    The others run as they are: to the compiler a layer with hooks and one without are the same, and the graph of one
    would serve for the other.

    Layer by layer, compiling takes seconds where the whole model takes minutes, and runs as fast where a step's
    work hides the launches. Enter it inside `live`: hooks that come later are not seen.

    Args:
        model: The base model.
        spec: Its layers' place is read from the targets' paths.
    """
    (path,) = {target.path.split("{layer}")[0].rstrip(".") for target in spec.targets}
    children = list(model.get_submodule(path).children())
    layers = [children[layer] for layer in spec.layers]
    try:
        for layer in layers:
            layer.compile(fullgraph=True, dynamic=False)
        with warnings.catch_warnings():
            # The compiler looks whether the A and B that modules carry have gradients of their own.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def target_modules(model: nn.Module, spec: AdapterSpec) -> list[tuple[int, int, nn.Linear]]:
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


def _hook(attribute: str, paths: Mapping[int, str]) -> Any:
    """The hook of all modules at one depth of nesting.

    Args:
        attribute: Where a module carries its A and B.
        paths: The modules' names by `id`, for errors.
    """

    def add_lora(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        lora = getattr(module, attribute)
        if lora is None:
            return None
        (x,) = inputs
        a, b = (part.to(x.dtype) for part in lora)
        if a.dim() == 2:  # one adapter for all
            return output + (x @ a) @ b
        if x.dim() != 3:
            raise AdapterNotAppliedError(
                f"{paths[id(module)]} gets the tokens of all sequences in one row, {tuple(x.shape)}, so it cannot give "
                f"each sequence its own of {a.shape[0]} adapters. Apply one adapter at a time to this model, or use "
                "adapters without this target"
            )
        if x.shape[0] != a.shape[0]:
            raise AdapterNotAppliedError(
                f"{a.shape[0]} adapters for a batch of {x.shape[0]} sequences: give one adapter, one per sequence, or "
                "`rows` that says which sequence uses which"
            )
        return torch.baddbmm(output, torch.bmm(x, a), b)

    return add_lora
