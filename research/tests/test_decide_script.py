"""The script that says what the test decides: its rules are the protocol's, its parts the frozen split's."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_eval_report import header, made

from t2l.eval import answers
from t2l.eval.results import gather
from t2l.eval.stats import Difference, difference, estimate
from t2l.tasks import load_splits

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = ("base+shots", "base+shots+description", "multitask+description", "t2l+description")
ROWS += ("t2l-wrong+description", "t2l-random+description")


@pytest.fixture
def script(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("decide")


def found(mean: float, low: float, one_sided_low: float) -> Difference:
    return Difference(mean, low, 1.0, 100, 10, 0.5, one_sided_low)


def test_rules_are_the_protocols(script: ModuleType) -> None:
    """Mean and interval decide, at the threshold itself too; for D4 the one-sided end does."""
    d1, d2, d3, d4 = script.RULES.values()
    assert d1.reached(found(0.04, 0.001, 0.01)) and not d1.reached(found(0.039, 0.02, 0.03))
    assert not d1.reached(found(0.05, 0.0, 0.01)) and not d1.reached(found(0.05, -0.01, 0.01))
    assert d2.reached(found(0.08, 0.01, 0.02)) and not d2.reached(found(0.07, 0.01, 0.02))
    assert d3.reached(found(0.01, 0.001, 0.005)) and not d3.reached(found(0.01, -0.001, 0.005))
    assert d4.reached(found(-0.01, -0.03, -0.02)) and not d4.reached(found(0.01, -0.03, -0.021))


def test_differences_are_the_reports(script: ModuleType, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("T2L_DATA", raising=False)
    tasks = sorted(load_splits().test)
    (path := tmp_path / "test.jsonl").write_text(answers.to_text(header(), made(ROWS, tasks=tasks)))
    assert script.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    (suite,) = gather([answers.read(path)])
    expected = difference(suite.conditions["t2l+description"], suite.conditions["multitask+description"])
    assert f"{100 * expected.mean:+.1f} [{100 * expected.low:+.1f}, {100 * expected.high:+.1f}]" in lines[0]
    assert len(lines) == 3 * 4 and all(line.startswith(f"| D{n % 4 + 1}, ") for n, line in enumerate(lines))
    assert [line.split(" | ")[1] for line in lines[::4]] == [
        "all (60)", "categories without a training task (13)", "other categories (47)",
    ]  # fmt: skip
    assert lines[0].endswith("| reached |") and lines[1].endswith("| reached |") and lines[4].endswith("|  |")
    assert "one-sided" in lines[3] and lines[3].endswith("| missed |")
    (path := tmp_path / "few.jsonl").write_text(answers.to_text(header(), made(ROWS[2:], tasks=tasks)))
    assert script.main([str(path)]) == 1
    assert "hold no condition base+shots" in capsys.readouterr().err


@pytest.mark.skipif(not os.environ.get("T2L_DATA"), reason="T2L_DATA is not set")
def test_parts_by_answers_are_the_protocols(script: ModuleType) -> None:
    parts = script.parts()
    assert (len(parts["few different answers"]), len(parts["many different answers"])) == (29, 31)


def test_conditions_of_other_weights_take_the_place_of_theirs(script: ModuleType, tmp_path: Path, capsys: Any) -> None:
    tasks = sorted(load_splits().test)
    (path := tmp_path / "test.jsonl").write_text(answers.to_text(header(), made(ROWS, tasks=tasks)))
    worse = made(("multitask+description",), tasks=tasks, scores=lambda name, right: {"exact_match": 0.0})
    (other := tmp_path / "other.jsonl").write_text(answers.to_text(header(multitask_sha256="other"), worse))
    assert script.main([str(path), "--instead", str(other)]) == 0
    (suite,) = gather([answers.read(path)])
    expected = 100 * estimate(suite.conditions["t2l+description"]).mean
    assert f"| multitask+description | {expected:+.1f} [" in capsys.readouterr().out.splitlines()[2]
    (other := tmp_path / "seed.jsonl").write_text(
        answers.to_text(header(), [line | {"seed": line["seed"] + 1} for line in worse])
    )
    assert script.main([str(path), "--instead", str(other)]) == 1
    assert "have other questions, prompts or judging seeds" in capsys.readouterr().err


def decided(script: ModuleType, capsys: Any, arguments: list[str], kept: list[str]) -> str:
    """Runs the script; its lines stand in a file of decisions. Returns what D1 to D4 say."""
    assert script.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 * 4 and set(lines) <= set(kept)
    return " ".join(line.split("|")[-2].strip() for line in lines[2:6])


@pytest.mark.slow
def test_decisions_are_what_the_answers_give(script: ModuleType, capsys: Any, monkeypatch: Any) -> None:
    """Without the data only the parts that need none, all of which stand in the file."""
    monkeypatch.delenv("T2L_DATA", raising=False)
    folder = REPOSITORY / "research" / "results" / "test"
    kept = (folder / "decisions.md").read_text(encoding="utf-8").splitlines()
    files = [str(folder / f"test-{seed}.jsonl.gz") for seed in range(3)]
    assert decided(script, capsys, files, kept) == "missed missed missed reached"
