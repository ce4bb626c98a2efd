"""What new users tried, and what must happen: each of these once ended in a traceback, a wrong file or a lost one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import TASKS, failed, t2l, write_base, write_checkpoint
from conftest import SMALL, make_config, random_lora
from transformers import AutoConfig
from typer.testing import Result

import t2l as package
from t2l import kinds
from t2l.adapter import LoraAdapter
from t2l.config import LoraConfig
from t2l.errors import AdapterNotAppliedError, DataError, SpecMismatchError
from t2l.gguf_export import save_gguf
from t2l.kinds import Kind
from t2l.library import AdapterLibrary, from_peft_folders, save_library
from t2l.lora import LoraTensors
from t2l.merge import merge_into_folder
from t2l.serve.launch import Settings, build
from t2l.serve.store import AdapterStore
from t2l.shards import Origin, ShardedLibrary
from t2l.spec import AdapterSpec
from t2l.tasks import load_own
from t2l.text_to_lora import TextToLora
from t2l.train.tune import Tuned, read_examples


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("new") / "base", 32, seed=0)


@pytest.fixture(scope="module")
def checkpoint(base: Path) -> Path:
    return write_checkpoint(base.parent / "checkpoint", base)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --------------------------------------------------------------------------------------------- what --overwrite does


def test_overwrite_deletes_no_file_of_the_users_and_no_other_kind(checkpoint: Path, tmp_path: Path) -> None:
    several, single = tmp_path / "several", tmp_path / "single"
    assert t2l("generate", *TASKS, "-o", several, "--checkpoint", checkpoint).exit_code == 0
    assert t2l("generate", TASKS[0], "-o", single, "--checkpoint", checkpoint).exit_code == 0
    before = names(several), names(single)
    again = ("--checkpoint", checkpoint, "--overwrite")
    failed(t2l("generate", TASKS[0], "-o", several, *again), "holds 3 adapters, which one adapter would replace")
    failed(t2l("generate", *TASKS, "-o", single, *again), "is one adapter; several would replace it")
    (single / "notes.txt").write_text("years of work")
    failed(t2l("generate", TASKS[0], "-o", single, *again), "notes.txt")
    assert (names(several), names(single) - {"notes.txt"}) == before
    (single / "notes.txt").unlink()
    assert t2l("generate", TASKS[1], "-o", single, *again).exit_code == 0
    assert t2l("generate", *TASKS, "-o", several, *again).exit_code == 0


# ------------------------------------------------------------------------------- descriptions and standard input


@pytest.mark.parametrize(
    "command",
    ["generate TEXT", "merge TEXT", "export gguf TEXT", "export peft TEXT", "import gte .", "import sakana .",
     "tune TEXT --examples none.jsonl", "compress .", "library evaluate . ."],
)  # fmt: skip
def test_what_is_there_is_named_with_a_flag_that_the_command_has(command: str, tmp_path: Path) -> None:
    there = tmp_path / "out.gguf"
    there.write_text("mine")
    words = command.replace("TEXT", "Name_the_colour.").split()
    line = failed(t2l(*words, "-o", there), f"{there} exists already; choose another")
    has_flag = "--overwrite" in t2l(*words[:2], "--help").stdout
    assert ("or pass --overwrite" in line) == has_flag and "overwrite=" not in line
    assert there.read_text() == "mine"
    # A place where nothing can be written is found before anything slow is done, too.
    failed(t2l(*words, "-o", there / "inside"), f"Cannot write to {there}", "Not a directory")


def test_descriptions_of_several_lines_come_from_files_and_standard_input(checkpoint: Path, tmp_path: Path) -> None:
    text = "Name the city.\nAnswer with one word."
    (tmp_path / "task.txt").write_text(text + "\n")
    where = ("--checkpoint", checkpoint)
    assert t2l("generate", "--description-file", tmp_path / "task.txt", "-o", tmp_path / "a", *where).exit_code == 0
    assert t2l("generate", "-", "-o", tmp_path / "b", *where, stdin=text).exit_code == 0
    assert t2l("generate", "--description-file", "-", "-o", tmp_path / "c", *where, stdin=text).exit_code == 0
    for name in "abc":
        assert json.loads((tmp_path / name / "t2l.json").read_text())["description"] == text
    assert t2l("generate", "x", "--description-file", "y", "-o", tmp_path / "d").exit_code == 2
    result = t2l("run", "-", "--input", "Rome", "--json", "--max-new-tokens", 2, *where, stdin=text)
    assert json.loads(result.stdout)["description"] == text
    result = t2l("run", text, "--input", "-", "--json", "--max-new-tokens", 2, *where, stdin="Rome\nwas hot.")
    assert json.loads(result.stdout)["answers"][0]["input"] == "Rome\nwas hot."
    assert t2l("run", "-", "--input", "-", *where, stdin=text).exit_code == 2


def test_a_description_beyond_the_window_is_refused_with_both_lengths(checkpoint: Path, tmp_path: Path) -> None:
    for text, limit in (("Do it. " * 30, "reads at most 128"), ("é" * 50_000, "at most 32,768 are read")):
        failed(t2l("generate", text, "-o", tmp_path / "x", "--checkpoint", checkpoint), limit)
    assert "128 tokens" in t2l("generate", "--help").stdout
    assert not (tmp_path / "x").exists()


def test_input_without_an_end_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2l.cli.common.MOST_BYTES", 1000)
    failed(t2l("generate", "--from-file", "/dev/zero", "-o", tmp_path / "x"), "/dev/zero is larger than")


# --------------------------------------------------------------------------------------------------- looking at things


def test_inspect_knows_shipped_checkpoints_and_libraries(base: Path, tmp_path: Path) -> None:
    result = t2l("inspect", "t2l:smollm2-135m", "--json")
    assert json.loads(result.stdout)["kind"] == "checkpoint"
    spec = AdapterSpec.from_config(make_config(), "tiny", LoraConfig(r=2, lora_alpha=4))
    facts = {"one": {"descriptions": ["Do it."]}, "two": {}}
    save_library(tmp_path / "library", LoraTensors.stack([random_lora(spec, n) for n in range(2)]), spec, facts)
    found = json.loads(t2l("inspect", tmp_path / "library", "--json").stdout)
    assert (found["kind"], found["adapters"], found["with_descriptions"]) == ("library", 2, 1)
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({"description": text}) + "\n" for text in TASKS))
    where = ("-o", tmp_path / "shards", "--checkpoint", write_checkpoint(tmp_path / "checkpoint", base))
    assert t2l("library", "generate", tmp_path / "tasks.jsonl", *where).exit_code == 0
    found = json.loads(t2l("inspect", tmp_path / "shards", "--json").stdout)
    assert (found["kind"], found["adapters"], found["dtype"]) == ("library of shards", 3, "float16")
    failed(t2l("inspect", tmp_path / "nothing"), "nothing")
    failed(t2l("inspect", "t2l:nothing"), "there is: t2l:smollm2-135m")


def every_kind(folder: Path, base: Path, checkpoint: Path) -> dict[Kind, Path]:
    """A folder of each kind, made by what makes it; of trainings and published checkpoints the names of their files."""
    spec = AdapterSpec.from_config(AutoConfig.from_pretrained(base), str(base), LoraConfig(r=2, lora_alpha=4))
    one = LoraAdapter(random_lora(spec), spec, "Do it.")
    library = save_library(folder / "library", LoraTensors.stack([one.lora, one.lora]), spec, {"one": {}, "two": {}})
    library.export(folder / "adapters")
    AdapterStore(folder / "store").close()
    for kind, inner in ((kinds.RUN, checkpoint), (kinds.TASK_RUN, library.folder)):
        shutil.copytree(inner, folder / kind.mark.replace("/", "-") / kind.mark.partition("/")[0])
    (folder / "published").mkdir()
    for name in (kinds.ADAPTER.mark, kinds.PUBLISHED.mark, "args.yaml"):
        (folder / "published" / name).write_text("{}")
    return {
        kinds.ADAPTER: one.save_pretrained(folder / "adapter"),
        kinds.ADAPTERS: folder / "adapters",
        kinds.LIBRARY: library.folder,
        kinds.SHARDS: ShardedLibrary.begin(folder / "shards", spec, Origin(checkpoint_sha256="0" * 64)).folder,
        kinds.CHECKPOINT: checkpoint,
        kinds.MODEL: base,
        kinds.STORE: folder / "store",
        kinds.PUBLISHED: folder / "published",
        **{kind: folder / kind.mark.replace("/", "-") for kind in (kinds.RUN, kinds.TASK_RUN)},
    }


def test_the_wrong_kind_of_folder_is_named_with_what_is_wanted_and_what_takes_it(
    base: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Most of these once said only that some file is missing."""
    folders = every_kind(tmp_path, base, checkpoint)
    assert folders.keys() == set(kinds.KINDS)
    out, ask, examples = ("-o", tmp_path / "out"), ("--input", "x"), tmp_path / "examples.jsonl"
    examples.write_text('{"input": "a", "output": "b"}\n' * 9)
    wants: list[tuple[Kind, Callable[[Path], Result]]] = [
        (kinds.ADAPTER, lambda x: t2l("run", "Do it.", "--adapter", x, *ask)),
        (kinds.ADAPTER, lambda x: t2l("merge", x, *out)),
        (kinds.ADAPTER, lambda x: t2l("export", "gguf", x, *out)),
        (kinds.ADAPTER, lambda x: t2l("tune", x, "--examples", examples, *out)),
        (kinds.CHECKPOINT, lambda x: t2l("generate", "Do it.", "--checkpoint", x, *out)),
        (kinds.CHECKPOINT, lambda x: t2l("run", "Do it.", "--checkpoint", x, *ask)),
        (
            kinds.CHECKPOINT,
            lambda x: t2l("eval", "run", "--suite", "everyday", "--checkpoint", x, "--out", tmp_path / "a"),
        ),
        (kinds.LIBRARY, lambda x: t2l("compress", x, *out)),
        (kinds.MODEL, lambda x: t2l("run", "--adapter", folders[kinds.ADAPTER], "--base", x, *ask)),
        (kinds.PUBLISHED, lambda x: t2l("import", "sakana", x, *out)),
    ]
    for wanted, command in wants:
        for found, folder in folders.items():
            if found is not wanted:
                line = failed(command(folder), f"{wanted.name} ({wanted.mark}) is wanted; ", found.name)
                assert found.use.partition("{}")[0] in line
    for found, folder in folders.items():
        inspected = t2l("inspect", folder)
        if found in (kinds.ADAPTER, kinds.CHECKPOINT, kinds.LIBRARY, kinds.SHARDS):
            assert inspected.exit_code == 0, inspected.output
        else:
            failed(inspected, found.name, "a checkpoint (hypernet.safetensors) or a LoRA adapter")
    failed(
        t2l("merge", folders[kinds.ADAPTER] / "README.md", *out), "README.md is a file; give a folder that holds a LoRA"
    )
    (tmp_path / "downloaded.zip").touch()
    failed(t2l("run", "--adapter", tmp_path / "downloaded.zip", *ask), "is a file; unpack it, and give a folder")
    (tmp_path / "empty").mkdir()
    failed(t2l("merge", tmp_path / "empty", *out), "is not a LoRA adapter (adapter_config.json); it holds nothing")


