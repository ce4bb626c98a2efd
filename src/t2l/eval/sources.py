"""What the adapters of an evaluation come from: checkpoints and libraries, loaded once and checked to go together.

Knows checkpoints, libraries and conditions. Makes no adapters; `t2l.eval.adapters` does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from t2l import hub
from t2l.checkpoint import CheckpointConfig, load_checkpoint, read_config
from t2l.errors import ConfigError, DescriptionError, ModelNotFoundError, SpecMismatchError
from t2l.eval.conditions import NEEDS, Condition
from t2l.library import AdapterLibrary
from t2l.spec import AdapterSpec
from t2l.text_to_lora import LoraAdapter, TextToLora, checkpoint_folder


@dataclass(frozen=True)
class MultitaskLora:
    """One LoRA for all tasks: a checkpoint of variant `none`, which reads no text and so needs no encoder."""

    reference: str
    adapter: LoraAdapter
    config: CheckpointConfig

    @classmethod
    def from_pretrained(cls, reference: str, *, device: str = "cpu") -> "MultitaskLora":
        """Loads the LoRA of a checkpoint.

        Raises:
            ConfigError: if the checkpoint writes its adapters from descriptions.
        """
        checkpoint = load_checkpoint(checkpoint_folder(reference), device=device)
        variant = checkpoint.config.hypernet.variant
        if variant != "none":
            raise ConfigError(
                f"--multitask {reference} reads descriptions (hypernet.variant '{variant}'); a multi-task LoRA is a "
                "checkpoint of variant 'none'"
            )
        lora = checkpoint.hypernet.shared_adapter().map(torch.Tensor.detach)
        return cls(reference, LoraAdapter(lora, checkpoint.spec, "", {}), checkpoint.config)

    @property
    def spec(self) -> AdapterSpec:
        """Where the LoRA belongs."""
        return self.adapter.spec


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Everything that adapters of one evaluation come from.

    Raises:
        ConfigError: if a checkpoint is not of the kind that its conditions need.
        SpecMismatchError: if two of them are for different bases, or libraries differ in shape.
    """

    checkpoint: TextToLora | None = None
    """The hypernetwork that is evaluated."""
    multitask: MultitaskLora | None = None
    hyperdecoders: TextToLora | None = None
    """A checkpoint that reads the input."""
    libraries: tuple[AdapterLibrary, ...] = ()
    """Task LoRAs; those whose purpose is `evaluation` are used for the condition `task-lora` alone."""

    def __post_init__(self) -> None:
        if self.checkpoint is not None and self.checkpoint.config.hypernet.variant == "none":
            raise ConfigError(f"--checkpoint {self.checkpoint.reference} reads no description: its variant is 'none'")
        if self.hyperdecoders is not None and self.hyperdecoders.config.conditioning != "input":
            raise ConfigError(
                f"--hyperdecoders {self.hyperdecoders.reference} reads the {self.hyperdecoders.config.conditioning}; "
                "Hyperdecoders read the input"
            )
        if len(self._training) > 1:
            folders = ", ".join(str(library.folder) for library in self._training)
            raise ConfigError(f"Only one --library of training tasks can be averaged and routed over, got {folders}")
        for library in self.libraries[1:]:
            first = self.libraries[0]
            first.spec.require_same_shape(library.spec, this=str(first.folder), that=str(library.folder))
        for name, spec in self._named_specs[1:]:
            first_name, first_spec = self._named_specs[0]
            if spec.base_model != first_spec.base_model:
                raise SpecMismatchError(
                    f"{first_name} is for {first_spec.base_model}, {name} for {spec.base_model}: conditions of one "
                    "table share their base model"
                )

    @cached_property
    def task_loras(self) -> dict[str, AdapterLibrary]:
        """The library that holds each task's own LoRA."""
        return {name: library for library in self.libraries for name in library.names}

    @property
    def training(self) -> AdapterLibrary | None:
        """The library of training tasks, if there is one."""
        return self._training[0] if self._training else None

    @property
    def _training(self) -> list[AdapterLibrary]:
        return [library for library in self.libraries if library.purpose == "training"]

    @property
    def _named_specs(self) -> list[tuple[str, AdapterSpec]]:
        made = [(x.reference, x.spec) for x in (self.checkpoint, self.multitask, self.hyperdecoders) if x is not None]
        return made + [(str(library.folder), library.spec) for library in self.libraries]

    @property
    def rank(self) -> int:
        """The largest rank of an adapter."""
        return max((spec.rank for _, spec in self._named_specs), default=1)

    def writer(self, condition: Condition) -> TextToLora | MultitaskLora | None:
        """The checkpoint that a condition's adapters come from; None where they are the libraries'."""
        if condition.adapter.startswith("t2l"):
            return self.checkpoint
        return {"multitask": self.multitask, "hyperdecoders": self.hyperdecoders}.get(condition.adapter)

    def spec(self, condition: Condition) -> AdapterSpec | None:
        """The spec of a condition's adapters; None for the base model and Arrow's own."""
        if condition.adapter in ("base", "arrow"):
            return None
        return (self.writer(condition) or self.libraries[0]).spec

    def shape(self, condition: Condition) -> Any:
        """What must be equal for adapters to share a batch."""
        spec = self.spec(condition)
        return spec and (spec.layers, spec.targets, spec.rank, spec.scaling)

    def answer_space(self, condition: Condition) -> bool:
        """Whether a condition's adapters were trained to begin answers with a space."""
        if condition.adapter == "base":
            return False
        writer = self.writer(condition)
        if writer is not None:
            return writer.config.prompt.answer_space
        entries = (library.index[name] for library in self.libraries for name in library.names)
        return any((entry.get("prompt") or {}).get("answer_space", False) for entry in entries)

    def fits(self, text: str) -> bool:
        """Whether the checkpoint's encoder can read a description."""
        if self.checkpoint is None:
            return True
        encoder = self.checkpoint.encoder
        try:
            return encoder.count_tokens([text])[0] <= encoder.max_tokens
        except DescriptionError:
            return False

    def left_out(self, conditions: Iterable[Condition]) -> dict[str, str]:
        """Conditions that cannot be answered, with the reason."""
        given = {
            "--checkpoint": self.checkpoint,
            "--multitask": self.multitask,
            "--hyperdecoders": self.hyperdecoders,
            "--library": self.libraries or None,
        }
        missing: dict[str, str] = {}
        for condition in conditions:
            needed = NEEDS.get(condition.adapter)
            if needed is not None and given[needed] is None:
                missing[condition.name] = f"no {needed}"
            elif condition.adapter in ("average", "arrow", "nearest") and self.training is None:
                missing[condition.name] = "no --library of training tasks"
        return missing


