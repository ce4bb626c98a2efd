"""What of the tasks fits into the encoder's window and into rows. Knows tasks and tokenizers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from t2l.errors import DataError
from t2l.prompt import render, token_ids
from t2l.tasks import Task
from t2l.train.config import SftConfig
from t2l.train.packing import answer_text

CountTokens = Callable[[list[str]], list[int]]
"""Counts the tokens of texts as the encoder does."""


@dataclass
class Fitting:
    """Tasks as far as encoder and rows can hold them, and what was left out."""

    train: list[Task]
    held_out: list[Task]
    descriptions_over_window: int = 0
    without_description: list[str] = field(default_factory=list)
    inputs_over_window: int = 0
    too_long: list[str] = field(default_factory=list)


def filter_tasks(
    train: list[Task], held_out: list[Task], config: SftConfig, tokenizer: Any, count_tokens: CountTokens
) -> Fitting:
    """Leaves out descriptions and inputs that exceed the encoder's window, and tasks whose examples fit into no row.

    Raises:
        DataError: if no task is left, with the numbers on both sides.
    """
    window = config.encoder.max_tokens
    if config.data.descriptions in ("definitions", "paraphrases"):  # both kinds train on the same tasks
        train, held_out = (_with_readable_definition(tasks, count_tokens, window) for tasks in (train, held_out))
    texts = sorted({text for task in (*train, *held_out) for text in task.descriptions})
    lengths = dict(zip(texts, count_tokens(texts), strict=True))
    train, lost, dropped = without_long(train, lengths, window)
    held_out, _, _ = without_long(held_out, lengths, window)
    if not train:
        raise DataError(f"No task has a description within encoder.max_tokens ({window}); raise it")
    fitting = Fitting(train, held_out, dropped, lost)
    if config.conditioning == "input":
        fitting.train, fitting.inputs_over_window = _with_readable_inputs(train, count_tokens, window)
        fitting.held_out, _ = _with_readable_inputs(held_out, count_tokens, window)
        if not fitting.train:
            raise DataError(f"No training input is within encoder.max_tokens ({window}); raise it")
    too_long = _too_long(fitting.train, config, tokenizer)
    fitting.train = [task for task in fitting.train if task.name not in too_long]
    fitting.too_long = sorted(too_long)
    if not fitting.train:
        raise DataError(
            f"No task has an example within train.max_seq_length ({config.train.max_seq_length}) and "
            f"train.max_target_length ({config.train.max_target_length}): "
            f"{'; '.join(list(too_long.values())[:3])}. Raise them"
        )
    return fitting


def without_long(tasks: Sequence[Task], lengths: dict[str, int], max_tokens: int) -> tuple[list[Task], list[str], int]:
    """Leaves out the descriptions that exceed the encoder's window, and the tasks that then have none.

    Returns:
        The tasks kept, the names of those left out, and how many descriptions were left out.
    """
    kept, lost, dropped = [], [], 0
    for task in tasks:
        fitting = tuple(text for text in task.descriptions if lengths[text] <= max_tokens)
        dropped += len(task.descriptions) - len(fitting)
        if fitting:
            kept.append(replace(task, descriptions=fitting))
        else:
            lost.append(task.name)
    return kept, lost, dropped


def _with_readable_definition(tasks: list[Task], count_tokens: CountTokens, window: int) -> list[Task]:
    definitions = [task.definition for task in tasks if task.definition]
    counts = dict(zip(definitions, count_tokens(definitions), strict=True)) if definitions else {}
    return [task for task in tasks if counts.get(task.definition or "", 0) <= window]


def _with_readable_inputs(tasks: list[Task], count_tokens: CountTokens, window: int) -> tuple[list[Task], int]:
    """The tasks with the examples whose input the encoder can read, and how many it cannot."""
    kept, dropped = [], 0
    for task in tasks:
        examples = {}
        for split, some in task.examples.items():
            filled = [e for e in some if e.input.strip()]
            counts = count_tokens([e.input for e in filled]) if filled else []
            examples[split] = tuple(e for e, count in zip(filled, counts, strict=True) if count <= window)
            dropped += len(some) - len(examples[split])
        if examples.get("train") or examples.get("val"):
            kept.append(replace(task, examples=examples))
    return kept, dropped


def _too_long(tasks: list[Task], config: SftConfig, tokenizer: Any) -> dict[str, str]:
    """Tasks none of whose training examples fits into a row, with the reason."""
    train, found = config.train, {}
    prompt = config.prompt.with_description(train.description_in_prompt_prob == 1)
    for task in tasks:
        description = min(task.descriptions, key=len)
        shortest: tuple[int, int] | None = None
        examples = task.examples["train"]
        # Nearly always one of the first few fits.
        for start in range(0, len(examples), 16):
            some = examples[start : start + 16]
            prompts = token_ids(tokenizer, [render(tokenizer, description, e.input, prompt) for e in some])
            answers = token_ids(tokenizer, [answer_text(e.outputs[0], tokenizer.eos_token or "", prompt) for e in some])
            sizes = [(len(p) + len(a) - 1, len(a)) for p, a in zip(prompts, answers, strict=True)]
            if any(row <= train.max_seq_length and answer <= train.max_target_length for row, answer in sizes):
                break
            shortest = min([*sizes, shortest] if shortest else sizes)
        else:
            if shortest is None:
                found[task.name] = f"{task.name} has no examples"
            else:
                found[task.name] = f"{task.name} needs at least {shortest[0]} tokens, {shortest[1]} of them its answer"
    return found
