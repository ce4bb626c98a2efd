"""The guide for an own base model, run as it is written, with a tiny base and four tasks."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import make_base, make_config, make_tokenizer
from typer.testing import CliRunner

from t2l.cli import app
from t2l.train.metrics import read_metrics

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "own-base.md").read_text("utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


def test_the_guide_is_short() -> None:
    assert len(re.sub(r"^```.*?^```", "", GUIDE, flags=re.MULTILINE | re.DOTALL).split()) <= 300


def test_the_guide_works_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another depth and other names of modules than any shipped config's; nothing but the guide's own four settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("T2L_DATA", raising=False)
    monkeypatch.setattr("t2l.train.estimate.MOST_STEPS", 3)  # to say how long it will take
    make_base(make_config(num_hidden_layers=5)).save_pretrained("my-base")
    make_tokenizer().save_pretrained("my-base")
    (settings,), (sample,) = blocks("yaml"), blocks("json")
    Path("own.yaml").write_text(settings.replace("max_steps: 200", "max_steps: 4"))
    lines = [json.loads(line) for line in sample.splitlines()]
    assert [line.get("split", "train") for line in lines] == ["train"] * 4 + ["val"]
    Path("own.jsonl").write_text(
        "".join(
            json.dumps(line | {"input": f"{line['input']} {n}", "split": "train" if n < 16 else "val"}) + "\n"
            for line in lines
            for n in range(20)
        )
    )
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("t2l ")]
    assert [shlex.split(line)[1] for line in commands] == ["data", "train", "train", "run"]
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}: {done.output}"
        if "--dry-run" in command:
            assert not Path("run").exists() and "4 steps" in done.stdout
            assert "encoder.layers [2, 3, 5]" in done.stderr and "train.max_seq_length" in done.stderr
    rows = read_metrics(Path("run"))
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert sum("seen/adapter/margin" in row for row in rows) == 4
