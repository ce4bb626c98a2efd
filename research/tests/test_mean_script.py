"""The script that takes the mean of a checkpoint and what went on from it."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from t2l.checkpoint import load_checkpoint, save_checkpoint
from t2l.errors import ConfigError, OutputError


@pytest.fixture
def script(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("mean_of_checkpoints")


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_all_weights_are_the_mean(
    share: float, script: ModuleType, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    before = make_checkpoint(tmp_path / "before")
    changed = load_checkpoint(before)
    with torch.no_grad():
        for parameter in changed.hypernet.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = tmp_path / "after"
    save_checkpoint(after, changed.hypernet, changed.spec, changed.config)
    out = script.mean(str(before), str(after), tmp_path / "out", share)
    one, other, found = (load_checkpoint(folder) for folder in (before, after, out))
    theirs = [dict(checkpoint.hypernet.named_parameters()) for checkpoint in (one, other)]
    for name, weight in found.hypernet.named_parameters():
        expected = (1 - share) * theirs[0][name] + share * theirs[1][name]
        torch.testing.assert_close(weight, expected, atol=2e-3, rtol=2e-3)  # a checkpoint is saved in fp16
        assert (theirs[0][name] - theirs[1][name]).abs().max() > 0.05
    assert found.config.training["mean_of_sha256"] == [one.config.weights_sha256, other.config.weights_sha256]


def test_what_has_no_mean_is_said(script: ModuleType, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    one, other = make_checkpoint(tmp_path / "one"), make_checkpoint(tmp_path / "other", variant="S")
    with pytest.raises(ConfigError, match=r"no mean: hypernet is .*variant='L'.* and .*variant='S'"):
        script.mean(str(one), str(other), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\], got 1.5"):
        script.mean(str(one), str(one), tmp_path / "out", 1.5)
    with pytest.raises(OutputError):
        script.mean(str(one), str(one), one)
    assert not (tmp_path / "out").exists()
