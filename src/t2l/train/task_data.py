"""The tasks of a run of `t2l train task-loras`: which they are, their examples as tokens, and the rows of every step.

Knows tasks, tokenizers, rows and settings. Knows no models and no adapters.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from t2l.errors import ConfigError, DataError
from t2l.names import require_folder_names
from t2l.tasks import Example, Task, data_dir, load_own, load_sni, load_splits, read_parquet, require_trainable
from t2l.train.packing import PackedRows, Stream, TaskDocuments, fixed_rows, pack, tokenize_examples
from t2l.train.slots import StepSizes, step_sizes
from t2l.train.task_config import TaskLorasConfig

Benchmarks = Callable[[], Sequence[Task]]
"""Gives the benchmarks' tasks; they belong to evaluation, which training does not know."""


@dataclass(frozen=True)
class TaskData:
    """One task, tokenised."""

    task: Task
    train: TaskDocuments
    validation: TaskDocuments

    def facts(self) -> dict[str, Any]:
        """Returns what the library remembers of the task."""
        return {
            "descriptions": list(self.task.descriptions),
            "examples": len(self.train.variants),
            "validation_examples": len(self.validation.variants),
            "too_long": self.train.too_long,
        }

    def stream(self, config: TaskLorasConfig) -> Stream:
        """Returns the rows that the task is trained on, from the first one."""
        train = config.train
        return Stream(
            self.task.name,
            self.train,
            tokens=train.max_seq_length,
            answer_tokens=train.max_target_length,
            seed=config.seed,
        )


def load_tasks(config: TaskLorasConfig, benchmarks: Benchmarks | None = None) -> list[Task]:
    """Returns the tasks of a run in the order of their names.

    Raises:
        DataError: if data are missing, a task's name cannot be a folder's, or a task may not be trained on (unless
            `for_evaluation_only`), naming it.
        ConfigError: if there is no such source.
    """
    data = config.data
    found: dict[str, Task] = {}
    for source in data.tasks:
        found |= {task.name: task for task in _load_source(source, data.only, benchmarks)}
    unknown = [name for name in data.only if name not in found]
    if unknown:
        raise DataError(f"data.only: {', '.join(unknown[:5])} is not in {', '.join(data.tasks)}")
    names = sorted(data.only or found)
    require_folder_names(names, "a task", DataError)  # each adapter is written to a folder of its task's name
    if not config.for_evaluation_only:
        require_trainable(names)
    return [found[name] for name in names]


def _load_source(source: str, only: Sequence[str], benchmarks: Benchmarks | None) -> Sequence[Task]:
    """The tasks of one source; of Super-NaturalInstructions those of `only` alone, for reading them all takes long."""
    if source == "benchmarks":
        if benchmarks is None:
            raise ConfigError("data.tasks names the benchmarks, but this caller does not provide them")
        return [task for task in benchmarks() if task.examples.get("train")]
    if not source.startswith("sni"):
        return load_own(source)
    splits = load_splits()
    names = {"sni": splits.train, "sni-validation": splits.validation, "sni-test": splits.test}
    if source == "sni-paper":
        chosen = splits.train & _paper_tasks()
    elif source in names:
        chosen = names[source]
    else:
        raise ConfigError(f"data.tasks: there is no '{source}'; known are sni-paper, {', '.join(names)}")
    wanted = chosen & set(only) if only else chosen
    return load_sni(sorted(wanted), splits=("train", "val")) if wanted else []


def _paper_tasks() -> set[str]:
    """Names of the paper's training tasks, as the packed files mark them."""
    table = read_parquet(data_dir() / "sni_tasks.parquet", ("task", "lol_split"))
    return {row["task"] for row in table.to_pylist() if row["lol_split"] == "train"}


def tokenize_tasks(tasks: Sequence[Task], config: TaskLorasConfig, tokenizer: Any, *, gap: int = 0) -> list[TaskData]:
    """Tokenises the training and validation examples of tasks, for rows with a gap between documents.

    Raises:
        DataError: naming every task without an example that fits into a row.
    """
    train = config.train

    def tokenized(task: Task, examples: Sequence[Example], *, first_answer: bool) -> TaskDocuments:
        return tokenize_examples(
            task,
            examples,
            tokenizer,
            config.prompt,
            tokens=train.max_seq_length,
            answer_tokens=train.max_target_length,
            seed=config.seed,
            first_answer=first_answer,
            gap=gap,
        )

    result, empty = [], []
    for task in tasks:
        examples, validation = _split(task, config)
        data = TaskData(
            task,
            tokenized(task, examples, first_answer=False),
            tokenized(task, validation, first_answer=True),
        )
        if data.train.variants and data.validation.variants:
            result.append(data)
        else:
            part, tried = ("validation", validation) if data.train.variants else ("training", examples)
            empty.append(f"{task.name} (no {part} example of {len(tried)})")
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise DataError(
            f"Tasks without an example that fits into train.max_seq_length ({train.max_seq_length}) and "
            f"train.max_target_length ({train.max_target_length}): {', '.join(empty[:5])}{more}. Raise them, or take "
            "those tasks out"
        )
    if not result:
        raise DataError("There are no tasks to train")
    return result


