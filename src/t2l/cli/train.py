"""`t2l train sft`, `t2l train task-loras` and `t2l train reconstruction`."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
import typer.core

from t2l.cli.common import DeviceOption, JsonOption, WorkersOption, app, checked_device, print_json, say, try_writing

if TYPE_CHECKING:
    from t2l.tasks import Task
    from t2l.train.estimate import Estimate

train_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Train a hypernetwork, or a LoRA for every task."
)
app.add_typer(train_app, name="train")


ConfigOption = Annotated[Path, typer.Option(metavar="FILE", help="YAML settings; see configs/.")]
RunOption = Annotated[Path | None, typer.Option("--run", metavar="DIR", show_default=False, help="Folder of the run.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Such as train.max_steps=100; may be repeated.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the run's saved state.")]
MinutesOption = Annotated[
    float | None, typer.Option(min=0.0, show_default=False, help="Stop and save after this time.")
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Take a few steps, say what memory, time and disk the run needs, write nothing.",
    ),
]


def benchmark_tasks() -> "list[Task]":
    """The benchmarks' tasks as evaluation asks them."""
    from t2l.eval.suites import benchmark_tasks

    return benchmark_tasks()


class Trainer(NamedTuple):
    """One of the trainings."""

    settings: type
    train: Callable[..., Any]
    dry_run: Callable[..., Any]
    shown: dict[str, Any]
    """What `train` takes to show people what it does."""
    own: dict[str, Any]
    """What `train` and `dry_run` take that the others do not."""


def shown_to_people(watch: Callable[..., None]) -> dict[str, Any]:
    """What a training takes to show people what it does: a bar where standard error is a terminal, and who looks on."""
    return {"bar": sys.stderr.isatty(), "watch": watch}


def _sft() -> Trainer:
    """Train by the base's loss on the tasks' answers. Prints the checkpoint's folder."""
    from t2l.train.dry_run import dry_run_sft
    from t2l.train.sft import SftConfig, train
    from t2l.watching import watch_sft

    return Trainer(SftConfig, train, dry_run_sft, shown_to_people(watch_sft), {})


def _task_loras() -> Trainer:
    """Train one LoRA for every task, many at once. Prints the library's folder."""
    from t2l.train.dry_run import dry_run_task_loras
    from t2l.train.task_loras import TaskLorasConfig, train_task_loras
    from t2l.watching import watch_task_loras

    own = {"benchmarks": benchmark_tasks}
    return Trainer(TaskLorasConfig, train_task_loras, dry_run_task_loras, shown_to_people(watch_task_loras), own)


def _reconstruction() -> Trainer:
    """Train a hypernetwork to write a library's adapters. Prints the checkpoint's folder."""
    from t2l.train.dry_run import dry_run_reconstruction
    from t2l.train.reconstruction import ReconstructionConfig, train_reconstruction
    from t2l.watching import watch_reconstruction

    return Trainer(
        ReconstructionConfig, train_reconstruction, dry_run_reconstruction, shown_to_people(watch_reconstruction), {}
    )


def print_estimate(found: "Estimate", run_folder: Path | None, as_json: bool) -> None:
    """Prints an estimate, and what the disk has left for the run."""
    from t2l.train.estimate import size

    nearest = (run_folder or Path()).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    free, needed = shutil.disk_usage(nearest).free, sum(found.disk.values())
    if as_json:
        print_json(found.plain() | {"disk_free": free})
        return
    print(found.table())
    if needed > free:
        print(f"{'disk full':<12}{nearest} has {size(free)} left; name another folder with --run")


@contextmanager
def told_where_nothing_is_saved(run_folder: Path) -> Iterator[None]:
    """Says how to begin again if Ctrl-C comes before a training has a state to go on from."""
    from t2l.train.resume import STATE

    try:
        yield
    except KeyboardInterrupt:
        if not (run_folder / STATE).exists():
            again = "go on with --resume" if (run_folder / "config.json").exists() else "give the same command again"
            say(f"interrupted before anything was saved; {again}")
        raise


def _by_workers(trainer: Trainer, workers: int) -> Trainer:
    """The training by workers, where there is one."""
    from t2l.train.task_config import TaskLorasConfig
    from t2l.train.workers import train_on_workers

    if trainer.settings is not TaskLorasConfig:
        raise typer.BadParameter("--workers trains task LoRAs, which do not depend on one another")
    return trainer._replace(train=partial(train_on_workers, workers=workers), shown={})


def _command(load: Callable[[], Trainer]) -> Callable[..., None]:
    """Makes the command of a trainer; `load` is called inside it, because it imports torch."""

    def run(
        config: ConfigOption,
        run_folder: RunOption = None,
        overrides: SetOption = None,
        dry_run: DryRunOption = False,
        resume: ResumeOption = False,
        max_minutes: MinutesOption = None,
        device: DeviceOption = None,
        workers: WorkersOption = 0,
        as_json: JsonOption = False,
    ) -> None:
        from t2l.config import build, load_yaml, override
        from t2l.train.processes import is_main

        started = time.perf_counter()
        plain = override(load_yaml(config), overrides or [])
        if run_folder is None and not dry_run:
            raise typer.BadParameter("where to? Name the run's folder with --run DIR")
        if run_folder is not None and not (resume or dry_run):
            try_writing(run_folder.absolute())
        trainer = _by_workers(load(), workers) if workers else load()
        settings: Any = build(trainer.settings, plain, where=str(config))
        where = checked_device(device)
        if dry_run and not is_main():
            return
        if run_folder is None or dry_run:
            print_estimate(trainer.dry_run(settings, device=where, log=say, **trainer.own), run_folder, as_json)
            return
        from t2l.io import only_writer

        with only_writer(run_folder) if is_main() else nullcontext(), told_where_nothing_is_saved(run_folder):
            result = trainer.train(
                settings,
                run_folder,
                resume=resume,
                max_minutes=max_minutes,
                device=where,
                log=say,
                **trainer.shown,
                **trainer.own,
            )
        what, folder = ("checkpoint", result) if isinstance(result, Path) else ("library", result.folder)
        if not is_main():
            return
        if as_json:
            facts = {} if isinstance(result, Path) else {"adapters": len(result.names)}
            print_json({what: str(folder), **facts, "seconds": round(time.perf_counter() - started, 1)})
        else:
            print(folder)

    run.__doc__ = load.__doc__
    return run


for name, load in (("sft", _sft), ("task-loras", _task_loras), ("reconstruction", _reconstruction)):
    train_app.command(name)(_command(load))
