"""Tasks: what is tested is never trained on, and a mistake in own data is named by file and line."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from t2l.errors import DataError
from t2l.tasks import Example, Task, data_dir, load_jsonl, load_sni, load_splits, read_parquet, require_trainable
from t2l.train import dataset
from t2l.train.config import DataConfig

GOOD = {"task": "mine", "description": "Say yes.", "input": "Really?", "output": "yes"}


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ the split


def test_parts_of_the_split_are_disjoint() -> None:
    splits = load_splits()
    parts = [splits.train, splits.validation, splits.test, splits.excluded.keys()]
    assert all(len(part) >= 10 for part in parts)
    for one, other in itertools.combinations(parts, 2):
        assert not set(one) & set(other)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("test", "it is a zero-shot test task"),
        ("validation", "it is a validation task"),
        ("excluded", "it is excluded: "),
    ],
)
def test_no_trainer_takes_what_is_tested_or_excluded(part: str, reason: str, tmp_path: Path) -> None:
    """Each name of each part, by itself and hidden in a user's own file; the reader of every trainer refuses it."""
    splits = load_splits()
    for name in getattr(splits, part):
        with pytest.raises(DataError, match="may not be trained on") as caught:
            require_trainable([*sorted(splits.train)[:3], name])
        assert f"{name} ({reason}" in str(caught.value)
    path = write(tmp_path / "own.jsonl", GOOD, GOOD | {"task": name})
    with pytest.raises(DataError, match=name):
        dataset.load_tasks(DataConfig(tasks=str(path)))
    path = write(tmp_path / "own.jsonl", GOOD, GOOD | {"task": name, "split": "val"})
    with pytest.raises(DataError, match=name):
        dataset.load_tasks(DataConfig(tasks=str(path)))


def test_training_and_own_tasks_pass() -> None:
    require_trainable([*load_splits().train, "my-own-task"])


def test_many_refused_tasks_are_counted() -> None:
    with pytest.raises(DataError, match="and 55 more"):
        require_trainable(sorted(load_splits().test))


