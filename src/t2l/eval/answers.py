"""Files of answers: a first line of facts about the run, then one line an answer. Knows JSON lines and nothing else."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2l.errors import ConfigError, DataError, OutputError
from t2l.io import parse_json, read_whole, regular_file, write_text

FORMAT_VERSION = 3
MAX_BYTES = 1 << 30
Key = tuple[str, str, int, str, str]
"""Suite, condition, seed, task and id of an answer."""
RUN_FACTS = (
    "base",
    "base_revision",
    "backend",
    "served_model",
    "dtype",
    "per_task",
    "held_out",
    "max_new_tokens",
)
"""Facts that must be equal in all files of one table."""
SEED_FACTS = ("checkpoint_sha256", "multitask_sha256", "hyperdecoders_sha256", "library_sha256")
"""Facts that are equal in all files that share a seed: what is compared within a seed has the same weights."""
HEADER_TYPES: dict[str, type | tuple[type, ...]] = {
    "base": str,
    "base_revision": str,
    "backend": str,
    "dtype": str,
    "versions": dict,
    "seeds": list,
    "conditions": list,
    "left_out": dict,
    "suites": dict,
    "checkpoint_sha256": (str, type(None)),
    "multitask_sha256": (str, type(None)),
    "hyperdecoders_sha256": (str, type(None)),
}
"""What a report needs of a file's first line."""
FACTS = ("format_version", *RUN_FACTS, *SEED_FACTS, "versions")
"""Facts that must be equal when a run goes on with a file."""


@dataclass(frozen=True)
class AnswerFile:
    """A file's facts and answers."""

    path: Path
    header: dict[str, Any]
    lines: list[dict[str, Any]]


def key_of(line: Mapping[str, Any]) -> Key:
    """The parts of a line that tell its answer from all others."""
    return line["suite"], line["condition"], line["seed"], line["task"], line["id"]


def read(path: Path) -> AnswerFile:
    """Reads a file of answers, plain or `.gz`.

    Raises:
        DataError: if it is no such file, naming the line, or holds an answer twice.
    """
    data = read_whole(path, DataError, limit=MAX_BYTES)
    try:
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(data)) as unpacked:
                data = unpacked.read(MAX_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read answers from {path}: {error}") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{path} unpacks to more than the {MAX_BYTES >> 20} MiB of answers that are read")
    first, *rows = text.split("\n")
    if not text:
        raise DataError(f"{path} is empty; `t2l eval run` writes files of answers")
    header = _header(path, first)
    if not text.endswith("\n"):
        raise DataError(f"{path}: its last line is cut off; run the same command again to finish it")
    lines, seen = [], set[Key]()
    for number, row in enumerate(rows[:-1], start=2):
        try:
            line = parse_json(row, f"{path}:{number}", DataError)
            _check_line(line)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}:{number} is not a line of a file of answers: {_reason(error)}") from error
        key = key_of(line)
        if key in seen:
            raise DataError(f"{path} holds two answers of {key}")
        seen.add(key)
        lines.append(line)
    return AnswerFile(path, header, lines)


def _reason(error: Exception) -> str:
    """What is wrong with a line, in words; Python's own would be about subscripts."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return f"{error!s:.300}" if isinstance(error, ValueError) else "a value is of another type"


def _header(path: Path, row: str) -> dict[str, Any]:
    """Reads the facts in a file's first line, and checks that they are complete and of the right types."""
    try:
        header = parse_json(row, f"{path}:1", DataError)["run"]
        version = header["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}:1 is not a line of a file of answers, which `t2l eval run` writes: {_reason(error)}"
        ) from error
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format_version is {version!r:.50}, this version of t2l reads {FORMAT_VERSION}")
    for fact, kind in HEADER_TYPES.items():
        if not isinstance(header.get(fact), kind):
            raise DataError(f"{path}:1 says {fact} is {header.get(fact)!r:.100}, which is of another type")
    for suite, facts in header["suites"].items():
        if not isinstance(facts, dict) or not all(_are_shares(facts.get(part, {})) for part in ("chance", "floor")):
            raise DataError(f"{path}:1 does not say of suite {suite} what guessing gives")
        if not _are_questions(facts.get("questions", [])):
            raise DataError(f"{path}:1 has questions of suite {suite} that are no lists of texts")
    return dict(header)


def _are_shares(values: Any) -> bool:
    """Whether these are numbers from 0 to 1 by name."""
    return isinstance(values, dict) and all(isinstance(x, int | float) and 0 <= x <= 1 for x in values.values())


