"""Writes docs/cli.md from the code, `python scripts/cli_reference.py`; a test compares the two."""

import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
NOTE = """
Written from the code by `python scripts/cli_reference.py`. Results go to standard output, all else to standard error.
Exit codes: 0 done, 1 failed (one line says why; `T2L_DEBUG=1` shows the traceback), 2 wrong use, 130 interrupted.
"""


def page() -> str:
    """What Typer writes of the app, with a note on top and without the `--help` of every command."""
    command = [sys.executable, "-m", "typer", "t2l.cli", "utils", "docs", "--name", "t2l", "--title", "Command line"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    lines = [line for line in lines if not line.startswith("* `--help`")]
    return "\n".join([lines[0], NOTE.rstrip(), *lines[1:]]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
