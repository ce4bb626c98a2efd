"""Files that appear whole or not at all, and reading other people's files without trust. Knows files only."""

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from t2l.errors import CheckpointError, ConfigError, DataError, OutputError, T2LError, TensorMismatchError
from t2l.locks import REPLACED, lock_folder, remove, sweep, unlock

if TYPE_CHECKING:
    from torch import Tensor

FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""What safetensors and torch call the types that are read."""
MAX_JSON_BYTES = 256 << 20
MAX_LINE_BYTES = 16 << 20
MAX_JSON_DEPTH = 64
OVERWRITE = "overwrite=True"
"""How messages call what replaces a file or folder that is there."""

# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what fails in a block that writes to `path` into one error that names it.

    Raises:
        OutputError: for every error of the file system, a full disk among them.
    """
    try:
        yield
    except T2LError:  # some of them are OSErrors too, and already say what is wrong
        raise
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}") from error
    except Exception as error:
        from safetensors import SafetensorError

        if isinstance(error, SafetensorError):  # its own type, also for a full disk
            raise OutputError(f"Cannot write {path}: {error}") from error
        raise


def require_absent(path: Path, what: Literal["file", "folder"], overwrite: bool | None = False) -> None:
    """Checks that nothing is at a place where something is to be written.

    Args:
        path: The place.
        what: What is to be written.
        overwrite: Whether what is there may be replaced; None where whoever asked for the writing has no say in it.

    Raises:
        OutputError: if something is there and stays. The message calls the way out `overwrite=True`, which the command
            line turns into its flag.
    """
    if path.exists() and not overwrite:
        raise _there(path, what, overwrite)


def _there(path: Path, what: str, overwrite: bool | None, *, meanwhile: bool = False) -> OutputError:
    since = ": another process wrote it meanwhile" if meanwhile else ""
    way_out = "" if overwrite is None else f" or pass {OVERWRITE}"
    return OutputError(f"{path} exists already{since}; choose another {what}{way_out}")


@contextmanager
def new_folder(path: Path, *, overwrite: bool | None = None) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Of two processes that write to one path without `overwrite`, one is refused. What a killed process left behind is
    removed.

    Args:
        path: The folder to be made.
        overwrite: Whether a folder that is there is replaced, see `require_absent`.

    Raises:
        OutputError: if `path` exists (and `overwrite` is off), is no folder or cannot be written.
    """
    with writing(path):
        require_absent(path, "folder", overwrite)
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; an output folder cannot take its place")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as temporary:
            yield temporary
            # As any new file would be; temporary folders and safetensors files start out private to their owner.
            mask = _umask()
            for entry in temporary.rglob("*"):
                entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)
            temporary.chmod(0o777 & ~mask)
            _take_place(temporary, path, overwrite)


def require_float(dtype: object) -> None:
    """Raises ConfigError unless tensors of a type are read back."""
    if str(dtype) not in (f"torch.{name}" for name in FLOAT_TYPES.values()):
        raise ConfigError(f"Tensors are not kept as {dtype!r}; give a type such as torch.float32 or torch.bfloat16")


def require_only(folder: Path, *patterns: str) -> None:
    """Checks that overwriting a folder deletes nothing but files of the kinds that are written there.

    Args:
        folder: The folder, which may be absent.
        patterns: Names that may be in it, as `fnmatch` takes them.

    Raises:
        OutputError: naming what else the folder holds.
    """
    if not folder.is_dir():
        return
    with writing(folder):
        names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    foreign = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if foreign:
        raise OutputError(
            f"{folder} holds other things than are written there ({', '.join(foreign[:3])}); overwriting would delete "
            "them. Choose another folder"
        )


def _take_place(temporary: Path, path: Path, overwrite: bool | None) -> None:
    """Renames a folder. A rename onto a folder with files fails, so a folder that appeared meanwhile is never lost."""
    while True:
        try:
            return os.rename(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if not overwrite:
                raise _there(path, "folder", overwrite, meanwhile=True) from error
        with _temporary(path) as doomed:  # where the old folder goes to be deleted, or from where it comes back
            try:
                os.rename(path, doomed / REPLACED)
                return os.rename(temporary, path)
            except OSError as error:  # others that overwrite have just moved it away, or put theirs in its place
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                    raise


@contextmanager
def new_file(path: Path, *, overwrite: bool | None = None) -> Iterator[Path]:
    """Yields the path of a file to be written, which becomes `path` when the block ends well, and vanishes otherwise.

    A link is followed: the file that it leads to is replaced, and the link stays. What a killed process left behind is
    removed. The file is written in a temporary folder, because some writers, safetensors among them, put a temporary
    file of their own beside it.

    Args:
        path: The file to be made.
        overwrite: Whether a file that is there is replaced, see `require_absent`.

    Yields:
        Where to write.

    Raises:
        OutputError: if `path` is no regular file, exists (and `overwrite` is off) or cannot be written.
    """
    path = regular_file(path)
    require_absent(path, "file", overwrite)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as folder:
            temporary = folder / path.name
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            if overwrite:
                os.replace(temporary, path)
            else:
                try:
                    os.link(temporary, path)  # unlike a rename, this never replaces what appeared meanwhile
                except FileExistsError as error:
                    raise _there(path, "file", overwrite, meanwhile=True) from error


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Makes sure, for the length of a block, that no other process writes what grows in place.

    A folder beside it is locked meanwhile; one that a killed process left is taken over.

    Args:
        path: A file or folder, which need not be there yet.

    Raises:
        OutputError: if another process writes there, or nothing can be written there.
    """
    path = path.absolute() if path.is_dir() else regular_file(path.absolute())
    claim = path.parent / f".{path.name}.t2l-writing_"
    with writing(path):
        claim.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(claim, wait=False)
    held = lock is not None and claim.exists() and os.path.samestat(os.fstat(lock), claim.stat())
    if not held and os.name == "posix":  # nothing is locked elsewhere
        unlock(lock)
        raise OutputError(f"{path}: another process is writing to it; wait until it has ended, or choose another place")
    try:
        sweep(path.parent, path.name)
        yield
    finally:
        shutil.rmtree(claim, ignore_errors=True)
        unlock(lock)


