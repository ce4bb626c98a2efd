"""Tasks: descriptions and examples, from the packed files or from the user's own, and who may train on which.

Knows files of tasks and the frozen split. Knows nothing of training, evaluation or models.
"""

import difflib
import os
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from t2l.encoder import check_description
from t2l.errors import DataError, DescriptionError
from t2l.io import parse_json, read_json_lines
from t2l.parquet import reading_parquet, require_pyarrow

SPLITS = ("train", "val", "test")
PACKED_LISTS = ("descriptions", "outputs", "choices")
"""Columns of packed files that hold lists of texts."""
PACKED_OPTIONAL = ("definition", "summary", "category", "code", "lol_split")
"""Columns of packed files that may lack values."""


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
    definition: str | None = None
    """Which of the descriptions is the task's full definition, where it has one."""
    source: str = ""
    """Where the task comes from, if training mixes several sources; blank for the main one."""


@dataclass(frozen=True)
class Splits:
    """The frozen split of the SNI tasks, chosen before any training."""

    train: frozenset[str]
    validation: frozenset[str]
    test: frozenset[str]
    test_unseen_category: frozenset[str]
    """Those of `test` whose category has no training task."""
    excluded: dict[str, str]
    """Task to reason."""
    held_back: frozenset[str]
    """Those of `train` that a hypernetwork is not trained on, so that settings can be chosen on them; see
    research/zero_shot_protocol.md. They are no test: a library of task LoRAs may hold them."""


@cache
def load_splits() -> Splits:
    """Reads the frozen split that ships with the package."""
    data = shipped_data("splits")
    return Splits(
        train=frozenset(data["train"]),
        validation=frozenset(data["validation"]),
        test=frozenset(data["test"]),
        test_unseen_category=frozenset(data["test_unseen_category"]),
        excluded=data["excluded"],
        held_back=frozenset(shipped_data("held_back")["held_back"]),
    )


def written_descriptions(what: Literal["benchmarks", "choosing", "test"]) -> dict[str, tuple[str, ...]]:
    """Reads the descriptions that were written by hand for evaluation and are never trained on.

    Args:
        what: `test` for the frozen split's test tasks, `choosing` for the validation and held-back tasks, on which
            settings are chosen, `benchmarks` for the ten benchmarks.

    Returns:
        Task or benchmark to its three descriptions: a short one, a usual one, a detailed one.

    Raises:
        DataError: if `what` is none of these.
    """
    files = {kind: f"{kind.removesuffix('s')}_descriptions" for kind in ("benchmarks", "choosing", "test")}
    if what not in files:
        raise DataError(f"There are written descriptions of {', '.join(files)}, not of {what!r}")
    return {name: tuple(texts) for name, texts in shipped_data(files[what]).items()}


def shipped_data(name: str) -> dict[str, Any]:
    """The JSON file `data/{name}.json` of this package."""
    return parse_json(resources.files("t2l.data").joinpath(f"{name}.json").read_bytes(), f"{name}.json", DataError)


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
        raise DataError(
            "T2L_DATA is not set: this needs the packed data. `t2l data build` makes them; then let T2L_DATA name "
            "their folder"
        )
    folder = Path(value)
    if not (folder / "sni_tasks.parquet").is_file():
        raise DataError(f"T2L_DATA={value} holds no sni_tasks.parquet; `t2l data build` makes it")
    return folder


def read_parquet(path: Path, columns: Sequence[str]) -> Any:
    """Some columns of a packed file, as a pyarrow table.

    Raises:
        DataError: if pyarrow or the file is missing, or the file is damaged or lacks a column.
    """
    require_pyarrow(f"Reading {path.name}", "train")
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path} is missing; `t2l data build` makes it")
    with reading_parquet(path, "`t2l data build` makes it anew"):
        present = pq.read_schema(path).names
        table = None if set(columns) - set(present) else pq.read_table(path, columns=list(columns))
    if table is None:
        raise DataError(
            f"{path} is of another kind: it has the columns {', '.join(present)}, expected are {', '.join(columns)}; "
            "`t2l data build` makes it anew"
        )
    for column in columns:
        _require_kind(path, column, table[column])
    return table


