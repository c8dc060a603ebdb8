"""Drift on a store: what is found, whether it is the adapter or the world, what follows, and that a restart finds it
again."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gradatim.app.diagnosis import Facts, Finding, findings
from gradatim.config import Config, DriftConfig, ReleaseConfig, RewardConfig
from gradatim.learner.replay import StoreReplay
from gradatim.release.cause import CONTROL, LIVE, Rated, compare
from gradatim.release.drift import ASKED, RATED, STATE, Drift
from gradatim.release.lift import BOUNDS, Lift
from gradatim.reward.ledger import Ledger
from gradatim.stats.contrast import Contrast
from gradatim.store import SqlStore, open_store
from gradatim.testing.fakes import FakeStore
from gradatim.types import (
    DRIFT,
    AdapterId,
    Decision,
    EpisodeId,
    Example,
    Move,
    Record,
    Reward,
    Stage,
    Step,
    Update,
    Verdict,
    is_new_world,
)

from .records import adapter, example, feedback, step

BASE, OLD, NEW = AdapterId("agent@0"), AdapterId("agent@1"), AdapterId("agent@2")
QUICK = DriftConfig(season_s=0.0, alarm=1e4, confirm_episodes=1000, skills=2)
HELD = ReleaseConfig(canary=True, holdback=0.2)
Chance = Callable[[int, AdapterId], float]


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Callable[[], SqlStore]]:
    """Makes empty stores."""
    with ExitStack() as opened:
        yield lambda: opened.enter_context(open_store(tmp_path / f"{random.random()}.db"))


def episodes(n: int, good: Chance, *, first: int = 0, share: float = 0.2, **fields: object) -> list[Record]:
    """n episodes, one a second, each with an outcome and its judgement; a share of them by the last good adapter."""
    rng = random.Random(f"{first} {n}")
    out: list[Record] = []
    for i in range(first, first + n):
        who = OLD if rng.random() < share else NEW
        coin = {OLD: share, NEW: 1.0 - share} if share else {}
        stage = "live" if who == NEW else "retired"
        value = 1.0 if rng.random() < good(i, who) else -1.0
        name = f"e{i}"
        out.append(step(name, name, adapter_id=who, stage=stage, coin=coin, created_at=float(i), **fields))
        said = feedback("outcome", name, value=value, source="critic:tests", created_at=i + 0.5)
        judged = Reward(
            episode_id=EpisodeId(name),
            created_at=i + 0.6,
            value=value,
            confidence=1.0,
            feedback_ids=(said.id,),
            position=10**9,
        )
        out += [said, judged]
    return out


def run(store: SqlStore, config: Config, folder: Path | None = None) -> list[Verdict]:
    drift = Drift(store, config, folder, clock=lambda: 1.0)
    while drift.turn():
        pass
    return told(store)


def told(store: SqlStore) -> list[Verdict]:
    return [v for _, v in store.read(Verdict, gate=DRIFT)]


def world(i: int, who: AdapterId) -> float:
    return 0.9 if i < 400 else 0.4


def own_fault(i: int, who: AdapterId) -> float:
    return 0.9 if i < 400 or who == OLD else 0.4


# ------------------------------------------------------------------------------------- the adapter, or the world


def filled(store: SqlStore, good: Chance, n: int = 700, **fields: float) -> SqlStore:
    store.append(*episodes(n, good, **fields))  # type: ignore[arg-type]
    return store


def test_when_both_fell_the_world_has_changed(fresh: Callable[[], SqlStore]) -> None:
    found = run(filled(fresh(), world), Config(drift=QUICK, release=HELD))
    assert [v.decision for v in found] == [Decision.WAIT, Decision.PASS]
    assert found[0].evidence["open"] == 1.0 and 390 <= found[0].evidence["since"] <= 420
    assert "rewards by programs fell from about 0.9" in found[0].reason
    assert found[1].evidence["world"] == 1.0 and found[1].evidence["adapt"] == 0.0
    assert "the world changed, not the adapter" in found[1].reason and "agent@1 from 0." in found[1].reason
    assert not is_new_world(found[1])  # by default it is only told
    assert all(v.adapter_id == NEW for v in found)


def test_when_only_the_live_one_fell_it_is_at_fault_and_nothing_is_moved(fresh: Callable[[], SqlStore]) -> None:
    store = filled(fresh(), own_fault)
    found = run(store, Config(drift=QUICK, release=HELD))
    assert [v.decision for v in found] == [Decision.WAIT, Decision.FAIL]
    assert "the live adapter is at fault" in found[1].reason
    assert not store.read(Move)


def test_without_anybody_beside_it_it_cannot_be_told_and_it_says_how_it_could(fresh: Callable[[], SqlStore]) -> None:
    found = run(filled(fresh(), world, share=0.0), Config(drift=QUICK))
    assert [v.decision for v in found] == [Decision.WAIT, Decision.WAIT]
    assert found[1].evidence["unknown"] == 1.0
    assert "set release.holdback or release.base_share" in found[1].reason


def test_an_earlier_adapter_that_comes_back_ends_the_question(fresh: Callable[[], SqlStore]) -> None:
    store = fresh()
    config = Config(drift=QUICK, release=ReleaseConfig(canary=True, holdback=0.01))
    store.append(*episodes(480, world, share=0.0))
    assert [v.decision for v in run(store, config)] == [Decision.WAIT]
    store.append(step("back", "back", adapter_id=OLD, stage="live", created_at=901.0))
    said = feedback("outcome", "back", value=1.0, source="critic:tests", created_at=902.0)
    told = Reward(episode_id=EpisodeId("back"), created_at=902.0, value=1.0, confidence=1.0, feedback_ids=(said.id,))
    store.append(said, told)
    found = run(store, config)
    assert "came back" in found[-1].reason and found[-1].adapter_id == OLD


@pytest.mark.parametrize(("lost", "least"), [(0.1, 0.75), (0.2, 0.95)])
def test_the_cause_is_told_right_in_19_of_20_cases(lost: float, least: float) -> None:
    """A holdback of a tenth, up to 3 points better or worse, and the even shares that the watch gives after an alarm;
    what is told is right, and of a greater fall it is told nearly always."""
    rng, told_right, told_wrong, cases = np.random.default_rng(0), 0, 0, 60
    for case in range(cases):
        is_world, apart = case % 2 == 0, float(rng.uniform(-0.03, 0.03))
        units: list[Rated] = []
        for i in range(7000):
            live = bool(rng.random() < (0.9 if i < 4000 else 0.5))  # the alarm comes after 1,000
            fell = i >= 3000 and (live or is_world)
            mean = 0.6 + (0.0 if live else apart) - (lost if fell else 0.0)
            arm, who = (LIVE, NEW) if live else (CONTROL, OLD)
            units.append(Rated(float(i), who, arm, "", (float(rng.random() < mean), math.nan)))
        for n in range(4000, 7001, 750):
            found = compare(units[:n], 3000.0, 0)
            if found.is_the_world or found.is_the_adapter:
                told_right += found.is_the_world == is_world
                told_wrong += found.is_the_world != is_world
                break
    assert told_right >= 0.95 * (told_right + told_wrong)
    assert told_right + told_wrong >= least * cases


def test_a_skill_is_told_apart_and_its_own_rewards_say_why() -> None:
    units = [
        Rated(float(i), NEW if i % 2 else OLD, LIVE if i % 2 else CONTROL, "ab"[i // 2 % 2], (1.0,)) for i in range(400)
    ]
    fallen = [replace(u, rewards=(0.0,)) if u.served_at >= 200 and u.skill == "a" else u for u in units]
    assert compare(fallen, 200.0, 0, "a").is_the_world
    assert compare(fallen, 200.0, 0, "b").world == 0.5
    assert compare([], 0.0, 0).world == 0.5


# ------------------------------------------------------------------------------------------- restart, and return


@pytest.mark.parametrize(("cut", "saved"), [(250, True), (1230, True), (1230, False), (1600, True)])
def test_a_restart_at_any_point_changes_nothing(
    fresh: Callable[[], SqlStore], cut: int, saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradatim.release.drift._SAVE_EVERY", 150)
    config = Config(drift=QUICK, release=HELD)
    records = episodes(640, world)
    whole = fresh()
    whole.append(*records)
    wanted = [(v.reason, dict(v.evidence)) for v in run(whole, config)]
    assert len(wanted) == 2
    store, folder = fresh(), tmp_path if saved else None
    store.append(*records[:cut])
    run(store, config, folder)
    assert (tmp_path / STATE).exists() == saved
    store.append(*records[cut:])
    assert [(v.reason, dict(v.evidence)) for v in run(store, config, folder)] == wanted
    assert [(v.reason, dict(v.evidence)) for v in run(store, config, folder)] == wanted  # nothing is told twice
    assert store.cursor(RATED) == whole.cursor(RATED) > 0


def test_a_state_that_cannot_be_used_is_made_anew(
    fresh: Callable[[], SqlStore], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = filled(fresh(), world, 100)
    first = Drift(store, Config(drift=QUICK), tmp_path)
    first.turn()
    state = json.loads(json.dumps(first.state()))
    for damaged in ("{", json.dumps({**state, "version": 0}), json.dumps({**state, "requests": {}}), "[]"):
        (tmp_path / STATE).write_text(damaged)
        again = Drift(store, Config(drift=QUICK), tmp_path)
        again.turn()
        assert repr(again.state()) == repr(first.state())
    assert "cannot be used" in caplog.text


def test_a_page_that_is_redesigned_and_comes_back_is_noticed_each_time(fresh: Callable[[], SqlStore]) -> None:
    """The first change is the world's, and rewards fall; after it comes back they rise. Prompts say so at once."""
    store = fresh()
    for first, good, prompt in ((0, 0.9, (1, 2, 3)), (400, 0.4, (7, 8, 9)), (800, 0.9, (1, 2, 3))):
        store.append(*episodes(400, lambda i, who, p=good: p, first=first, prompt_ids=prompt))  # type: ignore[misc]
    found = [v.reason for v in run(store, Config(drift=QUICK, release=HELD))]
    assert sum("prompts are of another kind" in r for r in found) == 2
    assert sum("the world changed" in r for r in found) == 1
    assert sum("rewards by programs rose" in r for r in found) == 1


