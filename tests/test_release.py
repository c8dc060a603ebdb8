"""The whole way of an adapter through the loop: canary, live, watched; and a bad one stopped at either place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gradatim.config import Config
from gradatim.learner.replay import StoreReplay
from gradatim.loop import WATCH, Loop
from gradatim.protocols import Store
from gradatim.release.canary import CanaryGate
from gradatim.release.watch import WatchGate
from gradatim.store import open_store
from gradatim.types import AdapterId, Decision, Example, Move, Stage, Verdict

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
    store.append(*episodes(200, lambda _: 0.9, share=0.0, start=BEGAN - 400, label="past"))
    clock.now = BEGAN
    for _ in range(200):
        loop.turn()
        if store.stages("agent").get(NEW) is Stage.CANARY:
            break
    assert store.stages("agent", Stage.CANARY) == {NEW: Stage.CANARY}
    loop.turn()
    return loop, learner, clock


def test_a_good_one_goes_through_the_canary_and_its_share_is_on_record(store: Store) -> None:
    loop, _, clock = released(store)
    shares = [v.evidence["share"] for _, v in store.read(Verdict, adapter_id=NEW, gate="canary")]
    assert shares == [0.5]
    store.append(*episodes(400, lambda new: 0.95 if new else 0.6))
    clock.now = BEGAN + 1000
    loop.turn()
    assert store.stages("agent", Stage.LIVE) == {NEW: Stage.LIVE}
    assert [m.after for _, m in store.newest(Move, adapter_id=NEW, limit=2)] == [Stage.LIVE, Stage.CANARY]


def test_a_bad_one_is_stopped_in_canary_and_its_examples_get_no_second_chance(store: Store) -> None:
    loop, learner, clock = released(store)
    taught = learner.calls[-1][0]
    store.append(*episodes(400, lambda new: 0.2 if new else 0.9))
    clock.now = BEGAN + 1000
    loop.turn()
    assert store.stages("agent")[NEW] is Stage.ROLLED_BACK
    assert store.stages("agent", Stage.LIVE) == {AdapterId("agent@1"): Stage.LIVE}
    clock.now += 1000
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
    store.append(*episodes(60, lambda _: 0.2, share=0.95, label="w"))
    clock.now = BEGAN + 100
    calls = len(learner.calls)
    loop.turn()  # an alarm: nothing is learned, and the router is told to even the shares out
    assert store.newest(Verdict, adapter_id=NEW, gate="watch")[0][1].evidence["share"] == 0.5
    store.append(*episodes(300, lambda new: 0.2 if new else 0.9, start=BEGAN + 100, label="x"))
    clock.now = BEGAN + 600
    loop.turn()
    assert store.stages("agent", Stage.LIVE) == {AdapterId("agent@1"): Stage.LIVE}
    moves = {m.adapter_id: m for _, m in store.newest(Move, limit=2)}
    assert {m.actor for m in moves.values()} == {WATCH}
    assert moves[NEW].after is Stage.ROLLED_BACK
    assert len(learner.calls) == calls
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


def test_garbage_is_rolled_back_at_once(store: Store) -> None:
    loop, _, clock = released(store)
    loop.gates = {**loop.gates, Stage.CANARY: [FixedGate(Decision.PASS)]}
    loop.turn()
    store.append(*episodes(50, lambda _: 0.9, share=0.95, sources=(), text="", label="w"))
    loop.turn()
    assert store.stages("agent")[NEW] is Stage.ROLLED_BACK
    assert "broken" in store.newest(Move, adapter_id=NEW)[0][1].reason
    assert clock.now == BEGAN
