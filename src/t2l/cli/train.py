"""`t2l train`."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from t2l.cli.common import Device, JsonOption, app, print_json, say, try_writing
from t2l.errors import ConfigError

train_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train a hypernetwork.")
app.add_typer(train_app, name="train")


@train_app.command("sft")
def train_sft(
    config: Annotated[Path, typer.Option(metavar="FILE", help="YAML settings; see configs/.")],
    run_folder: Annotated[Path, typer.Option("--run", metavar="DIR", help="Folder of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Such as train.steps=100; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's saved state.")] = False,
    max_minutes: Annotated[
        float | None, typer.Option(min=0.0, show_default=False, help="Stop and save after this time.")
    ] = None,
    device: Annotated[Device | None, typer.Option(help="The GPU, if there is one.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Train through the base model's loss on the tasks' answers; prints the checkpoint's folder."""
    from t2l.config import build, load_yaml, override

    started = time.perf_counter()
    plain = override(load_yaml(config), overrides or [])
    if not resume:
        try_writing(run_folder.absolute())
    import torch

    from t2l.train.sft import SftConfig, train

    settings = build(SftConfig, plain, where=str(config))
    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; `t2l doctor` says more")
    folder = train(
        settings,
        run_folder,
        resume=resume,
        max_minutes=max_minutes,
        device=None if device is None else device.value,
        bar=sys.stderr.isatty(),
        log=say,
    )
    if as_json:
        print_json({"checkpoint": str(folder), "seconds": round(time.perf_counter() - started, 1)})
    else:
        print(folder)