def test_a_folder_of_adapters_is_named_with_what_it_holds(checkpoint: Path, tmp_path: Path) -> None:
    assert t2l("generate", *TASKS, "-o", tmp_path / "three", "--checkpoint", checkpoint).exit_code == 0
    result = t2l("run", "--adapter", tmp_path / "three", "--input", "x", "--checkpoint", checkpoint)
    failed(result, "is a folder of adapters (000-", "give one of them, such as")
    for command in (("merge",), ("export", "peft")):
        result = t2l(*command, tmp_path / "three", "-o", tmp_path / "out", "--checkpoint", checkpoint)
        failed(result, "is a folder of adapters (000-", "give one of them, such as")


def test_a_folder_and_a_description_are_not_taken_for_one_another(checkpoint: Path, tmp_path: Path) -> None:
    """A misspelt folder once became a whole model of the description `hotle`, a folder's name a task."""
    assert t2l("generate", TASKS[0], "-o", tmp_path / "hotel", "--checkpoint", checkpoint).exit_code == 0
    assert f"give --adapter {tmp_path / 'hotel'}" in t2l("run", tmp_path / "hotel", "--input", "x").stderr
    out = ("-o", tmp_path / "out", "--checkpoint", checkpoint)
    for name in ("hotle", str(tmp_path / "hotle")):
        failed(t2l("merge", name, *out), f"There is no folder {name}", "give an adapter's folder, or a description of")
    failed(t2l("run", "--adapter", tmp_path / "hotle", "--input", "x"), f"did you mean {tmp_path / 'hotel'}?")
    failed(t2l("generate", "Do it.", "--checkpoint", "smollm2-135m", *out[:2]), "ships is t2l:smollm2-135m")
    failed(t2l("merge", "Longer than the name of a file. " * 9, *out), "reads at most 128")
    assert t2l("export", "peft", "判断评论是正面还是负面。", *out).exit_code == 0
    (tmp_path / "own.jsonl").touch()
    failed(t2l("inspect", tmp_path / "own.jsonl"), f"own.jsonl is a file, and a folder is wanted, such as {tmp_path}")
    failed(t2l("eval", "report", tmp_path), "is a folder, and a file is wanted")


