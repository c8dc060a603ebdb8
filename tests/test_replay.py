"""What is rehearsed, and what never is."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from gradatim.learner.replay import RECENT, StoreReplay
from gradatim.learner.reservoir import MOST_STRATA
from gradatim.testing.fakes import FakeStore
from gradatim.types import Adapter, AdapterId, Decision, Example, Move, Stage, StepId, Update, Verdict
from tests import records


@pytest.fixture
def store() -> FakeStore:
    store = FakeStore()
    store.append(records.adapter(0))
    return store


def learn(store: FakeStore, step: int, *examples: Example, live: bool = True, seen: bool = False) -> None:
    """Store examples, an update that trained on them, its adapter, and where that ended."""
    if not seen:
        store.append(*examples)
    update = Update(
        id=f"u{step}",
        created_at=1.0,
        applied=True,
        parent_id=AdapterId(f"agent@{step - 1}"),
        adapter_id=AdapterId(f"agent@{step}"),
        example_ids=tuple(e.id for e in examples),
    )
    store.append(update, records.adapter(step, step - 1))
    if live:
        on_top = next(a for a, s in store.stages("agent").items() if s is Stage.LIVE)
        store.move(move(on_top, Stage.LIVE, Stage.RETIRED), move(f"agent@{step}", Stage.CANDIDATE, Stage.LIVE))
    else:
        store.move(move(f"agent@{step}", Stage.CANDIDATE, Stage.REJECTED))


def move(adapter: str, before: Stage, after: Stage) -> Move:
    return Move(adapter_id=AdapterId(adapter), created_at=1.0, before=before, after=after, actor="test")


def ids(examples: Any) -> set[str]:
    return {e.id for e in examples}


def test_examples_of_live_and_retired_adapters_are_drawn(store: FakeStore) -> None:
    replay = StoreReplay(store, "agent", seed=0)
    assert replay.draw(5) == []
    learn(store, 1, records.example("a"))
    learn(store, 2, records.example("b"))
    assert ids(replay.draw(5)) == {"a", "b"}
    assert ids(replay.draw(5, exclude=frozenset({"a"}))) == {"b"}
    assert replay.draw(0) == []


def test_what_did_not_last_is_never_drawn(store: FakeStore) -> None:
    replay = StoreReplay(store, "agent", seed=0)
    learn(store, 1, records.example("good"))
    learn(store, 2, records.example("refused"), live=False)
    learn(store, 3, records.example("undone"))
    store.move(move("agent@3", Stage.LIVE, Stage.ROLLED_BACK), move("agent@1", Stage.RETIRED, Stage.LIVE))
    store.append(records.example("never trained on"))
    assert ids(replay.draw(9)) == {"good"}


def test_retained_withdrawn_and_bad_answers_are_never_drawn(store: FakeStore) -> None:
    learn(
        store,
        1,
        records.example("good"),
        records.example("kept", retained=True),
        records.example("bad", chosen_ids=(), rejected_ids=(7,)),
    )
    assert ids(StoreReplay(store, "agent", seed=0).draw(9)) == {"good"}


def test_only_the_newest_revision_of_a_step_counts(store: FakeStore) -> None:
    replay = StoreReplay(store, "agent", seed=0)
    old = records.example("s#1", step_id="s")
    learn(store, 1, old, records.example("other"))
    assert ids(replay.draw(9)) == {"s#1", "other"}
    new = records.example("s#2", step_id="s", chosen_ids=(9,))
    store.append(new)
    assert ids(replay.draw(9)) == {"other"}
    learn(store, 2, new, seen=True)
    assert ids(replay.draw(9)) == {"s#2", "other"}
    store.append(records.example("s#3", step_id="s", chosen_ids=(), origin="withdrawn"))
    assert ids(replay.draw(9)) == {"other"}


def test_rare_skills_get_their_share(store: FakeStore) -> None:
    common = [records.example(f"c{i}", skill="common") for i in range(50)]
    rare = [records.example(f"r{i}", skill="rare") for i in range(4)]
    corrected = [records.example(f"k{i}", skill="common", origin="correction") for i in range(4)]
    learn(store, 1, *common, *rare, *corrected)
    drawn = StoreReplay(store, "agent", seed=0).draw(9)
    assert Counter(e.id[0] for e in drawn) == {"c": 3, "r": 3, "k": 3}
    assert len(StoreReplay(store, "agent", seed=0).draw(100)) == 58


def test_the_newest_come_more_often_but_the_oldest_still_come(store: FakeStore) -> None:
    learn(store, 1, *(records.example(f"{i:02}") for i in range(40)))
    counts: Counter[bool] = Counter()
    for seed in range(100):
        counts.update(int(e.id) >= 20 for e in StoreReplay(store, "agent", seed).draw(4))
    assert 1.05 < counts[True] / counts[False] < 2.0


def test_equal_seed_and_log_draw_equally(store: FakeStore) -> None:
    learn(store, 1, *(records.example(f"{i:02}") for i in range(40)))
    draws = [[e.id for e in StoreReplay(store, "agent", seed).draw(8)] for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


def test_the_index_is_bounded_and_the_log_is_read_once(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    learn(store, 1, *(records.example(f"{i:03}") for i in range(300)))
    replay = StoreReplay(store, "agent", seed=0, capacity=30)
    first = ids(replay.draw(300))
    assert len(first) == 30 and max(first) > "150" > min(first)
    read: list[int] = []
    genuine = store.read

    def watched(kind: Any, *, after: int = 0, limit: int = 1000, **where: str) -> Any:
        if not where:
            read.append(after)
        return genuine(kind, after=after, limit=limit, **where)

    monkeypatch.setattr(store, "read", watched)
    replay.draw(1)
    ends = {kind: store.newest(kind)[0][0] for kind in (Example, Update, Adapter, Move)}
    assert read == [ends[Example], ends[Update], ends[Adapter], 0, ends[Move]]  # there are no verdicts


def test_after_a_rollback_over_several_steps_nothing_of_what_lies_between_is_drawn(store: FakeStore) -> None:
    replay = StoreReplay(store, "agent", seed=0)
    for step, name in enumerate("abc", 1):
        learn(store, step, records.example(name))
    store.move(move("agent@3", Stage.LIVE, Stage.ROLLED_BACK), move("agent@1", Stage.RETIRED, Stage.LIVE))
    assert ids(replay.draw(5)) == {"a"}


def test_every_stratum_keeps_a_place_and_memory_is_bounded(store: FakeStore) -> None:
    """A thousand of one skill, and four others of which a uniform sample of 50 would lose most."""
    rare = [records.example(f"r{i}{k}", skill=f"rare {i}") for i in range(4) for k in range(3)]
    learn(store, 1, *rare)
    for step in range(2, 12):
        learn(store, step, *(records.example(f"c{step}-{i}", skill="common") for i in range(100)))
    replay = StoreReplay(store, "agent", seed=0, capacity=50)
    drawn = replay.draw(50)
    assert len(drawn) == 50 and {e.id for e in rare} <= ids(drawn)
    assert len({e.id.split("-")[0] for e in drawn if e.skill == "common"}) > 5  # of all its time
    assert {e.skill for e in replay.draw(5)} == {"common", *(f"rare {i}" for i in range(4))}
    assert len(replay._learned) == 50 and len(replay._by_step) <= 50 + RECENT


def test_a_skill_for_every_request_shares_a_stratum_in_the_end(store: FakeStore) -> None:
    learn(store, 1, *(records.example(f"{i:04}", skill=f"skill {i}") for i in range(1000)))
    replay = StoreReplay(store, "agent", seed=0, capacity=600)
    assert len(replay.draw(1000)) == 600
    assert len(replay._learned._strata) == MOST_STRATA + 1


def test_a_restart_draws_what_would_have_been_drawn(store: FakeStore) -> None:
    """One replay follows the log as it grows and draws all the time; others read it at once, after any step."""
    rng = random.Random(1)
    following = StoreReplay(store, "agent", seed=5, capacity=40)
    live = 0
    known: list[StepId] = []
    for step in range(1, 40):
        fresh = [records.example(f"{step}-{i}", skill=f"s{rng.randrange(6)}") for i in range(rng.randrange(1, 9))]
        if known and rng.random() < 0.5:  # a revision
            step_id = rng.choice(known)
            fresh.append(records.example(f"{step}-r", step_id=step_id, chosen_ids=rng.choice([(9,), ()])))
        known += [e.step_id for e in fresh]
        store.append(*fresh)
        update = Update(
            id=f"u{step}",
            created_at=1.0,
            applied=True,
            parent_id=AdapterId(f"agent@{live}"),
            adapter_id=AdapterId(f"agent@{step}"),
            example_ids=tuple(e.id for e in fresh),
        )
        store.append(update, records.adapter(step, live))
        if rng.random() < 0.7:
            moves = (
                move(f"agent@{live}", Stage.LIVE, Stage.RETIRED),
                move(f"agent@{step}", Stage.CANDIDATE, Stage.LIVE),
            )
            store.move(*moves, verdicts=[verdict(step, {f"s{rng.randrange(6)}.chance": rng.random()})])
            live = step
        else:
            store.move(move(f"agent@{step}", Stage.CANDIDATE, Stage.REJECTED))
        retired = [a for a, stage in store.stages("agent").items() if stage is Stage.RETIRED]
        if rng.random() < 0.2 and retired:
            to = rng.choice(retired)
            store.move(move(f"agent@{live}", Stage.LIVE, Stage.ROLLED_BACK), move(to, Stage.RETIRED, Stage.LIVE))
            live = int(to.partition("@")[2])
        drawn = [e.id for e in following.draw(12)]
        assert drawn == [e.id for e in StoreReplay(store, "agent", seed=5, capacity=40).draw(12)]
        assert len(set(drawn)) == len(drawn)


def verdict(step: int, evidence: dict[str, float]) -> Verdict:
    adapter_id = AdapterId(f"agent@{step}")
    return Verdict(adapter_id=adapter_id, created_at=1.0, gate="replay", decision=Decision.PASS, evidence=evidence)


def test_what_is_known_least_is_drawn_most(store: FakeStore) -> None:
    examples = [records.example(f"{s}{i:03}", skill=s) for s in ("known", "unknown") for i in range(60)]
    store.append(*examples)
    evidence = {"known.chance": 1.0, "unknown.chance": 0.0, "known.live.n": 9.0}
    store.append(verdict(1, evidence))
    learn(store, 1, *examples, seen=True)
    store.append(verdict(2, {"known.chance": 0.0, "unknown.chance": 1.0}))  # of one that is not live
    drawn = Counter(e.skill for e in StoreReplay(store, "agent", seed=0).draw(40))
    assert drawn == {"unknown": 30, "known": 10}


def test_an_adapter_that_comes_back_brings_its_examples_back(store: FakeStore) -> None:
    replay = StoreReplay(store, "agent", seed=0)
    for step, name in enumerate("abc", 1):
        learn(store, step, records.example(name))
    assert ids(replay.draw(5)) == {"a", "b", "c"}
    store.move(move("agent@3", Stage.LIVE, Stage.ROLLED_BACK), move("agent@1", Stage.RETIRED, Stage.LIVE))
    assert ids(replay.draw(5)) == {"a"}
    store.move(move("agent@1", Stage.LIVE, Stage.RETIRED), move("agent@3", Stage.ROLLED_BACK, Stage.LIVE))
    assert ids(replay.draw(5)) == {"a", "b", "c"}


def test_an_example_that_waited_longer_than_memory_reaches_is_found_again(store: FakeStore) -> None:
    first, revised = records.example("first"), records.example("revised")
    store.append(first, revised, *(records.example(f"{i}") for i in range(RECENT)))
    replay = StoreReplay(store, "agent", seed=0)
    replay.draw(1)
    store.append(records.example("revised#2", step_id=revised.step_id))
    learn(store, 1, first, revised, seen=True)
    store.append(records.example("first#2", step_id=first.step_id, chosen_ids=()))
    assert ids(replay.draw(9)) == ids(StoreReplay(store, "agent", seed=0).draw(9)) == set()
    learn(store, 2, records.example("revised#2", step_id=revised.step_id), seen=True)
    assert ids(replay.draw(9)) == {"revised#2"}
