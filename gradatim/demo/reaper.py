"""Ends a browser whose owner is gone. Run as a program of its own: ``python -I reaper.py``.

Standard input brings one line, ``SESSION_ID PROFILE_DIR``, and then stays open until the owner closes it or dies in
any way, ``kill -9`` included. Then every process of that session, and every process started on that profile
directory, is killed and the directory is deleted. It knows nothing of browsers. Where there is no /proc it kills the
session's process group.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def members(session_id: int, profile: str) -> list[int]:
    """Living processes of the session or with the profile directory on their command line, this one excepted."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # the process may end while it is looked at
            is_dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            in_session = os.getsid(int(entry.name)) == session_id
            if not is_dead and (in_session or profile.encode() in (entry / "cmdline").read_bytes()):
                found.append(int(entry.name))
    return found


def reap(session_id: int, profile: str) -> None:
    """Kills and deletes until nothing is left, for at most five seconds."""
    for _ in range(50):
        pids = members(session_id, profile) if Path("/proc/self").exists() else [-session_id]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(profile, ignore_errors=True)
        if not Path(profile).exists() and (not pids or pids[0] < 0):
            break
        time.sleep(0.1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    session, _, folder = sys.stdin.readline().strip().partition(" ")
    sys.stdin.read()
    reap(int(session), folder)
