"""Writing without leftovers, and reading tensors without trust. Knows files only."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from t2l.errors import CheckpointError, OutputError, TensorMismatchError

if TYPE_CHECKING:
    from torch import Tensor

FLOAT_TYPES = {"F32", "F16", "BF16", "F64"}


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: if `path` exists (and `overwrite` is off) or cannot be written.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; choose another folder or pass --overwrite")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; an output folder cannot take its place")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise OutputError(f"Cannot write to {path.parent}: {error.strerror}") from error
    try:
        yield temporary
        # As any new file would be; temporary folders and safetensors files start out private to their owner.
        mask = _umask()
        for entry in temporary.rglob("*"):
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)
        temporary.chmod(0o777 & ~mask)
        if path.exists():
            doomed = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, doomed / "old")
            os.replace(temporary, path)
            shutil.rmtree(doomed)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: if `path` is no regular file, exists (and `overwrite` is off) or cannot be written.
    """
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a regular file; an output file cannot take its place")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; choose another file or pass --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise OutputError(f"Cannot write to {path.parent}: {error.strerror}") from error
    try:
        yield temporary / path.name
        (temporary / path.name).chmod(0o666 & ~_umask())
        os.replace(temporary / path.name, path)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256(path: Path) -> str:
    """Checksum of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(
    path: Path, expected: Mapping[str, tuple[int, ...]] | None = None, *, rows: Sequence[int] | None = None
) -> dict[str, "Tensor"]:
    """Reads a safetensors file whose content is checked before anything is allocated.

    Args:
        path: The file.
        expected: Names and shapes the file must hold, no more and no fewer.
        rows: Positions in the first dimension of every tensor; only these are read, in this order.

    Raises:
        CheckpointError: if the file is absent, pickled, truncated, holds other names, shapes or types than
            expected, or NaN or infinite values.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    _refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                piece = file.get_slice(name)
                found[name] = tuple(piece.get_shape())
                if expected is not None and piece.get_dtype() not in FLOAT_TYPES:
                    raise CheckpointError(f"{path}: tensor {name} has type {piece.get_dtype()}; only floats are read")
            if expected is not None:
                _compare(path, found, expected)
            if rows is None:
                tensors = {name: file.get_tensor(name) for name in found}
            else:
                pieces = {name: file.get_slice(name) for name in found}
                tensors = {name: torch.stack([piece[row] for row in rows]) for name, piece in pieces.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}); fetch or write it again"
        ) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinite values")
    return tensors


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors, from its header alone.

    Raises:
        CheckpointError: if the file is absent, pickled or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    _refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}); fetch or write it again"
        ) from error


def _refuse_pickle(path: Path) -> None:
    """By content, not by suffix: zip archives (torch.save) and bare pickles."""
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file starts with its header's length, whose bytes may read like either; then comes the header's {.
    looks_pickled = start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    if looks_pickled and start[8:] != b"{":
        raise CheckpointError(f"{path} is a pickle, which could run code when read; only safetensors are read")


def _compare(path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = [f"lacks {', '.join(missing[:3])}" * bool(missing), f"has unknown {', '.join(extra[:3])}" * bool(extra)]
        count = f"{len(missing)} missing, {len(extra)} unknown tensors"
        raise TensorMismatchError(f"{path} {' and '.join(filter(None, parts))} ({count})")
    for name, shape in expected.items():
        if found[name] != tuple(shape):
            raise TensorMismatchError(f"{path}: tensor {name} has shape {found[name]}, expected {tuple(shape)}")


def read_json(path: Path) -> dict[str, object]:
    """Reads a JSON object.

    Raises:
        CheckpointError: if the file is absent or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data
