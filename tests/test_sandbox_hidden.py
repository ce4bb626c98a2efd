"""What a program of a model does not see or reach: files, keys, the network, other calls of the kernel."""

import ctypes
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sandbox_helpers import isolated, run

from t2l.eval import _jail, sandbox


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
