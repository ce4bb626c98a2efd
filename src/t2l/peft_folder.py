"""Any PEFT LoRA folder as an adapter of this library: its shape is read from the folder and the base's config.

`peft_io.load_adapter` reads a folder whose shape is known beforehand; this module finds the shape out.
Knows folders, specs and configs. Knows no hypernetwork and reads no weights of a base.
"""

from collections.abc import Mapping
from pathlib import Path

from t2l import hub, peft_io
from t2l.config import LoraConfig
from t2l.errors import SpecMismatchError
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec, linear_modules


def open_adapter(folder: Path, base_model: str | None = None) -> tuple[LoraTensors, AdapterSpec]:
    """Reads a PEFT LoRA folder, whoever wrote it.

    Args:
        folder: The folder; it must adapt the same modules in each adapted layer, with one rank.
        base_model: Reference of the base model, where it is not to be had by the name that the folder gives.

    Returns:
        A single adapter in float32, and where it belongs.

    Raises:
        CheckpointError: if files are missing, damaged or pickled, or the folder is not a plain LoRA.
        SpecMismatchError: if the folder adapts what the base does not have, or is no full grid of modules and layers.
        ModelNotFoundError, DownloadError: if the base's config cannot be had.
    """
    facts = peft_io.read_facts(folder)
    base = base_model or facts.base_model
    config = hub.load_config(base)
    lora = shape_of(facts, linear_modules(config), base, where=folder)
    spec = AdapterSpec.from_config(config, base, lora)
    return peft_io.load_adapter(folder, spec), spec


def shape_of(
    facts: peft_io.PeftFacts, modules: Mapping[str, tuple[str, int]], base_model: str, *, where: object
) -> LoraConfig:
    """The settings that give a spec of a folder's adapter.

    Args:
        facts: What the folder says of itself.
        modules: The base's, see `linear_modules`.
        base_model: What the base is called in messages.
        where: What the folder is called in messages.

    Raises:
        SpecMismatchError: if the folder adapts what the base does not have, or is no full grid of modules and layers.
    """
    strange = sorted(facts.modules.keys() - modules.keys())
    if strange:
        raise SpecMismatchError(
            f"{where} adapts {strange[0]}, which is no linear module in a layer of {base_model}; give the base "
            "model that the adapter was made for"
        )
    found = {modules[path] for path in facts.modules}
    layers = tuple(sorted({layer for _, layer in found}))
    targets = tuple(sorted({name for name, _ in found}))
    missing = [(name, layer) for layer in layers for name in targets if (name, layer) not in found]
    if missing:
        raise SpecMismatchError(
            f"{where} adapts {', '.join(targets)} in layers {layers[0]} to {layers[-1]}, but not {missing[0][0]} of "
            f"layer {missing[0][1]} ({len(missing)} of {len(targets) * len(layers)} are missing); only adapters that "
            "change the same modules in each of their layers are read"
        )
    return LoraConfig(
        target_modules=targets,
        layers_to_transform=layers,
        r=facts.rank,
        lora_alpha=facts.alpha,
        use_rslora=facts.use_rslora,
    )
