"""What runs of any kind need: schedule, folder, a state of plain tensors saved whole, versions. Knows no tasks."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from t2l.errors import CheckpointError, OutputError, TrainingError
from t2l.files import read_json, read_tensors, write_text
from t2l.train.state import STATE, differences


class Scheduled(Protocol):
    """Settings with a schedule."""

    @property
    def steps(self) -> int:
        """Of the whole run."""

    @property
    def warmup(self) -> float:
        """Share of them over which the learning rate rises."""


def schedule(step: int, train: Scheduled) -> float:
    """Share of the peak learning rate at a step: linear rise, then linear fall to zero."""
    rising = max(1, round(train.warmup * train.steps))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (train.steps - step) / max(1, train.steps - rising))


def check_run(run: Path, settings: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """Checks a run's folder before anything is loaded.

    Args:
        run: The folder.
        settings: The run's settings as plain data; a resumed run must have the same.
        resume: Whether to go on from its state.

    Returns:
        What `save_state` was told beside the tensors; None for a new run.

    Raises:
        TrainingError: if a new run's folder is not empty, or a resumed one has no state or other settings.
    """
    if not resume:
        if run.exists() and any(run.iterdir()):
            raise TrainingError(f"{run} is not empty; choose another folder, or go on with --resume")
        return None
    if not (run / STATE).exists():
        raise TrainingError(f"{run} holds no saved state to resume from; start it without --resume")
    changed = differences(read_json(run / "config.json"), settings)
    if changed:
        raise TrainingError(
            f"{run} was started with other settings: {'; '.join(changed)}. Use the same, or a new folder"
        )
    for leftover in run.glob(f".{STATE}.*"):
        leftover.unlink(missing_ok=True)
    return _facts(run)


def begin_run(run: Path, settings: Mapping[str, Any]) -> None:
    """Makes a new run's folder and writes its settings down."""
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "config.json", json.dumps(settings, indent=2) + "\n")


def save_state(run: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes what a resumed run needs as one file, under another name that is then renamed.

    Raises:
        OutputError: if it cannot be written; the state before it stays.
    """
    from safetensors.torch import save_file

    temporary = run / f".{STATE}.{os.getpid()}"
    plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    try:
        save_file(plain, temporary, metadata={"facts": json.dumps(dict(facts))})
        os.replace(temporary, run / STATE)
    except OSError as error:
        raise OutputError(f"Cannot write {run / STATE}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _facts(run: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(run / STATE, framework="pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})["facts"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{run / STATE} is damaged ({error}); start the run again in a new folder") from error
    return found


def load_state(run: Path) -> dict[str, Tensor]:
    """The tensors that `save_state` wrote."""
    return read_tensors(run / STATE)


def versions() -> dict[str, str]:
    """Versions that can change a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("t2l", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # t2l itself, run from a source tree that is not installed
            found[name] = "not installed"
    return found
