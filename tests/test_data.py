"""Fetching, checking and describing data: the real `datasets` library on local files, a real HTTP server here."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from t2l import cli, endpoint
from t2l.errors import ConfigError, DataError, DownloadError, OutputError
from t2l.tasks import Example, Task, load_descriptions, load_own, load_sni, load_splits

datasets = pytest.importorskip("datasets")
pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

from t2l.data import build, check, convert, describe, fetching, packed  # noqa: E402

DATA = Path(os.environ.get("T2L_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
NAMES = ("task900_colours", "task901_sums", "task902_sides")
PACKED = [*packed.SNI_FILES, packed.BENCHMARKS]


def t2l(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def prompt(text: str, definition: str = "Name the colour.\nOne word.") -> str:
    return (
        f"Definition: {definition}\n\nPositive Example 1 -\nInput: snow\nOutput: white\n\n"
        f"Negative Example 1 -\nInput: snow\nOutput: cold\n\n"
        f"Now complete the following example -\nInput: {text}\nOutput:"
    )


def write_task(folder: Path, name: str, train: int = 5) -> None:
    for split, number in (("train", train), ("valid", 2), ("test", 3)):
        rows = [
            {
                "input": prompt(f"{name} {split} thing {i}"),
                "output": ["red", "crimson"][: 1 + i % 2],
                "id": f"{split}-{i}",
            }
            for i in range(number)
        ]
        write_jsonl(folder / name / f"{split}.jsonl", rows)


BENCHMARK_ROWS: dict[str, dict[str, Any]] = {
    "arc_challenge": {
        "question": "What is hot?",
        "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "arc_easy": {
        "question": "What is cold?",
        "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "boolq": {"question": "is it so", "passage": "It is so.", "answer": True},
    "gsm8k": {"question": "1 + 1?", "answer": "It is 2.\n#### 2"},
    "hellaswag": {"activity_label": "Baking", "ctx": "She", "endings": ["a", "b", "c", "d"], "label": "3"},
    "humaneval": {
        "task_id": "HumanEval/0",
        "prompt": "def f():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(c): assert c() == 1",
        "entry_point": "f",
    },
    "mbpp": {
        "task_id": 11,
        "text": "Write f.",
        "code": "def f(): pass",
        "test_list": ["assert f() is None"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
    "openbookqa": {
        "question_stem": "The sun is",
        "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "piqa": {"goal": "Open it", "sol1": "pull", "sol2": "push", "label": 1},
    "winogrande": {"sentence": "_ won.", "option1": "Ann", "option2": "Bob", "answer": "2"},
}


def write_benchmarks(folder: Path) -> None:
    for name, row in BENCHMARK_ROWS.items():
        for _, theirs in build.BENCHMARKS[name].splits:
            write_jsonl(folder / name / f"{theirs}.jsonl", [row])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.delenv("T2L_DATA", raising=False)
    monkeypatch.delenv(endpoint.KEY_VARIABLE, raising=False)


@pytest.fixture
def source(tmp_path: Path) -> str:
    for name in NAMES:
        write_task(tmp_path / "source", name)
    return f"{tmp_path}/source/{{task}}"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# ------------------------------------------------------------------------------------------------------ build


def test_build_packs_what_the_hub_has(source: str, tmp_path: Path) -> None:
    write_benchmarks(tmp_path / "source")
    out = tmp_path / "out"
    result = t2l(
        "data", "build", "--out", out, "--tasks", ",".join(NAMES), "--benchmarks", "--source", source, "--json"
    )
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    assert sorted(manifest["files"]) == sorted(PACKED)
    assert manifest["sources"]["piqa"]["license"] == "AFL-3.0"
    assert manifest["sources"][NAMES[0]]["revision"].startswith("sha256:")
    for name in PACKED:
        assert packed.check_schema(out / name, name) == manifest["files"][name]["rows"]
    tasks = load_sni(NAMES, folder=out)
    assert [task.name for task in tasks] == list(NAMES)
    assert tasks[0].descriptions == ("Name the colour.\nOne word.",)
    assert {split: len(found) for split, found in tasks[0].examples.items()} == {"train": 5, "val": 2, "test": 3}
    assert tasks[0].examples["train"][1] == Example("train-1", "task900_colours train thing 1", ("red", "crimson"))

    rows = {(r["benchmark"], r["split"]): r for r in pq.read_table(out / packed.BENCHMARKS).to_pylist()}
    assert {name for name, _ in rows} == set(build.BENCHMARKS)
    answers = {name: rows[name, "test"]["answer"] for name in build.BENCHMARKS}
    assert answers["arc_challenge"] == "fire" and answers["arc_easy"] == "ice" and answers["boolq"] == "yes"
    assert answers["hellaswag"] == "d" and answers["piqa"] == "push" and answers["winogrande"] == "Bob"
    assert rows["mbpp", "prompt"]["id"] == "mbpp:prompt:11"
    assert json.loads(rows["humaneval", "test"]["code"])["entry_point"] == "f"
    assert ("boolq", "validation") not in rows  # it is the test set here


def test_schema_is_that_of_the_packed_data() -> None:
    if not (DATA / packed.TASKS).is_file():
        pytest.skip("needs the packed data in T2L_DATA")
    for name in PACKED:
        assert packed.check_schema(DATA / name, name) > 0
        assert pq.read_schema(DATA / name).remove_metadata().equals(packed.schema(name))


def test_two_builds_give_the_same_bytes_and_a_rerun_fetches_nothing(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    build.build(one, tasks=",".join(NAMES), template=source)
    build.build(other, tasks=",".join(reversed(NAMES)), template=source)
    assert content(one) == content(other)
    monkeypatch.setattr(build, "fetch", lambda *_: pytest.fail("a finished part was fetched again"))
    build.build(one, tasks=",".join(NAMES), template=source)
    assert content(one) == content(other)


KILLED = """
import os, signal, sys
import datasets
from t2l.data import build
datasets.config.HF_DATASETS_CACHE = sys.argv[3]
real, count = build._make_part, 0
def part(*arguments):
    global count
    count += 1
    if count == 3:
        (arguments[0].parent / ".half.t2l-abcd0123").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)