def test_commands_in_messages_can_be_pasted(checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "my adapters"
    assert t2l("generate", TASKS[0], "-o", place / "one", "--checkpoint", checkpoint).exit_code == 0
    written = t2l("export", "gguf", place / "one", "-o", place / "a.gguf")
    assert f"--lora '{place / 'a.gguf'}'" in written.stderr
    assert f"give --adapter '{place / 'one'}'" in t2l("run", place / "one", "--input", "x").stderr
    failed(t2l("compress", place / "one", "-o", tmp_path / "out"), f"`t2l run --adapter '{place / 'one'}'`")


def test_the_base_may_have_moved(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert t2l("generate", TASKS[0], "-o", tmp_path / "a", "--checkpoint", checkpoint).exit_code == 0
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    config["base_model_name_or_path"] = "/gone/away"
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    run = ("run", "--adapter", tmp_path / "a", "--input", "x", "--checkpoint", checkpoint, "--max-new-tokens", 2)
    failed(t2l(*run), "/gone/away")
    assert t2l(*run, "--base", base, "--device", "cpu").exit_code == 0
    other = write_base(tmp_path / "other", 48, seed=1)
    failed(t2l(*run, "--base", other), "does not fit")

    # A checkpoint that reads the base's own states finds it elsewhere, too.
    old, new = Path(shutil.copytree(base, tmp_path / "old")), tmp_path / "new"
    where = ("--checkpoint", write_checkpoint(tmp_path / "checkpoint", old), "--device", "cpu")
    old.rename(new)
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"input": "a", "output": "b"}\n' * 4)
    for number, command in enumerate(
        (("generate", TASKS[0]), ("merge", TASKS[0]), ("export", "gguf", TASKS[0]), ("export", "peft", TASKS[0]),
         ("tune", TASKS[0], "--examples", examples, "--max-epochs", 1))
    ):  # fmt: skip
        out = ("-o", tmp_path / f"out-{number}")
        failed(t2l(*command, *out, *where), str(old))
        done = t2l(*command, *out, *where, "--base", new)
        assert done.exit_code == 0, done.output
    settings = Settings(folder=tmp_path / "store", checkpoint=str(where[1]), base=str(new))
    application, engine = build(settings)
    engine.close()
    assert application.title == "t2l"


def test_completion_can_be_installed_and_help_stays_light() -> None:
    assert "--install-completion" in t2l("--help").stdout
    code = "import sys; from t2l.cli import app; assert 'torch' not in sys.modules and 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_paths_may_be_texts(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As everywhere in Python; most were an error about `str`."""
    monkeypatch.chdir(tmp_path)
    spec = AdapterSpec.from_config(AutoConfig.from_pretrained(base), str(base), LoraConfig(r=2, lora_alpha=4))
    one = LoraAdapter(random_lora(spec), spec, "Do it.")
    one.save_pretrained("one")
    assert LoraAdapter.from_pretrained("one").description == "Do it."
    save_library("library", LoraTensors.stack([one.lora]), spec, {"a": {}})
    AdapterLibrary.open("library").export("peft")
    library, _ = from_peft_folders([Path("peft/a")], "again", AutoConfig.from_pretrained(base), str(base))
    save_gguf("one.gguf", one.lora, spec, AutoConfig.from_pretrained(base))
    assert merge_into_folder(one, "merged") > 0
    Path("examples.jsonl").write_text('{"input": "a", "output": "b"}')
    assert read_examples("examples.jsonl") == [("a", "b")]
    assert library.names == ("a",) and Path("one.gguf").is_file() and Path("merged/config.json").is_file()


def test_dir_and_repr_are_short() -> None:
    assert set(dir(package)) == {"__version__", *package.__all__}
    spec = AdapterSpec.from_config(make_config(), "tiny", LoraConfig())
    assert len(repr(LoraAdapter(random_lora(spec), spec, "Answer in verse. " * 100))) < 200


# ------------------------------------------------------------------------------------------------- errors that help


def test_an_untrained_hypernetwork_writes_nothing(base: Path, tmp_path: Path) -> None:
    untrained = write_checkpoint(tmp_path / "untrained", base, trained=False)
    failed(t2l("generate", TASKS[0], "-o", tmp_path / "a", "--checkpoint", untrained), "is not trained")
    failed(t2l("export", "peft", TASKS[0], "-o", tmp_path / "b", "--checkpoint", untrained), "is not trained")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    found = json.loads(t2l("doctor", "--checkpoint", untrained, "--json").stdout)
    assert not found["effect"]["usable"] and any("changes" in problem for problem in found["problems"])


def test_doctor_measures_what_a_checkpoint_does(checkpoint: Path) -> None:
    effect = json.loads(t2l("doctor", "--checkpoint", checkpoint, "--json").stdout)["effect"]
    assert effect["norm_of_update"] > 0 and effect["largest_logit_change"] > 0


def test_an_adapter_of_zeros_has_no_effect() -> None:
    spec = AdapterSpec.from_config(make_config(), "tiny", LoraConfig())
    with pytest.raises(AdapterNotAppliedError, match="changes nothing"):
        LoraAdapter(random_lora(spec).map(torch.zeros_like), spec, "x").require_effect()


def test_misspelt_keys_of_tasks_get_a_suggestion(tmp_path: Path) -> None:
    row = {"task": "a", "descripton": "Do it.", "input": "x", "ouput": "y"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"'descripton' meant to be 'description'\?; is 'ouput' meant to be 'output'"):
        load_own(tmp_path / "own.jsonl")


def test_layers_of_several_sizes_need_their_layers_named() -> None:
    """Bases such as Gemma 3n and OpenELM, whose layers differ: what is adapted must have one size."""
    sizes = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 264, "num_kv_shared_layers": 0}
    sizes |= {"intermediate_size": [48, 48, 96], "head_dim": 8}
    config = AutoConfig.for_model("gemma3n_text", **(SMALL | sizes))
    with pytest.raises(SpecMismatchError, match="differs from layer to layer"):
        AdapterSpec.from_config(config, "g", LoraConfig(target_modules=("down_proj",)))
    lora = LoraConfig(target_modules=("down_proj",), layers_to_transform=(0, 1))
    assert AdapterSpec.from_config(config, "g", lora).targets[0].in_features == 48


