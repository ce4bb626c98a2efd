"""The one packer: tokenised documents are laid out in rows of one static shape.

A document is a prompt with its answer. Several of them stand in a row one after another, kept apart by document
numbers. What all prompts of a row begin with may stand there once; every document then sees it, and each still has the
very states that it would have alone. Because shapes are static, a compiled step compiles once.
Knows tasks and tokenizers; knows no models. Shape letters: B rows, T tokens of a row, A answer tokens of a row.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from t2l.config import PromptConfig
from t2l.errors import DataError
from t2l.prompt import render, spaced, token_ids
from t2l.tasks import Example, Task

SHARED, PADDING = -2, -1
"""Document numbers of the tokens that all documents of a row begin with, and of those that belong to none."""


class PackedRows(NamedTuple):
    """Rows of documents; the first five tensors are what `t2l.train.loss.answer_losses` reads."""

    tokens: Tensor
    """(B, T)"""
    positions: Tensor
    """(B, T), in each document going on from what the row's documents share, or beginning at 0."""
    documents: Tensor
    """(B, T) number of the document in its row, `SHARED` for what all of them begin with, `PADDING` for padding."""
    label_positions: Tensor
    """(B, A) position in the row whose next token is the label."""
    labels: Tensor
    """(B, A)"""
    label_documents: Tensor
    """(B, A) document of each label, -1 for padding."""
    weights: Tensor
    """(B, A), 0 for padding: what each label's loss counts; all labels of a document count the same."""

    def to(self, device: torch.device) -> "PackedRows":
        """The same on another device."""
        return PackedRows(*(x.to(device, non_blocking=True) for x in self))

    def part(self, start: int, stop: int) -> "PackedRows":
        """Rows `start` to `stop` (views)."""
        return PackedRows(*(x[start:stop] for x in self))

    def followed_by(self, other: "PackedRows") -> "PackedRows":
        """These rows and then the others."""
        return PackedRows(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Documents:
    """Tokenised documents, end to end in one array."""

    pool: np.ndarray
    """Prompt and answer tokens of every document."""
    start: np.ndarray
    """(D,) where each document starts in `pool`."""
    prompt: np.ndarray
    """(D,) prompt tokens."""
    answer: np.ndarray
    """(D,) answer tokens, the end of the sequence among them."""
    gap: int = field(default=0, kw_only=True)
    """Tokens of padding between two documents of a row, for bases whose convolutions would look across."""

    @classmethod
    def join(cls, pairs: Sequence[tuple[list[int], list[int]]], **more: Any) -> Self:
        """Documents from the tokens of their prompts and answers."""
        prompt = np.array([len(before) for before, _ in pairs], dtype=np.int64)
        answer = np.array([len(after) for _, after in pairs], dtype=np.int64)
        lengths = prompt + answer
        pool = np.array([token for pair in pairs for part in pair for token in part], dtype=np.int64)
        return cls(pool, np.cumsum(lengths) - lengths, prompt, answer, **more)


@dataclass(frozen=True)
class TaskDocuments(Documents):
    """All documents of one task; examples that fit into no row are left out."""

    variants: tuple[tuple[int, ...], ...]
    """For each example its documents, one for each of its right answers."""
    ids: tuple[str, ...]
    """For each example its id."""
    too_long: int
    """Examples left out."""


def require_end_of_sequence(tokenizer: Any) -> str:
    """The token that ends an answer.

    Raises:
        DataError: if the tokenizer has none.
    """
    if tokenizer.eos_token is None:
        raise DataError("The base model's tokenizer has no end-of-sequence token, so answers could not end")
    return str(tokenizer.eos_token)


def answer_text(answer: str, eos: str, prompt: PromptConfig) -> str:
    """An answer as it is trained on, its end included."""
    return spaced(answer.strip(), prompt.answer_space) + eos


def tokenize_examples(
    task: Task,
    examples: Sequence[Example],
    tokenizer: Any,
    prompt: PromptConfig,
    *,
    tokens: int,
    answer_tokens: int,
    seed: int,
    first_answer: bool = False,
    gap: int = 0,
) -> TaskDocuments:
    """Renders and tokenises examples, each with one of the task's descriptions where the prompt holds one.

    Args:
        task: Whose descriptions stand in the prompts.
        examples: What is rendered.
        tokenizer: The base model's.
        prompt: Whether the description stands in the prompt.
        tokens: T.
        answer_tokens: A.
        seed: Of the choice of descriptions.
        first_answer: Whether only the first right answer is kept, for evaluation.
        gap: Tokens between two documents of a row, see `t2l.train.loss.document_gap`.

    Raises:
        DataError: if the tokenizer has no end of sequence, or a description is wanted and the task has none.
    """
    eos = require_end_of_sequence(tokenizer)
    if prompt.description_in_prompt and not task.descriptions:
        raise DataError(f"Task {task.name} has no description to stand in its prompts")
    rng = np.random.default_rng((seed, 2, zlib.crc32(task.name.encode())))
    texts = task.descriptions or ("",)
    prompts = [render(tokenizer, texts[rng.integers(len(texts))], e.input, prompt) for e in examples]
    outputs = [example.outputs[:1] if first_answer else example.outputs for example in examples]
    flat = [answer_text(answer, eos, prompt) for found in outputs for answer in found]
    prompt_ids = token_ids(tokenizer, prompts) if prompts else []
    answer_ids = iter(token_ids(tokenizer, flat) if flat else [])
    pairs: list[tuple[list[int], list[int]]] = []
    variants, ids = [], []
    for example, before, found in zip(examples, prompt_ids, outputs, strict=True):
        answers = [next(answer_ids) for _ in found]
        fitting = [a for a in answers if len(before) + len(a) - 1 <= tokens and len(a) <= answer_tokens]
        if fitting:
            variants.append(tuple(range(len(pairs), len(pairs) + len(fitting))))
            ids.append(example.id)
            pairs += [(before, after) for after in fitting]
    too_long = len(examples) - len(variants)
    return TaskDocuments.join(pairs, variants=tuple(variants), ids=tuple(ids), too_long=too_long, gap=gap)


class Stream:
    """Row after row of one task: its examples in shuffled order, each once before any comes again.

    Nothing but the seed, the task's name and the number of rows taken decides what comes next, so a task sees the
    same rows whichever tasks are trained beside it.

    Args:
        name: The task's.
        documents: Its documents; there must be one.
        tokens: T.
        answer_tokens: A.
        seed: Of the order.
    """

    def __init__(self, name: str, documents: TaskDocuments, *, tokens: int, answer_tokens: int, seed: int) -> None:
        self.documents, self.tokens, self.answer_tokens = documents, tokens, answer_tokens
        self.seed = (seed, 3, zlib.crc32(name.encode()))
        self.seek(0, 0)

    def seek(self, epoch: int, place: int) -> None:
        """Goes to an example of an epoch."""
        self.epoch, self.place = epoch, place
        self.order = np.random.default_rng((*self.seed, epoch)).permutation(len(self.documents.variants))

    def row(self) -> list[int]:
        """Documents of the next row: as many of the next examples as fit."""
        found: list[int] = []
        used = answers = 0
        while True:
            if self.place == len(self.order):
                self.seek(self.epoch + 1, 0)
            variants = self.documents.variants[self.order[self.place]]
            document = variants[self.epoch % len(variants)]
            answer = int(self.documents.answer[document])
            length = int(self.documents.prompt[document]) + answer - 1
            if used + length > self.tokens or answers + answer > self.answer_tokens:
                return found
            # A row longer than the task itself would only repeat it.
            if len(found) == len(self.order):
                return found
            found.append(document)
            used, answers, self.place = used + length + self.documents.gap, answers + answer, self.place + 1


def fixed_rows(
    documents: TaskDocuments, *, tokens: int, answer_tokens: int, limit: int | None = None
) -> list[list[int]]:
    """Rows that hold each example once, in order of length so that little is padding; at most `limit` rows.

    With a limit, examples are thinned evenly over their lengths.
    """
    length = documents.prompt + documents.answer - 1
    order = sorted((found[0] for found in documents.variants), key=lambda d: (int(length[d]), d))
    while True:
        rows: list[list[int]] = []
        used = answers = 0
        for document in order:
            answer, size = int(documents.answer[document]), int(length[document])
            if not rows or used + size > tokens or answers + answer > answer_tokens:
                rows.append([])
                used = answers = 0
            rows[-1].append(document)
            used, answers = used + size + documents.gap, answers + answer
        if limit is None or len(rows) <= limit:
            return rows
        keep = max(1, min(len(order) - 1, len(order) * limit // len(rows)))
        order = [order[i] for i in np.linspace(0, len(order) - 1, keep).round().astype(int)]


def pack(
    rows: Sequence[tuple[Documents, Sequence[int]]],
    *,
    tokens: int,
    answer_tokens: int,
    groups: Sequence[int] | None = None,
    shared: Sequence[int] | None = None,
) -> PackedRows:
    """Lays out rows of documents.

    Args:
        rows: For each row whose documents they are and which.
        tokens: T.
        answer_tokens: A.
        groups: For each row the number of its group. The weights of a group's labels sum to 1, and its documents weigh
            the same. Without groups the weights of each document sum to 1.
        shared: For each row the number of tokens that all of its prompts begin with and that stand in it once. Each
            prompt must have a token of its own after them.
    """
    shape, answers = (len(rows), tokens), (len(rows), answer_tokens)
    out_tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    documents = np.full(shape, PADDING, np.int64)
    label_positions, labels = np.zeros(answers, np.int64), np.zeros(answers, np.int64)
    label_documents, weights = np.full(answers, -1, np.int64), np.zeros(answers, np.float32)
    listed = [(row, store, np.asarray(found, np.int64)) for row, (store, found) in enumerate(rows) if len(found)]
    if listed:
        counts = np.array([len(found) for *_, found in listed])
        row = np.repeat([row for row, *_ in listed], counts)
        prompt = np.concatenate([store.prompt[found] for _, store, found in listed])
        answer = np.concatenate([store.answer[found] for _, store, found in listed])
        # One array of all the tokens that are used, document after document.
        pool = np.concatenate([_tokens(store, found) for _, store, found in listed])
        whole = prompt + answer
        pool_start = np.cumsum(whole) - whole
        first = np.repeat(np.cumsum(counts) - counts, counts)
        number = np.arange(len(row)) - first
        begun = np.zeros_like(row) if shared is None else np.asarray(shared)[row]
        skipped = np.where(number > 0, begun, 0)  # the row's first document lays out what all of them share

        length = whole - 1 - skipped  # the last answer token is only ever a label
        start = np.cumsum(length) - length
        apart = length + np.repeat([store.gap for _, store, _ in listed], counts)
        start_in_row = np.cumsum(apart) - apart
        start_in_row -= start_in_row[first]
        inside = np.arange(length.sum()) - np.repeat(start, length)
        where = (np.repeat(row, length), np.repeat(start_in_row, length) + inside)
        out_tokens[where] = pool[np.repeat(pool_start + skipped, length) + inside]
        positions[where] = np.repeat(skipped, length) + inside
        is_shared = positions[where] < np.repeat(begun, length)
        documents[where] = np.where(is_shared, SHARED, np.repeat(number, length))

        label_start = np.cumsum(answer) - answer
        inside = np.arange(answer.sum()) - np.repeat(label_start, answer)
        where = (np.repeat(row, answer), np.repeat(label_start - label_start[first], answer) + inside)
        labels[where] = pool[np.repeat(pool_start + prompt, answer) + inside]
        label_positions[where] = np.repeat(start_in_row + prompt - skipped - 1, answer) + inside
        label_documents[where] = np.repeat(number, answer)
        group = np.arange(len(row)) if groups is None else np.asarray(groups)[row]
        weights[where] = np.repeat(1 / (answer * np.bincount(group)[group]), answer)
    arrays = (out_tokens, positions, documents, label_positions, labels, label_documents, weights)
    return PackedRows(*map(torch.from_numpy, arrays))


def _tokens(store: Documents, found: np.ndarray) -> np.ndarray:
    """The documents' tokens, end to end."""
    length = store.prompt[found] + store.answer[found]
    start = np.cumsum(length) - length
    return store.pool[np.repeat(store.start[found] - start, length) + np.arange(length.sum())]


def document_scores(losses: Tensor, correct: Tensor, rows: PackedRows) -> tuple[Tensor, Tensor, Tensor]:
    """From token losses, and whether each label is the model's first choice, (B, A) each, to documents.

    Returns:
        Each (B, A), one column a document of the row: mean loss of its answer tokens, whether all of them are the
        model's first choice (teacher-forced exact match), and whether there is such a document.
    """
    index = rows.label_documents.clamp_min(0)
    real = (rows.label_documents >= 0).to(losses.dtype)
    zeros = torch.zeros_like(losses)
    count = zeros.scatter_add(1, index, real)
    wrong = zeros.scatter_add(1, index, real * (~correct).to(losses.dtype))
    total = zeros.scatter_add(1, index, real * losses)
    return total / count.clamp_min(1), (wrong == 0) & (count > 0), count > 0
