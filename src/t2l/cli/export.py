"""`t2l export` and `t2l merge`: adapters for other programs, from a description or from a PEFT folder."""

import os
import shlex
import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from t2l.cli.common import (
    DEFAULT,
    BaseOption,
    CheckpointOption,
    Device,
    JsonOption,
    SavedType,
    app,
    checked_device,
    print_json,
    require_place,
    say,
)
from t2l.errors import CheckpointError, OutputError
from t2l.kinds import ADAPTER, absent, require_kind

if TYPE_CHECKING:
    from t2l.adapter import LoraAdapter

exporting = typer.Typer(no_args_is_help=True, help="Write an adapter in the format of another program.")
app.add_typer(exporting, name="export")

SourceArgument = Annotated[
    str, typer.Argument(metavar="DESCRIPTION|DIR", help="What the task is, or the PEFT folder of an adapter.")
]
WritingDeviceOption = Annotated[
    Device | None,
    typer.Option(help="Where a description becomes an adapter; the CPU does the rest.", show_default=False),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


class GgufType(StrEnum):
    """Types that matrices have in a GGUF file."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"


def find_adapter(source: str, checkpoint: str, base: str | None = None, device: Device | None = None) -> "LoraAdapter":
    """The adapter of a PEFT folder, or a new one, written on the device, where the text names no folder.

    Raises:
        CheckpointError: if the text is a single word, and no folder of that name is there.
    """
    from t2l.adapter import LoraAdapter
    from t2l.text_to_lora import TextToLora

    folder = os.path.expanduser(source)
    if os.path.isdir(folder):  # Path.is_dir would raise for a text longer than a file's name may be
        return LoraAdapter.from_pretrained(folder, base_model=base)
    if os.path.isfile(folder):
        require_kind(Path(folder), ADAPTER)
    if source.isascii() and len(source.split()) == 1:  # a misspelt folder; languages without spaces are not ASCII
        raise CheckpointError(f"{absent(Path(folder))}; give an adapter's folder, or a description of several words")
    place = checked_device(device) or "auto"
    (adapter,) = TextToLora.from_pretrained(checkpoint, device=place, base_reference=base).generate([source])
    adapter.require_effect()
    return adapter


@exporting.command(name="gguf")
def export_gguf(
    source: SourceArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="GGUF file to write.")],
    checkpoint: CheckpointOption = DEFAULT,
    base: BaseOption = None,
    device: WritingDeviceOption = None,
    outtype: Annotated[GgufType, typer.Option(help="Type of the matrices in the file.")] = GgufType.f32,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter for llama.cpp and Ollama."""
    require_place(output, "file", overwrite=overwrite)
    started = time.perf_counter()
    from t2l import hub
    from t2l.gguf_export import save_gguf

    adapter = find_adapter(source, checkpoint, base, device)
    config = hub.load_config(base or adapter.spec.base_model)
    save_gguf(
        output,
        adapter.lora,
        adapter.spec,
        config,
        outtype=outtype.value,
        description=adapter.description,
        overwrite=overwrite,
    )
    facts = {"path": str(output), "base_model": adapter.spec.base_model, "bytes": output.stat().st_size}
    if as_json:
        print_json(facts | {"description": adapter.description, "seconds": round(time.perf_counter() - started, 3)})
        return
    print(output)
    size = output.stat().st_size / 2**20
    path = shlex.quote(str(output))
    say(f"{size:.1f} MiB for {adapter.spec.base_model}; load it with: llama-cli -m BASE.gguf --lora {path}")


@exporting.command(name="peft")
def export_peft(
    source: SourceArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="PEFT folder to write.")],
    checkpoint: CheckpointOption = DEFAULT,
    base: BaseOption = None,
    device: WritingDeviceOption = None,
    base_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name the base so; vLLM compares it with its own.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Pad to this rank; the adapter's effect stays the same.", show_default=False),
    ] = None,
    for_vllm: Annotated[bool, typer.Option("--vllm", help="Pad to the next rank that vLLM takes.")] = False,
) -> None:
    """Write a PEFT folder, with another base name or a higher rank."""
    require_place(output, "folder")
    if rank is not None and for_vllm:
        raise typer.BadParameter("--rank and --vllm are given: give one of them")
    from t2l.ranks import next_rank, pad_rank

    adapter = find_adapter(source, checkpoint, base, device)
    spec = replace(adapter.spec, base_model=base_name or adapter.spec.base_model)
    lora, spec = pad_rank(adapter.lora, spec, next_rank(spec.rank) if for_vllm else rank or spec.rank)
    replace(adapter, lora=lora, spec=spec).save_pretrained(output)
    print(output)
    say(f"rank {spec.rank}, alpha {spec.alpha:g}, for {spec.base_model}")


@app.command()
def merge(
    source: SourceArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Model folder to write.")],
    checkpoint: CheckpointOption = DEFAULT,
    base: BaseOption = None,
    device: WritingDeviceOption = None,
    dtype: Annotated[
        SavedType | None, typer.Option(help="Type of the weights; the base's own, if absent.", show_default=False)
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a whole model, the base with an adapter in its weights.

    Transformers, vLLM and llama.cpp's converter read DIR as any model; it needs no PEFT.
    """
    require_place(output, "folder", overwrite=overwrite)
    if output.exists() and not (output / "config.json").is_file():
        raise OutputError(f"{output} holds no model; --overwrite would delete what it holds. Choose another folder")
    import torch

    from t2l.merge import merge_into_folder

    adapter = find_adapter(source, checkpoint, base, device)
    card = adapter.card(library="transformers")
    changed = merge_into_folder(
        adapter,
        output,
        base_model=base,
        dtype=getattr(torch, dtype) if dtype else None,
        card=card,
        overwrite=overwrite,
    )
    if as_json:
        print_json({"path": str(output), "base_model": adapter.spec.base_model, "changed_matrices": changed})
        return
    print(output)
    say(f"{changed} matrices of {adapter.spec.base_model} changed; the folder is a model of its own")
