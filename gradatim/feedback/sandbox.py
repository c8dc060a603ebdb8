"""Runs untrusted code where it can do no harm, and says how it ended.

A process of its own without network, with limits on time, memory, files and processes that the kernel enforces, and
sight of nothing but the system's libraries, this Python and the files that it is given (see ``jail``). Where the
kernel does not allow such a box, SandboxError says what is missing; nothing is ever run outside of one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from gradatim.errors import SandboxError

_JAIL = Path(__file__).with_name("jail.py")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
_GRACE_S = 5.0  # for the box to be built and taken down, beyond the command's own time
_MOST_FILES = 1000
Stopped = Literal["", "time", "cpu", "memory", "output"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the command may use."""

    wall_s: float = 10.0
    cpu_s: int = 10  # each process
    memory_bytes: int = 2**30  # address space of each process, and resident pages of all together
    file_bytes: int = 32 * 2**20  # each of /box and /tmp, and the longest file
    processes: int = 32  # and threads
    open_files: int = 256
    output_bytes: int = 2**20  # of each of stdout and stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How it ended. ``exit`` is its status, minus the signal's number where a signal killed it, and None where it was
    stopped by a limit of time, memory or output."""

    exit: int | None
    stopped: Stopped = ""
    stdout: bytes = b""
    stderr: bytes = b""
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def ok(self) -> bool:
        return self.exit == 0


def readable(extra: Sequence[str | os.PathLike[str]] = ()) -> list[str]:
    """The paths that the command can read, shortest first; what lies in another one is left out."""
    python = (sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)))
    paths = sorted({os.path.abspath(p) for p in (*_SYSTEM, *python, *extra)}, key=len)
    out: list[str] = []
    for path in paths:
        if path == "/":
            raise SandboxError("the whole file system cannot be shown to a sandbox")
        if not any(PurePosixPath(path).is_relative_to(above) for above in out):
            out.append(path)
    return out


def run(
    command: Sequence[str],
    files: Mapping[str, bytes | str] | None = None,
    *,
    limits: Limits | None = None,
    also_readable: Sequence[str | os.PathLike[str]] = (),
    env: Mapping[str, str] | None = None,
) -> Ran:
    """Run ``command`` in the folder ``/box``, which holds ``files`` (relative names) and is lost afterwards.

    ``command[0]`` is an absolute path, such as ``sys.executable``. SandboxError where it could not be isolated or
    started: nothing was run then.
    """
    limits = limits or Limits()
    orders = {
        **asdict(limits),
        "command": list(command),
        "files": _encoded(files or {}),
        "readable": readable(also_readable),
        "env": {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": "/box",
            "TMPDIR": "/tmp",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",  # thread pools would eat the limit of processes and of address space
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            **(env or {}),
        },
    }
    if not sys.platform.startswith("linux"):
        raise SandboxError("code can only be run in a sandbox on Linux")
    return _launch(orders, limits)


def _encoded(files: Mapping[str, bytes | str]) -> dict[str, str]:
    if len(files) > _MOST_FILES:
        raise SandboxError(f"more than {_MOST_FILES} files")
    for name in files:
        path = PurePosixPath(name)
        if not name or "\0" in name or path.is_absolute() or ".." in path.parts or path == PurePosixPath("."):
            raise SandboxError("a file's name must be relative and stay inside its folder")
    raw = {name: f.encode("utf-8", "replace") if isinstance(f, str) else f for name, f in files.items()}
    return {name: base64.b64encode(content).decode() for name, content in raw.items()}


def _launch(orders: dict[str, Any], limits: Limits) -> Ran:
    began = time.monotonic()
    told, tells = os.pipe()
    with open(told, "rb") as status:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_JAIL)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(tells,),
                start_new_session=True,
                env={},
            )
        except OSError as e:
            raise SandboxError(f"no process can be started: {e}") from e
        finally:
            with contextlib.suppress(OSError):
                os.set_inheritable(tells, False)
        with process:
            _order(process, json.dumps({**orders, "status": tells, "parent": os.getpid()}).encode())
            os.close(tells)
            output, stopped = _collect(process, limits, began + limits.wall_s + _GRACE_S)
            process.kill()  # and with it, whatever is left of the box
        said = [json.loads(line) for line in status.read().splitlines()]
    return _ended(said, output, stopped, time.monotonic() - began)


def _order(process: subprocess.Popen[bytes], orders: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # it died at once: its silence says so
        process.stdin.write(orders)


def _collect(process: subprocess.Popen[bytes], limits: Limits, deadline: float) -> tuple[list[bytes], Stopped]:
    """Both outputs until they end, or until one is too long or it takes too long."""
    parts = [bytearray(), bytearray()]
    with selectors.DefaultSelector() as selector:
        for stream, part in zip((process.stdout, process.stderr), parts, strict=True):
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ, part)
        while selector.get_map():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return [bytes(part) for part in parts], "time"
            for key, _ in selector.select(left_s):
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fileobj)
                key.data.extend(chunk)
                if len(key.data) > limits.output_bytes:
                    return [bytes(part[: limits.output_bytes]) for part in parts], "output"
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.1, deadline - time.monotonic()))
    return [bytes(part) for part in parts], ""


def _ended(said: list[dict[str, Any]], output: list[bytes], stopped: Stopped, wall_s: float) -> Ran:
    if error := next((line["error"] for line in said if "error" in line), ""):
        raise SandboxError(f"no sandbox: {error}; {_REMEDY}")
    end = next((line for line in said if "stopped" in line), None)
    if end is None and not stopped:
        why = output[1].decode(errors="replace").strip().rpartition("\n")[2]
        raise SandboxError(f"no sandbox: it ended before the command ran ({why or 'killed'}); {_REMEDY}")
    end = end or {"exit": None, "stopped": stopped, "cpu_s": 0.0}
    return Ran(
        exit=None if stopped else end["exit"],
        stopped=stopped or end["stopped"],
        stdout=output[0],
        stderr=output[1],
        wall_s=wall_s,
        cpu_s=end["cpu_s"],
    )


_REMEDY = "it needs Linux 5.12 or newer and user namespaces (sysctl user.max_user_namespaces, and on Ubuntu "
_REMEDY += "kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp profile that allows unshare)"


@lru_cache(maxsize=1)
def check() -> None:
    """SandboxError, with the way out, where this machine has no sandbox to offer."""
    ran = run([sys.executable, "-I", "-S", "-c", "print('in')"], limits=Limits(wall_s=30.0))
    if ran.stdout != b"in\n":
        raise SandboxError(f"no sandbox: Python does not start in it ({ran.stderr[-200:]!r}, {ran.stopped})")
