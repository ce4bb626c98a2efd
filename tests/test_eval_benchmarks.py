"""The ten benchmarks: asked as they should be, scored as they should be, and run in a whole evaluation."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from t2l.cli import app
from t2l.config import PromptConfig
from t2l.errors import DataError, EvaluationError
from t2l.eval import answers, conditions, decode, suites
from t2l.eval.conditions import CONDITIONS
from t2l.eval.run import Settings, run

SETTINGS: dict[str, Any] = {"seeds": (0, 1), "max_new_tokens": 5, "device": "cpu"}


@pytest.fixture(scope="module")
def benchmark_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up rows in the schema of the packed benchmarks."""
    folder = tmp_path_factory.mktemp("data")
    made: list[dict[str, Any]] = []
    for name, how in suites.BENCHMARKS.items():
        for split in {"test", how.shots or "test"}:
            for n in range(16):
                row: dict[str, Any] = {"benchmark": name, "split": split, "id": f"{name}:{split}:{n}", "code": None}
                row |= {
                    "input": f"{name} {split} {n}?",
                    "choices": [],
                    "answer": f"3 + {n} = <<3+{n}=0>>x\n#### {3 + n}",
                }
                if how.kind == "option":
                    choices = ["no", "yes"] if name == "boolq" else [f" thing {n}{c}" for c in "pqrs"]
                    row |= {"choices": choices, "answer": choices[n % len(choices)]}
                if name == "humaneval":
                    code = {"entry_point": "f", "test": f"def check(c):\n    assert c() == {n}"}
                    row |= {"input": "def f():\n", "answer": f"    return {n}", "code": json.dumps(code)}
                if name == "mbpp":
                    code = {"test_list": [f"assert g() == {n}"], "test_setup_code": ""}
                    row |= {"answer": f"def g():\r\n    return {n}", "code": json.dumps(code)}
                made.append(row)
    pq.write_table(pa.Table.from_pylist(made), folder / "benchmarks.parquet")
    pq.write_table(pa.table({"task": pa.array([], pa.string())}), folder / "sni_tasks.parquet")
    return folder


@pytest.fixture
def benchmarks(benchmark_data: Path, monkeypatch: Any) -> dict[str, suites.EvalTask]:
    monkeypatch.setenv("T2L_DATA", str(benchmark_data))
    return {task.name: task for task in suites.load_suite("benchmarks", per_task=3)}


def test_benchmarks_are_asked_as_they_should_be(benchmarks: dict[str, suites.EvalTask], tiny_tokenizer: Any) -> None:
    asked = {q.task.name: q for q in suites.instances(list(benchmarks.values()), [0])}
    text = {
        name: {
            row: conditions.prompt_of(CONDITIONS[row], q, tiny_tokenizer) for row in ("base", "base+shots+description")
        }
        for name, q in asked.items()
    }
    assert len(asked) == 10
    for name, instance in asked.items():
        assert instance.item.text.strip() in text[name]["base"]
        assert instance.description not in text[name]["base"]
        assert instance.description in text[name]["base+shots+description"]
        assert instance.wrong_description not in text[name]["base+shots+description"]
        # Examples are really there, and none is the item.
        assert len(instance.shots) == (0 if name == "humaneval" else 3)
        for shown, answer in instance.shots:
            assert shown.strip() in text[name]["base+shots+description"]
            assert answer.strip() in text[name]["base+shots+description"]
            assert shown != instance.item.text
    assert text["gsm8k"]["base"].endswith("<assistant>Let's think step by step.")
    assert "<<" not in text["gsm8k"]["base+shots+description"]
    assert all("step by step. 3 +" in answer for _, answer in asked["gsm8k"].shots)
    assert "\nA) thing" in text["piqa"]["base"]
    assert "A)" not in text["boolq"]["base"]
    assert "assert g()" in text["mbpp"]["base"]
    assert asked["arc_easy"].item.outputs[0] in "ABCD"
    assert benchmarks["piqa"].chance == 0.25
    assert asked["humaneval"].wrong_description not in benchmarks["mbpp"].descriptions
    for name in ("arc_easy", "arc_challenge", "openbookqa"):
        others = ("arc_easy", "arc_challenge", "openbookqa")
        assert all(asked[name].wrong_description not in benchmarks[other].descriptions for other in others)