def _are_questions(values: Any) -> bool:
    """Whether these are questions as `suites.questions` writes them."""
    parts = {"task", "id", "description", "input", "expected"}
    return isinstance(values, list) and all(
        isinstance(one, dict) and one.keys() == parts and all(isinstance(text, str) for text in one.values())
        for one in values
    )


def _check_line(line: Mapping[str, Any]) -> None:
    """Raises an error of Python's own where a line lacks something or has it of another type."""
    texts = (*(line[part] for part in ("suite", "condition", "task", "id", "prompt")), *line["scores"])
    if not all(isinstance(text, str) for text in texts) or type(line["seed"]) is not int or not line["scores"]:
        raise TypeError("suite, condition, task, id, prompt and names of scores are texts, the seed is a whole number")
    for name, score in line["scores"].items():
        if score is not None and (isinstance(score, bool) or not 0 <= score <= 1):
            raise ValueError(f"score {name} is {score}, not from 0 to 1")


def to_text(header: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> str:
    """Renders facts and answers as a file's text."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ({"run": header}, *lines))


def joined_header(path: Path, there: Mapping[str, Any], header: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a file when the answers of one more run are added to it.

    Args:
        path: The file.
        there: Its facts.
        header: Those of the run.

    Raises:
        ConfigError: if the file is of another run, naming the fact and both values.
    """
    merged = dict(header)
    for fact in FACTS:
        theirs = there.get(fact)
        mine = header.get(fact)
        if fact in SEED_FACTS and not (theirs and mine):
            merged[fact] = theirs or mine  # conditions that need it come now, or are all there
        elif theirs != mine:
            raise ConfigError(
                f"{path} holds answers of a run with {fact} {theirs!r}; this one has {mine!r}. Write to another file"
            )
    for fact in ("conditions", "seeds"):
        merged[fact] = list(dict.fromkeys([*there.get(fact, ()), *header[fact]]))
    merged["suites"] = there.get("suites", {}) | header["suites"]
    merged["left_out"] = {name: why for name, why in header["left_out"].items() if name not in merged["conditions"]}
    return merged


def open_for_appending(path: Path, header: Mapping[str, Any]) -> set[Key]:
    """Makes a file of answers ready to be appended to: a new one, or one of the same run without a cut-off last line.

    Conditions (with what they need), seeds and suites may be added to a file; what made its answers may not change.

    Returns:
        The answers that are there.

    Raises:
        ConfigError: if the file is of another run, naming the fact and both values.
        OutputError: if it cannot be written.
    """
    if path.suffix == ".gz":
        raise ConfigError(f"{path}: answers are appended to a plain .jsonl file; compress it when it is complete")
    path = regular_file(path)
    try:
        if not path.exists() or path.stat().st_size == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, to_text(header, ()))
            return set()
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end == 0:
            raise ConfigError(f"{path} is not a file of answers; choose another file")
        if end < len(data):
            with path.open("r+b") as file:
                file.truncate(end)
    except OSError as error:
        raise OutputError(f"Cannot write answers to {path}: {error.strerror or error}") from error
    found = read(path)
    merged = joined_header(path, found.header, header)
    if merged != found.header:
        write_text(path, to_text(merged, found.lines))
    return {key_of(line) for line in found.lines}


def merge(files: Sequence[AnswerFile]) -> list[dict[str, Any]]:
    """Puts the answers of several files together.

    Raises:
        DataError: if their facts do not go together, or an answer is there twice; naming the files.
    """
    first = files[0]
    by_seed: dict[tuple[int, str], tuple[Any, Path]] = {}
    merged: dict[Key, tuple[dict[str, Any], Path]] = {}
    for file in files:
        for fact in RUN_FACTS:
            if file.header.get(fact) != first.header.get(fact):
                raise DataError(
                    f"{first.path} and {file.path} cannot share a table: {fact} is {first.header.get(fact)!r} in one, "
                    f"{file.header.get(fact)!r} in the other"
                )
        for seed in sorted({line["seed"] for line in file.lines}):
            for fact in SEED_FACTS:
                value = file.header.get(fact)
                known, path = by_seed.setdefault((seed, fact), (value, file.path)) if value else (value, file.path)
                if known != value:
                    raise DataError(
                        f"{path} and {file.path} both hold seed {seed}, with different {fact}: {known} and {value}. "
                        "Answers of other weights need seeds of their own"
                    )
        for line in file.lines:
            key = key_of(line)
            if key in merged:
                raise DataError(f"{merged[key][1]} and {file.path} both hold the answer of {key}")
            merged[key] = (line, file.path)
    return [line for line, _ in merged.values()]
