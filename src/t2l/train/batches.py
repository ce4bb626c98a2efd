"""Batches of packed sequences: step s of a run is a pure function of (seed, s), so resuming needs no sampler state.

Each row of a batch is one task with one description; several of the task's examples stand in it one after
another, kept apart by document numbers, until the row's tokens or its answer tokens are used up. What all prompts of
a row begin with (a system message, the description) stands there once, and every document sees it: each still has the
very states it would have alone. All shapes are static, so a compiled step compiles once. Knows tasks and tokenizers;
knows no models.

Beside the rows may stand a teacher's: the same documents, each after the description and some other examples.

Shape letters: B rows (tasks), T tokens of a row, S tokens of a teacher's row, A answer tokens of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from t2l.config import PromptConfig
from t2l.errors import DataError
from t2l.prompt import render, spaced, token_ids
from t2l.tasks import Example, Task
from t2l.train.options import Listing, placed

DROPPED, UNTOLD, TOLD = 0, 1, 2
"""What a row's adapter is written from: nothing, so that it is the offset alone; a text that does not say what to
answer; a description that does."""
PATTERN = 200
"""Rows over which tasks of several sources come as often as their weights say."""

CANDIDATES = 12
"""Examples drawn for a row at a time; those that do not fit any more are left out."""

SHARED = -2
"""Document number of what all documents of a row begin with."""

NO_TEACHER = torch.zeros(0)
"""The teacher's fields of a batch without one."""


class Batch(NamedTuple):
    """One step's input."""

    tokens: Tensor
    """(B, T)"""
    positions: Tensor
    """(B, T), in each document going on from the row's shared beginning."""
    documents: Tensor
    """(B, T) number of the document in its row, `SHARED` for what all of them begin with, -1 for padding."""
    label_positions: Tensor
    """(B, A) position in the row whose next token is the label."""
    labels: Tensor
    """(B, A)"""
    label_documents: Tensor
    """(B, A) document of each label, -1 for padding."""
    weights: Tensor
    """(B, A), summing to 1: rows weigh the same, a row's documents too, a document's tokens too."""
    descriptions: Tensor
    """(B,) what the row's adapter is written from, as its position in the run's list of texts to read."""
    others: Tensor
    """(B,) the same of another task; of the row's own where `Batches.told_apart` is false."""
    partners: Tensor
    """(B,) one more of the row's own task, drawn anew: the same as `descriptions` now and then."""
    in_prompt: Tensor
    """(B,) whether the row's prompts show the description."""
    conditioning: Tensor
    """(B,) one of `DROPPED`, `UNTOLD` and `TOLD`."""
    skipped: Tensor
    """() examples that were drawn and are too long for any row."""
    teacher_tokens: Tensor = NO_TEACHER
    """(B, S)"""
    teacher_positions: Tensor = NO_TEACHER
    """(B, S)"""
    teacher_documents: Tensor = NO_TEACHER
    """(B, S), numbered as in `documents`; one that does not fit is left out."""
    teacher_label_positions: Tensor = NO_TEACHER
    """(B, A) where the teacher's row has the same labels."""
    teacher_weights: Tensor = NO_TEACHER
    """(B, A) `weights`, 0 for documents that the teacher's row does not hold."""


