"""Task LoRAs on many workers: each trains some of the tasks, and their libraries become one.

What a task becomes does not depend on those beside it (see `task_loras`), so the library is the one that a single
process trains. A part of the tasks is a run of its own, under `parts/`, which a new worker goes on with when one dies.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from t2l import fanout
from t2l.config import to_plain
from t2l.errors import ConfigError, TrainingError
from t2l.hub import best_device
from t2l.io import only_writer
from t2l.library import INDEX, AdapterLibrary, save_library
from t2l.lora import LoraTensors
from t2l.pace import Pace
from t2l.train.resume import begin_run, check_run
from t2l.train.task_config import TaskLorasConfig
from t2l.train.task_data import Benchmarks, load_tasks
from t2l.train.task_loras import train_task_loras

Log = Callable[[str], None]


class Worker:
    """What one worker does: it trains the parts that it is given, one after another.

    Args:
        config: Settings of the whole run.
        run: Its folder.
        device: Where to train; the GPU if there is one.
        benchmarks: As `train_task_loras` takes it.
    """

    def __init__(self, config: TaskLorasConfig, run: Path, device: str | None, benchmarks: Benchmarks | None) -> None:
        self.config, self.run, self.device, self.benchmarks = config, run, device, benchmarks

    def __call__(self, names: list[str]) -> int:
        """Trains the tasks of these names, or goes on with them; returns how many adapters there are."""
        folder = part_folder(self.run, names)
        with only_writer(folder):
            if not (folder / "library" / INDEX).exists():
                part = replace(self.config, data=replace(self.config.data, only=tuple(names)))
                train_task_loras(
                    part,
                    folder,
                    resume=(folder / "config.json").exists(),
                    device=self.device,
                    benchmarks=self.benchmarks,
                    log=lambda line: None,
                )
        return len(AdapterLibrary.open(folder / "library").names)


def part_folder(run: Path, names: list[str]) -> Path:
    """The folder of a part's own run, which is named after its tasks."""
    return run / "parts" / hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def train_on_workers(
    config: TaskLorasConfig,
    run: Path,
    *,
    workers: int,
    resume: bool = False,
    max_minutes: float | None = None,
    device: str | None = None,
    benchmarks: Benchmarks | None = None,
    log: Log = print,
) -> AdapterLibrary:
    """`train_task_loras` by workers of Ray, each with `train.tasks_per_batch` tasks at a time.

    Args:
        config: Settings.
        run: Folder for `config.json`, `parts/` and, at the end, `library/`; all workers must see it.
        workers: How many there are.
        resume: Go on with the folder's parts.
        max_minutes: Must be None.
        device: As `train_task_loras` takes it, like all that follows.
        benchmarks: Loads the benchmarks' tasks.
        log: Where progress lines go.

    Returns:
        The library of all adapters, in the order of a single process.

    Raises:
        ConfigError: if a time is given, Ray is not installed, or settings will not do.
        DataError: if data will not do.
        TrainingError: as `train_task_loras`.
    """
    if max_minutes is not None:
        raise ConfigError("--max-minutes is for one process; workers may be stopped at any time and gone on with")
    run = run.absolute()
    check_run(run, to_plain(config), resume=resume)
    if resume and (run / "library" / INDEX).exists():
        raise TrainingError(f"{run} is finished: its library is written")
    names = [task.name for task in load_tasks(config, benchmarks)]
    if not (run / "config.json").exists():
        begin_run(run, to_plain(config))
    size = config.train.tasks_per_batch
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    pace = Pace(len(names), "tasks", log)
    log(f"{len(names)} tasks in {len(parts)} parts for {workers} workers")
    arguments = (config, run, device, benchmarks)
    for number in fanout.run(Worker, arguments, parts, workers=workers, device=best_device(device)):
        pace.add(number)
    return _joined(
        [AdapterLibrary.open(part_folder(run, part) / "library") for part in parts], run / "library", config.data.tasks
    )


def _joined(libraries: list[AdapterLibrary], folder: Path, sources: Sequence[str]) -> AdapterLibrary:
    """Writes one library of several with one spec."""
    lora = LoraTensors.stack([single for library in libraries for single in library.stack().unbind()])
    facts = {name: library.index[name] for library in libraries for name in library.names}
    first = libraries[0]
    return save_library(folder, lora, first.spec, facts, purpose=first.purpose, sources=sources, overwrite=True)
