"""What a folder holds, told by the names of its files, for messages where another kind is wanted. Reads no file."""

import shlex
from difflib import get_close_matches
from pathlib import Path

from t2l.errors import CheckpointError


class Kind:
    """A kind of folder that commands write or take.

    Args:
        name: What it is.
        use: What to do with one; `{}` is the folder.
        marks: Files that such a folder has, one of them at least, as `Path.glob` takes them.
    """

    def __init__(self, name: str, use: str, *marks: str) -> None:
        self.name, self.use, self.marks, self.mark = name, use, marks, marks[0]

    def fits(self, folder: Path) -> bool:
        """Whether a folder is of this kind."""
        return any(path.is_file() for mark in self.marks for path in folder.glob(mark))


PUBLISHED = Kind("a published Text-to-LoRA checkpoint", "`t2l import sakana {}` makes it readable here", "hypermod.pt")
ADAPTER = Kind("a LoRA adapter", "`t2l run --adapter {}`, `t2l merge` and `t2l export` take it", "adapter_config.json")
SHARDS = Kind("a generated library", "`t2l library export {} --name ID` gets adapters out of it", "library.json")
LIBRARY = Kind("a library of adapters", "`t2l library export {}` gets its adapters out", "adapters.safetensors")
CHECKPOINT = Kind("a checkpoint", "`t2l generate --checkpoint {}` writes adapters by it", "hypernet.safetensors")
MODEL = Kind("a model", "commands with --base take it as `--base {}`", "model*.safetensors", "pytorch_model*.bin")
STORE = Kind("a server's folder of adapters", "`t2l serve --folder {}` takes it", "adapters.sqlite3")
RUN = Kind("the folder of a training", "its checkpoint is {}/checkpoint", "checkpoint/hypernet.safetensors")
TASK_RUN = Kind("the folder of a training", "its library is {}/library", "library/adapters.safetensors")
ADAPTERS = Kind("a folder of adapters", "give one of them, such as {}", f"*/{ADAPTER.mark}")
KINDS = (PUBLISHED, ADAPTER, SHARDS, LIBRARY, CHECKPOINT, MODEL, STORE, RUN, TASK_RUN, ADAPTERS)


def kind_of(folder: Path) -> Kind | None:
    """What a folder is; None if it is none of these kinds."""
    return next((kind for kind in KINDS if kind.fits(folder)), None)


def absent(folder: Path) -> str:
    """What to say of a folder that is not there, with one of nearly that name if it stands beside."""
    names = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    near = get_close_matches(folder.name, names, n=1)
    return f"There is no folder {folder}" + (f"; did you mean {folder.parent / near[0]}?" if near else "")


def require_kind(folder: Path, *wanted: Kind) -> None:
    """Checks that a folder is of one of the kinds that are wanted.

    Raises:
        CheckpointError: saying what it is, what is wanted, and what takes a folder of its kind.
    """
    found, use, what = kind_of(folder), folder, ""
    # One folder may be of several kinds; only that of a published checkpoint looks like an adapter and is none.
    if found in wanted or (found is not PUBLISHED and any(kind.fits(folder) for kind in wanted)):
        return
    kinds = " or ".join(f"{kind.name} ({kind.mark})" for kind in wanted)
    if not folder.is_dir():
        unpack = "; unpack it, and" if folder.suffix == ".zip" else ";"
        there = f"{folder} is a file{unpack} give a folder that holds {kinds}"
        raise CheckpointError(there if folder.exists() else absent(folder))
    if found is None:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:3]) or "nothing"
        raise CheckpointError(f"{folder} is not {kinds}; it holds {held}")
    if found is ADAPTERS:
        inner = sorted(path.parent for path in folder.glob(found.mark))
        more = f" and {len(inner) - 3} more" if len(inner) > 3 else ""
        what, use = f" ({', '.join(path.name for path in inner[:3])}{more})", inner[0]
    raise CheckpointError(
        f"{folder} is {found.name}{what}, and {kinds} is wanted; {found.use.format(shlex.quote(str(use)))}"
    )