def test_answers_and_abstentions_are_watched_and_pinned_requests_are_not(fresh: Callable[[], SqlStore]) -> None:
    store = fresh()
    calm = episodes(300, lambda i, who: 1.0)
    longer = episodes(200, lambda i, who: 1.0, first=300, completion_ids=tuple(range(60)))
    store.append(*calm, *[replace(r, value=None) if isinstance(r, Reward) else r for r in longer])
    reasons = [v.reason for v in run(store, Config(drift=QUICK, release=HELD))]
    assert any("the length of answers rose from about 2 to 60 tokens" in r for r in reasons)
    assert any("the share of abstentions rose from about 0.00 to 1.00" in r for r in reasons)
    other = fresh()
    other.append(*calm, *[replace(r, stage="pinned") if isinstance(r, Step) else r for r in longer])
    assert run(other, Config(drift=QUICK, release=HELD)) == []
    assert other.cursor(ASKED) == 0


# ------------------------------------------------------------------------------------------------- what follows


def new_world(since: float, adapts: float = 1.0) -> Verdict:
    return Verdict(
        adapter_id=NEW,
        created_at=since + 10.0,
        gate=DRIFT,
        decision=Decision.PASS,
        evidence={"world": 1.0, "adapt": adapts, "since": since},
    )


def test_where_it_may_adapt_the_record_says_so(fresh: Callable[[], SqlStore]) -> None:
    found = run(filled(fresh(), world), Config(drift=replace(QUICK, react="adapt"), release=HELD))
    assert [is_new_world(v) for v in found] == [False, True]


