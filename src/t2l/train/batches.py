"""Batches of packed rows: the batch of a step is a pure function of (seed, step), so resuming needs no sampler state.

    sample tasks and descriptions ─▶ augment ─▶ render prompts ─▶ tokenise ─▶ pack

Each row of a batch belongs to one task with one description and holds as many of the task's examples as fit.
Knows tasks and tokenizers; knows no models. Shape letters as in `packing`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from t2l.config import PromptConfig
from t2l.errors import DataError
from t2l.prompt import render, token_ids
from t2l.tasks import Example
from t2l.train.augment import Augmentation
from t2l.train.options import Listing, placed
from t2l.train.packing import Documents, PackedRows, answer_text, pack, require_end_of_sequence

CANDIDATES = 12
"""Examples that are drawn for a row at a time; those that do not fit any more are left out."""
PATTERN = 200
"""Rows over which the tasks of each source come as often as the source's weight says."""


class Batch(NamedTuple):
    """The input of one step."""

    rows: PackedRows
    """The weights of all rows sum to 1; rows weigh the same, and so do the documents of a row."""
    read: Tensor
    """(B,) text that each row's adapter is written from, as its position in the run's list of texts to read."""
    negatives: Tensor
    """(B,) a text of another task, or of the row's own task where `Batches.has_negatives` is false."""
    in_prompt: Tensor
    """(B,) whether the prompts of the row show the description."""
    told: Tensor
    """(B,) whether the text that the row's adapter is written from says what to answer."""
    skipped: Tensor
    """() number of examples that were drawn and are too long for any row."""

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        return Batch(self.rows.to(device), *(x.to(device, non_blocking=True) for x in self[1:]))

    def every(self, step: int, start: int) -> "Batch":
        """Every so-manieth row from `start` on; what was skipped was skipped for all."""
        if step == 1:
            return self
        own = {name: x[start::step] for name, x in self._asdict().items() if name not in ("rows", "skipped")}
        return self._replace(rows=PackedRows(*(x[start::step] for x in self.rows)), **own)


@dataclass(frozen=True)
class Pool:
    """A task as the sampler sees it."""

    name: str
    examples: tuple[Example, ...]
    descriptions: tuple[int, ...]
    """Positions in the run's list of descriptions; where one stands several times, it is drawn more often."""
    reads: tuple[int, ...] = ()
    """Only where the hypernetwork reads no descriptions: positions in the run's list of texts to read, one for each
    example, or one for all of them."""
    augmentation: Augmentation | None = None
    """What changes the examples' inputs or answers, in a variant of a task."""
    variants: tuple["Pool", ...] = ()
    """The task with other words or another form as its answers."""
    variant_prob: float = 0.0
    """Share of the task's rows that belong to a variant."""
    auxiliary: tuple["Pool", ...] = ()
    """Auxiliary tasks made of the task's examples."""
    auxiliary_prob: float = 0.0
    """Share of the task's rows that belong to an auxiliary task; the other rows may belong to a variant."""
    options: tuple[str, ...] = ()
    """The possible answers, where they are few; they may be listed in the input."""
    self_contained: bool = False
    """Whether the input alone says what an auxiliary task asks, so that no description has to."""
    terse: tuple[int, ...] = ()
    """Positions of texts that say next to nothing of the task."""
    source: int = 0
    """Which of the run's sources the task comes from."""

    def pose(self, example: Example, rng: np.random.Generator) -> tuple[str, str]:
        """The input that an example asks here, and one right answer to it."""
        answer = example.outputs[int(rng.integers(len(example.outputs)))]
        if self.augmentation is None:
            return example.input, answer
        return self.augmentation(example, answer, rng)

    @property
    def readable(self) -> tuple[int, ...]:
        """Every text that the hypernetwork may read for this task."""
        return self.reads or self.descriptions


