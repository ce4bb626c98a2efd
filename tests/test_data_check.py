"""Checking packed data and own tasks, and reading own tasks from a folder or through the `datasets` library."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from data_helpers import own_rows, t2l, write_jsonl

from t2l.errors import DataError
from t2l.tasks import load_descriptions, load_own, load_sni, load_splits

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
from t2l.data import build, check, packed  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")


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
    assert result.exit_code == 1 and "is damaged or no Parquet file" in result.stderr
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


@pytest.fixture
def own(tmp_path: Path) -> Path:
    hidden = [own_rows("one", 1, split="test")[0] | {"input": "a hidden test input"}]
    return write_jsonl(tmp_path / "own.jsonl", own_rows("one") + own_rows("two") + own_rows("three") + hidden)
