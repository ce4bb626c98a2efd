"""`t2l generate`, `run`, `train` and `inspect` on a tiny base and a tiny checkpoint made here."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from cli_helpers import TASKS, failed, t2l, write_base, write_checkpoint

from t2l import text_to_lora
from t2l.lora import LoraTensors
from t2l.peft_io import load_adapter
from t2l.session import Session
from t2l.spec import AdapterSpec


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("cli") / "base", 32, seed=0)


@pytest.fixture(scope="module")
def checkpoint(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "checkpoint", small_base)


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "adapter"
    assert t2l("generate", TASKS[0], "-o", folder, "--checkpoint", checkpoint).exit_code == 0
    return folder


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


# --------------------------------------------------------------------------------------------------- generate


def test_one_description_is_one_folder(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "adapter"
    result = t2l("generate", TASKS[0], "-o", out, "--checkpoint", checkpoint, "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["adapters"] == [{"path": str(out), "description": TASKS[0]}]
    assert document["load_seconds"] > 0
    assert document["peak_memory_bytes"] > 1 << 20
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "t2l.json",
    ]
    assert list(out.parent.iterdir()) == [out]


def test_many_descriptions_from_a_file_are_one_batch(
    checkpoint: Path, adapter: Path, small_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "tasks.txt").write_text("\ufeff" + "\n\n".join(TASKS) + "\n  \n", encoding="utf-8")
    out = tmp_path / "out"
    result = t2l("generate", "--from-file", tmp_path / "tasks.txt", "-o", out, "--checkpoint", checkpoint)
    assert result.exit_code == 0, result.output
    names = ["000-say-whether-the-text-is-about-rain", "001-write-the-opposite-of-the-word", "002-name-the-city"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        [str(out / name), text] for name, text in zip(names, TASKS, strict=True)
    ]
    assert "3 adapter(s)" in result.stderr
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {out.stat().st_mode & 0o777}
    spec = AdapterSpec.from_json((checkpoint / "spec.json").read_text())
    alone, batched = load_adapter(adapter, spec), load_adapter(out / names[0], spec)
    for one, other in zip((*alone.a, *alone.b), (*batched.a, *batched.b), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

    again = ["generate", *TASKS[:2], "-o", out, "--checkpoint", checkpoint]
    failed(t2l(*again), "exists already")
    assert t2l(*again, "--overwrite").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == names[:2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tasks.txt"]


def test_standard_input_with_one_line_is_still_a_list(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("generate", "--from-file", "-", "-o", tmp_path / "out", "--checkpoint", checkpoint, "--json")
    result = t2l(*arguments, stdin="Übersetze ins Englische.\n")
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)["adapters"]
    assert entry["path"] == str(tmp_path / "out" / "000-bersetze-ins-englische")


@pytest.mark.parametrize(
    ("texts", "part"),
    [
        ([""], "empty"),
        (["Fine.", " \n\t"], "white space"),
        (["x" * 100_000], "100,000 bytes"),
        (["word " * 200], "tokens"),
        (["caf\udce9"], "not valid UTF-8"),
    ],
)
def test_bad_descriptions_write_nothing(texts: list[str], part: str, checkpoint: Path, tmp_path: Path) -> None:
    failed(t2l("generate", *texts, "-o", tmp_path / "out", "--checkpoint", checkpoint), part)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("data", "part"), [(b"Fine.\ncaf\xe9\n", "line 2"), (b"\n \n", "blank"), (b"", "blank")])
def test_bad_files_write_nothing(data: bytes, part: str, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("generate", "--from-file", "-", "-o", tmp_path / "out", "--checkpoint", checkpoint)
    failed(t2l(*arguments, stdin=data), part)
    assert list(tmp_path.iterdir()) == []


def test_raw_bytes_on_the_command_line(tmp_path: Path) -> None:
    given = b"caf\xe9".decode("utf-8", "surrogateescape")  # as the interpreter reads arguments
    done = programs.run(["-m", "t2l", "generate", given, "-o", str(tmp_path / "out")])
    assert done.returncode == 1
    assert "not valid UTF-8" in done.stderr
    assert "Traceback" not in done.stderr


def test_places_that_cannot_be_written_fail_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object, **more: object) -> None:
        raise AssertionError("the checkpoint was loaded")

    monkeypatch.setattr(text_to_lora.TextToLora, "from_pretrained", load)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "letter.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "documents")
    write = ("generate", "A task.", "-o")
    failed(t2l(*write, tmp_path / "file"), "exists already")
    failed(t2l(*write, tmp_path / "file", "--overwrite"), "is a file")
    failed(t2l(*write, tmp_path / "file" / "inside"), "Cannot write")
    failed(t2l(*write, tmp_path / "documents"), "exists already")
    failed(t2l(*write, tmp_path / "documents", "--overwrite"), "letter.txt")
    failed(t2l(*write, tmp_path / "link", "--overwrite"), "symbolic link")
    failed(t2l(*write, tmp_path / ("x" * 300)), "Cannot write")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        failed(t2l(*write, tmp_path / "locked" / "out"), "Permission denied")
        (tmp_path / "locked").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "file", "link"]


def test_all_or_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from t2l.errors import OutputError

    save = text_to_lora.LoraAdapter.save_pretrained

    def full_disk(self: text_to_lora.LoraAdapter, folder: Path, **options: Any) -> Path:
        if self.description == TASKS[2]:
            raise OutputError("No space left on device")
        return save(self, folder, **options)

    monkeypatch.setattr(text_to_lora.LoraAdapter, "save_pretrained", full_disk)
    failed(t2l("generate", *TASKS, "-o", tmp_path / "out", "--checkpoint", checkpoint), "No space left")
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoints(copied: Path, tmp_path: Path) -> None:
    write = ("generate", "A task.", "-o", tmp_path / "out", "--checkpoint", copied)
    weights = copied / "hypernet.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    failed(t2l(*write), "damaged")
    assert t2l("inspect", copied).exit_code == 1
    torch.save({"weight": torch.zeros(1)}, weights)
    failed(t2l(*write), "pickle")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    failed(t2l(*write), "sha256")
    weights.unlink()
    failed(t2l(*write), "missing")
    failed(t2l("inspect", copied), "is not a checkpoint (hypernet.safetensors)", "it holds README.md, config.json")
    failed(t2l("generate", "A task.", "-o", tmp_path / "out", "--checkpoint", "t2l:unknown"), "t2l:unknown")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------- run


def test_run_prints_base_and_adapted_answers(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "inputs.txt").write_text("second\n\nthird\n")
    arguments = ("run", TASKS[0], "--input", "first", "--input-file", tmp_path / "inputs.txt", "--max-new-tokens", "6")
    result = t2l(*arguments, "--checkpoint", checkpoint, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [row["input"] for row in document["answers"]] == ["first", "second", "third"]
    assert document["largest_logit_change"] > 0
    assert document["description_in_prompt"] is True
    for row in document["answers"]:
        assert row["prompt"] == f"<s>{TASKS[0]}\n\n{row['input']}\n\n"
    assert any(row["base"] != row["adapted"] for row in document["answers"])

    bare = t2l(*arguments, "--checkpoint", checkpoint, "--json", "--no-description-in-prompt")
    document = json.loads(bare.stdout)
    assert document["description_in_prompt"] is False
    assert [row["prompt"] for row in document["answers"]] == [f"<s>{x}\n\n" for x in ("first", "second", "third")]

    plain = t2l(*arguments, "--checkpoint", checkpoint)
    assert plain.exit_code == 0
    assert plain.stdout.count("Base     ") == plain.stdout.count("Adapted  ") == 3


def test_run_streams_the_same_answers(
    checkpoint: Path, adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(str(checkpoint), description=TASKS[0], adapter=adapter)
    (prompt,) = session.prompts(["first"], 6)
    with session.adapted():
        (whole,) = session.answer([prompt], 6)
        session.stream(prompt, 6)
    assert capsys.readouterr().out.rstrip() == whole

    def spaced(tokens: Any, number: int, *, streamer: Any) -> None:
        """An answer that begins with a space, as some checkpoints' do."""
        streamer.put(tokens["input_ids"])
        for token in session.tokenizer("  a b", add_special_tokens=False).input_ids:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(session, "_generate", spaced)
    session.stream(prompt, 6)
    assert capsys.readouterr().out == "a b\n"


