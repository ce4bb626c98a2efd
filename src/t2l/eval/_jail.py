"""The program that `t2l.eval.sandbox` starts: builds the jail, runs one Python program in it, takes it down.

Runs as a script in a fresh interpreter of one thread. Knows the kernel's interface and the standard library; imports
nothing of t2l. Three processes: this one stays outside the PID namespace; the namespace's init, whose death makes
the kernel kill everything inside; and the program, which gets a fresh interpreter.

    argv  JSON: folder, status (a descriptor), memory_bytes, disk_bytes, cpu_seconds, processes
    0     the token of the run and the code, which the program's interpreter reads
    1, 2  what the program prints
    3     what could not be built; or the token when the code starts, and again with how it ended
"""

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, NoReturn

NOBODY = 65534
STATUS = 3

# linux/sched.h, linux/mount.h, linux/prctl.h, linux/capability.h
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x0002_0000, 0x0400_0000, 0x0800_0000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x4_0000
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, SYS_MOUNT_SETATTR = 1, 2, 442  # one number on every architecture we know of
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
CAPABILITY_VERSION_3 = 0x2008_0522

# linux/audit.h: the machines whose system calls are known here, and their places in the table below.
MACHINES = {"x86_64": (0xC000_003E, 0), "aarch64": (0xC000_00B7, 1)}
SOCKET, SOCKETPAIR, KEYCTL = (41, 198), (53, 199), (250, 219)
DENIED: dict[str, tuple[int, ...]] = {
    # Keyrings belong to a user, not to a namespace.
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": KEYCTL,
    # Memory that no limit counts: System V segments and queues, files in memory.
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # The machine's log, other processes, tracing, and rings that make system calls without being filtered.
    "syslog": (103, 116), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438), "perf_event_open": (298, 241), "bpf": (321, 280),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "fanotify_init": (300, 262),
    # Namespaces, mounts and files by handle, all of which would need a privilege that is gone.
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    # The whole machine: modules, kernels, clocks, swap, accounting.
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
}  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)

# Runs inside, with nothing of this file at hand. The token says that the code reached its own end: leaving early by
# any way, also by os._exit, is not passing. `program` is a real module, because dataclasses look theirs up.
PROGRAM = """
import os, sys, traceback, types
given = sys.stdin.buffer.read()
token, code = given[:32], given[32:]
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.set_inheritable(3, False)
os.write(3, token)
module = sys.modules["program"] = types.ModuleType("program")
try:
    exec(compile(code.decode("utf-8", "surrogatepass"), "program.py", "exec", dont_inherit=True), module.__dict__)
    end = ""
except BaseException as error:
    traceback.print_exc()
    end = traceback.format_exception_only(error)[-1].strip()[:300] or "an exception"
os.write(3, token + end.encode("utf-8", "backslashreplace"))
os._exit(0)
"""


class JailError(Exception):
    """A step that the system refused."""


