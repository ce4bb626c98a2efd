"""Alibaba's English GTE encoders (gte-large-en-v1.5, gte-base-en-v1.5) without the code of their repository.

Their `config.json` names a class that stands in the repository itself, which would have to be run. Transformers has the
same network as its own class `gte` and reads these weights; what is written here is a folder whose config says so, and
which pools by the first token and scales to length 1.

Knows files only.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from t2l.errors import CheckpointError, ConfigError
from t2l.io import new_folder, read_json

_KEPT = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "pad_token_id",
)
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "model.safetensors")


def convert_gte(folder: Path, output: Path) -> None:
    """Writes a GTE folder as Transformers' own class reads it, in the layout of sentence-transformers.

    Args:
        folder: The model's folder as its authors publish it.
        output: Where to.

    Raises:
        CheckpointError: if files are missing or damaged.
        ConfigError: if the model is of another kind.
        OutputError: if `output` exists or cannot be written.
    """
    config = native_config(read_json(folder / "config.json"), where=str(folder / "config.json"))
    for name in ("tokenizer.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate((("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")))
    ]
    pooling = {"word_embedding_dimension": config["hidden_size"], "pooling_mode_cls_token": True}
    with new_folder(output) as temporary:
        for name in _FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        (temporary / "1_Pooling").mkdir()
        for path, content in {
            "config.json": config,
            "modules.json": modules,
            "1_Pooling/config.json": pooling,
            "sentence_bert_config.json": {"max_seq_length": config["max_position_embeddings"]},
        }.items():
            (temporary / path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def native_config(config: dict[str, Any], *, where: str = "config.json") -> dict[str, Any]:
    """The config of Transformers' own class for the same network.

    Raises:
        ConfigError: if a setting is one that this class does not have; it is named with its value.
    """
    read = {
        "model_type": "new",
        "position_embedding_type": "rope",
        "layer_norm_type": "layer_norm",
        "logn_attention_scale": False,
        "pack_qkv": True,
    }
    for key, value in read.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{where}: {key} is {config[key]!r}; only GTE models where it is {value!r} are read")
    missing = [key for key in (*_KEPT, "rope_theta") if key not in config]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}, which every GTE model has")
    head = config["hidden_size"] // config["num_attention_heads"]
    rope = _rope(float(config["rope_theta"]), config.get("rope_scaling"), head, where)
    return {"model_type": "gte", "architectures": ["GteModel"], "rope_parameters": rope} | {
        key: config[key] for key in _KEPT
    }


def _rope(theta: float, scaling: dict[str, Any] | None, head: int, where: str) -> dict[str, Any]:
    """Rotary embedding's frequencies in Transformers' words.

    The authors' fixed NTK scaling by f has frequencies (f·θ)^(-2i/d) · f^(-2/d): those of θ' = f·θ, all divided by
    f^(2/d), which is linear scaling to Transformers.
    """
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    factor = scaling.get("factor")
    if scaling.get("type") != "ntk" or scaling.get("mixed_b") is not None or not isinstance(factor, int | float):
        raise ConfigError(f"{where}: rope_scaling is {scaling!r}; only type 'ntk' with a factor is read")
    return {"rope_type": "linear", "rope_theta": theta * factor, "factor": float(factor) ** (2 / head)}
