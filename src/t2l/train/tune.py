"""Few-shot fine-tuning: a generated adapter goes on learning from a few examples, by plain PEFT training.

A part of the examples is held out. After every round over the others the loss on it is measured, before the first
round too, and the adapter with the lowest is what comes out: on these examples it is never worse than it started.

Knows adapters, PEFT and examples. Knows no tasks' files.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from t2l import peft_io
from t2l.config import Count, NotNegative, Positive, PromptConfig, Range, Seed, check_ranges
from t2l.errors import DataError, DescriptionError, TrainingError
from t2l.io import read_json_lines
from t2l.prompt import render, token_ids
from t2l.text_to_lora import LoraAdapter
from t2l.train.loop import StopRequest
from t2l.train.packing import answer_text, require_end_of_sequence

Pairs = Sequence[tuple[str, str]]
"""Inputs with their answers."""

SOLVED = 1e-3
"""Mean loss of a held-out token below which more rounds are not worth their time: training ends there."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How an adapter is tuned."""

    learning_rate: Positive = 2e-4
    batch_size: Count = 8
    max_epochs: Count = 30
    """Rounds over the examples that are trained on."""
    patience: Count = 4
    """Rounds without a lower loss on the held-out examples, after which training stops."""
    held_out: Annotated[float, Range(above=0, below=1)] = 0.25
    """Part of the examples that is held out; at least one is, and at least one is trained on."""
    warmup_ratio: Annotated[float, Range(at_least=0, below=1)] = 0.1
    """Part of all steps over which the learning rate rises; it then falls to zero on a straight line."""
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    max_seq_length: Count = 1024
    """Longest prompt with its answer, in tokens; a longer example is refused."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_ranges(self, "tune")


@dataclass(frozen=True)
class Tuned:
    """What came out of tuning."""

    adapter: LoraAdapter
    held_out_losses: tuple[float, ...]
    """Mean loss of a token of the held-out answers: before training, then after each round."""
    best_epoch: int
    """Rounds after which the loss was lowest; 0 where no round lowered it, and the adapter is as it was."""
    trained_on: int
    """Examples."""
    interrupted: bool = False
    """Whether Ctrl-C ended it early; the adapter is then the best of the rounds that were done."""


def tune(
    adapter: LoraAdapter,
    base: tuple[Any, Any],
    examples: Pairs,
    *,
    prompt: PromptConfig,
    config: TuneConfig | None = None,
    start: Literal["adapter", "scratch"] = "adapter",
    log: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Tunes an adapter on examples of one task.

    Args:
        adapter: What is tuned: a generated adapter, or any other for the same base.
        base: The base model and its tokenizer; both are as before afterwards.
        examples: Inputs with their answers, at least two of them.
        prompt: How inputs become prompts.
        config: How; the defaults if absent.
        start: `scratch` begins with a fresh LoRA of the adapter's shape, to tell what the adapter is worth.
        log: Gets a line after every round.

    Returns:
        The tuned adapter, and the losses on the way.

    Raises:
        DataError: if there are too few examples, one is no pair of texts, is blank, or one is longer than allowed.
        DescriptionError: if prompts show the description and the adapter has none.
        TrainingError: if a loss is not a finite number.
        SpecMismatchError: if the adapter is not for this base.
    """
    config = config or TuneConfig()
    model, tokenizer = base
    if prompt.description_in_prompt and not adapter.description:
        raise DescriptionError(
            "Prompts show the description of the task, and this adapter has none; tune it with prompts that do not "
            "(`prompt.with_description(False)`, or --no-description-in-prompt)"
        )
    rows = _encode(tokenizer, adapter.description, examples, prompt, config)
    draw = random.Random(config.seed)
    order = draw.sample(range(len(rows)), len(rows))
    kept_out = min(len(rows) - 1, max(1, round(config.held_out * len(rows))))
    held_out, trained = [rows[i] for i in order[:kept_out]], [rows[i] for i in order[kept_out:]]
    with _peft_model(model, adapter, start, config.seed) as peft_model, StopRequest() as stop:
        pad = tokenizer.pad_token_id or 0
        losses, best, state = _train(peft_model, trained, held_out, draw, config, pad, log, stop)
    lora = peft_io.from_state_dict(state, adapter.spec)
    facts = {
        **adapter.provenance,
        "tuned from": "this description's adapter" if start == "adapter" else "a fresh LoRA",
        "tuned on": f"{len(trained)} examples, {len(held_out)} held out, {best} rounds, seed {config.seed}",
    }
    return Tuned(replace(adapter, lora=lora, provenance=facts), tuple(losses), best, len(trained), stop.interrupted)


def _encode(
    tokenizer: Any, description: str, examples: Pairs, prompt: PromptConfig, config: TuneConfig
) -> list[tuple[list[int], list[int]]]:
    """Token ids of each example's prompt and answer."""
    if len(examples) < 2:
        raise DataError(f"Tuning needs at least two examples, one of them to hold out; got {len(examples)}")
    require_end_of_sequence(tokenizer)
    for number, pair in enumerate(examples):  # of an object with the two as keys these would be the example
        if not isinstance(pair, tuple | list) or [type(part) for part in pair] != [str, str]:
            raise DataError(f"Example {number} is {pair!r:.100}; examples are pairs of texts, input and answer")
        text, answer = pair
        if not text.strip() or not answer.strip():
            raise DataError(f"Example {number} has a blank {'input' if not text.strip() else 'answer'}")
    prompts = token_ids(tokenizer, [render(tokenizer, description, text, prompt) for text, _ in examples])
    answers = token_ids(tokenizer, [answer_text(answer, tokenizer.eos_token, prompt) for _, answer in examples])
    for number, (asked, said) in enumerate(zip(prompts, answers, strict=True)):
        if len(asked) + len(said) > config.max_seq_length:
            raise DataError(
                f"Example {number} takes {len(asked) + len(said)} tokens, answer included; at most "
                f"{config.max_seq_length} are read (max_seq_length). Leave it out"
            )
    return list(zip(prompts, answers, strict=True))


