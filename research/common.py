"""What the scripts share."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from t2l.checkpoint import Checkpoint, save_checkpoint
from t2l.errors import T2LError


def exit_code(run: Callable[[], None]) -> int:
    """Runs a script: 0; 1 after one line that says why it failed; 130 if it was interrupted."""
    try:
        run()
    except T2LError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def save_derived(out: Path, checkpoint: Checkpoint, what: str, facts: Mapping[str, Any]) -> Path:
    """Writes a checkpoint whose weights a script has changed.

    Args:
        out: A new folder.
        checkpoint: As it is now.
        what: Sentences of its card that say what was done.
        facts: The same for programs; they join those of its training.

    Raises:
        OutputError: if the folder exists or cannot be written.
    """
    title = f"# Text-to-LoRA hypernetwork for {checkpoint.spec.base_model}"
    card = f"{title}\n\n{what} All settings stand in `config.json`.\n"
    config = replace(checkpoint.config, training=checkpoint.config.training | facts)
    save_checkpoint(out, checkpoint.hypernet, checkpoint.spec, config, card=card)
    return out
