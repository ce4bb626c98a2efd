"""Mass generation: every text once, whatever happens meanwhile; what is found again is what was generated."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from t2l import io
from t2l.cli import app
from t2l.errors import (
    AdapterNotFoundError,
    CheckpointError,
    ConfigError,
    DataError,
    DescriptionError,
    OutputError,
)
from t2l.lora import LoraTensors
from t2l.mass import Settings, Summary, generate_library, read_descriptions, rows_per_shard
from t2l.pace import progress
from t2l.shards import COLUMNS, ShardedLibrary
from t2l.text_to_lora import TextToLora

TEXTS = [f"Say the number {n} in words." for n in range(11)]


@pytest.fixture(scope="module")
def checkpoint(
    make_checkpoint: Callable[..., Path], sentence_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "one", encoder=str(sentence_folder))


@pytest.fixture(scope="module")
def settings(checkpoint: Path) -> Settings:
    """Three adapters a shard, two a forward pass."""
    each = TextToLora.from_pretrained(checkpoint).spec.num_parameters * 4
    return Settings(checkpoint=str(checkpoint), dtype="float32", batch_size=2, shard_bytes=3 * each + 1, device="cpu")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"task": n, "description": t}) + "\n" for n, t in enumerate(texts)))
    return path


def generate(source: Path, folder: Path, settings: Settings) -> Summary:
    return generate_library(source, folder, settings, log=lambda line: None)


def names(library: ShardedLibrary) -> list[str]:
    return [name for batch in library.ids() for name in batch]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> ShardedLibrary:
    """The library of `TEXTS`, two of them twice."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_jsonl(folder / "texts.jsonl", [*TEXTS[:6], f"  {TEXTS[2]} ", *TEXTS[6:], TEXTS[0]])
    assert generate(source, folder / "library", settings) == Summary(13, 11, 0, 2)
    return ShardedLibrary.open(folder / "library")


