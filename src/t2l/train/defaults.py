"""Settings that are left open follow the base, the tasks and the number of steps.

Knows settings, a base's configuration and tokenizer, and tasks. Knows no weights.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from t2l import hub
from t2l.config import EncoderConfig
from t2l.prompt import render, token_ids
from t2l.train.config import SftConfig, TrainConfig
from t2l.train.dataset import load_tasks
from t2l.train.packing import answer_text

LONGEST_ROW = 384
"""Tokens; examples that need more are left out unless the settings say otherwise."""
EXAMPLES = 200
"""Of each task, evenly spaced, whose lengths are looked at."""
OFTEN = {"logging_steps": (20, 50), "eval_steps": (4, 1000), "save_steps": (4, 2000)}
"""How often in a run, and how many steps lie between two times at most."""


def follow(config: SftConfig, log: Callable[[str], None]) -> SftConfig:
    """Fills in what the settings leave open, so that the same settings give the same run.

    Args:
        config: `encoder.layers` may be empty, and some numbers of `train` 0; see their docstrings.
        log: Hears of everything that was filled in.

    Raises:
        DataError: if lengths follow the tasks and these cannot be read.
    """
    encoder, train = _encoder(config), _schedule(config.train)
    if not (train.max_seq_length and train.max_target_length):
        train = _lengths(replace(config, train=train))
    found = {f"train.{name}": value for name, value in vars(train).items() if value != getattr(config.train, name)}
    if encoder.layers != config.encoder.layers:
        found["encoder.layers"] = list(encoder.layers)
    if found:
        log("left open, so chosen here: " + ", ".join(f"{name} {value}" for name, value in found.items()))
    return replace(config, encoder=encoder, train=train)


def _encoder(config: SftConfig) -> EncoderConfig:
    """Reads states after a third, two thirds and all of the layers; before them the words, where pointers need them."""
    encoder = config.encoder
    if encoder.kind != "tokens" or encoder.layers:
        return encoder
    model = hub.load_config(config.base if encoder.model == "base" else encoder.model)
    depth = int(model.get_text_config().num_hidden_layers)
    layers = sorted({max(1, round(depth * part / 3)) for part in (1, 2, 3)})
    return replace(encoder, layers=(*([0] if config.hypernet.pointer else []), *layers))


def _schedule(train: TrainConfig) -> TrainConfig:
    """Logs, evaluates and saves so often that a short run is seen too."""
    found: dict[str, Any] = {
        name: max(1, min(most, train.max_steps // times))
        for name, (times, most) in OFTEN.items()
        if not getattr(train, name)
    }
    return replace(train, **found)


def _lengths(config: SftConfig) -> TrainConfig:
    """Rows that hold the longest example, within bounds, and a quarter of them for answers at least."""
    train, tokenizer = config.train, hub.load_tokenizer(config.base)
    prompt = config.prompt.with_description(train.description_in_prompt_prob > 0)
    longest = longest_answer = 1
    for task in load_tasks(config.data)[0]:
        description = max(task.descriptions, key=len)
        examples = task.examples["train"]
        some = examples[:: -(-len(examples) // EXAMPLES)]
        prompts = [render(tokenizer, description, example.input, prompt) for example in some]
        answers = [answer_text(max(e.outputs, key=len), tokenizer.eos_token or "", prompt) for e in some]
        ids, said = token_ids(tokenizer, prompts), token_ids(tokenizer, answers)
        longest_answer = max(longest_answer, *map(len, said))
        longest = max(longest, *(len(x) + len(y) - 1 for x, y in zip(ids, said, strict=True)))
    tokens = train.max_seq_length or min(LONGEST_ROW, _round(longest))
    answer = train.max_target_length or min(tokens, max(tokens // 4, _round(longest_answer)))
    return replace(train, max_seq_length=tokens, max_target_length=answer)


def _round(number: int) -> int:
    return -(-number // 8) * 8