def test_no_seed_shows_the_item_or_takes_a_like_task_for_another(benchmarks: dict[str, suites.EvalTask]) -> None:
    science = {benchmarks[name].name for name in ("arc_easy", "arc_challenge", "openbookqa")}
    like = {text for name in science for text in benchmarks[name].descriptions}
    asked = suites.instances(list(benchmarks.values()), range(12))
    for instance in asked:
        assert instance.item.text not in [text for text, _ in instance.shots]
        assert len(instance.shots) == (0 if instance.task.name == "humaneval" else 3)
        assert instance.wrong_description not in instance.task.descriptions
        assert instance.task.name not in science or instance.wrong_description not in like
    # Examples of hellaswag are test items, so the item was among them at times.
    drawn = {text for q in asked if q.task.name == "hellaswag" for text, _ in q.shots}
    assert drawn & {item.text for item in benchmarks["hellaswag"].items}


def test_scores_of_benchmarks(benchmarks: dict[str, suites.EvalTask]) -> None:
    asked = {q.task.name: q for q in suites.instances(list(benchmarks.values()), [0])}
    for name in ("arc_easy", "boolq", "gsm8k"):
        instance = asked[name]
        right = instance.item.outputs[-1]
        assert suites.score(instance, f"The answer is {right}.") == {"correct": 1.0, "parsed": 1.0}
        assert suites.score(instance, "…") == {"correct": 0.0, "parsed": 0.0}
    wrong = "B" if asked["arc_easy"].item.outputs[0] == "A" else "A"
    assert suites.score(asked["arc_easy"], wrong) == {"correct": 0.0, "parsed": 1.0}
    assert suites.score(asked["gsm8k"], "99") == {"correct": 0.0, "parsed": 1.0}
    assert suites.score(asked["humaneval"], "    return 1\n") == {"correct": None, "parsed": 1.0}
    assert suites.score(asked["mbpp"], "def g(:") == {"correct": None, "parsed": 0.0}
    instance = asked["arc_easy"]
    shares = [-1.0] * 4
    shares[instance.item.target] = -0.5
    assert suites.score_likelihoods(instance, shares) == {"correct": 1.0, "correct_by_sum": 1.0}
    # A longer choice is allowed to be less likely.
    item = dataclasses.replace(instance.item, choices=("ab", "abcdefgh", "x", "y"), target=1)
    longer = dataclasses.replace(instance, item=item)
    assert suites.score_likelihoods(longer, [-2.0, -3.0, -9.0, -9.0]) == {"correct": 1.0, "correct_by_sum": 0.0}


def test_floor_of_fixed_labels_is_the_rarest_labels_share(benchmarks: dict[str, suites.EvalTask]) -> None:
    items = tuple(suites.Item(str(n), "?", ("no",), ("no", "yes"), int(n == 0)) for n in range(4))
    task = dataclasses.replace(benchmarks["boolq"], items=items)
    assert task.floor == 0.25
    assert task.chance == 0.5
    assert benchmarks["piqa"].floor == benchmarks["piqa"].chance