def learned(store: FakeStore, number: int, examples: Sequence[Example]) -> None:
    made = Update(
        id=f"u{number}",
        created_at=0.0,
        applied=True,
        parent_id=AdapterId(f"agent@{number - 1}"),
        adapter_id=AdapterId(f"agent@{number}"),
        example_ids=tuple(e.id for e in examples),
    )
    store.append(*examples, made, adapter(number, parent=number - 1))

    def move(a: int, before: Stage, after: Stage) -> Move:
        return Move(adapter_id=AdapterId(f"agent@{a}"), created_at=0.0, before=before, after=after, actor="test")

    store.move(move(number - 1, Stage.LIVE, Stage.RETIRED), move(number, Stage.CANDIDATE, Stage.LIVE))


@pytest.mark.parametrize(("adapts", "least", "most"), [(1.0, 0.7, 0.95), (0.0, 0.4, 0.68)])
def test_replay_turns_to_what_is_new_and_forgets_nothing(adapts: float, least: float, most: float) -> None:
    store = FakeStore()
    store.append(adapter(0))
    learned(store, 1, [example(f"old{i}", created_at=float(i)) for i in range(200)])
    learned(store, 2, [example(f"new{i}", created_at=1000.0 + i) for i in range(200)])
    store.append(new_world(1000.0, adapts))
    drawn: list[str] = []
    for seed in range(30):
        drawn += [e.id for e in StoreReplay(store, "agent", seed).draw(10)]
    share = sum(i.startswith("new") for i in drawn) / len(drawn)
    assert least <= share <= most


