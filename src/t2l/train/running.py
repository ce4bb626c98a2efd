"""What every run needs and no loop: its folder, schedule, record, states saved whole. Knows no tasks and no models."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l.errors import TrainingError
from t2l.files import new_folder, read_json, read_tensors, write_text


def linear_schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: linear rise over the share `warmup`, then linear fall to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (steps - step) / max(1, steps - rising))


def check_run(run: Path, settings: Mapping[str, Any], *, resume: bool) -> dict[str, Any] | None:
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
    if not (run / "state" / "state.json").exists():
        raise TrainingError(f"{run} holds no saved state to resume from; start it without --resume")
    changed = _differences(read_json(run / "config.json"), settings)
    if changed:
        raise TrainingError(
            f"{run} was started with other settings: {'; '.join(changed)}. Use the same, or a new folder"
        )
    return read_json(run / "state" / "state.json")


def begin_run(run: Path, settings: Mapping[str, Any]) -> None:
    """Makes a new run's folder and writes its settings down."""
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "config.json", json.dumps(settings, indent=2) + "\n")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    found = []
    for key in before.keys() | now.keys():
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{where}{key}.")
        elif old != new:
            found.append(f"{where}{key} was {old!r}, is {new!r}")
    return sorted(found)


def save_state(run: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes what a resumed run needs into `run/state`, whole or not at all."""
    from safetensors.torch import save_file

    with new_folder(run / "state", overwrite=True) as temporary:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(dict(facts)) + "\n", encoding="utf-8")


def load_state(run: Path) -> dict[str, Tensor]:
    """The tensors that `save_state` wrote."""
    return read_tensors(run / "state" / "state.safetensors")


def random_state() -> dict[str, Tensor]:
    """The states of torch's random generators, as tensors to save."""
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `random_state` gave."""
    torch.set_rng_state(tensors["random/cpu"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])


def record(run: Path, row: Mapping[str, Any], log: Callable[[str], None]) -> None:
    """Appends a row to `metrics.jsonl` and says it."""
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    log("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))


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
