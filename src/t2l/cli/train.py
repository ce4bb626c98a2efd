"""`t2l train sft`, `t2l train oracle` and `t2l train reconstruction`."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from t2l.cli.common import DeviceOption, JsonOption, app, checked_device, print_json, say, try_writing

if TYPE_CHECKING:
    from t2l.tasks import Task

train_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train a hypernetwork.")
app.add_typer(train_app, name="train")


ConfigOption = Annotated[Path, typer.Option(metavar="FILE", help="YAML settings; see configs/.")]
RunOption = Annotated[Path, typer.Option("--run", metavar="DIR", help="Folder of the run.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Such as train.steps=100; may be repeated.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the run's saved state.")]
MinutesOption = Annotated[
    float | None, typer.Option(min=0.0, show_default=False, help="Stop and save after this time.")
]


def benchmark_tasks() -> "list[Task]":
    """The benchmarks' tasks as evaluation asks them."""
    from t2l.eval.suites import benchmark_tasks

    return benchmark_tasks()


def _read(config: Path, overrides: list[str] | None, run_folder: Path, *, resume: bool) -> dict[str, Any]:
    """A run's settings, and a look whether its folder can be written, before anything slow is loaded."""
    from t2l.config import load_yaml, override

    plain = override(load_yaml(config), overrides or [])
    if not resume:
        try_writing(run_folder.absolute())
    return plain


def _finish(what: str, folder: Path, started: float, *, as_json: bool, **facts: int) -> None:
    if as_json:
        print_json({what: str(folder), **facts, "seconds": round(time.perf_counter() - started, 1)})
    else:
        print(folder)


@train_app.command("sft")
def train_sft(
    config: ConfigOption,
    run_folder: RunOption,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    max_minutes: MinutesOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train through the base model's loss on the tasks' answers; prints the checkpoint's folder."""
    from t2l.config import build

    started = time.perf_counter()
    plain = _read(config, overrides, run_folder, resume=resume)
    from t2l.train.sft import SftConfig, train

    folder = train(
        build(SftConfig, plain, where=str(config)),
        run_folder,
        resume=resume,
        max_minutes=max_minutes,
        device=checked_device(device),
        bar=sys.stderr.isatty(),
        log=say,
    )
    _finish("checkpoint", folder, started, as_json=as_json)


@train_app.command("oracle")
def train_oracle(
    config: ConfigOption,
    run_folder: RunOption,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    max_minutes: MinutesOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train one LoRA for every task of a suite, many at once; prints the library's folder."""
    from t2l.config import build

    started = time.perf_counter()
    plain = _read(config, overrides, run_folder, resume=resume)
    from t2l.train.task_loras import OracleConfig, train_oracles

    library = train_oracles(
        build(OracleConfig, plain, where=str(config)),
        run_folder,
        resume=resume,
        max_minutes=max_minutes,
        device=checked_device(device),
        benchmarks=benchmark_tasks,
        log=say,
    )
    _finish("library", library.folder, started, as_json=as_json, adapters=len(library.names))


@train_app.command("reconstruction")
def train_reconstruction_command(
    config: ConfigOption,
    run_folder: RunOption,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    max_minutes: MinutesOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a hypernetwork to write a library's adapters from their descriptions; prints the checkpoint's folder."""
    from t2l.config import build

    started = time.perf_counter()
    plain = _read(config, overrides, run_folder, resume=resume)
    from t2l.train.reconstruction import ReconstructionConfig, train_reconstruction

    folder = train_reconstruction(
        build(ReconstructionConfig, plain, where=str(config)),
        run_folder,
        resume=resume,
        max_minutes=max_minutes,
        device=checked_device(device),
        bar=sys.stderr.isatty(),
        log=say,
    )
    _finish("checkpoint", folder, started, as_json=as_json)
