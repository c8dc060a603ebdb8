"""The canary and the watch, on a real store: what moves up, what is taken back, and that only the records decide."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradatim.config import Config, ReleaseConfig
from gradatim.protocols import Store
from gradatim.release.canary import CanaryGate
from gradatim.release.trial import Trial, levels_of
from gradatim.release.units import CLASSES, Scored, Served, is_broken
from gradatim.release.watch import Watch, WatchGate
from gradatim.store import open_store
from gradatim.types import Adapter, AdapterId, Decision, Move, Record, Stage, Step, Verdict

from .records import adapter, feedback, step

OLD, NEW = AdapterId("agent@1"), AdapterId("agent@2")
BEGAN = 10_000.0
QUICK = ReleaseConfig(
    canary=True, window_s=10.0, ramp=(0.1, 0.5), ramp_s=20.0, min_episodes=20, min_s=0.0, horizon_s=1e5, decidable=1
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "s.db") as opened:
        opened.append(adapter(0), adapter(1, parent=0))
        move(opened, AdapterId("agent@0"), Stage.LIVE, Stage.RETIRED, OLD, Stage.CANDIDATE, Stage.LIVE)
        opened.append(adapter(2, parent=1))
        yield opened


def move(store: Store, *changes: AdapterId | Stage, at: float = BEGAN) -> None:
    triples = [changes[i : i + 3] for i in range(0, len(changes), 3)]
    store.move(
        *(
            Move(adapter_id=AdapterId(str(a)), created_at=at, before=Stage(b), after=Stage(c), actor="test")
            for a, b, c in triples
        )
    )


def episodes(
    n: int,
    good: Callable[[bool], float],
    *,
    share: float = 0.5,
    start: float = BEGAN,
    sources: Sequence[str] = ("critic:tests",),
    label: str = "e",
    seed: int = 0,
    asked: Callable[[bool], float] = lambda treated: 1.0,
    **fields: object,
) -> list[Record]:
    """n episodes, one a second, by a fair coin between OLD and NEW; ``good`` is each arm's chance of a success."""
    rng = random.Random(seed)
    out: list[Record] = []
    for i in range(n):
        treated = rng.random() < share
        coin = {} if share == 0.0 else {OLD: 1 - share, NEW: share}
        given = {k: v(treated) if callable(v) else v for k, v in fields.items()}
        at = start + i
        base = {"adapter_id": NEW if treated else OLD, "created_at": at, "coin": coin, "user": f"u{i % 40}"}
        out.append(step(f"{label}{i}", f"{label}{i}", **(base | given)))
        for source in sources:
            if rng.random() < asked(treated):
                value = 1.0 if rng.random() < good(treated) else -1.0
                out.append(feedback("outcome", f"{label}{i}", value=value, source=source, created_at=at + 1))
    return out


def canary(store: Store, config: ReleaseConfig, past: int = 200, cases: float = 0.0, **before: object) -> CanaryGate:
    """A gate at the beginning of a canary; ``past`` rated episodes went before it."""
    store.append(*episodes(past, lambda _: 0.6, share=0.0, start=BEGAN - past, label="past", **before))  # type: ignore[arg-type]
    verdict = Verdict(
        adapter_id=NEW, created_at=BEGAN, gate="replay", decision=Decision.PASS, evidence={"cases": cases}
    )
    store.move(
        Move(adapter_id=NEW, created_at=BEGAN, before=Stage.CANDIDATE, after=Stage.CANARY, actor="test"),
        verdicts=[verdict],
    )
    return gate_at(store, config, BEGAN)


def gate_at(store: Store, config: ReleaseConfig, now: float) -> CanaryGate:
    return CanaryGate(store, Config(release=config), clock=lambda: now)


def ask(store: Store, config: ReleaseConfig, now: float, live: int = 1) -> Verdict:
    return gate_at(store, config, now).check(adapter(2, parent=1), adapter(live), adapter(0))


def test_a_better_one_is_promoted_on_the_evidence_of_all_who_spoke_before(store: Store) -> None:
    both = ("critic:tests", "human:ann")
    config = replace(QUICK, user_cap=0)
    canary(store, config, sources=both)
    store.append(*episodes(600, lambda new: 0.9 if new else 0.5, sources=both))
    verdict = ask(store, config, BEGAN + 1000)
    assert verdict.decision is Decision.PASS
    assert verdict.reason.startswith("the canary decided")
    assert min(verdict.evidence[f"{name}.kept"] for name in CLASSES) >= math.log(40)


