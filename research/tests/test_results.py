"""What the tables say was measured is what their files of answers hold, for the weights that ship."""

import gzip
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import readme_table
from test_eval_report import header, made
from typer.testing import CliRunner

from t2l.cli import app
from t2l.eval import answers
from t2l.eval.results import Suite, gather
from t2l.eval.run import Settings, run
from t2l.eval.stats import difference, estimate
from t2l.io import sha256

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "research" / "results"
ANSWERS = sorted(RESULTS.rglob("*.jsonl.gz"))
TABLES = [RESULTS / "steering.md", pytest.param(RESULTS / "test" / "test.md", marks=pytest.mark.slow)]
"""Those that README.md and the card of the shipped checkpoint show; the second is of 129,096 answers."""


def shipped() -> set[str]:
    """Checksums of the weights that ship with the package."""
    return {sha256(path) for path in (ROOT / "src" / "t2l" / "pretrained").glob("*/hypernet.safetensors")}


def remade(table: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The table as the command in its first line makes it now."""
    command = re.fullmatch(r"<!-- t2l (.*) -->", table.read_text(encoding="utf-8").split("\n")[0])
    assert command, f"{table.name} does not start with the command that made it"
    monkeypatch.chdir(table.parent)
    result = CliRunner().invoke(app, shlex.split(command[1]))
    assert result.exit_code == 0, result.output
    return result.stdout


def require_seen_tasks_learned(suite: Suite) -> None:
    """What a checkpoint must do on new instances of the tasks that it was trained on."""
    rows = {name: estimate(scores) for name, scores in suite.conditions.items()}
    for name in ("t2l", "t2l+description"):
        assert rows[name].n >= 600, f"{name}: {rows[name].n} answers"
        assert rows[name].mean >= 0.30, f"{name}: {rows[name]}"
    assert rows["base"].mean <= 0.02, f"base: {rows['base']}"
    for end in ("", "+description"):
        gap = difference(suite.conditions[f"t2l{end}"], suite.conditions[f"t2l-wrong{end}"])
        assert gap.low > 0, f"right - wrong, both under the same prompt: {gap}"


@pytest.mark.parametrize("path", ANSWERS, ids=lambda path: path.name)
def test_answers_are_of_weights_that_ship(path: Path) -> None:
    header = answers.read(path).header
    assert {header["checkpoint_sha256"], header["multitask_sha256"]} <= shipped()


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.name)
def test_tables_are_what_their_answers_give(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remade(table, monkeypatch) == table.read_text(encoding="utf-8")


def test_seen_tasks_are_learned() -> None:
    found = [suite for path in ANSWERS for suite in gather([answers.read(path)]) if suite.name == "seen"]
    assert found, "no file of answers holds the suite seen"
    for suite in found:
        require_seen_tasks_learned(suite)


@pytest.mark.parametrize("files", [["steering"], ["test/test-0", "test/test-1", "test/test-2"]], ids=["seen", "new"])
def test_the_card_says_what_was_measured(files: list[str]) -> None:
    """Both tables of the shipped checkpoint, row by row."""
    card = (ROOT / "src/t2l/pretrained/smollm2-135m/README.md").read_text(encoding="utf-8")
    rows = readme_table.scores_of(tuple(RESULTS / f"{file}.jsonl.gz" for file in files))
    for name in ("multitask", "t2l", "t2l-wrong", "t2l-random"):
        plain, described = (str(estimate(rows[name + end])).replace("0.", ".") for end in ("", "+description"))
        assert f"| {plain} | {described} |" in card, f"{name} of {files}"


@pytest.mark.parametrize("page", readme_table.PAGES, ids=lambda page: page.name)
def test_pages_say_what_was_measured(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert readme_table.fresh(page) == text, f"{page.name} is out of date: python research/readme_table.py"


# ------------------------------------------------------------------------------------------- the checks themselves


def test_a_table_that_was_edited_is_found(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a run of a tiny model: what the command wrote holds; a number or an answer changed by hand does not."""
    tasks = [
        {"task": task, "description": f"{task} it.", "input": text, "output": text, "split": "test"}
        for task in ("Copy", "Double")
        for text in ("a", "b", "c")
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tasks))
    checkpoint = make_checkpoint(tmp_path / "t2l")
    multitask = make_checkpoint(tmp_path / "multitask", variant="none")
    settings = Settings(
        suites=(str(tmp_path / "tasks.jsonl"),),
        conditions="minimum",
        checkpoint=str(checkpoint),
        multitask=str(multitask),
        max_new_tokens=3,
        device="cpu",
    )
    results = tmp_path / "results"
    run(settings, results / "run.jsonl", log=lambda text: None)
    plain = (results / "run.jsonl").read_bytes()
    (results / "run.jsonl").unlink()
    (results / "run.jsonl.gz").write_bytes(gzip.compress(plain))
    table = results / "run.md"
    options = ["--compare", "t2l+description:base", "--out", str(table)]
    made_now = CliRunner().invoke(app, ["eval", "report", str(results / "run.jsonl.gz"), *options])
    assert made_now.exit_code == 0, made_now.output
    text = table.read_text(encoding="utf-8")
    assert remade(table, monkeypatch) == text
    assert "--compare t2l+description:base -->" in text
    assert answers.read(results / "run.jsonl.gz").header["checkpoint_sha256"] == sha256(
        checkpoint / "hypernet.safetensors"
    )
    changed = plain.replace(b'"exact_match": 0.0', b'"exact_match": 1.0', 1)
    assert changed != plain
    (results / "run.jsonl.gz").write_bytes(gzip.compress(changed))
    assert remade(table, monkeypatch) != text


@pytest.mark.parametrize(
    ("row", "rate"), [("t2l", 0.2), ("t2l-wrong", 0.5), ("base", 0.1), ("t2l-wrong+description", 0.5), (None, None)]
)
def test_each_criterion_can_fail(row: str | None, rate: float | None, tmp_path: Path) -> None:
    rates: dict[str, Any] = {"base": 0.0, "t2l": 0.42, "t2l+description": 0.43}
    rates |= {"t2l-wrong": 0.04, "t2l-wrong+description": 0.05}
    if row is not None:
        rates[row] = rate
    counts = dict.fromkeys(rates, 0)

    def scores(name: str, right: bool) -> dict[str, float]:
        counts[name] += 1
        return {"exact_match": float(counts[name] * 0.618034 % 1 < rates[name])}

    lines = made(tuple(rates), suite="seen", tasks=[f"task{n}" for n in range(64)], scores=scores)
    path = tmp_path / "answers.jsonl"
    path.write_text(answers.to_text(header(), lines))
    (suite,) = gather([answers.read(path)])
    if row is None:
        require_seen_tasks_learned(suite)
    else:
        with pytest.raises(AssertionError):
            require_seen_tasks_learned(suite)
