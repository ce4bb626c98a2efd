"""From text to adapter: the library's main line.

    generator = TextToLora.from_pretrained()
    (adapter,) = generator.generate(["Decide whether a film review is positive or negative."])
    adapter.save_pretrained("sentiment")

Knows encoders, the hypernetwork and checkpoints. Knows no training and no evaluation.
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch

from t2l import hub
from t2l.adapter import LoraAdapter
from t2l.cards import card_license
from t2l.checkpoint import FILES, Checkpoint, CheckpointConfig, load_checkpoint, save_checkpoint
from t2l.config import PromptConfig
from t2l.encoder import Encoder, check_description, encoder_revision, load_encoder
from t2l.errors import CheckpointError, ConfigError, DescriptionError, ModelNotFoundError
from t2l.io import require_float, require_only
from t2l.lora import LoraTensors
from t2l.upload import HubFolder
from t2l.versions import versions

__all__ = ["DEFAULT", "LoraAdapter", "TextToLora", "checkpoint_folder"]

DEFAULT = "t2l:smollm2-135m"
"""The checkpoint that ships with the package."""


class TextToLora(HubFolder):
    """A hypernetwork with its encoder, ready to write adapters.

    Args:
        checkpoint: A loaded checkpoint.
        encoder: The encoder it was trained with.
        reference: Where the checkpoint came from, for cards.
    """

    def __init__(self, checkpoint: Checkpoint, encoder: Encoder, *, reference: str) -> None:
        if encoder.embedding_size != checkpoint.config.embedding_size:
            raise CheckpointError(
                f"The checkpoint reads embeddings of size {checkpoint.config.embedding_size}, this encoder writes "
                f"{encoder.embedding_size}. Use the encoder it was trained with: {checkpoint.config.encoder.model}"
            )
        self.hypernet, self.spec, self.config = checkpoint.hypernet, checkpoint.spec, checkpoint.config
        self.encoder, self.reference, self._card = encoder, reference, checkpoint.card

    def __repr__(self) -> str:
        return f"TextToLora({self.reference!r}, for {self.spec.base_model}, on {self.device})"

    @classmethod
    def from_pretrained(
        cls,
        reference: str | Path = DEFAULT,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        base: tuple[Any, Any] | None = None,
        base_reference: str | None = None,
    ) -> "TextToLora":
        """Loads a checkpoint and its encoder, in evaluation mode.

        Args:
            reference: A checkpoint folder, a Hub id, or `t2l:NAME` for one that ships with the package.
            revision: Branch, tag or commit of a Hub id.
            token: Token for the Hub; None means the one that is saved, if there is one.
            cache_dir: Folder of the Hub client's cache.
            local_files_only: Whether nothing is fetched.
            device: Where the hypernetwork and a newly loaded encoder run; `auto` is the GPU, if there is one.
            dtype: Type of the hypernetwork's weights and of the adapters; `auto` is float32, whatever the saved type
                is, which all checkpoints were evaluated with. The encoder runs in float32.
            base: The base model and its tokenizer, if they are in memory already; only a checkpoint that reads
                the base's own states uses them.
            base_reference: Where `base` came from, if not from where the checkpoint says.

        Raises:
            CheckpointError: if the checkpoint is damaged, or its encoder is not the one it was trained with.
            ModelNotFoundError: if a reference leads nowhere.
            DownloadError: if a model cannot be fetched.
            ConfigError: if there is no such device, or a type or `base` is none.
        """
        reference = str(reference)
        if dtype != "auto":
            require_float(dtype)
        if base is not None and not isinstance(base, tuple | list):
            raise ConfigError(f"base is a loaded model and its tokenizer, a pair, got {base!r:.80}; see base_reference")
        fetch = hub.FetchOptions(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        place = hub.best_device(str(device))
        checkpoint = load_checkpoint(checkpoint_folder(reference, revision=revision, **fetch), device=place)
        if dtype != "auto":
            checkpoint.hypernet.to(dtype)
        config, base_model = checkpoint.config, base_reference or checkpoint.spec.base_model
        found = encoder_revision(config.encoder, base_model, **fetch)
        if found != config.encoder_revision:
            name = base_model if config.encoder.model == "base" else config.encoder.model
            raise CheckpointError(
                f"{reference} was trained with the encoder {name} at {config.encoder_revision}, "
                f"found is {found}. Point to that version"
            )
        encoder = load_encoder(config.encoder, base_model, base=base, device=place, **fetch)
        return cls(checkpoint, encoder, reference=reference)

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: torch.dtype = torch.float16, overwrite: bool = False
    ) -> Path:
        """Writes the checkpoint's folder, whole or not at all: safetensors weights, settings and card.

        Args:
            save_directory: Where to.
            dtype: Type of the saved weights.
            overwrite: Whether a checkpoint that is there is replaced; a folder with other files in it is not.

        Returns:
            The folder.

        Raises:
            OutputError: if the folder exists or cannot be written.
            CheckpointError: if a weight does not survive `dtype`.
        """
        folder = Path(save_directory)
        if overwrite:
            require_only(folder, *FILES)
        save_checkpoint(
            folder, self.hypernet, self.spec, self.config, card=self._card, dtype=dtype, overwrite=overwrite
        )
        return folder

    @property
    def device(self) -> torch.device:
        """Where the hypernetwork is."""
        return next(self.hypernet.parameters()).device

    @property
    def prompt(self) -> PromptConfig:
        """How prompts for this checkpoint's adapters are rendered, see `t2l.render_prompt`."""
        return self.config.prompt

    @torch.no_grad()
    def generate(
        self, descriptions: str | Sequence[str], *, strength: float = 1.0, batch_size: int = 64
    ) -> list[LoraAdapter]:
        """Writes one adapter per description, a batch of them in each forward pass.

        The adapters of a batch are views of one tensor for each target, so keeping one keeps its batch in memory;
        `LoraAdapter.copy` gives one with memory of its own.

        Args:
            descriptions: N task descriptions, or a single one.
            strength: How much of a description's change is added to the LoRA that all descriptions share. 1 is what was
                trained, 0 leaves the shared LoRA alone; anything but 1 is written into the adapters' cards.
            batch_size: How many are written at once.

        Returns:
            N adapters, in order.

        Raises:
            DescriptionError: if a description is blank, no text, or longer than the encoder's window; nothing is
                written then.
            ConfigError: if the strength is not between 0 and 2, or `batch_size` is below 1.
        """
        if not 0 <= strength <= 2:
            raise ConfigError(
                f"strength must be between 0, the shared LoRA alone, and 2, got {strength:g}; 1 is what was trained"
            )
        texts = [descriptions] if isinstance(descriptions, str) else list(descriptions)
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if not texts:
            raise DescriptionError("No description given")
        checked = [check_description(t, f" (description {n} of {len(texts)})") for n, t in enumerate(texts, start=1)]
        facts, adapters = self.provenance(strength), []
        for start in range(0, len(texts), batch_size):
            batch = checked[start : start + batch_size]
            lora = self.tensors(texts[start : start + batch_size], strength=strength)
            pairs = zip(lora.unbind(), batch, strict=True)
            adapters += [LoraAdapter(single, self.spec, text, facts) for single, text in pairs]
        return adapters

    @torch.no_grad()
    def tensors(self, descriptions: Sequence[str], *, strength: float = 1.0) -> LoraTensors:
        """Writes one batch of adapters, where the hypernetwork is and in its type.

        Args:
            descriptions: N task descriptions.
            strength: As in `generate`.

        Returns:
            A (N, L, R, I) and B (N, L, O, R) for each target.

        Raises:
            DescriptionError: if a description is blank, no text, or longer than the encoder's window.
        """
        parameter = next(self.hypernet.parameters())
        encoded = self.encoder.encode(list(descriptions))
        mask = None if encoded.mask is None else encoded.mask.to(parameter.device)
        scale = None if strength == 1 else parameter.new_full((len(descriptions),), strength)
        lora = self.hypernet(encoded.states.to(parameter.device, parameter.dtype), mask, scale)
        # What all adapters share is the hypernetwork's own memory; an adapter's must be its own.
        return lora.map(lambda x: x if x.stride(0) else x.contiguous())

    def provenance(self, strength: float = 1.0) -> dict[str, str]:
        """What adapters are written by, as their cards show it."""
        return provenance(self.reference, self.config, self._card, strength)


