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
from conftest import make_config, random_lora
from damage import damages, outcome, with_damage

from t2l import peft_io
from t2l.checkpoint import load_checkpoint
from t2l.config import LoraConfig, build, load_yaml, to_plain
from t2l.encoder import load_encoder
from t2l.library import AdapterLibrary, save_library
from t2l.lora import LoraTensors
from t2l.spec import AdapterSpec
from t2l.tasks import load_descriptions, load_own
from t2l.train.config import SftConfig
from t2l.train.resume import Progress, load_state, save_state


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
    save_state(tmp / "run", module, optimizer, Progress(3, 2, 0.5, 1, False, best))

    def read(path: Path) -> Any:
        fresh = torch.nn.Linear(3, 2)
        random_numbers = torch.get_rng_state()
        try:
            progress = load_state(path, fresh, torch.optim.AdamW(fresh.parameters(), lr=1e-3))
        finally:
            torch.set_rng_state(random_numbers)
        return progress, fresh

    def sound(value: Any) -> bool:
        progress, fresh = value
        return progress.step >= 0 and all(bool(torch.isfinite(x).all()) for x in fresh.parameters())

    return Reader(tmp / "run", read, sound)


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
    published, packed,
    checkpoint, adapter, library, state, settings, plain_settings, tasks, descriptions, answers, base, sentence,
)  # fmt: skip


@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_damaged_files_are_refused_or_sound(make: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = attack(make(tmp_path, request), tmp_path / "damaged", seed=0, count=1)
    assert found["refused"] > 12


@pytest.mark.slow
@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_many_damaged_files_are_refused_or_sound(make: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    reader = make(tmp_path, request)
    found = sum((attack(reader, tmp_path / "damaged", seed=seed, count=50) for seed in range(1, 4)), Counter[str]())
    print(f"{make.__name__}: {found['refused']:,} refused, {found['value']:,} read as sound values")
