"""`t2l train sft`, `t2l train task-loras` and `t2l train reconstruction`."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from t2l.cli.common import DeviceOption, JsonOption, app, checked_device, print_json, say, try_writing

if TYPE_CHECKING:
    from t2l.tasks import Task

train_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Train a hypernetwork, or a LoRA for every task."
)
app.add_typer(train_app, name="train")


ConfigOption = Annotated[Path, typer.Option(metavar="FILE", help="YAML settings; see configs/.")]
RunOption = Annotated[Path, typer.Option("--run", metavar="DIR", help="Folder of the run.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Such as train.max_steps=100; may be repeated.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the run's saved state.")]
MinutesOption = Annotated[
    float | None, typer.Option(min=0.0, show_default=False, help="Stop and save after this time.")
]


def benchmark_tasks() -> "list[Task]":
    """The benchmarks' tasks as evaluation asks them."""
    from t2l.eval.suites import benchmark_tasks

    return benchmark_tasks()


Trainer = tuple[type, Callable[..., Any], dict[str, Any]]
"""The settings' class, the function that trains, and what the function takes that the others do not."""


def _sft() -> Trainer:
    """Train through the base model's loss on the tasks' answers; prints the checkpoint's folder."""
    from t2l.train.sft import SftConfig, train

    return SftConfig, train, {"bar": sys.stderr.isatty()}


def _task_loras() -> Trainer:
    """Train one LoRA for every task of a suite, many at once; prints the library's folder."""
    from t2l.train.task_loras import TaskLorasConfig, train_task_loras

    return TaskLorasConfig, train_task_loras, {"benchmarks": benchmark_tasks}


def _reconstruction() -> Trainer:
    """Train a hypernetwork to write a library's adapters from their descriptions; prints the checkpoint's folder."""
    from t2l.train.reconstruction import ReconstructionConfig, train_reconstruction

    return ReconstructionConfig, train_reconstruction, {"bar": sys.stderr.isatty()}


def _command(load: Callable[[], Trainer]) -> Callable[..., None]:
    """Makes the command of a trainer; `load` is called inside it, because it imports torch."""

    def run(
        config: ConfigOption,
        run_folder: RunOption,
        overrides: SetOption = None,
        resume: ResumeOption = False,
        max_minutes: MinutesOption = None,
        device: DeviceOption = None,
        as_json: JsonOption = False,
    ) -> None:
        from t2l.config import build, load_yaml, override
        from t2l.io import only_writer

        started = time.perf_counter()
        plain = override(load_yaml(config), overrides or [])
        if not resume:
            try_writing(run_folder.absolute())
        settings, train, more = load()
        with only_writer(run_folder):
            result = train(
                build(settings, plain, where=str(config)),
                run_folder,
                resume=resume,
                max_minutes=max_minutes,
                device=checked_device(device),
                log=say,
                **more,
            )
        what, folder = ("checkpoint", result) if isinstance(result, Path) else ("library", result.folder)
        if as_json:
            facts = {} if isinstance(result, Path) else {"adapters": len(result.names)}
            print_json({what: str(folder), **facts, "seconds": round(time.perf_counter() - started, 1)})
        else:
            print(folder)

    run.__doc__ = load.__doc__
    return run


for name, load in (("sft", _sft), ("task-loras", _task_loras), ("reconstruction", _reconstruction)):
    train_app.command(name)(_command(load))
