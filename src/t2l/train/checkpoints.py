"""Checkpoints that a training starts from, and what it says of the one that it leaves. Knows folders and settings."""

from pathlib import Path
from typing import Any

from t2l.cards import EXAMPLE, card_header, hub_datasets
from t2l.checkpoint import CheckpointConfig, load_checkpoint, read_config
from t2l.config import to_plain
from t2l.encoder import encoder_revision
from t2l.errors import ConfigError
from t2l.hypernet import Hypernet
from t2l.spec import AdapterSpec
from t2l.train.config import SftConfig
from t2l.train.resume import differences


def require_origin(config: SftConfig, spec: AdapterSpec) -> None:
    """Checks that the checkpoint of `train.init_from` fits a run, from its settings alone.

    Raises:
        ConfigError: if it is not there, or its weights would mean something else in this run, naming every difference.
    """
    folder = Path(config.train.init_from or "")
    if not folder.is_dir():
        raise ConfigError(
            f"train.init_from: there is no checkpoint {folder}; this run starts from it, so train it first"
        )
    their_spec, loaded = read_config(folder)
    before, now = _shape(their_spec), _shape(spec)
    if loaded.hypernet.variant != "none":
        ours, theirs = encoder_revision(config.encoder, config.base), loaded.encoder_revision
        before |= _network(loaded, their_spec.base_model, theirs if theirs != ours else "")
        now |= _network(config, spec.base_model, ours if theirs != ours else "")
    found = differences(before, now, words=("is", "here"))
    if found:
        raise ConfigError(f"train.init_from: {folder} does not fit this run: {'; '.join(found)}. Use its settings")


def initialize(hypernet: Hypernet, folder: Path) -> dict[str, str]:
    """Copies a checkpoint's weights: of a multi-task LoRA the shared LoRA, of a hypernetwork everything.

    Returns:
        Which checkpoint it was, without its place on this machine.

    Raises:
        ConfigError: if the hypernetworks have other shapes.
    """
    loaded = load_checkpoint(folder)
    if loaded.hypernet.head is None:
        hypernet.load_shared_lora(loaded.hypernet.shared_adapter())
    else:
        try:
            hypernet.load_state_dict(loaded.hypernet.state_dict(), strict=True)
        except RuntimeError as error:  # one-hot: other tasks
            raise ConfigError(f"train.init_from: {folder} is a hypernetwork of another shape. {error}") from error
    return {"name": folder.resolve().name, "weights_sha256": loaded.config.weights_sha256}


def _shape(spec: AdapterSpec) -> dict[str, Any]:
    """What two adapters must have in common for their tensors to mean the same."""
    return {
        "spec": {
            "num_layers": spec.num_layers,
            "layers": list(spec.layers),
            "targets": [f"{t.name} {t.in_features} x {t.out_features}" for t in spec.targets],
            "rank": spec.rank,
            "scaling": spec.scaling,
        }
    }


def _network(config: SftConfig | CheckpointConfig, base: str, revision: str) -> dict[str, Any]:
    """What two hypernetworks must have in common for their weights to mean the same."""
    model = base if config.encoder.model == "base" else config.encoder.model
    sizes = ("width", "head_size", "token_blocks", "attention_heads")
    return {
        "conditioning": config.conditioning,
        "encoder": {
            "kind": config.encoder.kind,
            "layers": list(config.encoder.layers),
            "revision": revision and f"{revision} ({model})",
        },
        "hypernet": {
            n: getattr(config.hypernet, n) for n in ("variant", "pointer", "pointer_gate", "normalize_inputs", *sizes)
        },
    }


def portable(config: SftConfig, origin: dict[str, str] | None) -> dict[str, Any]:
    """The settings as they are published: without paths of this machine."""
    plain = to_plain(config)
    plain["train"]["init_from"] = origin
    for key in ("tasks", "descriptions"):
        if not plain["data"][key].startswith("hf:"):
            plain["data"][key] = Path(plain["data"][key]).name
    extra = plain["data"]["extra_tasks"]
    plain["data"]["extra_tasks"] = [source if source.startswith("hf:") else Path(source).name for source in extra]
    return plain


def card(spec: AdapterSpec, provenance: dict[str, Any]) -> str:
    """The model card of a trained checkpoint."""
    data = provenance["settings"]["data"]
    header = card_header(
        spec.base_model,
        "lora",
        "text-to-lora",
        library="text-to-lora",
        datasets=hub_datasets((data["tasks"], *data["extra_tasks"])),
        example=EXAMPLE,
    )
    targets = ", ".join(t.name for t in spec.targets)
    plain = provenance["settings"]
    reads = {"description": "a task description", "input": "an input", "task": "the name of a trained task"}
    does = f"Reads {reads[plain['conditioning']]} and writes a LoRA adapter"
    if plain["hypernet"]["variant"] == "none":
        does = "One LoRA adapter, the same whatever the description"
    return (
        f"{header}# Text-to-LoRA hypernetwork for {spec.base_model}\n\n"
        f"{does}: rank {spec.rank}, alpha {spec.alpha:g}, targets {targets}.\n\n"
        f"Trained for {provenance['steps']} of {provenance['planned_steps']} steps on "
        f"{provenance['data']['tasks']} tasks, seed {provenance['seed']}. All settings stand in `config.json`.\n"
    )
