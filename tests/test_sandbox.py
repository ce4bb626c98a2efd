"""Code of a model: how a program ends, hostile ones among them, and that it leaves nothing."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_helpers import isolated, run

from t2l.errors import SandboxError
from t2l.eval import sandbox

SOURCE = Path(sandbox.__file__).parents[2]


class Marked:
    """Programs that call themselves by a name that can be seen from outside, as can their forks."""

    def __init__(self) -> None:
        self.name = f"t2l{os.getpid() % 10**6}{time.monotonic_ns() % 10**5}"[:15]
        self.code = f"import ctypes; ctypes.CDLL(None).prctl(15, b'{self.name}')\n"

    def alive(self) -> int:
        found = 0
        for path in Path("/proc").glob("[0-9]*/comm"):
            try:
                found += path.read_text().strip() == self.name
            except OSError:
                continue
        return found

    def most_while(self, code: str, *, timeout: float) -> tuple[sandbox.Outcome, int]:
        """Runs a program; also the most of its processes seen at once."""
        seen: list[int] = []
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                seen.append(self.alive())
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            outcome = run(self.code + textwrap.dedent(code), timeout=timeout)
        finally:
            done.set()
            watcher.join()
        return outcome, max(seen)


@pytest.fixture
def marked() -> Iterator[Marked]:
    marked = Marked()
    yield marked
    assert marked.alive() == 0, "processes of a program outlived it"


# ------------------------------------------------------------------------------------------------ how a run ends


def test_off_unless_allowed() -> None:
    with pytest.raises(SandboxError, match="--allow-code-execution"):
        sandbox.run_python("pass")
    with pytest.raises(SandboxError, match="--allow-code-execution"):
        sandbox.run_many(["pass"])


@isolated
def test_a_program_runs_to_its_end() -> None:
    outcome = run("print('hällo')\nimport sys; print('err', file=sys.stderr)")
    assert outcome == sandbox.Outcome(True, "ran to its end", "hällo\nerr\n")


@isolated
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two"),
        ("x = (", "SyntaxError: '(' was never closed"),
        ("import os; os._exit(0)", "ended early with exit code 0"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import os; os.closerange(0, 99); os._exit(3)", "ended early with exit code 3"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("class E(Exception):\n def __str__(self): raise ValueError\nraise E", "program.E: <exception str() failed>"),
        ("'\ud800'", "UnicodeEncodeError"),
    ],
)
def test_only_the_last_line_is_success(code: str, reason: str) -> None:
    outcome = run(code)
    assert not outcome.ok
    assert outcome.reason.startswith(reason)


@isolated
def test_a_program_is_a_module_of_its_own() -> None:
    code = """
    from __future__ import annotations
    from dataclasses import dataclass
    @dataclass
    class Point:
        x: int
    assert Point(1).x == 1
    if __name__ == "__main__":
        raise SystemExit("the benchmarks do not run this")
    """
    assert run(code).ok


@isolated
def test_hashes_are_the_same_in_every_run() -> None:
    assert len({run("print(hash('a'), list({'a', 'b', 'c', 'd'}))").output for _ in range(3)}) == 1


# ------------------------------------------------------------------------------------------------ hostile programs


@isolated
@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_endless(marked: Marked, code: str) -> None:
    start = time.monotonic()
    outcome = run(marked.code + code, timeout=0.6)
    assert (outcome.ok, outcome.reason) == (False, "timed out after 0.6 s")
    assert time.monotonic() - start < 4


@isolated
def test_deaf_to_signals_and_out_of_sight(marked: Marked) -> None:
    code = """
    import os, signal, time
    for number in range(1, 32):
        if number not in (9, 19):
            signal.signal(number, signal.SIG_IGN)
    os.setsid() if os.fork() == 0 else None
    os.closerange(0, 99)
    while True: time.sleep(1)
    """
    assert run(marked.code + textwrap.dedent(code), timeout=0.6).reason == "timed out after 0.6 s"


@isolated
def test_a_bounded_fork_bomb_is_stopped_at_the_limit(marked: Marked) -> None:
    code = """
    import os, time
    for started in range(40):
        try:
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
        except BlockingIOError:
            print(started)
            break
    """
    outcome, most = marked.most_while(code + "\n    time.sleep(0.3)", timeout=5)
    assert outcome.ok
    assert 1 <= int(outcome.output) <= sandbox.PROCESSES
    assert 1 < most <= sandbox.PROCESSES


@isolated
def test_a_fork_bomb(marked: Marked) -> None:
    code = """
    import os
    while True:
        try: os.fork()
        except OSError: pass
    """
    outcome, most = marked.most_while(code, timeout=1)
    assert outcome.reason == "timed out after 1 s"
    assert 1 < most <= sandbox.PROCESSES


@isolated
def test_threads_count_as_processes() -> None:
    code = """
    import threading, time
    for _ in range(40):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    """
    assert run(code).reason == "RuntimeError: can't start new thread"


@isolated
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output(stream: str) -> None:
    outcome = run(f"import sys\nwhile True: sys.{stream}.write('x' * 4096)", timeout=20)
    assert outcome.reason == f"printed more than {sandbox.MAX_OUTPUT >> 20} MiB"
    assert len(outcome.output) == sandbox.KEPT_OUTPUT


@isolated
def test_much_output_is_no_failure() -> None:
    outcome = run("for _ in range(2000): print('x' * 999)\nprint('end')")
    assert outcome.ok
    assert len(outcome.output) == sandbox.KEPT_OUTPUT


@isolated
def test_status_channel_filled_by_the_program() -> None:
    outcome = run("import os\nfor _ in range(100): os.write(3, b'0' * 4096)", timeout=1)
    assert not outcome.ok


@isolated
def test_memory_hog() -> None:
    hog = "kept = [bytearray(1 << 20) for _ in range(1000)]"
    assert run(hog, memory_bytes=256 << 20).reason == "MemoryError"
    assert run("kept = [bytearray(1 << 20) for _ in range(100)]", memory_bytes=256 << 20).ok


@isolated
def test_disk_hog() -> None:
    outcome = run("for i in range(100):\n  with open(f'{i}', 'wb') as file: file.write(bytes(1 << 20))")
    assert "No space left" in outcome.reason
    assert "File too large" in run("open('big', 'wb').write(bytes(100 << 20))").reason
    assert "No space left" in run("for i in range(5000): open(f'{i}', 'w').close()").reason


@isolated
def test_background_children_do_not_stay(marked: Marked) -> None:
    code = """
    import os, subprocess, sys, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(99):
                try: os.close(number)
                except OSError: pass
            time.sleep(60)
        os._exit(0)
    subprocess.Popen([sys.executable, "-S", "-c", MARK + "import time; time.sleep(60)"], start_new_session=True)
    time.sleep(0.2)
    """
    outcome, most = marked.most_while(code.replace("MARK", repr(marked.code)), timeout=10)
    assert outcome.ok, outcome.output
    assert most >= 3
    assert marked.alive() == 0


@isolated
def test_nobody_outside_can_be_killed(marked: Marked) -> None:
    code = """
    import os, signal
    for pid in (os.getppid(), 1, PID, -PID):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            try: os.kill(pid, number)
            except ProcessLookupError: pass
    print("still here", os.getpid(), os.getppid())
    """
    outcome = run(code.replace("PID", str(os.getpid())))
    assert (outcome.ok, outcome.output) == (True, "still here 2 1\n")


@isolated
def test_everything_dies_with_the_caller(marked: Marked, tmp_path: Path) -> None:
    code = marked.code + "import os, time\nos.fork()\ntime.sleep(60)"
    caller = f"from t2l.eval import sandbox\nsandbox.run_python({code!r}, timeout=50, allow=True)"
    # A killed caller cannot tidy its folder away, which is empty.
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", caller], env=environment)
    try:
        _until(lambda: marked.alive() == 2)
    finally:
        process.kill()
        process.wait()
    _until(lambda: marked.alive() == 0)


def _until(true: object, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@isolated
def test_interrupting_the_caller_ends_the_program(marked: Marked, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        _until(lambda: marked.alive() == 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "_follow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(marked.code + "import time; time.sleep(60)")


# ------------------------------------------------------------------------------------------------ many, and nowhere


@isolated
def test_many_at_a_time_in_order(marked: Marked) -> None:
    codes = [f"{marked.code}print({i}); assert {i} % 3" for i in range(12)] + ["import time; time.sleep(0.5)"] * 4
    start = time.monotonic()
    outcomes = sandbox.run_many(codes, workers=4, allow=True)
    assert time.monotonic() - start < 6
    assert [outcome.ok for outcome in outcomes] == [i % 3 != 0 for i in range(12)] + [True] * 4
    assert [outcome.output.splitlines()[0] for outcome in outcomes[:12]] == [str(i) for i in range(12)]
    assert sandbox.run_many([], allow=True) == []


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_limit_must_be_one(timeout: float) -> None:
    with pytest.raises(SandboxError, match="timeout must be a positive number"):
        run("pass", timeout=timeout)


@isolated
def test_refused_where_the_kernel_refuses() -> None:
    """In a user namespace that allows no further one, as in many containers."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare(1) is not installed")
    code = (
        "from t2l.eval import sandbox\nprint(sandbox.available())\n"
        "try: sandbox.run_python('print(1)', allow=True)\nexcept Exception as error: print(type(error).__name__)"
    )
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    command = ["unshare", "--user", "--keep-caps", "sh", "-c", shell, sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SOURCE)})
    if "max_user_namespaces" in done.stderr:
        pytest.skip(f"namespaces cannot be forbidden here: {done.stderr.strip()}")
    reason, error = done.stdout.splitlines()
    assert "creating namespaces: No space left on device" in reason
    assert "user namespaces" in reason
    assert error == "SandboxError"


