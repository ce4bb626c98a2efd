"""From tasks to a compressed library, on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_helpers import four_adapters
from transformers import LlamaConfig
from typer.testing import CliRunner

from t2l import cli
from t2l.config import LoraConfig
from t2l.library import AdapterLibrary
from t2l.peft_io import load_adapter
from t2l.spec import AdapterSpec


def t2l(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def way(base_folder: Path, sentence_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own tasks and configs for the whole way from tasks to a checkpoint."""
    folder = tmp_path_factory.mktemp("way")
    rows = [
        {"task": name, "description": f"Say {name}.", "input": f"Is it {n}?", "output": name, "split": split}
        for name in ("yes", "no")
        for split, numbers in (("train", range(30, 50)), ("val", range(50, 53)), ("test", range(53, 56)))
        for n in numbers
    ]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task_loras = {
        "base": str(base_folder),
        "lora": {"r": 2, "lora_alpha": 4},
        "data": {"tasks": [str(folder / "own.jsonl")]},
        "train": {
            "max_steps": 10,
            "eval_steps": 5,
            "max_seq_length": 96,
            "max_target_length": 16,
            "learning_rate": 0.01,
        },
    }
    reconstruction = {
        "encoder": {"kind": "sentence", "model": str(sentence_folder), "max_tokens": 60},
        "hypernet": {"width": 24, "head_size": 16, "dropout": 0.0},
        "train": {"max_steps": 15, "logging_steps": 5},
    }
    (folder / "task-loras.yaml").write_text(json.dumps(task_loras))  # JSON is YAML
    (folder / "reconstruction.yaml").write_text(json.dumps(reconstruction))
    return folder


def test_from_tasks_to_a_checkpoint_on_the_command_line(way: Path, base_folder: Path) -> None:
    """train task-loras, library export and import, compress, train reconstruction, library evaluate."""
    run = way / "run"
    done = t2l("train", "task-loras", "--config", way / "task-loras.yaml", "--run", run, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["adapters"] == 2
    library = AdapterLibrary.open(run / "library")
    assert library.names == ("no", "yes")

    assert t2l("library", "export", library.folder, "-o", way / "peft", "--name", "yes").exit_code == 0
    exported = load_adapter(way / "peft" / "yes", library.spec)
    assert torch.equal(exported.b[0], library.stack(["yes"]).b[0][0])
    assert t2l("library", "export", library.folder, "-o", way / "both").exit_code == 0
    (way / "said.jsonl").write_text('{"task": "yes", "description": "Say yes."}\n')
    done = t2l(
        "library", "import", way / "both" / "yes", way / "both" / "no", "-o", way / "imported", "--base", base_folder,
        "--descriptions", way / "said.jsonl",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    imported = AdapterLibrary.open(way / "imported")
    assert imported.names == ("yes", "no") and imported.index["yes"] == {"descriptions": ["Say yes."]}

    done = t2l(
        "compress", library.folder, "-o", way / "small", "--config", way / "reconstruction.yaml",
        "--score", way / "own.jsonl", "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [network["label"] for network in report["networks"]] == ["small"]
    assert set(report["tasks"]) == {"yes", "no"} and report["conditions"]["task-lora"]["n"] == 6
    assert "nothing is compressed" in done.stderr
    done = t2l(
        "compress", library.folder, "-o", way / "stopped", "--config", way / "reconstruction.yaml",
        "--max-minutes", "0", "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.exit_code == 0 and json.loads(done.stdout) == {"complete": False, "run": str(way / "stopped.run")}
    assert "Time is up after 5 of 15 steps" in done.stderr and "the same command goes on" in done.stderr
    again = t2l("compress", library.folder, "-o", way / "small", "--config", way / "reconstruction.yaml")
    assert again.exit_code == 1 and "exists already" in again.stderr

    onehot = ["--set", "encoder={kind: onehot}", "--set", f"data.library={library.folder}"]
    config = ["--config", way / "reconstruction.yaml"]
    done = t2l("train", "reconstruction", *config, "--run", way / "one-hot", *onehot, "--device", "cpu")
    assert done.exit_code == 0, done.output
    done = t2l(
        "library", "evaluate", library.folder, way / "small", way / "one-hot" / "checkpoint", "-o", way / "evaluated",
        "--score", way / "own.jsonl", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = list(json.loads((way / "evaluated" / "report.json").read_text())["conditions"])
    kinds = ["trained", "held-out", "random", "other"]
    assert rows[:4] == ["base", "task-lora", "mean of all", "1 components"]
    assert rows[4:] == [*(f"small, {k}" for k in kinds), "one-hot, trained", "one-hot, other"]
    wrong = t2l("library", "evaluate", imported.folder, way / "small", "-o", way / "wrong", "--device", "cpu")
    assert wrong.exit_code == 1 and "was not trained to reconstruct" in wrong.stderr


@pytest.fixture
def spec(tiny_config: LlamaConfig, base_folder: Path) -> AdapterSpec:
    return AdapterSpec.from_config(tiny_config, str(base_folder), LoraConfig(r=2, lora_alpha=4))


def test_wrong_use_of_the_commands(spec: AdapterSpec, tmp_path: Path) -> None:
    library = four_adapters(tmp_path / "four", spec)
    done = t2l("compress", library.folder, "-o", tmp_path / "out", "--reads", "trained,gossip")
    assert done.exit_code == 2, done.output
    done = t2l("compress", tmp_path / "nothing", "-o", tmp_path / "out", "--device", "cpu")
    assert done.exit_code == 1 and "There is no folder" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_file_one_a_makes_a_basis(spec: AdapterSpec, sentence_folder: Path, tmp_path: Path) -> None:
    """Of adapters that share A all differences fit; others get variant L."""
    quick = [f"encoder.model={sentence_folder}", "encoder.max_tokens=60", "train.max_steps=2", "hypernet.width=24"]
    options = [word for setting in quick for word in ("--set", setting)]
    found = {}
    for name in ("own", "one"):
        library = four_adapters(tmp_path / f"library-{name}", spec, one_a=name == "one")
        done = t2l("compress", library.folder, "-o", tmp_path / name, "--device", "cpu", *options)
        assert done.exit_code == 0, done.output
        found[name] = json.loads((tmp_path / name / "config.json").read_text())["hypernet"]
    assert (found["own"]["variant"], found["own"]["freeze_a"], found["own"]["head_size"]) == ("L", False, 128)
    assert (found["one"]["variant"], found["one"]["freeze_a"], found["one"]["head_size"]) == ("basis", True, 3)