def main() -> NoReturn:
    """Builds the jail, waits for its end and exits as the program did (128 + the signal that killed it)."""
    try:
        wanted = json.loads(sys.argv[1])
        os.dup2(wanted["status"], STATUS)
        init = start(wanted)
    except (JailError, OSError) as error:
        give_up(error)
    os.closerange(1, wanted["status"] + 1)
    _, status = os.waitpid(init, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def give_up(error: Exception) -> NoReturn:
    """Says what could not be built."""
    os.write(STATUS, str(error).encode())
    os._exit(1)


def start(wanted: dict[str, Any]) -> int:
    """Enters new namespaces and starts their init; returns its PID, with which everything inside dies."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # A session keyring of its own. Where the system forbids the call, it is forbidden inside as well.
    libc.syscall(KEYCTL[machine()[1]], 1, None)
    as_root = os.geteuid() == 0
    uid, gid = (NOBODY, NOBODY) if as_root else (os.geteuid(), os.getegid())
    if as_root:
        check(libc.setgroups(0, None), "giving up root's groups")
    map_ids = start_mapper(os.getpid(), uid, gid, as_root)
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    check(libc.unshare(flags), "creating namespaces")
    map_ids()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # new credentials may clear it

    alive, end = os.pipe()
    init = os.fork()
    if init:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(init, signal.SIGKILL))
        os.close(alive)
        os.write(end, b".")
        return init
    try:
        os.close(end)
        run_init(wanted, uid, gid, alive)
    except (JailError, OSError) as error:
        give_up(error)


def start_mapper(child: int, uid: int, gid: int, as_root: bool) -> Callable[[], None]:
    """A process that stays outside and gives `child` its ids once it is in a user namespace.

    Root is mapped only until the mounts are made; the program runs as nobody, because the kernel does not limit the
    number of root's processes. An ordinary user has no id but the own one to give.
    """
    ready, go = os.pipe()
    mapper = os.fork()
    if not mapper:
        os.close(go)
        if os.read(ready, 1) != b".":
            os._exit(1)
        try:
            for name, number in (("uid", uid), ("gid", gid)):
                if name == "gid" and not as_root:
                    write(f"/proc/{child}/setgroups", "deny")
                extra = "0 0 1\n" if as_root else ""
                write(f"/proc/{child}/{name}_map", f"{extra}{number} {number} 1\n")
        except JailError as error:
            give_up(error)
        os._exit(0)
    os.close(ready)

    def map_ids() -> None:
        os.write(go, b".")
        os.close(go)
        if os.waitpid(mapper, 0)[1]:
            os._exit(1)  # the mapper said why

    return map_ids


def run_init(wanted: dict[str, Any], uid: int, gid: int, alive: int) -> NoReturn:
    """Process 1 of the namespace: mounts, gives up every privilege, runs the program and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a handler would let the program signal its init
    python = build_root(wanted["folder"], uid, gid, wanted["disk_bytes"])
    drop_privileges(uid, gid)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    filter_system_calls()
    if os.read(alive, 1) != b".":
        os._exit(1)
    os.close(alive)
    program = os.fork()
    if not program:
        try:
            limit(wanted)
            environment = {"PYTHONHASHSEED": "0"}  # a program that depends on it passes always or never
            os.execve(python, [python, "-u", "-s", "-S", "-P", "-B", "-X", "utf8", "-c", PROGRAM], environment)
        except OSError as error:
            give_up(JailError(f"starting {python}: {error.strerror}"))
    os.closerange(0, STATUS + 1)
    while True:
        pid, status = os.wait()  # also the orphans that the program leaves
        if pid == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def build_root(folder: str, uid: int, gid: int, disk_bytes: int) -> str:
    """Makes `folder` the root of a file system with nothing but Python; returns the interpreter in it.

    What is to be seen is bound read-only: the interpreter, its library and the system's shared libraries. Files can
    be written in /tmp only, which is memory, small and gone with the namespace.
    """
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
    jail = f"{folder}/jail"
    os.umask(0o022)
    for name in ("", "/tmp", "/dev"):
        os.mkdir(jail + name)
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    prefixes = (sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.path.dirname(python)), "/usr", "/")
    folders = [os.path.join(prefix, name) for prefix in prefixes for name in ("lib", "lib64")]
    folders.append(os.path.dirname(os.__file__))
    files = [python, "/etc/ld.so.cache", *(f"/dev/{name}" for name in ("null", "zero", "random", "urandom"))]
    for path in sorted(dict.fromkeys(folders + files)):  # a folder comes before what is in it
        bind(path, jail)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    done = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, folder.encode(), AT_RECURSIVE, attributes, size)
    check(done, "making the jail read-only (Linux 5.12 or newer is needed)")
    mount(
        "tmpfs", f"{jail}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_bytes},nr_inodes=1024,uid={uid},gid={gid}"
    )
    os.chdir(folder)
    check(libc.pivot_root(b".", b"."), "changing the root")  # the old root is now on top of the new one
    check(libc.umount2(b".", MNT_DETACH), "leaving the old root")
    # The kernel gives nobody in a chroot a new user namespace, hence no way back to capabilities.
    os.chroot("/jail")
    os.chdir("/tmp")
    check(libc.sethostname(b"sandbox", 7), "naming the host")
    return python


