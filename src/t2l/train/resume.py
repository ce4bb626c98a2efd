"""What a run leaves so that it can go on: its settings, and one file of tensors and facts, whole or absent.

Knows modules, optimisers and files. Knows no tasks; the schedule and the sampler follow from the step alone.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2l.errors import CheckpointError, OutputError, TrainingError
from t2l.io import new_file, open_tensors, parse_json, read_json, read_tensors, reading

STATE = "state.safetensors"
HOW = ("ddp_timeout", "fsdp", "gradient_accumulation_steps")
"""Settings of `train` that a resumed run may change."""


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """How many steps are done."""
    best_step: int = 0
    """The step after which the best weights were seen; 0 if none are kept."""
    best_value: float = 0.0
    """The value that the best weights were chosen by; higher is better."""
    chosen_by: str = ""
    """What that value is: `margin` or `loss`."""
    patience_count: int = 0
    """How many evaluations there were since the best weights were seen."""
    stopped: bool = False
    """Whether early stopping has ended the run."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The best weights, on the CPU."""


def restore_weights(module: nn.Module, values: dict[str, Tensor], where: Path) -> None:
    """Puts back what the same module's `state_dict` gave.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    try:
        module.load_state_dict(values, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{where} was not written by this run's model: {reason}") from error


def check_run(run: Path, settings: dict[str, Any], *, resume: bool) -> bool:
    """Checks a run's folder before anything is loaded; returns whether there is a state to go on from.

    Args:
        run: The folder.
        settings: The run's settings as plain data; a resumed run must have the same.
        resume: Whether to go on.

    Raises:
        TrainingError: if a new run's folder is not empty, or a resumed one holds no run of these settings.
    """
    if not resume:
        if run.exists() and any(run.iterdir()):
            raise _occupied(run)
        return False
    if not (run / "config.json").exists():
        raise TrainingError(f"{run} holds no saved state to resume from; start it without --resume")
    before, now = (
        {**plain, "train": _deciding(plain.get("train"))} for plain in (read_json(run / "config.json"), settings)
    )
    changed = differences(before, now)
    if changed:
        raise TrainingError(
            f"{run} was started with other settings: {'; '.join(changed)}. Use the same, or a new folder"
        )
    for leftover in (*run.glob(f".{STATE}.*"), *run.rglob(".tmp*")):  # of a process that was killed while it wrote
        if leftover.is_file():
            leftover.unlink(missing_ok=True)
    return (run / STATE).exists()  # not if it was killed before it saved anything


def _deciding(train: Any) -> dict[str, Any]:
    """Settings that say what a run computes; the others say in how many parts, and by whom, and may change."""
    return {name: value for name, value in dict(train or {}).items() if name not in HOW}


def _occupied(run: Path) -> TrainingError:
    return TrainingError(f"{run} is not empty; choose another folder, or go on with --resume")


def begin_run(run: Path, settings: dict[str, Any]) -> None:
    """Claims a new run's folder by writing its settings down, which only one of several processes can do.

    Raises:
        TrainingError: if another run has begun in it since `check_run`.
        OutputError: if the folder cannot be written.
    """
    path = run / "config.json"
    try:
        with new_file(path) as temporary:  # whole or not at all, and never in the place of another
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    except OutputError as error:
        if path.exists():
            raise _occupied(run) from error
        raise


def write_state(run: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes what a resumed run needs as one file, whole or not at all.

    Raises:
        OutputError: if it cannot be written; the state before it stays.
    """
    from safetensors.torch import save_file

    plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with new_file(run / STATE, overwrite=True) as temporary:
        save_file(plain, temporary, metadata=state_metadata(facts, _crc32(plain)))