def test_run_with_a_saved_adapter(checkpoint: Path, adapter: Path) -> None:
    arguments = ("--input", "first", "--max-new-tokens", "6", "--checkpoint", checkpoint, "--json")
    generated = json.loads(t2l("run", TASKS[0], *arguments).stdout)
    result = t2l("run", "--adapter", adapter, *arguments)  # the card has the description
    assert result.exit_code == 0, result.output
    saved = json.loads(result.stdout)
    assert saved["description"] == TASKS[0]
    assert saved["answers"] == generated["answers"]


def test_run_uses_an_adapter_on_the_base_that_it_is_for(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever the checkpoint's base is; and where that base cannot be had, or the folder is not sound, it says so."""
    base = write_base(tmp_path / "base", 48, seed=1)
    other = write_checkpoint(tmp_path / "checkpoint", base)
    assert t2l("generate", "A task.", "-o", tmp_path / "other", "--checkpoint", other).exit_code == 0
    run = ("run", "--adapter", tmp_path / "other", "--input", "x", "--max-new-tokens", "4", "--json", "--checkpoint")
    answers = [json.loads(t2l(*run, place).stdout)["answers"] for place in (checkpoint, other)]
    assert answers[0] == answers[1] and answers[0][0]["base"] != answers[0][0]["adapted"]
    shutil.rmtree(base)
    failed(t2l(*run, checkpoint), "There is no folder", str(base))
    config = tmp_path / "other" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 16}))
    failed(t2l(*run, checkpoint), "rank 4 in A and 4 in B", "says 16")
    failed(t2l("run", "A task.", "--adapter", tmp_path / "absent", "--input", "x"), "There is no folder")


def test_run_says_so_if_the_adapter_changes_nothing(small_base: Path, tmp_path: Path) -> None:
    fresh = write_checkpoint(tmp_path / "fresh", small_base, trained=False)
    failed(t2l("run", TASKS[0], "--input", "x", "--checkpoint", fresh), "changes the base model's answers in nothing")


