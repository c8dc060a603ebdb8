"""A server as a process of its own: started, waited for until it answers, stopped. For demo, tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradatim.app.home import Home
from gradatim.app.supervisor import DIES_WITH
from gradatim.errors import InUseError

_STOP_WITHIN_S = 30.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Launched:
    """A running ``gradatim serve``. ``url`` is without ``/v1``."""

    process: subprocess.Popen[bytes]
    url: str
    data_dir: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """As ``kill -9`` does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """As ``kill`` does; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def launch(
    data_dir: Path, *options: str, port: int = 0, within_s: float = 300.0, env: Mapping[str, str] | None = None
) -> Launched:
    """``gradatim serve --data-dir DATA_DIR --port PORT OPTIONS``, once it answers. Port 0: any free one.

    It dies with the thread that called this, so call it from the main one. Its log goes to ``data_dir/server.log``.
    InUseError with the end of that log when it ends or takes too long.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gradatim", "serve", "--data-dir", str(data_dir), "--port", str(port), *options]
    log = data_dir / "server.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, DIES_WITH: str(os.getpid()), **(env or {})},
        )
    url = _wait(process, Home(data_dir), time.monotonic() + within_s)
    if url is None:
        process.kill()
        process.wait()
        raise InUseError(f"the server did not start; {log} ends with:\n{_tail(log)}")
    return Launched(process, url, data_dir)


def _wait(process: subprocess.Popen[bytes], home: Home, deadline: float) -> str | None:
    while process.poll() is None and time.monotonic() < deadline:
        if home.holder("server") == process.pid and (url := home.server_url()) is not None:
            return url
        time.sleep(_POLL_S)
    return None


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def launched(data_dir: Path, options: Sequence[str] = (), *, port: int = 0) -> Iterator[Launched]:
    """The same for the length of a block."""
    server = launch(data_dir, *options, port=port)
    try:
        yield server
    finally:
        server.stop()
