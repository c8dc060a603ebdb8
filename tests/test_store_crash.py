"""kill -9 at any moment: what was acknowledged is there, and nothing is half written."""

from __future__ import annotations

import multiprocessing
import random
import sqlite3
import threading
import time
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from gradatim.store import open_store
from gradatim.types import EpisodeId, Example, Feedback, StepId

_WRITERS = 4


def _feedback(id: str) -> Feedback:
    episode = EpisodeId(f"e{hash(id) % 50}")
    return Feedback(id=id, created_at=1.0, kind="score", source="human:a", episode_id=episode, value=1.0)


def _example(id: str) -> Example:
    return Example(
        id=id,
        created_at=1.0,
        episode_id=EpisodeId("e"),
        step_id=StepId("s"),
        prompt_ids=tuple(range(200)),
        chosen_ids=(1, 2),
        origin="correction",
    )


def _write_until_killed(path: Path, run: int, acknowledge: Connection) -> None:
    """Submits of three facts each: a feedback, an example and a cursor. The parent is told of each that is durable."""
    store = open_store(path)
    one_at_a_time = threading.Lock()

    def write(writer: int) -> None:
        for i in range(1_000_000):
            id = f"{run}-{writer}-{i}"
            store.append(_feedback(id), _example(id), cursors={f"{run}-{writer}": i + 1})
            with one_at_a_time:
                acknowledge.send_bytes(id.encode())

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(_WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _kill_while_writing(path: Path, run: int, after_s: float) -> set[str]:
    """What the killed process had acknowledged."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["gradatim.store"])
    ours, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=_write_until_killed, args=(path, run, theirs), daemon=True)
    child.start()
    theirs.close()
    acknowledged: set[str] = set()
    deadline = time.monotonic() + after_s
    with ours:
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                if ours.poll(left_s):
                    acknowledged.add(ours.recv_bytes().decode())
            child.kill()
            while True:
                acknowledged.add(ours.recv_bytes().decode())
        except (EOFError, OSError):  # the pipe is empty, or its last message was cut off
            pass
    child.join()
    child.close()
    return acknowledged


def _check_consistent(path: Path, acknowledged: set[str]) -> None:
    with open_store(path) as store:
        kept = [f.id for _, f in store.read(Feedback, limit=10_000_000)]
        assert len(kept) == len(set(kept))
        assert acknowledged <= set(kept), "an acknowledged write was lost"
        assert kept == [e.id for _, e in store.read(Example, limit=10_000_000)], "a submit was half written"
        for writer in {id.rsplit("-", 1)[0] for id in kept}:
            written = sum(id.rsplit("-", 1)[0] == writer for id in kept)
            assert store.cursor(writer) == written, "a cursor does not match the records it was written with"
        assert store.end() == 2 * len(kept), "positions have gaps"
        assert isinstance(store.submit(_feedback("after")), Future)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def _survive(path: Path, kills: int) -> int:
    times = random.Random(0)
    acknowledged: set[str] = set()
    for run in range(kills):
        # also while it is being opened, and the first time while it is being made
        acknowledged |= _kill_while_writing(path, run, times.uniform(0.0, 0.5 if run else 0.1))
    _check_consistent(path, acknowledged)
    return len(acknowledged)


def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path) -> None:
    assert _survive(tmp_path / "store.db", 15) > 0


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_100_times_kill_9(tmp_path: Path) -> None:
    assert _survive(tmp_path / "store.db", 100) > 100
