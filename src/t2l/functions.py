"""A description as a Python function.

    f = t2l.function("Which colour is named in the product title?")
    f("Ceramic teapot, green")
    f(["Ceramic teapot, green", "Office chair, black"])

The base model and the checkpoint are loaded once for all functions of a process that share them.
Knows generating, prompts and greedy decoding. Knows no tasks and no files.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import torch

from t2l import hub
from t2l.apply import largest_change
from t2l.checkpoint import read_config
from t2l.config import PromptConfig
from t2l.encoder import check_description
from t2l.errors import ConfigError, DataError
from t2l.eval import decode
from t2l.prompt import render, token_ids
from t2l.text_to_lora import DEFAULT, LoraAdapter, TextToLora, checkpoint_folder


@dataclass(frozen=True, eq=False)
class _Runtime:
    """What functions share: one base model, its tokenizer, and the generator of one checkpoint."""

    model: Any
    tokenizer: Any
    generator: TextToLora
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Adapters are put on the model itself, so only one function uses it at a time."""


@dataclass(frozen=True, eq=False)
class TextFunction:
    """A function from text to text: the base model under one generated adapter, decoded greedily."""

    adapter: LoraAdapter
    prompt: PromptConfig
    """How inputs become prompts."""
    max_new_tokens: int
    """Longest answer."""
    largest_logit_change: float
    """How much the adapter moves a logit of a prompt; it is never zero."""
    _runtime: _Runtime = field(repr=False)

    @property
    def description(self) -> str:
        """What the function does."""
        return self.adapter.description

    @overload
    def __call__(self, inputs: str) -> str: ...

    @overload
    def __call__(self, inputs: list[str] | tuple[str, ...]) -> list[str]: ...

    def __call__(self, inputs: str | list[str] | tuple[str, ...]) -> str | list[str]:
        """Answers one text, or several of them in batches.

        Args:
            inputs: A text, or a list of texts.

        Returns:
            The answer, or the answers in order, without white space around them.

        Raises:
            DataError: if an input is no text or list of texts, blank, or too long for the base model.
        """
        if not isinstance(inputs, Iterable):
            raise DataError(f"A function answers a text or a list of texts, got {type(inputs).__name__}")
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        for number, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"Input {number} is {text!r}; a function answers texts that are not blank")
        if not texts:
            return []
        model, tokenizer = self._runtime.model, self._runtime.tokenizer
        ids = token_ids(tokenizer, [render(tokenizer, self.description, text, self.prompt) for text in texts])
        lengths = [len(row) + self.max_new_tokens for row in ids]
        for number, length in enumerate(lengths):
            decode.require_room(model, length, f"Input {number}")
        answers = [""] * len(texts)
        max_tokens, max_sequences = decode.room(model, None)
        with self._runtime.lock:
            for batch in decode.batches(lengths, max_tokens=max_tokens, max_sequences=max_sequences):
                prompts = [ids[i] for i in batch]
                found = decode.greedy(model, tokenizer, prompts, [self.adapter], max_new_tokens=self.max_new_tokens)
                for i, answer in zip(batch, found, strict=True):
                    answers[i] = answer.strip()
        return answers[0] if isinstance(inputs, str) else answers


def function(
    description: str,
    *,
    checkpoint: str | Path = DEFAULT,
    max_new_tokens: int = 64,
    description_in_prompt: bool | None = None,
    device: str | None = None,
) -> TextFunction:
    """Makes a function of a description.

    Args:
        description: What the function does, in words.
        checkpoint: A checkpoint folder, a Hub id, or `t2l:NAME` for one that ships with the package.
        max_new_tokens: Longest answer, in tokens.
        description_in_prompt: Whether prompts show the description too; as the checkpoint says, if absent.
        device: Where the base model runs; the GPU, if there is one.

    Raises:
        DescriptionError: if the description is blank, no text, or longer than the checkpoint reads.
        AdapterNotAppliedError: if the adapter leaves the base model's logits as they are.
        ConfigError: if `max_new_tokens` is below 1, or torch finds no such device.
        T2LError: if the checkpoint or its base model cannot be loaded.
    """
    check_description(description)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    with _loading:
        runtime = _runtime(str(checkpoint), hub.best_device(device))
    prompt = runtime.generator.prompt.with_description(description_in_prompt)
    with runtime.lock:
        (adapter,) = runtime.generator.generate([description])
        change = _largest_change(runtime, adapter, prompt)
    return TextFunction(adapter, prompt, max_new_tokens, change, runtime)


_loading = threading.Lock()


@lru_cache(maxsize=4)
def _runtime(checkpoint: str, device: str) -> _Runtime:
    """The base model of a checkpoint, and the checkpoint; where it reads the base's own states, they share the base."""
    spec, _ = read_config(checkpoint_folder(checkpoint))
    model: Any = hub.load_causal_lm(spec.base_model, device=device)
    tokenizer: Any = hub.load_tokenizer(spec.base_model)
    return _Runtime(model, tokenizer, TextToLora.from_pretrained(checkpoint, base=(model, tokenizer), device=device))


def _largest_change(runtime: _Runtime, adapter: LoraAdapter, prompt: PromptConfig) -> float:
    """How much an adapter moves a logit after the prompt for its own description."""
    tokenizer, description = runtime.tokenizer, adapter.description
    (ids,) = token_ids(tokenizer, [render(tokenizer, description, description, prompt)])
    tokens = torch.tensor([ids], device=next(runtime.model.parameters()).device)
    return largest_change(runtime.model, adapter, {"input_ids": tokens})
