"""A model's folder as Transformers writes it: what must be in it, and the fingerprint of what is. Knows files only."""

import hashlib
import os
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

from t2l.errors import CheckpointError
from t2l.io import read_json, read_whole, readable
from t2l.kinds import MODEL, kind_of, require_kind

TEXT_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model")
MOST_LAYERS = 1 << 16
_COUNT = re.compile(r"(num|n)_\w*(layer|head)s?")
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_config(folder: Path, ref: str) -> None:
    """Checks that a folder holds a model's configuration, of sizes that a model can have, and nothing but files.

    Transformers would wait for a pipe for ever, and make as many layers as it is told to.

    Raises:
        CheckpointError: if it does not, naming the reference.
    """
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{ref}: {path} is no regular file")
    there = (folder / "config.json").is_file()
    config = read_json(folder / "config.json") if there else {}
    if "model_type" not in config and kind_of(folder) is not None:  # checkpoints and trainings have a config.json too
        require_kind(folder, MODEL)
    if not there:
        raise CheckpointError(f"{ref} holds no config.json ({folder}); give the folder or id of a whole model")
    _check_sizes(config, ref)


def _check_sizes(config: dict[str, Any], ref: str) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, ref)
        elif _COUNT.fullmatch(key) and isinstance(value, int) and not 0 <= value <= MOST_LAYERS:
            raise CheckpointError(f"{ref}: {key} in its config.json is {value}; at most {MOST_LAYERS:,} can be meant")


def check_weights(folder: Path, ref: str) -> None:
    """Checks that a folder holds all of a model's weights as safetensors files.

    Raises:
        CheckpointError: if one is missing, or if there are pickled weights only.
    """
    if (folder / "model.safetensors").is_file():
        return
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        absent = [name for name in _shards(index, ref) if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(f"{ref} lacks {len(absent)} of its weight files ({folder}), among them {absent[0]}")
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED_SUFFIXES)
    if pickled:
        raise CheckpointError(
            f"{ref} holds pickled weights ({', '.join(pickled)}) and no model.safetensors. Only safetensors files are "
            "read, because opening a pickle can run any code; save the model again with `save_pretrained`, on a "
            "machine where you trust that file"
        )
    raise CheckpointError(f"{ref} holds no model.safetensors ({folder}); only safetensors weights are read")


def _shards(index: Path, ref: str) -> list[str]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{ref}: {index.name} is damaged: {error}") from error
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name):
            raise CheckpointError(f"{ref}: {index.name} names a file outside the folder: {name!r}")
    return names


def folder_fingerprint(folder: Path, ref: str) -> str:
    """A checksum of text files and samples of weights, see `t2l.hub.fingerprint`.

    Raises:
        CheckpointError: if the folder holds no model or a damaged weight file.
    """
    check_config(folder, ref)
    digest = hashlib.sha256()
    # A sentence encoder's modules each have a folder with a config.json of their own.
    texts = [path for pattern in (*TEXT_PATTERNS, "*/config.json") for path in folder.glob(pattern)]
    for path in sorted(texts):
        content = read_whole(path)
        digest.update(f"\0{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        with readable(path), path.open("rb") as file:
            digest.update(_safetensors_sample(file, path.stat().st_size, ref))
    return f"sha256:{digest.hexdigest()}"


def _safetensors_sample(file: BinaryIO, size: int, ref: str) -> bytes:
    """Header and a little of the values at both ends: files of one shape share a header, not their values."""
    window, length_bytes = 1 << 16, file.read(8)
    header_bytes = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else size
    if header_bytes > size - 8:
        raise CheckpointError(f"{ref}: {Path(file.name).name} is not a complete safetensors file")
    head = file.read(header_bytes + window)
    file.seek(max(size - window, 0))
    return length_bytes + head + file.read(window)