def _split(task: Task, config: TaskLorasConfig) -> tuple[list[Example], list[Example]]:
    """A task's training and validation examples; some of training are drawn for validation where it has none."""
    examples = list(task.examples.get("train", ()))
    validation = list(task.examples.get("val", ()))
    if validation:
        return examples, validation
    rng = np.random.default_rng((config.seed, 4, zlib.crc32(task.name.encode())))
    kept = set(rng.permutation(len(examples))[: min(config.data.validation_examples, len(examples) // 5)])
    validation = [example for i, example in enumerate(examples) if i in kept]
    return [example for i, example in enumerate(examples) if i not in kept], validation


# ------------------------------------------------------------------------------------------------- rows of slots


@dataclass
class Running:
    """A task in a slot."""

    data: TaskData
    stream: Stream
    step: int = 0
    start_loss: float = float("nan")
    start_exact_match: float = float("nan")
    best_loss: float = float("inf")
    best_exact_match: float = 0.0
    best_step: int = 0
    patience_count: int = 0
    """How many evaluations there were since the best weights were seen."""
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """Returns what a saved state holds of it."""
        own = {name: value for name, value in vars(self).items() if name not in ("data", "stream")}
        return own | {"name": self.data.task.name, "epoch": self.stream.epoch, "place": self.stream.place}


@dataclass
class Segment:
    """The steps until the next evaluation, laid out at once."""

    rows: PackedRows
    """Of all steps, one after another, and of the slots that were asked for."""
    sizes: list[StepSizes]
    """Of each step, and of the same slots."""
    places: list[list[tuple[int, int] | None]]
    """Where each slot's rows stand before each step, to go back to if the segment is broken off."""
    tokens: int
    """Tokens that are trained on; padding is not counted."""


def lay_out_segment(
    slots: Sequence[Running | None],
    config: TaskLorasConfig,
    done: int,
    nothing: TaskDocuments,
    device: torch.device,
    own: Sequence[int] | None = None,
) -> Segment:
    """Draws the rows of all steps until the next evaluation; after a segment that was broken off, of those left of it.

    Args:
        slots: The tasks in training; None for an empty slot.
        config: Settings.
        done: Steps of the run that were taken before.
        nothing: Documents of any task, none of which stands in an empty slot's rows.
        device: Where the rows are needed.
        own: The slots whose rows are laid out; all of them, if absent. The others' only go by.
    """
    train = config.train
    own = range(len(slots)) if own is None else own
    steps: list[list[int | None]] = []
    places: list[list[tuple[int, int] | None]] = []
    listed: list[tuple[TaskDocuments, Sequence[int]]] = []
    groups: list[int] = []
    rows = range(train.rows_per_task)
    for e in range(train.eval_steps - done % train.eval_steps):
        steps.append([None if running is None else running.step + e for running in (slots[n] for n in own)])
        places.append([None if running is None else (running.stream.epoch, running.stream.place) for running in slots])
        for slot, running in enumerate(slots):
            found = [(nothing, []) if running is None else (running.data.train, running.stream.row()) for _ in rows]
            if slot in own:
                listed += found
                groups += [e * len(own) + own.index(slot)] * len(found)
    packed = pack(listed, tokens=train.max_seq_length, answer_tokens=train.max_target_length, groups=groups)
    tokens = int((packed.documents >= 0).sum())
    return Segment(packed.to(device), step_sizes(steps, train, device), places, tokens)


def validation_batches(
    slots: Sequence[Running | None],
    config: TaskLorasConfig,
    nothing: TaskDocuments,
    device: torch.device,
    own: Sequence[int] | None = None,
) -> list[PackedRows]:
    """Lays out slots' validation rows as batches of a training step's shape; arguments as above.

    There are as many batches whichever slots are asked for.
    """
    own = range(len(slots)) if own is None else own
    train = config.train
    tokens, answer_tokens = train.max_seq_length, train.max_target_length
    stores = [nothing if running is None else running.data.validation for running in slots]
    chosen = [
        [] if running is None else fixed_rows(store, tokens=tokens, answer_tokens=answer_tokens, limit=train.eval_rows)
        for running, store in zip(slots, stores, strict=True)
    ]
    batches = []
    for start in range(0, max(map(len, chosen)), train.rows_per_task):
        places = range(start, start + train.rows_per_task)
        listed = [
            (store, found[i] if i < len(found) else [])
            for store, found in ((stores[n], chosen[n]) for n in own)
            for i in places
        ]
        rows = pack(listed, tokens=tokens, answer_tokens=answer_tokens, groups=[0] * len(listed))
        batches.append(rows.to(device))
    return batches
