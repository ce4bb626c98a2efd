"""The adapters of an evaluation: each is written or read once, kept, and checked to have an effect.

Knows what adapters come from (`Sources`), conditions and a base model. Knows no answers and no scores.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from t2l.apply import apply_adapters
from t2l.errors import AdapterNotAppliedError
from t2l.eval.conditions import Condition, short_hash, text_of
from t2l.eval.retrieval import RetrievalIndex, cut_to_window
from t2l.eval.sources import Sources
from t2l.eval.suites import EvalInstance
from t2l.lora import LoraTensors
from t2l.text_to_lora import LoraAdapter

AT_ONCE = 21
"""Adapters that are written in one pass. Batches of other sizes may differ in the last bits."""


class Key(NamedTuple):
    """What decides an adapter, given the files of weights."""

    source: Literal["text", "multitask", "average", "library"]
    """`text` is written by the checkpoint from `name`, the others are read."""
    name: str | None = None
    """The text, or the library's task."""


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter in the base model's type, on its device, and what is recorded of it."""

    adapter: LoraAdapter
    id: str
    """Hash of the weights' file and of what it was written from, which together decide it."""

    @property
    def description(self) -> str | None:
        """The text that it was written from, if it was."""
        return self.adapter.description or None

    @property
    def lora(self) -> LoraTensors:
        """Its tensors."""
        return self.adapter.lora

    @property
    def spec(self) -> Any:
        """Where they belong."""
        return self.adapter.spec


