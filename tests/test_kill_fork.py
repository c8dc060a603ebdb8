"""``kill -9`` at random moments of ingest, train, publish, promote and roll back, a hundred times, a thousand in the
slow suite: nothing acknowledged is lost, one adapter is live, and it is the one that was told last or was under way.

Whoever is killed is a process of its own with the product's store, loop and learner, forked from one that has imported
everything: so a kill costs less than a second. ``test_kill`` has whole servers over HTTP, and fewer of them.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from gradatim.nn.lora import read_adapter
from gradatim.store import SqlStore, open_store
from gradatim.types import Adapter, Feedback

from .busy import begin, check_records, lives, loop_on, not_kept, one_round
from .tiny import tiny_base

READY_WITHIN_S = 5.0
# how long each phase is waited into, at most; the last kills of a phase hit the next one
PHASES_S = {"ingest": 0.03, "judge, train, publish": 0.3, "decide, promote": 0.03, "roll back": 0.02}


def work(root: Path, pipe: int) -> None:
    """Until it is killed. What it acknowledges it writes to the pipe, a line each."""
    import torch

    torch.set_num_threads(1)

    def tell(what: str, which: str) -> None:
        os.write(pipe, f"{what} {which}\n".encode())

    base = tiny_base()
    with open_store(root / "gradatim.db") as store:
        if not lives(store):
            begin(store, base)
        loop, n = loop_on(store, base, root), rounds_in(store)
        while True:
            one_round(store, loop, n, tell)
            n += 1


def rounds_in(store: SqlStore) -> int:
    newest = store.newest(Feedback)
    return int(newest[0][1].id.removeprefix("f").partition("-")[0]) + 1 if newest else 0


@dataclass
class Killer:
    """Starts, kills and looks."""

    root: Path
    dice: random.Random
    acknowledged: list[str] = field(default_factory=list)
    live: str = "agent@0"  # told last
    phases: Counter[str] = field(default_factory=Counter)  # in which a kill hit
    ready_s: list[float] = field(default_factory=list)

    def kill_one(self, context: ForkServerContext) -> None:
        out, into = os.pipe()
        process: ForkServerProcess = context.Process(target=_entry, args=(self.root, _Pipe(into)))
        process.start()
        os.close(into)
        try:
            phase, longest_s = self.dice.choice(list(PHASES_S.items()))
            first = _read_until(out, f"now {phase}\n".encode())
            time.sleep(self.dice.uniform(0.0, longest_s))
            process.kill()
            process.join()
            rest = b"".join(iter(lambda: os.read(out, 1 << 16), b""))
        finally:
            os.close(out)
        assert process.exitcode == -9, f"it ended by itself: {process.exitcode}"
        self._take((first + rest).decode().splitlines())

    def _take(self, lines: list[str]) -> None:
        phase, news = "start", len(self.acknowledged)
        for line in lines:
            what, _, which = line.partition(" ")
            if what == "now":
                phase = which
            elif what == "said":
                self.acknowledged.append(which)
            else:
                self.live = which
        self.phases[phase] += 1
        self._look(self.acknowledged[news:])

    def _look(self, news: list[str]) -> None:
        """As whoever starts next finds it."""
        began_s = time.monotonic()
        with open_store(self.root / "gradatim.db") as store:
            (live_id,) = lives(store)
            live = store.newest(Adapter, id=live_id)[0][1]
            if live.step:
                read_adapter(self.root / live.path, live.sha256)
            self.ready_s.append(time.monotonic() - began_s)
            assert not not_kept(store, news)
            assert live_id == self.live or self._was_under_way(store, live_id), f"{live_id} is live, not {self.live}"
            self.live = live_id

    def _was_under_way(self, store: SqlStore, live_id: str) -> bool:
        """A child of what was told, which nobody had been told of yet; or its parent, to which it was rolled back."""
        found, told = (store.newest(Adapter, id=i)[0][1] for i in (live_id, self.live))
        return found.parent_id == told.id or told.parent_id == found.id


def _read_until(pipe: int, wanted: bytes) -> bytes:
    """All that was said up to then, or until the other end is closed."""
    found = b""
    while wanted not in found and (more := os.read(pipe, 1 << 16)):
        found += more
    return found


class _Pipe:
    """A file descriptor that goes along to the forked process."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Callable[..., _Pipe], tuple[object]]:
        from multiprocessing.reduction import DupFd

        return _received, (DupFd(self.fd),)


def _received(dup: object) -> _Pipe:
    return _Pipe(dup.detach())  # type: ignore[attr-defined]


def _entry(root: Path, pipe: _Pipe) -> None:
    work(root, pipe.fd)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kills", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_acknowledged_is_lost_wherever_it_is_killed(tmp_path: Path, kills: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "gradatim.learner.learner", "transformers.models.llama"])
    killer = Killer(tmp_path, random.Random(kills))
    for _ in range(kills):
        killer.kill_one(context)
    with open_store(tmp_path / "gradatim.db") as store:
        assert not not_kept(store, killer.acknowledged)
        made = check_records(store, tmp_path)
    ready = sorted(killer.ready_s)
    sys.stdout.write(
        f"\n{kills} kills, by phase {dict(killer.phases)}; {len(killer.acknowledged)} opinions acknowledged, "
        f"{made} adapters; ready within {ready[len(ready) // 2]:.2f} s at the median, {ready[-1]:.2f} s at most\n"
    )
    assert ready[-1] < READY_WITHIN_S
    assert min(killer.phases[phase] for phase in PHASES_S) >= kills / 50