@dataclass(frozen=True)
class Pool:
    """A task as the sampler sees it."""

    name: str
    examples: tuple[Example, ...]
    descriptions: tuple[int, ...]
    """Positions in the run's list of descriptions."""
    reads: tuple[int, ...] = ()
    """Where the hypernetwork reads no descriptions: positions in the run's list of texts to read, one for each
    example or one for all."""
    category: str | None = None
    reword: Callable[[str], str] | None = None
    """Makes what is answered of the examples' own answers, where that is something else."""
    variants: tuple["Pool", ...] = ()
    """The same examples with other answers, each with descriptions that say so."""
    variant_share: float = 0.0
    """Share of the task's rows that are of a variant."""
    ask: Callable[[Example, str, np.random.Generator], tuple[str, str]] | None = None
    """Makes another input and its answer of an example and one of its answers, where something else is asked."""
    derived: tuple["Pool", ...] = ()
    """Tasks that ask something else of the same examples, each with descriptions that say so."""
    derived_share: float = 0.0
    """Share of the task's rows that are of a derived one; the rest may be of a variant."""
    options: tuple[str, ...] = ()
    """What may be answered, where that is one of a few; such options can be listed in the input."""
    self_contained: bool = False
    """Whether the input alone says what a derived task asks, so that no description need say it."""
    terse: tuple[int, ...] = ()
    """Positions of texts that say next to nothing of the task."""
    source: int = 0
    """Which of the run's sources the task comes from."""

    def pose(self, example: Example, rng: np.random.Generator) -> tuple[str, str]:
        """What is asked of an example, and one right answer to it."""
        own = example.outputs[int(rng.integers(len(example.outputs)))]
        if self.ask is not None:
            return self.ask(example, own, rng)
        return example.input, own if self.reword is None else self.reword(own)

    def like(self, other: "Pool") -> bool:
        """Whether the same is asked, and answered in the same words, as in another pool of the task."""
        return (self.reword, self.ask) == (other.reword, other.ask)

    @property
    def readable(self) -> tuple[int, ...]:
        """Everything the hypernetwork may read for this task."""
        return self.reads or self.descriptions


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
        by_category: Whether each category comes equally often, rather than each task.
        one_example: Whether a row holds a single example, because its adapter is written from that example's input.
        teacher_tokens: S; 0 for no teacher's rows.
        shots: Examples that a teacher's document shows before its own input, none with that input.
        relabel_unsaid: Whether rows are of a variant or a derived task also where the prompt does not show the
            description: not where nothing else reads it.
        made_up: Positions of texts that describe nothing.
        made_up_share: Share of rows that read one of them; their prompts and answers are the right ones.
        terse_share: Share of rows that read, and show in their prompts, a text that says next to nothing of the task.
        dropout: Share of rows whose adapter is the offset alone, as for no description at all.
        option_placement: Share of the rows of tasks with few answers whose inputs list these as options.
        source_weights: How often tasks of each source come, summing to 1; without them all tasks come alike.
        share_beginnings: Whether what a row's prompts begin with stands there once; without it, in each document.
        prompt: The run's setting; whether a prompt shows the description is drawn by `in_prompt`.

    Raises:
        DataError: if the tokenizer has no way to end an answer.
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
        by_category: bool = False,
        one_example: bool = False,
        teacher_tokens: int = 0,
        shots: int = 0,
        relabel_unsaid: bool = True,
        made_up: Sequence[int] = (),
        made_up_share: float = 0.0,
        terse_share: float = 0.0,
        dropout: float = 0.0,
        option_placement: float = 0.0,
        source_weights: Sequence[float] = (),
        share_beginnings: bool = True,
        prompt: PromptConfig | None = None,
    ) -> None:
        self.pools, self.texts, self.tokenizer = list(pools), list(texts), tokenizer
        self.rows, self.tokens, self.answer_tokens = rows, tokens, answer_tokens
        self.in_prompt, self.seed, self.one_example = in_prompt, seed, one_example
        self.teacher_tokens, self.shots = teacher_tokens, shots
        self.relabel_unsaid, self.prompt = relabel_unsaid, prompt or PromptConfig()
        self.made_up, self.made_up_share = made_up, made_up_share
        self.terse_share, self.dropout, self.option_placement = terse_share, dropout, option_placement
        self.share_beginnings = share_beginnings and not one_example
        self.candidates = 2 if one_example else CANDIDATES
        self.read = [frozenset(pool.readable) for pool in self.pools]
        self.groups = [list(range(len(self.pools)))]
        if by_category:
            found: dict[str, list[int]] = {}
            for number, pool in enumerate(self.pools):
                found.setdefault(pool.category or "", []).append(number)
            self.groups = [found[name] for name in sorted(found)]
        self.pattern = np.zeros(0, np.int64)
        if source_weights:
            of_source = [[n for n, p in enumerate(self.pools) if p.source == s] for s in range(len(source_weights))]
            if not all(of_source):
                raise DataError(
                    f"Source {[bool(x) for x in of_source].index(False)} has no task that can be trained on"
                )
            self.groups = of_source
            ends = np.round(np.cumsum(source_weights) * PATTERN).astype(int)
            self.pattern = np.searchsorted(ends, np.arange(PATTERN), side="right").clip(max=len(of_source) - 1)
        eos = tokenizer.eos_token
        if eos is None:
            raise DataError("The base model's tokenizer has no end-of-sequence token, so answers could not end")
        self.eos: str = eos

    def task_of_row(self, step: int, row: int) -> int:
        """Tasks come in shuffled order, each once before any comes again; so do categories, if they are drawn first."""
        turn, group, stream = step * self.rows + row, self.groups[0], 0
        if len(self.pattern):
            # Each block of the pattern is shuffled; a source's turn counts its places in this block and those before.
            block, place = divmod(turn, PATTERN)
            sources = self.pattern[self._shuffled(PATTERN, 10, block)]
            stream = int(sources[place])
            group = self.groups[stream]
            turn = block * int((self.pattern == stream).sum()) + int((sources[:place] == stream).sum())
            epoch, place = divmod(turn, len(group))
            return group[int(self._shuffled(len(group), 4, stream, epoch)[place])]
        if len(self.groups) > 1:
            turn, place = divmod(turn, len(self.groups))
            stream = int(self._shuffled(len(self.groups), 3, turn)[place])
            group = self.groups[stream]
        epoch, place = divmod(turn, len(group))
        key = (1, epoch) if len(self.groups) == 1 else (4, stream, epoch)
        return group[int(self._shuffled(len(group), *key)[place])]

    def _shuffled(self, number: int, *key: int) -> np.ndarray:
        return np.random.default_rng((self.seed, *key)).permutation(number)

    def _other(self, task: int, rng: np.random.Generator) -> int:
        """What may be read for another task and is not read for this one."""
        for number in rng.permutation(len(self.pools)):
            different = [text for text in self.pools[number].readable if text not in self.read[task]]
            if different:
                return int(rng.choice(different))
        return int(rng.choice(self.pools[task].readable))

    @property
    def readable(self) -> list[int]:
        """Everything that may be read for any task, its variants and what is derived of it, in order."""
        pools = [p for pool in self.pools for p in (pool, *pool.variants, *pool.derived)]
        return sorted({text for pool in pools for text in pool.readable})

    @property
    def told_apart(self) -> bool:
        """Whether for every task there is something to read that belongs to other tasks alone."""
        everything = frozenset[int]().union(*self.read)
        return all(everything - own for own in self.read)

    def __getitem__(self, step: int) -> Batch:
        """Builds the batch of a step."""
        rng, second = np.random.default_rng((self.seed, 0, step)), np.random.default_rng((self.seed, 2, step))
        answers = (self.rows, self.answer_tokens)
        laid = _Rows(self.rows, self.tokens, self.answer_tokens)
        labels, label_documents = np.zeros(answers, np.int64), np.full(answers, -1, np.int64)
        weights = np.zeros(answers, np.float32)
        tasks = [self.task_of_row(step, row) for row in range(self.rows)]
        others = [self._other(task, second) for task in tasks]
        partners = [int(second.choice(self.pools[task].readable)) for task in tasks]
        used_answers, count = [0] * self.rows, [0] * self.rows
        taught: list[_Document] = []
        skipped = 0
        pools = [self.pools[task] for task in tasks]
        shown = [int(rng.choice(pool.descriptions)) for pool in pools]
        prompts = [self.prompt.asked(bool(rng.random() < self.in_prompt)) for _ in pools]
        conditioning, in_place = self._conditioning(step, pools, shown)
        self._change(step, tasks, pools, shown, others, partners, prompts, conditioning)
        chosen = [pool.reads[0] if pool.reads else text for pool, text in zip(pools, shown, strict=True)]
        chosen = [text if other is None else other for text, other in zip(chosen, in_place, strict=True)]
        fourth = np.random.default_rng((self.seed, 9, step))
        listings = [
            Listing.drawn(fourth) if pool.options and fourth.random() < self.option_placement else None
            for pool in pools
        ]
        left = {row: list(rng.permutation(len(pool.examples))) for row, pool in enumerate(pools)}
        while left:  # a second time only for rows into which nothing drawn so far fits
            drawn = [(row, pick) for row, picks in left.items() for pick in picks[: self.candidates]]
            left = {row: picks[self.candidates :] for row, picks in left.items()}
            examples = [pools[row].examples[pick] for row, pick in drawn]
            posed = [pools[row].pose(e, rng) for (row, _), e in zip(drawn, examples, strict=True)]
            posed = [
                (
                    text if (listing := listings[row]) is None else placed(text, pools[row].options, fourth, listing),
                    said,
                )
                for (row, _), (text, said) in zip(drawn, posed, strict=True)
            ]
            rendered = [
                render(self.tokenizer, self.texts[shown[row]], text, prompts[row])
                for (row, _), (text, _) in zip(drawn, posed, strict=True)
            ]
            prompt_ids = token_ids(self.tokenizer, rendered)
            answer_ids = token_ids(self.tokenizer, [answer_text(answer, self.eos, self.prompt) for _, answer in posed])
            of_row: dict[int, list[list[int]]] = {row: [] for row in left}
            for (row, _), question in zip(drawn, prompt_ids, strict=True):
                of_row[row].append(question)
            begun = {row: _beginning(found) if self.share_beginnings else 0 for row, found in of_row.items()}
            for (row, pick), (text, _), question, answer in zip(drawn, posed, prompt_ids, answer_ids, strict=True):
                length = len(question) + len(answer) - 1  # the last answer token is only ever a label
                if length > self.tokens or len(answer) > self.answer_tokens:
                    skipped += 1
                    continue
                label = used_answers[row]
                label_end = label + len(answer)
                more = length - (begun[row] if count[row] else 0)
                full = laid.used[row] + more > self.tokens or label_end > self.answer_tokens
                if full or (self.one_example and count[row]):
                    continue
                if self.one_example:
                    chosen[row] = pools[row].reads[pick]
                laid.put(row, count[row], question, answer, label, begun[row])
                taught.append(_Document(row, count[row], int(pick), text, answer, label))
                labels[row, label:label_end] = answer
                label_documents[row, label:label_end] = count[row]
                weights[row, label:label_end] = 1 / len(answer)
                used_answers[row], count[row] = label_end, count[row] + 1
            left = {row: picks for row, picks in left.items() if picks and not count[row]}
        filled = np.array(count)
        if not filled.any():
            raise DataError(
                f"Step {step}: none of the drawn examples fits into {self.tokens} tokens with {self.answer_tokens} "
                "answer tokens; raise train.sequence_tokens or train.answer_tokens"
            )
        weights /= np.maximum(filled, 1)[:, None] * (filled > 0).sum()
        arrays = map(torch.from_numpy, (*laid.arrays, labels, label_documents, weights))
        texts = map(torch.tensor, (chosen, others, partners))
        teacher = self._teacher(step, taught, pools, shown, weights) if self.teacher_tokens else [NO_TEACHER] * 5
        shows = torch.tensor([prompt.description_in_prompt for prompt in prompts])
        return Batch._make([*arrays, *texts, shows, torch.tensor(conditioning), torch.tensor(skipped), *teacher])

    def _conditioning(self, step: int, pools: Sequence[Pool], shown: list[int]) -> tuple[list[int], list[int | None]]:
        """For each row what its adapter is written from, and a made-up text that is read in its description's place.

        A row with a terse text shows that text where its prompt shows the description.
        """
        kinds = [TOLD] * len(pools)
        in_place: list[int | None] = [None] * len(pools)
        if self.made_up:
            rng = np.random.default_rng((self.seed, 7, step))
            for row in range(len(pools)):
                if rng.random() < self.made_up_share:
                    kinds[row], in_place[row] = UNTOLD, int(rng.choice(self.made_up))
        rng = np.random.default_rng((self.seed, 8, step))
        for row, pool in enumerate(pools):
            draw = rng.random()
            if draw < self.dropout:
                kinds[row], in_place[row] = DROPPED, None
            elif draw < self.dropout + self.terse_share and pool.terse:
                kinds[row], in_place[row] = UNTOLD, None
                shown[row] = int(rng.choice(pool.terse))
        return kinds, in_place

    def _change(
        self,
        step: int,
        tasks: Sequence[int],
        pools: list[Pool],
        shown: list[int],
        others: list[int],
        partners: list[int],
        prompts: Sequence[PromptConfig],
        conditioning: Sequence[int],
    ) -> None:
        """Puts derived tasks and variants in the place of some rows' tasks, and their descriptions of what is shown.

        Not where neither adapter nor prompt would say what is asked, unless the input does. In half of these rows the
        other description is of the same task too, but of other answers.
        """
        rng = np.random.default_rng((self.seed, 6, step))
        for row, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
            own, terse = self.pools[task], shown[row] in self.pools[task].terse
            said = (self.relabel_unsaid and conditioning[row] == TOLD) or (prompt.description_in_prompt and not terse)
            derived = own.derived if said else tuple(pool for pool in own.derived if pool.self_contained)
            if derived and rng.random() < own.derived_share * len(derived) / len(own.derived):
                changed, near = derived, (own, *(pool for pool in own.derived if not pool.self_contained))
            elif own.variants and said and rng.random() < own.variant_share:
                changed = near = own.variants
            else:
                continue
            pools[row] = changed[int(rng.integers(len(changed)))]
            if not terse:
                shown[row] = int(rng.choice(pools[row].descriptions))
            if changed is derived:  # what is asked here, no text of the task itself says
                partners[row] = int(rng.choice(pools[row].descriptions))
            # Where the input says what is asked, the task's own texts do no harm.
            unlike = [] if pools[row].self_contained else [x for x in near if not x.like(pools[row])]
            if unlike and rng.random() < 0.5:
                others[row] = int(rng.choice(unlike[int(rng.integers(len(unlike)))].descriptions))

    def _teacher(
        self, step: int, documents: list["_Document"], pools: list[Pool], shown: list[int], weights: np.ndarray
    ) -> list[Tensor]:
        """The teacher's fields of a batch."""
        rng = np.random.default_rng((self.seed, 5, step))
        prompt = self.prompt.asked(True)
        rendered = [
            render(
                self.tokenizer,
                self.texts[shown[d.row]],
                d.input,
                prompt,
                examples=self._shown_before(pools[d.row], d.pick, rng),
            )
            for d in documents
        ]
        laid = _Rows(self.rows, self.teacher_tokens, self.answer_tokens)
        fits = np.zeros_like(weights)
        for d, question in zip(documents, token_ids(self.tokenizer, rendered), strict=True):
            if laid.used[d.row] + len(question) + len(d.answer) - 1 <= self.teacher_tokens:
                laid.put(d.row, d.number, question, d.answer, d.label)
                fits[d.row, d.label : d.label + len(d.answer)] = 1
        return list(map(torch.from_numpy, (*laid.arrays, weights * fits)))

    def _shown_before(self, pool: Pool, pick: int, rng: np.random.Generator) -> list[tuple[str, str]]:
        """Other examples' inputs and answers, no input twice; fewer than `shots` where the task has no more."""
        examples = pool.examples
        inputs, found = {examples[pick].input.strip()}, list[tuple[str, str]]()
        for number in rng.permutation(len(examples)):
            if len(found) == self.shots:
                break
            other = examples[number]
            if other.input.strip() not in inputs:
                inputs.add(other.input.strip())
                found.append(pool.pose(other, rng))
        return found

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


