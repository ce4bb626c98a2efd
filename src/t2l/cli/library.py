"""`t2l library`: libraries of adapters, from descriptions, to and from PEFT folders."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from t2l.cli.adapters import SavedType
from t2l.cli.common import (
    DEFAULT,
    CheckpointOption,
    DeviceOption,
    JsonOption,
    StrengthOption,
    WorkersOption,
    app,
    checked_device,
    print_json,
    require_place,
    say,
)

library_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Libraries of adapters, from descriptions, to and from PEFT."
)
app.add_typer(library_app, name="library")

LibraryArgument = Annotated[Path, typer.Argument(metavar="LIBRARY", help="Folder of an adapter library.")]
NamesOption = Annotated[
    list[str] | None, typer.Option("--name", metavar="NAME", help="Only this adapter; may be repeated.")
]


@library_app.command("generate")
def generate_library(
    descriptions: Annotated[
        Path, typer.Argument(metavar="FILE", help="Parquet or JSONL with `description` in every row.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="The library; one that is there is gone on with.")
    ],
    checkpoint: CheckpointOption = DEFAULT,
    strength: StrengthOption = 1.0,
    dtype: Annotated[SavedType, typer.Option(help="Type of the saved weights.")] = SavedType.float16,
    batch_size: Annotated[
        int, typer.Option(min=0, help="Descriptions of one forward pass; 0 is 256 on a GPU and 16 elsewhere.")
    ] = 0,
    shard_mb: Annotated[int, typer.Option(min=1, help="Largest size of a shard in MiB.")] = 512,
    workers: WorkersOption = 0,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter for every description of a file.

    They become a library of shards. What is done stays done: the same command goes on after an interruption, and writes
    only what is new.
    """
    from t2l.mass import Settings
    from t2l.mass import generate_library as generate

    started = time.perf_counter()
    settings = Settings(
        checkpoint=checkpoint,
        strength=strength,
        dtype=dtype.value,
        batch_size=batch_size,
        shard_bytes=shard_mb << 20,
        device=checked_device(device) or "auto",
    )
    done = generate(descriptions, out, settings, workers=workers, log=say, bar=sys.stderr.isatty())
    seconds = round(time.perf_counter() - started, 1)
    if as_json:
        print_json({"library": str(out), **vars(done), "seconds": seconds})
        return
    say(
        f"{done.written:,} adapters written in {seconds:,} s; {done.there:,} were there, {done.repeated:,} rows repeat "
        "an earlier text"
    )
    print(out)


@library_app.command("export")
def export_library(
    library: LibraryArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the PEFT folders go.")],
    names: NamesOption = None,
    descriptions: Annotated[
        list[str] | None,
        typer.Option("--description", metavar="TEXT", help="Only the adapter of this text; of a generated library."),
    ] = None,
) -> None:
    """Write adapters as PEFT folders, one each."""
    from t2l.library import AdapterLibrary
    from t2l.shards import ShardedLibrary, is_sharded

    if is_sharded(library):
        sharded = ShardedLibrary.open(library)
        ids = [*(names or ()), *map(sharded.origin.id_of, descriptions or ())]
        if not ids:
            raise typer.BadParameter(
                "a generated library may hold millions: say which by --name ID or --description TEXT"
            )
        sharded.export(out, list(dict.fromkeys(ids)))
    elif descriptions:
        raise typer.BadParameter("--description finds adapters of generated libraries; give --name")
    else:
        AdapterLibrary.open(library).export(out, names)
    print(out)


@library_app.command("import")
def import_library(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="PEFT adapter folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the library goes.")],
    base: Annotated[str, typer.Option(metavar="REF", help="The base model, as the adapters name it.")],
    descriptions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSONL of what each adapter does: `task` (its folder) and `description`; else its folder says.",
        ),
    ] = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Go on without the folders that do not fit, and report them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a library of PEFT LoRA folders. What does not fit is named."""
    require_place(out, "folder")
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