class _peft_model:
    """The base with the adapter as PEFT trains it, for the length of a `with` block; the base is left as it was."""

    def __init__(self, model: Any, adapter: LoraAdapter, start: str, seed: int) -> None:
        self.model, self.adapter, self.start, self.seed = model, adapter, start, seed

    def __enter__(self) -> Any:
        import peft

        settings = peft_io.adapter_config(self.adapter.spec) | {"inference_mode": False}
        # PEFT takes the base's name from the model in memory, and warns where a given one differs.
        left_out = ("peft_type", "base_model_name_or_path")
        config = peft.LoraConfig(**{key: value for key, value in settings.items() if key not in left_out})
        self.trainable = [p.requires_grad for p in self.model.parameters()]
        with torch.random.fork_rng(), peft_io.without_old_names():
            torch.manual_seed(self.seed)
            self.peft_model = peft.get_peft_model(self.model, config, autocast_adapter_dtype=True)
        if self.start == "adapter":
            state = peft_io.to_state_dict(self.adapter.lora, self.adapter.spec)
            result = peft.set_peft_model_state_dict(self.peft_model, dict(state))
            missing = [name for name in result.missing_keys if "lora_" in name]
            if result.unexpected_keys or missing:
                raise TrainingError(f"PEFT does not take the adapter: {[*result.unexpected_keys, *missing][:3]}")
        return self.peft_model

    def __exit__(self, *_: Any) -> None:
        self.peft_model.unload()
        for parameter, trainable in zip(self.model.parameters(), self.trainable, strict=True):
            parameter.requires_grad_(trainable)


def _train(
    model: Any,
    trained: list[tuple[list[int], list[int]]],
    held_out: list[tuple[list[int], list[int]]],
    draw: random.Random,
    config: TuneConfig,
    pad: int,
    log: Callable[[str], None],
    stop: StopRequest,
) -> tuple[list[float], int, dict[str, Tensor]]:
    """Held-out losses, the best round, and PEFT's tensors after it; stops between two steps where asked to."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    steps = config.max_epochs * math.ceil(len(trained) / config.batch_size)
    warmup = max(1, round(config.warmup_ratio * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup + 1))
    )
    losses = [_held_out_loss(model, held_out, config, pad)]
    best, state = 0, _state(model)
    for epoch in range(1, config.max_epochs + 1):
        order = draw.sample(trained, len(trained))
        for start in range(0, len(order), config.batch_size):
            if stop:
                return losses, best, state
            total, tokens = _loss(model, order[start : start + config.batch_size], pad)
            (total / tokens).backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(_held_out_loss(model, held_out, config, pad))
        log(f"round {epoch}: loss on held-out examples {losses[-1]:.4f} (lowest {min(losses):.4f})")
        if losses[-1] < losses[best]:
            best, state = epoch, _state(model)
        if epoch - best >= config.patience or losses[best] < SOLVED:
            break
    return losses, best, state


def _state(model: Any) -> dict[str, Tensor]:
    """PEFT's tensors as they are now, under the names of an adapter's file."""
    from peft import get_peft_model_state_dict

    # By default PEFT asks the Hub whether the base's vocabulary has grown.
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach().float().cpu().clone() for name, value in found.items()}


@torch.no_grad()
def _held_out_loss(model: Any, rows: list[tuple[list[int], list[int]]], config: TuneConfig, pad: int) -> float:
    """Mean loss of a token of the answers."""
    parts = [_loss(model, rows[i : i + config.batch_size], pad) for i in range(0, len(rows), config.batch_size)]
    loss = float(sum(total for total, _ in parts)) / sum(tokens for _, tokens in parts)
    if not math.isfinite(loss):
        raise TrainingError(f"The loss on held-out examples is {loss}; lower learning_rate")
    return loss


def _loss(model: Any, rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, int]:
    """Summed loss of the answers' tokens, and their number."""
    device = next(model.parameters()).device
    length = max(len(asked) + len(said) for asked, said in rows)
    tokens_BT = torch.full((len(rows), length), pad)
    targets_BT = torch.full((len(rows), length), -100)
    mask_BT = torch.zeros(len(rows), length, dtype=torch.long)
    for n, (asked, said) in enumerate(rows):
        end = len(asked) + len(said)
        tokens_BT[n, :end] = torch.tensor([*asked, *said])
        targets_BT[n, len(asked) : end] = torch.tensor(said)
        mask_BT[n, :end] = 1
    logits = model(input_ids=tokens_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False).logits
    flat = logits[:, :-1].float().flatten(0, 1), targets_BT[:, 1:].flatten().to(device)
    total = torch.nn.functional.cross_entropy(*flat, ignore_index=-100, reduction="sum")
    return total, int((targets_BT != -100).sum())


def read_examples(path: str | Path) -> list[tuple[str, str]]:
    """Reads examples, one JSON object a line with `input` and `output`; other keys are passed over.

    Raises:
        DataError: naming file and line.
    """
    pairs: list[tuple[str, str]] = []
    for where, _, row in read_json_lines(Path(path)):
        text, answer = (row.get("input"), row.get("output")) if isinstance(row, dict) else (None, None)
        if not (isinstance(text, str) and isinstance(answer, str) and text.strip() and answer.strip()):
            keys = f"; it has {', '.join(map(str, row))[:100] or 'nothing'}" if isinstance(row, dict) else ""
            raise DataError(f"{where} must be an object whose input and output are texts that are not blank{keys}")
        pairs.append((text, answer))
    return pairs
