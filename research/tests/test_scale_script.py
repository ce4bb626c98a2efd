"""The script that scales what a description changes: the offset stays, the change is multiplied."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import DESCRIPTIONS
from transformers import LlamaConfig

from t2l import TextToLora
from t2l.checkpoint import load_checkpoint
from t2l.errors import ConfigError, OutputError
from t2l.spec import AdapterSpec, LoraConfig


@pytest.fixture
def script(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("scale_change")


@pytest.mark.parametrize("variant", ["L", "M", "S", "basis", "pointer"])
def test_the_change_is_multiplied_and_the_offset_stays(
    variant: str,
    script: ModuleType,
    make_checkpoint: Callable[..., Path],
    tiny_config: LlamaConfig,
    base_folder: Path,
    tmp_path: Path,
) -> None:
    kind: dict[str, Any] = {"variant": variant}
    if variant == "pointer":
        lora = LoraConfig(target_modules=("q_proj", "o_proj"), r=4, lora_alpha=8)
        kind = {"pointer": ("o_proj",), "spec": AdapterSpec.from_config(tiny_config, str(base_folder), lora)}
    whole = make_checkpoint(tmp_path / "whole", **kind)
    half = script.scaled(str(whole), 0.5, tmp_path / "half")
    offset = load_checkpoint(whole).hypernet.shared_adapter()
    full, less = (TextToLora.from_pretrained(str(folder)).generate(DESCRIPTIONS) for folder in (whole, half))
    for one, other in zip(full, less, strict=True):
        for name in ("a", "b"):
            for shared, x, y in zip(
                getattr(offset, name), getattr(one.lora, name), getattr(other.lora, name), strict=True
            ):
                assert (x - shared).abs().max() > 1e-2
                assert (y - shared - 0.5 * (x - shared)).abs().max() <= 2e-3  # a checkpoint is saved in fp16
    assert script.scaled(str(half), 0.5, tmp_path / "quarter")
    training = load_checkpoint(tmp_path / "quarter").config.training
    assert training["change_scaled_by"] == 0.25
    assert training["unscaled_sha256"] == load_checkpoint(whole).config.weights_sha256


def test_what_cannot_be_scaled_is_said(
    script: ModuleType, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no description changes anything"):
        script.scaled(str(make_checkpoint(tmp_path / "one", variant="none")), 0.5, tmp_path / "out")
    whole = make_checkpoint(tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"must be in \(0, 2\], got 0"):
        script.scaled(str(whole), 0.0, tmp_path / "out")
    with pytest.raises(OutputError):
        script.scaled(str(whole), 0.5, whole)
    assert not (tmp_path / "out").exists()
