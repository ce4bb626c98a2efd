"""Where models come from: references, the cache, conversion and strict loading.

Knows how a reference string (`pypi:...`, a folder, a Hub id) becomes a local folder that `from_pretrained` reads, and
that weights are read from safetensors only. Does not know adapters, prompts, training or what a model is used for.

Hub models stay in the Hub client's own cache. Heavy imports happen inside functions.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from t2l.errors import CheckpointError, ConfigError, DownloadError, ModelNotFoundError, T2LError, first_line
from t2l.io import reading
from t2l.kinds import absent
from t2l.model_folder import TEXT_PATTERNS, check_config, check_weights, folder_fingerprint
from t2l.pypi import KNOWN_PACKAGES, PREFIX, final_folder, is_complete, prepare

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_HUB_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"{_HUB_PART}(?:/{_HUB_PART})?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_WEIGHT_PATTERNS = ("*.safetensors",)
# Some repositories hold the same weights a second time in their authors' own layout: twice the download, never read.
_IGNORED_PATTERNS = ("consolidated*", "original/*")


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
            return PREFIX + self.name
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
    if ref.startswith(PREFIX):
        name = ref.removeprefix(PREFIX)
        if name not in KNOWN_PACKAGES:
            known = ", ".join(PREFIX + known for known in KNOWN_PACKAGES)
            raise ModelNotFoundError(f"unknown model package {ref!r}; known are {known}")
        return ModelRef("pypi", name)
    if ref.startswith(("/", "./", "../", "~")) or ref in (".", "..") or os.path.exists(ref):
        return ModelRef("folder", str(_existing_folder(ref)))
    name, at, revision = ref.partition("@")
    if not _HUB_ID.fullmatch(name) or "--" in name or ".." in name or len(name) > 96:
        raise ModelNotFoundError(f"{ref!r} is neither a folder that exists nor a well-formed Hub id; {_forms()}")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelNotFoundError(f"{ref!r} has a malformed revision {revision!r}; write a branch, tag or commit hash")
    return ModelRef("hub", name, revision or None)


def _forms() -> str:
    package = next(iter(KNOWN_PACKAGES), "name")
    return f"write a folder ('./my-model'), '{PREFIX}{package}' or a Hub id ('org/name', 'org/name@revision')"


def _existing_folder(ref: str) -> Path:
    try:
        path = Path(ref).expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
    except (ValueError, RuntimeError, OSError) as error:  # a NUL byte, `~name` of an unknown user, too long
        raise ModelNotFoundError(f"{ref!r} is not a usable folder name: {error}") from error
    if is_file:
        raise ModelNotFoundError(f"{path} is a file, and a folder is wanted, such as {path.absolute().parent}")
    if not is_dir:
        raise ModelNotFoundError(f"{absent(path)}; {_forms()}")
    return path


# --- public: resolving ----------------------------------------------------------------------------------------------


class FetchOptions(TypedDict, total=False):
    """How the files of a model are fetched. All but `progress` go to the Hub client, and only Hub ids take them."""

    revision: str | None
    """Branch, tag or commit; the same as `ref@revision`."""
    token: str | bool | None
    """As `huggingface_hub` takes it; None means the token that is saved, if there is one."""
    cache_dir: str | Path | None
    """Folder of the Hub client's cache."""
    local_files_only: bool
    """Whether nothing is fetched: what is not there is a `DownloadError`."""
    progress: bool
    """Whether standard error says what is fetched and converted, which is the default. Nothing is ever written to
    standard output."""


def resolve(ref: str, **fetch: Unpack[FetchOptions]) -> Path:
    """Turn a model reference into a local folder that `from_pretrained` reads, fetching what is missing.

    Args:
        ref: A model reference, see `parse`.
        fetch: See `FetchOptions`.

    Returns:
        A folder with `config.json` and safetensors weights.

    Raises:
        ModelNotFoundError: The reference leads nowhere.
        DownloadError: The network, the index or the checksum failed; the message says how to go on without.
        CheckpointError: What is there cannot be read: pickled weights, a damaged file, no `gguf` package.
        OutputError: The cache cannot be written.
    """
    folder = _fetch(ref, (*TEXT_PATTERNS, *_WEIGHT_PATTERNS), **fetch)
    check_config(folder, ref)
    check_weights(folder, ref)
    return folder


