"""A base model with an adapter added into its weights, as a model folder of its own.

Knows adapters, models and folders. Knows no hypernetwork.
"""

import shutil
from pathlib import Path

import torch

from t2l import hub
from t2l.adapter import LoraAdapter
from t2l.io import new_folder, require_only


def merge_into_folder(
    adapter: LoraAdapter,
    folder: str | Path,
    *,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    card: str = "",
    overwrite: bool = False,
) -> int:
    """Writes a whole model: the adapter's base with ΔW added to the weights it adapts.

    Sums are computed in float32 and rounded once, to the type that is written. The tokenizer and the generation
    settings are the base's. In the base's own type, weights that the adapter does not change keep their bytes;
    embeddings tied to the head stay tied.

    Args:
        adapter: A single adapter.
        folder: Where to.
        base_model: Reference of the base, where it is not to be had by the name in the adapter's spec.
        dtype: Type of the weights that are written; None means the base's own. The base is read in it, so a narrower
            one rounds the base first. A small change is lost in bfloat16, which keeps three digits; float32 keeps it.
        card: Text of the model card.
        overwrite: Whether an existing folder is replaced.

    Returns:
        How many weight matrices were changed.

    Raises:
        SpecMismatchError: if the base lacks a module that the adapter changes, or has another size of it.
        AdapterNotAppliedError: if the merged weights are the base's own, bit for bit, or not finite.
        OutputError: if the folder exists or cannot be written.
        T2LError: if the base cannot be loaded, as in `hub.load_causal_lm`.
    """
    folder, reference = Path(folder), base_model or adapter.spec.base_model
    config = hub.load_config(reference)
    dtype = dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    model = hub.load_causal_lm(reference, dtype=dtype)
    tokenizer = hub.load_tokenizer(reference)
    changed = adapter.merge_into(model)
    if overwrite:
        require_only(folder, "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md")
    with new_folder(folder, overwrite=overwrite) as temporary, hub.quiet_transformers():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        generation = hub.resolve(reference) / "generation_config.json"
        if generation.is_file():  # as it is; what a model object makes of it depends on the version of Transformers
            shutil.copyfile(generation, temporary / generation.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return changed
