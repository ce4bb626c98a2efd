"""The script that draws a base whose weights were rounded to 4 bits: within half a step, and rounded to the same."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from t2l.errors import DataError, OutputError


@pytest.fixture
def script(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("near_base")


def rounded(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights as Q4_1 has them, and each block's step."""
    blocks = weights.float().reshape(-1, 32)
    least, most = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = (most - least) / 15
    return (((blocks - least) / step).round() * step + least).reshape(weights.shape), step


def test_what_is_drawn_lies_within_half_a_step(script: ModuleType) -> None:
    weights, step = rounded(torch.randn(48, 64))
    drawn = script.near(weights, torch.Generator().manual_seed(1))
    off = (drawn - weights).reshape(-1, 32) / step
    assert off.abs().max() <= 0.5001 and abs(off.mean()) < 0.03
    assert off.std() == pytest.approx(12**-0.5, rel=0.05)  # evenly over a step
    assert not torch.equal(drawn, script.near(weights, torch.Generator().manual_seed(2)))


def test_other_matrices_stay(script: ModuleType) -> None:
    for weights in (torch.randn(48, 64), rounded(torch.randn(48, 64))[0][0], torch.randn(48, 40)):
        assert script.near(weights, torch.Generator()) is None


def test_a_base_is_drawn(script: ModuleType, base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it was not in 4 bits"):
        script.draw(str(base_folder), tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()
    source = tmp_path / "source"
    source.mkdir()
    for path in base_folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "t2l-source.json").write_text("{}")
    tensors = load_file(base_folder / "model.safetensors")
    wide = {name for name, tensor in tensors.items() if tensor.dim() == 2 and tensor.shape[1] % 32 == 0}
    assert wide
    save_file(
        {name: rounded(tensor)[0] if name in wide else tensor for name, tensor in tensors.items()},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert script.draw(str(source), tmp_path / "out", 3) == len(wide)
    assert not (tmp_path / "out" / "t2l-source.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        script.draw(str(source), tmp_path / "out", 3)
