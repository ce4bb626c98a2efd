"""Whatever others may have written, and whatever has become of it: an error of ours, or a sound value.

Each reader of the library reads sound files whose every file is damaged in every way of `damage.py`, from a seed.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_config, make_hypernet, random_lora
from damage import damages, documented, outcome, with_damage

from t2l import peft_io
from t2l.checkpoint import load_checkpoint
from t2l.config import LoraConfig, build, load_yaml, to_plain
from t2l.encoder import load_encoder
from t2l.errors import TrainingError
from t2l.library import AdapterLibrary, save_library
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.tasks import load_descriptions, load_own
from t2l.train.config import SftConfig
from t2l.train.resume import Progress, load_state, read_facts, save_state


@dataclass
class Reader:
    """Something sound, and what reads it."""

    sound: Path
    """A file, or a folder."""
    read: Callable[[Path], Any]
    check: Callable[[Any], bool] = lambda value: value is not None
    """Whether a value that was read from damaged files is one that may be used."""
    guarded: tuple[str, ...] = ()
    """Files whose every change must be refused, since a checksum is kept of them."""
    names: tuple[str, ...] = field(default=())
    """The files that are damaged; all of them, if none is named."""

    def files(self) -> list[str]:
        if not self.sound.is_dir():
            return [""]
        return list(self.names) or sorted(str(p.relative_to(self.sound)) for p in self.sound.rglob("*") if p.is_file())


TEXTS = (".json", ".jsonl", ".yaml", ".md", ".jinja", ".txt", "")


def attack(reader: Reader, place: Path, seed: int, count: int) -> Counter[str]:
    """Reads everything damaged, and says how often what came of it."""
    place.mkdir(exist_ok=True)
    draw, found = random.Random(seed), Counter[str]()
    sound = reader.read(reader.sound)
    assert reader.check(sound)
    for name in reader.files():
        path = reader.sound / name if name else reader.sound
        content, text = path.read_bytes(), path.suffix in TEXTS
        for what, damage in damages(content, draw, count=count, text=text, inside=bool(name)):
            copy = place / reader.sound.name
            with_damage(reader.sound, copy, name, damage)
            kind, value = outcome(partial(reader.read, copy))
            where = f"{name or path.name}: {what}"
            assert kind != "raw", f"{where}: {value}"
            changed = (copy / name if name else copy).is_dir() or not _same(copy / name if name else copy, content)
            assert kind == "refused" or not (changed and name in reader.guarded), f"{where} was read without a word"
            assert kind == "refused" or reader.check(value), f"{where} was read as something unsound"
            found[kind] += 1
    return found


def _same(path: Path, content: bytes) -> bool:
    if path.is_file() and not path.is_symlink():
        path.chmod(0o644)
    return path.is_file() and path.read_bytes() == content


def finite(lora: LoraTensors) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in (*lora.a, *lora.b))


# ---------------------------------------------------------------------------------------------------- the readers


@pytest.fixture
def spec() -> AdapterSpec:
    return AdapterSpec.from_config(make_config(), "tiny", LoraConfig(r=2, lora_alpha=4))


def checkpoint(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    folder = request.getfixturevalue("make_checkpoint")(tmp / "checkpoint")

    def read(path: Path) -> Any:
        return load_checkpoint(path).hypernet.state_dict()

    def sound(state: Any) -> bool:
        return all(bool(torch.isfinite(x).all()) for x in state.values())

    return Reader(folder, read, sound, guarded=("hypernet.safetensors",))


def adapter(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    spec = request.getfixturevalue("spec")
    origin = peft_io.Origin("Answer in verse.", {"checkpoint": "x"})
    peft_io.save_adapter(tmp / "adapter", random_lora(spec), spec, card="A card.\n", origin=origin)

    def read(path: Path) -> Any:
        facts = peft_io.read_facts(path)
        peft_io.read_norms(path, facts)
        peft_io.read_origin(path)
        return peft_io.load_adapter(path, spec)

    return Reader(tmp / "adapter", read, finite)


def library(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    spec = request.getfixturevalue("spec")
    lora = LoraTensors.stack([random_lora(spec, seed) for seed in range(3)])
    save_library(tmp / "library", lora, spec, {name: {"steps": 3} for name in ("one", "two", "three")})

    def read(path: Path) -> Any:
        opened = AdapterLibrary.open(path)
        shutil.rmtree(tmp / "out", ignore_errors=True)
        opened.export(tmp / "out")
        return opened.stack()

    return Reader(tmp / "library", read, finite, guarded=("adapters.safetensors",))


def state(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    best = {name: value.clone() for name, value in module.state_dict().items()}
    (tmp / "run").mkdir()
    save_state(tmp / "run", module, optimizer, Progress(3, best_step=2, best_value=0.5, patience_count=1, best=best))

    def read(path: Path) -> Any:
        fresh = torch.nn.Linear(3, 2)
        random_numbers = torch.get_rng_state()
        try:
            progress = load_state(path, fresh, torch.optim.AdamW(fresh.parameters(), lr=1e-3))
        finally:
            torch.set_rng_state(random_numbers)
        return progress, fresh

    def same(value: Any) -> bool:
        progress, fresh = value
        pairs = zip(module.parameters(), fresh.parameters(), strict=True)
        return progress.step == 3 and all(torch.equal(x, y) for x, y in pairs)

    return Reader(tmp / "run", read, same)


def network_state(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    """As reconstruction and SFT save it."""
    spec = request.getfixturevalue("spec")

    def fresh(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        hypernet = make_hypernet(spec, seed=seed).requires_grad_(True)
        return hypernet, torch.optim.AdamW(hypernet.parameters(), lr=1e-3)

    hypernet, optimizer = fresh(0)
    sum(x.square().sum() for x in hypernet.parameters()).backward()
    optimizer.step()
    (tmp / "run").mkdir()
    save_state(tmp / "run", hypernet, optimizer, Progress(3, chosen_by="loss"))

    def read(path: Path) -> Any:
        other, its = fresh(1)
        load_state(path, other, its)
        return other

    def same(other: Any) -> bool:
        return all(torch.equal(x, y) for x, y in zip(hypernet.parameters(), other.parameters(), strict=True))

    return Reader(tmp / "run", read, same)


def task_loras_state(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    """Of a run that is stopped by the clock before its first steps are over."""
    from t2l.train.processes import join
    from t2l.train.task_config import TaskLorasConfig, TaskLorasDataConfig, TaskLorasTrainConfig
    from t2l.train.task_loras import setup, train_task_loras

    config = TaskLorasConfig(
        base=str(request.getfixturevalue("base_folder")),
        lora=LoraConfig(target_modules=("q_proj",), r=2, lora_alpha=4),
        data=TaskLorasDataConfig(tasks=(str(request.getfixturevalue("sft_jsonl")),), validation_examples=2),
        train=TaskLorasTrainConfig(
            max_steps=8, tasks_per_batch=1, max_seq_length=96, max_target_length=12, eval_steps=2, report_to="none"
        ),
    )
    with pytest.raises(TrainingError, match="--resume"):
        train_task_loras(config, tmp / "run", max_minutes=0.0, device="cpu", log=lambda line: None)
    processes = join("cpu", timeout=60)

    def read(path: Path) -> Any:
        trainer = setup(config, path, processes, lambda line: None)
        trainer.load(read_facts(path))
        return trainer

    saved = read(tmp / "run")

    def same(trainer: Any) -> bool:
        pairs = zip(saved.slots.tensors().values(), trainer.slots.tensors().values(), strict=True)
        return trainer.waiting == saved.waiting and all(torch.equal(x, y) for x, y in pairs)

    return Reader(tmp / "run", read, same, names=("state.safetensors",))


def sharded(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    from t2l.shards import Origin, ShardedLibrary

    spec, texts = request.getfixturevalue("spec"), ["Add.", "Answer in verse."]
    made = ShardedLibrary.begin(tmp / "sharded", spec, Origin(checkpoint_sha256="0" * 64, dtype="float32"))
    lora = LoraTensors.stack([random_lora(spec, seed) for seed in range(2)])
    tensors = {
        f"{t.name}.{part}": x[m].contiguous()
        for m, t in enumerate(spec.targets)
        for part, x in (("A", lora.a), ("B", lora.b))
    }
    made.write_shard(texts, tensors, lora.total_norms().tolist())

    def read(path: Path) -> Any:
        opened = ShardedLibrary.open(path)
        return opened.adapters([name for names in opened.ids() for name in names])

    def same(adapters: Any) -> bool:
        """What is read is what was written, to the last bit."""
        found = {text: n for n, text in enumerate(texts)}
        pairs = [(adapter.lora.b, [x[found[adapter.description]] for x in lora.b]) for adapter in adapters]
        return all(torch.equal(x, y) for one, other in pairs for x, y in zip(one, other, strict=True))

    return Reader(tmp / "sharded", read, same)


def store(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    """The server's; an adapter whose row or file is damaged is left out or refused, and the others are there."""
    from t2l.adapter import LoraAdapter
    from t2l.serve.store import AdapterStore

    spec = request.getfixturevalue("spec")
    made = {text: LoraAdapter(random_lora(spec, n), spec, text) for n, text in enumerate(("Add.", "In verse."))}
    opened = AdapterStore(tmp / "store")
    for adapter in made.values():
        opened.add(adapter)
    opened.close()

    def read(path: Path) -> Any:
        opened = AdapterStore(path)
        try:
            return [opened.get(entry.id) for entry in opened.entries()]
        finally:
            opened.close()

    def same(found: Any) -> bool:
        pairs = [(made[stored.entry.description].lora, stored.lora) for stored in found]
        return all(torch.equal(x, y) for one, other in pairs for x, y in zip(one.b, other.b, strict=True))

    return Reader(tmp / "store", read, same)


