"""Ends of every kind at every write: SIGKILL, Ctrl-C and a full disk; what was there before stays, and nothing is half.

Every way in which the package changes the file system is counted by Python's own audit events, so the k-th of them can
be the last one that a process does.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from t2l.errors import OutputError
from t2l.io import new_folder
from t2l.locks import REPLACED, sweep

WRITER = """
import errno, os, signal, sys
import torch
from t2l import peft_io
from t2l.io import only_writer, write_text
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec, Target
kind, last, folder = sys.argv[1], int(sys.argv[2]), __import__("pathlib").Path(sys.argv[3])
target = Target(name="q_proj", path="model.layers.{layer}.q_proj", in_features=4, out_features=4)
spec = AdapterSpec(base_model="b", model_type="llama", num_layers=1, layers=(0,), targets=(target,), rank=1, alpha=1.0)
lora = LoraTensors((torch.full((1, 1, 4), 2.0),), (torch.full((1, 4, 1), 2.0),), spec.scaling)
count = 0
def watch(event, arguments):
    global count
    if event == "open" and isinstance(arguments[2], int) and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    changes = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.chmod", "shutil.rmtree")
    if event not in changes or (event == "open" and str(folder.parent) not in str(arguments[0])):
        return
    count += 1
    if count == last:
        if kind == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if kind == "interrupt": raise KeyboardInterrupt
        if kind == "full": raise OSError(errno.ENOSPC, "No space left on device")
sys.addaudithook(watch)
try:
    peft_io.save_adapter(folder, lora, spec, card="new", overwrite=True)
    write_text(folder.parent / "notes.txt", "new")
except KeyboardInterrupt:
    sys.exit(130)
except OSError as error:
    sys.exit(3 if type(error).__name__ == "OutputError" else 4)
print(count)
"""


def write(kind: str, last: int, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", WRITER, kind, str(last), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def state(folder: Path) -> tuple[str, ...]:
    """What a reader sees: the card of the adapter and its note, each old, new or absent."""
    files = (folder / "README.md", folder.parent / "notes.txt")
    return tuple(path.read_text() if path.exists() else "absent" for path in files)


def whole(folder: Path) -> bool:
    """Whether the adapter is one that was written to its end, or none."""
    from t2l.peft_io import read_facts, read_norms

    return not folder.exists() or bool(read_norms(folder, read_facts(folder)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "interrupt", "full"])
def test_whatever_ends_a_write_what_was_there_or_what_comes_is_whole(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    done = write("none", 0, folder)
    total = int(done.stdout)
    assert total > 8
    for last in range(1, total + 12):
        (folder / "README.md").write_text("old")
        (tmp_path / "notes.txt").write_text("old")
        done = write(kind, last, folder)
        allowed = {"kill": (-signal.SIGKILL, 0), "interrupt": (130, 0), "full": (3, 0)}[kind]
        assert done.returncode in allowed, (last, done.returncode, done.stderr)
        assert whole(folder) and state(folder)[1] in ("old", "new"), (last, state(folder))
        # A kill between the old folder's leaving and the new one's coming: the next writer puts the old one back.
        if not folder.exists():
            assert kind == "kill", last
            sweep(tmp_path)
            assert state(folder)[0] == "old" and whole(folder), last
        assert write("none", 0, folder).returncode == 0
        assert state(folder) == ("new", "new")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "notes.txt"], last


def test_a_write_that_is_ended_early_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    assert write("none", 0, folder).returncode == 0
    (folder / "README.md").write_text("old")
    assert write("kill", 3, folder).returncode == -signal.SIGKILL
    assert state(folder)[0] == "old" and whole(folder)
    assert write("none", 0, folder).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "notes.txt"]


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