build._make_part = part
build.build(__import__("pathlib").Path(sys.argv[1]), tasks=sys.argv[4], template=sys.argv[2])
"""


def test_killed_builds_go_on_to_the_same_bytes(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out, tasks = tmp_path / "whole", tmp_path / "out", ",".join(NAMES)
    build.build(whole, tasks=tasks, template=source)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(out), source, str(tmp_path / "hf"), tasks], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in (out / ".parts").glob("*.parquet")) == [f"{n}.parquet" for n in NAMES[:2]]
    assert not (out / packed.MANIFEST).exists()

    fetched: list[str] = []
    real_fetch, real_write = build.fetch, packed.write_table
    monkeypatch.setattr(build, "fetch", lambda *a: (fetched.append(a[3]), real_fetch(*a))[1])

    def dies_at_the_test_file(table: Any, path: Path) -> None:
        if path.name == "sni_test.parquet":
            raise KeyboardInterrupt
        real_write(table, path)

    monkeypatch.setattr(packed, "write_table", dies_at_the_test_file)
    with pytest.raises(KeyboardInterrupt):
        build.build(out, tasks=tasks, template=source)
    assert fetched == [NAMES[2]]
    assert (out / packed.TASKS).exists() and not (out / packed.MANIFEST).exists()
    monkeypatch.setattr(packed, "write_table", real_write)
    build.build(out, tasks=tasks, template=source)
    assert fetched == [NAMES[2]]
    assert content(out) == content(whole)
    assert not list((out / ".parts").glob(".*"))


def limited(status: int, retry_after: str | None = None) -> Exception:
    """What the Hub's client raises, buried as `datasets` buries it."""
    from types import SimpleNamespace

    headers = {} if retry_after is None else {"Retry-After": retry_after}
    inner = OSError(f"{status} Client Error: for url: https://hub.invalid/x")
    inner.response = SimpleNamespace(status_code=status, headers=headers)  # type: ignore[attr-defined]
    outer = RuntimeError("could not read the data set")
    outer.__cause__ = inner
    return outer