def test_programs_alone_do_not_promote_where_people_spoke_before(store: Store) -> None:
    canary(store, QUICK, sources=("critic:tests", "human:ann"))
    store.append(*episodes(600, lambda new: 0.9 if new else 0.5))
    assert ask(store, QUICK, BEGAN + 1000).decision is Decision.WAIT


def test_a_worse_one_is_taken_back(store: Store) -> None:
    canary(store, QUICK)
    store.append(*episodes(300, lambda new: 0.2 if new else 0.9))
    verdict = ask(store, QUICK, BEGAN + 1000)
    assert verdict.decision is Decision.FAIL
    assert "worse than the live adapter, say programs" in verdict.reason
    assert "expired" not in verdict.evidence


def test_feedback_counts_only_once_its_window_has_closed(store: Store) -> None:
    canary(store, QUICK)
    store.append(*episodes(300, lambda new: 0.2 if new else 0.9))
    assert ask(store, QUICK, BEGAN + 14).evidence["rated"] == 0.0  # window of 10 s and 5 s of grace
    late = feedback("outcome", "e0", value=-1.0, created_at=BEGAN + 11, source="critic:tests")
    store.append(late)
    first = ask(store, QUICK, BEGAN + 15.5)
    assert first.evidence["rated"] == 1.0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": lambda new: "" if new else "ok"}, "broken"),
        ({"completion_ids": lambda new: (7,) * 200 if new else (7, 8)}, "broken"),
        ({"finish_reason": lambda new: "length" if new else "stop"}, "cut short"),
        ({"finish_reason": lambda new: "aborted" if new else "stop"}, "aborted"),
        ({"completion_ids": lambda new: tuple(range(40)) if new else (7, 8)}, "length"),
        ({"latency_s": lambda new: 9.0 if new else 0.5}, "latency"),
    ],
)
def test_the_guards_need_no_feedback(store: Store, fields: dict[str, object], said: str) -> None:
    canary(store, QUICK, latency_s=0.5)
    store.append(*episodes(300, lambda _: 0.6, sources=(), **fields))  # type: ignore[arg-type]
    verdict = ask(store, QUICK, BEGAN + 300)
    assert verdict.decision is Decision.FAIL
    assert said in verdict.reason


def test_silencing_the_unhappy_decides_nothing_in_its_favour(store: Store) -> None:
    """A worse one, of whose failures few are reported: the rates look better, the counts do not fit the coin."""
    canary(store, QUICK)
    store.append(*episodes(800, lambda new: 0.9 if new else 0.6, asked=lambda new: 0.35 if new else 0.9))
    verdict = ask(store, QUICK, BEGAN + 2000)
    assert verdict.decision is Decision.FAIL
    assert "feedback are not shared out as the coin says" in verdict.reason


def test_a_coin_that_was_not_the_one_that_was_logged_is_noticed(store: Store) -> None:
    canary(store, QUICK)
    records = episodes(400, lambda _: 0.6, share=0.5)
    store.append(*(replace(r, coin={OLD: 0.8, NEW: 0.2}) if isinstance(r, Step) else r for r in records))
    assert "episodes are not shared out" in ask(store, QUICK, BEGAN + 1000).reason


SMALL = replace(QUICK, decidable=10**9, guard_episodes=10)


def test_with_little_traffic_the_pairs_decide_and_the_canary_guards(store: Store) -> None:
    canary(store, SMALL, cases=40.0)
    store.append(*episodes(40, lambda _: 0.6))
    verdict = ask(store, SMALL, BEGAN + 1000)
    assert verdict.decision is Decision.PASS
    assert verdict.reason.startswith("40 offline pairs decided")


def test_with_little_traffic_and_few_pairs_nothing_is_decided_and_it_ends(store: Store) -> None:
    canary(store, SMALL, cases=5.0)
    store.append(*episodes(40, lambda _: 0.6))
    assert ask(store, SMALL, BEGAN + 1000).decision is Decision.WAIT
    verdict = ask(store, SMALL, BEGAN + SMALL.horizon_s + 1)
    assert (verdict.decision, verdict.evidence["expired"]) == (Decision.FAIL, 1.0)


