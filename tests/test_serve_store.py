"""Adapters on disk: found by what is in them, there after a crash once acknowledged, and gone once deleted."""

import signal
import sqlite3
import subprocess
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import programs
import pytest
import torch
from conftest import make_base, make_config
from serve_helpers import SHAPES, make_adapter, memory

from t2l.errors import AdapterNotFoundError, BusyError, OutputError, StoreError
from t2l.lora import LoraTensors
from t2l.serve.store import DATABASE, AdapterStore
from t2l.spec import AdapterSpec


@dataclass(frozen=True)
class Described:
    """What a generated adapter is to the store."""

    lora: LoraTensors
    spec: AdapterSpec
    description: str = "Add the two numbers."
    provenance: dict[str, str] = field(default_factory=lambda: {"checkpoint": "tiny"})


@pytest.fixture(scope="module")
def adapters() -> list[Described]:
    model = make_base(make_config())
    made = [make_adapter(model, seed, **SHAPES[seed % len(SHAPES)]) for seed in range(6)]
    return [Described(adapter.lora, adapter.spec, f"Task {seed} – “ß”") for seed, adapter in enumerate(made)]


def same(one: LoraTensors, other: LoraTensors) -> bool:
    pairs = zip((*one.a, *one.b), (*other.a, *other.b), strict=True)
    return one.scaling == other.scaling and all(torch.equal(x, y) for x, y in pairs)


def test_what_is_added_is_there_and_the_same_after_a_restart(tmp_path: Path, adapters: list[Described]) -> None:
    store = AdapterStore(tmp_path)
    entries = [store.add(adapter, seconds=0.5)[0] for adapter in adapters]
    assert len({entry.id for entry in entries}) == len(store) == 6
    store.close()
    store = AdapterStore(tmp_path)
    assert store.entries() == entries[::-1]
    assert store.listed("another/base") == []
    assert store.listed(entries[0].spec.base_model) == [
        (entry.id, entry.created, entry.description) for entry in entries[::-1]
    ]
    assert store.entries(limit=2, after=entries[3].id) == [entries[2], entries[1]]
    for entry, adapter in zip(entries, adapters, strict=True):
        stored = store.get(entry.id)
        assert same(stored.lora, adapter.lora)
        assert (stored.entry.description, stored.spec) == (adapter.description, adapter.spec)
        assert stored.entry.norms.keys() == {target.name for target in adapter.spec.targets}
    store.close()


def test_the_identifier_is_a_hash_of_all_that_matters(tmp_path: Path, adapters: list[Described]) -> None:
    store, adapter = AdapterStore(tmp_path), adapters[0]
    (entry, new), (again, old) = store.add(adapter), store.add(replace(adapter))
    assert (new, old) == (True, False) and again == entry
    assert entry.id == f"t2l-{entry.sha256[:16]}"
    nudged = adapter.lora.map(lambda x: x.clone())
    nudged.b[1][2, 0, 0] = torch.nextafter(nudged.b[1][2, 0, 0], torch.tensor(9.0))
    others = [
        replace(adapter, lora=nudged),
        replace(adapter, spec=replace(adapter.spec, base_model="another/base")),
        replace(adapter, spec=replace(adapter.spec, alpha=9.0)),
        replace(adapter, description="Another text."),
    ]
    assert len({store.add(other)[0].id for other in others} | {entry.id}) == 5
    store.close()


def test_delete_means_gone(tmp_path: Path, adapters: list[Described]) -> None:
    store = AdapterStore(tmp_path)
    entry, _ = store.add(adapters[0])
    kept, _ = store.add(adapters[1])
    store.delete(entry.id)
    for attempt in (store.get, store.entry, store.delete):
        with pytest.raises(AdapterNotFoundError, match=entry.id):
            attempt(entry.id)
    assert store.cached_bytes == kept.bytes
    assert sorted(path.suffix for path in tmp_path.glob("*.safetensors")) == [".safetensors"]
    store.close()


