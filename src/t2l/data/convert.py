"""Rows of the Hub's data sets become rows of the packed files. Knows how tasks are laid out there.

`Lots-of-LoRAs/<task>` has one configuration with columns `input`, `output`, `id` and splits train, valid, test. `input`
is the whole prompt of Super-NaturalInstructions: `Definition: …`, examples, and after the words `Now complete the
following example -` the real input between `Input:` and `Output:`. `output` is a text or a list of right answers (cards
say text, files hold lists; both are read).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from t2l.data.benchmarks import Benchmark
from t2l.data.fetching import Fetched
from t2l.errors import DataError
from t2l.tasks import load_splits

LIMITS = {"train": 500, "validation": 60, "test": 100}
"""Examples kept of each split of a task."""
MAX_INPUT = 2000
"""Longer inputs, in characters, are left out."""
MARKER = "Now complete the following example"
SPLIT_NAMES = {"train": ("train",), "validation": ("valid", "validation"), "test": ("test",)}
# Which repeated input stays: what is scored must not be trained on.
PRECEDENCE = ("test", "validation", "train")


def _rows(dataset: str, fetched: Fetched, names: Sequence[str], columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of the first of these splits that is there; all columns must be."""
    split = next((name for name in names if name in fetched.splits), None)
    if split is None:
        raise DataError(f"{dataset}: there is no split '{names[0]}'; found {', '.join(fetched.splits)}")
    data = fetched.splits[split]
    for column in columns:
        if column not in data.column_names:
            raise DataError(
                f"{dataset}, split {split}: there is no column '{column}'; found {', '.join(data.column_names)}"
            )
    for number, row in enumerate(data):
        yield f"{dataset}, split {split}, row {number}", row


def read_prompt(text: str) -> tuple[str | None, str] | None:
    """(definition, input) of a Super-NaturalInstructions prompt; None if the text is not laid out as one."""
    head, found, tail = text.rpartition(MARKER)
    matched = re.match(r"\s*-?\s*Input:(.*)Output:\s*\Z", tail, re.DOTALL)
    if not found or matched is None:
        return None
    definition = re.split(r"\n\s*(?:Positive|Negative) Example \d+", head, maxsplit=1)[0].strip()
    return definition.removeprefix("Definition:").strip() or None, matched[1].strip()


@dataclass
class _Found:
    """An input with its answers, while repeats are merged."""

    id: str
    input: str
    outputs: dict[str, None]


@dataclass
class _Examples:
    """The examples of a task by split, and how many rows were left out for what reason."""

    kept: dict[str, dict[str, _Found]] = field(default_factory=lambda: {split: {} for split in PRECEDENCE})
    """Split to input to example."""
    definitions: Counter[str] = field(default_factory=Counter)
    available: int = 0
    blank: int = 0
    long: int = 0
    merged: int = 0

    def add(self, split: str, where: str, row: Any) -> None:
        """Takes a row; one whose input is there already only adds its answers, and only within a split."""
        self.available += 1
        definition, text, outputs = _read_row(where, row)
        if definition is not None:
            self.definitions[definition] += 1
        answers = dict.fromkeys(output for output in outputs if output.strip())
        owner = next((name for name, found in self.kept.items() if text in found), None)
        if not answers or not text:
            self.blank += 1
        elif len(text) > MAX_INPUT:
            self.long += 1
        elif owner is None:
            self.kept[split][text] = _Found(str(row["id"]), text, answers)
        else:
            self.merged += 1
            if owner == split:
                self.kept[split][text].outputs.update(answers)


def _read_row(where: str, row: Any) -> tuple[str | None, str, list[str]]:
    """(definition, input, answers) of a row."""
    outputs = [row["output"]] if isinstance(row["output"], str) else row["output"]
    if row["id"] is None:
        raise DataError(f"{where}: column 'id' is empty")
    if not isinstance(outputs, list) or not all(isinstance(text, str) for text in outputs):
        raise DataError(f"{where}: column 'output' holds {row['output']!r:.60}, expected a text or a list")
    read = read_prompt(row["input"]) if isinstance(row["input"], str) else None
    if read is None:
        raise DataError(
            f"{where}: column 'input' does not end in '{MARKER} - Input: … Output:'; found “{str(row['input'])[-80:]}”"
        )
    return *read, outputs


