"""AdapterSpec: which modules of which base model an adapter changes, and in which order.

Everything else takes target order, sizes and module paths from here; the order is data, saved in `spec.json`.
Knows model configs and module paths. Knows no weights, no adapter files and no devices other than `meta`.

Shape letters of this package: N descriptions (adapters) in a batch, E description-embedding size, S tokens of a
description, H hypernetwork width, M target modules, L adapted layers, R rank, I / O in / out features of a
target, B sequences, T tokens, V vocabulary.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from t2l.config import LoraConfig, NaturalNumber, Positive, Size, build, check_ranges
from t2l.errors import ConfigError, SpecMismatchError
from t2l.io import parse_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ALL_LINEAR = "all-linear"
QUERY_AND_VALUE = (("q_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("Wqkv",), ("c_attn",))
"""What bases call the modules that project to queries and values, or to queries, keys and values at once."""
TRANSPOSED = ("gpt2", "openai-gpt")
"""Types of models whose linear modules are Transformers' `Conv1D`."""
_PATH = re.compile(r"\w+(?:\.\w+)*\.\{layer\}(?:\.\w+)+")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of linear module that is adapted in every adapted layer."""

    name: str
    """Path suffix that names the module inside its layer, such as `q_proj`."""
    path: str
    """Full path with `{layer}` in place of the layer number, such as `model.layers.{layer}.self_attn.q_proj`."""
    in_features: Size
    """I"""
    out_features: Size
    """O"""

    def __post_init__(self) -> None:
        check_ranges(self, "target")
        # Paths come from other people's files and are filled in by `format`.
        if not _PATH.fullmatch(self.path):
            raise ConfigError(
                f"target.path must be the path of a module with {{layer}} in place of its layer, got {self.path!r}"
            )


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """The shape of every adapter that one checkpoint writes."""

    base_model: str
    """Reference of the base model, written into adapters as `base_model_name_or_path`."""
    model_type: str
    """The base's `config.model_type`."""
    num_layers: Size
    """Layers of the base, adapted or not."""
    layers: tuple[NaturalNumber, ...]
    """Adapted layers, ascending; L is their number."""
    targets: tuple[Target, ...]
    """Adapted modules, in the order of the hypernetwork's heads; M is their number."""
    rank: Size
    """R"""
    alpha: Positive
    """Numerator of the scaling."""
    use_rslora: bool = False
    """Whether the scaling's denominator is the root of the rank."""

    def __post_init__(self) -> None:
        check_ranges(self, "spec")
        if not self.targets:
            raise ConfigError("An adapter needs at least one target module")
        if len({t.path for t in self.targets}) != len(self.targets):
            raise ConfigError(f"Target modules repeat: {', '.join(t.name for t in self.targets)}")
        _check_layers(self.layers, self.num_layers)

    @property
    def scaling(self) -> float:
        """Factor of B·A: alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base keeps its weights as (I, O); PEFT's word. A and B are the same for either."""
        return self.model_type in TRANSPOSED

    @property
    def num_parameters(self) -> int:
        """Parameters of one adapter."""
        return len(self.layers) * sum(self.rank * (t.in_features + t.out_features) for t in self.targets)

    @classmethod
    def from_config(cls, config: "PretrainedConfig", base_model: str, lora: LoraConfig | None = None) -> "AdapterSpec":
        """Reads module paths and sizes off the model class, built without weights on the meta device.

        Args:
            config: The base model's Transformers config.
            base_model: Reference of the base model.
            lora: Targets, layers, rank and scaling.

        Raises:
            SpecMismatchError: if a target matches no linear module, several in one layer, or modules of
                different sizes in different layers.
            ConfigError: if layers are not ascending or the model does not have them.
        """
        lora, linears = lora or LoraConfig(), _linears(config)
        num_layers = int(config.get_text_config().num_hidden_layers)
        templates = _layer_templates(linears)
        names = lora.target_modules or next((x for x in QUERY_AND_VALUE if {*x} <= templates.keys()), (ALL_LINEAR,))
        names = tuple(sorted(templates)) if names == (ALL_LINEAR,) else names
        layers = lora.layers_to_transform
        if layers is None:
            layers = _layers_with(names, templates, linears, num_layers)
        layers = tuple(layer + num_layers if -num_layers <= layer < 0 else layer for layer in layers)
        _check_layers(layers, num_layers)
        return cls(
            base_model=base_reference(base_model),
            model_type=config.model_type,
            num_layers=num_layers,
            layers=layers,
            targets=tuple(_target(name, templates, linears, layers, base_model) for name in names),
            rank=lora.r,
            alpha=float(lora.lora_alpha),  # as JSON gives it back, so that a spec read again is the same text
            use_rslora=lora.use_rslora,
        )

    def to_json(self) -> str:
        """The spec as the text of `spec.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = "spec.json") -> "AdapterSpec":
        """Reads what `to_json` wrote.

        Raises:
            CheckpointError: if the text is not JSON.
            ConfigError: if keys are unknown, missing or of the wrong type.
        """
        return build(cls, parse_json(text, where), where=where)

    def require_same_shape(self, other: "AdapterSpec", *, this: str, that: str) -> None:
        """Raises if two specs describe adapters that cannot stand in for each other, whatever order their targets have.

        Raises:
            SpecMismatchError: naming the first difference, with both values.
        """

        def shape(spec: AdapterSpec) -> dict[str, Any]:
            return {
                "number of layers": spec.num_layers,
                "adapted layers": list(spec.layers),
                "targets (in x out)": {t.name: f"{t.in_features} x {t.out_features}" for t in spec.targets},
                "rank": spec.rank,
                "scaling": spec.scaling,
            }

        mine, theirs = shape(self), shape(other)
        for key, value in mine.items():
            if value != theirs[key]:
                raise SpecMismatchError(
                    f"{this} is for {self.base_model} with {key} {value}; {that} is {other.base_model} with "
                    f"{theirs[key]}. Generate the adapter with a checkpoint trained for {other.base_model}."
                )

    def places_in(self, other: "AdapterSpec") -> list[int]:
        """Where another spec of the same shape has this one's targets: a folder's order need not be a checkpoint's."""
        names = [target.name for target in other.targets]
        return [names.index(target.name) for target in self.targets]


