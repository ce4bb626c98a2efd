"""Adapters on a live model: one for all sequences, or one per sequence, without touching the model's weights.

The same code serves training, evaluation and chat: forward hooks add scaling · B(Ax) to each target module.
Knows modules and tensors. Knows no tasks and no training.
"""

import itertools
import math
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from t2l.errors import AdapterNotAppliedError, SpecMismatchError
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec, is_transposed, matrix_size


class HasLora(Protocol):
    """What `apply_adapters` needs of an adapter; `t2l.LoraAdapter` is one."""

    @property
    def lora(self) -> LoraTensors:
        """A single adapter's tensors."""

    @property
    def spec(self) -> AdapterSpec:
        """Where they belong."""


_numbers = itertools.count()
"""Makes the name of what each use of `hooked` leaves on modules its own, for nested uses and for several threads."""


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
            setattr(module, self._attribute, _beside(module, a[m][layer], b[m][layer]))


def _beside(module: nn.Linear, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B on the device of a module's weight. Where it is offloaded its weight is on no device: see `_hook`."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.is_meta or weight.device == a.device:
        return a, b
    return a.to(weight.device), b.to(weight.device)


@contextmanager
def hooked(model: nn.Module, spec: AdapterSpec, *, this_thread_only: bool = False) -> Iterator[AdapterHooks]:
    """Hooks the model's target modules and yields the place to put adapters into; always unhooks.

    Args:
        model: The base model.
        spec: Which modules to hook.
        this_thread_only: Whether other threads that use the model meanwhile get the plain model. The check costs a
            little at each module, so training goes without.

    Raises:
        SpecMismatchError: if the model lacks a target module or its sizes differ.
        AdapterNotAppliedError: if the model is a recorded graph, in which hooks would do nothing.
    """
    modules = target_modules(model, spec)
    _require_hooks_work(model)
    attribute = f"_t2l_lora_{next(_numbers)}"
    slots = AdapterHooks(modules, attribute)
    paths = {id(module): spec.targets[m].path.format(layer=spec.layers[n]) for m, n, module in modules}
    hook = _hook(attribute, paths, threading.get_ident() if this_thread_only else None)
    handles = []
    try:
        slots.lora = None
        for _, _, module in modules:
            handles.append(module.register_forward_hook(hook))
        _forget_compiled()
        yield slots
    finally:
        for handle in handles:
            handle.remove()
        for _, _, module in modules:
            delattr(module, attribute)
        _forget_compiled()


def _require_hooks_work(model: nn.Module) -> None:
    """Raises if a part of the model is a recorded graph, which runs no hooks."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            raise AdapterNotAppliedError(
                f"{name or 'The model'} is a {type(module).__name__}, a recorded graph in which adapters would do "
                "nothing. Apply adapters to the model that it was made of"
            )


def _forget_compiled() -> None:
    """Makes functions that `torch.compile` has compiled compile again at their next call.

    To the compiler a model with hooks and one without are the same, so what was compiled before an adapter came or went
    would go on without it, or with it.
    """
    if "torch._dynamo" in sys.modules:  # otherwise nothing has been compiled, and this would import it
        torch.compiler.reset()


@contextmanager
def apply_adapters(
    model: nn.Module, adapters: HasLora | Sequence[HasLora], *, rows: Sequence[int] | None = None
) -> Iterator[nn.Module]:
    """Puts adapters on a model for the length of a `with` block, and leaves the model as it was.

    Only the thread that entered the block sees the adapters: others that use the model meanwhile get the plain model,
    or adapters of their own. A model that was compiled is compiled again at its next call, inside and after the block.

    Args:
        model: The base model the adapters were generated for.
        adapters: One adapter for every sequence, or one per sequence of the batch.
        rows: For each sequence the position of its adapter in `adapters`, where several share one.

    Yields:
        The same model.

    Raises:
        SpecMismatchError: if the adapters are for another base, or differ in shape among themselves.
        AdapterNotAppliedError: if there is no adapter, `rows` names none or the model is a recorded graph; in the
            forward pass, if the batch has another number of sequences.
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
        lora = LoraTensors.stack([x.lora.of_targets(spec.places_in(x.spec)) for x in listed])
        if rows is not None:
            unknown = [row for row in rows if not 0 <= row < len(listed)]
            if unknown:
                raise AdapterNotAppliedError(f"`rows` names row {unknown[0]} of {len(listed)} adapters, counted from 0")
            lora = lora.select(torch.tensor(rows, device=lora.a[0].device))
    # All at once, to where most of the model is; `AdapterHooks` then moves what belongs elsewhere.
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            lora = lora.map(lambda x, to=parameter: x.to(to.device, to.dtype))  # type: ignore[misc]
            break
    with hooked(model, spec, this_thread_only=True) as slots:
        slots.lora = lora
        yield model


@torch.no_grad()
def largest_change(model: Any, adapter: HasLora, tokens: Mapping[str, Tensor]) -> float:
    """How much an adapter moves a logit of a model.

    Args:
        model: The base model.
        adapter: The adapter.
        tokens: What the model is given, such as `input_ids`.

    Raises:
        AdapterNotAppliedError: if it moves none, or the logits are not finite.
    """
    plain = model(**tokens).logits
    with apply_adapters(model, adapter):
        change = float((model(**tokens).logits - plain).abs().max())
    if not math.isfinite(change):
        raise AdapterNotAppliedError(
            f"The logits under the adapter, or the base's own, are not finite (largest change: {change}); is the base "
            "damaged, or its type too small for its numbers?"
        )
    if change == 0:
        raise AdapterNotAppliedError(
            f"The adapter changes the base model's answers in nothing (largest change of a logit: {change}); "
            "is the checkpoint trained, and the adapter not all zeros?"
        )
    return change


@contextmanager
def compiled(model: nn.Module, spec: AdapterSpec) -> Iterator[None]:
    """Runs the decoder layers that bear adapters compiled for the length of a `with` block: one graph for all of them.

    The others run as they are: to the compiler a layer with hooks and one without are the same, and the graph of one
    would serve for the other.

    Layer by layer, compiling takes seconds where the whole model takes minutes, and runs as fast where a step's
    work hides the launches. Enter it inside `hooked`: hooks that come later are not seen.

    Args:
        model: The base model.
        spec: Its layers' place is read from the targets' paths.
    """
    children = decoder_layers(model, spec)
    layers = [children[layer] for layer in spec.layers]
    try:
        for layer in layers:
            if _is_sharded(layer):  # its own hooks, which gather its weights, fit into no graph
                layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)
            else:
                layer.compile(fullgraph=True, dynamic=False)
        with warnings.catch_warnings():
            # The compiler looks whether the A and B that modules carry have gradients of their own.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            yield
    finally:
        # `Module.compile` has no undo; it does nothing but set this attribute, whose None means not compiled.
        for layer in layers:
            layer._compiled_call_impl = None
            layer.__dict__.pop("forward", None)