class AdapterCache:
    """Finds each condition's adapter for each instance; writes those of T2L when `prepare` is told what will be asked.

    Args:
        base: The base model, or its outline where another engine answers, and its tokenizer.
        sources: What adapters come from.
        log: Where progress goes.
    """

    def __init__(
        self,
        base: tuple[Any, Any],
        sources: Sources,
        *,
        log: Callable[[str], None] = print,
    ) -> None:
        self.model, self.tokenizer = base
        self.sources, self.log = sources, log
        self._ready: dict[Key, UsedAdapter] = {}
        self._nearest: dict[str, str] = {}

    def key(self, condition: Condition, instance: EvalInstance) -> Key | None:
        """What decides an instance's adapter; None for the base model, Arrow, and adapters written from the input."""
        if condition.adapter.startswith("t2l"):
            return Key("text", text_of(condition, instance))
        if condition.adapter == "multitask":
            return Key("multitask")
        if condition.adapter == "average":
            return Key("average")
        if condition.adapter == "task-lora":
            return Key("library", instance.task.name)
        if condition.adapter == "nearest":
            return Key("library", self._nearest_task(instance.description))
        return None

    def has(self, condition: Condition, instance: EvalInstance) -> bool:
        """Whether a condition answers an instance: `task-lora` only where a library holds the task."""
        return condition.adapter != "task-lora" or instance.task.name in self.sources.task_loras

    def prepare(self, asked: Iterable[tuple[Condition, EvalInstance]]) -> None:
        """Makes the adapters that these instances need under these conditions, and checks that each has an effect.

        Raises:
            AdapterNotAppliedError: if one does not change the base model's logits.
        """
        keys = dict.fromkeys(self.key(condition, instance) for condition, instance in asked)
        missing = [key for key in keys if key is not None and key not in self._ready]
        written = [key for key in missing if key.source == "text"]
        for start in range(0, len(written), AT_ONCE):
            self._write(written[start : start + AT_ONCE])
        if Key("multitask") in missing:
            assert self.sources.multitask is not None, "conditions without a multi-task LoRA are left out"
            multitask = self.sources.multitask
            self._keep([Key("multitask")], [multitask.adapter], multitask.config.weights_sha256)
        if Key("average") in missing:
            assert self.sources.training is not None, "conditions without a training library are left out"
            library = self.sources.training
            mean = library.stack(library.names).map(lambda x: x.mean(0))
            self._keep([Key("average")], [LoraAdapter(mean, library.spec, "", {})], library.checksum)
        self._read([key.name for key in missing if key.source == "library" and key.name is not None])
        if missing:
            self.log(f"{len(self._ready)} adapters ready")

    def of(self, condition: Condition, instances: Sequence[EvalInstance]) -> list[UsedAdapter | None]:
        """The adapter of each instance under a condition; None for the base model and Arrow's own."""
        if condition.adapter == "hyperdecoders":
            return list(self._from_inputs(instances))
        keys = [self.key(condition, instance) for instance in instances]
        return [None if key is None else self._ready[key] for key in keys]

    def _from_inputs(self, instances: Sequence[EvalInstance]) -> list[UsedAdapter]:
        """Adapters that Hyperdecoders write from the very inputs; there is one an instance, so none is kept."""
        assert self.sources.hyperdecoders is not None, "conditions without a checkpoint are left out"
        writer = self.sources.hyperdecoders
        texts = [cut_to_window(writer.encoder, instance.item.text) for instance in instances]
        # The text is an input and no description, so it is not recorded as one.
        adapters = [replace(adapter, description="") for adapter in writer.generate(texts)]
        return self._use([Key("text", text) for text in texts], adapters, writer.config.weights_sha256)

    def _write(self, keys: Sequence[Key]) -> None:
        """Adapters that the checkpoint writes, all in one pass."""
        assert self.sources.checkpoint is not None, "conditions without a checkpoint are left out"
        checkpoint = self.sources.checkpoint
        adapters = checkpoint.generate([key.name or "" for key in keys])
        self._keep(keys, adapters, checkpoint.config.weights_sha256)

    def _read(self, names: Sequence[str]) -> None:
        """Adapters of the libraries, some at a time."""
        for library in self.sources.libraries:
            held = [name for name in names if self.sources.task_loras[name] is library]
            for start in range(0, len(held), 64):
                chunk = held[start : start + 64]
                adapters = [LoraAdapter(lora, library.spec, "", {}) for lora in library.stack(chunk).unbind()]
                self._keep([Key("library", name) for name in chunk], adapters, library.checksum)

    @cached_property
    def _index(self) -> RetrievalIndex:
        assert self.sources.training is not None, "conditions without a training library are left out"
        return RetrievalIndex(self.sources.training.names)

    def _nearest_task(self, description: str) -> str:
        if description not in self._nearest:
            self._nearest[description] = self._index.nearest(description)
        return self._nearest[description]

    def _keep(self, keys: Sequence[Key], adapters: Sequence[LoraAdapter], checksum: str) -> None:
        self._ready |= dict(zip(keys, self._use(keys, adapters, checksum), strict=True))

    def _use(self, keys: Sequence[Key], adapters: Sequence[LoraAdapter], checksum: str) -> list[UsedAdapter]:
        parameter = next(self.model.parameters())
        used = []
        for key, adapter in zip(keys, adapters, strict=True):
            lora = adapter.lora.map(lambda x: x if parameter.is_meta else x.to(parameter.device, parameter.dtype))
            moved = LoraAdapter(lora, adapter.spec, adapter.description, {})
            parts = (checksum, key.source, *((key.name,) if key.name is not None else ()))
            used.append(UsedAdapter(moved, short_hash("/".join(parts))))
        require_effect(self.model, self.tokenizer, used)
        return used


@torch.no_grad()
def require_effect(model: Any, tokenizer: Any, adapters: Sequence[UsedAdapter]) -> None:
    """Checks that every adapter changes the logits of a short prompt.

    A model without weights has none: there the engine that answers compares, see `t2l.eval.backends`.

    Raises:
        AdapterNotAppliedError: naming the first that does not.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    ids = tokenizer("Does the adapter change anything?", add_special_tokens=False).input_ids
    tokens_NT = torch.tensor([ids], device=device).expand(len(adapters), -1)
    # Both passes have one shape, so that rounding is the same and any difference is the adapter's.
    plain_NV = model(tokens_NT, use_cache=False, logits_to_keep=1).logits[:, 0]
    with apply_adapters(model, list(adapters)):
        adapted_NV = model(tokens_NT, use_cache=False, logits_to_keep=1).logits[:, 0]
    idle_N = (adapted_NV == plain_NV).all(1)
    if idle_N.any():
        adapter = adapters[int(idle_N.nonzero()[0])]
        what = f"written from “{adapter.adapter.description[:60]}”" if adapter.adapter.description else adapter.id
        raise AdapterNotAppliedError(
            f"The adapter {what} leaves the base model's logits as they are ({int(idle_N.sum())} of {len(adapters)} "
            "do): a condition with it would repeat the base model's. Was the checkpoint trained?"
        )