def test_without_any_traffic_nothing_moves_up(store: Store) -> None:
    canary(store, SMALL, past=0, cases=40.0)
    assert ask(store, SMALL, BEGAN + 1000).decision is Decision.WAIT


def test_one_whose_parent_is_no_longer_live_is_not_judged_against_another(store: Store) -> None:
    canary(store, QUICK)
    verdict = ask(store, QUICK, BEGAN + 1, live=0)
    assert (verdict.decision, "no longer live" in verdict.reason) == (Decision.FAIL, True)


def test_the_share_rises_with_quiet_episodes_and_time(store: Store) -> None:
    config = replace(QUICK, ramp=(0.05, 0.1, 0.5), ramp_episodes=5, ramp_s=50.0)
    canary(store, config, past=200)  # an episode a second: 0.1 gives 5 episodes in 50 s
    assert ask(store, config, BEGAN).evidence["share"] == 0.1
    store.append(*episodes(40, lambda _: 0.6))
    assert ask(store, config, BEGAN + 60).evidence["share"] == 0.1  # 20 episodes, but 40 s
    store.append(*episodes(40, lambda _: 0.6, start=BEGAN + 60, label="f"))
    assert ask(store, config, BEGAN + 100).evidence["share"] == 0.5


def test_one_user_counts_a_few_times_only(store: Store) -> None:
    canary(store, QUICK)
    store.append(*episodes(300, lambda new: 1.0 if new else 0.0, user="ann"))
    verdict = ask(store, QUICK, BEGAN + 1000)
    assert (verdict.decision, verdict.evidence["rated"]) == (Decision.WAIT, 5.0)


def test_a_retracted_or_revised_opinion_counts_as_it_stood_when_the_window_closed(store: Store) -> None:
    canary(store, QUICK)
    store.append(*episodes(2, lambda _: 1.0, sources=()))
    said = feedback("score", "e0", id="x", value=1.0, source="critic:t", created_at=BEGAN + 1)
    store.append(said)
    store.append(replace(said, retracted=True, created_at=BEGAN + 2))
    again = feedback("score", "e1", id="y", value=1.0, source="critic:t", created_at=BEGAN + 2)
    store.append(again)
    store.append(replace(again, retracted=True, created_at=BEGAN + 900))
    assert ask(store, QUICK, BEGAN + 1000).evidence["rated"] == 1.0


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 700), min_size=1, max_size=4), st.sampled_from([0.2, 0.5, 0.9]), st.integers(0, 99))
def test_a_restart_at_any_point_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, looks: list[int], quality: float, seed: int
) -> None:
    """One gate that looked again and again, and one that was born after all of it, say the same."""
    with open_store(tmp_path_factory.mktemp("restart") / "s.db") as store:
        store.append(adapter(0), adapter(1, parent=0))
        move(store, AdapterId("agent@0"), Stage.LIVE, Stage.RETIRED, OLD, Stage.CANDIDATE, Stage.LIVE)
        store.append(adapter(2, parent=1))
        canary(store, QUICK)
        store.append(*episodes(300, lambda new: quality if new else 0.5, seed=seed))
        now = [BEGAN]
        steady = CanaryGate(store, Config(release=QUICK), clock=lambda: now[0])
        for look in (*sorted(looks), 1000):
            now[0] = BEGAN + look
            seen = steady.check(adapter(2, parent=1), adapter(1), adapter(0))
        reborn = ask(store, QUICK, BEGAN + 1000)
        assert (seen.decision, seen.evidence["share"]) == (reborn.decision, reborn.evidence["share"])
        if seen.decision is Decision.WAIT:
            assert seen.evidence == pytest.approx(reborn.evidence, abs=1e-3)


# ------------------------------------------------------------------------------------- the pure decision

rows = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.2, 0.5, 0.7]), st.sampled_from([0.0, 1.0, math.nan])), max_size=120
)


def scored(row: tuple[bool, float, float], at: int, abstained: bool = False) -> Scored:
    treated, propensity, reward = row
    unit = Served(f"e{at}", treated, propensity, float(at), float(at), "", (0.0,) * 5)  # type: ignore[arg-type]
    return Scored(unit, (reward, math.nan), abstained or not math.isnan(reward), abstained)


