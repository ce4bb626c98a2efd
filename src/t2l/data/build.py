"""Makes the packed files from the Hugging Face Hub, or from a folder that holds them.

Knows where tasks and benchmarks lie on the Hub and how their rows are laid out. Knows nothing of training.

What is assumed of the Hub, from the datasets' cards (no other place in this library spells it):

- `Lots-of-LoRAs/<task>` has one configuration with columns `input`, `output`, `id` and splits train, valid, test.
  `input` is the whole prompt of Super-NaturalInstructions: `Definition: …`, examples, and after the words
  `Now complete the following example -` the real input between `Input:` and `Output:`. `output` is a text or a list
  of right answers (cards say text, files hold lists; both are read).
- Benchmarks without public test labels (BoolQ, HellaSwag, PIQA, WinoGrande) are scored on their validation set, which
  becomes `test` here.
- `ybisk/piqa` is a loading script on its main branch, which `datasets` from version 4 on refuses to run; the Hub's
  own conversion to Parquet is read instead.
"""

import hashlib
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2l.data import packed
from t2l.errors import ConfigError, DataError, DownloadError, OutputError
from t2l.io import new_file, sha256, write_text
from t2l.tasks import load_splits

HUB_TASK = "Lots-of-LoRAs/{task}"
LIMITS = {"train": 500, "validation": 60, "test": 100}
"""Examples kept of each split of a task."""
MAX_INPUT = 2000
"""Longer inputs, in characters, are left out."""
MARKER = "Now complete the following example"
SPLIT_NAMES = {"train": ("train",), "validation": ("valid", "validation"), "test": ("test",)}
# Which repeated input stays: what is scored must not be trained on.
PRECEDENCE = ("test", "validation", "train")

Row = Mapping[str, Any]
Say = Callable[[str], None]


