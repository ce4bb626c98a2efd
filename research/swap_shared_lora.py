"""A checkpoint's hypernetwork on top of another one's shared LoRA, of the same base, targets and rank.

    python research/swap_shared_lora.py CHECKPOINT MULTITASK OUT

What is learned above a shared LoRA of few steps reads more of the description (entry 53 of research/experiments.md);
the shared LoRA of many steps knows more tasks. The folder says what was done.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from common import exit_code

from t2l.checkpoint import load_checkpoint, save_checkpoint
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
    with torch.no_grad():
        theirs = dict(other.hypernet.shared_lora.named_parameters())
        for name, parameter in mine.hypernet.shared_lora.named_parameters():
            parameter.copy_(theirs[name])
    facts = {"shared_lora_sha256": other.config.weights_sha256, "hypernetwork_sha256": mine.config.weights_sha256}
    card = (
        f"# Text-to-LoRA hypernetwork for {mine.spec.base_model}\n\nThe hypernetwork of {mine.config.weights_sha256} "
        f"on the shared LoRA of {other.config.weights_sha256}. All settings stand in `config.json`.\n"
    )
    config = replace(mine.config, training=mine.config.training | facts)
    save_checkpoint(out, mine.hypernet, mine.spec, config, card=card)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("multitask")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    return exit_code(lambda: print(swapped(given.checkpoint, given.multitask, given.out)))


if __name__ == "__main__":
    sys.exit(main())
