"""A checkpoint's hypernetwork on top of another one's shared LoRA, of the same base, targets and rank.

    python research/swap_shared_lora.py CHECKPOINT MULTITASK OUT

What is learned above a shared LoRA of few steps reads more of the description (entry 53 of research/experiments.md);
the shared LoRA of many steps knows more tasks. The folder says what was done.
"""

import argparse
import sys
from pathlib import Path

from common import exit_code, save_derived

from t2l.checkpoint import load_checkpoint
from t2l.errors import ConfigError
from t2l.text_to_lora import checkpoint_folder


def swapped(reference: str, shared: str, out: Path) -> Path:
    """Writes the checkpoint.

    Args:
        reference: Whose hypernetwork, as for `t2l.TextToLora.from_pretrained`.
        shared: Whose shared LoRA.
        out: A new folder.

    Raises:
        ConfigError: if the two are not made for the same base, targets and rank.
        T2LError: as loading and saving do.
    """
    mine, other = (load_checkpoint(checkpoint_folder(given)) for given in (reference, shared))
    if mine.spec != other.spec:
        raise ConfigError(f"{reference} and {shared} differ in base, targets or rank:\n{mine.spec}\n{other.spec}")
    mine.hypernet.load_shared_lora(other.hypernet.shared_adapter())
    sums = [checkpoint.config.weights_sha256 for checkpoint in (mine, other)]
    what = f"The hypernetwork of {sums[0]} on the shared LoRA of {sums[1]}."
    return save_derived(out, mine, what, {"hypernetwork_sha256": sums[0], "shared_lora_sha256": sums[1]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("multitask")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    return exit_code(lambda: print(swapped(given.checkpoint, given.multitask, given.out)))


if __name__ == "__main__":
    sys.exit(main())
