"""`t2l generate` and `t2l run`."""

import os
import re
import sys
import time
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from t2l.cli.common import (
    DEFAULT,
    BaseOption,
    CheckpointOption,
    DeviceOption,
    InPromptOption,
    JsonOption,
    SavedType,
    StrengthOption,
    app,
    checked_device,
    peak_memory,
    print_json,
    read_lines,
    read_text,
    say,
    text_or_stdin,
    try_writing,
)
from t2l.errors import DataError, OutputError, T2LError
from t2l.io import require_absent
from t2l.kinds import ADAPTER, require_kind

if TYPE_CHECKING:
    from t2l.session import Session
    from t2l.text_to_lora import LoraAdapter

DescriptionFilesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--description-file", metavar="FILE", help="All of FILE is one description; may be repeated; - is stdin."
    ),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Use this adapter; DESCRIPTION may then be left out if the adapter has one."),
]
ANSWERS_AT_ONCE = 8
"""Inputs that `run` answers in one batch where it does not stream."""


# -------------------------------------------------------------------------------------------------- generate


@app.command()
def generate(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    description: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DESCRIPTION", show_default=False, help="What a task is, in up to 128 tokens; - is standard input."
        ),
    ] = None,
    from_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One description per line, blank lines skipped; - is standard input."),
    ] = None,
    description_files: DescriptionFilesOption = None,
    checkpoint: CheckpointOption = DEFAULT,
    base: BaseOption = None,
    strength: StrengthOption = 1.0,
    dtype: Annotated[SavedType, typer.Option(help="Type of the saved weights.")] = SavedType.float32,
    device: DeviceOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it holds adapters.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a LoRA adapter for each description.

    All are written in one forward pass. One description: DIR is its PEFT folder. Several: DIR/000-..., DIR/001-..., all
    of them or none. A description that is longer than what the checkpoint reads (128 tokens, some 90 words, for the
    shipped one) is refused, never cut.
    """
    if sum(given is not None for given in (description, from_file, description_files)) != 1:
        some = description or from_file or description_files
        problem = "descriptions are given in several ways" if some else "no description is given"
        raise typer.BadParameter(f"{problem}: give DESCRIPTION, --from-file FILE or --description-file FILE")
    single = from_file is None and len(description or description_files or ()) == 1
    _require_writable(output, overwrite=overwrite, single=single)
    texts = read_lines(from_file, "description") if from_file else [text_or_stdin(text) for text in description or ()]
    texts += [read_text(path).strip() for path in description_files or ()]

    started = time.perf_counter()
    import torch

    from t2l.encoder import check_description
    from t2l.text_to_lora import TextToLora

    for number, text in enumerate(texts, start=1):  # before anything slow is loaded
        check_description(text, f" (description {number} of {len(texts)})")
    writer = TextToLora.from_pretrained(checkpoint, device=checked_device(device) or "auto", base_reference=base)
    loaded = time.perf_counter()
    adapters = writer.generate(texts, strength=strength)
    generated = time.perf_counter()
    for adapter in adapters:
        adapter.require_effect()
    paths = _save(adapters, output, dtype=getattr(torch, dtype.value), single=single, overwrite=overwrite)
    facts = {
        "checkpoint": checkpoint,
        "load_seconds": round(loaded - started, 3),
        "generate_seconds": round(generated - loaded, 3),
        "save_seconds": round(time.perf_counter() - generated, 3),
        "peak_memory_bytes": peak_memory(),
    }
    _print_adapters(adapters, paths, facts, as_json=as_json)


def _print_adapters(adapters: "list[LoraAdapter]", paths: list[Path], facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        listed = [{"path": str(p), "description": a.description} for p, a in zip(paths, adapters, strict=True)]
        print_json({"adapters": listed, **facts})
        return
    for path, adapter in zip(paths, adapters, strict=True):
        print(f"{path}\t{' '.join(adapter.description.split())}")
    memory = facts["peak_memory_bytes"]
    say(
        f"{len(adapters)} adapter(s) from {facts['checkpoint']}: loading {facts['load_seconds']:.2f} s, generating "
        f"{facts['generate_seconds']:.3f} s, saving {facts['save_seconds']:.2f} s"
        + (f", peak memory {memory / 2**20:,.0f} MiB" if isinstance(memory, int) else "")
    )


def _save(adapters: "list[LoraAdapter]", output: Path, *, dtype: Any, single: bool, overwrite: bool) -> list[Path]:
    if single:
        return [adapters[0].save_pretrained(output, dtype=dtype, overwrite=overwrite)]
    from t2l.io import new_folder

    names = [f"{number:03d}-{_slug(adapter.description)}" for number, adapter in enumerate(adapters)]
    with new_folder(output, overwrite=overwrite) as temporary:
        for name, adapter in zip(names, adapters, strict=True):
            adapter.save_pretrained(temporary / name, dtype=dtype)
    return [output / name for name in names]


def _slug(text: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:40].rstrip("-") or "adapter"


def _require_writable(folder: Path, *, overwrite: bool, single: bool) -> None:
    """Raises before anything slow is done if `folder` cannot be written, or must not be.

    Args:
        folder: The folder.
        overwrite: Whether adapters that are there may be replaced.
        single: Whether the folder will be that of one adapter.
    """
    try:
        require_absent(folder, "folder", overwrite)
        if folder.exists() or folder.is_symlink():
            _require_adapters(folder, single=single)
    except T2LError:
        raise
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error.strerror or error}") from error
    try_writing(folder.absolute().parent)


def _require_adapters(folder: Path, *, single: bool) -> None:
    """`--overwrite` replaces what `generate` wrote, one adapter by one or several by several; never other files."""
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file; an output folder cannot take its place")
    if folder.is_symlink():
        raise OutputError(f"{folder} is a symbolic link; give the folder itself")
    from t2l.io import require_only
    from t2l.peft_io import CONFIG, FILES

    if (folder / CONFIG).is_file():
        require_only(folder, *FILES)
        if not single:
            raise OutputError(f"{folder} is one adapter; several would replace it. Choose another folder")
        return
    foreign = sorted(entry.name for entry in folder.iterdir() if not (entry / CONFIG).is_file())
    if foreign:
        raise OutputError(
            f"{folder} holds other things than adapters ({', '.join(foreign[:3])}); --overwrite would delete them. "
            "Choose another folder"
        )
    found = list(folder.iterdir())
    for entry in found:
        require_only(entry, *FILES)
    if single and found:
        raise OutputError(
            f"{folder} holds {len(found)} adapters, which one adapter would replace; choose another folder, or delete "
            "it first"
        )


# ------------------------------------------------------------------------------------------------------- run


@app.command()
def run(
    description: Annotated[
        str | None,
        typer.Argument(metavar="DESCRIPTION", show_default=False, help="What the task is; - is standard input."),
    ] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", metavar="TEXT", help="May be repeated; - is standard input.")
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One input per line, blank lines skipped; - is standard input."),
    ] = None,
    checkpoint: CheckpointOption = DEFAULT,
    adapter: AdapterOption = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    description_in_prompt: InPromptOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Answer inputs with the base model and with the adapter. Both get the same prompt."""
    if not inputs and input_file is None:
        raise typer.BadParameter("no input is given: give --input TEXT or --input-file FILE")
    _require_description(description, adapter)
    if [description, *(inputs or []), str(input_file)].count("-") > 1:
        raise typer.BadParameter("standard input can be only one of DESCRIPTION, --input and --input-file")
    description = None if description is None else text_or_stdin(description)
    texts = [*map(text_or_stdin, inputs or []), *(read_lines(input_file, "input") if input_file else [])]
    for text in texts:
        _check_input(text)

    from t2l.session import Session

    started = time.perf_counter()
    session = Session(
        checkpoint,
        description=description,
        adapter=adapter,
        base=base,
        device=checked_device(device),
        description_in_prompt=description_in_prompt,
    )
    load_seconds = time.perf_counter() - started
    prompts = session.prompts(texts, max_new_tokens)
    change = session.largest_change(prompts[0])
    if not as_json and sys.stdout.isatty():
        for text, prompt in zip(texts, prompts, strict=True):
            _stream(session, text, prompt, max_new_tokens)
        return
    answers = _answers(session, texts, prompts, max_new_tokens, show=not as_json)
    if as_json:
        facts = {
            "checkpoint": checkpoint,
            "adapter": None if adapter is None else str(adapter),
            "description": session.description,
            "description_in_prompt": session.prompt.description_in_prompt,
            "largest_logit_change": change,
            "load_seconds": round(load_seconds, 3),
            "peak_memory_bytes": peak_memory(),
        }
        print_json({**facts, "answers": answers})


