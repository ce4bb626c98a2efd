"""Locks of folders, by which what a killed process left is told from what a living one writes. Knows folders only."""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

REPLACED = ".replaced"
"""Where in a temporary folder the one stands that a new folder takes the place of; no name that anything else has."""


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes what processes that were killed left in a folder. Whatever a living one writes is locked by it.

    A folder that was moved away to be replaced, and whose successor never came, goes back to its place.

    Args:
        folder: Where to look; what is in its folders stays.
        name: Of the file or folder that was to be written; None means any.
    """
    known = re.compile(rf"\.({'.+' if name is None else re.escape(name)})\.t2l-[a-z0-9_]{{8}}")
    for entry in os.scandir(folder):
        found = known.fullmatch(entry.name)
        if not found or not entry.is_dir(follow_symlinks=False):
            continue
        lock = lock_folder(Path(entry.path), wait=False)
        if lock is None:
            continue
        try:
            remove(Path(entry.path), Path(folder, found[1]))
        finally:
            unlock(lock)


def remove(temporary: Path, place: Path) -> None:
    """Removes a temporary folder. One that was moved there from `place` goes back, if nothing has come instead of it.

    Where it cannot go back, on a disk that has become full or read-only, it stays for the next writer's `sweep`.
    """
    replaced = temporary / REPLACED
    if replaced.is_dir() and not place.exists():
        with suppress(OSError):  # another process has put its own there meanwhile
            os.rename(replaced, place)
    if place.exists() or not replaced.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)


def lock_folder(path: Path, *, wait: bool) -> int | None:
    """A descriptor that holds a lock; None if another process has it or nothing can be locked here."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing is locked there, and nothing is swept
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def unlock(descriptor: int | None) -> None:
    """Gives a lock back."""
    if descriptor is not None:
        os.close(descriptor)
