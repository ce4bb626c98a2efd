"""`t2l import`: checkpoints and encoders that others published, as this library reads them."""

from pathlib import Path
from typing import Annotated

import typer

from t2l.cli.common import app, require_place, say
from t2l.errors import CheckpointError
from t2l.kinds import PUBLISHED, absent, require_kind

importing = typer.Typer(no_args_is_help=True, help="Make what others published readable here.")
app.add_typer(importing, name="import")

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The published folder.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")]


def _check(folder: Path, output: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(absent(folder))
    require_place(output, "folder")


@importing.command(name="sakana")
def import_sakana(
    folder: FolderArgument,
    output: OutputOption,
    base: Annotated[
        str | None,
        typer.Option(metavar="REF", help="The base model, if not by the published name.", show_default=False),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(metavar="REF", help="The encoder; for gte, what `t2l import gte` wrote.", show_default=False),
    ] = None,
) -> None:
    """Make a checkpoint of a published Text-to-LoRA folder. It holds args.yaml, adapter_config.json, hypermod.pt."""
    _check(folder, output)
    require_kind(folder, PUBLISHED)
    from t2l.sakana import import_published

    spec = import_published(folder, output, base_model=base, encoder=encoder)
    print(output)
    say(f"adapters for {spec.base_model}: rank {spec.rank}, targets {', '.join(t.name for t in spec.targets)}")


@importing.command(name="gte")
def import_gte(folder: FolderArgument, output: OutputOption) -> None:
    """Make gte-large-en-v1.5 readable by Transformers' own class. No code from its repository is run."""
    _check(folder, output)
    from t2l.gte import convert_gte

    convert_gte(folder, output)
    print(output)