def bind(path: str, jail: str) -> None:
    """Shows a file or folder at its own place in the jail; a link is made again, as /lib is on most systems."""
    inside = jail + path
    if not os.path.exists(path) or (os.path.lexists(inside) and not os.path.isdir(path)):
        return
    try:
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
            return
        if os.path.isdir(path):
            if os.path.isdir(inside) and os.listdir(inside):
                return  # part of a folder that is bound already
            os.makedirs(inside, exist_ok=True)
        else:
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
    except OSError as error:
        raise JailError(f"showing {path}: {error.strerror}") from error
    mount(path, inside, None, MS_BIND | MS_REC)


def drop_privileges(uid: int, gid: int) -> None:
    """No capability is left, and none can be had by running a file."""
    number = 0
    while libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1
    if os.geteuid() == 0:
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "dropping capabilities")


def machine() -> tuple[int, int]:
    """The machine's number in linux/audit.h and its column in the tables of system calls."""
    name = os.uname().machine
    if name not in MACHINES:
        raise JailError(f"the system calls of {name} are not known; {' and '.join(MACHINES)} are")
    return MACHINES[name]


def filter_system_calls() -> None:
    """Refuses what no namespace covers, in this process and all that it starts; see seccomp(2).

    Sockets are of the family AF_UNIX, which cannot leave the sandbox: others, such as AF_VSOCK, know no namespace.
    """
    number, column = machine()
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # linux/bpf_common.h
    allow, kill, refuse = 0x7FFF_0000, 0x8000_0000, 0x0005_0000  # linux/seccomp.h
    denied = [numbers[column] for numbers in DENIED.values()]
    sockets = [SOCKET[column], SOCKETPAIR[column]]
    tests = len(denied) + len(sockets)
    # A jump counts the instructions that are left out. The ends stand behind the tests: allow, refuse, sockets.
    program = [
        (load, 0, 0, 4),  # the machine: a call in another's way has other numbers
        (equal, 1, 0, number),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the call
        (at_least, tests + 1, 0, 0x4000_0000),  # x86_64 has a second set of numbers there
        *((equal, tests - place, 0, call) for place, call in enumerate(denied)),
        *((equal, len(sockets) - place + 1, 0, call) for place, call in enumerate(sockets)),
        (give, 0, 0, allow),
        (give, 0, 0, refuse | errno.EPERM),
        (load, 0, 0, 16),  # the lower half of the first argument, a socket's family
        (equal, 0, 1, 1),
        (give, 0, 0, allow),
        (give, 0, 0, refuse | errno.EAFNOSUPPORT),
    ]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(packed))
    done = libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.c_char_p(header), 0, 0)
    check(done, "filtering system calls")


def limit(wanted: dict[str, Any]) -> None:
    """Limits of each process; only the number of processes is one for all of them."""
    limits = {
        resource.RLIMIT_AS: wanted["memory_bytes"],
        resource.RLIMIT_CPU: wanted["cpu_seconds"],
        resource.RLIMIT_NPROC: wanted["processes"],
        resource.RLIMIT_FSIZE: wanted["disk_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    given = [None if text is None else text.encode() for text in (source, target, kind, options)]
    done = libc.mount(given[0], given[1], given[2], ctypes.c_ulong(flags), given[3])
    check(done, f"mounting {kind or source or ''} at {target}")


def prctl(option: int, value: int) -> None:
    """prctl(2)."""
    check(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def write(path: str, text: str) -> None:
    """Writes a file of /proc in one go, as the kernel wants it."""
    try:
        descriptor = os.open(path, os.O_WRONLY)
        os.write(descriptor, text.encode())
        os.close(descriptor)
    except OSError as error:
        raise JailError(f"writing {text!r} to {os.path.basename(path)}: {error.strerror}") from error


def check(result: int, step: str) -> None:
    """Turns the -1 of a system call into an error that names the step."""
    if result == -1:
        raise JailError(f"{step}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