class _Document(NamedTuple):
    """Where a batch has a document."""

    row: int
    number: int
    pick: int
    """Its example's place in the task."""
    input: str
    """As it is posed."""
    answer: list[int]
    label: int
    """Where its answer's tokens begin among the row's."""


class _Rows:
    """Rows that documents are laid into one after another."""

    def __init__(self, rows: int, tokens: int, answer_tokens: int) -> None:
        self.tokens, self.positions = np.zeros((rows, tokens), np.int64), np.zeros((rows, tokens), np.int64)
        self.documents = np.full((rows, tokens), -1, np.int64)
        self.label_positions = np.zeros((rows, answer_tokens), np.int64)
        self.used = [0] * rows

    def put(self, row: int, number: int, question: list[int], answer: list[int], label: int, begun: int = 0) -> None:
        """Adds a document; the last answer token is only ever a label.

        `begun` tokens of its prompt are those that all documents of the row begin with.
        """
        if begun and not self.used[row]:
            self.tokens[row, :begun], self.positions[row, :begun] = question[:begun], np.arange(begun)
            self.documents[row, :begun] = SHARED
            self.used[row] = begun
        start, own = self.used[row], question[begun:]
        end = start + len(own) + len(answer) - 1
        self.tokens[row, start:end] = own + answer[:-1]
        self.positions[row, start:end] = begun + np.arange(end - start)
        self.documents[row, start:end] = number
        self.label_positions[row, label : label + len(answer)] = np.arange(start + len(own) - 1, end)
        self.used[row] = end

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """As in `Batch`: tokens, positions, documents, label positions."""
        return self.tokens, self.positions, self.documents, self.label_positions


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


def answer_text(answer: str, eos: str, prompt: PromptConfig) -> str:
    """An answer as it is trained on, its end included."""
    return spaced(answer.strip(), prompt.answer_space) + eos


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
