"""The shipped configs are read, and the benchmarks run and report what they claim to measure."""

import json
from pathlib import Path
from typing import Any

import programs
import pytest

from t2l.config import build, load_yaml
from t2l.tasks import load_splits
from t2l.train.reconstruction import ReconstructionConfig
from t2l.train.task_config import TaskLorasConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [
    path for kind in ("task-loras", "reconstruction") for path in sorted((ROOT / "configs" / kind).glob("*.yaml"))
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configs_are_read(path: Path) -> None:
    """Strictly; each says how it is run, and variants are what their file's name says."""
    cls = TaskLorasConfig if path.parent.name == "task-loras" else ReconstructionConfig
    config = build(cls, load_yaml(path), where=str(path))
    text = path.read_text()
    assert text.startswith("# ") and path.relative_to(ROOT).as_posix() in text
    assert config.train.torch_compile
    if isinstance(config, ReconstructionConfig):
        assert config.hypernet.dropout == 0  # what is to be written exactly is not disturbed
        if path.stem in ("L", "M", "S"):
            assert config.hypernet.variant == path.stem
        assert (config.encoder.kind == "onehot") == (path.stem == "one-hot")
    else:
        sni = [name for name in config.data.only if name.startswith("task")]
        assert set(sni) <= load_splits().train - load_splits().held_back


def run(name: str) -> dict[str, Any]:
    done = programs.run([ROOT / "benchmarks" / name, "--tiny"])
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_task_loras_throughput() -> None:
    """Many at once and one after another end at the same validation losses; times are those of one adapter."""
    result = run("task_loras_throughput.py")
    assert (result["adapters"], result["many_at_once"]["at_once"], result["one_after_another"]["at_once"]) == (6, 6, 1)
    assert result["largest_difference_in_validation_loss"] <= 1e-4
    for way in ("many_at_once", "one_after_another"):
        found = result[way]
        assert found["seconds_per_adapter"] == pytest.approx(found["seconds_per_step"] * 12 / found["at_once"])
    ratio = result["one_after_another"]["seconds_per_adapter"] / result["many_at_once"]["seconds_per_adapter"]
    assert result["ratio"] == pytest.approx(ratio) and result["ratio_to_peft"] > 0


def test_reconstruction_steps() -> None:
    result = run("reconstruction_steps.py")
    assert result["ratio"] == pytest.approx(result["resident_steps_per_second"] / result["loading_steps_per_second"])
    assert result["parameters_each"] == 2 * 2 * (32 + 32 + 32 + 16) and result["adapters"] == 12