def decoder_layers(model: nn.Module, spec: AdapterSpec) -> list[Any]:
    """All decoder layers of a model, in order, with adapters or without."""
    (path,) = {target.path.split("{layer}")[0].rstrip(".") for target in spec.targets}
    return list(model.get_submodule(path).children())


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has sharded a module; what was never imported has sharded nothing."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


@contextmanager
def not_compiled(model: nn.Module) -> Iterator[None]:
    """Runs what `compiled` has compiled as it is, for the length of a `with` block: for inputs of many lengths."""
    layers = [module for module in model.modules() if module._compiled_call_impl is not None]
    calls = [layer._compiled_call_impl for layer in layers]
    try:
        for layer in layers:
            layer._compiled_call_impl = None
        yield
    finally:
        for layer, call in zip(layers, calls, strict=True):
            layer._compiled_call_impl = call


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
                    "Use the base model the adapter was generated for"
                    + (", which this PeftModel gives back by `unload()`" if hasattr(model, "peft_config") else "")
                ) from error
            found = matrix_size(module)
            if found != (target.in_features, target.out_features):
                raise SpecMismatchError(
                    f"The adapter is for {spec.base_model}, whose {path} is {target.in_features} x "
                    f"{target.out_features} (in x out); this model's is {found[0]} x {found[1]}. "
                    "Use the base model the adapter was generated for."
                )
            modules.append((m, position, module))
    return modules


@torch.no_grad()
def add_into(model: nn.Module, adapter: HasLora) -> int:
    """Adds ΔW to a model's own weights, in place and for good.

    Sums are computed in float32 and rounded once, to the weights' type.

    Args:
        model: The base model.
        adapter: A single adapter for it.

    Returns:
        How many weight matrices differ from what they were.

    Raises:
        SpecMismatchError: if the model lacks a target module, its weights are not plain numbers, or another module
            shares them, such as embeddings that are tied to the head.
        AdapterNotAppliedError: if a sum is not finite; some of the weights are then changed, others are not.
    """
    modules, lora, changed = target_modules(model, adapter.spec), adapter.lora, 0
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for _, _, module in modules:
        weight = module.weight
        if (
            type(weight) is not nn.Parameter  # torchao's tensors say that they are floats
            or not weight.is_floating_point()
            or weight.is_meta
            or weight.shape != matrix_size(module)[:: 1 if is_transposed(module) else -1]
        ):
            raise SpecMismatchError(
                f"{owners[id(weight)][0]} is quantised or not in memory ({weight.dtype}, on {weight.device}); load the "
                "base in a floating type to merge an adapter into it"
            )
        if len(shared := owners[id(weight)]) > 1:
            raise SpecMismatchError(
                f"{' and '.join(shared)} are one tensor: merging the adapter into one would change the other. Use the "
                "adapter as it is"
            )
    for m, position, module in modules:
        weight = module.weight
        a, b = (part[m][position].to(weight.device, torch.float32) for part in (lora.a, lora.b))
        change = lora.scaling * (b @ a)
        merged = (weight.float() + (change.mT if is_transposed(module) else change)).to(weight.dtype)
        if not merged.isfinite().all():
            whose = "the sums are too large for this type" if weight.isfinite().all() else "the base's own were not"
            raise AdapterNotAppliedError(
                f"{owners[id(weight)][0]} in {weight.dtype} would hold values that are not finite once the adapter is "
                f"merged: {whose}. Load the base anew, as it is or in another type"
            )
        changed += not torch.equal(merged, weight)
        weight.copy_(merged)
    return changed


def _hook(attribute: str, paths: Mapping[int, str], thread: int | None) -> Any:
    """The hook of all modules in one use of `hooked`.

    Args:
        attribute: Where modules carry their A and B.
        paths: The modules' paths by their id, for messages.
        thread: The thread that the hook works in; None means all.
    """

    def add_lora(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        lora = getattr(module, attribute)
        if lora is None or not (thread is None or _belongs(thread)):
            return None
        (x,) = inputs
        if lora[0].device != output.device:  # an offloaded module, whose device is known only now
            lora = tuple(part.to(output.device) for part in lora)
            setattr(module, attribute, lora)
        x = x.to(output.device)
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


def _belongs(thread: int) -> bool:
    """Whether the code that runs now belongs to a thread: it runs in it, or in a backward pass.

    Gradient checkpointing runs modules again in threads of the autograd engine, for which torch has no public test.
    A function that is being compiled is for the thread that compiles it.
    """
    if torch.compiler.is_compiling():
        return True
    return threading.get_ident() == thread or torch._C._current_graph_task_id() != -1
