"""The conditions of an evaluation: whose adapter answers, and what its prompt shows.

A condition is an adapter and a form of the prompt. Conditions of one form see the very same prompt: where the
description stands in it, it is always the right one, and only the adapter's is swapped. Knows instances and prompts.
Knows no checkpoints, no files of answers and no statistics.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t2l.config import PromptConfig
from t2l.errors import ConfigError
from t2l.eval.suites import EvalInstance, EvalTask
from t2l.prompt import render

ADAPTERS = {
    "base": "base model",
    "average": "average of the task LoRAs",
    "multitask": "multi-task LoRA",
    "arrow": "Arrow routing over the task LoRAs",
    "nearest": "task LoRA of the nearest description",
    "hyperdecoders": "Hyperdecoders (reads the input)",
    "t2l": "T2L, the task's description",
    "t2l-wrong": "T2L, another task's description",
    "t2l-random": "T2L, random text",
    "task-lora": "the task's own LoRA",
}
"""Whose adapter a condition uses, in the order of tables."""
NEEDS = {
    "average": "--library",
    "multitask": "--multitask",
    "arrow": "--library",
    "nearest": "--library",
    "hyperdecoders": "--hyperdecoders",
    **{adapter: "--checkpoint" for adapter in ADAPTERS if adapter.startswith("t2l")},
    "task-lora": "--library",
}
"""The option that gives a condition's adapter."""
WITH_SHOTS = ("base", "multitask", "t2l", "t2l-wrong", "t2l-random")
"""Adapters that also have a condition whose prompt shows examples."""


def reasons(left_out: Mapping[str, str]) -> list[str]:
    """Conditions that are left out, by why: one text for each reason; with and without the description is one name."""
    adapters: dict[str, list[str]] = {}
    for name, why in left_out.items():
        adapters.setdefault(str(why), []).append(name.removesuffix("+description"))
    return [f"{', '.join(dict.fromkeys(names))} ({why})" for why, names in adapters.items()]


@dataclass(frozen=True)
class Condition:
    """One condition, which is one row of a table."""

    adapter: str
    """A key of `ADAPTERS`."""
    description: bool = False
    """Whether the description stands in the prompt."""
    shots: bool = False
    """Whether three examples stand in the prompt."""

    @property
    def name(self) -> str:
        """Such as `base+shots+description` or `t2l-wrong`."""
        return self.adapter + "+shots" * self.shots + "+description" * self.description

    @property
    def prompt(self) -> str:
        """Name of the prompt's form; conditions of one form see the same prompts."""
        return Condition("base", self.description, self.shots).name.removeprefix("base").strip("+") or "plain"


CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition(adapter, description, shots)
        for adapter in ADAPTERS
        for shots in ((False, True) if adapter in WITH_SHOTS else (False,))
        for description in (False, True)
    )
}
STANDARD = tuple(c for c in CONDITIONS.values() if c.adapter == "base" or not c.shots)
"""The conditions of a table; T2L reads one description and nothing else."""
MINIMUM = tuple(CONDITIONS[name] for name in ("base", "base+description")) + tuple(
    Condition(adapter, description)
    for adapter in ("multitask", "t2l", "t2l-wrong", "t2l-random")
    for description in (False, True)
)
"""What it takes to say whether an adapter helps, and whether it helps because of its description."""
GROUPS = {
    "all": tuple(CONDITIONS.values()),
    "standard": STANDARD,
    "minimum": MINIMUM,
    "extra": tuple(condition for condition in CONDITIONS.values() if condition not in STANDARD),
}
"""Names that stand for several conditions."""


def choose_conditions(names: str) -> list[Condition]:
    """Conditions from a list with commas; `standard`, `minimum`, `extra` (all but the standard) and `all` are several.

    Raises:
        ConfigError: naming the unknown condition and those there are.
    """
    chosen: dict[Condition, None] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name in GROUPS:
            chosen |= dict.fromkeys(GROUPS[name])
        elif name in CONDITIONS:
            chosen[CONDITIONS[name]] = None
        else:
            raise ConfigError(f"There is no condition '{name}'; there are: {', '.join([*GROUPS, *CONDITIONS])}")
    if not chosen:
        raise ConfigError("No condition is named; `standard` are those of a table, as far as their inputs are given")
    return [condition for condition in CONDITIONS.values() if condition in chosen]


def prompt_of(condition: Condition, instance: EvalInstance, tokenizer: Any) -> str:
    """The text the model continues, the start of its answer included."""
    config = PromptConfig(description_in_prompt=condition.description)
    examples = instance.shots if condition.shots else ()
    start = render(tokenizer, instance.description, instance.item.text, config, examples=examples)
    return start + instance.task.prefill


def can_show(condition: Condition, task: EvalTask) -> bool:
    """Whether a prompt can show what its condition says. Code is asked without examples, as in the paper."""
    return not condition.shots or len(task.shots) >= 3 or task.kind == "code"


def text_of(condition: Condition, instance: EvalInstance) -> str:
    """The text that a condition of T2L writes its adapter from."""
    if condition.adapter.endswith("-wrong"):
        return instance.wrong_description
    return instance.random_text if condition.adapter.endswith("-random") else instance.description


def short_hash(text: str) -> str:
    """Twelve hexadecimal digits that stand for a text in files of answers."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