def test_run_refuses_bad_inputs(checkpoint: Path) -> None:
    run = ("run", TASKS[0], "--checkpoint", checkpoint, "--input")
    failed(t2l(*run, " "), "blank")
    failed(t2l(*run, "caf\udce9"), "UTF-8")
    failed(t2l(*run, "x" * 600), "at most 512")


def test_another_base_than_the_one_trained_on_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", 32, seed=2)
    own = write_checkpoint(tmp_path / "checkpoint", base)
    shutil.rmtree(base)
    write_base(base, 32, seed=3)
    failed(t2l("run", TASKS[0], "--input", "x", "--checkpoint", own), "was trained with")
    failed(t2l("generate", TASKS[0], "-o", tmp_path / "out", "--checkpoint", own), "was trained with")


# ---------------------------------------------------------------------------------------------- train, inspect


def test_train_writes_a_checkpoint_that_generates(small_base: Path, tmp_path: Path) -> None:
    rows = [
        {"task": task, "description": text, "input": word, "output": answer}
        for task, text, answer in (("one", TASKS[0], "yes"), ("two", TASKS[1], "no"))
        for word in ("dark", "light", "dry", "wet")
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(
        f"base: {small_base}\nencoder: {{kind: tokens, model: base, layers: [1, 2], max_tokens: 128}}\n"
        "hypernet: {width: 16, head_size: 16, token_blocks: 1, attention_heads: 2}\n"
        f"data: {{tasks: {tmp_path / 'tasks.jsonl'}}}\n"
        "train: {max_steps: 5, tasks_per_batch: 2, max_seq_length: 96, max_target_length: 16, logging_steps: 1}\n"
    )
    train = ("train", "sft", "--config", tmp_path / "config.yaml", "--run", tmp_path / "run", "--device", "cpu")
    failed(t2l(*train, "--set", "train.max_stepz=2"), "did you mean 'max_steps'")
    failed(t2l(*train, "--set", "train.max_steps"), "section.key=value")
    assert not (tmp_path / "run").exists()
    result = t2l(*train, "--set", "train.max_steps=2", "--json")
    assert result.exit_code == 0, result.output
    folder = Path(json.loads(result.stdout)["checkpoint"])
    assert folder == tmp_path / "run" / "checkpoint"
    assert "loss" in result.stderr
    assert t2l("generate", TASKS[0], "-o", tmp_path / "out", "--checkpoint", folder).exit_code == 0
    failed(t2l(*train, "--set", "train.max_steps=2"), "not empty")
    failed(t2l(*train, "--set", "train.max_steps=2", "--resume"), "is finished")
    (tmp_path / "file").write_text("mine")
    failed(t2l(*train[:4], "--run", tmp_path / "file"), "Cannot write")


def test_inspect_a_checkpoint(checkpoint: Path, small_base: Path) -> None:
    result = t2l("inspect", checkpoint, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["kind"] == "checkpoint"
    assert report["base_model"] == str(small_base)
    assert report["targets"] == {"q_proj": "32 x 32", "v_proj": "32 x 16"}
    assert report["sha256_ok"] is True
    assert report["needs_base_weights_to_generate"] is True
    assert report["description_in_prompt"] is True
    assert report["hypernet"]["variant"] == "L"
    assert report["hypernet_parameters"] > 1000
    assert report["training"] == {"seed": 7, "steps": 3}
    assert re.search(r"sha256 ok +yes", t2l("inspect", checkpoint).stdout)


def test_inspect_a_changed_checkpoint_reports_and_fails(copied: Path) -> None:
    weights = copied / "hypernet.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    result = t2l("inspect", copied, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["sha256_ok"] is False
    assert "fetch it again" in result.stderr


def test_inspect_an_adapter(checkpoint: Path, adapter: Path) -> None:
    result = t2l("inspect", adapter, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    spec = AdapterSpec.from_json((checkpoint / "spec.json").read_text())
    lora: LoraTensors = load_adapter(adapter, spec)
    assert report["description"] == TASKS[0]
    assert report["targets"] == {"q_proj": "32 x 32", "v_proj": "32 x 16"}
    assert (report["rank"], report["scaling"], report["layers"]) == (4, 2.0, 2)
    assert report["adapter_parameters"] == spec.num_parameters
    dense = lora.delta(1).flatten(1).norm(dim=1)
    assert report["norm_of_update_over_layers"]["v_proj"]["mean"] == pytest.approx(float(dense.mean()), rel=1e-4)


def test_inspect_refuses_nan_and_other_folders(adapter: Path, small_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    damaged = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    state = load_file(damaged / "adapter_model.safetensors")
    next(iter(state.values()))[0, 0] = torch.nan
    save_file(state, damaged / "adapter_model.safetensors")
    failed(t2l("inspect", damaged), "NaN")
    failed(t2l("inspect", small_base), "is a model, and a checkpoint (hypernet.safetensors) or a LoRA adapter")
    failed(t2l("inspect", tmp_path / "absent"), "There is no folder")
