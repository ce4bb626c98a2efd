"""Files appear whole or not at all, devices are never replaced, and foreign JSON and YAML are read within bounds."""

import json
import multiprocessing
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from t2l import io
from t2l.config import load_yaml, override, parse_yaml
from t2l.errors import CheckpointError, ConfigError, DataError, OutputError
from t2l.names import require_folder_names


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond a size: it fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def fill(folder: Path, size: int = 10) -> None:
    save_file({"x": torch.zeros(size)}, folder / "x.safetensors")


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), io.new_file(path, overwrite=True) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    io.write_text(path, "new\r\nline\u2028")
    assert path.read_bytes() == "new\r\nline\u2028".encode()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match="another file or pass overwrite=True"), io.new_file(path, overwrite=False):
        pass
    with pytest.raises(OutputError, match=r"another file$"), io.new_file(tmp_path / "other") as temporary:
        temporary.write_text("mine")
        (tmp_path / "other").write_text("theirs")
    assert (tmp_path / "other").read_text() == "theirs"


def test_new_files_have_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        io.write_text(tmp_path / "file", "text")
        with io.new_folder(tmp_path / "folder") as temporary:
            (temporary / "inner").mkdir()
            fill(temporary / "inner")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"file": 0o640, "folder": 0o750, "inner": 0o750, "x.safetensors": 0o640}


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    io.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("what", ["socket", "pipe", "folder", "link to a pipe"])
def test_what_is_no_regular_file_is_never_replaced(what: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if what == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(place))
    elif what == "folder":
        place.mkdir()
    else:
        os.mkfifo(pipe := tmp_path / "pipe" if what.startswith("link") else place)
        if what.startswith("link"):
            place.symlink_to(pipe)
    before = place.lstat()
    with pytest.raises(OutputError, match="not a regular file"):
        io.write_text(place, "text")
    assert (place.lstat().st_ino, place.lstat().st_mode) == (before.st_ino, before.st_mode)


def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path: Path) -> None:
    """Also where safetensors raises its own error."""
    with files_up_to(1000):
        with pytest.raises(OutputError, match="folder"), io.new_folder(tmp_path / "folder") as temporary:
            fill(temporary, 10_000)
        with pytest.raises(OutputError, match="file"), io.new_file(tmp_path / "file") as temporary:
            temporary.write_bytes(bytes(10_000))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "inner", tmp_path / "file" / "deep" / "inner"):
        with pytest.raises(OutputError, match="file"), io.new_folder(path):
            pass
        with pytest.raises(OutputError, match="file"):
            io.write_text(path, "")


def test_an_appeared_folder_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    """Between the check at the start and the rename at the end another process may have finished."""
    path = tmp_path / "out"
    with pytest.raises(OutputError, match="another process"), io.new_folder(path) as temporary:
        fill(temporary)
        path.mkdir()
        (path / "theirs").write_text("")
    assert [entry.name for entry in path.iterdir()] == ["theirs"]
    with io.new_folder(path, overwrite=True) as temporary:
        fill(temporary)
    assert [entry.name for entry in path.iterdir()] == ["x.safetensors"]
    assert list(tmp_path.iterdir()) == [path]


def write_folder(path: Path, start: float, overwrite: bool, results: Any) -> None:
    try:
        time.sleep(max(0, start - time.time()))
        with io.new_folder(path, overwrite=overwrite) as temporary:
            (temporary / "file").write_bytes(bytes(100_000))
            (temporary / "who").write_text(str(os.getpid()))
        results.put((os.getpid(), None))
    except OutputError as error:
        results.put((os.getpid(), str(error)))


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_processes_that_write_at_once_one_wins(overwrite: bool, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for turn in range(5):
        path, results = tmp_path / f"out{turn}", context.Queue()
        args = (path, time.time() + 0.05, overwrite, results)
        workers = [context.Process(target=write_folder, args=args) for _ in range(3)]
        for worker in workers:
            worker.start()
        done = dict(results.get(timeout=30) for _ in workers)
        for worker in workers:
            worker.join()
        winners = [process for process, error in done.items() if error is None]
        assert len(winners) == (3 if overwrite else 1), done
        assert int((path / "who").read_text()) in winners
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"out{turn}" for turn in range(5)]


GROW = """
import sys, time
from pathlib import Path
from t2l import io
with io.only_writer(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("place", ["file", "folder", "nothing yet"])
def test_what_grows_in_place_has_one_writer(place: str, tmp_path: Path) -> None:
    """And one that was killed does not count."""
    path = tmp_path / "out"
    if place != "nothing yet":
        path.mkdir() if place == "folder" else path.touch()
    with subprocess.Popen([sys.executable, "-c", GROW, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with pytest.raises(OutputError, match="out: another process is writing to it"), io.only_writer(path):
            pass
        other.kill()
    with io.only_writer(path):
        assert (tmp_path / ".out.t2l-writing_").exists()
    assert not (tmp_path / ".out.t2l-writing_").exists()
    with pytest.raises(OutputError, match="not a regular file"), io.only_writer(Path("/dev/null")):
        pass


HANG = """
import sys, time
from pathlib import Path
from t2l import io
with getattr(io, sys.argv[1])(Path(sys.argv[2])) as temporary:
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("writer", ["new_file", "new_folder"])
def test_what_a_killed_process_left_is_swept_and_a_living_ones_is_not(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    command = [sys.executable, "-c", HANG, writer, str(path)]
    (tmp_path / ".out.t2l-notes").write_text("not ours: no eight characters of a temporary name")
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as living,
    ):
        assert killed.stdout is not None and living.stdout is not None
        assert killed.stdout.readline() == living.stdout.readline() == "ready\n"
        killed.kill()
        killed.wait()
        assert len(list(tmp_path.glob(".out.t2l-????????"))) == 2
        with getattr(io, writer)(path) as temporary:
            fill(temporary) if writer == "new_folder" else temporary.write_text("whole")
            assert len(list(tmp_path.glob(".out.t2l-????????"))) == 2  # the living one's and this one
        living.kill()
    assert (tmp_path / ".out.t2l-notes").exists() and path.exists()


