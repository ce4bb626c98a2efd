"""PEFT adapter folders: `adapter_model.safetensors`, `adapter_config.json` and a card.

The only module that spells a PEFT key. Writing needs no import of peft, which takes seconds.
Shape letters as in `spec.py`. PEFT stores A as (R, I) and B as (O, R), as LoraTensors do.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t2l.errors import CheckpointError, SpecMismatchError, TensorMismatchError
from t2l.io import new_folder, read_json, read_shapes, read_tensors
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec, Target

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")


def tensor_name(target: Target, layer: int, part: str) -> str:
    """PEFT's name of a tensor; `part` is A or B. No other module spells it."""
    return f"base_model.model.{target.path.format(layer=layer)}.lora_{part}.weight"


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
        "base_model_name_or_path": spec.base_model,
        "r": spec.rank,
        # PEFT declares an integer; a fractional alpha is kept as it is, and PEFT takes it.
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "use_rslora": spec.use_rslora,
        "target_modules": [t.name for t in spec.targets],
        "layers_to_transform": None if every_layer else list(spec.layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def save_adapter(
    folder: Path,
    lora: LoraTensors,
    spec: AdapterSpec,
    *,
    card: str,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Writes a PEFT adapter folder, whole or not at all.

    Args:
        folder: Where to; its parents are made.
        lora: A single adapter.
        spec: Where it belongs.
        card: Text of the model card.
        dtype: Type of the saved tensors.
        overwrite: Whether an existing folder is replaced.

    Raises:
        OutputError: if the folder exists or cannot be written.
    """
    from safetensors.torch import save_file

    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in to_state_dict(lora, spec).items()}
    with new_folder(folder, overwrite=overwrite) as temporary:
        # The metadata says which framework wrote the file; PEFT and Transformers look for it.
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(adapter_config(spec), indent=2) + "\n", encoding="utf-8")
        (temporary / CARD).write_text(card, encoding="utf-8")


@dataclass(frozen=True)
class PeftFacts:
    """What a PEFT LoRA folder says of itself; its tensors are not read."""

    base_model: str
    rank: int
    alpha: float
    use_rslora: bool
    modules: dict[str, tuple[int, int]]
    """Path of each adapted module to its (in, out) features, such as `model.layers.0.self_attn.q_proj`."""


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
    modules = read_modules(folder, rank)
    return PeftFacts(base, rank, float(alpha), bool(config.get("use_rslora", False)), modules)


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
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}, only 'LORA' is read")
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise CheckpointError(f"{folder / CONFIG}: {key} is {config[key]!r}; only plain LoRA is read")
    if config.get("bias", "none") != "none" or config.get("fan_in_fan_out"):
        raise CheckpointError(f"{folder / CONFIG}: bias or fan_in_fan_out is set; only plain LoRA is read")
    return config


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
