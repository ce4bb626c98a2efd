"""Runs Python that a model wrote: in a child process that sees and reaches next to nothing, and leaves nothing behind.

Linux only, with user, PID, mount, network, IPC and UTS namespaces; where the kernel refuses them nothing is run. What
holds is in the docstring of `run_python`. Knows processes. Knows no benchmarks, no models and no scores.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from t2l.errors import SandboxError

JAIL = Path(__file__).with_name("_jail.py")
PROCESSES = 8
"""Processes and threads at a time, two or three of which are the sandbox's own."""
DISK_BYTES = 32 << 20
KEPT_OUTPUT, MAX_OUTPUT = 1 << 16, 4 << 20
"""Bytes of output that are kept, and after which a program is stopped."""
SETUP_SECONDS = 30.0
"""For starting and ending the sandbox itself; only a machine that stands still takes that long."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    ok: bool
    """Whether it ran to its last line: no exception, no early exit, no limit reached."""
    reason: str
    """`ran to its end`, or what stopped it: an exception's last line, an exit, a signal, a limit."""
    output: str
    """The start of what it printed on both streams, tracebacks included."""


@functools.cache
def available() -> str | None:
    """None if code can be isolated here, otherwise the reason why not. Runs a program of one line to find out."""
    if sys.platform != "linux":
        return f"isolation needs Linux namespaces, and this is {sys.platform}"
    try:
        outcome = run_python("pass", allow=True)
    except SandboxError as error:
        return str(error)
    return None if outcome.ok else f"an empty program does not end well: {outcome.reason}. {outcome.output}".strip()


def run_python(code: str, *, timeout: float = 10.0, memory_bytes: int = 512 << 20, allow: bool = False) -> Outcome:
    """Runs a program in the sandbox until it ends or a limit ends it; then every process it started is dead.

    It has no network (no socket but AF_UNIX opens) and none of the caller's keyrings, sees no process but its own, and
    no file but Python's and the system's shared libraries (read-only). It writes in an empty folder in memory only,
    which is its working directory. Its environment holds a fixed hash seed, its input is empty. It has no privilege.

    Not hidden: the interpreter's path, its version and library, the kernel's version, the number of processors, the
    machine's load and the clock. Memory is limited for each of at most 8 processes, not for all together. The token
    that says "ran to its end" lies in the program's own memory: proof against accidents, not against a program made
    to find it.

    Args:
        code: A Python program; only the standard library can be imported.
        timeout: Seconds on the clock.
        memory_bytes: Address space of each process.
        allow: Whether the user agreed to run code that a model wrote.

    Returns:
        How it ended, and what it printed.

    Raises:
        SandboxError: if `allow` is false, or the sandbox cannot be built here; nothing was run then.
    """
    if not allow:
        raise SandboxError("Running code that a model wrote is off; allow it with --allow-code-execution (allow=True)")
    if not 0 < timeout < math.inf:
        raise SandboxError(f"timeout must be a positive number of seconds, got {timeout}")
    token = secrets.token_hex(16).encode()
    wanted = {
        "memory_bytes": memory_bytes,
        "disk_bytes": DISK_BYTES,
        "cpu_seconds": math.ceil(timeout) + 1,
        "processes": PROCESSES,
    }
    with contextlib.ExitStack() as stack:
        given = stack.enter_context(tempfile.TemporaryFile())
        given.write(token + code.encode("utf-8", "surrogatepass"))
        given.seek(0)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="t2l-sandbox-"))
        status, told = os.pipe()
        stack.callback(os.close, status)
        try:
            process = subprocess.Popen(
                _command(wanted | {"folder": folder, "status": told}),
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(told,),
                cwd=folder,
                env={},
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"Code cannot be isolated here: starting {sys.executable}: {error.strerror}") from error
        finally:
            os.close(told)
        stack.enter_context(process)
        stack.callback(_stop, process)
        return _follow(process, status, token, timeout)


def run_many(
    codes: Sequence[str],
    *,
    workers: int | None = None,
    allow: bool = False,
) -> list[Outcome]:
    """Runs programs, several at a time, each in its own sandbox; see `run_python`.

    Args:
        codes: The programs.
        workers: How many at a time; None means one for each processor, so that none waits for its time limit in vain.
        allow: Whether the user agreed to run code that a model wrote.

    Returns:
        Outcomes in the order of `codes`.

    Raises:
        SandboxError: as in `run_python`; programs that run by then are stopped by their limits.
    """

    def run(code: str) -> Outcome:
        return run_python(code, allow=allow)

    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))
    try:
        return list(pool.map(run, codes))
    finally:
        pool.shutdown(cancel_futures=True)


def _command(wanted: dict[str, object]) -> list[str]:
    return [sys.executable, "-I", "-S", "-B", str(JAIL), json.dumps(wanted)]


def _follow(process: subprocess.Popen[bytes], status: int, token: bytes, timeout: float) -> Outcome:
    """Reads what comes until the program ends or a limit is reached."""
    assert process.stdout is not None
    output, told = bytearray(), bytearray()
    printed, stopped = 0, ""
    deadline = time.monotonic() + SETUP_SECONDS
    started = False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(status, selectors.EVENT_READ)
        while selector.get_map() and not stopped:
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                data = os.read(key.fd, 1 << 16)
                if key.fd == status:
                    told += data
                else:
                    output += data[: KEPT_OUTPUT - len(output)]
                    printed += len(data)
                if not data or len(told) > KEPT_OUTPUT:
                    selector.unregister(key.fileobj)
            if not started and told.startswith(token):
                started, deadline = True, time.monotonic() + timeout
            if printed > MAX_OUTPUT:
                stopped = f"printed more than {MAX_OUTPUT >> 20} MiB"
            elif time.monotonic() >= deadline:
                stopped = f"timed out after {timeout:g} s"
    try:
        code = process.wait(0 if stopped else max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        code, stopped = 0, stopped or f"timed out after {timeout:g} s"
    text = output.decode("utf-8", errors="replace")
    if not started:
        why = told.decode("utf-8", errors="replace") or text or stopped or f"exit code {code}"
        raise SandboxError(
            f"Code cannot be isolated here, so it is not run: {' '.join(why.split())[:500]}. The system must allow "
            "user namespaces (in a container: --security-opt seccomp=unconfined; on Ubuntu: "
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0)"
        )
    ending = bytes(told[len(token) :])
    if ending.startswith(token):
        said = ending[len(token) :].decode("utf-8", errors="replace")
        return Outcome(not said, said or "ran to its end", text)
    return Outcome(False, stopped or _early(code), text)


def _early(code: int) -> str:
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(code - 128).name}"
    return f"ended early with exit code {code}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the sandbox, and returns when nothing in it is alive."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(SETUP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
