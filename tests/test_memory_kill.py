"""kill -9 while memory is written: what was acknowledged is remembered or forgotten, and nothing is half done.

A process judges, revises, retracts, forgets, begins and takes back epochs and compacts, while another of its threads
seals and compacts search indexes and writes token stores to disk. What it does next follows from what it did, so after
each kill what is found must be that of all acknowledged steps, or of one more.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from gradatim.config import MemoryConfig
from gradatim.memory.decisions import CURSOR, DecisionMemory
from gradatim.memory.key_space import KeySpace, Turn
from gradatim.memory.knn_lm import KnnLm
from gradatim.memory.token_file import TRUTH_FILE
from gradatim.memory.token_folders import TokenFolders
from gradatim.memory.tokens import TokenMemory
from gradatim.store import SqlShelf, SqlStore, open_store
from gradatim.types import AdapterId, EpisodeId, MemoryEntry, MemoryKey, StepId
from tests.server_kit import until
from tests.test_store import create_database, postgresql_socket
from tests.token_memory import VOCABULARY, WIDTH, drawn, open_gate, space

__all__ = ["postgresql_socket"]  # a fixture

BASE, SHA = AdapterId("agent@0"), space().base_sha256
TENANTS = ("a", "b")
_NEW = 8  # episodes that are new in each run


@dataclass(frozen=True)
class Doing:
    """The i-th thing that a run does."""

    what: str
    episode: int
    tokens: tuple[int, ...]
    value: float
    position: int


def doing(run: int, i: int) -> Doing:
    dice = random.Random(f"{run}/{i}")
    kinds = ["judge"] * 12 + ["retract"] * 2 + ["forget"] * 2 + ["epoch", "undo", "compact"]
    newest = _NEW * (run + 1) - 1
    episode = dice.choice([dice.randint(0, newest), dice.randint(newest - _NEW + 1, newest)])
    tokens = tuple(dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 6)))
    return Doing(dice.choice(kinds), episode, tokens, dice.choice([-0.5, 0.4, 0.9, 1.0]), 1_000_000 * (run + 1) + i)


def entry_of(did: Doing) -> MemoryEntry:
    step, tenant = f"s{did.episode}", TENANTS[did.episode % len(TENANTS)]
    return MemoryEntry(
        id=f"{step}{'+' if did.value > 0 else '-'}",
        tenant=tenant,
        user=tenant,
        episode_id=EpisodeId(f"ep-{step}"),
        step_id=StepId(step),
        created_at=1.0,
        tokens=did.tokens,
        value=did.value,
        position=did.position,
    )


@dataclass(frozen=True)
class Book:
    """What should be remembered."""

    entries: Mapping[str, MemoryEntry] = field(default_factory=dict)
    buried: frozenset[str] = frozenset()
    epochs: tuple[bool, ...] = ()  # whether each of them was taken back
    cursor: int = 0

    def after(self, did: Doing) -> Book:
        made = entry_of(did)
        left = {i: e for i, e in self.entries.items() if e.episode_id != made.episode_id}
        if did.what == "judge":
            known = self.entries.get(made.id)
            made = replace(made, epoch=len(self.epochs) if known is None else known.epoch)
            kept = left if made.episode_id in self.buried else {**left, made.id: made}
            return replace(self, entries=kept, cursor=did.position)
        if did.what == "retract":
            return replace(self, entries=left)
        if did.what == "forget":
            return replace(self, entries=left, buried=self.buried | {made.episode_id})
        if did.what == "epoch":
            return replace(self, epochs=(*self.epochs, False))
        if did.what == "undo" and False in self.epochs:
            newest = len(self.epochs) - 1 - self.epochs[::-1].index(False)
            return replace(self, epochs=tuple(taken or n == newest for n, taken in enumerate(self.epochs)))
        return self


def found_in(store: SqlStore, memory: DecisionMemory) -> Book:
    epochs = sorted(memory._all.epochs.values(), key=lambda e: e.number)
    assert [e.number for e in epochs] == list(range(1, len(epochs) + 1))
    return Book(
        entries=memory._all.entries,
        buried=frozenset(t.value for t in memory._all.tombstones),
        epochs=tuple(e.undone_at is not None for e in epochs),
        cursor=store.cursor(CURSOR),
    )


def opened(store: SqlStore, folder: Path) -> tuple[DecisionMemory, TokenMemory]:
    folders = TokenFolders(folder)
    knn = KnnLm(open_gate().lambdas, k=4)
    tokens = TokenMemory(space(), knn, vocabulary=VOCABULARY, max_tokens=100_000, folders=folders, hot_rows=16)
    turns = KeySpace(SHA, space().tokenizer_sha256, (1,), Turn())
    memory = DecisionMemory(
        SqlShelf(store.engines), MemoryConfig(decisions=True, tokens=True), turns, tokens=tokens, folders=folders
    )
    memory.expect(BASE, SHA)
    return memory, tokens


def states_of(entry: MemoryEntry) -> Any:
    return drawn(len(entry.tokens), WIDTH, seed=sum(entry.tokens))


def tell(memory: DecisionMemory) -> None:
    """Fill the token memory."""
    for entry, at in memory.untold(10_000, frozenset()):
        memory.tell(entry, at, states_of(entry))


def do(memory: DecisionMemory, did: Doing) -> None:
    entry = entry_of(did)
    if did.what == "judge":
        recall = memory.recollect(entry.user, BASE, SHA)
        recall.situate(np.random.default_rng(did.episode).normal(size=24).astype(np.float32))
        memory.answered(recall, [entry.step_id], steered=False)
        memory.write(entry.episode_id, [entry], cursor=did.position)
        tell(memory)
    elif did.what == "retract":
        memory.write(entry.episode_id, [])
    elif did.what == "forget":
        memory.forget("episode", entry.episode_id, actor="test")
    elif did.what == "epoch":
        memory.epoch(None, actor="test")
    elif did.what == "undo":
        memory.undo_epoch(None)
    else:
        memory.compact()


def _work_until_killed(where: str, folder: Path, run: int, acknowledge: Connection) -> None:
    acknowledge.send_bytes(b"-1")  # it has begun
    store = open_store(where)
    memory, tokens = opened(store, folder)

    def behind() -> None:
        while True:
            memory.maintain()
            tokens.maintain()
            tokens.write()
            time.sleep(0.001)

    threading.Thread(target=behind, daemon=True).start()
    for i in count():
        do(memory, doing(run, i))
        acknowledge.send_bytes(json.dumps(i).encode())


def _kill_while_working(where: str, folder: Path, run: int, after: int, and_s: float) -> int:
    """After it has acknowledged so many things, and some time more. How many they were in the end."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    ours, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=_work_until_killed, args=(where, folder, run, theirs), daemon=True)
    child.start()
    theirs.close()
    done = 0
    with ours:
        assert ours.poll(120.0) and ours.recv_bytes() == b"-1"
        with contextlib.suppress(EOFError, OSError):  # the pipe is empty, or its last message was cut off
            while done < after:
                done = 1 + int(ours.recv_bytes())
            time.sleep(and_s)
            child.kill()
            while True:
                done = 1 + int(ours.recv_bytes())
    child.join()
    assert child.exitcode == -9, "the process ended by itself"
    child.close()
    return done


