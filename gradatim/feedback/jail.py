"""Runs one command in a box of its own: the program behind ``sandbox.run``, started as a script with no package around.

    launcher (outside: writes the id maps) -> shell (new namespaces) -> init (pid 1: builds the file tree, keeps time
    and memory, reaps) -> the command (no privileges, kernel limits)

When any of them dies, the kernel kills all that come after it. The command sees a read-only file tree of the system's
libraries and this Python, an empty network, its own processes only, and two small writable folders in memory. Reads
its orders from stdin as JSON, tells on file descriptor ``status`` how it ended. Linux 5.12 or newer, standard library
only. Knows nothing of critics. A fault of the kernel is out of its scope: it is no virtual machine.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

_LIBC = ctypes.CDLL(None, use_errno=True)

_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 2, 4, 4096, 16384, 1 << 18  # linux/mount.h
_DETACH = 2
_AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 0x8000, 1, 2, 4
_SYS_MOUNT_SETATTR = 442  # the same on all architectures
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
_PDEATHSIG, _NO_NEW_PRIVS, _DUMPABLE = 1, 38, 4  # linux/prctl.h
_USER = 1000  # the command's user inside
_NOBODY_FROM = 2_000_000_000  # outside, where we are root: users that no account has
_LOOK_EVERY_S = 0.02


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    made = _LIBC.mount(
        source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None
    )
    _check(made, f"mount {target}")


def _read_only(path: str) -> None:
    """With all that is mounted below it (mount_setattr(2))."""
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    done = _LIBC.syscall(_SYS_MOUNT_SETATTR, -100, path.encode(), _AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    _check(done, f"make {path} read-only")


def _die_with_parent() -> None:
    _LIBC.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _say(status: int, **what: Any) -> None:
    os.write(status, json.dumps(what).encode() + b"\n")


def _exit_as(pid: int) -> NoReturn:
    _, ended = os.waitpid(pid, 0)
    os._exit(0 if ended == 0 else 1)


# ------------------------------------------------------------------------------- outside, and the namespaces


def launch(spec: Mapping[str, Any]) -> NoReturn:
    status: int = spec["status"]
    os.set_inheritable(status, False)
    _die_with_parent()
    if os.getppid() != spec["parent"]:  # it died before it was asked to take us along
        os._exit(1)
    unshared, mapped = os.pipe(), os.pipe()
    shell = os.fork()
    if shell == 0:
        _close(unshared[0], mapped[1])  # or it would wait for itself when we are gone
        _guarded(lambda: _shell(spec, unshared[1], mapped[0]), status)
    _close(unshared[1], mapped[0])
    if os.read(unshared[0], 1):
        try:
            _write_maps(shell)
            os.write(mapped[1], b"m")
        except OSError as e:
            _say(status, error=f"user namespace: {e}")
            os.kill(shell, signal.SIGKILL)
    _exit_as(shell)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _guarded(work: Callable[[], NoReturn], status: int) -> NoReturn:
    """What goes wrong before the command runs is told, and ends this process."""
    try:
        work()
    except BaseException as e:  # noqa: BLE001  a forked process must not unwind into its parent's code
        _say(status, error=str(e) or type(e).__name__)
    os._exit(1)


def _write_maps(pid: int) -> None:
    """Root gives the box its own root, to read what only root may, and a user that owns nothing outside; anyone else
    has but himself to give."""
    at = Path(f"/proc/{pid}")
    if os.geteuid() == 0:
        nobody = _NOBODY_FROM + pid
        maps = f"0 0 1\n{_USER} {nobody} 1\n"
        (at / "uid_map").write_text(maps)
        (at / "gid_map").write_text(maps)
        return
    (at / "setgroups").write_text("deny")
    (at / "uid_map").write_text(f"{_USER} {os.geteuid()} 1\n")
    (at / "gid_map").write_text(f"{_USER} {os.getegid()} 1\n")


def _shell(spec: Mapping[str, Any], unshared: int, mapped: int) -> NoReturn:
    new = _NEW_USER | _NEW_MOUNTS | _NEW_PIDS | _NEW_NET | _NEW_IPC
    _check(_LIBC.unshare(new), "new namespaces")
    _die_with_parent()  # after unshare, which clears it
    os.write(unshared, b"u")
    if not os.read(mapped, 1):
        os._exit(1)
    bound, alive = os.pipe(), os.pipe()
    init = os.fork()
    if init == 0:
        _close(bound[0], alive[1])
        _guarded(lambda: _init(spec, bound[1], alive[0]), spec["status"])
    _close(bound[1], alive[0])
    if os.read(bound[0], 1):
        os.write(alive[1], b"a")
    _exit_as(init)


# ------------------------------------------------------------------------------------------ pid 1 of the box


def _init(spec: Mapping[str, Any], bound: int, alive: int) -> NoReturn:
    _die_with_parent()
    os.write(bound, b"b")
    if not os.read(alive, 1):  # the parent, whose number cannot be seen from in here, is gone already
        os._exit(1)
    deadline = time.monotonic() + spec["wall_s"]
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # when memory runs out, this goes first
    watched = _build_tree(spec)
    began = os.times()
    command = os.fork()
    if command == 0:
        _guarded(lambda: _run(spec), spec["status"])
    os.close(1)
    os.close(2)
    stopped, ended = _keep(command, deadline, spec["memory_bytes"] if watched else 0)
    now = os.times()
    cpu_s = now.children_user + now.children_system - began.children_user - began.children_system
    code = None if ended is None else os.waitstatus_to_exitcode(ended)
    _say(spec["status"], exit=code, stopped=stopped, cpu_s=round(cpu_s, 3))
    os._exit(0)  # the kernel kills whatever is left in here


def _keep(command: int, deadline: float, memory_bytes: int) -> tuple[str, int | None]:
    """Reap until the command has ended: (what stopped it, its status)."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == command:
            return ("cpu" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU else ""), status
        if pid:
            continue
        if time.monotonic() > deadline:
            return "time", None
        if memory_bytes and _resident_bytes() > memory_bytes:
            return "memory", None
        time.sleep(_LOOK_EVERY_S)


