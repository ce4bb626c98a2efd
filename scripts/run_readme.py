"""Runs the commands of README.md's transcript and writes what they print under them: `python scripts/run_readme.py`."""

import contextlib
import re
import shlex
import tempfile
from pathlib import Path

from typer.testing import CliRunner

from t2l.cli import app

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)
WIDTH = 100


def run(block: str) -> str:
    """A transcript anew: each line that starts with `$ t2l`, and what it prints on standard output.

    Raises:
        RuntimeError: with the output, if a command fails.
    """
    shown = []
    for line in block.splitlines():
        if not line.startswith("$ t2l "):
            continue
        result = CliRunner(env={"COLUMNS": str(WIDTH)}).invoke(app, shlex.split(line.removeprefix("$ t2l ")))
        if result.exit_code:
            raise RuntimeError(f"{line} ended with {result.exit_code}:\n{result.output}{result.exception or ''}")
        shown += [line, *result.stdout.rstrip().splitlines()]
    return "\n".join(shown) + "\n"


def fresh(text: str) -> str:
    """The README with its transcripts made anew, all in one folder that was empty before."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return BLOCK.sub(lambda block: run(block[0]), text)


if __name__ == "__main__":
    README.write_text(fresh(README.read_text(encoding="utf-8")), encoding="utf-8")
