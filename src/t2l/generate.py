"""From text to adapter: the library's main line.

    t2l = TextToLora.from_pretrained()
    (adapter,) = t2l.generate(["Decide whether a film review is positive or negative."])
    adapter.save("sentiment")

Knows encoders, the hypernetwork and checkpoints. Knows no training and no evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch

from t2l import __version__, models, peft_io
from t2l.checkpoint import Checkpoint, load_checkpoint
from t2l.config import PromptConfig
from t2l.encoder import Encoder, check_description, encoder_revision, load_encoder
from t2l.errors import CheckpointError, ConfigError, ModelNotFoundError
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec

DEFAULT = "t2l:smollm2-135m"
"""The checkpoint that ships with the package."""


@dataclass(frozen=True)
class Adapter:
    """A generated adapter, and what it was generated from."""

    lora: LoraTensors
    """A single adapter: A (L, R, I) and B (L, O, R) for each target."""
    spec: AdapterSpec
    description: str
    provenance: dict[str, str]
    """Checkpoint, hash of the hypernetwork, training seed and versions; written into the card."""

    def save(self, folder: str | Path, *, dtype: torch.dtype = torch.float32, overwrite: bool = False) -> Path:
        """Writes a PEFT folder that `PeftModel.from_pretrained`, vLLM and llama.cpp's converter read.

        Args:
            folder: Where to.
            dtype: Type of the saved tensors.
            overwrite: Whether an existing folder is replaced.

        Returns:
            The folder.

        Raises:
            OutputError: if the folder exists or cannot be written; nothing is left behind then.
        """
        folder = Path(folder)
        peft_io.save_adapter(folder, self.lora, self.spec, card=self.card(), dtype=dtype, overwrite=overwrite)
        return folder

    def card(self) -> str:
        """The adapter's model card."""
        quoted = "\n".join(f"> {line}" for line in self.description.splitlines())
        facts = "\n".join(f"| {key} | {value} |" for key, value in self.provenance.items())
        targets = ", ".join(t.name for t in self.spec.targets)
        return (
            f"---\nbase_model: {self.spec.base_model}\nlibrary_name: peft\ntags:\n- lora\n- text-to-lora\n---\n\n"
            f"# LoRA adapter written from a description\n\n{quoted}\n\n"
            f"For {self.spec.base_model}: rank {self.spec.rank}, alpha {self.spec.alpha:g}, targets {targets}, "
            f"{self.spec.num_parameters:,} parameters. Written without seeing an example of the task; judge it before "
            f"relying on it.\n\n"
            f"| | |\n| --- | --- |\n{facts}\n"
        )


class TextToLora:
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
        self.encoder, self.reference = encoder, reference

    @classmethod
    def from_pretrained(
        cls, reference: str = DEFAULT, *, base: tuple[Any, Any] | None = None, device: str = "cpu"
    ) -> "TextToLora":
        """Loads a checkpoint and its encoder.

        Args:
            reference: A checkpoint folder, a Hub id, or `t2l:NAME` for one that ships with the package.
            base: The base model and its tokenizer, if they are in memory already; only a checkpoint that reads
                the base's own states uses them.
            device: Where the hypernetwork and a newly loaded encoder run.

        Raises:
            CheckpointError: if the checkpoint is damaged, or its encoder is not the one it was trained with.
            ModelNotFoundError: if a reference leads nowhere.
            DownloadError: if a model cannot be fetched.
        """
        checkpoint = load_checkpoint(checkpoint_folder(reference), device=device)
        config = checkpoint.config
        if config.encoder.model != "base" or base is None:
            found = encoder_revision(config.encoder, checkpoint.spec.base_model)
            if found != config.encoder_revision:
                name = checkpoint.spec.base_model if config.encoder.model == "base" else config.encoder.model
                raise CheckpointError(
                    f"{reference} was trained with the encoder {name} at {config.encoder_revision}, "
                    f"found is {found}. Point to that version"
                )
        encoder = load_encoder(config.encoder, checkpoint.spec.base_model, base=base, device=device)
        return cls(checkpoint, encoder, reference=reference)

    @property
    def prompt(self) -> PromptConfig:
        """How prompts for this checkpoint's adapters are rendered, see `t2l.prompt.render`."""
        return self.config.prompt

    @property
    def prompt_aware(self) -> bool:
        """Whether adapters for prompts that show the description differ from those for prompts that do not."""
        return self.config.hypernet.prompt_aware

    @torch.no_grad()
    def generate(
        self, descriptions: Sequence[str], *, strength: float = 1.0, prompt: PromptConfig | None = None
    ) -> list[Adapter]:
        """Writes one adapter per description, all in one forward pass.

        Args:
            descriptions: N task descriptions.
            strength: How much of the description's change is added to the LoRA that all descriptions share: 1 is what
                was trained, 0 leaves the shared LoRA alone. It is written into the adapter's card.
            prompt: How the prompts that they are for are rendered; the checkpoint's own setting if absent. It makes a
                difference to checkpoints with `hypernet.prompt_aware`.

        Returns:
            N adapters, in order.

        Raises:
            DescriptionError: if a description is blank, no text, or longer than the encoder's window.
            ConfigError: if the strength is not between 0 and 2.
        """
        if not 0 <= strength <= 2:
            raise ConfigError(f"strength must be between 0 (the shared LoRA alone) and 2, got {strength:g}")
        if isinstance(descriptions, str):
            descriptions = [descriptions]
        encoded = self.encoder.encode(descriptions)
        parameter = next(self.hypernet.parameters())
        mask = None if encoded.mask is None else encoded.mask.to(parameter.device)
        prompt, facts = prompt or self.prompt, self._provenance()
        in_prompt = None
        if self.prompt_aware:
            in_prompt = torch.full((len(descriptions),), prompt.description_in_prompt, device=parameter.device)
            facts["for prompts"] = "with the description" if prompt.description_in_prompt else "without the description"
        scale = None
        if strength != 1:
            scale = torch.full((len(descriptions),), strength, device=parameter.device)
            facts["strength"] = f"{strength:g}"
        lora = self.hypernet(encoded.states.to(parameter.device, parameter.dtype), mask, scale, in_prompt)
        return [
            Adapter(single.map(torch.clone), self.spec, check_description(text), facts)
            for text, single in zip(descriptions, lora.unbind(), strict=True)
        ]

    def _provenance(self) -> dict[str, str]:
        return {
            "checkpoint": self.reference,
            "hypernetwork sha256": self.config.weights_sha256,
            "training seed": str(self.config.training.get("seed", "unknown")),
            **self.versions(),
        }

    @staticmethod
    def versions() -> dict[str, str]:
        """Versions that can change a result."""
        return {"t2l": __version__, "torch": torch.__version__, "transformers": metadata.version("transformers")}


def checkpoint_folder(reference: str) -> Path:
    """The local folder of a checkpoint reference.

    Raises:
        ModelNotFoundError: if it leads nowhere.
    """
    if reference.startswith("t2l:"):
        shipped = Path(str(resources.files("t2l"))) / "pretrained"
        folder = shipped / reference.removeprefix("t2l:")
        known = sorted(path.name for path in shipped.iterdir()) if shipped.is_dir() else []
        if folder.name not in known or folder.parent != shipped:
            names = ", ".join(f"t2l:{name}" for name in known) or "none"
            raise ModelNotFoundError(f"No checkpoint '{reference}' ships with this version; there is: {names}")
        return folder
    return models.resolve_checkpoint(reference)
