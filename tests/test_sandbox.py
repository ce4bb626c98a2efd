"""Code of a model: hostile programs reach nothing and leave nothing; answers become the programs they mean."""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2l.errors import SandboxError
from t2l.eval import _jail, sandbox
from t2l.eval.code import extract_code, humaneval_program, mbpp_program

REFUSED = sandbox.available()
isolated = pytest.mark.skipif(REFUSED is not None, reason=f"no sandbox on this system: {REFUSED}")
SOURCE = Path(sandbox.__file__).parents[2]


def run(code: str, *, timeout: float = 10.0, memory_bytes: int = 512 << 20) -> sandbox.Outcome:
    return sandbox.run_python(textwrap.dedent(code), timeout=timeout, memory_bytes=memory_bytes, allow=True)


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
def test_environment_of_the_caller_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    code = """
    import os
    print(dict(os.environ))
    for number in ("self", "1", str(os.getppid()), "PID"):
        try: print(open(f"/proc/{number}/environ").read())
        except OSError as error: print(error.errno)
    """
    outcome = run(code.replace("PID", str(os.getpid())))
    assert outcome.ok
    first, *rest = outcome.output.splitlines()
    assert first == "{'PYTHONHASHSEED': '0', 'LC_CTYPE': 'C.UTF-8'}"
    assert rest == ["2"] * 4  # no such file


