"""The run of `t2l compress`: train the planned networks, evaluate them, leave one checkpoint with a report.

Knows plans, trainings and reports.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2l.compress.networks import Kind, evaluate_networks
from t2l.compress.plan import size_warnings
from t2l.compress.report import write_report
from t2l.compress.scores import prepare_scores
from t2l.io import new_folder
from t2l.library import AdapterLibrary
from t2l.tasks import Task
from t2l.train.reconstruction import ReconstructionConfig, train_reconstruction
from t2l.train.resume import STATE, read_progress


def compress(
    library: AdapterLibrary,
    out: Path,
    networks: Mapping[str, ReconstructionConfig],
    *,
    tasks: Sequence[Task] = (),
    base: tuple[Any, Any] | None = None,
    kinds: Sequence[Kind] = ("trained", "held-out"),
    limit: int | None = None,
    max_minutes: float | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Trains the planned networks, evaluates them all, and leaves the first one's checkpoint with the report.

    Runs are kept in the folder `runs_folder(out)` until all is done; called again, it goes on where it stopped.

    Args:
        library: The adapters.
        out: Where checkpoint and report go.
        networks: Label to settings; the first is the checkpoint that is kept.
        tasks: Tasks of the library with held-out examples, for scores; none means errors only.
        base: The base model and its tokenizer, for scores.
        kinds: What the networks are given to read when they are evaluated.
        limit: Most held-out examples of a task.
        max_minutes: Wall time of all trainings together, after which the one that runs is saved and stops.
        device: Where it all happens.
        overwrite: Whether an existing `out` is replaced.
        log: Where progress lines go.

    Returns:
        The report as plain data, or None if time ran out before all networks were trained.

    Raises:
        DataError, ConfigError, OutputError: as those who read, train and write raise them.
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    scorer = None
    if tasks:
        assert base is not None, "scores need the base model"
        scorer = prepare_scores(library, tasks, base, limit=limit)
    for warning in size_warnings(networks, library):
        log(warning)
    if not _train(networks, library, runs_folder(out), max_minutes=max_minutes, device=device, log=log):
        return None
    folders = [(label, runs_folder(out) / label / "checkpoint") for label in networks]
    evaluated, scores = evaluate_networks(folders, library, scorer, kinds=kinds, device=device, log=log)
    with new_folder(out, overwrite=overwrite) as temporary:
        shutil.copytree(folders[0][1], temporary, dirs_exist_ok=True)
        report = write_report(temporary, library, evaluated, scores)
    shutil.rmtree(runs_folder(out))
    return report


def runs_folder(out: Path) -> Path:
    """Returns where the runs of the networks stand until all is done."""
    return out.parent / f"{out.name}.runs"


def _train(
    networks: Mapping[str, ReconstructionConfig],
    library: AdapterLibrary,
    runs: Path,
    *,
    max_minutes: float | None,
    device: str,
    log: Callable[[str], None],
) -> bool:
    """Trains each network to its end; returns whether all are trained, which they are not if time runs out."""
    started = time.monotonic()
    total = sum(config.train.max_steps for config in networks.values())
    done = 0

    def stopped(why: str) -> None:
        log(f"{why} after {done:,} of {total:,} steps; they are saved in {runs}, and the same command goes on")

    trained = False
    for number, (label, config) in enumerate(networks.items(), start=1):
        run = runs / label
        before = read_progress(run).step if (run / STATE).exists() else 0
        if before < config.train.max_steps or not (run / "checkpoint").exists():
            left = None if max_minutes is None else max_minutes - (time.monotonic() - started) / 60
            if trained and left is not None and left <= 0:
                stopped("Time is up")
                return False
            adapters = len(config.data.adapters or library.names)
            log(
                f"network “{label}”, {number} of {len(networks)}: {adapters} adapters; {done + before:,} of {total:,} "
                "steps are done"
            )
            resume = (run / "config.json").exists()
            minutes = None if left is None else max(0.0, left)
            try:
                train_reconstruction(config, run, resume=resume, max_minutes=minutes, device=device, log=log)
            except KeyboardInterrupt:
                done += read_progress(run).step if (run / STATE).exists() else 0
                stopped("Interrupted")
                raise
            trained = True
        reached = read_progress(run).step
        done += reached
        if reached < config.train.max_steps:
            stopped("Time is up")
            return False
    return True
