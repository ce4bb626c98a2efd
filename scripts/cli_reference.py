"""Writes docs/cli.md from the code, `python scripts/cli_reference.py`; a test compares the two."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
NOTE = """
Written from the code by `python scripts/cli_reference.py`. Results go to standard output, all else to standard error.
Exit codes: 0 done, 1 failed (one line says why; `T2L_DEBUG=1` shows the traceback), 2 wrong use, 130 interrupted.
"""


def with_whole_sentences(lines: list[str]) -> Iterator[str]:
    """The lists of commands, which Typer cuts off, with the first line of each command's own section."""
    sections = re.findall(r"^#+ `(t2l .+)`\n\n(.+)$", "\n".join(lines), re.MULTILINE)
    said, group, listed = dict(sections), "t2l", False
    for line in lines:
        if heading := re.fullmatch(r"#+ `(t2l .+)`", line):
            group, listed = heading[1], False
        listed = listed or line == "**Commands**:"
        item = re.match(r"\* `([\w-]+)`: ", line)
        yield f"{item[0]}{said[f'{group} {item[1]}']}" if listed and item else line


def page() -> str:
    """What Typer writes of the app, with a note on top and without the `--help` of every command."""
    command = [sys.executable, "-m", "typer", "t2l.cli", "utils", "docs", "--name", "t2l", "--title", "Command line"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    lines = [line for line in with_whole_sentences(lines) if not line.startswith("* `--help`")]
    return "\n".join([lines[0], NOTE.rstrip(), *lines[1:]]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