def _resident_bytes() -> int:
    """Of all processes in the box together, without pages of files."""
    total = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{entry}/statm") as statm:
                _, resident, shared, *_ = map(int, statm.read().split())
                total += resident - shared
    return total * resource.getpagesize()


def _build_tree(spec: Mapping[str, Any]) -> bool:
    """A new root of what may be read, and the old one is gone. True where /proc could be had."""
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old", 0o700)
    os.chdir("/tmp")
    _check(_LIBC.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"old"), "pivot_root")
    os.chdir("/")
    for folder in ("/tmp", "/box"):  # before what may be read, which may lie in one of them
        os.makedirs(folder, exist_ok=True)
        _mount("tmpfs", folder, "tmpfs", _NOSUID | _NODEV, f"size={spec['file_bytes']},nr_inodes=4096,mode=1777")
    for path in spec["readable"]:
        _show(path)
    os.makedirs("/dev")
    for name in ("null", "zero", "full", "random", "urandom"):
        _touch(f"/dev/{name}")
        _mount(f"/old/dev/{name}", f"/dev/{name}", "", _BIND)
    os.makedirs("/proc")
    watched = True
    try:
        _mount("proc", "/proc", "proc", _NOSUID | _NODEV | 8)
        Path("/proc/sys/user/max_user_namespaces").write_text("0")  # no namespaces, and no privileges, of its own
    except OSError as e:  # a container that hides parts of its own /proc may not have a new one
        watched = e.errno not in (errno.EPERM, errno.EACCES)
    os.symlink("/tmp", "/dev/shm")
    _check(_LIBC.umount2(b"/old", _DETACH), "let go of the old root")
    os.rmdir("/old")
    _write_files(spec["files"])
    _read_only_root()
    return watched


def _show(path: str) -> None:
    """The same path inside, read-only; a link stays a link."""
    old = f"/old{path}"
    if not os.path.lexists(old) or os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
        return
    if os.path.isdir(old):
        os.makedirs(path)
    else:
        _touch(path)
    _mount(old, path, "", _BIND | _REC)
    _read_only(path)


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


def _read_only_root() -> None:
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    done = _LIBC.syscall(_SYS_MOUNT_SETATTR, -100, b"/", 0, attributes, ctypes.sizeof(attributes))
    _check(done, "make / read-only")


def _write_files(files: Mapping[str, str]) -> None:
    """Under /box, which is the command's own. Names were checked by who sent them."""
    for name, content in files.items():
        path = Path("/box", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(content))
        for made in (path, *path.parents):
            if made == Path("/box"):
                break
            os.chown(made, _USER, _USER)


# ----------------------------------------------------------------------------------------------- the command


def _run(spec: Mapping[str, Any]) -> NoReturn:
    os.setsid()
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_USER, _USER, _USER)
        os.setresuid(_USER, _USER, _USER)
    _check(_LIBC.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    limits = {
        resource.RLIMIT_AS: (spec["memory_bytes"],) * 2,
        resource.RLIMIT_CPU: (spec["cpu_s"], spec["cpu_s"] + 1),
        resource.RLIMIT_FSIZE: (spec["file_bytes"],) * 2,
        resource.RLIMIT_NPROC: (spec["processes"],) * 2,
        resource.RLIMIT_NOFILE: (spec["open_files"],) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
    }
    for which, pair in limits.items():
        hard = resource.getrlimit(which)[1]
        lower = [value if hard == resource.RLIM_INFINITY else min(value, hard) for value in pair]
        resource.setrlimit(which, (lower[0], lower[1]))
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by the Python that we are
        signal.signal(ignored, signal.SIG_DFL)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    for fd in sorted(int(name) for name in _descriptors()):
        if fd > 2 and fd != spec["status"]:  # the status closes by itself when the command starts
            with contextlib.suppress(OSError):
                os.close(fd)
    os.chdir("/box")
    os.execve(spec["command"][0], spec["command"], spec["env"])


def _descriptors() -> list[str]:
    try:
        return os.listdir("/proc/self/fd")
    except OSError:
        return [str(fd) for fd in range(3, 1024)]


if __name__ == "__main__":
    launch(json.load(sys.stdin.buffer))