class BaseModels:
    """The base model: loaded once for its answers, and at most once more for all encoders that read its states.

    Answers come in bfloat16 on a GPU, but encoders read float32 states, as training had them. Where both are float32
    they are one model.

    Args:
        reference: The model that is evaluated.
        device: Where it runs.
        answers_here: Whether it answers in this process; another engine needs only its outline here.
    """

    def __init__(self, reference: str, *, device: str, answers_here: bool) -> None:
        self.reference, self.device = reference, device
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.model: Any = (
            hub.load_causal_lm(reference, device=device, dtype=dtype)
            if answers_here
            else hub.load_meta_model(reference)
        )
        self.tokenizer: Any = hub.load_tokenizer(reference)
        self._encoders: dict[str, tuple[Any, Any]] = {}
        if answers_here and dtype is torch.float32:
            self._encoders[reference] = self.model, self.tokenizer

    @property
    def pair(self) -> tuple[Any, Any]:
        """The model that answers, and its tokenizer."""
        return self.model, self.tokenizer

    def for_encoder(self, reference: str) -> tuple[Any, Any]:
        """A float32 base model and its tokenizer, loaded when the first encoder asks for it."""
        if reference not in self._encoders:
            self._encoders[reference] = (
                hub.load_causal_lm(reference, device=self.device),
                hub.load_tokenizer(reference),
            )
        return self._encoders[reference]


def base_model_of(checkpoints: Sequence[str | None], libraries: Sequence[AdapterLibrary]) -> str | None:
    """The base model that the first of these is for, read without loading any weights."""
    for reference in checkpoints:
        if reference is not None:
            return read_config(checkpoint_folder(reference))[0].base_model
    return libraries[0].spec.base_model if libraries else None


def shipped_multitask(checkpoint: str | None) -> str | None:
    """The multi-task LoRA that ships beside a shipped checkpoint, so that a first table has its controls."""
    if checkpoint is None or not checkpoint.startswith("t2l:"):
        return None
    reference = f"{checkpoint}-multitask"
    try:
        checkpoint_folder(reference)
    except ModelNotFoundError:
        return None
    return reference


def load_sources(
    bases: BaseModels,
    checkpoint: str | None = None,
    multitask: str | None = None,
    hyperdecoders: str | None = None,
    libraries: tuple[AdapterLibrary, ...] = (),
) -> Sources:
    """Loads checkpoints on one base model and, where two read the same encoder, on one encoder."""
    loaded = None if checkpoint is None else _load(checkpoint, bases, None)
    return Sources(
        checkpoint=loaded,
        multitask=None if multitask is None else MultitaskLora.from_pretrained(multitask, device=bases.device),
        hyperdecoders=None if hyperdecoders is None else _load(hyperdecoders, bases, loaded),
        libraries=libraries,
    )


def _load(reference: str, bases: BaseModels, other: TextToLora | None) -> TextToLora:
    folder = checkpoint_folder(reference)
    spec, config = read_config(folder)
    if other is not None and (config.encoder, config.encoder_revision) == (
        other.config.encoder,
        other.config.encoder_revision,
    ):
        return TextToLora(load_checkpoint(folder, device=bases.device), other.encoder, reference=reference)
    base = bases.for_encoder(spec.base_model) if config.encoder.model == "base" else None
    return TextToLora.from_pretrained(reference, base=base, device=bases.device)
