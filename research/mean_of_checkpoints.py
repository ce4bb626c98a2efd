"""A checkpoint whose weights are the mean of two, of which one went on from the other.

    python research/mean_of_checkpoints.py BEFORE AFTER OUT --share 0.5

Fine-tuning gains on its own data and loses elsewhere; the weights half way often keep both (Wortsman et al., Robust
fine-tuning of zero-shot models, CVPR 2022). Of two runs that do not share their first weights the mean means nothing,
so the networks' kinds are compared and the card names both. The folder says what was done.
"""

import argparse
import sys
from pathlib import Path

import torch
from common import exit_code, save_derived

from t2l.checkpoint import load_checkpoint
from t2l.errors import ConfigError
from t2l.text_to_lora import checkpoint_folder


def mean(before: str, after: str, out: Path, share: float = 0.5) -> Path:
    """Writes the mean.

    Args:
        before: As for `t2l.TextToLora.from_pretrained`.
        after: What went on from it.
        out: A new folder.
        share: Of `after`; 0 is `before` and 1 is `after`.

    Raises:
        ConfigError: if the two differ in network, adapters, encoder or prompt, or the share is not in [0, 1].
        T2LError: as loading and saving do.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"The share must be in [0, 1], got {share:g}")
    one, other = (load_checkpoint(checkpoint_folder(reference)) for reference in (before, after))
    for name in ("hypernet", "encoder", "encoder_revision", "prompt", "conditioning"):
        if getattr(one.config, name) != getattr(other.config, name):
            raise ConfigError(
                f"Checkpoints with different settings have no mean: {name} is {getattr(one.config, name)} in {before} "
                f"and {getattr(other.config, name)} in {after}"
            )
    if one.spec != other.spec:
        raise ConfigError(f"Checkpoints for different adapters have no mean: {one.spec} and {other.spec}")
    with torch.no_grad():
        first = one.hypernet.state_dict()
        for name, weight in other.hypernet.state_dict().items():
            weight.copy_(torch.lerp(first[name], weight, share))
    sums = [checkpoint.config.weights_sha256 for checkpoint in (one, other)]
    what = f"{1 - share:g} of the weights {sums[0]} and {share:g} of {sums[1]}, which went on from them."
    return save_derived(out, other, what, {"mean_of_sha256": sums, "share_of_second": share})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=0.5)
    given = parser.parse_args()
    return exit_code(lambda: print(mean(given.before, given.after, given.out, given.share)))


if __name__ == "__main__":
    sys.exit(main())
