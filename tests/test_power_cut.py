"""Simulated power cuts at random moments of ingest, train, publish, promote and roll back, with the product's own
store, loop and learner: nothing acknowledged is lost, the records agree with each other, what is live can be served."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy

pytest.importorskip("apsw")

from gradatim.nn.base import Base
from gradatim.store import connections, open_store
from gradatim.types import Feedback

from .busy import begin, check_records, lives, loop_on, not_kept, one_round
from .power_cut import Disk, Driver
from .records import feedback


@dataclass
class Witness:
    """What was acknowledged so far; and the cuts, each with what was acknowledged before it."""

    disk: Disk
    into: Path
    every: int  # writes between two cuts, on average
    dice: random.Random
    acknowledged: list[str] = field(default_factory=list)
    live: list[str] = field(default_factory=list)  # the live adapters that somebody was told of, the newest last
    cuts: list[tuple[Path, int, int]] = field(default_factory=list)
    writes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self) -> None:
        """Before every write and sync: now and then the power goes."""
        self.writes += 1
        if self.dice.random() * self.every >= 1.0:
            return
        with self._lock:
            folder = self.into / f"cut{len(self.cuts)}"
            seen = len(self.acknowledged), len(self.live)
            self.disk.cut(folder)
            self.cuts.append((folder, *seen))


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Witness]:
    """Makes a disk that is cut now and then, below the stores that are opened from then on."""

    def make(every: int, seed: int) -> Witness:
        root = tmp_path / "disk"
        root.mkdir()
        disk = Disk(root, seed)
        witness = Witness(disk, tmp_path / "cuts", every, random.Random(seed))
        disk.on_write = witness.write
        driven = functools.partial(sqlalchemy.create_engine, module=Driver(disk.vfs))
        monkeypatch.setattr(connections, "create_engine", driven)
        return witness

    return make


@pytest.fixture
def plain_sqlite(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(connections, "create_engine", sqlalchemy.create_engine)


def work(witness: Witness, base: Base, rounds: int) -> None:
    """Ingest, train, publish, promote, and roll back every other time."""
    root = witness.disk.root

    def tell(what: str, which: str) -> None:
        if what != "now":
            (witness.acknowledged if what == "said" else witness.live).append(which)

    with witness.disk.followed(), open_store(root / "gradatim.db") as store:
        begin(store, base)
        witness.live.append("agent@0")
        loop = loop_on(store, base, root)
        for n in range(rounds):
            one_round(store, loop, n, tell)


def check(folder: Path, acknowledged: list[str], told: list[str], all_told: list[str]) -> int:
    """How many adapters were registered; asserts all that must hold after the lights are on again."""
    with open_store(folder / "gradatim.db") as store:
        lost = not_kept(store, acknowledged)
        assert not lost, f"lost although acknowledged: {lost}"
        made, live = check_records(store, folder), lives(store)
        if told or made:
            assert len(live) == 1
        if told:  # what was last told, or what was under way then
            assert live[0] in (told[-1], *all_told[len(told) :])
        store.append(feedback("score", id="after", value=1.0))
        assert store.read(Feedback, id="after")
    return made


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("every", "rounds"), [(40, 3), pytest.param(4, 8, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_power_cut_loses_nothing_that_was_acknowledged(
    on_disk: Callable[[int, int], Witness],
    plain_sqlite: Callable[[], None],
    tiny_base: Base,
    every: int,
    rounds: int,
) -> None:
    witness = on_disk(every, 0)
    work(witness, tiny_base, rounds)
    plain_sqlite()
    made = [
        check(folder, witness.acknowledged[:acknowledged], witness.live[:told], witness.live)
        for folder, acknowledged, told in witness.cuts
    ]
    assert len(witness.cuts) > 10
    assert max(made) > 2 and len(set(witness.live)) > 2, "the cuts must reach past a promotion"


def test_the_simulator_finds_what_a_weaker_setting_loses(
    on_disk: Callable[[int, int], Witness], plain_sqlite: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a sync at each commit, acknowledged writes are lost at once: so the test above can fail."""
    witness = on_disk(5, 1)
    prepare = connections._prepare

    def weaker(connection: object, path: Path, busy_timeout_s: float) -> None:
        prepare(connection, path, busy_timeout_s)  # type: ignore[arg-type]
        connection.execute("PRAGMA synchronous = NORMAL")  # type: ignore[attr-defined]

    monkeypatch.setattr(connections, "_prepare", weaker)
    with open_store(witness.disk.root / "gradatim.db") as store:
        for i in range(20):
            store.append(feedback("score", f"e{i}", id=f"f{i}", value=1.0))
            witness.acknowledged.append(str(i))
    monkeypatch.setattr(connections, "_prepare", prepare)
    plain_sqlite()
    lost = 0
    for folder, acknowledged, _ in witness.cuts:
        with open_store(folder / "gradatim.db") as store:
            lost += sum(not store.read(Feedback, id=f"f{i}") for i in witness.acknowledged[:acknowledged])
    assert lost > 0
