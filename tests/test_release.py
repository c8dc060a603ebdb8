"""The whole way of an adapter through the loop: canary, live, watched; and a bad one stopped at either place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gradatim.config import Config
from gradatim.errors import TransitionError
from gradatim.learner.replay import StoreReplay
from gradatim.loop import JUDGED, WATCH, Loop
from gradatim.protocols import Store
from gradatim.release.canary import CanaryGate
from gradatim.release.gates import PersonGate
from gradatim.release.traffic import approve, promote, reject, rollback
from gradatim.release.watch import WatchGate
from gradatim.store import open_store
from gradatim.types import AdapterId, Decision, Example, Move, Record, Stage, Verdict

from .records import adapter
from .test_canary import BEGAN, QUICK, episodes
from .test_flow import CountingLearner, FixedGate, good_episode, loop_on, run

NEW = AdapterId("agent@2")
CONFIG = Config(release=replace(QUICK, confirm_episodes=500, cool_down_s=5000.0))


class Clock:
    def __init__(self) -> None:
        self.now = BEGAN - 500.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "s.db") as opened:
        opened.append(adapter(0))
        yield opened


def happened(store: Store, records: Sequence[Record]) -> None:
    """Episodes that the loop does not learn from, as judging hundreds of them takes long."""
    store.append(cursors={JUDGED: store.append(*records)})


def released(store: Store) -> tuple[Loop, CountingLearner, Clock]:
    """A loop with canary and watch, agent@1 live, and agent@2 in canary."""
    loop, learner = loop_on(store)
    clock = Clock()
    loop.clock = clock
    good_episode(store, "first")
    run(loop)
    loop.path = {Stage.CANDIDATE: Stage.CANARY, Stage.CANARY: Stage.LIVE}
    loop.cool_down_s = CONFIG.release.cool_down_s
    loop.gates = {
        Stage.CANDIDATE: [FixedGate(Decision.PASS)],
        Stage.CANARY: [CanaryGate(store, CONFIG, clock=clock)],
        Stage.LIVE: [WatchGate(store, CONFIG, clock=clock)],
    }
    happened(store, episodes(200, lambda _: 0.9, share=0.0, start=BEGAN - 400, label="past"))
    good_episode(store, "second")
    clock.now = BEGAN
    loop.turn()
    loop.turn()
    assert store.stages("agent", Stage.CANARY) == {NEW: Stage.CANARY}
    loop.turn()
    return loop, learner, clock


def test_a_good_one_goes_through_the_canary_and_its_share_is_on_record(store: Store) -> None:
    loop, _, clock = released(store)
    shares = [v.evidence["share"] for _, v in store.read(Verdict, adapter_id=NEW, gate="canary")]
    assert shares == [0.5]
    happened(store, episodes(400, lambda new: 0.95 if new else 0.6))
    clock.now = BEGAN + 1000
    loop.turn()
    assert store.stages("agent", Stage.LIVE) == {NEW: Stage.LIVE}
    assert [m.after for _, m in store.newest(Move, adapter_id=NEW, limit=2)] == [Stage.LIVE, Stage.CANARY]


def test_a_bad_one_is_stopped_in_canary_and_its_examples_get_no_second_chance(store: Store) -> None:
    loop, learner, clock = released(store)
    taught = learner.calls[-1][0]
    happened(store, episodes(400, lambda new: 0.2 if new else 0.9))
    clock.now = BEGAN + 1000
    loop.turn()
    assert store.stages("agent")[NEW] is Stage.ROLLED_BACK
    assert store.stages("agent", Stage.LIVE) == {AdapterId("agent@1"): Stage.LIVE}
    good_episode(store, "third")
    run(loop)
    assert len(learner.calls) > 2
    assert not set(taught) & {i for ids, *_ in learner.calls[2:] for i in ids}


def test_an_undecided_one_is_rejected_at_its_end(store: Store) -> None:
    loop, _, clock = released(store)
    clock.now = BEGAN + CONFIG.release.horizon_s + 1
    loop.turn()
    assert store.stages("agent")[NEW] is Stage.REJECTED


def test_a_bad_one_that_got_live_is_rolled_back_quarantined_and_followed_by_a_pause(store: Store) -> None:
    loop, learner, clock = released(store)
    loop.gates = {**loop.gates, Stage.CANARY: [FixedGate(Decision.PASS)]}
    loop.turn()
    assert store.stages("agent", Stage.LIVE) == {NEW: Stage.LIVE}
    happened(store, episodes(60, lambda _: 0.2, share=0.95, label="w"))
    clock.now = BEGAN + 100
    calls = len(learner.calls)
    loop.turn()  # an alarm: nothing is learned, and the router is told to even the shares out
    assert store.newest(Verdict, adapter_id=NEW, gate="watch")[0][1].evidence["share"] == 0.5
    happened(store, episodes(300, lambda new: 0.2 if new else 0.9, start=BEGAN + 100, label="x"))
    clock.now = BEGAN + 600
    loop.turn()
    assert store.stages("agent", Stage.LIVE) == {AdapterId("agent@1"): Stage.LIVE}
    moves = {m.adapter_id: m for _, m in store.newest(Move, limit=2)}
    assert {m.actor for m in moves.values()} == {WATCH}
    assert moves[NEW].after is Stage.ROLLED_BACK
    assert len(learner.calls) == calls
    good_episode(store, "third")
    run(loop)
    assert len(learner.calls) == calls  # it cools down
    quarantined = set(learner.calls[-1][0])
    clock.now += CONFIG.release.cool_down_s
    run(loop)
    assert len(learner.calls) > calls
    drawn = StoreReplay(store, "agent", seed=0).draw(10_000)
    assert drawn
    assert not quarantined & {e.id for e in drawn}
    assert {e.id for _, e in store.read(Example)} >= quarantined  # kept, and back with the adapter


def test_a_person_moves_the_anchor_and_a_rollback_moves_it_back(store: Store) -> None:
    loop, _, _ = released(store)
    one = AdapterId("agent@1")
    assert loop._anchor().id == "agent@0"
    with pytest.raises(TransitionError, match="only one that is or was live"):
        approve(store, "agent", NEW, actor="person")
    approve(store, "agent", one, actor="person", reason="reviewed")
    assert loop._anchor().id == one
    rollback(store, "agent", actor="person")
    assert loop._anchor().id == "agent@0"


def test_what_is_proposed_waits_for_a_person_and_a_stale_one_gives_way(store: Store) -> None:
    loop, learner = loop_on(store)
    loop.path = {Stage.CANDIDATE: Stage.SHADOW}
    loop.gates = {**loop.gates, Stage.SHADOW: [PersonGate()]}
    good_episode(store, "first")
    run(loop)
    one = AdapterId("agent@1")
    assert store.stages("agent")[one] is Stage.SHADOW
    promote(store, "agent", one, actor="person")
    good_episode(store, "second")
    run(loop)
    assert store.stages("agent")[NEW] is Stage.SHADOW
    rollback(store, "agent", actor="person")  # its parent
    loop.turn()
    assert store.stages("agent")[NEW] is Stage.REJECTED
    good_episode(store, "third")
    run(loop)
    three = AdapterId("agent@3")
    reject(store, "agent", three, actor="person", reason="no")
    assert store.stages("agent")[three] is Stage.REJECTED
    with pytest.raises(TransitionError, match="not on its way up"):
        reject(store, "agent", three, actor="person")
    assert len(learner.calls) == 3


def test_garbage_is_rolled_back_at_once(store: Store) -> None:
    loop, _, clock = released(store)
    loop.gates = {**loop.gates, Stage.CANARY: [FixedGate(Decision.PASS)]}
    loop.turn()
    happened(store, episodes(50, lambda _: 0.9, share=0.95, sources=(), text="", label="w"))
    loop.turn()
    assert store.stages("agent")[NEW] is Stage.ROLLED_BACK
    assert "broken" in store.newest(Move, adapter_id=NEW)[0][1].reason
    assert clock.now == BEGAN