@isolated
def test_files_of_the_user_are_hidden(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("my secret")
    secret.chmod(0o644)
    hidden = [secret, Path.home() / ".bashrc", Path(__file__), "/etc/passwd", "/etc/hostname", "/proc", "/sys", "/var"]
    code = f"""
    import os
    for path in {[str(path) for path in hidden]}:
        assert not os.path.exists(path), path
    assert os.listdir() == []
    print(sorted(os.listdir("/")), os.uname().nodename)
    """
    outcome = run(code)
    assert outcome.ok, outcome.output
    assert socket.gethostname() not in outcome.output


@isolated
def test_nothing_can_be_written_outside_the_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    code = f"""
    import os, sys
    open("inside.txt", "w").write("yes")
    for folder in ("/", "/dev", "/usr/lib", "/etc", os.path.dirname(os.__file__), {str(tmp_path)!r}, "/home"):
        try: open(folder + "/outside.txt", "w")
        except OSError: continue
        raise AssertionError(folder)
    for forbidden in (lambda: os.chmod(sys.executable, 0o777), lambda: os.write(0, b"into the caller's file")):
        try: forbidden()
        except OSError: continue
        raise AssertionError("allowed")
    print(os.listdir())
    """
    outcome = run(code)
    assert (outcome.ok, outcome.output) == (True, "['inside.txt']\n")
    assert list(tmp_path.iterdir()) == []


@isolated
def test_the_temporary_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run("open('a', 'w').write('b')").ok
    assert not run("while True: pass", timeout=0.2).ok
    assert list(tmp_path.iterdir()) == []


@isolated
def test_no_network() -> None:
    name = f"\0t2l-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(name)
        local.listen()
        socket.create_connection(server.getsockname()).close()  # the server does answer, from here
        server.accept()[0].close()
        server.settimeout(0.2)
        code = f"""
        import socket
        try: socket.create_connection({server.getsockname()!r}, timeout=2)
        except OSError as error: print(error)
        try: socket.socket(socket.AF_UNIX).connect({name!r})
        except OSError as error: print(error)
        """
        outcome = run(code)
        assert outcome.output.splitlines() == [
            "[Errno 97] Address family not supported by protocol",
            "[Errno 111] Connection refused",
        ]
        with pytest.raises(TimeoutError):
            server.accept()


@isolated
def test_sockets_reach_nothing_but_the_program_itself() -> None:
    """AF_VSOCK reaches the machine's host, AF_ALG the kernel's keys, AF_NETLINK its settings: all families but one."""
    code = """
    import asyncio, socket
    opened = []
    for family in range(64):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
            try: socket.socket(family, kind).close()
            except OSError: continue
            opened.append(socket.AddressFamily(family).name)
    print(set(opened))
    async def work(): return await asyncio.sleep(0, "asyncio works")  # its loop wakes itself by a pair of sockets
    print(asyncio.run(work()))
    """
    assert run(code).output.splitlines() == ["{'AF_UNIX'}", "asyncio works"]


@isolated
def test_calls_that_no_namespace_covers_are_refused() -> None:
    """Each is asked for with arguments that would do nothing, so that only the filter can give this answer."""
    column = _jail.machine()[1]
    numbers = {name: calls[column] for name, calls in _jail.DENIED.items()}
    numbers["another set of numbers"] = 0x4000_0000 + 39
    code = f"""
    import ctypes, errno
    libc = ctypes.CDLL(None, use_errno=True)
    for name, number in {numbers}.items():
        ctypes.set_errno(0)
        if libc.syscall(number, -1, -1, -1, -1, -1, -1) != -1 or ctypes.get_errno() != errno.EPERM:
            print(name, errno.errorcode.get(ctypes.get_errno()))
    """
    assert run(code) == sandbox.Outcome(True, "ran to its end", "")


@isolated
def test_keys_of_the_caller_are_hidden() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    column = _jail.machine()[1]
    add, keyctl = _jail.DENIED["add_key"][column], _jail.KEYCTL[column]
    key = libc.syscall(add, b"user", b"t2l-test", b"secret", 6, -3)  # -3 is the session's keyring
    if key == -1:
        pytest.skip(f"no keyrings here: {os.strerror(ctypes.get_errno())}")
    code = f"""
    import ctypes
    libc = ctypes.CDLL(None)
    print(libc.syscall({keyctl}, 10, -3, b"user", b"t2l-test", 0), libc.syscall({keyctl}, 11, {key}, None, 0))
    print(*(libc.syscall({add}, b"user", b"t2l-left", b"x", 1, keyring) for keyring in (-3, -4)))
    """
    try:
        assert run(code).output == "-1 -1\n-1 -1\n"
        assert libc.syscall(keyctl, 10, -3, b"user", b"t2l-left", 0) == -1
    finally:
        libc.syscall(keyctl, 9, key, -3)


@isolated
def test_shared_memory_of_the_system_is_hidden() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    key = 0x742C6C00 + os.getpid() % 256
    segment = libc.shmget(key, 4096, 0o1666)  # create, for everybody
    if segment == -1:
        pytest.skip(f"no shared memory here: {os.strerror(ctypes.get_errno())}")
    try:
        code = f"import ctypes; print(ctypes.CDLL(None).shmget({key}, 4096, 0o666))"
        assert subprocess.check_output([sys.executable, "-c", code], text=True) == f"{segment}\n"
        assert run(code).output == "-1\n"
    finally:
        libc.shmctl(segment, 0, None)


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
def test_no_privileges_and_no_way_to_get_some() -> None:
    code = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    assert os.getuid() != 0 and os.geteuid() != 0
    caps = (ctypes.c_uint32 * 6)(*[1] * 6)
    assert libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), caps) == 0
    assert list(caps) == [0] * 6
    assert libc.prctl(39, 0, 0, 0, 0) == 1  # no new privileges
    assert not any(libc.prctl(23, number, 0, 0, 0) for number in range(40))  # nor in the bounding set
    for flag in (0x10000000, 0x00020000, 0x40000000, 0x20000000):
        assert libc.unshare(flag) == -1, hex(flag)
    assert libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) == -1
    assert libc.ptrace(16, 1, 0, 0) == -1
    for change in (lambda: os.setuid(0), lambda: os.chroot("/tmp"), lambda: os.nice(-1), lambda: os.setgroups([0])):
        try: change()
        except PermissionError: continue
        raise AssertionError("allowed")
    """
    outcome = run(code)
    assert outcome.ok, outcome.output


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


# -------------------------------------------------------------------------------------------- from answer to program

PROMPT = (
    "from typing import List\n\n\n"
    'def add(a: int, b: int) -> int:\n    """Add two numbers.\n    >>> add(1, 2)\n    3\n    """\n'
)
TEST = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n"
WHOLE = "def add(a, b):\n    return a + b"


def verdict(program: str) -> bool:
    """What the sandbox would say; these programs are ours, so they may run here."""
    try:
        exec(compile(program, "program.py", "exec", dont_inherit=True), {"__name__": "program"})
    except Exception:
        return False
    return True


RIGHT = {
    "body": "    return a + b",
    "body, stripped": "return a + b",
    "body of two lines, stripped": "total = a + b\n    return total",
    "body without indentation": "total = a + b\nif total:\n    return total\nreturn 0",
    "body, then another function cut off": "    return a + b\n\n\ndef main():\n    print(add(1,",
    "body, then prose": "    return a + b\n\nThis function adds its arguments.",
    "body, then a wrong assertion": "    return a + b\n\nassert add(1, 1) == 3",
    "body without indentation, then prose": "c = a + b\nreturn c\n\nThis adds the numbers.",
    "body with branches, stripped, then prose": "if a:\n        return a + b\n    return b + a\n\nThis adds.",
    "body with a line at the margin inside a string": '    text = """\nx\n"""\n    return a + b',
    "body with Windows line ends": "    c = a + b\r\n    return c\r\n",
    "whole function": WHOLE,
    "the prompt again": PROMPT + "    return a + b\n",
    "prose around the function": f"Here is the function:\n\n{WHOLE}\n\nIt adds: `add(1, 2)`.",
    "fenced": f"Sure!\n\n```python\n{WHOLE}\n```\n\nDone.",
    "fenced without a language": f"```\n{WHOLE}\n```",
    "fenced with tildes and py": f"~~~py\n{WHOLE}\n~~~",
    "fenced body": "```python\n    return a + b\n```",
    "fenced body at the margin": "```python\nc = a + b\nreturn c\n```",
    "fence never closed": f"```python\n{WHOLE}\n",
    "fence in a list": "1. Code:\n   ```python\n   def add(a, b):\n       return a + b\n   ```",
    "shell block first": f"```bash\npip install add\n```\n```python\n{WHOLE}\n```",
    "usage block first": f"```python\nprint(add(1, 2))\n```\nwith\n```python\n{WHOLE}\n```",
    "usage block last": f"```python\n{WHOLE}\n```\n```python\nassert add(1, 2) == 4\n```",
    "imports and a helper": f"```python\nimport math\n\ndef helper(x):\n    return x\n\n{WHOLE}\n```",
    "main guard that would fail": f"```python\n{WHOLE}\n\nif __name__ == '__main__':\n    raise SystemExit(1)\n```",
    "backticks inside the code": '```python\ndef add(a, b):\n    """Use `add`."""\n    return a + b\n```',
    "own check": "```python\ndef add(a, b):\n    return a + b\n\ndef check(f):\n    raise ValueError\n```",
}
WRONG = {
    "nothing": "",
    "blank": " \n\n",
    "prose": "The function adds the numbers.",
    "only a mention": "    # def add(a, b): return a + b\n    pass",
    "wrong sum": "    return a - b",
    "own check that passes": "    return a - b\n\ndef check(f):\n    pass",
    "cut off": "    return (a +",
    "another function": "```python\ndef plus(a, b):\n    return a + b\n```",
    "right in prose, wrong in code": f"{WHOLE}\n\n```python\ndef add(a, b):\n    return a\n```",
}


@pytest.mark.parametrize("name", [*RIGHT, *WRONG])
def test_humaneval_program(name: str) -> None:
    answer = (RIGHT | WRONG)[name]
    assert verdict(humaneval_program(PROMPT, answer, TEST, "add")) is (name in RIGHT)


def test_humaneval_prompts_keep_imports_and_helpers() -> None:
    prompt = "import math\n\ndef helper(x):\n    return math.floor(x)\n\ndef down(x: float):\n    '''Round down.'''\n"
    test = "def check(candidate):\n    assert candidate(1.5) == 1\n"
    for answer in ("    return helper(x)", "```python\ndef down(x):\n    return helper(math.fabs(x))\n```"):
        assert verdict(humaneval_program(prompt, answer, test, "down"))


def test_mbpp_program() -> None:
    tests = ["assert add(1, 2) == 3", "assert set([add(1, 1)]) == {2}"]
    for name, answer in RIGHT.items():
        if "body" not in name and "check" not in name:
            assert verdict(mbpp_program(answer, tests)), name
    for name, answer in WRONG.items():
        assert not verdict(mbpp_program(answer, tests)), name
    node = "class Node:\r\n    def __init__(self, x):\r\n        self.x = x\r\ndef get(n):\r\n    return n.x"
    assert verdict(mbpp_program(node, ["assert get(root) == 5"], "root = Node(5)"))


def test_code_that_warns_or_is_no_code_is_only_text() -> None:
    assert extract_code("x = '\\d'\n") == "x = '\\d'\n"
    assert extract_code("```json\n{}\n```\nNo code.") == "```json\n{}\n```\nNo code."
    assert extract_code("def f():\n    return 1\nand that is all\x00") == "def f():\n    return 1"
    assert extract_code("(" * 5000) == "(" * 5000


@isolated
def test_reference_solutions_pass_and_spoilt_ones_fail() -> None:
    folder = os.environ.get("T2L_DATA")
    if folder is None:
        pytest.skip("T2L_DATA is not set")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(Path(folder) / "benchmarks.parquet").to_pylist()
    human = [row for row in rows if row["benchmark"] == "humaneval"][::12]
    mbpp = [row for row in rows if row["benchmark"] == "mbpp" and row["split"] == "test"][::40]
    programs = []
    for row in human:
        code = json.loads(row["code"])
        for answer in (row["answer"], "    return NotImplemented"):
            programs.append(humaneval_program(row["input"], answer, code["test"], code["entry_point"]))
    for row in mbpp:
        code = json.loads(row["code"])
        for answer in (f"```python\n{row['answer']}\n```", "pass"):
            programs.append(mbpp_program(answer, code["test_list"], code["test_setup_code"]))
    outcomes = [outcome.ok for outcome in sandbox.run_many(programs, allow=True)]
    assert outcomes == [True, False] * (len(human) + len(mbpp))