def _require_kind(path: Path, column: str, values: Any) -> None:
    """Checks a packed column's type, and that nothing is missing where everything must be there."""
    import pyarrow as pa

    tests = {"texts": pa.types.is_list, "number": pa.types.is_integer, "text": pa.types.is_string}
    expected = "texts" if column in PACKED_LISTS else "number" if column.startswith("n_") else "text"
    if not tests[expected](values.type) and not (pa.types.is_null(values.type) and column in PACKED_OPTIONAL):
        raise DataError(f"{path}: column {column} has type {values.type}, expected {expected}")
    if values.null_count and column not in PACKED_OPTIONAL:
        raise DataError(f"{path}: column {column} lacks {values.null_count} values; `t2l data build` makes it anew")


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
    return _load_packed("sni", names, splits=splits, folder=folder or data_dir())


def load_t0() -> list[Task]:
    """Reads all packed T0 training tasks in `T2L_DATA`, in the order of their names; they have no test examples.

    Raises:
        DataError: if files are missing.
    """
    folder = data_dir()
    if not (folder / "t0_tasks.parquet").is_file():
        raise DataError(
            f"{folder} holds no t0_tasks.parquet; take 't0' out of data.extra_tasks or point T2L_DATA to it"
        )
    return _load_packed("t0", None, splits=("train", "val"), folder=folder)


def load_everyday() -> list[Task]:
    """Reads the thirty everyday tasks that ship with the package: one description and ten test examples each."""
    with resources.as_file(resources.files("t2l.data").joinpath("everyday.jsonl")) as path:
        return load_jsonl(path)


def _load_packed(files: str, names: Collection[str] | None, *, splits: Sequence[str], folder: Path) -> list[Task]:
    """Reads tasks from the packed files whose names begin with `files`; all of them if no names are given."""
    require_pyarrow(f"Reading {folder}", "train")
    with reading_parquet(f"A packed file of {folder}", "`t2l data build` makes it anew"):
        return _read_packed(files, names, splits=splits, folder=folder)