def test_every_text_once_and_as_generate_writes_it(whole: ShardedLibrary, checkpoint: Path) -> None:
    assert rows_per_shard(whole.spec, Settings(checkpoint="", dtype="float32")) == 4096
    rows = whole.rows([whole.origin.id_of(text) for text in TEXTS])
    assert [row["description"] for row in rows] == TEXTS
    assert len(whole) == 11 and len(set(names(whole))) == 11
    assert len(list(whole.folder.glob("shards/*"))) == 4
    written = TextToLora.from_pretrained(checkpoint, device="cpu").generate(TEXTS)
    for text, row, found in zip(TEXTS, rows, whole.adapters([row["id"] for row in rows]), strict=True):
        adapter = written[TEXTS.index(text)]
        assert found.description == text and found.spec == adapter.spec
        assert adapter.provenance.items() <= found.provenance.items()
        for mine, theirs in zip((*found.lora.a, *found.lora.b), (*adapter.lora.a, *adapter.lora.b), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        norm = sum(float(x.square().sum()) for x in adapter.norms().values()) ** 0.5
        assert row["norm"] == pytest.approx(norm, rel=1e-4)


def test_the_index_is_a_parquet_data_set(whole: ShardedLibrary) -> None:
    table = pa.concat_tables(pq.read_table(path) for path in whole.folder.glob("shards/*/index.parquet"))
    assert tuple(table.column_names) == COLUMNS and len(table) == 11
    assert set(table["checkpoint"].to_pylist()) == {whole.origin.checkpoint_sha256}


def test_parquet_gives_the_same_files(whole: ShardedLibrary, settings: Settings, tmp_path: Path) -> None:
    pq.write_table(pa.table({"task": list(range(11)), "description": TEXTS}), tmp_path / "texts.parquet")
    generate(tmp_path / "texts.parquet", tmp_path / "library", settings)
    assert files(tmp_path / "library") == files(whole.folder)


def test_only_what_is_new_is_written(settings: Settings, tmp_path: Path) -> None:
    source, folder = tmp_path / "texts.jsonl", tmp_path / "library"
    assert generate(write_jsonl(source, TEXTS[:4]), folder, settings) == Summary(4, 4, 0, 0)
    before = files(folder)
    assert generate(source, folder, settings) == Summary(4, 0, 4, 0)
    assert files(folder) == before
    more = ["A text before all others.", *TEXTS[:4], *TEXTS[4:6]]
    assert generate(write_jsonl(source, more), folder, settings) == Summary(7, 3, 4, 0)
    assert before.items() <= files(folder).items()
    library = ShardedLibrary.open(folder)
    assert sorted(names(library)) == sorted(map(library.origin.id_of, more))


def killed(moment: int, after: bool, run: Callable[[], object]) -> None:
    """Does a piece of work in a process that is killed by SIGKILL before or after its renaming number `moment`."""
    child = os.fork()
    if child == 0:
        count, rename = 0, os.rename

        def dying(*paths: Path) -> None:
            nonlocal count
            if after:
                rename(*paths)
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            if not after:
                rename(*paths)

        io.os.rename = dying  # type: ignore[attr-defined]
        run()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_any_moment_and_gone_on_with(whole: ShardedLibrary, settings: Settings, tmp_path: Path) -> None:
    """The folder becomes, byte for byte, the one that was never interrupted, with nothing left beside it."""
    source, folder = write_jsonl(tmp_path / "texts.jsonl", TEXTS), tmp_path / "library"
    for moment, after in ((0, False), (0, False), (0, True), (1, True), (1, False)):
        killed(moment, after, lambda: generate(source, folder, settings))
    generate(source, folder, settings)
    assert files(folder) == files(whole.folder)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_was_cut_off_in_writing_does_not_count(settings: Settings, tmp_path: Path) -> None:
    source, folder = write_jsonl(tmp_path / "texts.jsonl", TEXTS[:3]), tmp_path / "library"
    generate(source, folder, settings)
    (shard,) = folder.glob("shards/*")
    shard.rename(shard.with_name(f".{shard.name}.t2l-abcd1234"))  # as a killed process leaves it
    assert generate(source, folder, settings) == Summary(3, 3, 0, 0)
    assert [path.name for path in folder.glob("shards/*")] == [shard.name]
    assert list(folder.glob("shards/.*")) == []


def test_exported_folders_are_peft_s(
    whole: ShardedLibrary, tiny_base: LlamaForCausalLM, base_folder: Path, tmp_path: Path
) -> None:
    runner = CliRunner()
    arguments = ["library", "export", str(whole.folder), "-o", str(tmp_path / "peft"), "--description", TEXTS[3]]
    assert runner.invoke(app, arguments).exit_code == 0
    name = whole.origin.id_of(TEXTS[3])
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_folder), tmp_path / "peft" / name)
    tokens = torch.randint(3, 200, (1, 8))
    with torch.no_grad():
        assert (model(tokens).logits - tiny_base(tokens).logits).abs().max() > 0.1
    assert runner.invoke(app, arguments[:-2]).exit_code == 2  # nothing says which


def test_command(whole: ShardedLibrary, settings: Settings, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    arguments = ["library", "generate", str(source), "-o", str(tmp_path / "library"), "--checkpoint"]
    result = CliRunner().invoke(app, [*arguments, settings.checkpoint, "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["written"], found["there"], found["descriptions"]) == (11, 0, 11)
    library = ShardedLibrary.open(tmp_path / "library")
    assert library.origin.dtype == "float16"
    ids = [library.origin.id_of(text) for text in TEXTS[:2]]
    one, other = library.stack(ids), whole.stack(ids)
    for x, y in zip((*one.a, *one.b), (*other.a, *other.b), strict=True):
        torch.testing.assert_close(x, y, atol=2e-3, rtol=2e-3)


def test_what_does_not_belong_together_is_refused(
    whole: ShardedLibrary,
    settings: Settings,
    make_checkpoint: Callable[..., Path],
    sentence_folder: Path,
    tmp_path: Path,
) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS[:1])
    other = make_checkpoint(tmp_path / "other", encoder=str(sentence_folder), head_size=12)
    with pytest.raises(ConfigError, match="begun with checkpoint_sha256"):
        generate(source, whole.folder, Settings(checkpoint=str(other), dtype="float32"))
    with pytest.raises(ConfigError, match=r"strength 1.0, now it is 0.5"):
        generate(source, whole.folder, Settings(checkpoint=settings.checkpoint, dtype="float32", strength=0.5))
    with pytest.raises(OutputError, match="other things"):
        generate(source, tmp_path, settings)
    with pytest.raises(AdapterNotFoundError, match="no adapter 0123"):
        whole.stack(["0123"])


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ('{"description": " "}', DescriptionError, r"only white space.*row 2 of texts.jsonl"),
        ('{"text": "Add."}', DataError, r"texts.jsonl:2 must be an object with a description"),
        ("[", DataError, r"texts.jsonl:2 cannot be read as JSON"),
        ('{"description": 3}', DescriptionError, r"must be text, got int"),
    ],
)
def test_rows_that_are_none_are_named_before_anything_is_written(
    line: str, error: type[Exception], said: str, settings: Settings, tmp_path: Path
) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text(f'{{"description": "Add."}}\n{line}\n')
    with pytest.raises(error, match=said):
        generate(source, tmp_path / "library", settings)
    assert list((tmp_path / "library" / "shards").iterdir()) == []


