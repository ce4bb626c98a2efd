"""Batches of packed sequences: step s of a run is a pure function of (seed, s), so resuming needs no sampler state.

Each row of a batch is one task with one description; several of the task's examples stand in it one after
another, kept apart by document numbers, until the row's tokens or its answer tokens are used up. All shapes are
static, so a compiled step compiles once. Knows tasks and tokenizers; knows no models.

Shape letters: B rows (tasks), T tokens of a row, A answer tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from t2l.config import PromptConfig
from t2l.errors import DataError
from t2l.prompt import render, token_ids
from t2l.tasks import Example, Task

CANDIDATES = 6
"""Examples drawn for a row; those that do not fit any more are left out."""


class Batch(NamedTuple):
    """One step's input."""

    tokens: Tensor
    """(B, T)"""
    positions: Tensor
    """(B, T), starting again at 0 in each document."""
    documents: Tensor
    """(B, T) number of the document in its row, -1 for padding."""
    label_positions: Tensor
    """(B, A) position in the row whose next token is the label."""
    labels: Tensor
    """(B, A)"""
    label_documents: Tensor
    """(B, A) document of each label, -1 for padding."""
    weights: Tensor
    """(B, A), summing to 1: rows weigh the same, a row's documents too, a document's tokens too."""
    descriptions: Tensor
    """(B,) the adapter's description, as its position in the run's list of descriptions."""
    skipped: Tensor
    """() examples that were drawn and are too long for any row."""


@dataclass(frozen=True)
class Pool:
    """A task as the sampler sees it."""

    name: str
    examples: tuple[Example, ...]
    descriptions: tuple[int, ...]
    """Positions in the run's list of descriptions."""


class Batches(Dataset):
    """Item s is the batch of step s.

    Args:
        pools: Tasks with their examples and descriptions.
        texts: The run's list of descriptions.
        tokenizer: The base model's.
        rows: B. With fewer tasks than rows, tasks repeat within a batch.
        tokens: T.
        answer_tokens: A.
        in_prompt: Share of rows whose prompt also holds the description.
        seed: Seed of the run.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        texts: Sequence[str],
        tokenizer: Any,
        *,
        rows: int,
        tokens: int,
        answer_tokens: int,
        in_prompt: float,
        seed: int,
    ) -> None:
        self.pools, self.texts, self.tokenizer = list(pools), list(texts), tokenizer
        self.rows, self.tokens, self.answer_tokens = rows, tokens, answer_tokens
        self.in_prompt, self.seed = in_prompt, seed
        eos = tokenizer.eos_token
        if eos is None:
            raise DataError("The base model's tokenizer has no end-of-sequence token, so answers could not end")
        self.eos: str = eos

    def task_of_row(self, step: int, row: int) -> int:
        """Tasks come in shuffled order, each once before any comes again."""
        epoch, place = divmod(step * self.rows + row, len(self.pools))
        return int(np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.pools))[place])

    def __getitem__(self, step: int) -> Batch:
        """Builds the batch of a step."""
        rng = np.random.default_rng((self.seed, 0, step))
        shape, answers = (self.rows, self.tokens), (self.rows, self.answer_tokens)
        tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        documents = np.full(shape, -1, np.int64)
        label_positions, labels = np.zeros(answers, np.int64), np.zeros(answers, np.int64)
        label_documents, weights = np.full(answers, -1, np.int64), np.zeros(answers, np.float32)
        chosen, drawn = [], []
        for row in range(self.rows):
            pool = self.pools[self.task_of_row(step, row)]
            chosen.append(int(rng.choice(pool.descriptions)))
            prompt = PromptConfig(description_in_prompt=bool(rng.random() < self.in_prompt))
            picks = rng.permutation(len(pool.examples))[:CANDIDATES]
            for pick in picks:
                example = pool.examples[pick]
                answer = example.outputs[int(rng.integers(len(example.outputs)))]
                drawn.append((row, render(self.tokenizer, self.texts[chosen[-1]], example.input, prompt), answer))
        prompts = token_ids(self.tokenizer, [prompt for _, prompt, _ in drawn])
        answer_ids = token_ids(self.tokenizer, [answer.strip() + self.eos for *_, answer in drawn])
        used, used_answers, count = [0] * self.rows, [0] * self.rows, [0] * self.rows
        skipped = 0
        for (row, *_), prompt_ids, target_ids in zip(drawn, prompts, answer_ids, strict=True):
            length = len(prompt_ids) + len(target_ids) - 1  # the last answer token is only ever a label
            if length > self.tokens or len(target_ids) > self.answer_tokens:
                skipped += 1
                continue
            start, label = used[row], used_answers[row]
            if start + length > self.tokens or label + len(target_ids) > self.answer_tokens:
                continue
            end, label_end = start + length, label + len(target_ids)
            tokens[row, start:end] = prompt_ids + target_ids[:-1]
            positions[row, start:end] = np.arange(length)
            documents[row, start:end] = count[row]
            label_positions[row, label:label_end] = np.arange(start + len(prompt_ids) - 1, end)
            labels[row, label:label_end] = target_ids
            label_documents[row, label:label_end] = count[row]
            weights[row, label:label_end] = 1 / len(target_ids)
            used[row], used_answers[row], count[row] = end, label_end, count[row] + 1
        filled = np.array(count)
        if not filled.any():
            raise DataError(
                f"Step {step}: none of the drawn examples fits into {self.tokens} tokens with {self.answer_tokens} "
                "answer tokens; raise train.sequence_tokens or train.answer_tokens"
            )
        weights /= np.maximum(filled, 1)[:, None] * (filled > 0).sum()
        arrays = (tokens, positions, documents, label_positions, labels, label_documents, weights)
        return Batch._make([*map(torch.from_numpy, arrays), torch.tensor(chosen), torch.tensor(skipped)])

    def loader(self, steps: range, *, workers: int, pin: bool) -> DataLoader:
        """The batches of `steps` in order, built ahead of time by worker processes."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            pin_memory=pin,
            prefetch_factor=4 if workers else None,
            # Its own, or making a loader would advance the global one: a resumed run would draw other dropout.
            generator=torch.Generator(),
            worker_init_fn=_quiet_worker if workers else None,
        )


def _quiet_worker(_: int) -> None:
    # Each worker is one of many; Rust threads inside each would only fight over the cores.
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


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
