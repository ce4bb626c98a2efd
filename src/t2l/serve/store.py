"""Adapters by what is in them: on disk for good, in memory as long as there is room.

    adapters.sqlite3     what is known of each; an adapter is there when its row is
    ID.safetensors       its tensors, under PEFT's names; written before the row, and removed before it

An identifier is a hash of the weights, the base and the scale, and of the description, which may stand in prompts:
whoever asks for the same adapter twice gets the same one, and no cache that goes by the name can hold other weights.
What `add` has returned is on disk, whatever happens to the process; what `delete` has removed is nowhere.

Knows adapters and files. Knows no models and no HTTP.
"""

import hashlib
import json
import math
import os
import re
import sqlite3
import tempfile
import threading
import time
from collections import OrderedDict
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from t2l import peft_io
from t2l.errors import AdapterNotFoundError, BusyError, CheckpointError, OutputError, StoreError, T2LError
from t2l.io import parse_json, read_tensors, regular_file
from t2l.kinds import STORE, kind_of
from t2l.lora import LoraTensors
from t2l.serve.answers import log
from t2l.spec import AdapterSpec

ID = re.compile(r"[a-z0-9-]{1,64}")
"""What an identifier may look like; nothing else ever becomes part of a path."""
_OWN = re.compile(r"t2l-[0-9a-f]{16}")
"""What `_name` gives."""
DATABASE = STORE.mark
_SCHEMA = """
create table if not exists adapters (
    number integer primary key autoincrement,
    id text not null unique,
    sha256 text not null,
    description text not null,
    strength real not null,
    created integer not null,
    seconds real not null,
    bytes integer not null,
    spec text not null,
    norms text not null,
    provenance text not null
)"""
_COLUMNS = "id, sha256, description, strength, created, seconds, bytes, spec, norms, provenance"


class NewAdapter(Protocol):
    """What is stored; `t2l.LoraAdapter` is one."""

    @property
    def lora(self) -> LoraTensors:
        """A single adapter's tensors."""

    @property
    def spec(self) -> AdapterSpec:
        """Where they belong."""

    @property
    def description(self) -> str:
        """What it was written from."""

    @property
    def provenance(self) -> dict[str, str]:
        """What wrote it; see `t2l.LoraAdapter`."""


@dataclass(frozen=True)
class Entry:
    """What is known of a stored adapter without reading its tensors."""

    id: str
    sha256: str
    description: str
    strength: float
    """How much of the description's change it has; 1 is what was trained."""
    created: int
    """Seconds since 1970."""
    seconds: float
    """How long it took to write."""
    bytes: int
    """Size of its tensors in memory."""
    spec: AdapterSpec
    norms: dict[str, list[float]]
    """For each target the size of its change (Frobenius norm of ΔW) in each adapted layer."""
    provenance: dict[str, str]
    """What wrote it: checkpoint, hash of the hypernetwork and versions."""


@dataclass(frozen=True)
class StoredAdapter:
    """A stored adapter with its tensors, ready for the engine."""

    entry: Entry
    lora: LoraTensors

    @property
    def spec(self) -> AdapterSpec:
        """Where the tensors belong."""
        return self.entry.spec


def digest(lora: LoraTensors, spec: AdapterSpec, description: str) -> str:
    """The sha256 of an adapter's weights, base, scale and description."""
    found, layers = hashlib.sha256(), list(spec.layers)
    head = [spec.base_model, repr(float(spec.scaling)), layers, [t.path for t in spec.targets], description]
    found.update(json.dumps(head).encode())
    for tensor in (*lora.a, *lora.b):
        found.update(json.dumps(list(tensor.shape)).encode())
        found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()


