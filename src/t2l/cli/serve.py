"""`t2l serve`."""

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from t2l.cli.common import DEFAULT, BaseOption, CheckpointOption, DeviceOption, app, checked_device, say
from t2l.errors import ConfigError


@app.command()
def serve(
    checkpoint: CheckpointOption = DEFAULT,
    base: BaseOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; another than this machine's needs T2L_TOKEN.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where adapters are kept; in the cache, if absent.", show_default=False),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A name that the server goes by; may be repeated.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A site whose pages may use it, as https://app.example; may be repeated."),
    ] = None,
    device: DeviceOption = None,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Answer in bfloat16: faster on a GPU.")] = False,
    rows: Annotated[int, typer.Option(min=1, help="Answers that are written at the same time.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens that a request may ask for.")] = 1024,
    memory: Annotated[int, typer.Option(min=1, metavar="MIB", help="Memory for adapters that are kept ready.")] = 256,
    grace: Annotated[
        int, typer.Option(min=0, metavar="SECONDS", help="How long requests under way may go on when it is stopped.")
    ] = 25,
) -> None:
    """Serve adapters over HTTP, with a page to try them on.

    Every request may have another adapter. OpenAI's clients can talk to it: the model is an adapter's id, or t2l: and a
    description. Clients of other machines send what the environment variable T2L_TOKEN holds.
    """
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client")):
        raise ConfigError("The server needs packages that are not installed: run `pip install 'text-to-lora[serve]'`")
    found = checked_device(device)

    from t2l import hub
    from t2l.pypi import cache_dir
    from t2l.serve.launch import Settings, run
    from t2l.serve.limits import Limits

    settings = Settings(
        checkpoint=checkpoint,
        base=base,
        folder=folder or cache_dir() / "served",
        host=host,
        port=port,
        token=os.environ.get("T2L_TOKEN") or None,
        allow_hosts=tuple(name.lower() for name in allow_host or ()),
        allow_origins=tuple(origin.lower().removesuffix("/") for origin in allow_origin or ()),
        device=hub.best_device(found),
        dtype="bfloat16" if bfloat16 else "float32",
        memory=memory * 2**20,
        grace=grace,
        limits=Limits(rows=rows, max_tokens=max_tokens),
    )
    run(settings, say)
