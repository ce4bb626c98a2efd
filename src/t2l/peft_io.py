"""PEFT adapter folders: `adapter_model.safetensors`, `adapter_config.json` and a card.

The only module that spells a PEFT key. Writing needs no import of peft, which takes seconds.
Shape letters as in `spec.py`. PEFT stores A as (R, I) and B as (O, R), as LoraTensors do.
"""

import json
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from t2l.errors import CheckpointError, SpecMismatchError, TensorMismatchError
from t2l.io import new_folder, read_json, read_shapes, read_tensors, require_float, require_only
from t2l.kinds import ADAPTER, require_kind
from t2l.lora import LoraTensors
from t2l.pypi import public_name
from t2l.spec import AdapterSpec, Target

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", ADAPTER.mark, "README.md"
PICKLED = "adapter_model.bin"
ORIGIN = "t2l.json"
"""What PEFT's format has no place for: the description, the provenance, and how this library calls the base."""
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")


@contextmanager
def without_old_names() -> Iterator[None]:
    """Keeps quiet that PEFT asks Transformers by a name that is on its way out, which no user of ours can mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def tensor_name(target: Target, layer: int, part: str) -> str:
    """PEFT's name of a tensor; `part` is A or B. No other module spells it."""
    return _tensor_name(target.path.format(layer=layer), part)


def _tensor_name(path: str, part: str) -> str:
    return f"base_model.model.{path}.lora_{part}.weight"


def to_state_dict(lora: LoraTensors, spec: AdapterSpec) -> dict[str, torch.Tensor]:
    """A single adapter under PEFT's names."""
    state = {}
    for m, target in enumerate(spec.targets):
        for position, layer in enumerate(spec.layers):
            state[tensor_name(target, layer, "A")] = lora.a[m][position]
            state[tensor_name(target, layer, "B")] = lora.b[m][position]
    return state


def from_state_dict(state: dict[str, torch.Tensor], spec: AdapterSpec) -> LoraTensors:
    """PEFT-named tensors of exactly this spec as a single adapter."""

    def stacked(target: Target, part: str) -> torch.Tensor:
        return torch.stack([state[tensor_name(target, layer, part)] for layer in spec.layers])

    return LoraTensors(
        tuple(stacked(t, "A") for t in spec.targets), tuple(stacked(t, "B") for t in spec.targets), spec.scaling
    )


def adapter_config(spec: AdapterSpec) -> dict[str, Any]:
    """What PEFT, vLLM and llama.cpp's converter read from `adapter_config.json`."""
    every_layer = spec.layers == tuple(range(spec.num_layers))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": public_name(spec.base_model),
        "revision": None,
        "r": spec.rank,
        # PEFT declares an integer; a fractional alpha is kept as it is, and PEFT takes it.
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "use_rslora": spec.use_rslora,
        "target_modules": _module_names(spec),
        "layers_to_transform": None if every_layer or _is_nested(spec) else list(spec.layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": spec.fan_in_fan_out,
        "inference_mode": True,
    }


FILES = (WEIGHTS, CONFIG, CARD, ORIGIN)


@dataclass(frozen=True)
class Origin:
    """What an adapter was made from."""

    description: str = ""
    provenance: dict[str, str] = field(default_factory=dict)


def read_origin(folder: Path) -> Origin:
    """What an adapter's folder says it was made from; nothing if another program wrote the folder.

    Raises:
        CheckpointError: if the file is damaged.
    """
    if not (folder / ORIGIN).exists():
        return Origin()
    plain = read_json(folder / ORIGIN)
    description, provenance = plain.get("description"), plain.get("provenance")
    if not isinstance(description, str) or not isinstance(provenance, dict):
        raise CheckpointError(f"{folder / ORIGIN} must hold a text as description and a mapping as provenance")
    return Origin(description, {str(key): str(value) for key, value in provenance.items()})


def _base_here(folder: Path, name: str) -> str:
    """This library's own reference of the base that a folder names; the name, if nothing says another."""
    own = read_json(folder / ORIGIN).get("base_model") if (folder / ORIGIN).exists() else None
    return own if isinstance(own, str) and public_name(own) == name else name


def _is_nested(spec: AdapterSpec) -> bool:
    """Whether the base is one part of a model that reads more than text, whose other parts have the same names."""
    parts = {part for t in spec.targets for part in t.path.partition(".{layer}")[0].split(".")}
    return bool(parts & {"language_model", "text_model"})


