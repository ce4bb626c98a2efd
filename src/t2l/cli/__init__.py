"""The command line. Commands stand in modules of their own; this one puts them together.

Knows every other module, but imports those that load torch only inside commands, so that `t2l --help` answers at
once. Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 failed (one line that
says why; T2L_DEBUG=1 shows the traceback), 2 wrong use, 130 interrupted.
"""

import errno
import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from t2l import __version__
from t2l.cli import adapters, compress, datasets, eval, export, importing, inspect, library, serve, train, tune
from t2l.cli.common import app, say

__all__ = [
    "adapters",
    "app",
    "compress",
    "datasets",
    "eval",
    "export",
    "importing",
    "inspect",
    "library",
    "main",
    "serve",
    "train",
    "tune",
]


def main() -> None:
    """Runs the command line."""
    # Read when torch is loaded. Its threads otherwise wait for one another in a loop, and where other programs want the
    # cores too, a step spends four times the work in these loops.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # an I has no dot in Turkish, where OpenMP would not know it
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what a stream's encoding lacks is shown as an escape
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app(prog_name="t2l")
        finally:
            if sys.stdout is not None:  # None where who called has closed it
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        written = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)
        if error.filename is not None or error.errno not in written:  # of a file the error would name it
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still held back cannot be written either
        if error.errno != errno.EPIPE:  # who reads the pipe has had enough
            say(f"error: Cannot write to standard output: {error.strerror}")
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"t2l {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Describe a task in plain language, get a LoRA adapter for a language model in one forward pass."""