def settings(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    config = to_plain(request.getfixturevalue("sft_config"))
    (tmp / "settings.yaml").write_text(json.dumps(config))
    return Reader(tmp / "settings.yaml", lambda path: build(SftConfig, load_yaml(path)))


def plain_settings(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    config = to_plain(request.getfixturevalue("sft_config"))
    (tmp / "settings.yaml").write_text(yaml.safe_dump(config))
    return Reader(tmp / "settings.yaml", lambda path: build(SftConfig, load_yaml(path)))


def tasks(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    rows = [
        {"task": f"t{n % 2}", "description": ["Do it."], "input": f"text {n}", "output": "a", "split": "test"}
        for n in range(6)
    ]
    (tmp / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Reader(tmp / "tasks.jsonl", load_own)


def descriptions(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    rows = [{"task": f"t{n}", "description": ["Do it.", "Do that."]} for n in range(4)]
    (tmp / "descriptions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Reader(tmp / "descriptions.jsonl", load_descriptions)


def answers(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    from test_eval_report import header, made

    from t2l.eval.answers import read, to_text
    from t2l.eval.report import Options, markdown

    path = tmp / "answers.jsonl"
    path.write_text(to_text(header(), made()))

    def table(path: Path) -> str:
        return markdown([read(path)], Options(without_controls=True))

    return Reader(path, table, lambda text: "nan" not in text)


def base(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    from t2l import hub

    shutil.copytree(request.getfixturevalue("base_folder"), tmp / "base")

    def read(path: Path) -> Any:
        hub.load_tokenizer(str(path))
        return hub.load_causal_lm(str(path))

    return Reader(tmp / "base", read, lambda model: model is not None)


def sentence(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    from t2l.config import EncoderConfig

    shutil.copytree(request.getfixturevalue("sentence_folder"), tmp / "encoder")

    def read(path: Path) -> Any:
        encoder = load_encoder(EncoderConfig(kind="sentence", model=str(path), max_tokens=64), "tiny")
        return encoder.encode(["Do it."]).states

    return Reader(tmp / "encoder", read, lambda states: bool(torch.isfinite(states).all()))


def published(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    from test_sakana import CASES, weights

    from t2l import sakana

    arguments = {"training_task": "sft", "model_dir": "tiny", "emb_model": "x", "hypernet_latent_size": 16}
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": True}
    (tmp / "published").mkdir()
    (tmp / "published" / sakana.ARGUMENTS).write_text(json.dumps(arguments | {"head_in_size": 12} | CASES["L"]))
    (tmp / "published" / sakana.ADAPTER).write_text(json.dumps(adapter))
    torch.save(weights("L"), tmp / "published" / sakana.WEIGHTS)

    def read(path: Path) -> Any:
        arguments, state = sakana.read_arguments(path), sakana.read_state(path / sakana.WEIGHTS)
        spec = sakana.published_spec(state, arguments, make_config(), "tiny")
        return sakana.build(state, arguments, spec, 32).state_dict()

    return Reader(tmp / "published", read, lambda state: all(bool(torch.isfinite(x).all()) for x in state.values()))


def packed(tmp: Path, request: pytest.FixtureRequest) -> Reader:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from t2l.tasks import load_sni

    (tmp / "packed").mkdir()
    names = ["one", "two"]
    facts = {"definition": names, "summary": names, "descriptions": [["Do it."], ["Do that."]], "category": names}
    pq.write_table(pa.table({"task": names, **facts}), tmp / "packed" / "sni_tasks.parquet")
    rows = {"task": names * 4, "id": list("abcdefgh"), "input": ["x"] * 8, "outputs": [["y"]] * 8}
    pq.write_table(pa.table(rows), tmp / "packed" / "sni_train.parquet")
    return Reader(tmp / "packed", lambda path: load_sni(names, splits=("train",), folder=path))


READERS = (
    published, packed, network_state, task_loras_state, sharded, store,
    checkpoint, adapter, library, state, settings, plain_settings, tasks, descriptions, answers, base, sentence,
)  # fmt: skip


@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_damaged_files_are_refused_or_sound(make: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = attack(make(tmp_path, request), tmp_path / "damaged", seed=0, count=1)
    assert found.total() >= documented(make.__name__)[0]


@pytest.mark.slow
@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_many_damaged_files_are_refused_or_sound(make: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    reader = make(tmp_path, request)
    found = sum((attack(reader, tmp_path / "damaged", seed=seed, count=50) for seed in range(1, 4)), Counter[str]())
    _, full, refused = documented(make.__name__)
    assert found.total() >= full
    assert found["refused"] > 0.95 * refused, "places are drawn by length, and paths in these files differ in theirs"