def _read_packed(files: str, names: Collection[str] | None, *, splits: Sequence[str], folder: Path) -> list[Task]:
    columns = ("task", "definition", "summary", "descriptions", "category")
    rows = {row["task"]: row for row in read_parquet(folder / f"{files}_tasks.parquet", columns).to_pylist()}
    wanted = sorted(rows if names is None else set(names))
    unknown = [name for name in wanted if name not in rows]
    if unknown:
        raise DataError(f"{folder} has no task {', '.join(unknown[:5])}")
    examples: dict[str, dict[str, list[Example]]] = {name: defaultdict(list) for name in wanted}
    for split in splits:
        import pyarrow as pa
        import pyarrow.compute as pc

        parts = ("task", "id", "input", "outputs")
        table = read_parquet(folder / f"{files}_{split}.parquet", parts)
        table = table.filter(pc.is_in(table["task"], value_set=pa.array(wanted, pa.string())))
        for task, id_, text, outputs in zip(*(table[part].to_pylist() for part in parts), strict=True):
            examples[task][split].append(Example(id_, text, tuple(outputs)))
    return [
        Task(
            name=name,
            descriptions=_descriptions(rows[name]),
            examples={split: tuple(found) for split, found in examples[name].items()},
            category=rows[name]["category"],
            definition=(rows[name]["definition"] or "").strip() or None,
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
    return _collect(((where, str(number), row) for where, number, row in read_json_lines(path)), str(path))


def load_own(source: str | Path) -> list[Task]:
    """Reads a user's own tasks from wherever they are.

    Args:
        source: A JSONL file as `load_jsonl` reads it, a folder of `*.jsonl` files, or `hf:NAME[:config]`, a data set
            for the `datasets` library with columns task, description, input and output.

    Raises:
        DataError: naming file and line, or data set, column and row.
    """
    if str(source).startswith("hf:"):
        return _collect(_hub_rows(str(source)), str(source))
    path = Path(source)
    if not path.is_dir():
        return load_jsonl(path)
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise DataError(f"{path} is a folder without *.jsonl files")
    rows = ((where, f"{file.stem}-{number}", row) for file in files for where, number, row in read_json_lines(file))
    return _collect(rows, str(path))


def load_descriptions(path: Path) -> dict[str, tuple[str, ...]]:
    """Reads further descriptions of tasks, one task a line: an object with `task` and `description` (a list).

    Raises:
        DataError: naming file and line.
    """
    found: dict[str, dict[str, None]] = {}
    for where, _, row in read_json_lines(path):
        if not isinstance(row, dict) or row.keys() != {"task", "description"}:
            raise DataError(f"{where} must be an object with task and description")
        texts = [row["description"]] if isinstance(row["description"], str) else row["description"]
        if not isinstance(row["task"], str) or not isinstance(texts, list) or not texts:
            raise DataError(f"{where}: task must be text, description a text or a list of texts")
        try:
            found.setdefault(row["task"], {}).update(dict.fromkeys(check_description(text) for text in texts))
        except DescriptionError as error:
            raise DataError(f"{where}: {error}") from error
    if not found:
        raise DataError(f"{path} holds no descriptions")
    return {name: tuple(texts) for name, texts in found.items()}


def _hub_rows(reference: str) -> Iterator[tuple[str, str, Any]]:
    """The rows of a data set; its splits are ours unless it has a column that says so."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{reference} needs the library datasets: pip install 'text-to-lora[data]'") from error
    name, _, config = reference.removeprefix("hf:").partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # no data set, no network, no such configuration: half a dozen unrelated types
        raise DataError(f"Cannot load {reference}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    ours = {"valid": "val", "validation": "val", "dev": "val"}
    for split, data in loaded.items():
        for column in ("task", "description", "input", "output"):
            if column not in data.column_names:
                raise DataError(
                    f"{reference}, split {split}: there is no column '{column}'; found {', '.join(data.column_names)}"
                )
        wanted = [c for c in ("task", "description", "input", "output", "split") if c in data.column_names]
        for number, row in enumerate(data.select_columns(wanted)):
            yield (
                f"{reference}, split {split}, row {number}",
                f"{split}-{number}",
                {"split": ours.get(split, split), **row},
            )


def _collect(rows: Iterable[tuple[str, str, Any]], source: str) -> list[Task]:
    """Tasks from (where, a part of the example's id, the row), each row checked."""
    descriptions: dict[str, dict[str, None]] = {}
    examples: dict[str, dict[str, list[Example]]] = {}
    for where, number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where} must be an object with task, description, input and output")
        unknown = row.keys() - {"task", "description", "input", "output", "split"}
        missing = {"task", "description", "input", "output"} - row.keys()
        if unknown or missing:
            kinds = (("missing", missing), ("unknown", unknown))
            near = {key: difflib.get_close_matches(key, sorted(missing), n=1) for key in sorted(unknown)}
            hints = "".join(f"; is {key!r} meant to be '{found[0]}'?" for key, found in near.items() if found)
            wrong = [f"{what} keys {', '.join(sorted(keys))}" for what, keys in kinds if keys]
            raise DataError(f"{where}: {' and '.join(wrong)}{hints}")
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
        raise DataError(f"{source} holds no examples")
    return [
        Task(name, tuple(descriptions[name]), {split: tuple(e) for split, e in examples[name].items()})
        for name in sorted(examples)
    ]


def made_up_words(draw: random.Random, *, words: tuple[int, int], letters: tuple[int, int]) -> list[str]:
    """Words that mean nothing: as many, and each as long, as the two ranges say; the control for any description."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(draw.choices(alphabet, k=draw.randint(*letters))) for _ in range(draw.randint(*words))]


def as_sentence(words: Sequence[str]) -> str:
    """Words with a capital first and a full stop last."""
    return " ".join(words).capitalize() + "."
