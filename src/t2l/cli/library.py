"""`t2l train oracle`, `t2l train recon`, `t2l compress` and `t2l library`: many adapters, and one network for them."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import typer.core

from t2l.cli.common import Device, JsonOption, app, print_json, say, try_writing
from t2l.cli.train import train_app
from t2l.errors import ConfigError

if TYPE_CHECKING:
    from t2l.tasks import Task

library_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Libraries of adapters, to and from PEFT.")
app.add_typer(library_app, name="library")

ConfigOption = Annotated[Path, typer.Option(metavar="FILE", help="YAML settings; see configs/.")]
RunOption = Annotated[Path, typer.Option("--run", metavar="DIR", help="Folder of the run.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Such as train.steps=100; may be repeated.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the run's saved state.")]
MinutesOption = Annotated[
    float | None, typer.Option(min=0.0, show_default=False, help="Stop and save after this time.")
]
DeviceOption = Annotated[Device | None, typer.Option(help="The GPU, if there is one.", show_default=False)]
LibraryArgument = Annotated[Path, typer.Argument(metavar="LIBRARY", help="Folder of an adapter library.")]
NamesOption = Annotated[
    list[str] | None, typer.Option("--name", metavar="NAME", help="Only this adapter; may be repeated.")
]


def checked_device(device: Device | None) -> str | None:
    """The device's name, if it is there."""
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; `t2l doctor` says more")
    return None if device is None else device.value


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
    from t2l.config import build, load_yaml, override

    started = time.perf_counter()
    plain = override(load_yaml(config), overrides or [])
    if not resume:
        try_writing(run_folder.absolute())
    from t2l.train.oracle import OracleConfig, train_oracles

    library = train_oracles(
        build(OracleConfig, plain, where=str(config)),
        run_folder,
        resume=resume,
        max_minutes=max_minutes,
        device=checked_device(device),
        benchmarks=benchmark_tasks,
        log=say,
    )
    if as_json:
        print_json(
            {
                "library": str(library.folder),
                "adapters": len(library.names),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    else:
        print(library.folder)


def benchmark_tasks() -> "list[Task]":
    """The benchmarks' tasks as evaluation asks them."""
    raise ConfigError("The benchmarks cannot be trained on yet: this version has no prompts for them")


@library_app.command("export")
def export_library(
    library: LibraryArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the PEFT folders go.")],
    names: NamesOption = None,
) -> None:
    """Write adapters as PEFT folders, one each."""
    from t2l.library import AdapterLibrary

    AdapterLibrary.open(library).export(out, names)
    print(out)


@library_app.command("import")
def import_library(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="PEFT adapter folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the library goes.")],
    base: Annotated[str, typer.Option(metavar="REF", help="The base model, as the adapters name it.")],
    descriptions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSONL of what each adapter does: `task` (its folder) and `description`."),
    ] = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Go on without the folders that do not fit, and report them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a library of existing PEFT LoRA folders; what does not fit is named."""
    from t2l import models
    from t2l.library import from_peft_folders
    from t2l.tasks import load_descriptions

    texts = load_descriptions(descriptions) if descriptions else {}
    library, refused = from_peft_folders(
        folders,
        out,
        models.load_config(base),
        base,
        facts={name: {"descriptions": list(found)} for name, found in texts.items()},
        leave_out=leave_out,
    )
    for name, why in refused.items():
        say(f"left out {name}: {why}")
    if as_json:
        print_json({"library": str(library.folder), "adapters": list(library.names), "left_out": refused})
    else:
        print(library.folder)