def base_reference(reference: str) -> str:
    """A base's reference as it is kept: a folder's whole path, which leads there from anywhere; all others as given."""
    return os.path.abspath(reference) if os.path.isdir(reference) else reference


def linear_modules(config: "PretrainedConfig") -> dict[str, tuple[str, int]]:
    """The name, as `lora.target_modules` takes it, and the layer of every linear module in a base's layers, by path."""
    linears = _linears(config)
    layers = range(int(config.get_text_config().num_hidden_layers))
    named = [(path.format(layer=n), name, n) for name, path in _layer_templates(linears).items() for n in layers]
    return {path: (name, layer) for path, name, layer in named if path in linears}


def _linears(config: "PretrainedConfig") -> dict[str, tuple[int, int]]:
    """Paths and sizes of the linear modules that text passes through, of a model without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = _text_model(model)
    return {
        name: matrix_size(module)
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) or is_transposed(module)) and name.startswith(text)
    }


def is_transposed(module: Any) -> bool:
    """Whether a module is GPT-2's `Conv1D`: a linear module whose weight is (I, O), where torch's own are (O, I)."""
    return hasattr(module, "nx") and hasattr(module, "nf")


def matrix_size(module: Any) -> tuple[int, int]:
    """(in, out) features of a linear module; None for each where it is no linear module."""
    names = ("nx", "nf") if is_transposed(module) else ("in_features", "out_features")
    return getattr(module, names[0], None), getattr(module, names[1], None)  # type: ignore[return-value]


def _text_model(model: Any) -> str:
    """Where the language model is inside a model that reads more than text, such as images; empty where it is all.

    The towers for other inputs have layers with the same names, which text never passes through.
    """
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((name + "." for name, module in model.named_modules() if name and module is decoder), "")


def _check_layers(layers: Sequence[int], num_layers: int) -> None:
    if not layers or list(layers) != sorted(set(layers)):
        raise ConfigError(f"layers must be ascending and distinct, got {list(layers)}")
    if layers[0] < 0 or layers[-1] >= num_layers:
        raise ConfigError(
            f"layers must lie in 0..{num_layers - 1}, got {list(layers)}; lora.layers_to_transform may also count from "
            "the end, as [-2, -1], and null means all of them"
        )


def _layer_templates(linears: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Maps the shortest unambiguous suffix of each linear module inside a layer to its path template."""
    paths = sorted(
        {re.sub(r"\.(\d+)\.", ".{layer}.", name, count=1) for name in linears if re.search(r"\.\d+\.", name)}
    )
    inner = {path: path.split("{layer}.", 1)[1] for path in paths}
    by_suffix = defaultdict(list)
    for path, rest in inner.items():
        parts = rest.split(".")
        for start in range(len(parts)):
            by_suffix[".".join(parts[start:])].append(path)
    templates = {}
    for path, rest in inner.items():
        parts = rest.split(".")
        suffixes = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        templates[next(s for s in suffixes if len(by_suffix[s]) == 1 or s == rest)] = path
    return templates


def _layers_with(
    names: Sequence[str], templates: dict[str, str], linears: dict[str, tuple[int, int]], num_layers: int
) -> tuple[int, ...]:
    """The layers that have all of the named modules; all layers if none has, which `_target` then refuses.

    In LFM2, for one, some layers have attention and others a convolution in its place.
    """
    paths = [path for name in names for path in templates.values() if path.endswith("." + name)]
    found = [n for n in range(num_layers) if all(path.format(layer=n) in linears for path in paths)]
    return tuple(found or range(num_layers))


def _target(
    name: str,
    templates: dict[str, str],
    linears: dict[str, tuple[int, int]],
    layers: Sequence[int],
    base_model: str,
) -> Target:
    matches = [path for path in templates.values() if path.endswith("." + name)]
    if not matches:
        known = ", ".join(sorted(templates))
        raise SpecMismatchError(f"{base_model} has no linear module '{name}' in its layers; it has: {known}")
    if len(matches) > 1:
        raise SpecMismatchError(
            f"'{name}' names {len(matches)} modules in each layer of {base_model} ({', '.join(matches)}); "
            "give a longer suffix such as 'attn.c_proj'"
        )
    (path,) = matches
    sizes = {layer: linears.get(path.format(layer=layer)) for layer in layers}
    distinct = set(sizes.values())
    if len(distinct) != 1 or None in distinct:
        raise SpecMismatchError(
            f"'{name}' of {base_model} differs from layer to layer: {sizes}. "
            "Choose `layers` in which the module exists with one size."
        )
    in_features, out_features = sizes[layers[0]]  # type: ignore[misc]
    return Target(name=name, path=path, in_features=in_features, out_features=out_features)
