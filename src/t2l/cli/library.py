"""`t2l library export` and `t2l library import`: libraries of adapters, to and from PEFT folders."""

from pathlib import Path
from typing import Annotated

import typer
import typer.core

from t2l.cli.common import JsonOption, app, print_json, say

library_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Libraries of adapters, to and from PEFT.")
app.add_typer(library_app, name="library")

LibraryArgument = Annotated[Path, typer.Argument(metavar="LIBRARY", help="Folder of an adapter library.")]
NamesOption = Annotated[
    list[str] | None, typer.Option("--name", metavar="NAME", help="Only this adapter; may be repeated.")
]


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
    from t2l import hub
    from t2l.library import from_peft_folders
    from t2l.tasks import load_descriptions

    texts = load_descriptions(descriptions) if descriptions else {}
    library, refused = from_peft_folders(
        folders,
        out,
        hub.load_config(base),
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