def outcome(units: Sequence[Scored], config: ReleaseConfig) -> str:
    trial = Trial(config, required=CLASSES[:1])
    trial.serve([u.served for u in units])
    trial.score(units)
    return "harm" if trial.harm else "proven" if trial.proven else "undecided"


EVEN = ReleaseConfig(margin=0.0, alpha=0.1, alpha_worse=0.1 / 0.9, alpha_ratio=1e-9, min_episodes=0, min_s=0.0)


@settings(deadline=None, max_examples=40)
@given(rows, st.floats(0.0, 1.0))
def test_swapping_the_arms_swaps_the_decision(drawn: list[tuple[bool, float, float]], lift: float) -> None:
    """With no margin, equal levels and one class: what promotes takes back once the arms' names are exchanged."""
    more = [(i % 2 == 0, 0.5, float(i % 2 == 0 or (i * 0.37) % 1 > lift)) for i in range(200)]
    for units in (drawn, drawn + more):
        plain = outcome([scored(r, i) for i, r in enumerate(units)], EVEN)
        swapped = outcome([scored((not a, 1 - p, y), i) for i, (a, p, y) in enumerate(units)], EVEN)
        assert {"harm": "proven", "proven": "harm"}.get(plain, plain) == swapped


@settings(deadline=None, max_examples=40)
@given(rows, st.lists(st.booleans(), max_size=40), st.integers(0, 10**6))
def test_adding_abstentions_never_promotes(
    drawn: list[tuple[bool, float, float]], silent: list[bool], seed: int
) -> None:
    good = [(i % 2 == 0, 0.5, float(i % 2 == 0 or i % 3 == 0)) for i in range(60)]
    units = [scored(r, i) for i, r in enumerate(drawn + good)]
    rng = random.Random(seed)
    diluted = list(units)
    for arm in silent:
        diluted.insert(rng.randint(0, len(diluted)), scored((arm, 0.5, math.nan), 10_000, abstained=True))
    config = replace(EVEN, alpha_ratio=1e-3, min_episodes=10)
    if outcome(units, config) != "proven":
        assert outcome(diluted, config) != "proven"


@pytest.mark.parametrize("required", [(), CLASSES[:1], CLASSES])
def test_the_chances_of_a_false_alarm_of_all_classes_add_up_to_the_level(required: Sequence[str]) -> None:
    levels = levels_of(0.1, required)
    assert list(levels) == list(CLASSES)
    assert sum(math.exp(-level) for level in levels.values()) == pytest.approx(0.1)
    assert all(levels[name] == min(levels.values()) for name in required)


def test_the_shipped_decision_keeps_its_error_rates() -> None:
    """40 trials each of 3,000 rated episodes at even shares; benchmarks/bench_gates.py has the long run."""
    config = ReleaseConfig(margin=0.03, min_episodes=50, min_s=0.0)
    found = {}
    for effect in (-0.03, -0.15):
        rng = np.random.default_rng(3)
        ends = [outcome(simulated(rng, 3000, effect), config) for _ in range(40)]
        found[effect] = ends
    assert found[-0.03].count("proven") <= 4
    assert found[-0.15].count("proven") == 0
    assert found[-0.15].count("harm") == 40


def simulated(rng: np.random.Generator, n: int, effect: float) -> list[Scored]:
    arms = rng.random(n) < 0.5
    rewards = (rng.random(n) < 0.6 + effect * arms).astype(float)
    return [scored((bool(a), 0.5, float(y)), i) for i, (a, y) in enumerate(zip(arms, rewards, strict=True))]


# ------------------------------------------------------------------------------------------------ the watch


def served(at: int, treated: bool = True, propensity: float = 0.95, broken: float = 0.0) -> Served:
    return Served(f"w{at}", treated, propensity, float(at), float(at), "", (broken, 0, 0, 0.5, 0.5))  # type: ignore[arg-type]


def watched(rng: np.random.Generator, n: int, live: float, good: float, watch: Watch) -> int:
    """How many units until it is rolled back; n where it is not."""
    for i in range(n):
        share = 0.5 if watch.is_suspicious else 0.95
        treated = bool(rng.random() < share)
        reward = float(rng.random() < (live if treated else good))
        watch.score([Scored(served(i, treated, share), (reward, math.nan), True, False)])
        if watch.harm:
            return i
    return n


