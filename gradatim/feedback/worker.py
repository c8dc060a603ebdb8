"""The process that critics run in, so that one that hangs, crashes or takes all memory takes nothing else along.

``Bench`` is its owner's side: it starts the process, asks, and ends it when an answer is overdue. ``main`` is what the
process does. Knows nothing of the store.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from gradatim.config import CriticConfig
from gradatim.errors import ConfigError, GradatimError
from gradatim.feedback.critics import load
from gradatim.types import Episode, Feedback

_START_WITHIN_S = 120.0  # critics may import large packages
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Unknown:
    """A critic said nothing because it failed, and why, in a word or two."""

    why: str


class Bench:
    """The critics of a configuration, in a process that is started when it is first needed. For one thread."""

    def __init__(self, critics: Sequence[CriticConfig]) -> None:
        self._critics = tuple(critics)
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def check(self) -> None:
        """ConfigError where a critic cannot be made."""
        self._started()

    def ask(self, number: int, episode: Episode) -> Feedback | Unknown | None:
        """What the critic of that number says. Never later than its time allows, and never an exception of its own.
        ConfigError where the process cannot be started."""
        line = self._started()
        timeout_s = self._critics[number].timeout_s
        try:
            line.send((number, episode))
            if not line.poll(timeout_s):
                self.close()
                return Unknown(f"no answer within {timeout_s:g} s")
            said: Feedback | Unknown | None = line.recv()
        except (EOFError, OSError):
            process = self._process
            self.close()
            return Unknown(f"its process ended with {process.returncode if process else None}")
        return said

    def close(self) -> None:
        """End the process; the next question starts another one."""
        if self._line is not None:
            self._line.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._line = None

    def _started(self) -> Connection:
        if self._line is not None:
            return self._line
        ours, theirs = socket.socketpair()
        with theirs:
            code = f"from {__name__} import main; main({theirs.fileno()}, {os.getpid()})"
            command = [sys.executable, "-c", code]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        self._line = Connection(ours.detach())
        try:
            self._line.send(self._critics)
            said = self._line.recv() if self._line.poll(_START_WITHIN_S) else "they take too long to be imported"
        except (EOFError, OSError):
            said = "their process ended while they were imported"
        if said:
            self.close()
            raise ConfigError(said if said.startswith("critics") else f"critics.run: {said}")
        return self._line


def _answer(critic: Callable[[Episode], Any], episode: Episode) -> Feedback | Unknown | None:
    try:
        said = critic(episode)
    except GradatimError as e:
        return Unknown(str(e) or type(e).__name__)
    except Exception as e:  # noqa: BLE001  the critic's own; its message may hold a user's text
        return Unknown(type(e).__name__)
    return said if said is None or isinstance(said, Feedback) else Unknown(f"it gave a {type(said).__name__}")


def main(fd: int, parent_pid: int) -> None:
    """Until the other side hangs up."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)
    line = Connection(fd)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        configs: Sequence[CriticConfig] = line.recv()
        try:
            critics = [load(config) for config in configs]
        except ConfigError as e:
            line.send(str(e))
            return
        line.send("")
        while True:
            number, episode = line.recv()
            line.send(_answer(critics[number], episode))