@isolated
def test_as_an_ordinary_user() -> None:
    """The rest of this file runs as whoever runs the tests; where that is root, some of it runs again as nobody."""
    if os.geteuid() != 0:
        pytest.skip("these tests run as an ordinary user already")
    nobody = {"user": 65534, "group": 65534, "extra_groups": [], "capture_output": True, "text": True, "cwd": "/"}
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            if subprocess.run([python, "-c", check], **nobody).returncode == 0:  # type: ignore[call-overload]
                break
        except OSError:
            continue
    else:
        pytest.skip("no Python 3.11 that an ordinary user may run")
    code = "\n".join(
        (
            "import json, os, sys",
            "from t2l.eval import sandbox",
            "codes = ['import os; print(os.getuid(), os.listdir())', 'import os; open(\"/x\", \"w\")',",
            "  'import os\\nfor i in range(40): os.fork() or __import__(\"time\").sleep(9)',",
            "  'import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0', 'import os; os.setgroups([])',",
            "  'import socket; socket.create_connection((\"127.0.0.1\", 80))']",
            "print(json.dumps([[o.ok, o.reason, o.output] for o in sandbox.run_many(codes, workers=2, allow=True)]))",
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name in ("__init__.py", "errors.py", "eval/__init__.py", "eval/sandbox.py", "eval/_jail.py"):
            target = Path(folder) / "t2l" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(SOURCE / "t2l" / name, target)
        command = [python, "-B", "-c", code]
        done = subprocess.run(command, env={"PYTHONPATH": folder}, **nobody)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    first, *rest = json.loads(done.stdout)
    assert first == [True, "ran to its end", "65534 []\n"]
    assert [ok for ok, _, _ in rest] == [False] * 5
    assert [reason.partition(":")[0] for _, reason, _ in rest] == [
        "OSError",
        "BlockingIOError",
        "AssertionError",
        "PermissionError",
        "OSError",
    ]