def resolve_config(ref: str, **fetch: Unpack[FetchOptions]) -> Path:
    """Turn a model reference into a folder that holds at least `config.json`.

    For a Hub id only that file is fetched, so a spec can be made for a large model without its weights.

    Args:
        ref: A model reference, see `parse`.
        fetch: See `FetchOptions`.

    Returns:
        A folder with `config.json`; weights and tokenizer files may be absent.

    Raises:
        ModelNotFoundError: The reference leads nowhere.
        DownloadError: The network, the index or the checksum failed.
        CheckpointError: The folder holds no model.
        OutputError: The cache cannot be written.
    """
    folder = _fetch(ref, ("config.json",), **fetch)
    check_config(folder, ref)
    return folder


def resolve_checkpoint(ref: str, **fetch: Unpack[FetchOptions]) -> Path:
    """Turn the reference of a t2l checkpoint into a local folder; what is in it, `t2l.checkpoint` judges.

    Args:
        ref: A local folder or a Hub id, see `parse`.
        fetch: See `FetchOptions`.

    Returns:
        The folder.

    Raises:
        ModelNotFoundError: The reference leads nowhere.
        DownloadError: The network failed.
    """
    return _fetch(ref, ("*.safetensors", "*.json"), **fetch)


def resolve_library(ref: str, **fetch: Unpack[FetchOptions]) -> Path:
    """As `resolve_checkpoint` for a library of adapters, whose index may be Parquet."""
    return _fetch(ref, ("*.safetensors", "*.json", "*.parquet"), **fetch)


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
        return is_complete(final_folder(package), package)
    try:
        resolve(ref, local_files_only=True, progress=False)
    except T2LError:
        return False
    return True


