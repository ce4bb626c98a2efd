"""Makes the packed files from the Hugging Face Hub.

Knows which parts there are and what is done already. Knows nothing of training.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t2l.data import packed
from t2l.data.benchmarks import BENCHMARKS
from t2l.data.convert import convert_benchmark, convert_task
from t2l.data.fetching import MissingError, Say, fetch, patiently, quiet_datasets
from t2l.errors import ConfigError, DataError, DownloadError, OutputError
from t2l.io import parse_json, sha256, write_text, writing
from t2l.locks import sweep
from t2l.parquet import require_pyarrow
from t2l.tasks import load_splits

HUB_TASK = "Lots-of-LoRAs/{task}"


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
        raise ConfigError("nothing is asked for: give --tasks or --benchmarks")
    if template is not None and "{task}" not in template:
        raise ConfigError(f"--source {template} has no {{task}} in it, which stands for a task's or benchmark's name")
    before = _claim(out, [*(packed.SNI_FILES if names else ()), *([packed.BENCHMARKS] if benchmarks else [])])
    jobs = [*((name, False) for name in names), *((name, True) for name in BENCHMARKS if benchmarks)]
    missing: list[str] = []
    with _progress(len(jobs), progress) as advance, quiet_datasets():
        for done, (name, is_benchmark) in enumerate(jobs):
            advance(name)
            path = out / ".parts" / f"{name}.parquet"
            if _part_facts(path, template) is not None:
                continue
            try:
                _make_part(path, name, is_benchmark, template, say, sleep)
            except MissingError as error:
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
    return _pack(out, had, list(BENCHMARKS) if benchmarks else [], template, before, missing)


def _need_datasets() -> None:
    require_pyarrow("Packing data", "data")
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise DataError("Fetching data needs the library datasets: pip install 'text-to-lora[data]'") from error


def _claim(out: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """The manifest that is there already; refuses to replace packed files that this command did not write.

    What is about to be written is noted in `.parts`, so that a rerun after an interruption knows it as its own.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    before = packed.read_manifest(out) if (out / packed.MANIFEST).exists() else {"files": {}, "sources": {}}
    note = out / ".parts" / "writing"
    own = note.read_text(encoding="utf-8").split() if note.exists() else []
    for name in wanted:
        path = out / name
        if name not in own and path.exists() and sha256(path) != before["files"].get(name, {}).get("sha256"):
            raise OutputError(f"{path} exists and is not in {out / packed.MANIFEST}; choose another folder")
    with writing(note.parent):
        note.parent.mkdir(exist_ok=True)
        sweep(note.parent)
    write_text(note, "\n".join(dict.fromkeys([*own, *wanted])) + "\n")
    return before


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
        facts = parse_json((pq.read_schema(path).metadata or {}).get(b"t2l", b"{}"), path, DataError)
    except (OSError, pa.ArrowException, DataError):
        return None
    current = (facts.get("template"), facts.get("version")) == (template, packed.FORMAT_VERSION)
    return facts if current and "origin" in facts else None


def _pack(
    out: Path,
    tasks: Sequence[str],
    benchmarks: Sequence[str],
    template: str | None,
    before: dict[str, Any],
    missing: Sequence[str],
) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = out / ".parts"
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
    (parts / "writing").unlink(missing_ok=True)
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
