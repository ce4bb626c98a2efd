"""What tests of fine-tuning share: two tasks that only descriptions tell apart, looks into runs and batches."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from t2l.train.batches import Batch
from t2l.train.config import SftConfig
from t2l.train.packing import SHARED

VERBS = ("Say", "Answer", "Reply", "Write", "Always", "Just")


ANSWERS = {answer: tuple(f"{verb} {answer}." for verb in VERBS) for answer in ("yes", "no")}


def quiet(_: str) -> None:
    pass


def shorter(config: SftConfig, **changes: Any) -> SftConfig:
    return replace(config, train=replace(config.train, **changes))


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def lengths(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


class Interrupted(Exception):
    """Stands in for a crash."""


def interrupt_at(step: int) -> Callable[[str], None]:
    def log(line: str) -> None:
        if line.startswith(f"step {step} "):
            raise Interrupted

    return log


def within(batch: Batch, row: int, document: int) -> torch.Tensor:
    """Where a row holds a document, what it begins with in common with the others included."""
    return (batch.rows.documents[row] == document) | (batch.rows.documents[row] == SHARED)


def documents_of(batch: Batch, tokenizer: PreTrainedTokenizerBase, row: int) -> list[str]:
    return [
        tokenizer.decode(batch.rows.tokens[row][within(batch, row, n)])
        for n in range(int(batch.rows.documents[row].max()) + 1)
    ]
