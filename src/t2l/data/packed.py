"""The packed files: names, schemas, the manifest with their checksums. Knows files only."""

import json
from pathlib import Path
from typing import Any

from t2l.errors import DataError
from t2l.io import new_file, read_json, sha256, write_text
from t2l.parquet import reading_parquet

TASKS = "sni_tasks.parquet"
EXAMPLES = {"train": "sni_train.parquet", "validation": "sni_val.parquet", "test": "sni_test.parquet"}
"""Split, as its rows name it, to file."""
BENCHMARKS = "benchmarks.parquet"
SNI_FILES = (TASKS, *EXAMPLES.values())
FILES = (*SNI_FILES, BENCHMARKS)
MANIFEST = "manifest.json"
FORMAT_VERSION = 1

_EXAMPLE_COLUMNS = {"task": "text", "split": "text", "id": "text", "input": "text", "outputs": "texts"}
_TASK_COLUMNS = {
    "task": "text",
    "num": "text",
    "lol_name": "text",
    "lol_split": "text",
    "definition": "text",
    "definition_source": "text",
    "summary": "text",
    "category": "text",
    "domain": "text",
    "source": "text",
    "benchmark_overlap": "text",
    "descriptions": "texts",
    "data_source": "text",
    "n_available": "number",
    "n_train": "number",
    "n_validation": "number",
    "n_test": "number",
    "n_dropped_long": "number",
    "n_merged_dup": "number",
}
_BENCHMARK_COLUMNS = {
    "benchmark": "text",
    "split": "text",
    "id": "text",
    "input": "text",
    "choices": "texts",
    "answer": "text",
    "code": "text",
}
COLUMNS = {TASKS: _TASK_COLUMNS, BENCHMARKS: _BENCHMARK_COLUMNS} | dict.fromkeys(EXAMPLES.values(), _EXAMPLE_COLUMNS)


def schema(name: str) -> Any:
    """The pyarrow schema of one of the packed files."""
    import pyarrow as pa

    types = {"text": pa.string(), "texts": pa.list_(pa.field("element", pa.string())), "number": pa.int64()}
    return pa.schema([(column, types[kind]) for column, kind in COLUMNS[name].items()])


def check_schema(path: Path, name: str) -> int:
    """The number of rows of a file that has the columns of the packed file `name`.

    Raises:
        DataError: if it cannot be read, or has other columns, naming the file, the column and both types.
    """
    import pyarrow.parquet as pq

    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path} is missing or no file; `t2l data build` makes it")
    with reading_parquet(path, "`t2l data build` makes it anew"), pq.ParquetFile(path) as file:
        found, rows = file.schema_arrow, int(file.metadata.num_rows)
    expected = schema(name)
    missing = [column for column in expected.names if column not in found.names]
    unknown = [column for column in found.names if column not in expected.names]
    if missing or unknown:
        raise DataError(
            f"{path}: missing columns {missing}, unknown columns {unknown}; expected {', '.join(expected.names)}"
        )
    for field in expected:
        if found.field(field.name).type != field.type:
            raise DataError(
                f"{path}: column {field.name} has type {found.field(field.name).type}, expected {field.type}"
            )
    return rows


def write_table(table: Any, path: Path) -> None:
    """Writes a pyarrow table as a Parquet file that appears whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    import pyarrow.parquet as pq

    with new_file(path, overwrite=True) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of packed files.

    Raises:
        DataError: if it is absent, malformed or of another format.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise DataError(f"{folder} has no {MANIFEST}; only folders that `t2l data build` wrote have one")
    data = read_json(path, DataError)
    files = data.get("files")
    if not isinstance(files, dict) or data.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path} is no manifest of format version {FORMAT_VERSION}")
    if not all(isinstance(v, dict) and isinstance(v.get("sha256"), str) for v in files.values()):
        raise DataError(f"{path}: a file has no sha256")
    foreign = [name for name in files if name not in FILES]
    if foreign:
        raise DataError(f"{path} names files that are none of the packed ones: {', '.join(foreign[:3])}")
    return data


def write_manifest(folder: Path, files: dict[str, Any], sources: dict[str, Any], **more: Any) -> None:
    """Writes the manifest last, so that its presence says that all files are whole.

    Args:
        folder: Where the files are; they are hashed here.
        files: File name to what is to be said of it; `sha256` and `bytes` are added.
        sources: Task or benchmark to where it comes from.
        more: Further entries.
    """
    described = {
        name: {**files[name], "sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in FILES
        if name in files
    }
    document = {"format_version": FORMAT_VERSION, "files": described, **more, "sources": dict(sorted(sources.items()))}
    write_text(folder / MANIFEST, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def verify_manifest(folder: Path) -> dict[str, str]:
    """File name to problem, for every file that is not the one its manifest describes; empty if all are.

    Raises:
        DataError: if there is no sound manifest.
    """
    problems = {}
    for name, entry in read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            problems[name] = "is missing"
        elif (found := sha256(path)) != entry["sha256"]:
            problems[name] = f"has sha256 {found[:12]}…, the manifest says {entry['sha256'][:12]}…"
    return problems