def test_read_only_folders_and_names_that_differ_in_case(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("Hotel", "hotel", "ho\u0301tel", "h\u00f3tel"):
        assert t2l("generate", TASKS[0], "-o", tmp_path / name, "--checkpoint", checkpoint).exit_code == 0
    (tmp_path / "shut").mkdir(mode=0o500)
    if os.geteuid():  # root may write anywhere
        failed(t2l("generate", TASKS[0], "-o", tmp_path / "shut" / "a", "--checkpoint", checkpoint), "Cannot write")
    shutil.rmtree(tmp_path / "shut")


# ------------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize(
    ("files", "words"), [((), "give the same command again"), (("config.json",), "go on with --resume")], ids=str
)
def test_ctrl_c_before_a_state_is_saved_says_how_to_begin_again(
    files: tuple[str, ...], words: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(settings: object, run: Path, **_: object) -> None:
        for name in files:
            run.mkdir()
            (run / name).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("t2l.train.sft.train", interrupted)
    (tmp_path / "own.yaml").write_text(f"base: {base}\ndata: {{tasks: own.jsonl}}\ntrain: {{max_steps: 4}}\n")
    result = t2l("train", "sft", "--config", tmp_path / "own.yaml", "--run", tmp_path / "run")
    assert (result.exit_code, f"interrupted before anything was saved; {words}" in result.stderr) == (130, True), (
        result.stderr
    )


@pytest.mark.parametrize(("best", "written"), [(0, False), (2, True)])
def test_ctrl_c_in_a_tuning_says_what_is_there(
    best: int, written: bool, base: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, examples = tmp_path / "out", tmp_path / "examples.jsonl"
    examples.write_text('{"input": "a", "output": "b"}\n' * 4)

    def interrupted(adapter: LoraAdapter, *_: object, **more: object) -> Tuned:
        return Tuned(adapter, (3.0, 2.0, 1.0), best, 3, True)

    monkeypatch.setattr("t2l.train.tune.tune", interrupted)
    result = t2l("tune", TASKS[0], "--examples", examples, "-o", out, "--checkpoint", checkpoint)
    assert (result.exit_code, out.exists(), "interrupted" in result.stderr) == (130, written, True)
    assert (f"t2l tune {out}" in result.stderr) == written


@pytest.mark.parametrize("command", [("export", "gguf"), ("export", "peft"), ("merge",)], ids=" ".join)
def test_adapters_for_other_programs_are_written_where_asked(
    command: tuple[str, ...], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that is full, or none of one's own, is not touched."""
    asked: list[object] = []

    def given(reference: str, *, device: object, base_reference: object) -> TextToLora:
        asked.append(device)
        raise DataError("enough")

    monkeypatch.setattr(TextToLora, "from_pretrained", given)
    where = ("-o", tmp_path / "out", "--checkpoint", checkpoint)
    failed(t2l(*command, TASKS[0], *where, "--device", "cpu"), "enough")
    failed(t2l(*command, TASKS[0], *where), "enough")
    assert asked == ["cpu", "auto"]
