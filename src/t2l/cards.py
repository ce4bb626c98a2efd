"""The metadata that opens a model card, as the Hugging Face Hub reads it.

The Hub refuses a card whose base is no id of its own, so a base in a local folder is named in the text alone.
"""

from collections.abc import Mapping, Sequence

import yaml

from t2l import hub
from t2l.config import parse_yaml
from t2l.errors import ConfigError
from t2l.pypi import public_name
from t2l.spec import AdapterSpec

EXAMPLE = "Say whether the review is positive or negative."
"""A description for the Hub's page of a checkpoint to begin with."""

DATASETS = {
    "sni": "Muennighoff/natural-instructions",
    "sni-paper": "Muennighoff/natural-instructions",
    "t0": "bigscience/P3",
}
"""Where the Hub has the tasks of `T2L_DATA`."""


def hub_datasets(sources: Sequence[str]) -> list[str]:
    """Ids that the Hub has for sources of tasks, each once; own files have none."""
    named = (DATASETS.get(name, name.removeprefix("hf:") if name.startswith("hf:") else "") for name in sources)
    return list(dict.fromkeys(filter(None, named)))


def library_card(
    spec: AdapterSpec,
    number: int | None,
    *,
    license: str | None = None,
    sources: Sequence[str] = (),
    example: str | None = None,
    facts: Mapping[str, object],
) -> str:
    """The card of a folder with many adapters.

    Args:
        spec: What they all fit.
        number: How many there are; None where more may come.
        license: As for `card_header`.
        sources: Where their tasks come from, as settings name them.
        example: What one of them was made for.
        facts: Rows of a table below.
    """
    base = public_name(spec.base_model)
    header = card_header(
        base,
        "lora",
        "text-to-lora",
        library="text-to-lora",
        license=license,
        datasets=hub_datasets(sources),
        example=example,
    )
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    return (
        f"{header}# LoRA adapters for {base}\n\n"
        f"{'Adapters' if number is None else f'{number:,} adapters'} of one shape: rank {spec.rank}, alpha "
        f"{spec.alpha:g}, targets {', '.join(t.name for t in spec.targets)}. `t2l library export` writes any of them "
        f"as a PEFT folder.\n\n| | |\n| --- | --- |\n{rows}"
    )


def card_header(
    base_model: str,
    *tags: str,
    library: str = "peft",
    license: str | None = None,
    datasets: Sequence[str] = (),
    example: str | None = None,
) -> str:
    """The metadata of a card, between its two rules.

    Args:
        base_model: Reference of the base model.
        tags: What it is found by.
        library: What reads the repository: `peft`, `transformers`, or `text-to-lora` for what only this library reads.
        license: The Hub's name of a licence, if one is known.
        datasets: Ids of data sets of the Hub.
        example: A text that the repository's page shows as an input.
    """
    named = public_name(base_model)
    facts = {
        "base_model": named if hub.is_hub_id(named) else None,
        "base_model_relation": "adapter" if library == "peft" and hub.is_hub_id(named) else None,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": license,
        "datasets": list(datasets),
        "tags": list(tags),
        "widget": [{"text": example}] if example else None,
    }
    known = {key: value for key, value in facts.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---\n\n"


def card_license(card: str) -> str | None:
    """The licence that a card's metadata names; None where it has none that can be read."""
    if not card.startswith("---\n"):
        return None
    try:
        facts = parse_yaml(card.split("---\n", 2)[1], "The card")
    except ConfigError:
        return None
    found = facts.get("license") if isinstance(facts, dict) else None
    return found if isinstance(found, str) else None