def _answers(
    session: "Session", texts: list[str], prompts: list[str], max_new_tokens: int, *, show: bool
) -> list[dict[str, str]]:
    """Answers of the base and the adapted model, some inputs at a time; `show` prints them as they come."""
    answers: list[dict[str, str]] = []
    for start in range(0, len(texts), ANSWERS_AT_ONCE):
        batch = prompts[start : start + ANSWERS_AT_ONCE]
        base = session.answer(batch, max_new_tokens)
        with session.adapted():
            adapted = session.answer(batch, max_new_tokens)
        rows = zip(texts[start : start + ANSWERS_AT_ONCE], batch, base, adapted, strict=True)
        answers += [{"input": t, "prompt": p, "base": b, "adapted": a} for t, p, b, a in rows]
        for row in answers[start:] if show else ():
            print(f"Input    {row['input']}\nBase     {row['base']}\nAdapted  {row['adapted']}\n")
    return answers


def _require_description(description: str | None, adapter: Path | None) -> None:
    """Raises before anything slow is loaded if there is nothing that says what the task is."""
    if description is None and adapter is None:
        raise typer.BadParameter("no description is given: give DESCRIPTION, or --adapter DIR")
    if adapter is None and description is not None and os.path.isdir(description):
        raise typer.BadParameter(
            f"{description} is a folder: give --adapter {quote(description)}, or a description in words"
        )
    if adapter is not None:
        require_kind(adapter, ADAPTER)
        from t2l.peft_io import read_origin

        if description is None and not read_origin(adapter).description:
            raise typer.BadParameter(f"{adapter} names no description: give DESCRIPTION")


def _stream(session: "Session", text: str, prompt: str, max_new_tokens: int) -> None:
    print(f"Input    {text}")
    print("Base     ", end="", flush=True)
    session.stream(prompt, max_new_tokens)
    print("Adapted  ", end="", flush=True)
    with session.adapted():
        session.stream(prompt, max_new_tokens)
    print()


def _check_input(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"An input is not valid UTF-8 (position {error.start})") from error
    if not text.strip():
        raise DataError("An input is blank; give the text that the task is about")