# --- reading --------------------------------------------------------------------------------------------------------

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@given(plain, st.booleans())
def test_json_within_bounds_is_read_as_it_is(data: Any, ascii_only: bool) -> None:
    text = json.dumps(data, ensure_ascii=ascii_only)
    assert io.parse_json(text, "here") == io.parse_json(text.encode(), "here") == data


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "nested"),
        ("[" * 100 + "]" * 100, "nested deeper than 64"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64"),
        ("9" * 5000, "5000 digits"),
        ("[1, -1e999]", "too large"),
        ('{"a": NaN}', "NaN"),
        ("-Infinity", "Infinity"),
        ('"\\ud800"', "surrogate"),
        (b'"\xed\xa0\x80"', "utf-8"),
        (b"\xff\xfe{", "utf-8"),
        ("{", "Expecting"),
        ("", "Expecting"),
    ],
)
def test_json_out_of_bounds_is_the_callers_error(text: str | bytes, match: str) -> None:
    for kind in (CheckpointError, DataError):
        with pytest.raises(kind, match=f"here .*{match}") as caught:
            io.parse_json(text, "here", kind)
        assert len(str(caught.value)) < 500


@given(st.binary(max_size=50) | st.text(alphabet='[]{}":,\\u0189deE+-. ntruefalsINy', max_size=50))
def test_no_json_is_a_raw_error(text: bytes | str) -> None:
    with suppress(DataError):
        io.parse_json(text, "here", DataError)


def test_json_files_are_objects(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(DataError, match=r"file\.json is missing"):
        io.read_json(path, DataError)
    path.write_text("[1]")
    with pytest.raises(DataError, match="must hold a JSON object, got list"):
        io.read_json(path, DataError)
    with pytest.raises(CheckpointError, match="cannot be read: it is a folder, and a file is wanted"):
        io.read_json(tmp_path)


BOMB = "a: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"b{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8)
)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("2001-99-99", "month"),
        ("2001-01-01 99:99:99 +99:99", "YAML"),
        ("!!int x", "invalid literal"),
        ("!!int ''", "YAML"),
        ("!!float x", "could not convert"),
        ("!!bool x", "YAML"),
        ("!!timestamp x", "YAML"),
        ("!!python/object:os.system x", "could not determine a constructor"),
        ("9" * 5000, "too large"),
        ("[" * 5000, "nested deeper than 32"),
        ("{a: " * 3000, "nested deeper than 32"),
        ("- " * 3000, "nested deeper than 32"),
        ("? [a]\n: b", "unhashable"),
        (BOMB, "aliases are not read"),
        ("a: &x {<<: *x}", "aliases are not read"),
        ("x" * (2 << 20), "at most 1,048,576"),
    ],
)
def test_yaml_out_of_bounds_is_a_short_config_error(text: str, match: str, tmp_path: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=f"here .*(?s:.*){match}") as caught:
        parse_yaml(text, "here")
    assert len(str(caught.value)) < 600
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        load_yaml(path)
    with pytest.raises(ConfigError, match=r"lora\.r=") as caught:
        override({}, [f"lora.r={text}"])
    assert len(str(caught.value)) < 600
    assert time.perf_counter() - start < 5


@given(st.text(alphabet="ab0189-: \n[]{}!&*?|>'\"%@`#,.eE_tTzZ~<", max_size=60))
def test_no_yaml_is_a_raw_error(text: str) -> None:
    with suppress(ConfigError):
        parse_yaml(text, "here")


def test_yaml_values_are_read_as_before() -> None:
    text = "a: 1\nb: [1.5, 1.0e-3, true, null, 'x']\nc: {d: 0x10}\ne: 2001-01-01\n"
    data = parse_yaml(text, "here")
    assert (data["a"], data["b"], data["c"]) == (1, [1.5, 1e-3, True, None, "x"], {"d": 16})
    assert override({"s": {"t": 1}}, ["s.t=[1, 2]", "new.x=~"]) == {"s": {"t": [1, 2]}, "new": {"x": None}}


@given(st.text(max_size=300))
def test_a_name_that_is_let_through_names_a_folder_inside_its_parent(name: str) -> None:
    try:
        require_folder_names([name], "a task", DataError)
    except DataError as error:
        assert "cannot name a task" in str(error) and len(str(error)) < 400
        return
    assert (Path("/parent") / name).parent == Path("/parent") and os.path.normpath(name) == name
    assert len(os.fsencode(name)) <= 200
