"""Fetching and packing data: the real `datasets` library on local files."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import programs
import pytest
from data_helpers import content, datasets, t2l, write_jsonl

from t2l.errors import ConfigError, DataError, DownloadError, OutputError
from t2l.tasks import Example, load_sni, load_splits

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
from t2l.data import build, convert, fetching, packed  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")

DATA = Path(os.environ.get("T2L_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
NAMES = ("task900_colours", "task901_sums", "task902_sides")
PACKED = [*packed.SNI_FILES, packed.BENCHMARKS]


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


@pytest.fixture
def source(tmp_path: Path) -> str:
    for name in NAMES:
        write_task(tmp_path / "source", name)
    return f"{tmp_path}/source/{{task}}"


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
    done = programs.run(["-c", KILLED, str(out), source, str(tmp_path / "hf"), tasks])
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


TRAIN, TEST = sorted(load_splits().train)[:2], min(load_splits().test)
