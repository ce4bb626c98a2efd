"""GGUF adapters: one file that llama.cpp, its Python bindings and Ollama load beside a base model in GGUF.

Knows the names and the layout that llama.cpp gives to the modules of a base, and writes the file with the package
`gguf` (extra `embedded`). Knows no hypernetwork and reads no weights of the base: its config is enough.
Shape letters as in `spec.py`.

llama.cpp multiplies B·A by alpha / rank and by the scale that its user asks for. It knows nothing of rsLoRA, so the
alpha in the file is the one that gives the adapter's own scaling.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from t2l.errors import ConfigError, OutputError, SpecMismatchError
from t2l.io import new_file
from t2l.lora import LoraTensors
from t2l.pypi import public_name
from t2l.spec import AdapterSpec, Target

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OutType = Literal["f32", "f16", "bf16"]
_TYPES: dict[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# The converter of llama.cpp reorders the rows of the queries' and keys' weights for these, because its rotary embedding
# turns neighbouring numbers where that of Transformers turns the two halves of a head.
_REORDERED = {
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo": "olmo",
    "smollm3": "smollm3",
}
_AS_THEY_ARE = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "lfm2": "lfm2",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
ARCHITECTURES: dict[str, str] = {**_REORDERED, **_AS_THEY_ARE}
"""For each `model_type` of Transformers that can be exported, llama.cpp's name of the architecture."""

LARGEST_ROUNDING = 0.01
"""Part of a matrix's size that may be lost to the type in the file; float16 loses more where numbers are tiny."""


def save_gguf(
    path: str | Path,
    lora: LoraTensors,
    spec: AdapterSpec,
    config: "PretrainedConfig",
    *,
    outtype: OutType = "f32",
    description: str = "",
    overwrite: bool = False,
) -> None:
    """Writes a single adapter as a GGUF file, whole or not at all.

    Args:
        path: The file to write; its folder is made.
        lora: A single adapter.
        spec: Where it belongs.
        config: The base model's Transformers config.
        outtype: Type of the matrices in the file.
        description: What the adapter is for; stands in the file for readers.
        overwrite: Whether an existing file is replaced.

    Raises:
        SpecMismatchError: if llama.cpp has no place for a target or for the base's architecture.
        ConfigError: if the matrices do not survive `outtype`, or the package `gguf` is missing.
        OutputError: if the file exists or cannot be written.
    """
    gguf = _package()
    tensors = gguf_tensors(lora, spec, config)
    for name, tensor in tensors.items():
        _check_rounding(name, tensor, outtype)
    with new_file(Path(path), overwrite=overwrite) as temporary:
        _write(gguf, temporary, tensors, spec, outtype, description)


def gguf_tensors(lora: LoraTensors, spec: AdapterSpec, config: "PretrainedConfig") -> dict[str, Tensor]:
    """A single adapter under llama.cpp's names, float32, rows in llama.cpp's order.

    Raises:
        SpecMismatchError: if llama.cpp has no place for a target or for the base's architecture.
    """
    if lora.batch_size is not None:
        raise SpecMismatchError(f"One GGUF file holds one adapter, this is a batch of {lora.batch_size}; unbind it")
    names = _names(spec)
    text_config = config.get_text_config()
    tensors = {}
    for m, target in enumerate(spec.targets):
        rows = _row_order(target, names[target.name, spec.layers[0]], spec.model_type, text_config)
        for position, layer in enumerate(spec.layers):
            name = names[target.name, layer]
            b = lora.b[m][position].detach().float().cpu()
            tensors[f"{name}.weight.lora_a"] = lora.a[m][position].detach().float().cpu()
            tensors[f"{name}.weight.lora_b"] = b if rows is None else b[rows]
    return tensors


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("Writing GGUF needs the package gguf; run: pip install 'text-to-lora[embedded]'") from error
    return gguf


def _names(spec: AdapterSpec) -> dict[tuple[str, int], str]:
    """llama.cpp's name of each target in each layer."""
    gguf = _package()
    if spec.model_type not in ARCHITECTURES:
        raise SpecMismatchError(
            f"{spec.base_model} is a model of type '{spec.model_type}', for which GGUF adapters are not written; they "
            f"are for: {', '.join(sorted(ARCHITECTURES))}. llama.cpp's own converter may read the PEFT folder"
        )
    by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(by_name[ARCHITECTURES[spec.model_type]], spec.num_layers)
    names = {}
    for target in spec.targets:
        for layer in spec.layers:
            path = target.path.format(layer=layer)
            # The text model inside a model that also reads images is the whole model to llama.cpp.
            plain = path.removeprefix("model.language_model.").removeprefix("language_model.model.")
            found = table.get_name(plain if plain == path else f"model.{plain}")
            if found is None or ".experts" in path:
                raise SpecMismatchError(
                    f"llama.cpp has no single matrix for '{target.name}' ({path}) of {spec.base_model}, so GGUF cannot "
                    "hold an adapter for it; use a checkpoint or a folder without this target"
                )
            names[target.name, layer] = found
    return names


def _row_order(target: Target, name: str, model_type: str, config: Any) -> Tensor | None:
    """For each row of B in the file the row it has in the adapter; None where the order stays."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.rsplit(".", 1)[-1])
    if model_type not in _REORDERED or heads is None:
        return None
    if target.out_features % (2 * heads):
        raise SpecMismatchError(
            f"'{target.name}' has {target.out_features} outputs, which {heads} heads of an even size do not divide; "
            "the config is not that of the adapter's base model"
        )
    halves = torch.arange(target.out_features).unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten()  # number i of the first half, then number i of the second, in each head


def _check_rounding(name: str, tensor: Tensor, outtype: str) -> None:
    """Raises if the type in the file loses more of a matrix than an adapter can spare."""
    lost = (tensor.to(_TYPES[outtype]).float() - tensor).norm() / tensor.norm().clamp_min(1e-30)
    if not lost <= LARGEST_ROUNDING:  # also a NaN, which an overflow gives
        raise ConfigError(
            f"{name} does not survive {outtype}: its numbers go up to {tensor.abs().max():.3g} and their mean size is "
            f"{tensor.abs().mean():.3g}, {100 * float(lost):.3g} % of the matrix would be lost; write f32 or bf16"
        )


def _write(
    gguf: Any, path: Path, tensors: dict[str, Tensor], spec: AdapterSpec, outtype: str, description: str
) -> None:
    writer = gguf.GGUFWriter(path, ARCHITECTURES[spec.model_type])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, spec.scaling * spec.rank)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, public_name(spec.base_model))
        if description:
            writer.add_description(description)
        for name, tensor in tensors.items():
            if outtype == "bf16":
                kind = gguf.GGMLQuantizationType.BF16
                writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, tensor.to(_TYPES[outtype]).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    try:
        gguf.GGUFReader(path)  # numpy writes by a stream of C's, and does not say that its last bytes had no room
    except (ValueError, IndexError) as error:
        raise OutputError(f"Cannot write {path.name}: not all of it reached the disk, which may be full") from error