def test_a_live_one_that_falls_is_rolled_back_and_a_world_that_falls_is_not() -> None:
    config = ReleaseConfig(canary=True)
    fell = [watched(np.random.default_rng(i), 1500, 0.3, 0.6, Watch(config, (0.6, math.nan))) for i in range(3)]
    assert max(fell) < 1500
    calm = [watched(np.random.default_rng(i), 600, 0.3, 0.3, Watch(config, (0.6, math.nan))) for i in range(3)]
    assert min(calm) == 600


def test_when_both_fell_the_world_has_changed_and_is_the_new_measure() -> None:
    config = ReleaseConfig(canary=True, confirm_episodes=200)
    watch = Watch(config, (0.9, math.nan))
    for i in range(600):
        treated = i % 2 == 0
        reward = float(i % 5 != 0) if i < 300 else float(i % 10 < 4)  # 0.8, then 0.4 in both arms
        watch.score([Scored(served(i, treated, 0.5), (reward, math.nan), True, False)])
    assert (watch.harm, watch.alarms, watch.world) == ("", 1, 1)
    assert watch.usual[0] == pytest.approx(0.4, abs=0.1)
    before = watch.alarms
    for i in range(600, 1200):
        watch.score([Scored(served(i, i % 2 == 0, 0.5), (float(i % 10 < 4), math.nan), True, False)])
    assert watch.alarms == before


def test_garbage_is_noticed_within_fifty_requests() -> None:
    watch = Watch(ReleaseConfig(canary=True), (math.nan, math.nan), broken=0.01)
    for i in range(50):
        watch.serve([served(i, broken=float(i % 2 == 0))])  # every second answer
    assert watch.harm == "its answers are broken"
    sound = Watch(ReleaseConfig(canary=True), (math.nan, math.nan), broken=0.01)
    sound.serve([served(i, broken=float(i % 100 == 0)) for i in range(5000)])
    assert not sound.harm


def test_what_a_broken_answer_is() -> None:
    ids = tuple(range(100))
    assert not is_broken(step(completion_ids=ids, text="a long and varied answer", logprobs=(-1.0,) * 100))
    assert is_broken(step(text="  \n"))
    assert is_broken(step(text="a\ufffd\ufffd"))
    assert is_broken(step(completion_ids=(5,) * 16))
    assert is_broken(step(completion_ids=(1, 2, 3) * 40))
    assert is_broken(step(completion_ids=ids, logprobs=(-9.0,) * 100))
    assert not is_broken(step(text="", finish_reason="aborted"))


def test_the_watch_reads_the_store(store: Store) -> None:
    config = Config(release=replace(QUICK, confirm_episodes=500))
    now = [BEGAN]
    store.append(*episodes(200, lambda _: 0.9, share=0.0, start=BEGAN - 300, label="past"))
    for before, after in ((Stage.CANDIDATE, Stage.CANARY), (Stage.CANARY, Stage.LIVE)):
        old = (OLD, Stage.LIVE, Stage.RETIRED) if after is Stage.LIVE else ()
        move(store, *old, NEW, before, after)
    gate = WatchGate(store, config, clock=lambda: now[0])

    def look() -> Verdict:
        return gate.check(_two(), adapter(1, parent=0), adapter(0))

    assert look().decision is Decision.PASS
    store.append(*episodes(60, lambda _: 0.3, share=0.95, label="w"))
    now[0] = BEGAN + 100
    alarmed = look()
    assert (alarmed.decision, alarmed.evidence["share"]) == (Decision.WAIT, 0.5)
    store.append(*episodes(400, lambda new: 0.3 if new else 0.9, share=0.5, start=BEGAN + 100, label="x"))
    now[0] = BEGAN + 1000
    failed = look()
    assert failed.decision is Decision.FAIL
    assert "worse than the last good adapter, say programs" in failed.reason
    reborn = WatchGate(store, config, clock=lambda: now[0]).check(_two(), adapter(1, parent=0), adapter(0))
    assert (reborn.decision, reborn.reason) == (failed.decision, failed.reason)


def _two() -> Adapter:
    return adapter(2, parent=1)
