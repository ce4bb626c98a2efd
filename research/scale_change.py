"""A checkpoint whose descriptions change the offset by a share of what they did.

    python research/scale_change.py CHECKPOINT 0.5 OUT

On tasks unlike the trained ones the whole change goes too far (entry 20 of research/experiments.md). What is written is
linear in the head's last matrices and the pointers' gains, so they are multiplied; the offset stays. The folder says
what was done.
"""

import argparse
import sys
from pathlib import Path

import torch
from common import exit_code, save_derived

from t2l.checkpoint import load_checkpoint
from t2l.errors import ConfigError
from t2l.text_to_lora import checkpoint_folder


def scaled(reference: str, factor: float, out: Path) -> Path:
    """Writes the scaled checkpoint.

    Args:
        reference: As for `t2l.TextToLora.from_pretrained`.
        factor: 1 leaves it as it is, 0 leaves the offset alone.
        out: A new folder.

    Raises:
        ConfigError: if there is no change to scale, or the factor is not in (0, 2].
        T2LError: as loading and saving do.
    """
    if not 0 < factor <= 2:
        raise ConfigError(f"The factor must be in (0, 2], got {factor:g}")
    loaded = load_checkpoint(checkpoint_folder(reference))
    if loaded.hypernet.head is None:
        raise ConfigError(f"{reference} is a multi-task LoRA (variant none): no description changes anything")
    with torch.no_grad():
        gains = [pointer.gain for pointer in loaded.hypernet.pointers.values()]
        for part in (loaded.hypernet.head.write, *gains):
            for parameter in part.parameters():
                parameter.mul_(factor)
    training = loaded.config.training
    by = training.get("change_scaled_by", 1.0) * factor
    unscaled = training.get("unscaled_sha256", loaded.config.weights_sha256)
    what = f"What a description changes in the checkpoint {unscaled}, times {by:g}."
    return save_derived(out, loaded, what, {"change_scaled_by": by, "unscaled_sha256": unscaled})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("factor", type=float)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    return exit_code(lambda: print(scaled(given.checkpoint, given.factor, given.out)))


if __name__ == "__main__":
    sys.exit(main())
