"""A checkpoint is a folder: `hypernet.safetensors`, `spec.json`, `config.json` and a card.

Loaded strictly, checked against its own checksum; never a pickle. Knows the hypernetwork, its settings and
files. Knows no tasks and no training: what training wants to remember goes into `training` as plain data.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch

from t2l.config import EncoderConfig, HypernetConfig, PromptConfig, Size, build, check_ranges, to_plain
from t2l.errors import CheckpointError
from t2l.hypernet import Hypernet
from t2l.io import new_folder, read_json, read_tensors, read_whole, require_float, sha256
from t2l.kinds import CHECKPOINT, require_kind
from t2l.shapes import only_shapes
from t2l.spec import AdapterSpec

FORMAT_VERSION = 2
WEIGHTS, SPEC, CONFIG, CARD = CHECKPOINT.mark, "spec.json", "config.json", "README.md"
FILES = (WEIGHTS, SPEC, CONFIG, CARD)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What `config.json` holds."""

    format_version: int
    embedding_size: Size
    encoder: EncoderConfig
    encoder_revision: str
    """Fingerprint of the encoder's files in training; another one is refused when generating."""
    hypernet: HypernetConfig
    prompt: PromptConfig
    conditioning: Literal["description", "input", "task"] = "description"
    """What the hypernetwork reads: the task's description, the very input that is to be answered (Hyperdecoders,
    arXiv 2203.08304), or the task's name (one-hot)."""
    weights_sha256: str = ""
    training: dict = field(default_factory=dict)
    """How the weights came about: seed, steps, data, versions. For readers; nothing depends on it."""

    def __post_init__(self) -> None:
        check_ranges(self)

    @classmethod
    def current(cls, training: dict[str, Any], **values: Any) -> Self:
        """The settings of a new checkpoint, in the current format."""
        return cls(format_version=FORMAT_VERSION, training=training, **values)

    @property
    def unconditional(self) -> bool:
        """Whether the checkpoint writes one and the same adapter whatever it is given to read."""
        return self.hypernet.variant == "none"

    @property
    def kind(self) -> Literal["sentence", "tokens"]:
        """Kind of encoding the hypernetwork reads: one vector, or one for each token."""
        return "tokens" if self.encoder.kind == "tokens" else "sentence"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    hypernet: Hypernet
    spec: AdapterSpec
    config: CheckpointConfig
    card: str = ""
    """Text of the model card; empty if the folder has none."""


def save_checkpoint(
    folder: Path,
    hypernet: Hypernet,
    spec: AdapterSpec,
    config: CheckpointConfig,
    *,
    card: str = "",
    dtype: torch.dtype = torch.float16,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Raises:
        OutputError: if the folder exists or cannot be written.
        CheckpointError: if a weight does not survive `dtype` (overflow) or is not finite.
        ConfigError: if `dtype` is no type that is read back.
    """
    from safetensors.torch import save_file

    require_float(dtype)
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in hypernet.state_dict().items()}
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"Weight {name} is not finite in {dtype}; nothing was written")
    with new_folder(folder, overwrite=overwrite) as temporary:
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        plain = to_plain(config) | {"weights_sha256": sha256(temporary / WEIGHTS)}
        (temporary / SPEC).write_text(spec.to_json(), encoding="utf-8")
        (temporary / CONFIG).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        (temporary / CARD).write_text(card, encoding="utf-8", newline="")


def read_config(folder: Path) -> tuple[AdapterSpec, CheckpointConfig]:
    """Reads a checkpoint's settings without its weights.

    Raises:
        CheckpointError: if files are missing, malformed or of another format version.
    """
    if not (folder / SPEC).is_file() or not (folder / CONFIG).is_file():
        require_kind(folder, CHECKPOINT)
    plain = read_json(folder / CONFIG)
    version = plain.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / CONFIG}: format_version is {version!r}, this version of t2l reads {FORMAT_VERSION}; "
            "update t2l or re-export the checkpoint"
        )
    config = build(CheckpointConfig, plain, where=str(folder / CONFIG))
    return AdapterSpec.from_json(read_whole(folder / SPEC), where=str(folder / SPEC)), config


def load_checkpoint(folder: Path, *, device: str | torch.device = "cpu") -> Checkpoint:
    """Loads a checkpoint for generating: float32, evaluation mode, no gradients.

    Raises:
        CheckpointError: if anything in the folder is missing, damaged, pickled, or not what its checksum says.
    """
    spec, config = read_config(folder)
    with only_shapes():
        expected = _new_hypernet(spec, config).state_dict()
    state = read_tensors(folder / WEIGHTS, {name: tuple(value.shape) for name, value in expected.items()})
    found = sha256(folder / WEIGHTS)
    if found != config.weights_sha256:
        raise CheckpointError(
            f"{folder / WEIGHTS} has sha256 {found}, its config.json says {config.weights_sha256}: "
            "the file was changed after it was written; fetch it again"
        )
    hypernet = _new_hypernet(spec, config)
    hypernet.load_state_dict({name: value.float() for name, value in state.items()}, strict=True)
    text = read_card(folder)
    return Checkpoint(hypernet.to(device).eval().requires_grad_(False), spec, config, text)


def _new_hypernet(spec: AdapterSpec, config: CheckpointConfig) -> Hypernet:
    return Hypernet(spec, embedding_size=config.embedding_size, kind=config.kind, config=config.hypernet)


def read_card(folder: Path) -> str:
    """Text of a checkpoint's model card; empty if it has none."""
    card = folder / CARD
    return read_whole(card).decode("utf-8", errors="replace") if card.is_file() else ""