class AdapterStore:
    """A folder of adapters, for one process at a time and all of its threads.

    Args:
        folder: Where they are; made if it is not there.
        memory: Bytes of tensors that are kept in memory; the least recently used go first.
        most: Adapters that are taken in.

    Raises:
        OutputError: if the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: Path, *, memory: int = 2**28, most: int = 10_000) -> None:
        self.folder, self._memory, self._most = folder, memory, most
        self._lock = threading.RLock()
        self._cached: OrderedDict[str, StoredAdapter] = OrderedDict()
        self.cached_bytes = 0
        self._specs: dict[str, AdapterSpec] = {}  # the newest row's: nearly always all rows have the same
        with ExitStack() as refused:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if not STORE.fits(folder) and (kind := kind_of(folder)):
                    raise OutputError(f"{folder} is {kind.name}; give the server a folder of its own (--folder)")
                regular_file(folder / DATABASE)
                self._database = sqlite3.connect(folder / DATABASE, check_same_thread=False, isolation_level=None)
                refused.callback(self._database.close)
                # Every commit reaches the disk before it returns, and the lock is kept until the end.
                for line in ("locking_mode=exclusive", "journal_mode=wal", "synchronous=full"):
                    self._database.execute(f"pragma {line}")
                self._database.execute("begin exclusive")
                self._database.execute(_SCHEMA)
                self._database.execute("commit")
                self._require_columns()
                self._tidy()
            except OutputError:
                raise
            except OSError as error:
                raise OutputError(f"{folder} cannot hold adapters: {error.strerror or error}") from error
            except sqlite3.Error as error:
                raise OutputError(
                    f"{folder} cannot hold adapters ({error}); if another server uses it, give this one its own "
                    "(t2l serve --folder)"
                ) from error
            refused.pop_all()  # nothing was: it stays open

    def _require_columns(self) -> None:
        """Raises OutputError unless the database has the columns of this version."""
        found = [row[1] for row in self._database.execute("pragma table_info(adapters)")]
        if missing := [name for name in _COLUMNS.split(", ") if name not in found]:
            raise OutputError(
                f"{self.folder} holds adapters of another version of t2l, which this one does not read ({DATABASE} has "
                f"no {', '.join(missing)}). Give another folder (t2l serve --folder), or delete this one; adapters can "
                "be written anew from their descriptions"
            )

    def close(self) -> None:
        """Lets the folder go."""
        with self._lock:
            self._database.close()

    def __len__(self) -> int:
        """How many adapters there are."""
        with self._lock:
            return int(self._execute("select count(*) from adapters")[0][0])

    def add(self, adapter: NewAdapter, *, seconds: float = 0.0, strength: float = 1.0) -> tuple[Entry, bool]:
        """Stores an adapter and returns when it is safe on disk.

        Args:
            adapter: A generated adapter.
            seconds: How long it took to write it.
            strength: What it was written with.

        Returns:
            What is stored, and whether it was not there before.

        Raises:
            StoreError: if a tensor is not finite, or the disk does not take it.
            BusyError: if there are as many adapters as may be.
        """
        lora = adapter.lora.map(lambda x: x.detach().to("cpu", torch.float32).contiguous())
        if not all(bool(torch.isfinite(x).all()) for x in (*lora.a, *lora.b)):
            raise StoreError("The adapter holds values that are not finite; it was not stored")
        sha256 = digest(adapter.lora, adapter.spec, adapter.description)
        name = _name(sha256)
        with self._lock:
            known = self._find(name)
            if known is not None:
                if known.sha256 != sha256:
                    raise StoreError(f"Two different adapters have the identifier {name}; delete the other one")
                return known, False
            if len(self) >= self._most:
                raise BusyError(f"{self._most} adapters are stored, which is the limit; delete some")
            norms = {t.name: norm.tolist() for t, norm in zip(adapter.spec.targets, lora.norms(), strict=True)}
            size = sum(x.nbytes for x in (*lora.a, *lora.b))
            now, facts = int(time.time()), dict(adapter.provenance)
            entry = Entry(name, sha256, adapter.description, strength, now, seconds, size, adapter.spec, norms, facts)
            self._write(entry, lora)
            self._keep(StoredAdapter(entry, lora))
        return entry, True

    def get(self, name: str) -> StoredAdapter:
        """An adapter with its tensors, from memory or disk.

        Raises:
            AdapterNotFoundError: if there is none of this name.
            StoreError: if its file was damaged.
        """
        with self._lock:
            cached = self._cached.get(name)
            if cached is not None:
                self._cached.move_to_end(name)
                return cached
            entry = self.entry(name)
            expected = {}
            for target in entry.spec.targets:
                for layer in entry.spec.layers:
                    expected[peft_io.tensor_name(target, layer, "A")] = (entry.spec.rank, target.in_features)
                    expected[peft_io.tensor_name(target, layer, "B")] = (target.out_features, entry.spec.rank)
            again = "delete the adapter, and write it anew from its description"
            try:
                state = read_tensors(self._path(name), expected)
            except CheckpointError as error:
                raise self._failed(f"The file of adapter {name} is damaged; {again}") from error
            stored = StoredAdapter(entry, peft_io.from_state_dict(state, entry.spec))
            if digest(stored.lora, entry.spec, entry.description) != entry.sha256:
                raise self._failed(f"Adapter {name} was changed after it was written; {again}")
            self._keep(stored)
            return stored

    def entry(self, name: str) -> Entry:
        """What is known of an adapter.

        Raises:
            AdapterNotFoundError: if there is none of this name.
        """
        with self._lock:
            found = self._find(name) if ID.fullmatch(name) else None
        if found is None:
            raise _unknown(name)
        return found

    def entries(self, *, limit: int = 100, after: str | None = None) -> list[Entry]:
        """Adapters, the newest first.

        Args:
            limit: At most so many.
            after: The name of the last one seen; those older than it follow.

        Raises:
            AdapterNotFoundError: if there is no adapter `after`.
        """
        query = f"select {_COLUMNS} from adapters where number < ? order by number desc limit ?"
        with self._lock:
            number = 2**62
            if after is not None:
                self.entry(after)
                number = self._execute("select number from adapters where id = ?", after)[0][0]
            rows = self._execute(query, number, limit)
        found = []
        for row in rows:
            try:
                found.append(self._entry(row))
            except T2LError as error:  # the others are to be had as before
                log.error("%s", error)
        return found

    def listed(self, base_model: str) -> list[tuple[str, int, str]]:
        """Name, time and description of a base's adapters, the newest first; faster than all that is known of each."""
        base = "case when json_valid(spec) then json_extract(spec, '$.base_model') end"
        query = f"select id, created, description from adapters where {base} = ? order by number desc"
        with self._lock:
            rows = self._execute(query, base_model)
        kinds = (str, int, str)  # `entries` reports the rows that another program has damaged
        return [row for row in rows if all(map(isinstance, row, kinds))]

    def delete(self, name: str) -> None:
        """Removes an adapter from disk and memory. Answers under way with it end as they began.

        Raises:
            AdapterNotFoundError: if there is none of this name.
        """
        with self._lock:
            if not ID.fullmatch(name) or not self._execute("select 1 from adapters where id = ?", name):
                raise _unknown(name)
            # The file first: on a full disk the database has no room even to forget a row. Of a row without a file, and
            # of a file without a row, nothing is left after the next start.
            with suppress(OSError):
                self._path(name).unlink(missing_ok=True)
            self._execute("delete from adapters where id = ?", name)
            cached = self._cached.pop(name, None)
            if cached is not None:
                self.cached_bytes -= cached.entry.bytes

    # -------------------------------------------------------------------------------------------------- inside

    def _path(self, name: str) -> Path:
        assert ID.fullmatch(name), "only a checked identifier may name a file"
        return self.folder / f"{name}.safetensors"

    def _find(self, name: str) -> Entry | None:
        rows = self._execute(f"select {_COLUMNS} from adapters where id = ?", name)
        return self._entry(rows[0]) if rows else None

    def _execute(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a statement finds.

        Raises:
            StoreError: if the database is damaged, or the disk does not take or give it.
        """
        try:
            return self._database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._failed(
                f"{DATABASE} cannot be read or written ({error}); if it is damaged, begin with an empty folder: "
                "adapters can be written anew from their descriptions"
            ) from error

    def _failed(self, message: str) -> StoreError:
        """An error that clients may read; the log, which shows notes too, says in which folder."""
        error = StoreError(message)
        error.add_note(f"in the folder {self.folder}")
        return error

    def _entry(self, row: tuple[Any, ...]) -> Entry:
        """A row of the database, whose content is checked: another program may have changed it.

        Raises:
            StoreError: if it is none that this class wrote.
        """
        fields = dict(zip(_COLUMNS.split(", "), row, strict=True))
        name = str(fields["id"])[:64]
        try:
            return self._checked(row, fields, name, f"{DATABASE}: the row of adapter {name}")
        except CheckpointError as error:
            raise self._failed(f"{error}; delete the adapter") from error

    def _checked(self, row: tuple[Any, ...], fields: dict[str, Any], name: str, where: str) -> Entry:
        """As `_entry`; raises CheckpointError, which says what is wrong and leaves out the way out."""
        kinds = (str, str, str, float, int, float, int, str, str, str)
        if not all(isinstance(value, kind) for value, kind in zip(row, kinds, strict=True)):
            raise CheckpointError(f"{where} is damaged: it holds values of other types")
        spec = self._specs.get(fields["spec"])
        if spec is None:
            spec = AdapterSpec.from_json(fields["spec"], where=where)
            self._specs = {fields["spec"]: spec}
        norms, provenance = (parse_json(fields[key], where) for key in ("norms", "provenance"))
        shapes = {target.name: len(spec.layers) for target in spec.targets}
        if not isinstance(norms, dict) or {key: _count(value) for key, value in norms.items()} != shapes:
            raise CheckpointError(f"{where} is damaged: its norms are not those of its targets")
        if not isinstance(provenance, dict) or not all(isinstance(value, str) for value in provenance.values()):
            raise CheckpointError(f"{where} is damaged: its provenance is no mapping of texts")
        if name != _name(fields["sha256"]) or fields["bytes"] != 4 * spec.num_parameters:
            raise CheckpointError(f"{where} is damaged: its facts do not go together")
        if not math.isfinite(fields["strength"]) or not math.isfinite(fields["seconds"]):
            raise CheckpointError(f"{where} is damaged: it holds numbers that are none")
        return Entry(**fields | {"spec": spec, "norms": norms, "provenance": provenance})

    def _write(self, entry: Entry, lora: LoraTensors) -> None:
        from safetensors.torch import save

        data = save(peft_io.to_state_dict(lora, entry.spec), metadata={"format": "pt"})
        values = (
            entry.id, entry.sha256, entry.description, entry.strength, entry.created, entry.seconds, entry.bytes,
            entry.spec.to_json(), json.dumps(entry.norms), json.dumps(entry.provenance),
        )  # fmt: skip
        try:
            _write_durably(self._path(entry.id), data)
            self._execute(f"insert into adapters ({_COLUMNS}) values ({', '.join('?' * len(values))})", *values)
        except OSError as error:  # a StoreError is one
            with suppress(OSError):
                self._path(entry.id).unlink(missing_ok=True)
            raise self._failed(f"The adapter could not be stored: {error.strerror or error}") from error

    def _keep(self, stored: StoredAdapter) -> None:
        """Puts an adapter into memory, at others' expense if need be; one larger than the budget is not kept."""
        self._cached[stored.entry.id] = stored
        self.cached_bytes += stored.entry.bytes
        while self.cached_bytes > self._memory:
            _, oldest = self._cached.popitem(last=False)
            self.cached_bytes -= oldest.entry.bytes

    def _tidy(self) -> None:
        """Removes what a killed process left half done: files without a row, and rows without a file."""
        known = {str(name) for (name,) in self._execute("select id from adapters")}
        # No other file, whoever put it here, is ever removed.
        files = {path.stem for path in self.folder.glob("*.safetensors") if _OWN.fullmatch(path.stem)}
        for path in (*self.folder.glob(".t2l-new-*"), *(self.folder / f"{name}.safetensors" for name in files - known)):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for name in known - files:
            log.error("the file of adapter %s is gone; it is forgotten", name)
            self._execute("delete from adapters where id = ?", name)


def _name(sha256: str) -> str:
    """The identifier of an adapter of this hash."""
    return f"t2l-{sha256[:16]}"


def _count(norms: Any) -> int | None:
    """How many numbers a list holds; None if it is no list of numbers."""
    sound = isinstance(norms, list) and all(isinstance(x, int | float) for x in norms)
    return len(norms) if sound else None


def _unknown(name: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(f"There is no adapter {name[:64]!r}; GET /v1/adapters lists those there are")


def _write_durably(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash it is whole or not there."""
    descriptor, temporary = tempfile.mkstemp(prefix=".t2l-new-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    # The rename itself must reach the disk; Windows has no way to say so, and no need.
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