def test_a_subset_is_part_of_a_larger_one(benchmark_data: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("T2L_DATA", str(benchmark_data))
    few, more = (suites.load_suite("benchmarks", per_task=n) for n in (2, 4))
    for one, other in zip(few, more, strict=True):
        assert one.items == other.items[:2]
        assert len(other.items) == 4


def test_likelihood_scoring_and_its_floor(
    benchmark_data: Path, checkpoint: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("T2L_DATA", str(benchmark_data))
    out = tmp_path / "answers.jsonl"
    settings = Settings(suites=("likelihood",), checkpoint=checkpoint, **(SETTINGS | {"conditions": "base,t2l"}))
    run(settings, out, log=lambda text: None)
    lines = answers.read(out).lines
    assert len(lines) == 7 * 16 * 2 * 2
    for line in lines:
        best = max(range(len(line["answer"])), key=lambda i: line["answer"][i])
        target = int(line["id"].rsplit(":", 1)[1]) % len(line["answer"])
        assert line["scores"]["correct_by_sum"] == float(best == target)
    monkeypatch.setattr(suites, "score_likelihoods", lambda instance, values: {"correct": 0.0})
    low = tmp_path / "low.jsonl"
    with pytest.raises(EvaluationError, match="arc_challenge"):
        run(dataclasses.replace(settings, suites=("likelihood",)), low, log=lambda text: None)
    assert {line["condition"] for line in answers.read(low).lines} == {"base"}  # nothing else was asked
    run(dataclasses.replace(settings, check_floor=False), low, log=lambda text: None)
    assert {line["condition"] for line in answers.read(low).lines} == {"base", "t2l"}


def test_choices_begin_as_the_adapters_were_trained(
    benchmark_data: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """With a space for adapters whose answers have one; the base's, in the same run, without."""
    monkeypatch.setenv("T2L_DATA", str(benchmark_data))
    spaced = str(make_checkpoint(tmp_path / "spaced", prompt=PromptConfig(answer_space=True)))
    scored: list[tuple[bool, str]] = []

    def log_likelihoods(model: Any, tokenizer: Any, prompts: Any, ids: list[list[int]], adapters: Any) -> list[float]:
        scored.extend((adapters is not None, tokenizer.decode(some)) for some in ids)
        return [0.0] * len(ids)

    monkeypatch.setattr(decode, "log_likelihoods", log_likelihoods)
    values = SETTINGS | {"conditions": "base,t2l", "seeds": (0,), "check_floor": False}
    run(Settings(suites=("likelihood",), checkpoint=spaced, **values), tmp_path / "a.jsonl", log=lambda text: None)
    assert {adapted for adapted, _ in scored} == {False, True}
    plain = sorted(text for adapted, text in scored if not adapted)
    assert sorted(text for adapted, text in scored if adapted) == sorted(f" {text}" for text in plain)


def test_code_is_run_only_when_asked_for_and_may_be_run_later(
    benchmark_data: Path, base_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from t2l.eval import sandbox

    ran: list[str] = []

    def run_many(codes: list[str], **options: Any) -> list[sandbox.Outcome]:
        assert options == {"allow": True}
        ran.extend(codes)
        return [sandbox.Outcome("return 1" in code, "", "") for code in codes]

    monkeypatch.setenv("T2L_DATA", str(benchmark_data))
    monkeypatch.setattr(sandbox, "run_many", run_many)
    monkeypatch.setattr(sandbox, "available", lambda: None)
    monkeypatch.setattr(suites, "BENCHMARKS", {"humaneval": suites.BENCHMARKS["humaneval"]})
    said = itertools.cycle(["    return 1\n", "    return 2\n"])
    monkeypatch.setattr(decode, "greedy", lambda model, tokenizer, prompts, *_, **__: [next(said) for _ in prompts])
    out = tmp_path / "answers.jsonl"
    values = SETTINGS | {"conditions": "base", "seeds": (0,), "base": str(base_folder), "suites": ("benchmarks",)}
    run(Settings(**values), out, log=lambda text: None)
    assert not ran
    assert [line["scores"]["correct"] for line in answers.read(out).lines] == [None] * 16
    run(Settings(allow_code_execution=True, **values), out, log=lambda text: None)
    assert len(ran) == 16
    assert sorted(line["scores"]["correct"] for line in answers.read(out).lines) == [0] * 8 + [1] * 8
    run(Settings(allow_code_execution=True, **values), out, log=lambda text: None)
    assert len(ran) == 16
    monkeypatch.setattr(sandbox, "available", lambda: "there are no namespaces")
    with pytest.raises(EvaluationError, match="no code is run here, because there are no namespaces"):
        run(Settings(allow_code_execution=True, **values), out, log=lambda text: None)


@pytest.mark.parametrize("change", [{"answer": "none of them"}, {"choices": []}], ids=["no option", "no options"])
def test_a_packed_benchmark_that_cannot_be_asked_is_named(
    change: dict[str, Any], benchmark_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pq.read_table(benchmark_data / "benchmarks.parquet").to_pylist()
    damaged = next(row for row in rows if row["benchmark"] == "piqa" and row["split"] == "test")
    damaged |= change
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "benchmarks.parquet")
    (tmp_path / "sni_tasks.parquet").touch()
    monkeypatch.setenv("T2L_DATA", str(tmp_path))
    with pytest.raises(DataError, match=rf"piqa {damaged['id']} cannot be used"):
        suites.load_suite("benchmarks", per_task=None)


def test_doctor_names_packed_files_that_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sni_tasks", "benchmarks"):
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1, and then the disk was full")
    monkeypatch.setenv("T2L_DATA", str(tmp_path))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1 and "all is there" not in result.output
    assert "damaged: sni_tasks.parquet, benchmarks.parquet" in result.output
    assert f"{tmp_path / 'benchmarks.parquet'} is damaged or no Parquet file" in result.output
