"""Ends of every kind at every write of every writer: what was there before stays, or what comes is there, whole."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import Program

from t2l.errors import OutputError
from t2l.io import new_folder
from t2l.locks import REPLACED, sweep

WRITERS = (
    "adapter", "library", "export", "shards", "checkpoint", "state", "text", "gguf", "merged", "cache", "store",
    "answers", "metrics",
)  # fmt: skip
KINDS = {
    "kill": (-signal.SIGKILL,),
    "interrupt": (130,),
    "interrupts": (130,),
    "full": (3,),
    "full for good": (3,),
    "read-only": (3,),
    "cut": (-signal.SIGXFSZ,),
    "no room": (3,),
}
"""How a write ends, and what the program may exit with then. `cut` is a kill in the middle of writing bytes."""
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask(base_folder: Path) -> Iterator[Ask]:
    """Has something written or read, in a process of its own; see `ending.py`."""
    command = [str(Path(__file__).parent / "ending.py"), str(base_folder)]
    with Program(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:

        def send(writer: str, folder: Path, kind: str = "read", last: int = 0, word: str = "new") -> dict[str, Any]:
            asked = {"writer": writer, "folder": str(folder), "kind": kind, "last": last, "word": word}
            print(json.dumps(asked), file=process.stdin, flush=True)
            found: dict[str, Any] = json.loads(process.stdout.readline())
            return found

        yield send


def read(ask: Ask, writer: str, folder: Path) -> str:
    """Whether the old things are there or the new ones; raises if it is neither."""
    found = ask(writer, folder)
    assert found["code"] == 0, (writer, found)
    return str(found["said"])


def leftovers(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*t2l-*"))


def moments(kind: str, total: int) -> list[int]:
    """The changes at which a write ends; of kinds that count bytes the sizes that no file may exceed."""
    if kind in ("cut", "no room"):
        return [0, 1, 9, 100, 1000, 4000, 5000, 10_000, 14_999, 30_000]
    return list(range(1, total + 1))


def end_everywhere(ask: Ask, writer: str, kind: str, place: Path, *, chosen: slice = slice(None)) -> int:
    """Ends a write in the middle at each of its moments; returns how many of them ended it."""
    old = place / "old"
    old.mkdir()
    assert ask(writer, old, "none", word="old")["code"] == 0
    assert read(ask, writer, old) == "old"
    folder, ended = fresh(old, place / "work"), 0
    total = ask(writer, folder, "none")["count"]
    assert read(ask, writer, folder) == "new"
    for last in moments(kind, total)[chosen]:
        folder = fresh(old, place / "work")
        done = ask(writer, folder, kind, last)
        where = (writer, kind, last, done)
        assert done["code"] in (*KINDS[kind], 0), where
        ended += done["code"] != 0
        at_place = all((folder / path.name).exists() for path in old.iterdir())
        if not at_place:  # ended between the old folder's leaving and the new one's coming, and it could not go back
            assert kind in ("kill", "interrupts", "full for good", "read-only"), where
            sweep(folder)  # as the next writer does
        assert read(ask, writer, folder) in (("old", "new") if at_place else ("old",)), where
        done = ask(writer, folder, "none")
        assert done["code"] == 0, (*where, done)
        assert read(ask, writer, folder) == "new", where
        # A cache that is complete is not written to, since it may be read-only: its leftovers go with the next model.
        assert [name for name in leftovers(folder) if not name.startswith("cache/models/")] == [], where
    return ended


def fresh(old: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(old, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_ends_a_write_what_was_there_or_what_comes_is_whole(
    writer: str, kind: str, ask: Ask, tmp_path: Path
) -> None:
    assert end_everywhere(ask, writer, kind, tmp_path) > 0


@pytest.mark.parametrize(
    ("writer", "kind"), [("adapter", "kill"), ("shards", "kill"), ("store", "full for good"), ("answers", "kill")]
)
def test_a_write_that_is_ended_leaves_what_was_there_or_what_comes(
    writer: str, kind: str, ask: Ask, tmp_path: Path
) -> None:
    assert end_everywhere(ask, writer, kind, tmp_path, chosen=slice(1, None, 6)) > 0


def test_what_a_killed_process_moved_away_comes_back(tmp_path: Path) -> None:
    """Killed after the old folder left and before the new one came, as the next writer finds it."""
    left = tmp_path / ".adapter.t2l-0a1b2c3d"
    (left / REPLACED).mkdir(parents=True)
    (left / REPLACED / "README.md").write_text("old")
    with pytest.raises(OutputError, match="exists already"), new_folder(tmp_path / "adapter") as folder:
        (folder / "README.md").write_text("new")
    assert (tmp_path / "adapter" / "README.md").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    with new_folder(tmp_path / "adapter", overwrite=True) as folder:
        (folder / "README.md").write_text("new")
    assert (tmp_path / "adapter" / "README.md").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_within_a_new_one_is_never_taken_for_the_one_it_replaces(tmp_path: Path) -> None:
    """An adapter that is called `replaced`, in a folder of several whose writing failed."""
    with pytest.raises(RuntimeError), new_folder(tmp_path / "several") as folder:
        (folder / "replaced").mkdir()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