def test_a_bar_counts_to_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(4, "adapters", print, bar=True) as count:
        count(1)
        count(3)
    shown = capsys.readouterr()
    assert "4/4 adapters" in shown.err and shown.out == ""


def test_files_of_descriptions_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"read from .parquet and .jsonl"):
        list(read_descriptions(tmp_path / "texts.csv"))
    with pytest.raises(DataError, match="is missing"):
        list(read_descriptions(tmp_path / "texts.jsonl"))
    pq.write_table(pa.table({"text": ["Add."]}), tmp_path / "texts.parquet")
    with pytest.raises(DataError, match="no column description; it has text"):
        list(read_descriptions(tmp_path / "texts.parquet"))
    (tmp_path / "texts.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="damaged or no Parquet file"):
        list(read_descriptions(tmp_path / "texts.parquet"))


def test_a_changed_file_is_noticed(settings: Settings, tmp_path: Path) -> None:
    source, folder = write_jsonl(tmp_path / "texts.jsonl", TEXTS[:3]), tmp_path / "library"
    generate(source, folder, settings)
    library = ShardedLibrary.open(folder)
    (path,) = folder.glob("shards/*/adapters.safetensors")
    tensors = load_file(path)
    tensors["q_proj.B"].view(torch.int32)[1, 0, 0, 0] ^= 1  # the least bit of one number
    save_file(tensors, path)
    library.stack([library.origin.id_of(TEXTS[0])])
    with pytest.raises(CheckpointError, match=r"row 1 is not what its index.parquet was written for"):
        library.stack([library.origin.id_of(TEXTS[1])])
    index = next(folder.glob("shards/*/index.parquet"))
    table = pq.read_table(index)
    halves = pa.array([norm / 2 for norm in table["norm"].to_pylist()], pa.float32())
    pq.write_table(table.set_column(COLUMNS.index("norm"), "norm", halves), index)
    with pytest.raises(CheckpointError, match=r"row 0 is not what its index.parquet was written for"):
        library.stack([library.origin.id_of(TEXTS[0])])
    (folder / "library.json").write_text('{"format_version": 9}')
    with pytest.raises(CheckpointError, match="format_version is 9"):
        ShardedLibrary.open(folder)
    next(folder.glob("shards/*/index.parquet")).write_bytes(b"PAR1")
    with pytest.raises(CheckpointError, match="is damaged"):
        names(library)


def test_values_that_the_type_cannot_hold_are_refused(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS[:3])
    tensors = TextToLora.tensors

    def huge(self: TextToLora, *arguments: object, **options: object) -> LoraTensors:
        return tensors(self, *arguments, **options).map(lambda x: x * 1e6)  # type: ignore[arg-type]

    monkeypatch.setattr(TextToLora, "tensors", huge)
    with pytest.raises(CheckpointError, match=r"not finite in torch.float16"):
        generate(source, tmp_path / "library", Settings(checkpoint=settings.checkpoint, device="cpu"))
    assert list((tmp_path / "library" / "shards").iterdir()) == []
