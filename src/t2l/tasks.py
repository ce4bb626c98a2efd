"""Tasks: descriptions and examples, from the packed files or from the user's own, and who may train on which.

Knows files of tasks and the frozen split. Knows nothing of training, evaluation or models.
"""

import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from t2l.encoder import check_description
from t2l.errors import DataError, DescriptionError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Example:
    """One input with its right answers."""

    id: str
    input: str
    outputs: tuple[str, ...]
    """Any of them is right."""


@dataclass(frozen=True)
class Task:
    """A task as a person would describe it, with examples by split."""

    name: str
    descriptions: tuple[str, ...]
    """Ways to say what the task is, the one-line summary and the full definition among them."""
    examples: dict[str, tuple[Example, ...]]
    category: str | None = None


@dataclass(frozen=True)
class Splits:
    """The frozen split of the SNI tasks, chosen before any training."""

    train: frozenset[str]
    validation: frozenset[str]
    test: frozenset[str]
    excluded: dict[str, str]
    """Task to reason."""


@cache
def load_splits() -> Splits:
    """Reads the frozen split that ships with the package."""
    data = json.loads(resources.files("t2l.data").joinpath("splits.json").read_text(encoding="utf-8"))
    return Splits(frozenset(data["train"]), frozenset(data["validation"]), frozenset(data["test"]), data["excluded"])


def require_trainable(names: Iterable[str]) -> None:
    """Every trainer calls this first.

    Raises:
        DataError: if a name is a test, validation or excluded task of the frozen split.
    """
    splits = load_splits()
    reasons = dict.fromkeys(splits.test, "it is a zero-shot test task")
    reasons |= dict.fromkeys(splits.validation, "it is a validation task")
    reasons |= {name: f"it is excluded: {why}" for name, why in splits.excluded.items()}
    refused = [f"{name} ({reasons[name]})" for name in names if name in reasons]
    if refused:
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise DataError(f"Tasks that may not be trained on: {', '.join(refused[:5])}{more}. Take them out of the data")


def data_dir() -> Path:
    """The folder of the packed files, from `T2L_DATA`.

    Raises:
        DataError: if the variable is unset or the folder lacks the files.
    """
    value = os.environ.get("T2L_DATA")
    if not value:
        raise DataError("T2L_DATA is not set; point it to the folder that holds sni_tasks.parquet and its companions")
    folder = Path(value)
    if not (folder / "sni_tasks.parquet").is_file():
        raise DataError(f"T2L_DATA={value} holds no sni_tasks.parquet")
    return folder


def load_sni(names: Collection[str], *, splits: Sequence[str] = SPLITS, folder: Path | None = None) -> list[Task]:
    """Reads packed Super-NaturalInstructions tasks.

    Args:
        names: Tasks to read.
        splits: Which examples to read.
        folder: Where the files are; `T2L_DATA` if not given.

    Returns:
        The tasks in the order of their names.

    Raises:
        DataError: if files or tasks are missing.
    """
    try:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError("Reading packed tasks needs pyarrow: pip install 't2l[train]'") from error

    folder = folder or data_dir()
    wanted = sorted(set(names))
    rows = {row["task"]: row for row in pq.read_table(folder / "sni_tasks.parquet").to_pylist()}
    unknown = [name for name in wanted if name not in rows]
    if unknown:
        raise DataError(f"{folder} has no task {', '.join(unknown[:5])}")
    examples: dict[str, dict[str, list[Example]]] = {name: defaultdict(list) for name in wanted}
    for split in splits:
        table = pq.read_table(folder / f"sni_{split}.parquet", columns=["task", "id", "input", "outputs"])
        import pyarrow as pa

        table = table.filter(pc.is_in(table["task"], value_set=pa.array(wanted)))
        columns = [table[c].to_pylist() for c in ("task", "id", "input", "outputs")]
        for task, id_, text, outputs in zip(*columns, strict=True):
            examples[task][split].append(Example(id_, text, tuple(outputs)))
    return [
        Task(
            name=name,
            descriptions=_descriptions(rows[name]),
            examples={split: tuple(found) for split, found in examples[name].items()},
            category=rows[name]["category"],
        )
        for name in wanted
    ]


def _descriptions(row: dict[str, Any]) -> tuple[str, ...]:
    """Definition and summary first, then the paraphrases; repeats and blanks left out, order kept."""
    found = [row["definition"], row["summary"], *row["descriptions"]]
    return tuple(dict.fromkeys(text.strip() for text in found if text and text.strip()))


def held_out_descriptions(task: Task, number: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(for training, held out): the last `number` paraphrases are never trained on, if enough others remain."""
    keep = len(task.descriptions) - number
    if number == 0 or keep < 2 * number:
        return task.descriptions, ()
    return task.descriptions[:keep], task.descriptions[keep:]


def load_jsonl(path: Path) -> list[Task]:
    """Reads a user's own tasks, one example a line.

    Each line is an object with `task`, `description` (text or a list of texts), `input`, `output` (text or a list
    of right answers) and optionally `split` (train, val or test; train if absent).

    Raises:
        DataError: naming file and line.
    """
    descriptions: dict[str, dict[str, None]] = {}
    examples: dict[str, dict[str, list[Example]]] = {}
    try:
        # Not `splitlines`, which also cuts at signs that may stand inside a JSON text, such as U+2028.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read tasks from {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} must be an object with task, description, input and output")
        unknown = row.keys() - {"task", "description", "input", "output", "split"}
        missing = {"task", "description", "input", "output"} - row.keys()
        if unknown or missing:
            raise DataError(f"{where}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}")
        split = row.get("split", "train")
        if split not in SPLITS:
            raise DataError(f"{where}: split is {split!r}, expected one of {', '.join(SPLITS)}")
        outputs = [row["output"]] if isinstance(row["output"], str) else row["output"]
        texts = [row["description"]] if isinstance(row["description"], str) else row["description"]
        if not isinstance(outputs, list) or not outputs or not all(isinstance(o, str) and o.strip() for o in outputs):
            raise DataError(f"{where}: output must be text or a list of texts, none of them blank")
        if not isinstance(texts, list) or not texts:
            raise DataError(f"{where}: description must be text or a list of texts")
        if not isinstance(row["input"], str) or not isinstance(row["task"], str):
            raise DataError(f"{where}: task and input must be text")
        try:
            known = descriptions.setdefault(row["task"], {})
            known.update(dict.fromkeys(check_description(text) for text in texts))
        except DescriptionError as error:
            raise DataError(f"{where}: {error}") from error
        found = examples.setdefault(row["task"], {}).setdefault(split, [])
        found.append(Example(f"{row['task']}-{number}", row["input"], tuple(outputs)))
    if not examples:
        raise DataError(f"{path} holds no examples")
    return [
        Task(name, tuple(descriptions[name]), {split: tuple(e) for split, e in examples[name].items()})
        for name in sorted(examples)
    ]