def regular_file(path: Path) -> Path:
    """The path itself, or where it leads if it is a link.

    Raises:
        OutputError: if something is there that is no regular file. Renaming a file over a device would replace it.
    """
    with writing(path):
        path = Path(os.path.realpath(path)) if path.is_symlink() else path  # `resolve` is raw at links in a circle
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            return path
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
        raise OutputError(f"{path} is {what}, not a regular file; give the name of a file")
    return path


def write_text(path: Path, text: str) -> None:
    """Writes a text file that appears whole or not at all, in UTF-8.

    Raises:
        OutputError: as `new_file`.
    """
    with new_file(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A folder beside `path`, locked as long as this process lives, so that leftovers are told from work."""
    sweep(path.parent, path.name)
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.t2l-", dir=path.parent))
        lock = lock_folder(temporary, wait=True)
        if temporary.exists():  # another process may have taken it for a leftover before it was locked
            break
        unlock(lock)
    try:
        yield temporary
    finally:
        try:
            remove(temporary, path)  # a folder that was renamed is no longer here
        finally:
            unlock(lock)


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- reading --------------------------------------------------------------------------------------------------------


@contextmanager
def readable(path: Path, error: type[T2LError] = CheckpointError) -> Iterator[None]:
    """Turns what the file system says of a file that may not be read into one error that names it, of class `error`."""
    try:
        yield
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}") from cause


def sha256(path: Path) -> str:
    """Checksum of a file's bytes; a CheckpointError if they cannot be read."""
    with readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: str | bytes, where: object, error: type[T2LError] = CheckpointError) -> Any:
    """Reads JSON that somebody else wrote, within bounds.

    Args:
        text: The document.
        where: What it is called in messages, such as its path.
        error: The class of what is raised.

    Returns:
        Mappings, lists, texts, numbers, truth values and None. All numbers are finite, all texts can be written as
        UTF-8, and nothing is nested deeper than `MAX_JSON_DEPTH`.

    Raises:
        T2LError: of the class `error`, if it is not such a document.
    """
    if len(text) > MAX_JSON_BYTES:
        raise error(f"{where} is larger than the {MAX_JSON_BYTES >> 20} MiB of JSON that are read")
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        data = json.loads(text, parse_constant=_not_finite, parse_float=_finite, parse_int=_short)
        if "\\u" in text:
            json.dumps(data, ensure_ascii=False).encode()  # fails on half of a surrogate pair
    except RecursionError as cause:
        raise error(f"{where} cannot be read as JSON: it is nested too deeply") from cause
    except UnicodeEncodeError as cause:
        raise error(f"{where} cannot be read as JSON: it holds half of a surrogate pair") from cause
    except ValueError as cause:
        raise error(f"{where} cannot be read as JSON: {cause}") from cause
    if not _is_shallow(data):
        raise error(f"{where} cannot be read as JSON: it is nested deeper than {MAX_JSON_DEPTH}")
    return data