def _check(where: str, folder: Path, book: Book, run: int, done: int) -> Book:
    """What is found."""
    for i in range(done):
        book = book.after(doing(run, i))
    with open_store(where) as store:
        memory, tokens = opened(store, folder)
        found = found_in(store, memory)
        assert found in (book, book.after(doing(run, done))), "what is remembered is not what was acknowledged"
        assert memory.check() == {**memory.check(), "ok": True, "entries": len(found.entries)}
        keys = SqlShelf(store.engines).load(MemoryKey)
        assert {k.step_id for k in keys} == {e.step_id for e in found.entries.values()}
        on_disk = {source for path in folder.glob(f"*/*/{TRUTH_FILE}") for source in _sources(path)}
        assert on_disk <= found.entries.keys(), "what was forgotten lies on disk"
        assert not list(folder.glob("*/*/.*")) and not list(folder.glob(".*"))
        tell(memory)  # takes over what lies on disk, and adds what that lacks
        told = {e.id: e for e in memory._all.told()}
        held = {i: (h.store, said) for h in tokens._held.values() for i, said in h.store.said().items()}
        assert {i: said for i, (_, said) in held.items()} == {i: e.tokens for i, e in told.items()}
        for name, (kept, _) in held.items():
            codec = kept.index.codec
            want = codec.decode(codec.encode(space().pooling.keys(states_of(told[name]).numpy())))
            np.testing.assert_array_equal(kept.index.of(name), want)
    return Book(dict(found.entries), found.buried, found.epochs, found.cursor)


def _sources(path: Path) -> Iterator[str]:
    with safe_open(path, framework="numpy") as file:
        yield from json.loads(file.metadata()["sources"])


def _survive(where: str, folder: Path, kills: int, until_gone: Callable[[], None] = lambda: None) -> int:
    """``until_gone`` waits for what a killed process had asked of another one."""
    times = random.Random(0)
    book, acknowledged = Book(), 0
    for run in range(kills):
        after = 0 if run % 4 == 0 else times.randint(1, 40)  # also while it is being opened, and the database is made
        done = _kill_while_working(where, folder, run, after, times.uniform(0.0, 0.05 if after else 0.5))
        until_gone()
        book = _check(where, folder, book, run, done)
        acknowledged += done
    return acknowledged


def _sound(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_nothing_acknowledged_is_lost_or_comes_back_by_kill_9(tmp_path: Path) -> None:
    assert _survive(str(tmp_path / "store.db"), tmp_path / "tokens", 8) > 0
    _sound(tmp_path / "store.db")


@pytest.mark.postgresql
def test_nor_on_postgresql(tmp_path: Path, postgresql_socket: Path) -> None:
    import psycopg

    url = create_database(postgresql_socket, "memory")
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'memory' AND pid <> pg_backend_pid()"

    def until_gone() -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            until(lambda: connection.execute(others).fetchone() == (0,), 60.0)

    assert _survive(url, tmp_path / "tokens", 5, until_gone) > 0


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_or_comes_back_by_many_kills(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    kills = 2 * int(pytestconfig.getoption("kills"))
    done = _survive(str(tmp_path / "store.db"), tmp_path / "tokens", kills)
    assert done > kills
    sys.stdout.write(f"\n{kills} kills of a process that writes memory, {done} changes acknowledged\n")
    _sound(tmp_path / "store.db")
