"""Keeps the loop process alive beside the server: starts it, restarts it with growing pauses, ends it.

It runs in the server's event loop and must never make it wait. It knows nothing of what the child does, only
how long it lived. The child dies with this process, however this one dies (``die_with_parent``).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

DIES_WITH = "GRADATIM_DIES_WITH"  # environment of a launched server: the pid of its launcher

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
_HEALTHY_AFTER_S = 30.0  # a child that lived this long starts again without a pause
_STOP_WITHIN_S = 5.0
_LONGEST_LOG_BYTES = 8 * 2**20


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent's thread ends (Linux; elsewhere the lock guards)."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the call
        os._exit(1)


def step_back(niceness: int = 10) -> None:
    """Let serving go first: lower scheduling priority, and first in line when memory runs out."""
    os.nice(niceness)
    with contextlib.suppress(OSError):  # not Linux, or not allowed in this container
        Path("/proc/self/oom_score_adj").write_text("500")


class Supervisor:
    """One child process and its restarts. ``run`` from the main thread: the child's life hangs on that thread."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: bytes,
        log_path: Path,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._command, self._env, self._stdin, self._log_path = tuple(command), dict(env), stdin, log_path
        self._first_pause_s = first_pause_s
        self._child: asyncio.subprocess.Process | None = None
        self._state = "stopped"
        self.restarts = 0
        self.last_exit: int | None = None

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.returncode is None

    def status(self) -> dict[str, Any]:
        """``state`` is one of stopped, running, waiting (before a restart)."""
        pid = self._child.pid if self._child and self.alive else None
        return {"state": self._state, "pid": pid, "restarts": self.restarts, "last_exit": self.last_exit}

    async def run(self) -> None:
        """Until cancelled."""
        pause_s = self._first_pause_s
        try:
            while True:
                began = time.monotonic()
                try:
                    self.last_exit = await self._one_life()
                except OSError as e:  # no memory for a process, no room for the log: serving goes on, and we try again
                    log.warning("the loop process cannot be started: %s", e)
                self._state = "waiting"
                if time.monotonic() - began > _HEALTHY_AFTER_S:
                    pause_s = self._first_pause_s
                log.warning("the loop process ended with %s; again in %.1f s", self.last_exit, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                self.restarts += 1
        finally:
            await self._stop()

    async def _one_life(self) -> int:
        if self._log_path.exists() and self._log_path.stat().st_size > _LONGEST_LOG_BYTES:
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        with self._log_path.open("ab") as out:
            child = await asyncio.create_subprocess_exec(
                *self._command, env=self._env, stdin=asyncio.subprocess.PIPE, stdout=out, stderr=out
            )
        self._child, self._state = child, "running"
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died at once: the exit status says so
            child.stdin.write(self._stdin)
            await child.stdin.drain()
            child.stdin.close()
        return await child.wait()

    async def _stop(self) -> None:
        self._state = "stopped"
        child = self._child
        if child is None or child.returncode is not None:
            return
        child.terminate()
        try:
            await asyncio.wait_for(child.wait(), _STOP_WITHIN_S)
        except TimeoutError:
            child.kill()
            await child.wait()