# ------------------------------------------------------------------------------------------------ benchmarks


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies, which of its splits are read and how a row becomes a packed one."""

    dataset: str
    config: str | None
    columns: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any]]
    """Row to input, choices, answer and, for code, what tests it; may add `id`."""
    splits: tuple[tuple[str, str], ...]
    """(packed split, the dataset's)."""
    license: str
    revision: str | None = None
    train_limit: int | None = 3000


def _lettered(question: str) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        texts, labels = list(row["choices"]["text"]), list(row["choices"]["label"])
        return {"input": row[question], "choices": texts, "answer": texts[labels.index(row["answerKey"])]}

    return convert


def _boolq(row: Row) -> dict[str, Any]:
    question = str(row["question"]).strip().rstrip("?")
    text = f"Passage: {row['passage']}\nQuestion: {question}?"
    return {"input": text, "choices": ["no", "yes"], "answer": "yes" if row["answer"] else "no"}


def _gsm8k(row: Row) -> dict[str, Any]:
    return {"input": row["question"], "choices": [], "answer": row["answer"]}


def _hellaswag(row: Row) -> dict[str, Any]:
    endings = list(row["endings"])
    text = f"{row['activity_label']}: {row['ctx']}"
    return {"input": text, "choices": endings, "answer": endings[int(row["label"])]}


def _piqa(row: Row) -> dict[str, Any]:
    choices = [row["sol1"], row["sol2"]]
    return {"input": row["goal"], "choices": choices, "answer": choices[int(row["label"])]}


def _winogrande(row: Row) -> dict[str, Any]:
    choices = [row["option1"], row["option2"]]
    return {"input": row["sentence"], "choices": choices, "answer": choices[int(row["answer"]) - 1]}


def _humaneval(row: Row) -> dict[str, Any]:
    code = {"task_id": row["task_id"], "entry_point": row["entry_point"], "test": row["test"]}
    return {"input": row["prompt"], "choices": [], "answer": row["canonical_solution"], "code": code}


def _mbpp(row: Row) -> dict[str, Any]:
    code = {
        "test_list": list(row["test_list"]),
        "test_setup_code": row["test_setup_code"],
        "challenge_test_list": list(row["challenge_test_list"]),
    }
    return {"id": str(row["task_id"]), "input": row["text"], "choices": [], "answer": row["code"], "code": code}


_ALL = (("train", "train"), ("validation", "validation"), ("test", "test"))
_LABELLED = (("train", "train"), ("test", "validation"))
BENCHMARKS = {
    "arc_challenge": Benchmark(
        "allenai/ai2_arc",
        "ARC-Challenge",
        ("question", "choices", "answerKey"),
        _lettered("question"),
        _ALL,
        "CC BY-SA 4.0",
    ),
    "arc_easy": Benchmark(
        "allenai/ai2_arc", "ARC-Easy", ("question", "choices", "answerKey"), _lettered("question"), _ALL, "CC BY-SA 4.0"
    ),
    "boolq": Benchmark("google/boolq", None, ("question", "answer", "passage"), _boolq, _LABELLED, "CC BY-SA 3.0"),
    "gsm8k": Benchmark(
        "openai/gsm8k",
        "main",
        ("question", "answer"),
        _gsm8k,
        (("train", "train"), ("test", "test")),
        "MIT",
        train_limit=None,
    ),
    "hellaswag": Benchmark(
        "Rowan/hellaswag", None, ("activity_label", "ctx", "endings", "label"), _hellaswag, _LABELLED, "MIT"
    ),
    "humaneval": Benchmark(
        "openai/openai_humaneval",
        None,
        ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        _humaneval,
        (("test", "test"),),
        "MIT",
    ),
    "mbpp": Benchmark(
        "google-research-datasets/mbpp",
        "full",
        ("task_id", "text", "code", "test_list", "test_setup_code", "challenge_test_list"),
        _mbpp,
        (*_ALL, ("prompt", "prompt")),
        "CC BY 4.0",
    ),
    "openbookqa": Benchmark(
        "allenai/openbookqa",
        "main",
        ("question_stem", "choices", "answerKey"),
        _lettered("question_stem"),
        _ALL,
        "Apache-2.0",
    ),
    "piqa": Benchmark(
        "ybisk/piqa",
        None,
        ("goal", "sol1", "sol2", "label"),
        _piqa,
        _LABELLED,
        "AFL-3.0",
        revision="refs/convert/parquet",
    ),
    "winogrande": Benchmark(
        "allenai/winogrande",
        "winogrande_xl",
        ("sentence", "option1", "option2", "answer"),
        _winogrande,
        _LABELLED,
        "Apache-2.0",
    ),
}


# ------------------------------------------------------------------------------------------------ what is asked


def known_tasks() -> list[str]:
    """Every task of the frozen split: training first, then validation, test and the excluded ones."""
    splits = load_splits()
    return [name for part in (splits.train, splits.validation, splits.test, splits.excluded) for name in sorted(part)]


def choose_tasks(wanted: str) -> tuple[list[str], bool]:
    """(names, whether each was asked for by name), from `all`, a number, or names with commas between them.

    Raises:
        ConfigError: if it is none of these.
    """
    names = known_tasks()
    if wanted == "all":
        return sorted(names), False
    if wanted.isdecimal():
        if not 1 <= int(wanted) <= len(names):
            raise ConfigError(f"--tasks {wanted}: expected 1 to {len(names)}")
        return sorted(names[: int(wanted)]), False
    chosen = [name.strip() for name in wanted.split(",") if name.strip()]
    bad = [name for name in chosen if not re.fullmatch(r"task\d+\w*", name)]
    if bad or not chosen:
        raise ConfigError(f"--tasks: {bad or [wanted]} are no task names; give names such as task022_…, N, or all")
    return sorted(set(chosen)), True


# ------------------------------------------------------------------------------------------------- fetching


class _MissingError(Exception):
    """A dataset that is not on the Hub."""


@dataclass(frozen=True)
class Fetched:
    """A dataset as `datasets` gives it, and where it came from."""

    splits: Mapping[str, Any]
    origin: dict[str, Any]


def fetch(dataset: str, config: str | None, revision: str | None, name: str, template: str | None) -> Fetched:
    """Loads one dataset, from the Hub or from the local folder that the template names.

    Raises:
        _MissingError: if there is no such dataset.
        OSError and others: as the Hub's client raises them.
    """
    import datasets

    if template is not None:
        local = Path(template.replace("{task}", name)).expanduser()
        if local.is_dir():
            return _fetch_local(local)
        if template.startswith((".", "~")) or Path(template).is_absolute():
            raise _MissingError(str(local))
        dataset, config, revision = template.replace("{task}", name), None, None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        commit = HfApi().dataset_info(dataset, revision=revision).sha
        loaded = datasets.load_dataset(dataset, config, revision=revision or commit)
    except (RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise _MissingError(dataset) from error
    origin = {"dataset": dataset, "revision": commit}
    return Fetched(loaded, origin if config is None else {**origin, "config": config})


def _fetch_local(folder: Path) -> Fetched:
    """A folder of train.jsonl, valid-00000-of-00001.parquet and the like: what stands before a dash is the split."""
    import datasets

    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    files = sorted(path for path in folder.rglob("*") if path.suffix in kinds)
    if not files:
        raise DataError(f"{folder} holds no .jsonl, .json or .parquet files")
    found = {kinds[path.suffix] for path in files}
    if len(found) > 1:
        raise DataError(f"{folder} holds both JSON and Parquet files; keep one kind")
    by_split: dict[str, list[str]] = {}
    for path in files:
        by_split.setdefault(path.stem.partition("-")[0], []).append(str(path))
    digest = hashlib.sha256("".join(f"{path.name}\0{sha256(path)}\n" for path in files).encode()).hexdigest()
    loaded = datasets.load_dataset(found.pop(), data_files=by_split)
    return Fetched(loaded, {"dataset": f"local:{folder.name}", "revision": f"sha256:{digest}"})


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, wherever in its chain the client left it."""
    for link in _chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return 429 if any("429" in str(link) and "Too Many Requests" in str(link) for link in _chain(error)) else None


def _asked_delay(error: BaseException) -> float | None:
    for link in _chain(error):
        headers = getattr(getattr(link, "response", None), "headers", None)
        value = None if headers is None else headers.get("Retry-After")
        if value is not None and str(value).isdecimal():
            return float(value)
    return None


def attempts_for(error: BaseException) -> int:
    """How often to try at most: a rate limit passes, a lost connection may, anything else does not."""
    if any("Offline" in type(link).__name__ for link in _chain(error)):
        return 1
    status = status_of(error)
    if status == 429:
        return 10  # at 5, 10, … 300 seconds: longer than the five minutes over which the Hub counts
    if status is not None:
        return 5 if status >= 500 else 1
    lost = ("ConnectError", "ReadTimeout", "ConnectTimeout", "ReadError", "RemoteProtocolError")
    transient = any(isinstance(x, ConnectionError | TimeoutError) or type(x).__name__ in lost for x in _chain(error))
    return 3 if transient else 1


def patiently(load: Callable[[], Fetched], what: str, *, say: Say, sleep: Callable[[float], None]) -> Fetched:
    """Loads, and tries again with growing pauses where that can help.

    Raises:
        DownloadError: naming what could not be had and why.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return load()
        except (_MissingError, DataError):
            raise
        except Exception as error:  # the client raises half a dozen unrelated types
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if attempt >= attempts_for(error):
                tries = f" after {attempt} attempts" if attempt > 1 else ""
                raise DownloadError(f"Cannot load {what}{tries}: {reason}") from error
            # Not a random pause: one process asks for one dataset at a time.
            delay = _asked_delay(error) or min(300.0, 5.0 * 2 ** (attempt - 1))
            say(f"{what}: {reason}; trying again in {delay:.0f} s")
            sleep(min(delay, 900.0))


# ------------------------------------------------------------------------------------------------- converting


def _require_columns(dataset: str, split: str, data: Any, needed: Sequence[str]) -> None:
    for column in needed:
        if column not in data.column_names:
            raise DataError(
                f"{dataset}, split {split}: there is no column '{column}'; found {', '.join(data.column_names)}"
            )


def _split(dataset: str, fetched: Fetched, names: Sequence[str]) -> Any:
    for name in names:
        if name in fetched.splits:
            return fetched.splits[name]
    raise DataError(f"{dataset}: there is no split '{names[0]}'; found {', '.join(fetched.splits)}")


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


def convert_task(name: str, fetched: Fetched) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(row of the task table, example rows).

    Raises:
        DataError: naming dataset, split, column or row, if it is not laid out as expected.
    """
    dataset = str(fetched.origin["dataset"])
    definitions: Counter[str] = Counter()
    kept: dict[str, dict[str, _Found]] = {}
    owner: dict[str, str] = {}
    available = long = merged = blank = 0
    for split in PRECEDENCE:
        data = _split(dataset, fetched, SPLIT_NAMES[split])
        _require_columns(dataset, split, data, ("id", "input", "output"))
        kept[split] = {}
        for number, row in enumerate(data):
            available += 1
            where = f"{dataset}, split {split}, row {number}"
            outputs = [row["output"]] if isinstance(row["output"], str) else row["output"]
            if row["id"] is None:
                raise DataError(f"{where}: column 'id' is empty")
            if not isinstance(outputs, list) or not all(isinstance(text, str) for text in outputs):
                raise DataError(f"{where}: column 'output' holds {row['output']!r:.60}, expected a text or a list")
            read = read_prompt(row["input"]) if isinstance(row["input"], str) else None
            if read is None:
                raise DataError(
                    f"{where}: column 'input' does not end in '{MARKER} - Input: … Output:'; found "
                    f"“{str(row['input'])[-80:]}”"
                )
            definition, text = read
            if definition is not None:
                definitions[definition] += 1
            answers = dict.fromkeys(text for text in outputs if text.strip())
            if not answers or not text:
                blank += 1
            elif len(text) > MAX_INPUT:
                long += 1
            elif text in owner:
                merged += 1
                if owner[text] == split:
                    kept[split][text].outputs.update(answers)
            else:
                owner[text] = split
                kept[split][text] = _Found(str(row["id"]), text, answers)
    examples = [
        {"task": name, "split": split, "id": found.id, "input": found.input, "outputs": list(found.outputs)}
        for split in LIMITS
        for found in _sample(list(kept[split].values()), LIMITS[split], lambda found: f"{name}:{found.id}")
    ]
    counts = Counter(row["split"] for row in examples)
    split, benchmark = _place(name)
    number_text = re.sub(r"\D.*", "", name.removeprefix("task"))
    table_row: dict[str, Any] = {
        "task": name,
        "num": number_text,
        "lol_name": f"lol_{number_text}",
        "lol_split": split,
        "definition": definitions.most_common(1)[0][0] if definitions else None,
        "definition_source": "Lots-of-LoRAs" if definitions else None,
        "summary": None,
        "category": None,
        "domain": None,
        "source": None,
        "benchmark_overlap": benchmark,
        "descriptions": [],
        "data_source": dataset,
        "n_available": available,
        "n_train": counts["train"],
        "n_validation": counts["validation"],
        "n_test": counts["test"],
        "n_dropped_long": long,
        "n_merged_dup": merged,
    }
    if not examples:
        raise DataError(f"{dataset}: none of its {available} rows can be used ({blank} blank, {long} too long)")
    return table_row, examples


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
    """Packed rows.

    Raises:
        DataError: naming dataset, split, column or row, if it is not laid out as expected.
    """
    rows, dataset = [], fetched.origin["dataset"]
    for split, theirs in benchmark.splits:
        data = _split(dataset, fetched, (theirs,))
        _require_columns(dataset, theirs, data, benchmark.columns)
        found = []
        for number, row in enumerate(data):
            for column in benchmark.columns:  # one that only some files have comes as empty
                if row[column] is None:
                    raise DataError(f"{dataset}, split {theirs}, row {number}: column '{column}' is empty")
            try:
                one = benchmark.convert(row)
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise DataError(
                    f"{dataset}, split {theirs}, row {number} is not laid out as expected: "
                    f"{type(error).__name__}: {error}"
                ) from error
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


# --------------------------------------------------------------------------------------------------- building


def build(
    out: Path,
    *,
    tasks: str | None = None,
    benchmarks: bool = False,
    template: str | None = None,
    say: Say = lambda text: None,
    progress: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Fetches what is asked for, part by part, and packs it; a part that is done is not fetched again.

    Args:
        out: Folder of the packed files. Parts lie in its `.parts` until it is deleted.
        tasks: `all`, the number of tasks or their names; see `choose_tasks`.
        benchmarks: Whether to make benchmarks.parquet too.
        template: Where datasets are instead of the Hub: a folder or dataset id with `{task}` in it.
        say: Receives what the user should know.
        progress: Whether to show a bar on standard error.
        sleep: Pauses between attempts.

    Returns:
        The manifest.

    Raises:
        ConfigError: if nothing is asked for or the template lacks its `{task}`.
        DownloadError: if a dataset cannot be had; parts that are done stay.
        DataError: if a dataset is not laid out as expected.
        OutputError: if the folder cannot be written, or holds files of another origin.
    """
    _need_datasets()
    names, by_name = choose_tasks(tasks) if tasks is not None else ([], False)
    if not names and not benchmarks:
        raise ConfigError("nothing is asked for: give --tasks, --benchmarks or --from")
    if template is not None and "{task}" not in template:
        raise ConfigError(f"--source {template} has no {{task}} in it, which stands for a task's or benchmark's name")
    wanted = [*(packed.SNI_FILES if names else ()), *([packed.BENCHMARKS] if benchmarks else [])]
    before = _claim(out, wanted)
    parts = out / ".parts"

    jobs = [*((name, False) for name in names), *((name, True) for name in BENCHMARKS if benchmarks)]
    missing: list[str] = []
    with _progress(len(jobs), progress) as advance, _quiet_datasets():
        for done, (name, is_benchmark) in enumerate(jobs):
            advance(name)
            path = parts / f"{name}.parquet"
            if _part_facts(path, template) is not None:
                continue
            try:
                _make_part(path, name, is_benchmark, template, say, sleep)
            except _MissingError as error:
                if by_name or is_benchmark:
                    raise DownloadError(f"There is no dataset {error} for {name}") from error
                say(f"{name}: there is no dataset {error}; left out")
                missing.append(name)
            except DownloadError as error:
                raise DownloadError(
                    f"{error}. {done - len(missing)} of {len(jobs)} parts are done; run the same command again to go on"
                ) from error
    had = [name for name in names if name not in missing]
    if names and not had:
        raise DownloadError(f"None of the {len(names)} tasks asked for is there, such as {names[0]}")
    return _pack(out, parts, had, list(BENCHMARKS) if benchmarks else [], template, before, missing)


def _need_datasets() -> None:
    packed.need_pyarrow()
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise DataError("Fetching data needs the library datasets: pip install 'text-to-lora[data]'") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot write to {folder}: {error.strerror or error}") from error


def _claim(out: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """The manifest that is there already; refuses to replace packed files that this command did not write.

    What is about to be written is noted in `.parts`, so that a rerun after an interruption knows it as its own.
    """
    _make_folder(out)
    before = packed.read_manifest(out) if (out / packed.MANIFEST).exists() else {"files": {}, "sources": {}}
    note = out / ".parts" / "writing"
    own = note.read_text(encoding="utf-8").split() if note.exists() else []
    for name in wanted:
        path = out / name
        if name not in own and path.exists() and sha256(path) != before["files"].get(name, {}).get("sha256"):
            raise OutputError(f"{path} exists and is not in {out / packed.MANIFEST}; choose another folder")
    _make_folder(note.parent)
    for leftover in note.parent.glob(".*"):
        leftover.unlink()
    write_text(note, "\n".join(dict.fromkeys([*own, *wanted])) + "\n")
    return before


def _release(out: Path) -> None:
    (out / ".parts" / "writing").unlink(missing_ok=True)


def _make_part(
    path: Path, name: str, is_benchmark: bool, template: str | None, say: Say, sleep: Callable[[float], None]
) -> None:
    import pyarrow as pa

    dataset, config, revision = HUB_TASK.format(task=name), None, None
    if is_benchmark:
        dataset, config, revision = BENCHMARKS[name].dataset, BENCHMARKS[name].config, BENCHMARKS[name].revision
    fetched = patiently(
        lambda: fetch(dataset, config, revision, name, template), f"{dataset} ({name})", say=say, sleep=sleep
    )
    facts: dict[str, Any] = {"template": template, "version": packed.FORMAT_VERSION, "origin": fetched.origin}
    if is_benchmark:
        rows = convert_benchmark(name, BENCHMARKS[name], fetched)
        facts["origin"] = fetched.origin | {"license": BENCHMARKS[name].license}
        table = pa.Table.from_pylist(rows, packed.schema(packed.BENCHMARKS))
    else:
        facts["row"], rows = convert_task(name, fetched)
        facts["origin"] = fetched.origin | {"license": "Apache-2.0"}
        table = pa.Table.from_pylist(rows, packed.schema(packed.EXAMPLES["train"]))
    table = table.replace_schema_metadata({"t2l": json.dumps(facts, ensure_ascii=False)})
    packed.write_table(table, path)


def _part_facts(path: Path, template: str | None) -> dict[str, Any] | None:
    """What a finished part says of itself; None if it is absent, damaged or was made from another source."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return None
    try:
        facts: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {}).get(b"t2l", b"{}"))
    except (OSError, pa.ArrowException, json.JSONDecodeError):
        return None
    current = (facts.get("template"), facts.get("version")) == (template, packed.FORMAT_VERSION)
    return facts if current and "origin" in facts else None


def _pack(
    out: Path,
    parts: Path,
    tasks: Sequence[str],
    benchmarks: Sequence[str],
    template: str | None,
    before: dict[str, Any],
    missing: Sequence[str],
) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    tables: dict[str, Any] = {}
    sources: dict[str, Any] = {}
    facts = {name: _part_facts(parts / f"{name}.parquet", template) or {} for name in (*tasks, *benchmarks)}
    for name, fact in facts.items():
        sources[name] = fact["origin"]
    if tasks:
        table_rows = [facts[name]["row"] for name in tasks]
        tables[packed.TASKS] = pa.Table.from_pylist(table_rows, packed.schema(packed.TASKS))
        examples = _join(parts, tasks)
        for split, file in packed.EXAMPLES.items():
            tables[file] = examples.filter(pc.equal(examples["split"], split))
    if benchmarks:
        tables[packed.BENCHMARKS] = _join(parts, benchmarks)
    for file, table in tables.items():
        table = table.replace_schema_metadata(None).combine_chunks()
        packed.write_table(table, out / file)
    files = {**before["files"], **{file: {"rows": table.num_rows} for file, table in tables.items()}}
    kept = {
        name: origin
        for name, origin in before["sources"].items()
        if (packed.BENCHMARKS not in tables if name in BENCHMARKS else packed.TASKS not in tables)
    }
    packed.write_manifest(out, files, kept | sources, missing=sorted(missing))
    _release(out)
    return packed.read_manifest(out)


def _join(parts: Path, names: Iterable[str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pa.concat_tables(
        pq.read_table(parts / f"{name}.parquet").replace_schema_metadata(None) for name in sorted(names)
    )


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """A function that is called with the name of what comes next."""
    if not shown:
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("parts", total=total)
        started = False

        def advance(name: str) -> None:
            nonlocal started
            bar.update(job, advance=1 if started else 0, description=name[:40])
            started = True

        yield advance


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Hides the bars that `datasets` draws for each of its files."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


# ------------------------------------------------------------------------------------------------- from a folder


def copy(source: Path, out: Path, *, tasks: str | None = None, benchmarks: bool = False) -> dict[str, Any]:
    """Takes over packed files that are there already, after checking their columns and checksums. No network.

    Args:
        source: Folder that holds them.
        out: Folder to write, or the same one, which then only gets a manifest.
        tasks: As in `build`, to keep only these; all files are taken over as they are if neither is given.
        benchmarks: Whether benchmarks.parquet is wanted, where `tasks` is given.

    Returns:
        The manifest.

    Raises:
        DataError: if a file is missing, has other columns or is not what the source's manifest says.
        OutputError: if the folder cannot be written, or holds files of another origin.
    """
    packed.need_pyarrow()
    if not source.is_dir():
        raise DataError(f"{source} is not a folder")
    asked = tasks is not None or benchmarks
    names = [*(packed.SNI_FILES if tasks is not None or not asked else ())]
    names += [packed.BENCHMARKS] if benchmarks or not asked else []
    absent = [name for name in names if not (source / name).is_file()]
    if absent:
        raise DataError(f"{source} has no {', '.join(absent)}")
    rows = {name: packed.check_schema(source / name, name) for name in names}
    manifest: dict[str, Any] = {"files": {}, "sources": {}}
    if (source / packed.MANIFEST).exists():
        manifest = packed.read_manifest(source)
        problems = packed.verify_manifest(source)
        if problems:
            raise DataError("; ".join(f"{source / name} {problem}" for name, problem in problems.items()))
    in_place = out.exists() and out.resolve() == source.resolve()
    if in_place and tasks not in (None, "all"):
        raise ConfigError("--tasks with --from the folder itself would throw the others away; give another --out")
    before = manifest if in_place else _claim(out, names)
    keep = set(choose_tasks(tasks)[0]) if tasks is not None and tasks != "all" else None
    for name in [] if in_place else names:
        if keep is not None and name in packed.SNI_FILES:
            rows[name] = _filter(source / name, out / name, keep)
        else:
            checksum = sha256(source / name)
            with new_file(out / name, overwrite=True) as temporary:
                shutil.copyfile(source / name, temporary)
            if sha256(out / name) != checksum:
                raise OutputError(f"{out / name} is not what was read from {source / name}; the disk may be full")
    files = {**before["files"], **{name: {"rows": count} for name, count in rows.items()}}
    sources = {**before["sources"], **manifest["sources"]}
    packed.write_manifest(out, files, sources, copied=sorted(names), missing=manifest.get("missing", []))
    if not in_place:
        _release(out)
        with suppress(OSError):  # it holds parts of an earlier build
            (out / ".parts").rmdir()
    return packed.read_manifest(out)


def _filter(source: Path, target: Path, tasks: set[str]) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(source)
    if target.name == packed.TASKS:
        unknown = sorted(tasks - set(table["task"].to_pylist()))
        if unknown:
            raise DataError(f"{source} has no task {', '.join(unknown[:5])}")
    table = table.filter(pc.is_in(table["task"], value_set=pa.array(sorted(tasks)))).combine_chunks()
    packed.write_table(table, target)
    return int(table.num_rows)