def test_a_rate_limit_is_waited_out(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = datasets.load_dataset, [limited(429), limited(429, "42"), limited(503)]

    def load(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop(0)
        return real(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    pauses: list[float] = []
    said: list[str] = []
    build.build(tmp_path / "out", tasks=NAMES[0], template=source, say=said.append, sleep=pauses.append)
    assert pauses == [5.0, 42.0, 20.0]
    assert all(NAMES[0] in line and "trying again" in line for line in said)


def test_a_rate_limit_that_stays_is_named_and_parts_are_kept(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = datasets.load_dataset

    def load(kind: str, data_files: Any) -> Any:
        if NAMES[1] in str(data_files):
            raise limited(429)
        return real(kind, data_files=data_files)

    monkeypatch.setattr(datasets, "load_dataset", load)
    pauses: list[float] = []
    with pytest.raises(DownloadError, match=r"after 10 attempts.* 1 of 3 parts are done; run the same command again"):
        build.build(tmp_path / "out", tasks=",".join(NAMES), template=source, sleep=pauses.append)
    assert sum(pauses) > 300
    assert (tmp_path / "out" / ".parts" / f"{NAMES[0]}.parquet").exists()


@pytest.mark.parametrize("error", [limited(403), ValueError("bad"), limited(404)])
def test_what_waiting_does_not_help_is_not_tried_again(error: Exception) -> None:
    def load() -> fetching.Fetched:
        raise error

    with pytest.raises(DownloadError, match="Cannot load this: "):
        fetching.patiently(load, "this", say=lambda _: None, sleep=lambda _: pytest.fail("slept"))


def test_wrong_layouts_are_named(source: str, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    good = {"input": prompt("x"), "output": ["y"], "id": "1"}

    def fails(rows: list[Any], pattern: str) -> None:
        for split in ("train", "valid", "test"):
            write_jsonl(folder / "task950_bad" / f"{split}.jsonl", rows)
        with pytest.raises(DataError, match=pattern):
            build.build(tmp_path / "out", tasks="task950_bad", template=source)

    fails(
        [{"input": prompt("x"), "target": "y", "id": "1"}],
        r"task950_bad, split test: there is no column 'output'; found input, target, id",
    )
    fails([good | {"output": 3}], r"task950_bad, split test, row 0: column 'output' holds 3")
    fails([good, good | {"input": "Just a question?"}], r"row 1: column 'input' does not end in 'Now complete")
    fails([good | {"output": [" "]}], r"none of its 3 rows can be used \(3 blank, 0 too long\)")
    (folder / "task950_bad" / "valid.jsonl").unlink()
    with pytest.raises(DataError, match=r"task950_bad: there is no split 'valid'; found test, train"):
        build.build(tmp_path / "out", tasks="task950_bad", template=source)
    write_benchmarks(folder)
    write_jsonl(folder / "boolq" / "validation.jsonl", [{"question": "q", "answer": True}])
    with pytest.raises(DataError, match=r"boolq, split validation, row 0: column 'passage' is empty"):
        build.build(tmp_path / "out", benchmarks=True, template=source)
    for split in ("train", "validation"):
        write_jsonl(folder / "boolq" / f"{split}.jsonl", [{"question": "q", "answer": True}])
    with pytest.raises(DataError, match=r"boolq, split train: there is no column 'passage'; found question, answer"):
        build.build(tmp_path / "out", benchmarks=True, template=source)
    write_benchmarks(folder)
    write_jsonl(folder / "arc_easy" / "test.jsonl", [BENCHMARK_ROWS["arc_easy"] | {"answerKey": "E"}])
    with pytest.raises(DataError, match=r"arc_easy, split test, row 0 is not laid out as expected: ValueError"):
        build.build(tmp_path / "fresh", benchmarks=True, template=source)


def test_repeats_are_merged_and_the_tested_one_stays(tmp_path: Path) -> None:
    rows = {
        "train": [("same", "a"), ("mine", "b"), ("mine", "c"), ("long " * 500, "d")],
        "valid": [("same", "e")],
        "test": [("same", "f")],
    }
    for split, found in rows.items():
        lines = [{"input": prompt(text), "output": out, "id": f"{split}{i}"} for i, (text, out) in enumerate(found)]
        write_jsonl(tmp_path / "task960_repeats" / f"{split}.jsonl", lines)
    row, examples = convert.convert_task("task960_repeats", fetching._fetch_local(tmp_path / "task960_repeats"))
    assert [(e["split"], e["input"], e["outputs"]) for e in examples] == [
        ("train", "mine", ["b", "c"]),
        ("test", "same", ["f"]),
    ]
    assert (row["n_available"], row["n_merged_dup"], row["n_dropped_long"], row["n_validation"]) == (6, 3, 1, 0)


def test_samples_are_the_same_everywhere(tmp_path: Path) -> None:
    write_task(tmp_path, "task970_many", train=620)
    _, examples = convert.convert_task("task970_many", fetching._fetch_local(tmp_path / "task970_many"))
    kept = [e["id"] for e in examples if e["split"] == "train"]
    assert len(kept) == 500
    assert kept == sorted(kept, key=lambda name: int(name.partition("-")[2]))
    assert [f"train-{i}" for i in range(10) if f"train-{i}" not in kept] == ["train-0"]


def test_only_what_is_asked_for_is_fetched(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = build.fetch

    def fetch(dataset: str, *rest: Any) -> fetching.Fetched:
        asked.append(dataset)
        return real(dataset, *rest)

    monkeypatch.setattr(build, "fetch", fetch)
    build.build(tmp_path / "out", tasks=NAMES[1], template=source)
    assert asked == [f"Lots-of-LoRAs/{NAMES[1]}"]
    assert build.choose_tasks("3") == (sorted(load_splits().train)[:3], False)
    assert set(build.choose_tasks("all")[0]) > load_splits().test


def test_the_hub_is_asked_for_a_pinned_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[tuple[Any, ...]] = []

    class Api:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(sha=f"commit-of-{name}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: calls.append((*a, o["revision"])) or {})
    found = build.fetch("openai/gsm8k", "main", None, "gsm8k", None)
    assert found.origin == {"dataset": "openai/gsm8k", "revision": "commit-of-openai/gsm8k", "config": "main"}
    build.fetch("ybisk/piqa", None, "refs/convert/parquet", "piqa", None)
    build.fetch("x", "main", None, "gsm8k", "someone/copy-of-{task}")
    assert calls == [
        ("openai/gsm8k", "main", "commit-of-openai/gsm8k"),
        ("ybisk/piqa", None, "refs/convert/parquet"),
        ("someone/copy-of-gsm8k", None, "commit-of-someone/copy-of-gsm8k"),
    ]


def test_missing_datasets(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match=r"There is no dataset .*task999_none for task999_none"):
        build.build(tmp_path / "out", tasks="task999_none", template=source)
    monkeypatch.setattr(build, "known_tasks", lambda: [NAMES[0], "task999_none"])
    said: list[str] = []
    manifest = build.build(tmp_path / "out", tasks="all", template=source, say=said.append)
    assert manifest["missing"] == ["task999_none"] and "left out" in said[0]
    assert list(manifest["sources"]) == [NAMES[0]]


def test_foreign_files_are_not_replaced(source: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / packed.TASKS).write_text("precious")
    with pytest.raises(OutputError, match="exists and is not in"):
        build.build(tmp_path / "out", tasks=NAMES[0], template=source)
    assert (tmp_path / "out" / packed.TASKS).read_text() == "precious"


def test_use_of_build() -> None:
    assert t2l("data", "build", "--out", "x").exit_code == 2
    for tasks in ("0", "9999999", "../etc", "task1_a,/x"):
        with pytest.raises(ConfigError, match="--tasks"):
            build.choose_tasks(tasks)
    with pytest.raises(ConfigError, match=r"no \{task\}"):
        build.build(Path("x"), tasks="1", template="somewhere")


def test_a_changed_or_missing_packed_file_is_named(source: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    build.build(made, tasks=",".join(NAMES), template=source)
    assert t2l("data", "check", made, "--manifest").exit_code == 0
    (made / "sni_val.parquet").write_bytes((made / "sni_test.parquet").read_bytes())
    assert t2l("data", "check", made, "--manifest").exit_code == 1
    assert "the manifest says" in packed.verify_manifest(made)["sni_val.parquet"]
    table = pq.read_table(made / "sni_val.parquet")
    pq.write_table(table.rename_columns(["task", "split", "id", "text", "outputs"]), made / "sni_val.parquet")
    with pytest.raises(DataError, match=r"sni_val.parquet: missing columns \['input'\], unknown columns \['text'\]"):
        packed.check_schema(made / "sni_val.parquet", "sni_val.parquet")
    (made / "sni_val.parquet").unlink()
    assert set(packed.verify_manifest(made)) == {"sni_val.parquet"}


# ------------------------------------------------------------------------------------------------------ check


def own_rows(name: str = "mine", number: int = 12, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "task": name,
            "description": "Say yes or no.",
            "input": f"{name} {i} apples are there",
            "output": "no" if i % 3 else "yes",
        }
        | more
        for i in range(number)
    ]


def test_sound_own_tasks_pass(tmp_path: Path) -> None:
    result = t2l("data", "check", write_jsonl(tmp_path / "own.jsonl", own_rows()), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["problems"] == []
    assert report["tasks"]["mine"]["labels"] == {"no": 8, "yes": 4}
    assert report["totals"]["examples"] == {"train": 12, "val": 0, "test": 0}
    assert report["totals"]["lengths"]["output"]["characters"]["max"] == 3
    assert any("T2L_DATA is not set" in warning for warning in report["warnings"])
    shown = t2l("data", "check", tmp_path / "own.jsonl")
    assert "no 67%, yes 33%" in shown.stdout and "warning: " in shown.stderr


def test_repeats_and_blank_answers_are_found(tmp_path: Path) -> None:
    rows = own_rows()
    rows += [rows[0], rows[1] | {"output": "maybe"}, rows[2] | {"split": "val"}, rows[3] | {"split": "test"}]
    report = check.check(str(write_jsonl(tmp_path / "own.jsonl", rows)))
    assert report.totals["repeats"] == {
        "inside_a_split": 1,
        "same_input_other_answer": 1,
        "train_inputs_in_own_test": 1,
        "train_inputs_in_own_validation": 1,
    }
    assert report.problems == ["1 training inputs stand in the test examples of their own task: mine"]
    bad = write_jsonl(tmp_path / "blank.jsonl", [*own_rows(), own_rows()[0] | {"output": " "}])
    result = t2l("data", "check", bad)
    assert result.exit_code == 1 and f"{bad}:13" in result.stderr
    named = write_jsonl(tmp_path / "named.jsonl", own_rows(min(load_splits().test)))
    assert t2l("data", "check", named).exit_code == 1


def packed_folder(folder: Path, tasks: dict[str, dict[str, list[tuple[str, list[str]]]]], **changes: Any) -> Path:
    """A packed folder with these tasks' examples by split, and one benchmark."""
    import pyarrow as pa

    folder.mkdir()
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in packed.EXAMPLES}
    table = []
    for name, splits in tasks.items():
        for split, found in splits.items():
            rows[split] += [
                {"task": name, "split": split, "id": f"{name}{i}", "input": text, "outputs": outputs}
                for i, (text, outputs) in enumerate(found)
            ]
        counts = {f"n_{split}": len(splits.get(split, [])) for split in rows}
        blank = dict.fromkeys(packed.COLUMNS[packed.TASKS])
        table.append({**blank, "task": name, "definition": "Say it.", "descriptions": [], **counts, **changes})
    pq.write_table(pa.Table.from_pylist(table, packed.schema(packed.TASKS)), folder / packed.TASKS)
    for split, file in packed.EXAMPLES.items():
        pq.write_table(pa.Table.from_pylist(rows[split], packed.schema(file)), folder / file)
    asked = [
        {
            "benchmark": "boolq",
            "split": "test",
            "id": str(i),
            "input": f"bench question number {i} of ten",
            "choices": [],
            "answer": "yes",
            "code": None,
        }
        for i in range(10)
    ]
    pq.write_table(pa.Table.from_pylist(asked, packed.schema(packed.BENCHMARKS)), folder / packed.BENCHMARKS)
    return folder


def some(label: str, number: int = 20) -> list[tuple[str, list[str]]]:
    """Inputs of twelve words, none of which occurs in another input."""
    texts = [" ".join(f"{label}{i}w{k}" for k in range(12)) for i in range(number)]
    return [(text, ["yes" if i % 2 else "no"]) for i, text in enumerate(texts)]


TRAIN, TEST = sorted(load_splits().train)[:2], min(load_splits().test)


def test_leaks_into_held_out_tasks_and_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packed_folder(tmp_path / "data", {TRAIN[0]: {"train": some("a")}, TEST: {"test": some("held", 60)}})
    assert check.check(str(folder)).problems == []
    monkeypatch.setenv("T2L_DATA", str(folder))

    def problems(inputs: list[str]) -> list[str]:
        rows = own_rows() + [own_rows()[0] | {"input": text} for text in inputs]
        return check.check(str(write_jsonl(tmp_path / "own.jsonl", rows))).problems

    held = [text for text, _ in some("held", 60)]
    assert problems([]) == []
    (found,) = problems([held[0].upper() + "!!"])  # 1 of 13
    assert f"test task: mine and held-out {TEST} (" in found
    (found,) = problems([f"Read this. {held[1]} Is it so?"])  # by word grams
    assert TEST in found
    (found,) = problems(["bench question number 3 of ten"])
    assert "benchmark task: mine and benchmark boolq (10.0%)" in found
    report = check.check(
        str(write_jsonl(tmp_path / "own.jsonl", [*own_rows(number=100), own_rows()[0] | {"input": held[0]}]))
    )
    assert report.problems == [] and any("pairs of a training task and a test task" in w for w in report.warnings)
    result = t2l("data", "check", write_jsonl(tmp_path / "own.jsonl", [own_rows()[0] | {"input": held[0]}]))
    assert result.exit_code == 1 and "error: training tasks share" in result.stderr

    leaky = packed_folder(tmp_path / "leaky", {TRAIN[0]: {"train": some("held", 9)}, TEST: {"test": some("held", 60)}})
    (found,) = check.check(str(leaky)).problems
    assert f"{TRAIN[0]} and held-out {TEST} (15.0%)" in found


def test_a_spoilt_packed_folder_is_found(tmp_path: Path) -> None:
    folder = packed_folder(
        tmp_path / "data",
        {TRAIN[0]: {"train": [*some("a"), ("blank", [" "]), ("none", [])]}, TRAIN[1]: {}},
    )
    problems = check.check(str(folder)).problems
    assert any(p.startswith("2 examples have no or a blank answer: ") for p in problems)
    assert any(p == f"empty tasks that the frozen split uses: {TRAIN[1]}" for p in problems)
    folder = packed_folder(tmp_path / "short", {TRAIN[0]: {"train": some("a")}}, n_train=21)
    (found,) = check.check(str(folder)).problems
    assert "n_train is 21, 20 are there" in found
    (folder / "sni_val.parquet").unlink()
    assert "sni_val.parquet missing" in check.check(str(folder)).problems[0]
    (folder / packed.TASKS).write_bytes(b"PAR1 nonsense")
    result = t2l("data", "check", folder)
    assert result.exit_code == 1 and "cannot be read as Parquet" in result.stderr
    undescribed = packed_folder(tmp_path / "undescribed", {TRAIN[0]: {"train": some("a")}}, definition=None)
    assert any("no description" in warning for warning in check.check(str(undescribed)).warnings)


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "zeros in the middle"])
def test_damaged_packed_files_are_named_with_the_way_out(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever reads them, and by `t2l doctor`, which looks at heads and ends alone."""
    folder = packed_folder(tmp_path / "data", {TRAIN[0]: {"train": some("a"), "test": some("b")}})
    monkeypatch.setenv("T2L_DATA", str(folder))
    for name in (packed.TASKS, *packed.EXAMPLES.values()):
        path = folder / name
        whole = path.read_bytes()
        if damage == "foreign":
            pq.write_table(pa.table({"a": [1]}), path)
        else:
            half = len(whole) // 2
            zeros = whole[:4] + bytes(half) + whole[4 + half :]
            path.write_bytes({"empty": b"", "cut": whole[:half]}.get(damage, zeros))
        with pytest.raises(DataError, match=rf"{name} (is damaged|is of another kind).*"):
            load_sni([TRAIN[0]])
        if damage != "zeros in the middle":
            result = t2l("doctor")
            assert result.exit_code == 1 and str(path) in result.stderr
        path.write_bytes(whole)
    assert load_sni([TRAIN[0]])


def test_tokens_are_counted(base_folder: Path, tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", own_rows())
    report = json.loads(t2l("data", "check", own, "--tokenizer", base_folder, "--json").stdout)
    lengths = report["totals"]["lengths"]["output"]
    assert lengths["tokens"] == lengths["characters"]  # one token a byte


# -------------------------------------------------------------------------------------------------- own tasks


def test_own_tasks_from_a_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "own" / "b.jsonl", own_rows("two", 2))
    write_jsonl(tmp_path / "own" / "a.jsonl", [*own_rows("one", 2), *own_rows("two", 1)])
    (tmp_path / "own" / "notes.txt").write_text("no JSON")
    tasks = load_own(tmp_path / "own")
    assert [task.name for task in tasks] == ["one", "two"]
    ids = [example.id for example in tasks[1].examples["train"]]
    assert ids == ["two-a-3", "two-b-1", "two-b-2"]
    assert load_own(str(tmp_path / "own" / "b.jsonl"))[0].name == "two"
    write_jsonl(tmp_path / "own" / "c.jsonl", [own_rows()[0], {"task": "x"}])
    with pytest.raises(DataError, match=r"c\.jsonl:2: missing keys"):
        load_own(tmp_path / "own")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"folder without \*\.jsonl"):
        load_own(tmp_path / "empty")


def test_own_tasks_through_the_datasets_library(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "train.jsonl", [row | {"note": 1} for row in own_rows(number=3)])
    write_jsonl(tmp_path / "set" / "validation.jsonl", [row | {"note": 1} for row in own_rows(number=2)])
    (task,) = load_own(f"hf:{tmp_path / 'set'}")
    assert {split: len(found) for split, found in task.examples.items()} == {"train": 3, "val": 2}
    assert task.examples["val"][1].id == "mine-validation-1"
    write_jsonl(tmp_path / "bad" / "train.jsonl", [{"task": "a", "description": "b", "text": "c", "output": "d"}])
    with pytest.raises(DataError, match=r"bad, split train: there is no column 'input'; found task, description, text"):
        load_own(f"hf:{tmp_path / 'bad'}")
    write_jsonl(tmp_path / "blank" / "train.jsonl", [own_rows()[0], own_rows()[1] | {"output": ""}])
    with pytest.raises(DataError, match="blank, split train, row 1: output must be"):
        load_own(f"hf:{tmp_path / 'blank'}")
    with pytest.raises(DataError, match=r"Cannot load hf:.*nowhere"):
        load_own(f"hf:{tmp_path / 'nowhere'}")


def test_hub_references_need_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'text-to-lora\[data\]'"):
        load_own("hf:someone/tasks")
    with pytest.raises(DataError, match=r"pip install 'text-to-lora\[data\]'"):
        build.build(tmp_path / "out", benchmarks=True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"task": "a"}, "must be an object with task and description"),
        ({"task": "a", "description": []}, "text or a list of texts"),
        ({"task": "a", "description": ["fine", " "]}, "only white space"),
        ([], "must be an object"),
    ],
)
def test_description_files_are_read_strictly(row: Any, reason: str, tmp_path: Path) -> None:
    good = {"task": "a", "description": ["one", "two", "one"]}
    assert load_descriptions(write_jsonl(tmp_path / "d.jsonl", [good])) == {"a": ("one", "two")}
    with pytest.raises(DataError, match=rf"d\.jsonl:2.*{reason}"):
        load_descriptions(write_jsonl(tmp_path / "d.jsonl", [good, row]))


# --------------------------------------------------------------------------------------------------- describe


class Stub:
    """A chat endpoint on this machine: each request takes the next of `answers`, the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append((self.path, dict(self.headers), body))
                answer = stub.answers.pop(0) if len(stub.answers) > 1 else stub.answers[0]
                if answer == "hang up":
                    self.connection.close()
                    return
                status, headers, text = answer
                if callable(text):
                    text = text(len(stub.requests), self.headers)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """Hanging up is no error here."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.close()


def says(text: str | Callable[[int, Any], str]) -> tuple[int, dict[str, str], Any]:
    def body(number: int, headers: Any) -> str:
        content = text(number, headers) if callable(text) else text
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})

    return 200, {}, body


FRESH = says(lambda n, _: "Here they are:\n```json\n" + json.dumps([f"Wording {n}-{i}." for i in range(4)]) + "\n```")
KEY = "sk-very-secret-0123456789"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    hidden = [own_rows("one", 1, split="test")[0] | {"input": "a hidden test input"}]
    return write_jsonl(tmp_path / "own.jsonl", own_rows("one") + own_rows("two") + own_rows("three") + hidden)


def test_describe_writes_a_line_for_each_task(
    stub: Stub, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(endpoint.KEY_VARIABLE, KEY)
    stub.answers = [FRESH]
    out = tmp_path / "new" / "more.jsonl"
    command = ("data", "describe", own, "--out", out, "--n", 4, "--endpoint", stub.url + "/v1", "--model", "tiny")
    result = t2l(*command)
    assert result.exit_code == 0, result.output
    assert load_descriptions(out) == {
        name: tuple(f"Wording {number}-{i}." for i in range(4))
        for number, name in enumerate(["one", "three", "two"], 1)
    }
    path, headers, body = stub.requests[0]
    assert (path, headers["Authorization"], body["model"]) == ("/v1/chat/completions", f"Bearer {KEY}", "tiny")
    asked = body["messages"][1]["content"]
    assert "Say yes or no." in asked and "Input: one 0 apples" in asked and "4 further descriptions" in asked
    assert "hidden test input" not in asked
    assert KEY not in result.output and KEY not in out.read_text()
    again = t2l(*command)
    assert again.exit_code == 1 and "pass --resume" in again.stderr
    assert t2l(*command, "--resume").exit_code == 0 and len(stub.requests) == 3


def test_unusable_answers_are_asked_again_and_named(stub: Stub, own: Path, tmp_path: Path) -> None:
    (task, *_) = load_own(own)
    opened = endpoint.open_endpoint(stub.url, "tiny")
    mixed = json.dumps(["say YES or no!", "Good one.", "good  one", " ", "x" * 1001, "Another."])
    stub.answers = [says("I cannot do that."), says(mixed), says('["Third."]')]
    said: list[str] = []
    describe.describe([task], tmp_path / "a.jsonl", opened, number=3, say=said.append)
    assert load_descriptions(tmp_path / "a.jsonl")["one"] == ("Good one.", "Another.", "Third.")
    assert "no JSON list: “I cannot do that.”" in said[0]
    assert "Write 1 further" in stub.requests[2][2]["messages"][1]["content"]

    stub.answers = [says('[{"a": 1}]')]
    with pytest.raises(DataError, match=r"one: no usable descriptions after 3 answers: the answer is no JSON list"):
        describe.describe([task], tmp_path / "b.jsonl", opened, number=3)
    stub.answers = [(200, {}, '{"error": "no such model"}')]
    with pytest.raises(DownloadError, match=r"does not answer like a completion endpoint .*no such model"):
        describe.describe([task], tmp_path / "b.jsonl", opened)
    assert not (tmp_path / "b.jsonl").exists()
    stub.answers = [says('["Only one."]')]
    describe.describe([task], tmp_path / "c.jsonl", opened, number=3, say=said.append)
    assert said[-2] == "one: only 1 of 3 descriptions could be used"


def test_limits_and_failures_are_waited_out(stub: Stub, own: Path, tmp_path: Path) -> None:
    (task, *_) = load_own(own)
    stub.answers = [(429, {"Retry-After": "7"}, "slow down"), (503, {}, "busy"), "hang up", FRESH]
    pauses: list[float] = []
    opened = endpoint.open_endpoint(stub.url, "tiny")
    describe.describe([task], tmp_path / "a.jsonl", opened, number=4, sleep=pauses.append)
    assert pauses == [7.0, 4.0, 8.0]
    stub.answers = [(500, {}, "broken")]
    with pytest.raises(DownloadError, match=r"no answer after 6 attempts: HTTP 500: broken"):
        describe.describe([task], tmp_path / "b.jsonl", opened, sleep=pauses.append)


def test_a_server_that_dies_midway_and_resume(stub: Stub, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "more.jsonl"
    tasks = load_own(own)
    stub.answers = [FRESH, FRESH, "hang up"]
    opened = endpoint.open_endpoint(stub.url, "tiny")
    with pytest.raises(DownloadError, match=r"two: .* 2 of 3 tasks are in .*; go on with --resume"):
        describe.describe(tasks, out, opened, number=4, sleep=lambda _: None)
    before = out.read_bytes()
    with out.open("ab") as file:
        file.write(b'{"task": "two", "descr')  # as a crash in the middle of a line leaves it
    stub.answers = [FRESH]
    assert describe.describe(tasks, out, opened, number=4, resume=True) == 1
    assert out.read_bytes().startswith(before) and list(load_descriptions(out)) == ["one", "three", "two"]


def test_time_outs(stub: Stub, own: Path, tmp_path: Path) -> None:
    (task, *_) = load_own(own)
    waiting = threading.Event()
    stub.answers = [says(lambda *_: str(waiting.wait(5)))]
    opened = endpoint.open_endpoint(stub.url, "tiny", timeout=0.05)
    try:
        with pytest.raises(DownloadError, match=r"after 6 attempts: TimeoutError"):
            describe.describe([task], tmp_path / "a.jsonl", opened, sleep=lambda _: None)
    finally:
        waiting.set()


@pytest.mark.parametrize("status", [401, 302])
def test_the_key_stays_where_it_is(
    status: int, stub: Stub, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(endpoint.KEY_VARIABLE, KEY)
    quoting = (status, {"Location": stub.url + "/elsewhere"}, lambda _, headers: "Bad key: " + headers["Authorization"])
    stub.answers = [quoting]
    out = tmp_path / "more.jsonl"
    result = t2l("data", "describe", own, "--out", out, "--endpoint", stub.url, "--model", "tiny")
    assert result.exit_code == 1 and f"HTTP {status}: Bad key: Bearer [key]" in result.stderr
    assert KEY not in result.output and not out.exists()
    assert [path for path, _, _ in stub.requests] == ["/v1/chat/completions"]  # no redirect was followed
    assert KEY not in repr(endpoint.open_endpoint(stub.url, "tiny"))


def test_endpoints_that_would_give_the_key_away(monkeypatch: pytest.MonkeyPatch) -> None:
    assert endpoint.open_endpoint("http://example.org", "m").root == "http://example.org/v1"
    assert endpoint.open_endpoint("https://h/x/chat/completions/", "m").root == "https://h/x"
    for url in ("ftp://h", "h:80", f"https://me:{KEY}@h/v1", "https://h/v1?key=x"):
        with pytest.raises(ConfigError, match="--endpoint"):
            endpoint.open_endpoint(url, "m")
    monkeypatch.setenv(endpoint.KEY_VARIABLE, KEY)
    with pytest.raises(ConfigError, match=r"unencrypted to example\.org"):
        endpoint.open_endpoint("http://example.org", "m")
    monkeypatch.setenv(endpoint.KEY_VARIABLE, KEY + "\nX-Other: 1")
    with pytest.raises(ConfigError) as caught:
        endpoint.open_endpoint("https://example.org", "m")
    assert KEY not in str(caught.value)


def test_a_task_without_descriptions_or_examples_can_be_asked_about() -> None:
    messages = describe.make_messages(Task("bare", (), {"train": (Example("1", "x" * 5000, ("y",)),)}), (), 2)
    assert len(messages[1]["content"]) < 1500
