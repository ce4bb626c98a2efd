"""The script that puts a hypernetwork on another's shared LoRA: the change stays, the offset is the other's."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import DESCRIPTIONS
from transformers import LlamaConfig

from t2l import TextToLora
from t2l.checkpoint import load_checkpoint
from t2l.errors import ConfigError, OutputError
from t2l.spec import AdapterSpec, LoraConfig


@pytest.fixture
def script(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("swap_shared_lora")


def test_the_change_stays_and_the_offset_is_the_others(
    script: ModuleType, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    mine, other = make_checkpoint(tmp_path / "mine"), make_checkpoint(tmp_path / "other", variant="none")
    both = script.swapped(str(mine), str(other), tmp_path / "both")
    offsets = [load_checkpoint(folder).hypernet.shared_adapter() for folder in (mine, other, both)]
    made = [TextToLora.from_pretrained(str(folder)).generate(DESCRIPTIONS)[0].lora for folder in (mine, both)]
    for matrix in ("a", "b"):
        for old, new, now, before, after in zip(
            *(getattr(offset, matrix) for offset in offsets), *(getattr(lora, matrix) for lora in made), strict=True
        ):
            torch.testing.assert_close(now, new, atol=2e-3, rtol=0)  # a checkpoint is saved in fp16
            assert matrix == "a" or (old - new).abs().max() > 1e-2  # both draw `a` first, with one seed
            torch.testing.assert_close(after - now, before - old, atol=2e-3, rtol=0)
    training = load_checkpoint(both).config.training
    assert training["shared_lora_sha256"] == load_checkpoint(other).config.weights_sha256
    assert training["hypernetwork_sha256"] == load_checkpoint(mine).config.weights_sha256


def test_what_does_not_fit_is_said(
    script: ModuleType,
    make_checkpoint: Callable[..., Path],
    tiny_config: LlamaConfig,
    base_folder: Path,
    tmp_path: Path,
) -> None:
    wider = AdapterSpec.from_config(tiny_config, str(base_folder), LoraConfig(r=8, lora_alpha=8))
    mine, other = make_checkpoint(tmp_path / "mine"), make_checkpoint(tmp_path / "other", spec=wider)
    with pytest.raises(ConfigError, match="differ in base, targets or rank"):
        script.swapped(str(mine), str(other), tmp_path / "out")
    with pytest.raises(OutputError):
        script.swapped(str(mine), str(mine), mine)
    assert not (tmp_path / "out").exists()
