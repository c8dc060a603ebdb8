"""The data directory: where its files are, who holds it, and what its processes say of themselves.

    gradatim.db      the store                     server.lock   held by the server, with its pid
    adapters/        weights, immutable            loop.lock     held by whoever learns
    server.json      where the server listens      loop.json     what the loop did last
    loop.log         the loop process's log        reward.json   how the reward does

This module knows no database and no model. A lock is the kernel's (flock): it goes with its process, however that dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gradatim.errors import ConfigError, InUseError

Role = Literal["server", "loop"]
Topic = Literal["server", "loop", "reward"]
_OUT: Mapping[Role, str] = {
    "server": "stop that one first (kill {pid}), or give this one its own --data-dir",
    "loop": "that one learns by itself: follow it with `gradatim status`, or stop its server first",
}


@dataclass(frozen=True, slots=True)
class Home:
    """A data directory by its path."""

    path: Path

    @property
    def store(self) -> Path:
        return self.path / "gradatim.db"

    @property
    def loop_log(self) -> Path:
        return self.path / "loop.log"

    def prepare(self) -> None:
        """Make it, and see that it can be written. ConfigError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as e:
            raise ConfigError(
                f"the data directory {self.path} cannot be written: {e.strerror}; "
                "make it writable for this user, free some space, or choose another with --data-dir"
            ) from e

    def exists(self) -> bool:
        return self.store.exists()

    @contextlib.contextmanager
    def lock(self, role: Role, *, wait_s: float = 1.0) -> Iterator[None]:
        """Hold a role until the block ends. InUseError when another process has it for longer than ``wait_s``."""
        fd = os.open(self.path / f"{role}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take(fd, role, time.monotonic() + wait_s)
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(fd)  # and with it goes the lock

    def _take(self, fd: int, role: Role, deadline: float) -> None:
        while True:
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    pid = os.pread(fd, 32, 0).decode() or "unknown"
                    way_out = _OUT[role].format(pid=pid)
                    raise InUseError(
                        f"the data directory {self.path} is in use by the {role} with pid {pid}; {way_out}"
                    ) from None
                time.sleep(0.02)

    def holder(self, role: Role) -> int | None:
        """The pid of the process that holds a role, None where nobody does."""
        try:
            fd = os.open(self.path / f"{role}.lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for microseconds; lock() waits longer than that
        except BlockingIOError:
            pid = os.pread(fd, 32, 0).decode()
            return int(pid) if pid.isdigit() else 0
        finally:
            os.close(fd)
        return None

    def say(self, topic: Topic, facts: Mapping[str, Any]) -> None:
        """Write what is to be known (``server.json``, ``loop.json``, ``reward.json``), all or nothing."""
        target = self.path / f"{topic}.json"
        part = target.with_suffix(".json.part")
        part.write_text(json.dumps({"pid": os.getpid(), "at": time.time(), **facts}))
        part.replace(target)

    def said(self, topic: Topic) -> dict[str, Any]:
        """What was written of it last; empty where nothing was."""
        try:
            facts = json.loads((self.path / f"{topic}.json").read_text())
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def server_url(self) -> str | None:
        """Where the running server listens, without ``/v1``; None when no server runs or it is still starting."""
        pid = self.holder("server")
        facts = self.said("server")
        return str(facts["url"]) if pid is not None and facts.get("pid") == pid and "url" in facts else None
