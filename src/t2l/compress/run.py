"""The run of `t2l compress`: train the planned network, evaluate it, leave a checkpoint with a report.

Knows plans, a training and the report.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from t2l.compress.networks import Kind, evaluate_networks
from t2l.compress.plan import size_warning
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
    config: ReconstructionConfig,
    *,
    tasks: Sequence[Task] = (),
    base: tuple[Any, Any] | None = None,
    kinds: Sequence[Kind] = ("trained", "held-out"),
    limit: int | None = None,
    max_minutes: float | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    log: Callable[[str], None] = print,
    **shown: Any,
) -> dict[str, Any] | None:
    """Trains the planned network, evaluates it, and leaves its checkpoint with the report.

    The run is kept in the folder `run_folder(out)` until all is done; called again, it goes on where it stopped.

    Args:
        library: The adapters.
        out: Where checkpoint and report go.
        config: The network's settings.
        tasks: Tasks of the library with held-out examples, for scores; none means errors only.
        base: The base model and its tokenizer, for scores.
        kinds: What the network is given to read when it is evaluated.
        limit: Most held-out examples of a task.
        max_minutes: Wall time of the training, after which it is saved and stops.
        device: Where it all happens.
        overwrite: Whether an existing `out` is replaced.
        log: Where progress lines go.
        shown: As `train_reconstruction` takes them: `bar` and `watch`.

    Returns:
        The report as plain data, or None if time ran out before the network was trained.

    Raises:
        DataError, ConfigError, OutputError: as those who read, train and write raise them.
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    scorer = None
    if tasks:
        assert base is not None, "scores need the base model"
        scorer = prepare_scores(library, tasks, base, limit=limit)
    if warning := size_warning(config, library):
        log(warning)
    run = run_folder(out)
    if not _train(config, run, max_minutes=max_minutes, device=device, log=log, **shown):
        return None
    folders = [(out.name, run / "checkpoint")]
    networks, scores = evaluate_networks(folders, library, scorer, kinds=kinds, device=device, log=log)
    with new_folder(out, overwrite=overwrite) as temporary:
        shutil.copytree(run / "checkpoint", temporary, dirs_exist_ok=True)
        report = write_report(temporary, library, networks, scores)
    shutil.rmtree(run)
    return report


def run_folder(out: Path) -> Path:
    """Returns where the training stands until all is done."""
    return out.parent / f"{out.name}.run"


def _train(
    config: ReconstructionConfig,
    run: Path,
    *,
    max_minutes: float | None,
    device: str,
    log: Callable[[str], None],
    **shown: Any,
) -> bool:
    """Trains the network to its end; returns whether it is trained, which it is not if time runs out."""

    def reached() -> int:
        return read_progress(run).step if (run / STATE).exists() else 0

    def stopped(why: str) -> None:
        log(f"{why} after {reached():,} of {wanted:,} steps; they are saved in {run}, and the same command goes on")

    wanted = config.train.max_steps
    if reached() < wanted or not (run / "checkpoint").exists():
        resume = (run / "config.json").exists()
        try:
            train_reconstruction(config, run, resume=resume, max_minutes=max_minutes, device=device, log=log, **shown)
        except KeyboardInterrupt:
            stopped("Interrupted")
            raise
    if reached() < wanted:
        stopped("Time is up")
        return False
    return True