def test_on_a_full_disk_adapters_can_be_deleted(
    tmp_path: Path, adapters: list[Described], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(tmp_path)
    name = store.add(adapters[0])[0].id
    execute = store._execute

    def full(query: str, *values: str) -> list[tuple[object, ...]]:
        if query.startswith("delete") and list(tmp_path.glob("*.safetensors")):
            raise StoreError("database or disk is full")
        return execute(query, *values)

    monkeypatch.setattr(store, "_execute", full)
    store.delete(name)
    assert len(store) == store.cached_bytes == 0
    store.close()


def test_memory_keeps_the_most_recently_used(tmp_path: Path, adapters: list[Described]) -> None:
    first = AdapterStore(tmp_path)
    entries = [first.add(adapter)[0] for adapter in adapters]
    first.close()
    store = AdapterStore(tmp_path, memory=entries[0].bytes + entries[1].bytes + entries[2].bytes)
    for n in (0, 1, 0, 2):
        store.get(entries[n].id)
    before = store.get(entries[0].id)
    store.get(entries[3].id)
    assert store.cached_bytes <= store._memory
    assert entries[1].id not in store._cached
    assert same(store.get(entries[1].id).lora, adapters[1].lora), "what left memory is read again"
    assert same(before.lora, adapters[0].lora)
    store.close()


@pytest.mark.parametrize(
    "name",
    ["..", "../x", "/etc/passwd", "%2e%2e", "a/b", "a\x00b", "A", "a" * 65, "", "t2l-é", "t2l-0\n", "\ud800"],
)
def test_a_name_is_never_a_path(name: str, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    (tmp_path / "x.safetensors").write_bytes(b"secret")
    for attempt in (store.get, store.delete):
        with pytest.raises(AdapterNotFoundError):
            attempt(name)
    assert (tmp_path / "x.safetensors").exists()
    store.close()


def test_what_cannot_be_stored_leaves_nothing(tmp_path: Path, adapters: list[Described]) -> None:
    store = AdapterStore(tmp_path, most=1)
    bad = adapters[0].lora.map(lambda x: x.clone())
    bad.a[0][0, 0, 0] = float("inf")
    with pytest.raises(StoreError, match="not finite"):
        store.add(replace(adapters[0], lora=bad))
    store.add(adapters[0])
    with pytest.raises(BusyError, match="1 adapters"):
        store.add(adapters[1])
    assert len(list(tmp_path.glob("*.safetensors"))) == len(store) == 1
    store.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    code = (
        "import sqlite3; from functools import partial; sqlite3.connect = partial(sqlite3.connect, timeout=0.1)\n"
        f"from pathlib import Path; from t2l.serve.store import AdapterStore; AdapterStore(Path({str(tmp_path)!r}))"
    )
    done = programs.run(["-c", code])
    assert done.returncode == 1 and "give this one its own" in done.stderr
    store.close()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="cannot hold adapters"):
        AdapterStore(blocked)


def test_a_folder_that_is_refused_is_let_go(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / DATABASE)) as other:
        other.execute("create table adapters (id text)")
    with pytest.raises(
        OutputError, match=r"another version of t2l.* has no sha256, .* provenance.*--folder"
    ) as refused:
        AdapterStore(tmp_path)
    # While the error is kept, and with it all that its frames held.
    with closing(sqlite3.connect(tmp_path / DATABASE, timeout=0)) as other:
        other.execute("drop table adapters")
    AdapterStore(tmp_path).close()
    assert refused.traceback


def test_files_of_others_stay(tmp_path: Path, adapters: list[Described]) -> None:
    """A server in the folder of a model once deleted the model's weights."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(OutputError, match="is a model; give the server a folder of its own"):
        AdapterStore(model)
    assert [path.name for path in model.iterdir()] == ["model.safetensors"]
    store = AdapterStore(tmp_path / "store")
    name = store.add(adapters[0])[0].id
    store.close()
    for foreign in ("notes.safetensors", "t2l-mine.safetensors", "model.safetensors"):
        (store.folder / foreign).write_bytes(b"mine")
    store = AdapterStore(store.folder)
    assert {path.stem for path in store.folder.glob("*.safetensors")} == {name, "notes", "t2l-mine", "model"}
    store.close()


def test_a_damaged_file_is_refused_and_a_lost_one_forgotten(tmp_path: Path, adapters: list[Described]) -> None:
    store = AdapterStore(tmp_path)
    entry, lost = store.add(adapters[0])[0], store.add(adapters[1])[0]
    store.close()
    path = tmp_path / f"{entry.id}.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    (tmp_path / f"{lost.id}.safetensors").unlink()
    (tmp_path / "t2l-0123456789abcdef.safetensors").write_bytes(b"half")
    (tmp_path / ".t2l-new-abc").write_bytes(b"half")
    store = AdapterStore(tmp_path)
    with pytest.raises(StoreError, match="damaged"):
        store.get(entry.id)
    with pytest.raises(AdapterNotFoundError):
        store.get(lost.id)
    assert {path.name for path in tmp_path.iterdir()} >= {DATABASE, path.name}
    assert not list(tmp_path.glob("t2l-0*")) and not list(tmp_path.glob(".t2l-new-*"))
    store.close()


KILLED = """
import sys
from pathlib import Path
from test_serve_store import Described
from conftest import make_base, make_config
from serve_helpers import make_adapter
from t2l.serve.store import AdapterStore

store, model = AdapterStore(Path(sys.argv[1])), make_base(make_config())
for seed in range(1000):
    made = make_adapter(model, seed)
    print(store.add(Described(made.lora, made.spec, f"task {seed}"))[0].id, flush=True)
"""


def test_after_sigkill_every_acknowledged_adapter_is_there(tmp_path: Path) -> None:
    with programs.Program(["-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline().strip() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
    store, model = AdapterStore(tmp_path), make_base(make_config())
    for seed, name in enumerate(acknowledged):
        assert same(store.get(name).lora, make_adapter(model, seed).lora)
    assert len(store) == len(list(tmp_path.glob("*.safetensors"))) >= 20
    assert len(store) <= len(acknowledged) + 1, "at most the one whose acknowledgement was under way"
    store.close()


@pytest.mark.parametrize("cycles", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_creating_and_deleting_does_not_grow(cycles: int, tmp_path: Path, adapters: list[Described]) -> None:
    store = AdapterStore(tmp_path)

    def cycle(count: int) -> None:
        for n in range(count):
            entry, _ = store.add(replace(adapters[n % 6], description=f"task {n}"))
            store.get(entry.id)
            store.delete(entry.id)

    cycle(100)
    before = memory()
    cycle(cycles)
    assert memory() - before < 6 * 2**20, f"after {cycles} adapters of {adapters[0].lora.a[0].nbytes} bytes and more"
    assert len(store) == store.cached_bytes == 0
    assert not list(tmp_path.glob("*.safetensors"))
    assert (tmp_path / DATABASE).stat().st_size < 2**18
    store.close()