def _not_finite(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _short(digits: str) -> int:
    if len(digits) > 20:  # -9223372036854775808, the smallest of 64 bits, has as many
        raise ValueError(f"the number {digits[:20]}… has {len(digits)} digits")
    return int(digits)


def _is_shallow(data: Any) -> bool:
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        inner = [value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer)]
        level = [value for value in inner if isinstance(value, dict | list)]
    return not level


def read_whole(path: Path, error: type[T2LError] = CheckpointError, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """Reads a regular file. Of a pipe nobody might write to, or a device without an end, nothing is read.

    Args:
        path: The file.
        error: The class of what is raised.
        limit: The most bytes that it may have.

    Raises:
        T2LError: of the class `error`, if it is absent, something else or larger.
    """
    if not os.path.isfile(path):
        what = "a folder, and a file is wanted" if os.path.isdir(path) else "no regular file"
        raise error(f"{path} cannot be read: it is {what}" if os.path.lexists(path) else f"{path} is missing")
    with readable(path, error), path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise error(f"{path} is larger than the {limit >> 20} MiB that are read of such a file")
    return content


def read_json(path: Path, error: type[T2LError] = CheckpointError) -> dict[str, Any]:
    """Reads a JSON object from a file, within the bounds of `parse_json`.

    Raises:
        T2LError: of the class `error`, if the file is absent or holds something else.
    """
    data = parse_json(read_whole(path, error), path, error)
    if not isinstance(data, dict):
        raise error(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def read_json_lines(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Reads a file of JSON lines, each within the bounds of `parse_json`; blank lines are left out.

    Yields:
        The file and line as messages name them, the number of the line, and what stands there.

    Raises:
        DataError: if the file cannot be read or a line is no JSON.
    """
    try:
        file = path.open("rb")
    except (OSError, ValueError) as cause:  # ValueError: a NUL byte in its name
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise DataError(f"Cannot read {path}: {reason}") from cause
    with file:
        # Not `splitlines`, which also cuts at signs that may stand inside a JSON text, such as U+2028.
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{path}:{number} is longer than the {MAX_LINE_BYTES >> 20} MiB of a line that are read"
                )
            if line.strip():
                try:
                    row = parse_json(line, f"{path}:{number}", DataError)
                except DataError as error:
                    raise DataError(f"{error} (JSON lines are wanted: one JSON document on each line)") from error
                yield f"{path}:{number}", number, row


@contextmanager
def reading(ref: str, what: str) -> Iterator[None]:
    """Turns whatever Transformers raises on unreadable files into one error that names the model.

    Args:
        ref: The model's reference.
        what: What is read of it, such as `tokenizer`.

    Raises:
        CheckpointError: for whatever the block raises because of what it reads.
    """
    try:
        yield
    # What it raises differs by format, architecture and version; a panic of Rust's is not even an Exception.
    except BaseException as error:
        if isinstance(error, T2LError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        # Of a model of another kind Transformers names the hundreds of classes that it might be.
        said = str(error).partition("\nModel type should be one of")[0]
        raise CheckpointError(f"cannot read the {what} of {ref}: {type(error).__name__}: {said:.2000}") from error


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

    with open_tensors(path) as file:
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
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinite values")
    return tensors


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors, from its header alone.

    Raises:
        CheckpointError: if the file is absent, pickled or damaged.
    """
    with open_tensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, open as its own library opens it; what that raises becomes an error of ours.

    Raises:
        CheckpointError: if the file is absent, pickled or damaged.
    """
    from safetensors import SafetensorError, safe_open

    with readable(path):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        _refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error}); write it again") from error


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