def test_labels_from_before_the_change_are_no_longer_held_out() -> None:
    store = FakeStore()
    audit = "human:audit-kim"
    for i in range(6):
        store.append(step(f"s{i}", f"e{i}"), feedback("outcome", f"e{i}", value=1.0, source=audit, created_at=float(i)))
    at = store.append(new_world(4.0))
    store.append(step("s9", "e9"), feedback("outcome", "e9", value=1.0, source=audit, created_at=20.0))
    whole, parts = Ledger(store, RewardConfig()), Ledger(store, RewardConfig())
    for position in range(1, 40):
        parts.advance(position)
        if position == at:
            assert parts.alarms == 0  # it takes effect with the next feedback, wherever reading stops
    whole.advance(40)
    assert whole.stale() == parts.stale() == {"e0", "e1", "e2", "e3"}
    assert whole.alarms == parts.alarms == 1


# ------------------------------------------------------------------------------------------------------ the lift


def test_many_bounds_at_once_are_what_one_by_one_would_be() -> None:
    rng = np.random.default_rng(0)
    arm, reward = (rng.random(60) < 0.8).astype(float), rng.random(60)
    many = Contrast([-0.2, 0.0, 0.3], 1, (3,)).update(arm, np.broadcast_to(reward, (3, 60)), np.full(60, 0.8))
    for row, bound in zip(many, (-0.2, 0.0, 0.3), strict=True):
        assert row == pytest.approx(Contrast(bound, 1).update(arm, reward, np.full(60, 0.8)), rel=1e-12)
    with pytest.raises(ValueError, match=r"\[-0.5, 0.5\]"):
        Contrast([0.0, 0.6], 1, (2,))


def test_the_lift_of_learning_and_its_interval() -> None:
    rng, missed = random.Random(0), 0
    for _ in range(8):
        lift = Lift()
        for _ in range(300):
            learned_ = rng.random() < 0.7
            lift.update(learned_, (float(rng.random() < (0.8 if learned_ else 0.4)), math.nan), 0.7)
        found = lift.describe()
        assert set(found) == {"programs"}
        missed += not found["programs"]["low"] <= 0.4 <= found["programs"]["high"]
        assert 0.0 < found["programs"]["low"] < found["programs"]["high"] <= 1.0
    assert missed <= 1
    again = Lift()
    again.restore(json.loads(json.dumps(lift.state())))
    assert again.describe() == lift.describe()
    assert len(BOUNDS) == 41


def test_an_episode_on_the_frozen_base_counts_for_the_lift(fresh: Callable[[], SqlStore]) -> None:
    store, rng = fresh(), random.Random(1)
    records: list[Record] = []
    for record in episodes(400, lambda i, who: 0.9, share=0.0):
        if isinstance(record, Step) and rng.random() < 0.3:
            record = replace(record, adapter_id=BASE, stage="retired")
        if isinstance(record, Step):
            record = replace(record, coin={BASE: 0.3, NEW: 0.7})
        records.append(record)
    store.append(*records)
    drift = Drift(store, Config(drift=QUICK, release=ReleaseConfig(base_share=0.3)))
    while drift.turn():
        pass
    lift = drift.describe()["lift"]["programs"]
    assert abs(lift["lift"]) < 0.15 and lift["low"] < 0.0 < lift["high"] and lift["base"] > 80
    assert drift.describe()["lift_of_live"]["programs"]["learned"] == lift["learned"]
    assert drift.lift_of(NEW) == lift["low"] > drift.lift_of(OLD) == -1.0  # the one that is live, and another


# ------------------------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize(
    ("what", "live", "level", "way_out"),
    [
        ("world", "agent@2", "info", "drift.react"),
        ("adapter", "agent@2", "bad", "rollback"),
        ("adapter", "agent@1", "info", "rollback"),
        ("unknown", "agent@2", "info", "release.base_share"),
        ("changed", "agent@2", "info", ""),
    ],
)
def test_doctor_says_what_changed(what: str, live: str, level: str, way_out: str) -> None:
    told_ = [{"what": what, "live": "agent@2", "reason": "rewards fell", "at": 1.0}]
    learning = {
        "live": live,
        "records": {"feedback": 1},
        "judged_recently": 1,
        "abstained_recently": 0,
        "abstained_because": {},
        "waiting_examples": 0,
        "last_update": None,
        "refused_recently": [],
        "drift": {"told": told_},
    }
    facts = Facts(
        config=Config(),
        has_store=True,
        free_bytes=10**12,
        server_pid=None,
        server_url=None,
        answers=False,
        loop=None,
        learning=learning,
        chromium=True,
    )
    said: list[Finding] = [f for f in findings(facts) if f.about == "drift"]
    assert [(f.level, f.detail) for f in said] == [(level, "rewards fell")]
    assert way_out in said[0].way_out