@dataclass
class _Row:
    """A row while it is built."""

    task: int
    """Position of its task among the pools."""
    pool: Pool
    """The task, or a variant of it."""
    description: int
    """Which description the prompt shows, if it shows one."""
    prompt: PromptConfig
    negative: int
    told: bool = True
    read: int = -1
    """The text that its adapter is written from; -1 until one is chosen."""
    listing: Listing | None = None
    """How the options are listed in its inputs, if they are."""
    left: list[int] = field(default_factory=list)
    """Examples that have not been drawn yet."""
    shared: int = 0
    """Tokens that all of its prompts begin with."""
    documents: list[tuple[list[int], list[int]]] = field(default_factory=list)
    """Tokens of prompts and answers."""
    tokens: int = 0
    """Tokens used so far."""
    answer_tokens: int = 0

    def put(self, prompt: list[int], answer: list[int], *, tokens: int, answer_tokens: int, gap: int) -> bool:
        """Adds a document if the row, which may have so many tokens, has room for it, and leaves a gap after it."""
        length = len(prompt) + len(answer) - 1 - (self.shared if self.documents else 0)
        if self.tokens + length > tokens or self.answer_tokens + len(answer) > answer_tokens:
            return False
        self.documents.append((prompt, answer))
        self.tokens += length + gap
        self.answer_tokens += len(answer)
        return True


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
        one_example: Whether a row holds a single example, because its adapter is written from that example's input.
        augment_unsaid: Whether rows are augmented also where the prompt does not show the description. Where no
            hypernetwork reads it either, nothing would say what to answer.
        random_texts: Positions of texts that describe nothing.
        random_text_prob: Share of rows that read one of them, while their prompts and answers stay as they are.
        terse_prob: Share of rows that read, and may show, a text that says next to nothing of their task.
        option_placement_prob: Share of the rows of tasks with few answers whose inputs list these as options.
        source_weights: How often tasks of each source come; the weights sum to 1. Without them all tasks come alike.
        share_beginnings: Whether the tokens that all prompts of a row begin with stand there once, or in each document.
        gap: Tokens between two documents of a row, see `t2l.train.loss.document_gap`; beginnings are then not shared.
        prompt: How prompts are rendered; whether a prompt shows the description is drawn by `in_prompt`.

    Raises:
        DataError: if the tokenizer has no way to end an answer, or a source has no task.
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
        one_example: bool = False,
        augment_unsaid: bool = True,
        random_texts: Sequence[int] = (),
        random_text_prob: float = 0.0,
        terse_prob: float = 0.0,
        option_placement_prob: float = 0.0,
        source_weights: Sequence[float] = (),
        share_beginnings: bool = True,
        gap: int = 0,
        prompt: PromptConfig | None = None,
    ) -> None:
        self.pools, self.texts, self.tokenizer = list(pools), list(texts), tokenizer
        self.rows, self.tokens, self.answer_tokens = rows, tokens, answer_tokens
        self.in_prompt, self.seed, self.one_example = in_prompt, seed, one_example
        self.augment_unsaid, self.prompt = augment_unsaid, prompt or PromptConfig()
        self.random_texts, self.random_text_prob = random_texts, random_text_prob
        self.terse_prob, self.option_placement_prob = terse_prob, option_placement_prob
        self.share_beginnings, self.gap = share_beginnings and not one_example and not gap, gap
        self.candidates = 2 if one_example else CANDIDATES
        self.eos = require_end_of_sequence(tokenizer)
        self._own = [frozenset(pool.readable) for pool in self.pools]
        self._sources, self._pattern = _by_source(self.pools, source_weights)

    @property
    def readable(self) -> list[int]:
        """Every text that may be read for any task, its variants and its auxiliary tasks, in order."""
        pools = [p for pool in self.pools for p in (pool, *pool.variants, *pool.auxiliary)]
        return sorted({text for pool in pools for text in pool.readable})

    @property
    def has_negatives(self) -> bool:
        """Whether every task has texts that are read for other tasks and not for this one."""
        everything = frozenset[int]().union(*self._own)
        return all(everything - own for own in self._own)

    def task_of_row(self, step: int, row: int) -> int:
        """Tasks come in shuffled order, each once before any comes again; with weights, those of each source do."""
        turn = step * self.rows + row
        if not len(self._pattern):
            epoch, place = divmod(turn, len(self.pools))
            return int(np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.pools))[place])
        # Each block of the pattern is shuffled; a source's turn counts its places before this one.
        block, place = divmod(turn, PATTERN)
        sources = np.random.default_rng((self.seed, 10, block)).permutation(self._pattern)
        source = int(sources[place])
        turn = block * int((self._pattern == source).sum()) + int((sources[:place] == source).sum())
        epoch, place = divmod(turn, len(self._sources[source]))
        order = np.random.default_rng((self.seed, 4, source, epoch)).permutation(self._sources[source])
        return int(order[place])

    def __getitem__(self, step: int) -> Batch:
        """Builds the batch of a step.

        Raises:
            DataError: if none of the drawn examples fits into a row.
        """
        # Sampling, negatives, augmentation and random texts have streams of their own: each is what it would be
        # without the others.
        rng = self._stream(0, step)
        rows = self._sample(step, rng)
        self._choose_told(rows, self._stream(7, step), self._stream(8, step))
        self._augment(rows, self._stream(6, step))
        for row in rows:
            if row.read < 0:  # where it is an example's input, `_fill` says which
                row.read = row.pool.reads[0] if row.pool.reads else row.description
        listings = self._stream(9, step)
        for row in rows:
            if row.pool.options and listings.random() < self.option_placement_prob:
                row.listing = Listing.drawn(listings)
        skipped = self._fill(rows, rng, listings)
        if not any(row.documents for row in rows):
            raise DataError(
                f"Step {step}: none of the drawn examples fits into {self.tokens} tokens with {self.answer_tokens} "
                "answer tokens; raise train.max_seq_length or train.max_target_length"
            )
        return Batch(
            self._pack(rows),
            torch.tensor([row.read for row in rows]),
            torch.tensor([row.negative for row in rows]),
            torch.tensor([row.prompt.description_in_prompt for row in rows]),
            torch.tensor([row.told for row in rows]),
            torch.tensor(skipped),
        )

    def _stream(self, number: int, step: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, number, step))

    def _sample(self, step: int, rng: np.random.Generator) -> list[_Row]:
        """Each row's task, description and negative, and whether its prompt shows the description."""
        tasks = [self.task_of_row(step, row) for row in range(self.rows)]
        second = self._stream(2, step)
        negatives = [self._negative(task, second) for task in tasks]
        descriptions = [int(rng.choice(self.pools[task].descriptions)) for task in tasks]
        prompts = [self.prompt.with_description(bool(rng.random() < self.in_prompt)) for _ in tasks]
        return [
            _Row(task, self.pools[task], description, prompt, negative)
            for task, description, prompt, negative in zip(tasks, descriptions, prompts, negatives, strict=True)
        ]

    def _negative(self, task: int, rng: np.random.Generator) -> int:
        """A text that is read for another task and not for this one."""
        for number in rng.permutation(len(self.pools)):
            different = [text for text in self.pools[number].readable if text not in self._own[task]]
            if different:
                return int(rng.choice(different))
        return int(rng.choice(self.pools[task].readable))

    def _augment(self, rows: list[_Row], rng: np.random.Generator) -> None:
        """Puts variants and auxiliary tasks in the place of some rows' tasks.

        Not where neither adapter nor prompt would say what is asked, unless the input does. In half of these rows the
        negative is of the same task too, but asks for other answers.
        """
        for row in rows:
            own, terse = row.pool, row.description in row.pool.terse
            said = (self.augment_unsaid and row.told) or (row.prompt.description_in_prompt and not terse)
            auxiliary = own.auxiliary if said else tuple(pool for pool in own.auxiliary if pool.self_contained)
            if auxiliary and rng.random() < own.auxiliary_prob * len(auxiliary) / len(own.auxiliary):
                changed, near = auxiliary, (own, *(pool for pool in own.auxiliary if not pool.self_contained))
            elif own.variants and said and rng.random() < own.variant_prob:
                changed = near = own.variants
            else:
                continue
            row.pool = changed[int(rng.integers(len(changed)))]
            if not terse:
                row.description = int(rng.choice(row.pool.descriptions))
            # Where the input says what is asked, the task's own texts do no harm.
            unlike = [pool for pool in near if pool.augmentation != row.pool.augmentation]
            unlike = [] if row.pool.self_contained else unlike
            if unlike and rng.random() < 0.5:
                row.negative = int(rng.choice(unlike[int(rng.integers(len(unlike)))].descriptions))

    def _choose_told(self, rows: list[_Row], random: np.random.Generator, rng: np.random.Generator) -> None:
        """Which rows read random words or a terse text."""
        for row in rows:
            if self.random_texts and random.random() < self.random_text_prob:
                row.told, row.read = False, int(random.choice(self.random_texts))
            if rng.random() < self.terse_prob and row.pool.terse:
                row.told, row.read, row.description = False, -1, int(rng.choice(row.pool.terse))

    def _fill(self, rows: list[_Row], rng: np.random.Generator, listings: np.random.Generator) -> int:
        """Draws examples for all rows until each has one that fits; returns how many are too long for any row."""
        skipped = 0
        for row in rows:
            row.left = list(rng.permutation(len(row.pool.examples)))
        waiting = rows
        while waiting:  # a second time only for rows into which nothing drawn so far fits
            drawn = [(row, int(pick)) for row in waiting for pick in row.left[: self.candidates]]
            for row in waiting:
                row.left = row.left[self.candidates :]
            posed = [(row, row.pool.pose(row.pool.examples[pick], rng)) for row, pick in drawn]
            tokenized = self._tokenize([(row, (_listed(row, text, listings), said)) for row, (text, said) in posed])
            if self.share_beginnings:
                for row in waiting:
                    row.shared = _beginning([p for (r, _), (p, _) in zip(drawn, tokenized, strict=True) if r is row])
            for (row, pick), (prompt, answer) in zip(drawn, tokenized, strict=True):
                if len(prompt) + len(answer) - 1 > self.tokens or len(answer) > self.answer_tokens:
                    skipped += 1
                elif not (self.one_example and row.documents):
                    fits = row.put(prompt, answer, tokens=self.tokens, answer_tokens=self.answer_tokens, gap=self.gap)
                    if fits and self.one_example:
                        row.read = row.pool.reads[pick]
            waiting = [row for row in waiting if row.left and not row.documents]
        return skipped

    def _tokenize(self, posed: Sequence[tuple[_Row, tuple[str, str]]]) -> list[tuple[list[int], list[int]]]:
        """Renders inputs and answers; returns the tokens of each prompt and its answer."""
        prompts = [render(self.tokenizer, self.texts[row.description], text, row.prompt) for row, (text, _) in posed]
        answers = [answer_text(answer, self.eos, self.prompt) for _, (_, answer) in posed]
        return list(zip(token_ids(self.tokenizer, prompts), token_ids(self.tokenizer, answers), strict=True))

    def _pack(self, rows: list[_Row]) -> PackedRows:
        """Rows that weigh the same, and whose documents weigh the same."""
        listed = [(Documents.join(row.documents, gap=self.gap), range(len(row.documents))) for row in rows]
        shared = [row.shared for row in rows]
        packed = pack(listed, tokens=self.tokens, answer_tokens=self.answer_tokens, shared=shared)
        filled = np.array([len(row.documents) for row in rows])
        weights = packed.weights.numpy()
        weights /= np.maximum(filled, 1)[:, None] * (filled > 0).sum()
        return packed

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


def _by_source(pools: Sequence[Pool], weights: Sequence[float]) -> tuple[list[list[int]], np.ndarray]:
    """The tasks of each source, and which source each of `PATTERN` rows is of; nothing without weights."""
    if not weights:
        return [], np.zeros(0, np.int64)
    sources = [[n for n, pool in enumerate(pools) if pool.source == source] for source in range(len(weights))]
    if not all(sources):
        raise DataError(
            f"Source number {sources.index([])} of {len(weights)} has no task that can be trained on; take it out of "
            "data.extra_tasks and data.extra_weights"
        )
    ends = np.round(np.cumsum(weights) * PATTERN).astype(int)
    return sources, np.searchsorted(ends, np.arange(PATTERN), side="right").clip(max=len(weights) - 1)


def _listed(row: _Row, text: str, rng: np.random.Generator) -> str:
    """The input as the row shows it, with its options if the row lists them."""
    return text if row.listing is None else placed(text, row.pool.options, rng, row.listing)


def _beginning(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own."""
    first, last = min(prompts), max(prompts)  # what these two share, all share
    shortest = min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


def _quiet_worker(_: int) -> None:
    # Each worker is one of many; Rust threads inside each would only fight over the cores.
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
