"""Python programs in processes of their own that need not load torch and Transformers, which takes four seconds each.

One process for each worker of pytest has loaded them, and nothing of this library; every program is a fork of it. Where
the interpreter's own start is tested (its options, the locale, the seed of hashes), or what a program loads, a test
starts one with `subprocess`.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

PACKAGES = [
    "torch._dynamo", "peft", "accelerate", "fastapi", "uvicorn", "openai", "typer",
    "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert",
]  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PACKAGES)


class _Stream:
    """An open file, which arrives in another process as the number that it has there."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _number_of, (DupFd(self.number),)


def _number_of(passed: Any) -> int:
    return int(passed.detach())


def _become(arguments: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """Goes on as `python ARGUMENTS`: `-c CODE`, `-m MODULE` or a file, and what the program is given."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    # Those that there are know what the numbers stood for before: whether one can seek in it, say.
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if "OMP_NUM_THREADS" in environment:  # which OpenMP has read already
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    first, *rest = arguments
    sys.argv = [first, *rest[1:]] if first == "-c" else rest if first == "-m" else arguments
    if first == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


class Program:
    """A program that runs, with as much of `subprocess.Popen` as the tests use.

    Streams are those of the tests if none is given, an open file, or a pipe by `subprocess.PIPE`.
    """

    stdin: Any = None
    stdout: Any = None
    stderr: Any = None

    def __init__(
        self, arguments: list[str], *, env: dict[str, str] | None = None, cwd: Path | None = None, **streams: Any
    ) -> None:
        passed, pipes = [], []
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            given = streams.pop(name, None)
            if given == subprocess.PIPE:
                ends = reading, writing = os.pipe()
                setattr(self, name, os.fdopen(writing, "w") if number == 0 else os.fdopen(reading))
                given = ends[number > 0]
                pipes.append(given)
            passed.append(_Stream(number if given is None else given if isinstance(given, int) else given.fileno()))
        assert not streams
        became = list(map(str, arguments)), dict(os.environ if env is None else env), str(cwd or Path.cwd()), passed
        self.process = CONTEXT.Process(target=_become, args=became, daemon=True)
        self.process.start()
        for pipe in pipes:
            os.close(pipe)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in filter(None, (self.stdin, self.stdout, self.stderr)):
            stream.close()
        self.wait()

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("the program", timeout or 0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.process.pid or 0, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(arguments: list[str], *, timeout: float | None = None, **options: Any) -> "subprocess.CompletedProcess[str]":
    """As `subprocess.run` with what the program says as text."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        program = Program(arguments, stdout=out, stderr=err, **options)
        try:
            code = program.wait(timeout)
        finally:
            program.kill()
        said = [(stream.seek(0), stream.read())[1] for stream in (out, err)]
    return subprocess.CompletedProcess(arguments, code, *said)
