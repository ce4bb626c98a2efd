"""Every way in which a file is damaged, drawn from a seed: cut off, bits turned, wrong values, types and kinds.

Knows bytes, JSON and safetensors' layout. Knows nothing of the library but that it refuses by `T2LError`.
"""

import ctypes
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from t2l.errors import T2LError

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, -0.0, 10**12, -(10**18), 10**400, 1e308, float("nan"), float("inf"), "", " ", "x",
    "\0", "../../x", "/etc/passwd", "{layer}", "\ud800", "é" * 50_000, [], [None], [[]], {}, {"x": {}}, [1, "a", None],
)  # fmt: skip
"""Values that stand where another was meant."""
DEEP = "[" * 100_000
FACTS = (b"", b"\0", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"\x80\x04K\x01.", b"PK\x03\x04", b"\0" * 4096)
"""Whole contents of a file that hold nothing of what is asked for."""

Damage = tuple[str, Callable[[Path], None]]


def put(content: bytes) -> Callable[[Path], None]:
    """Writes other bytes in a file's place."""

    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def damages(content: bytes, draw: random.Random, *, count: int, text: bool, inside: bool) -> Iterator[Damage]:
    """What is done to one file, by name.

    Args:
        content: The sound file.
        draw: Where places and values are drawn from.
        count: How many are drawn of each kind that has endless members; kinds with few members come whole.
        text: Whether the file is JSON or YAML, lines of it, or any other text.
        inside: Whether it is one of a folder's files; a file that a user names may be a pipe, and is waited for.
    """
    for fact in draw.sample(FACTS, min(len(FACTS), 5 * count)):
        yield f"the content {fact[:8]!r}", put(fact)
    yield "deep nesting", put(DEEP.encode())
    yield "cut in half", put(content[: len(content) // 2])
    yield "twice", put(content + content)
    yield from _other_kinds(inside)
    ends = _text_ends(content) if text else _binary_ends(content)
    for end in sorted(draw.sample(sorted(ends), min(count, len(ends)))):
        yield f"cut at {end}", put(content[:end])
    for _ in range(count):
        turned = bytearray(content)
        # Half of the places are where a file begins, which is where its structure is.
        place = draw.randrange(min(len(content), 600) if draw.random() < 0.5 else len(content))
        turned[place] ^= 1 << draw.randrange(8)
        yield f"bit turned at {place}", put(bytes(turned))
    yield from _json_damages(content, draw, count) if text else _tensor_damages(content, draw, count)


def _other_kinds(inside: bool) -> Iterator[Damage]:
    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def link(to: str) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            path.unlink()
            path.symlink_to(to)

        return make

    def pipe(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    yield "absent", Path.unlink
    yield "not to be read", lambda path: path.chmod(0)
    yield "a folder", folder
    yield "a link to nothing", link("nowhere")
    yield "a link to itself", lambda path: link(path.name)(path)
    if inside:
        yield "a pipe that nobody writes to", pipe
    yield "zeros without end", link("/dev/zero")


def _text_ends(content: bytes) -> set[int]:
    return {n + after for n, byte in enumerate(content) if byte in b'{}[],:"\n' for after in (0, 1)}


def _binary_ends(content: bytes) -> set[int]:
    header = 8 + struct.unpack("<Q", content[:8])[0] if len(content) > 8 else 0
    ends = {0, 1, 7, 8, 9, len(content) - 1, len(content) // 3}
    if 8 < header < len(content):
        offsets = [v["data_offsets"] for k, v in json.loads(content[8:header]).items() if k != "__metadata__"]
        ends |= {header - 1, header, header + 1, *(header + x for pair in offsets for x in pair)}
    return {end for end in ends if end < len(content)}


def _json_damages(content: bytes, draw: random.Random, count: int) -> Iterator[Damage]:
    """One value replaced, one key missing or twice; in one line, where the file has a document a line."""
    lines = content.decode().splitlines()
    whole = None
    with suppress(ValueError):
        whole = json.loads(content)
    if whole is None and not all(_is_json(line) for line in lines if line.strip()):
        return
    for _ in range(3 * count):
        number = draw.randrange(len(lines)) if whole is None else 0
        document = json.loads(lines[number]) if whole is None else json.loads(content)
        places = list(_places(document))
        if not places:
            return
        path = draw.choice(places)
        odd = draw.choice((*ODD, "missing", "extra"))
        changed = json.dumps(_changed(document, path, odd))
        if whole is None:
            changed = "\n".join([*lines[:number], changed, *lines[number + 1 :], ""])
        yield f"{'.'.join(map(str, path))} = {odd!r:.30}", put(changed.encode())


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _changed(document: Any, path: tuple[Any, ...], odd: Any) -> Any:
    node = document
    for key in path[:-1]:
        node = node[key]
    if odd == "missing":
        del node[path[-1]]
    elif odd == "extra" and isinstance(node, dict):
        node["unknown"] = 1
    else:
        node[path[-1]] = odd
    return document


def _tensor_damages(content: bytes, draw: random.Random, count: int) -> Iterator[Damage]:
    """Headers that promise more than there is, or other things; values that are no numbers."""
    for length in (0, 1, len(content), 2**31, 2**40, 2**63, 2**64 - 1):
        yield f"a header of {length} bytes", put(struct.pack("<Q", length) + content[8:])
    size = struct.unpack("<Q", content[:8])[0]
    if size > len(content):  # no safetensors file
        yield "a pickle", put(pickle.dumps({"a": 1}))
        return
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    for value in (b"\xff\xff\xff\xff", b"\0\0\x80\x7f", b"\0\0\x80\xff"):  # NaN and both infinities in float32
        place = draw.randrange(len(body) // 4) * 4
        yield f"{value!r} at {place}", put(content[: 8 + size] + body[:place] + value + body[place + 4 :])
    names = [name for name in header if name != "__metadata__"]
    changes: list[tuple[str, Any]] = [("dtype", x) for x in ("I64", "BOOL", "F8_E4M3", "F16", "F64", "X", 1, None)]
    changes += [("shape", x) for x in ([], [0], [-1], [2**40, 2**40], [1] * 70, "x", [1.5], None)]
    changes += [("data_offsets", x) for x in ([0, 0], [0, 2**60], [2**60, 0], [-1, 4], "x", [1])]
    for key, value in draw.sample(changes, min(len(changes), 2 * count)):
        name = draw.choice(names)
        plain = json.dumps(header | {name: header[name] | {key: value}}).encode()
        yield f"{name}: {key} = {value!r:.30}", put(struct.pack("<Q", len(plain)) + plain + body)
    many = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(20_000)}
    plain = json.dumps(many).encode()
    yield "20,000 empty tensors", put(struct.pack("<Q", len(plain)) + plain)
    twice = json.dumps(header)[:-1] + ", " + json.dumps({names[0]: header[names[0]]})[1:]
    yield "a name twice", put(struct.pack("<Q", len(twice)) + twice.encode() + body)


def documented(reader: str) -> tuple[int, int, int]:
    """What docs/reliability.md says of a reader: damages in `make test`, in `make test-full`, how many are refused."""
    page = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^\| {re.escape(reader)} \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    fast, full, refused = (int(number.replace(",", "")) for number in found)
    return fast, full, refused


class TooLong(BaseException):
    """No end in time; not an Exception, so that nothing takes it for a damaged file."""


@contextmanager
def bounded(seconds: float = 10, memory: int = 3 << 30) -> Iterator[None]:
    """A block that must end in time, with only so much more memory than it begins with."""

    def late(*_: object) -> None:
        raise TooLong(f"no end within {seconds} s")

    # To this very thread: a signal that another one gets would not end a call that waits.
    watch = threading.Timer(seconds, signal.pthread_kill, (threading.get_ident(), signal.SIGALRM))
    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, limits[1]))
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@contextmanager
def held_to_permissions() -> Iterator[None]:
    """Root may read everything; a thread that lays its capabilities 1 and 2 down may not."""
    libc, header, rights = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, rights)
    before = rights[0]
    rights[0] &= ~0b110
    libc.capset(header, rights)
    try:
        yield
    finally:
        rights[0] = before
        libc.capset(header, rights)


def outcome(read: Callable[[], Any]) -> tuple[str, Any]:
    """(`value`, what was read), (`refused`, the message), or (`raw`, what is no error of ours)."""
    try:
        with bounded(), held_to_permissions():
            return "value", read()
    except T2LError as error:
        message = str(error)
        return ("refused", message) if 0 < len(message) < 5000 else ("raw", f"a message of {len(message)} characters")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics of Rust are no Exceptions
        return "raw", f"{type(error).__name__}: {error}"[:300]


def with_damage(sound: Path, copy: Path, name: str, damage: Callable[[Path], None]) -> None:
    """Makes `copy` a copy of the sound file or folder in which one file is damaged."""
    if copy.is_dir() and not copy.is_symlink():
        shutil.rmtree(copy)
    else:
        copy.unlink(missing_ok=True)
    if sound.is_dir():
        shutil.copytree(sound, copy)
        damage(copy / name)
    else:
        shutil.copyfile(sound, copy)
        damage(copy)