def _module_names(spec: AdapterSpec) -> list[str]:
    """Names as PEFT matches them, which is by the end of a path: whole paths where a name would match other towers."""
    if not _is_nested(spec):
        return [t.name for t in spec.targets]
    return [t.path.format(layer=layer) for t in spec.targets for layer in spec.layers]


_IRRELEVANT = frozenset(
    # One text and not a list, since the formatter would give each name a line.
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
    exclude_modules lora_alpha lora_dropout use_rslora layers_to_transform layers_pattern megatron_core
    qalora_group_size runtime_config eva_config ensure_weight_tying fan_in_fan_out""".split()  # noqa: SIM905
)
"""Settings of `adapter_config.json` that do not change what the tensors mean, or that are read elsewhere."""
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA start from changed base weights, which a folder does not hold.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}
"""Values with which a setting does not change it either. All other settings, unknown ones too, must be off."""


def _require_plain_lora(config: dict[str, Any], where: object) -> None:
    """Raises where a setting means that the tensors are anything else than scaling · B · A on the base's weights.

    Raises:
        CheckpointError: naming the setting and its value.
    """
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {config.get('peft_type')!r}, only 'LORA' is read")
    for key, value in config.items():
        # By type too, since 1 equals True.
        harmless = any(type(value) is type(x) and value == x for x in _HARMLESS.get(key, ()))
        if key not in _IRRELEVANT and not harmless and (key in _HARMLESS or value):
            raise CheckpointError(
                f"{where}: {key} is {str(value)[:80]!r}, with which the tensors are no plain LoRA; only plain LoRA is "
                "read. Convert the adapter with the program that made it"
            )


def save_adapter(
    folder: Path,
    lora: LoraTensors,
    spec: AdapterSpec,
    *,
    card: str,
    origin: Origin | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Writes a PEFT adapter folder, whole or not at all.

    Args:
        folder: Where to; its parents are made.
        lora: A single adapter.
        spec: Where it belongs.
        card: Text of the model card.
        origin: What it was made from, if from a text; saved as data, since a card is for readers.
        dtype: Type of the saved tensors.
        overwrite: Whether an existing folder of an adapter is replaced.

    Raises:
        CheckpointError: if a value is NaN or infinite, or becomes so in `dtype`.
        ConfigError: if `dtype` is no type that is read back.
        OutputError: if the folder exists, holds other files than an adapter's, or cannot be written.
    """
    from safetensors.torch import save_file

    require_float(dtype)
    state = to_state_dict(_own_memory(lora.map(lambda x: x.detach().to("cpu", dtype))), spec)
    bad = next((name for name, value in state.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise CheckpointError(f"{bad} holds values that are not finite in {dtype}; nothing was written")
    if overwrite:
        require_only(folder, *FILES)
    with new_folder(folder, overwrite=overwrite) as temporary:
        # The metadata says which framework wrote the file; PEFT and Transformers look for it.
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(adapter_config(spec), indent=2) + "\n", encoding="utf-8")
        (temporary / CARD).write_text(card, encoding="utf-8", newline="")
        about = asdict(origin or Origin()) | {"base_model": spec.base_model}
        (temporary / ORIGIN).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class PeftFacts:
    """What a PEFT LoRA folder says of itself; its tensors are not read."""

    base_model: str
    rank: int
    alpha: float
    use_rslora: bool
    modules: dict[str, tuple[int, int]]
    """Path of each adapted module to its (in, out) features, such as `model.layers.0.self_attn.q_proj`."""

    @property
    def scaling(self) -> float:
        """Factor of B·A."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


def read_facts(folder: Path) -> PeftFacts:
    """Reads a PEFT LoRA folder's settings and the names and shapes of its tensors.

    Raises:
        CheckpointError: if files are missing, damaged or pickled, the folder is not a plain LoRA, a module lacks A or
            B, or a tensor's rank is not the folder's own.
    """
    config = _plain_lora(folder)
    rank, alpha, base = config.get("r"), config.get("lora_alpha"), config.get("base_model_name_or_path")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or not isinstance(base, str):
        raise CheckpointError(f"{folder / CONFIG} lacks r, lora_alpha or base_model_name_or_path")
    if isinstance(rank, bool) or not 1 <= rank <= 2**20 or not math.isfinite(alpha):
        raise CheckpointError(f"{folder / CONFIG}: r is {rank} and lora_alpha {alpha}, which no LoRA can have")
    modules = read_modules(folder, rank)
    return PeftFacts(_base_here(folder, base), rank, float(alpha), bool(config.get("use_rslora", False)), modules)


def read_norms(folder: Path, facts: PeftFacts) -> dict[str, float]:
    """Frobenius norm of the weight update of each module that a folder adapts, by its path.

    Raises:
        CheckpointError: if the tensors' file is damaged, or holds NaN or infinite values.
    """
    name = _tensor_name
    expected = {name(path, "A"): (facts.rank, i) for path, (i, _) in facts.modules.items()}
    expected |= {name(path, "B"): (o, facts.rank) for path, (_, o) in facts.modules.items()}
    state = read_tensors(folder / WEIGHTS, expected)
    norms = {}
    for path in facts.modules:
        a, b = (state[name(path, part)].float() for part in "AB")
        norms[path] = float(LoraTensors((a[None],), (b[None],), facts.scaling).norms()[0])
    return norms


def read_modules(folder: Path, rank: int) -> dict[str, tuple[int, int]]:
    """Paths of the modules that a PEFT LoRA folder adapts, each with its (in, out) features; tensors are not read.

    Raises:
        CheckpointError: if the file is missing, damaged or pickled, holds anything else, a module lacks A or B, or a
            tensor's rank is another.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in read_shapes(folder / WEIGHTS).items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or len(shape) != 2:
            raise CheckpointError(
                f"{folder / WEIGHTS} holds {name} {shape}, which is no LoRA matrix of a linear module"
            )
        found.setdefault(match["path"], {})[match["part"]] = shape
    modules = {}
    for path, parts in found.items():
        if parts.keys() != {"A", "B"}:
            raise CheckpointError(f"{folder / WEIGHTS}: {path} has only {', '.join(parts)} of A and B")
        if parts["A"][0] != rank or parts["B"][1] != rank:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {path} has rank {parts['A'][0]} in A and {parts['B'][1]} in B, "
                f"{CONFIG} says {rank}"
            )
        modules[path] = (parts["A"][1], parts["B"][0])
    if not modules:
        raise CheckpointError(f"{folder / WEIGHTS} holds no tensors")
    return modules


def _plain_lora(folder: Path) -> dict[str, Any]:
    require_kind(folder, ADAPTER)
    config = read_json(folder / CONFIG)
    _require_plain_lora(config, folder / CONFIG)
    if not (folder / WEIGHTS).exists() and (folder / PICKLED).exists():
        raise CheckpointError(
            f"{folder} holds its weights as a pickle ({PICKLED}), which could run code when read, and no {WEIGHTS}; "
            "save the adapter again as safetensors, on a machine where you trust that file"
        )
    return config


def _own_memory(lora: LoraTensors) -> LoraTensors:
    """The same tensors, each in memory of its own, which the file format asks for."""
    seen: set[int] = set()

    def own(x: torch.Tensor) -> torch.Tensor:
        shared = x.untyped_storage().data_ptr() in seen or 0 in x.stride() or not x.is_contiguous()
        x = x.clone(memory_format=torch.contiguous_format) if shared else x
        seen.add(x.untyped_storage().data_ptr())
        return x

    return lora.map(own)


def load_adapter(folder: Path, spec: AdapterSpec) -> LoraTensors:
    """Reads a PEFT LoRA folder that has exactly the spec's shape.

    Args:
        folder: A PEFT adapter folder, ours or another's.
        spec: What it must be.

    Returns:
        A single adapter in float32.

    Raises:
        CheckpointError: if files are missing, damaged or pickled, or the folder is not a plain LoRA.
        SpecMismatchError: if rank, scaling, targets or sizes differ; both values are named.
    """
    config = _plain_lora(folder)
    for key, mine in (("r", spec.rank), ("lora_alpha", spec.alpha), ("use_rslora", spec.use_rslora)):
        theirs = config.get(key, False if key == "use_rslora" else None)
        if theirs != mine:
            raise SpecMismatchError(f"{folder / CONFIG}: {key} is {theirs!r}, expected {mine!r} for {spec.base_model}")
    expected = {}
    for target in spec.targets:
        for layer in spec.layers:
            expected[tensor_name(target, layer, "A")] = (spec.rank, target.in_features)
            expected[tensor_name(target, layer, "B")] = (target.out_features, spec.rank)
    try:
        state = read_tensors(folder / WEIGHTS, expected)
    except TensorMismatchError as error:
        raise SpecMismatchError(f"The adapter does not fit {spec.base_model}: {error}") from error
    return from_state_dict({k: v.float() for k, v in state.items()}, spec)