def fingerprint(ref: str, **fetch: Unpack[FetchOptions]) -> str:
    """Return a short string that stays the same as long as the model does.

    Args:
        ref: A model reference, see `parse`.
        fetch: See `FetchOptions`.

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
    parsed = _at_revision(parse(ref), fetch.get("revision"))
    if parsed.kind == "pypi":
        return KNOWN_PACKAGES[parsed.name].requirement
    if parsed.kind == "folder":
        return folder_fingerprint(Path(parsed.name), ref)
    if parsed.revision and _COMMIT.fullmatch(parsed.revision):
        return parsed.revision
    commit = resolve_config(ref, **{**fetch, "progress": False}).name  # type: ignore[arg-type]
    return commit if _COMMIT.fullmatch(commit) else parsed.revision or "unknown"


# --- public: loading ------------------------------------------------------------------------------------------------


def load_config(ref: str, **fetch: Unpack[FetchOptions]) -> PretrainedConfig:
    """Load a model's configuration; of a Hub model nothing else is fetched.

    Args:
        ref: A model reference, see `parse`.
        fetch: See `FetchOptions`.

    Returns:
        The configuration.

    Raises:
        T2LError: As in `resolve_config`; a configuration that cannot be read is a `CheckpointError`.
    """
    folder = resolve_config(ref, **fetch)
    from transformers import AutoConfig

    with reading(ref, "configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def load_tokenizer(ref: str, **fetch: Unpack[FetchOptions]) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; of a Hub model no weights are fetched.

    Args:
        ref: A model reference, see `parse`.
        fetch: See `FetchOptions`.

    Returns:
        The tokenizer, with its chat template where it has one.

    Raises:
        T2LError: As in `resolve_config`; a tokenizer that is absent or cannot be read is a `CheckpointError`.
    """
    folder = _fetch(ref, TEXT_PATTERNS, **fetch)
    from transformers import AutoTokenizer

    with reading(ref, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer("A.")  # a damaged one may fail only in use
        return tokenizer


def load_causal_lm(
    ref: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **fetch: Unpack[FetchOptions],
) -> PreTrainedModel:
    """Load a language model for use under adapters: frozen, in evaluation mode, from safetensors only.

    Args:
        ref: A model reference, see `parse`.
        device: Where the weights go.
        dtype: Type of the weights; None means float32.
        fetch: See `FetchOptions`.

    Returns:
        The model; no parameter requires a gradient.

    Raises:
        T2LError: As in `resolve`; weights that are damaged or incomplete, or an architecture that needs code from its
            repository, are a `CheckpointError`.
    """
    return _load_frozen("AutoModelForCausalLM", ref, device, dtype, **fetch)


def load_backbone(ref: str, *, device: str | torch.device = "cpu", **fetch: Unpack[FetchOptions]) -> PreTrainedModel:
    """Load what comes before any head of a model, causal or bidirectional, in float32; otherwise as `load_causal_lm`.

    A pooler may be missing, since no encoder here reads one.

    Args:
        ref: A model reference, see `parse`.
        device: Where the weights go.
        fetch: See `FetchOptions`.

    Returns:
        The model; no parameter requires a gradient.

    Raises:
        T2LError: As in `load_causal_lm`.
    """
    return _load_frozen("AutoModel", ref, device, None, unused="pooler.", **fetch)


def _load_frozen(
    kind: str,
    ref: str,
    device: str | torch.device,
    dtype: torch.dtype | None,
    *,
    unused: str | None = None,
    **fetch: Unpack[FetchOptions],
) -> PreTrainedModel:
    folder = resolve(ref, **fetch)
    import torch
    import transformers

    with reading(ref, "model"), quiet_transformers():
        model, info = getattr(transformers, kind).from_pretrained(
            folder,
            dtype=dtype or torch.float32,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    # Transformers fills absent weights with random numbers and only logs it; everything after would be noise.
    if missing := sorted(name for name in info["missing_keys"] if unused is None or not name.startswith(unused)):
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(f"{ref}: {len(missing)} weights are missing from its safetensors files: {some}")
    model.requires_grad_(False)
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_meta_model(ref: str, **fetch: Unpack[FetchOptions]) -> PreTrainedModel:
    """Make a language model without its weights, on the device `meta`: its configuration and its layers' shapes.

    Args:
        ref: A model reference, see `parse`.
        fetch: See `FetchOptions`.

    Returns:
        The model; no parameter requires a gradient.

    Raises:
        T2LError: As in `load_config`.
    """
    config = load_config(ref, **fetch)
    import torch
    from transformers import AutoModelForCausalLM

    with reading(ref, "model"), quiet_transformers(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).requires_grad_(False).eval()


def best_device(asked: str | None = None) -> str:
    """The device that is asked for, or a ConfigError; with none, or with `auto`, the GPU if there is one."""
    import torch

    if asked in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.suppress(RuntimeError):  # of a name that torch does not know
        if torch.device(asked).type != "cuda" or torch.cuda.is_available():
            return str(asked)
    raise ConfigError(f"torch finds no device {asked!r} here; `t2l doctor` says what there is")


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


def is_hub_id(ref: str) -> bool:
    """Say whether a reference names a model of the Hub, without asking it."""
    try:
        return parse(ref).kind == "hub"
    except ModelNotFoundError:
        return False


# --- Hugging Face Hub -----------------------------------------------------------------------------------------------


def _fetch(ref: str, patterns: tuple[str, ...], **fetch: Unpack[FetchOptions]) -> Path:
    """The folder of a reference; of a Hub id only files of these patterns are fetched."""
    parsed, progress = _at_revision(parse(ref), fetch.get("revision")), fetch.get("progress", True)
    if parsed.kind == "folder":
        return Path(parsed.name)
    if parsed.kind == "hub":
        options = {key: fetch[key] for key in ("token", "cache_dir", "local_files_only") if key in fetch}
        return _snapshot(parsed, patterns, progress=progress, **options)
    package = KNOWN_PACKAGES[parsed.name]
    if is_complete(final_folder(package), package):
        return final_folder(package)
    if fetch.get("local_files_only"):
        raise DownloadError(f"{ref} is not in the cache, and nothing is to be fetched (local_files_only)")
    with quiet_transformers():
        return prepare(package, progress=progress)


def _at_revision(parsed: ModelRef, revision: str | None) -> ModelRef:
    """The reference with the revision that was given beside it."""
    if revision is None or parsed.kind != "hub":  # as in Transformers, a folder is taken as it is
        return parsed
    if parsed.revision not in (None, revision):
        raise ModelNotFoundError(f"{parsed} names a revision, and revision={revision!r} another: give one")
    return parse(f"{parsed.name}@{revision}")


def _snapshot(parsed: ModelRef, patterns: tuple[str, ...], *, progress: bool, **options: Any) -> Path:
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
                **options,
            )
    except GatedRepoError as error:
        raise DownloadError(
            f"{parsed} asks for its licence to be accepted on its Hub page; accept it there and run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(
            f"{absent(Path(parsed.name))}; and the Hub has no model of that name; check the spelling, or run `hf "
            "auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"the Hub model {parsed.name!r} has no revision {parsed.revision!r}") from error
    # The client lets the errors of its HTTP library through, and which library that is differs by version.
    except Exception as error:
        raise DownloadError(
            f"{absent(Path(parsed.name))}; and the Hub cannot be asked for {parsed}: {first_line(error)}. "
            "Check the spelling and the network (and that HF_HUB_OFFLINE is unset), or download it elsewhere and give "
            "its folder here; `t2l doctor` lists models and checkpoints that need no Hub"
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