def test_default_training_reads_only_training_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sni` asks for training tasks and, to watch, for those that settings are chosen on: never for what is tested."""
    calls: list[tuple[set[str], tuple[str, ...]]] = []

    def load(names: Any, *, splits: tuple[str, ...]) -> list[Task]:
        calls.append((set(names), splits))
        return []

    monkeypatch.setattr(dataset, "load_sni", load)
    dataset.load_tasks(DataConfig())
    split = load_splits()
    assert calls == [
        (set(split.train - split.held_back), ("train", "val")),
        (set(split.validation | split.held_back), ("val",)),
    ]


# ------------------------------------------------------------------------------------------------- own tasks


def test_jsonl_is_read_whole(tmp_path: Path) -> None:
    path = write(
        tmp_path / "own.jsonl",
        GOOD | {"task": "b", "description": ["Say yes.", "Agree."]},
        "",
        GOOD | {"task": "a", "output": ["yes", "sure"], "split": "val"},
        GOOD | {"task": "b", "description": ["Agree.", " Nod. "], "input": "two\nlines"},
    )
    assert load_jsonl(path) == [
        Task("a", ("Say yes.",), {"val": (Example("a-3", "Really?", ("yes", "sure")),)}),
        Task(
            "b",
            ("Say yes.", "Agree.", "Nod."),
            {"train": (Example("b-1", "Really?", ("yes",)), Example("b-4", "two\nlines", ("yes",)))},
        ),
    ]


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0c"])
def test_signs_that_look_like_line_ends_stay_in_their_text(sign: str, tmp_path: Path) -> None:
    """JSON allows most of them inside a text, and real data hold them."""
    raw = json.dumps(GOOD | {"input": f"a{sign}b"}, ensure_ascii=sign == "\x0c")
    (task,) = load_jsonl(write(tmp_path / "own.jsonl", raw))
    assert task.examples["train"][0].input == f"a{sign}b"


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ('{"task": "x"', "cannot be read as JSON"),
        ("[1]", "must be an object"),
        ({"task": "x", "input": "y"}, "missing keys description, output$"),
        (GOOD | {"outputs": ["x"]}, ": unknown keys outputs$"),
        (GOOD | {"split": "dev"}, "split is 'dev', expected one of train, val, test"),
        (GOOD | {"output": []}, "output must be text"),
        (GOOD | {"output": " "}, "output must be text"),
        (GOOD | {"output": ["yes", 3]}, "output must be text"),
        (GOOD | {"output": 5}, "output must be text"),
        (GOOD | {"output": None}, "output must be text"),
        (GOOD | {"output": {"yes": 1}}, "output must be text"),
        (GOOD | {"input": 5}, "task and input must be text"),
        (GOOD | {"task": 5}, "task and input must be text"),
        (GOOD | {"description": ""}, "description is empty"),
        (GOOD | {"description": []}, "description must be text"),
        (GOOD | {"description": 5}, "description must be text"),
        (GOOD | {"description": ["Say yes.", 5]}, "must be text, got int"),
        (GOOD | {"description": "x" * 40_000}, "40,000 bytes"),
    ],
)
def test_mistakes_are_named_by_file_and_line(row: Any, match: str, tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", GOOD, "", row)
    with pytest.raises(DataError, match=match) as caught:
        load_jsonl(path)
    assert str(caught.value).startswith(f"{path}:3")


def test_file_that_gives_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read .*absent"):
        load_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="holds no examples"):
        load_jsonl(write(tmp_path / "own.jsonl", "", " "))
    (tmp_path / "own.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"own\.jsonl:1 cannot be read"):
        load_jsonl(tmp_path / "own.jsonl")
    path = write(tmp_path / "own.jsonl", GOOD | {"split": "val"})
    with pytest.raises(DataError, match="no task with examples of split 'train'"):
        dataset.load_tasks(DataConfig(tasks=str(path)))


# --------------------------------------------------------------------------------------------- packed tasks


def test_missing_data_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("T2L_DATA", raising=False)
    with pytest.raises(DataError, match="T2L_DATA is not set"):
        data_dir()
    monkeypatch.setenv("T2L_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"holds no sni_tasks\.parquet"):
        dataset.load_tasks(DataConfig())


def test_packed_tasks(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [
        {"task": name, "definition": "Long.", "summary": "Short.", "descriptions": ["Long.", " Other. ", ""],
         "category": "c"}
        for name in ("task2", "task1", "task3")
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sni_tasks.parquet")
    examples = [{"task": f"task{n}", "id": f"i{n}", "input": f"in {n}", "outputs": ["a", "b"]} for n in (1, 2, 3)]
    for split in ("train", "val"):
        pq.write_table(pa.Table.from_pylist(examples), tmp_path / f"sni_{split}.parquet")
    one, two = load_sni({"task2", "task1"}, splits=("train", "val"), folder=tmp_path)
    assert (one.name, two.name) == ("task1", "task2")
    assert one.descriptions == ("Long.", "Short.", "Other.")
    assert two.examples == {split: (Example("i2", "in 2", ("a", "b")),) for split in ("train", "val")}
    with pytest.raises(DataError, match="has no task task9"):
        load_sni(["task9"], folder=tmp_path)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda data: data[: len(data) // 2], "is damaged or no Parquet file"),
        (lambda data: b"", "is damaged or no Parquet file"),
        (lambda data: data[:30] + bytes(len(data) // 3) + data[30 + len(data) // 3 :], "is damaged or no Parquet file"),
        (lambda data: parquet(task=[1, 2], id=["a", "b"], input=["x", "y"], outputs=[["1"], ["2"]]), "has type int64"),
        (lambda data: parquet(task=["t"], id=["a"], input=["x"], outputs=["yes"]), "has type string, expected texts"),
        (
            lambda data: parquet(task=["t"], id=["a"], input=["x", None][1:], outputs=[["1"]]),
            "column input has type null",
        ),
        (lambda data: parquet(task=["t"] * 2, id=["a"] * 2, input=["x", None], outputs=[["1"]] * 2), "lacks 1 values"),
        (lambda data: parquet(a=[1]), "expected are task, id, input, outputs"),
        (None, "is missing"),
    ],
)
def test_damaged_packed_files_are_named(damage: Any, match: str, tmp_path: Path) -> None:
    path = tmp_path / "sni_test.parquet"
    if damage is not None:
        path.write_bytes(damage(parquet(task=["t"] * 99, id=["a"] * 99, input=["x"] * 99, outputs=[["1"]] * 99)))
    with pytest.raises(DataError, match=f"sni_test.parquet.*{match}"):
        read_parquet(path, ("task", "id", "input", "outputs"))


def parquet(**columns: Any) -> bytes:
    """The bytes of a Parquet file."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    out = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), out, compression="none", use_dictionary=False)
    return bytes(out.getvalue())
