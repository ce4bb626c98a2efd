"""Other locales, encodings and time zones: the command line writes the same bytes, and prints what a stream can hold.

Python's own texts do not depend on the locale; files that are opened without an encoding, what is printed where only
ASCII can be, arguments in another encoding, and times do. No connection opens meanwhile, and nobody is warned.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest

DESCRIPTION = "Résumé: “İstanbul” in GROẞ letters, ı and I – 中文 🙂"
COMMANDS = """
import errno, json, locale, os, sys, time
from contextlib import suppress
time.tzset()
def no_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")
sys.addaudithook(no_network)
with suppress(locale.Error):
    locale.setlocale(locale.LC_ALL, "")  # as programs do that show numbers as their users write them
from t2l import cli
checkpoint, tasks, description = sys.argv[1:]
base = ["--checkpoint", checkpoint]
for arguments in (
    ["generate", description, *base, "-o", "adapter"],
    ["eval", "run", "--suite", tasks, *base, "--conditions", "base+description,t2l", "--max-new-tokens", "4",
     "--device", "cpu", "--out", "answers.jsonl"],
    ["eval", "report", "answers.jsonl", "--without-controls"],
    ["eval", "report", "answers.jsonl", "--without-controls", "--out", "report.md", "--out", "report.html"],
    ["inspect", "adapter"],
    ["inspect", "adapter", "--json"],
    ["generate", "", *base, "-o", "none"],
    ["generate", "Add.", "--checkpoint", "nobody/nothing", "-o", "none"],
):
    sys.argv = ["t2l", *arguments]
    print("$", arguments[0], flush=True)
    print("$", arguments[0], file=sys.stderr, flush=True)
    try:
        cli.main()
    except SystemExit as end:
        print("exit", end.code, flush=True)
"""
Run = Callable[..., tuple[str, dict[str, bytes]]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "task": name,
            "description": [f"{name}: {DESCRIPTION}"],
            "input": f"Iıİi {n} – é",
            "output": "İ",
            "split": split,
        }
        for name in ("büyük", "küçük")
        for split in ("test", "train")
        for n in range(3)
    ]
    path = tmp_path_factory.mktemp("tasks") / "words.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def commands(
    make_checkpoint: Callable[..., Path], sentence_folder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Runs the commands above as one program in an environment; what it printed, and the files that it wrote."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "t2l", encoder=str(sentence_folder))

    def run(encoding: str = "utf-8", *, forked: bool = False, **environment: str) -> tuple[str, dict[str, bytes]]:
        folder = tmp_path_factory.mktemp("work")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))}
        own = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HOME": str(folder.parent / "hub")}
        given = ["-c", COMMANDS, str(checkpoint), str(tasks), DESCRIPTION]
        options: Any = {"env": kept | own | environment, "cwd": folder, "timeout": 240}
        if forked:
            done = programs.run(given, **options)
        else:
            done = subprocess.run([sys.executable, *given], capture_output=True, encoding=encoding, **options)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
        generate = done.stderr.partition("$ generate\n")[2].partition("$ ")[0]
        assert len(generate.splitlines()) == 1 and "Warning" not in done.stderr, done.stderr
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return done.stdout, files

    return run


@pytest.fixture(scope="module")
def usual(commands: Run) -> tuple[str, dict[str, bytes]]:
    found = commands(forked=True, LC_ALL="C.UTF-8", TZ="UTC")
    assert DESCRIPTION in found[0] and found[0].endswith("exit 1\n")
    assert {"answers.jsonl", "report.md", "report.html", "adapter/README.md"} <= found[1].keys()
    return found


@pytest.fixture(scope="session")
def locales(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where locales are that this machine may lack."""
    compiler = shutil.which("localedef")
    if compiler is None or not Path("/usr/share/i18n/locales/tr_TR").exists():
        pytest.skip("localedef or its sources are not here")
    folder = tmp_path_factory.mktemp("locales")
    for name, charset in (("tr_TR", "ISO-8859-9"), ("tr_TR", "UTF-8"), ("de_DE", "UTF-8")):
        subprocess.run([compiler, "-i", name, "-f", charset, str(folder / f"{name}.{charset}")], capture_output=True)
    return str(folder)


def test_ascii_alone_and_the_earliest_time_zone(commands: Run, usual: tuple[str, dict[str, bytes]]) -> None:
    """Nothing but ASCII can be printed, and the description comes as bytes that are none of it."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    said, files = commands("ascii", TZ="Pacific/Kiritimati", **plain)
    assert files == usual[1]
    escaped = usual[0].encode("ascii", "backslashreplace").decode()
    # JSON has escapes of its own, which programs read.
    whole = said.index("{"), said.rindex("}") + 1
    there = usual[0].index("{"), usual[0].rindex("}") + 1
    assert json.loads(said[slice(*whole)]) == json.loads(usual[0][slice(*there)])
    assert said[: whole[0]] == escaped[: escaped.index("{")] and said[whole[1] :] == usual[0][there[1] :]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("locale", "zone"),
    [("de_DE.UTF-8", "America/St_Johns"), ("tr_TR.UTF-8", "Asia/Kathmandu"), ("C.UTF-8", "Etc/GMT+12")],
)
def test_other_languages_and_time_zones_write_and_print_the_same(
    locale: str, zone: str, locales: str, commands: Run, usual: tuple[str, dict[str, bytes]]
) -> None:
    """Where decimals are commas, where a small I has no dot, where the day is another one."""
    assert commands(LC_ALL=locale, TZ=zone, LOCPATH=locales) == usual


@pytest.mark.slow
def test_an_encoding_of_eight_bits_writes_the_same(
    locales: str, commands: Run, usual: tuple[str, dict[str, bytes]]
) -> None:
    _, files = commands("iso-8859-9", LC_ALL="tr_TR.ISO-8859-9", LOCPATH=locales, PYTHONUTF8="0")
    there = usual[1]
    # What was given on the command line was in that encoding; what files hold is UTF-8 everywhere.
    assert files.keys() == there.keys()
    same = [name for name in files if not name.startswith("adapter/")]
    assert {name: files[name] for name in same} == {name: there[name] for name in same}
