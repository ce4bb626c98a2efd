"""The frozen split of tasks: nothing that is tested may be trained on, in name, in category or in content."""

import importlib
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SPLITS = REPOSITORY / "src" / "t2l" / "data" / "splits.json"
PARTS = ("train", "test", "validation")


@pytest.fixture(scope="module")
def splits() -> dict[str, Any]:
    return json.loads(SPLITS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Path(os.environ.get("T2L_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not (folder / "sni_tasks.parquet").is_file():
        pytest.skip(f"no data in {folder}: set T2L_DATA to the folder of the packed data")
    return folder


@pytest.fixture(scope="module")
def tasks(data: Path) -> dict[str, dict[str, Any]]:
    """The tasks that have examples, by name."""
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = ["task", "lol_split", "category", "benchmark_overlap", "n_train", "n_test"]
    rows = parquet.read_table(data / "sni_tasks.parquet", columns=columns).to_pylist()
    return {row["task"]: row for row in rows if row["n_train"]}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("pyarrow.parquet")
    return importlib.import_module("make_splits")


# The committed file, without the data.


def test_parts_have_the_promised_sizes(splits: dict[str, Any]) -> None:
    assert splits["format_version"] == 1
    assert len(splits["test"]) == 60
    assert len(splits["test_unseen_category"]) >= 12
    assert len(splits["validation"]) == 11
    assert len(splits["train"]) > 500


@pytest.mark.parametrize("part", [*PARTS, "test_unseen_category", "validation_with_benchmark_overlap"])
def test_parts_are_sorted_and_unique(splits: dict[str, Any], part: str) -> None:
    assert splits[part] == sorted(set(splits[part]))


def test_no_task_is_in_two_parts(splits: dict[str, Any]) -> None:
    counts = Counter(task for part in (*PARTS, "excluded") for task in splits[part])
    assert [task for task, count in counts.items() if count > 1] == []


def test_subsets_are_subsets(splits: dict[str, Any]) -> None:
    assert set(splits["test_unseen_category"]) < set(splits["test"])
    assert set(splits["validation_with_benchmark_overlap"]) < set(splits["validation"])


def test_every_exclusion_has_a_reason(splits: dict[str, Any]) -> None:
    assert splits["excluded"]
    for task, reason in splits["excluded"].items():
        assert isinstance(reason, str) and reason.strip(), task


def test_overlap_is_reported_and_within_the_limit(splits: dict[str, Any]) -> None:
    assert sorted(splits["overlap"]) == splits["test"]
    assert sorted(splits["overlap_validation"]) == splits["validation"]
    trained = set(splits["train"])
    for task, figures in splits["overlap"].items():
        for measure in ("exact", "ngram"):
            assert figures[measure]["share"] <= 0.05, task
            assert figures[measure]["task"] is None or figures[measure]["task"] in trained, task
        assert 0 <= figures["test_inputs_in_any_training_task"] <= 1, task


def test_rule_and_data_are_named(splits: dict[str, Any]) -> None:
    assert len(splits["rule"]) > 500
    sni = [f"sni_{part}.parquet" for part in ("tasks", "test", "train", "val")]
    assert sorted(splits["data"]) == ["benchmarks.parquet", *sni]
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in splits["data"].values())


# The file against the data.


def test_every_task_with_examples_is_accounted_for(splits: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> None:
    listed = {task for part in (*PARTS, "excluded") for task in splits[part]}
    assert listed == set(tasks)


def test_tasks_come_from_the_right_source(splits: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> None:
    assert {tasks[task]["lol_split"] for task in splits["test"]} == {"other"}
    assert {tasks[task]["lol_split"] for task in splits["train"]} == {"train", "other"}
    assert splits["validation"] == sorted(task for task, row in tasks.items() if row["lol_split"] == "validation")
    assert min(tasks[task]["n_test"] for task in splits["test"]) >= 50


def test_unseen_categories_have_no_training_task(splits: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> None:
    trained = {tasks[task]["category"] for task in splits["train"]}
    unseen = {task for task in splits["test"] if tasks[task]["category"] not in trained}
    assert unseen == set(splits["test_unseen_category"])
    assert None not in {tasks[task]["category"] for task in unseen}


def test_benchmark_and_removed_tasks_are_never_used(splits: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> None:
    barred = {task for task, row in tasks.items() if row["benchmark_overlap"] or row["lol_split"] == "removed"}
    in_validation = barred & set(splits["validation"])
    assert in_validation == set(splits["validation_with_benchmark_overlap"])
    assert barred - in_validation <= set(splits["excluded"])


def test_test_inputs_are_not_in_training_tasks(splits: dict[str, Any], data: Path) -> None:
    """The exact measure, worked out again from the data, for all test tasks and all training tasks."""
    parquet = pytest.importorskip("pyarrow.parquet")
    test, train = set(splits["test"]), set(splits["train"])
    tested: list[tuple[str, str, bool]] = []
    trained_in: dict[str, set[str]] = defaultdict(set)
    for split in ("train", "val", "test"):
        table = parquet.read_table(data / f"sni_{split}.parquet", columns=["task", "input"])
        for task, text in zip(table["task"].to_pylist(), table["input"].to_pylist(), strict=True):
            if task not in test and task not in train:
                continue
            plain = re.sub(r"[\W_]+", " ", text.lower()).strip() or text
            if task in test:
                tested.append((task, plain, split == "test"))
            else:
                trained_in[plain].add(task)
    for scored_only in (False, True):
        totals = Counter(task for task, _, scored in tested if scored or not scored_only)
        shared = Counter(
            (task, other)
            for task, plain, scored in tested
            if scored or not scored_only
            for other in trained_in.get(plain, ())
        )
        too_much = {pair: count for pair, count in shared.items() if count > 0.05 * totals[pair[0]]}
        assert too_much == {}


# The parts of the script that decide.


def test_overlap_finds_reworded_and_short_inputs(script: ModuleType) -> None:
    story = "Once upon a time there was a small brown fox who lived near the river"
    corpus = script.build_corpus(
        [
            ("a", story, True),
            ("a", "Paris", True),
            ("a", "A sentence that nobody else has ever written down anywhere", False),
            ("a", "...", False),
            ("b", f"Read this. {story}! Who lived near the river?", False),
            ("b", "unrelated", False),
            ("c", " PARIS. ", False),
        ]
    )
    overlap = script.SplitOverlap(corpus, ["a"])
    # One of the two scored inputs, though only one of all four.
    assert overlap.share("a", "b") == pytest.approx(0.5)
    assert overlap.share("a", "c") == pytest.approx(0.5)
    assert overlap.share("a", "a") == 0
    report = overlap.report("a", ["b", "c"])
    assert report["exact"] == {"share": 0.5, "task": "c"}
    assert report["ngram"] == {"share": 0.5, "task": "b"}
    assert report["test_inputs_in_any_training_task"] == 1.0


def test_seats_are_proportional_and_capped(script: ModuleType) -> None:
    assert script.share_seats({"large": 30, "middle": 10, "small": 10}, 10, cap=10) == {
        "large": 6,
        "middle": 2,
        "small": 2,
    }
    assert script.share_seats({"large": 30, "small": 2}, 6, cap=5) == {"large": 5, "small": 1}


def test_too_few_candidates_are_an_error(script: ModuleType) -> None:
    from t2l.errors import DataError

    with pytest.raises(DataError, match="7 test tasks are wanted"):
        script.share_seats({"one": 3, "two": 3}, 7, cap=5)


def test_a_category_with_one_training_task_is_held_out_only_if_needed(script: ModuleType) -> None:
    def tasks(category: str, count: int, split: str = "other") -> list[Any]:
        return [script.Task(f"{category}{i}", split, category, None, 60) for i in range(count)]

    train = tasks("rare", 1, "train") + tasks("common", 5, "train")
    few = tasks("new", 10) + tasks("rare", 3) + tasks("common", 9)
    enough = tasks("new", 12) + tasks("rare", 2) + tasks("common", 9)
    assert script.unseen_categories(few, train) == ["new", "rare"]
    assert script.unseen_categories(enough, train) == ["new"]


def test_missing_data_is_named(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--data", str(tmp_path)]) == 2
    assert "sni_tasks.parquet" in capsys.readouterr().err


def test_differences_show_what_changed(script: ModuleType, tmp_path: Path) -> None:
    committed = tmp_path / "splits.json"
    committed.write_text('{"seed": 1}\n', encoding="utf-8")
    assert script.differences(committed, '{"seed": 1}\n') == ""
    assert '+{"seed": 2}' in script.differences(committed, '{"seed": 2}\n')