def convert_task(name: str, fetched: Fetched) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Packs a task.

    Args:
        name: Its name in Super-NaturalInstructions.
        fetched: The data set that holds it.

    Returns:
        Its row of the task table, and the rows of its examples.

    Raises:
        DataError: naming data set, split, column or row, if it is not laid out as expected.
    """
    dataset = str(fetched.origin["dataset"])
    found = _Examples()
    for split in PRECEDENCE:
        for where, row in _rows(dataset, fetched, SPLIT_NAMES[split], ("id", "input", "output")):
            found.add(split, where, row)
    examples = [
        {"task": name, "split": split, "id": one.id, "input": one.input, "outputs": list(one.outputs)}
        for split in LIMITS
        for one in _sample(list(found.kept[split].values()), LIMITS[split], lambda one: f"{name}:{one.id}")
    ]
    if not examples:
        raise DataError(
            f"{dataset}: none of its {found.available} rows can be used ({found.blank} blank, {found.long} too long)"
        )
    return _task_row(name, dataset, found, Counter(str(row["split"]) for row in examples)), examples


def _task_row(name: str, dataset: str, found: _Examples, counts: Counter[str]) -> dict[str, Any]:
    split, benchmark = _place(name)
    number = re.sub(r"\D.*", "", name.removeprefix("task"))
    definition = found.definitions.most_common(1)[0][0] if found.definitions else None
    return {
        "task": name,
        "num": number,
        "lol_name": f"lol_{number}",
        "lol_split": split,
        "definition": definition,
        "definition_source": None if definition is None else "Lots-of-LoRAs",
        "benchmark_overlap": benchmark,
        "descriptions": [],
        "data_source": dataset,
        "n_available": found.available,
        "n_train": counts["train"],
        "n_validation": counts["validation"],
        "n_test": counts["test"],
        "n_dropped_long": found.long,
        "n_merged_dup": found.merged,
        # What the Hub does not have.
        **dict.fromkeys(("summary", "category", "domain", "source")),
    }


def _sample(rows: list[Any], limit: int | None, key: Callable[[Any], str]) -> list[Any]:
    """At most `limit` rows, the same ones on every machine, in their own order."""
    if limit is None or len(rows) <= limit:
        return rows
    order = sorted(range(len(rows)), key=lambda i: hashlib.sha256(key(rows[i]).encode()).digest())
    return [rows[i] for i in sorted(order[:limit])]


def _place(name: str) -> tuple[str, str | None]:
    """(`lol_split`, `benchmark_overlap`), as far as the frozen split of this package knows them: the Hub does not."""
    splits = load_splits()
    if name in splits.validation:
        return "validation", None
    reason = splits.excluded.get(name, "")
    if overlaps := re.search(r"overlaps benchmark (\S+)", reason):
        return ("removed" if reason.startswith("removed") else "train"), overlaps[1]
    return ("train" if name in splits.train else "other"), None


def convert_benchmark(name: str, benchmark: Benchmark, fetched: Fetched) -> list[dict[str, Any]]:
    """Packs a benchmark.

    Args:
        name: Its name here.
        benchmark: How its rows are laid out.
        fetched: The data set that holds it.

    Returns:
        Packed rows.

    Raises:
        DataError: naming data set, split, column or row, if it is not laid out as expected.
    """
    rows, dataset = [], str(fetched.origin["dataset"])
    for split, theirs in benchmark.splits:
        found = []
        for number, (where, row) in enumerate(_rows(dataset, fetched, (theirs,), benchmark.columns)):
            for column in benchmark.columns:  # one that only some files have comes as empty
                if row[column] is None:
                    raise DataError(f"{where}: column '{column}' is empty")
            try:
                one = benchmark.convert(row)
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise DataError(f"{where} is not laid out as expected: {type(error).__name__}: {error}") from error
            code = one.get("code")
            found.append(
                {
                    "benchmark": name,
                    "split": split,
                    "id": f"{name}:{split}:{one.get('id', number)}",
                    "input": one["input"],
                    "choices": one["choices"],
                    "answer": one["answer"],
                    "code": None if code is None else json.dumps(code, ensure_ascii=False),
                }
            )
        rows += _sample(found, benchmark.train_limit if split == "train" else None, lambda row: str(row["id"]))
    return rows