def provenance(reference: str, config: CheckpointConfig, card: str, strength: float = 1.0) -> dict[str, str]:
    """What a checkpoint's adapters are written by, as their cards show it."""
    return {
        "checkpoint": reference,
        "hypernetwork sha256": config.weights_sha256,
        "training seed": str(config.training.get("seed", "unknown")),
        **versions(),
        **({} if strength == 1 else {"strength": f"{strength:g}"}),
        **({} if (licence := card_license(card)) is None else {"license": licence}),
    }


def checkpoint_folder(reference: str | Path, **fetch: Any) -> Path:
    """The local folder of a checkpoint reference.

    Args:
        reference: A folder, a Hub id, or `t2l:NAME` for a checkpoint that ships with the package.
        fetch: See `hub.FetchOptions`.

    Raises:
        ModelNotFoundError: if it leads nowhere.
    """
    reference, shipped = str(reference), Path(str(resources.files("t2l"))) / "pretrained"
    known = sorted(path.name for path in shipped.iterdir()) if shipped.is_dir() else []
    if reference.startswith("t2l:"):
        name = reference.removeprefix("t2l:")
        if name not in known:
            names = ", ".join(f"t2l:{name}" for name in known) or "none"
            raise ModelNotFoundError(f"No checkpoint '{reference}' ships with this version; there is: {names}")
        return shipped / name
    if reference in known and not Path(reference).exists():
        raise ModelNotFoundError(f"There is no folder {reference}; the checkpoint that ships is t2l:{reference}")
    return hub.resolve_checkpoint(reference, **fetch)