def state_metadata(facts: Mapping[str, Any], tensors_crc32: int = 0) -> dict[str, str]:
    """What a state says beside its tensors; as long for any checksum of theirs."""
    text = json.dumps(dict(facts))
    return {"facts": text, "facts_crc32": f"{zlib.crc32(text.encode()):08x}", "crc32": f"{tensors_crc32:08x}"}


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    """A checksum of names, types, shapes and numbers; fast, and no secret: damage is what it finds."""
    found = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def read_facts(run: Path) -> dict[str, Any]:
    """What `write_state` was told beside the tensors.

    Raises:
        CheckpointError: if the state is damaged.
    """
    try:
        metadata = _metadata(run)
        if f"{zlib.crc32(metadata['facts'].encode()):08x}" != metadata["facts_crc32"]:
            raise CheckpointError("its facts are not those of their checksum")
        found: dict[str, Any] = parse_json(metadata["facts"], f"{run / STATE}")
    except (CheckpointError, KeyError) as error:
        raise _damaged(run, error) from error
    return found


def read_state(run: Path) -> dict[str, Tensor]:
    """The tensors that `write_state` was given, on the CPU.

    Raises:
        CheckpointError: if the state is damaged.
    """
    try:
        tensors = read_tensors(run / STATE)
        if f"{_crc32(tensors):08x}" != _metadata(run)["crc32"]:
            raise CheckpointError("its numbers are not those of their checksum")
    except (CheckpointError, KeyError) as error:
        raise _damaged(run, error) from error
    return tensors


def _metadata(run: Path) -> dict[str, str]:
    with open_tensors(run / STATE) as file:
        return dict(file.metadata() or {})


def _damaged(run: Path, why: Exception) -> CheckpointError:
    return CheckpointError(f"{run / STATE} is damaged ({why}); start the run again in a new folder")


def first_step(settings: dict[str, Any], run: Path, *, max_steps: int, resume: bool) -> int:
    """`check_run` of a run whose state is `save_state`'s; returns the step to begin with.

    Raises:
        TrainingError: as `check_run`, and if the run is finished.
    """
    if not check_run(run, settings, resume=resume):
        return 0
    progress = read_progress(run)
    over = progress.stopped or progress.step >= max_steps
    # Killed between its last step and its checkpoint, a run has the checkpoint still to write.
    if over and (run / "checkpoint").exists():
        raise TrainingError(f"{run} is finished: {progress.step} of {max_steps} steps are done")
    return progress.step


def differences(
    before: dict[str, Any], now: dict[str, Any], where: str = "", *, words: tuple[str, str] = ("was", "is")
) -> list[str]:
    """Each setting that differs between two nested mappings, with both values."""
    found: list[str] = []
    for key in before.keys() | now.keys():
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{where}{key}.", words=words)
        elif old != new:
            found.append(f"{where}{key} {words[0]} {old!r}, {words[1]} {new!r}")
    return sorted(found)


def whole_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that a run of one module and one optimiser needs to go on: tensors by name, and facts."""
    tensors = {f"weight/{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in progress.best.items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": torch.as_tensor(value) for name, value in values.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors, {x.name: getattr(progress, x.name) for x in fields(progress) if x.name != "best"}


def save_state(run: Path, module: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Writes what `whole_state` says of a run; see `write_state`."""
    write_state(run, *whole_state(module, optimizer, progress))


def read_progress(run: Path) -> Progress:
    """How far a saved run is, without its tensors.

    Raises:
        CheckpointError: if the state is damaged.
    """
    try:
        return Progress(**read_facts(run))
    except TypeError as error:
        raise CheckpointError(f"{run / STATE} is of another kind of run ({error})") from error


def load_state(run: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Puts back what `save_state` wrote.

    Raises:
        CheckpointError: if the state is damaged, or another run's.
    """
    progress = read_progress(run)
    with reading(str(run), "state"):
        _put_back(run, progress, module, optimizer)
    return progress


def _put_back(run: Path, progress: Progress, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    groups: dict[str, dict[str, Tensor]] = {"weight": {}, "best": {}, "optimizer": {}, "random": {}}
    for name, value in read_state(run).items():
        group, _, rest = name.partition("/")
        groups[group][rest] = value
    restore_weights(module, groups["weight"], run / STATE)
    progress.best = groups["best"]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in groups["optimizer"].items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(groups["random"]["cpu"])
    if torch.cuda.is_available() and "cuda" in groups["random"]:
        torch.cuda.set_rng_state(groups["random"]["cuda"])
