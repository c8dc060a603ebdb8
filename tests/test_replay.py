"""What is rehearsed, and what never is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from gradatim.learner.replay import StoreReplay
from gradatim.testing.fakes import FakeStore
from gradatim.types import AdapterId, Example, Move, Stage, Update
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
    assert len(read) == 2 and min(read) > 0


def test_after_a_rollback_over_several_steps_nothing_of_what_lies_between_is_drawn(store: FakeStore) -> None:
    replay = StoreReplay(store, "agent", seed=0)
    for step, name in enumerate("abc", 1):
        learn(store, step, records.example(name))
    store.move(move("agent@3", Stage.LIVE, Stage.ROLLED_BACK), move("agent@1", Stage.RETIRED, Stage.LIVE))
    assert ids(replay.draw(5)) == {"a"}
