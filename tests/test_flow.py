"""From feedback to a promoted, refused or rolled back adapter, with a real store and scripted learner and gates."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from gradatim.config import LearnerConfig, LoopConfig, RewardConfig
from gradatim.credit import OutcomeCredit
from gradatim.errors import DamagedAdapterError, TransitionError
from gradatim.examples import ExampleBuilder
from gradatim.loop import FRESH, JUDGED, LEARNED, Loop
from gradatim.protocols import Store
from gradatim.release.traffic import promote, rollback
from gradatim.reward import WeightedReward
from gradatim.store import open_store
from gradatim.types import (
    Adapter,
    AdapterId,
    Decision,
    Example,
    Move,
    Reward,
    Stage,
    Step,
    StepId,
    Update,
    Verdict,
)

from .records import adapter, feedback, step
from .test_examples import Letters


@dataclass
class CountingLearner:
    calls: list[tuple[list[str], str, int]] = field(default_factory=list)
    refuses: bool = False
    traffic: list[list[str]] = field(default_factory=list)
    good: list[Set[StepId]] = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def update(
        self,
        examples: Sequence[Example],
        replay: Sequence[Example],
        parent: Adapter,
        number: int,
        traffic: Sequence[Step] = (),
        good: Set[StepId] = frozenset(),
    ) -> tuple[Update, Adapter | None]:
        self.calls.append(([e.id for e in examples], parent.id, number))
        self.traffic.append([s.id for s in traffic])
        self.good.append(good)
        made = adapter(number, parent=parent.step)
        record = Update(
            id=f"u{number}",
            created_at=1.0,
            applied=not self.refuses,
            parent_id=parent.id,
            adapter_id=None if self.refuses else made.id,
            example_ids=tuple(e.id for e in examples),
            metrics=self.metrics,
            refused_because="no" if self.refuses else "",
        )
        return record, None if self.refuses else made

    def shrink(self, update: Update, whole: Adapter, parent: Adapter, number: int) -> tuple[Update, Adapter]:
        made = adapter(number, parent=parent.step)
        return replace(update, id=f"u{number}", adapter_id=made.id, scale=0.5 * update.scale), made


class NoReplay:
    def draw(self, n: int, *, exclude: frozenset[str] = frozenset()) -> Sequence[Example]:
        return []


@dataclass
class FixedGate:
    decision: Decision
    name: str = "fixed"

    def check(self, candidate: Adapter, live: Adapter, anchor: Adapter) -> Verdict:
        return Verdict(adapter_id=candidate.id, created_at=1.0, gate=self.name, decision=self.decision, reason="fixed")


@dataclass
class GateOfSteps:
    """Passes the adapters of these steps, and has the others repaired."""

    good: set[int]
    name: str = "steps"

    def check(self, candidate: Adapter, live: Adapter, anchor: Adapter) -> Verdict:
        decision = Decision.PASS if candidate.step in self.good else Decision.REPAIR
        return Verdict(adapter_id=candidate.id, created_at=1.0, gate=self.name, decision=decision, reason="steps")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "s.db") as opened:
        opened.append(adapter(0))
        yield opened


def loop_on(store: Store, decision: Decision = Decision.PASS, refuses: bool = False) -> tuple[Loop, CountingLearner]:
    learner = CountingLearner(refuses=refuses)
    loop = Loop(
        name="agent",
        store=store,
        reward_model=WeightedReward(RewardConfig()),
        credit=OutcomeCredit(RewardConfig()),
        examples=ExampleBuilder(store, Letters(), retain_every=0),
        replay=NoReplay(),
        learner=learner,
        gates={Stage.CANDIDATE: [FixedGate(decision)]},
        config=LoopConfig(settle_s=5.0),
        learning=LearnerConfig(min_examples=1),
        clock=lambda: 100.0,
    )
    return loop, learner


def run(loop: Loop, turns: int = 5) -> None:
    for _ in range(turns):
        loop.turn()


def good_episode(store: Store, name: str = "e", value: float = 1.0) -> None:
    store.append(step(f"{name}-s0", name), feedback("outcome", name, value=value))


@pytest.mark.parametrize(
    ("decision", "stage", "live"),
    [
        (Decision.PASS, Stage.LIVE, "agent@1"),
        (Decision.FAIL, Stage.REJECTED, "agent@0"),
        (Decision.WAIT, Stage.CANDIDATE, "agent@0"),
    ],
)
def test_from_feedback_to_a_decision(store: Store, decision: Decision, stage: Stage, live: str) -> None:
    loop, _ = loop_on(store, decision)
    good_episode(store)
    run(loop)
    stages = store.stages("agent")
    assert stages[AdapterId("agent@1")] is stage
    assert [a for a, s in stages.items() if s is Stage.LIVE] == [live]


def test_the_shadow_stands_between_candidate_and_live_and_every_move_has_its_verdict(store: Store) -> None:
    good_episode(store)
    for last, stage in ((Decision.WAIT, Stage.SHADOW), (Decision.PASS, Stage.LIVE)):
        loop, _ = loop_on(store)
        loop.gates = {Stage.CANDIDATE: [FixedGate(Decision.PASS)], Stage.SHADOW: [FixedGate(last, name="shadow")]}
        loop.path = {Stage.CANDIDATE: Stage.SHADOW, Stage.SHADOW: Stage.LIVE}
        run(loop)
        assert store.stages("agent")[AdapterId("agent@1")] is stage
    told = [(v.gate, v.decision) for _, v in store.read(Verdict, adapter_id="agent@1")]
    assert told == [("fixed", Decision.PASS), ("shadow", Decision.PASS)]


def test_one_named_user_cannot_fill_an_update(store: Store) -> None:
    loop, learner = loop_on(store)
    loop.learning = LearnerConfig(min_examples=1, max_examples=8, user_share=0.25)
    for i in range(12):
        user = "mallory" if i < 8 else ""
        store.append(step(f"s{i}", f"e{i}", user=user), feedback("outcome", f"e{i}", value=1.0))
    run(loop, turns=1)
    assert [i.partition("#")[0] for i in learner.calls[0][0]] == ["s0", "s1", "s8", "s9", "s10", "s11"]


def test_the_learner_is_shown_what_users_were_answered_last(store: Store) -> None:
    loop, learner = loop_on(store)
    for k in range(12):
        store.append(step(f"t{k}", f"other{k}", adapter_id=AdapterId("agent@0")))
    store.append(step("side", "x", adapter_id=AdapterId("agent@0"), trainable=False))
    store.append(step("left", "x", adapter_id=AdapterId("agent@0"), finish_reason="aborted"))
    store.append(step("pinned", "x", adapter_id=AdapterId("agent@0"), stage="pinned"))
    store.append(step("foreign", "x", adapter_id=AdapterId("other@3")))
    given = {"completion_ids": (7, 8), "logprobs": (-2.0, -1.0)}
    store.append(step("supplied", "x", adapter_id=AdapterId("agent@0"), drawn_logprobs=(-0.1, -0.1), **given))
    store.append(step("nudged", "x", adapter_id=AdapterId("agent@0"), drawn_logprobs=(-1.0, -1.0), **given))
    store.append(step("bad", "y", adapter_id=AdapterId("agent@0")), feedback("outcome", "y", value=-1.0))
    store.append(step("e-s0", "e", adapter_id=AdapterId("agent@0")), feedback("outcome", "e", value=1.0))
    loop.turn()
    assert learner.traffic == [["nudged", *(f"t{k}" for k in range(11, 12 - FRESH, -1))]]
    store.append(step("young", "z", adapter_id=AdapterId("agent@1")))
    good_episode(store, "again")
    run(loop)
    assert learner.traffic[-1] == ["young", "e-s0", "nudged", *(f"t{k}" for k in range(11, 14 - FRESH, -1))]
    assert learner.good == [set(), {"e-s0"}]


def test_nothing_is_learned_without_feedback(store: Store) -> None:
    loop, learner = loop_on(store)
    store.append(step())
    run(loop)
    assert learner.calls == []


def test_an_abstention_is_recorded_and_not_trained_on(store: Store) -> None:
    loop, learner = loop_on(store)
    store.append(step(), feedback("outcome", value=None))
    run(loop)
    assert [r.value for _, r in store.read(Reward)] == [None]
    assert learner.calls == []


def test_a_correction_is_learned_from_also_where_the_reward_abstains(store: Store) -> None:
    """And nothing else of that episode is: neither its other steps, nor what a score said."""
    loop, learner = loop_on(store)
    said = [feedback("outcome", value=value, source=f"human:{value}") for value in (1.0, -1.0)]
    store.append(*(step(f"s{k}", prompt_ids=(k,)) for k in range(3)), *said)
    store.append(feedback("score", "e", "s2", value=1.0))
    store.append(feedback("correction", "e", "s1", correction="better"))
    run(loop)
    assert [r.value for _, r in store.read(Reward)] == [None]
    [(_, example)] = store.read(Example)
    assert (example.step_id, example.origin) == ("s1", "correction")
    assert len(learner.calls) == 1


def test_what_was_learned_of_an_episode_is_withdrawn_when_its_reward_abstains_later(store: Store) -> None:
    loop, _ = loop_on(store)
    good_episode(store)
    loop.judge(flush=True)
    store.append(feedback("outcome", "e", value=-1.0, source="human:bob"))
    loop.judge(flush=True)
    assert [r.value for _, r in store.read(Reward)] == [1.0, None]
    assert [e.origin for _, e in store.read(Example)] == ["success", "withdrawn"]


def test_what_judges_only_is_not_learned_from(store: Store) -> None:
    loop, learner = loop_on(store)
    loop.rewards = RewardConfig(held_out=("critic:tests",))
    store.append(step("s0"), feedback("outcome", value=1.0, source="critic:tests"))
    run(loop)
    assert store.cursor(JUDGED) > 0 and not store.read(Reward) and not learner.calls
    store.append(feedback("outcome", value=-1.0, source="human:alice"))
    run(loop)
    assert [r.value for _, r in store.read(Reward)] == [-1.0]


def test_an_example_is_given_to_the_learner_once(store: Store) -> None:
    loop, learner = loop_on(store)
    good_episode(store)
    run(loop, turns=8)
    assert len(learner.calls) == 1


def test_late_feedback_reopens_the_episode(store: Store) -> None:
    loop, learner = loop_on(store)
    good_episode(store)
    run(loop)
    store.append(feedback("correction", "e", "e-s0", correction="better"))
    run(loop)
    assert len(learner.calls) == 2
    assert learner.calls[1][1] == "agent@1"


def test_an_episode_without_an_outcome_is_left_to_settle(store: Store) -> None:
    loop, learner = loop_on(store)
    store.append(step("e-s0"), feedback("correction", "e", "e-s0", correction="better", created_at=97.0))
    run(loop)
    assert learner.calls == []
    loop.clock = lambda: 103.0
    run(loop)
    assert len(learner.calls) == 1


def test_flush_waits_for_nothing(store: Store) -> None:
    loop, learner = loop_on(store)
    loop.learning = LearnerConfig(min_examples=50, max_wait_s=1e9)
    good_episode(store)
    run(loop)
    assert learner.calls == []
    loop.turn(flush=True)
    assert len(learner.calls) == 1


def test_a_refused_update_makes_no_adapter_and_is_not_repeated(store: Store) -> None:
    loop, learner = loop_on(store, refuses=True)
    good_episode(store)
    run(loop)
    assert len(learner.calls) == 1
    assert set(store.stages("agent")) == {"agent@0"}


def test_one_candidate_at_a_time(store: Store) -> None:
    loop, learner = loop_on(store, Decision.WAIT)
    good_episode(store, "e1")
    run(loop)
    good_episode(store, "e2")
    run(loop)
    assert len(learner.calls) == 1


def test_without_a_gate_nothing_moves_up(store: Store) -> None:
    loop, _ = loop_on(store)
    loop.gates = {}
    good_episode(store)
    run(loop)
    assert store.stages("agent")[AdapterId("agent@1")] is Stage.REJECTED


def test_a_new_loop_takes_up_where_the_old_one_was_killed(store: Store) -> None:
    first, _ = loop_on(store)
    good_episode(store)
    first.judge()
    second, learner = loop_on(store)
    run(second)
    assert len(learner.calls) == 1
    assert store.cursor(JUDGED) > 0
    assert store.cursor(LEARNED) > 0


def test_rollback_goes_to_the_newest_ancestor_that_was_live(store: Store) -> None:
    loop, _ = loop_on(store)
    for name in ("e1", "e2"):
        good_episode(store, name)
        run(loop)
    assert rollback(store, "agent", actor="person") == "agent@1"
    stages = store.stages("agent")
    assert stages[AdapterId("agent@2")] is Stage.ROLLED_BACK
    assert stages[AdapterId("agent@1")] is Stage.LIVE
    good_episode(store, "e3")
    run(loop)
    assert store.stages("agent")[AdapterId("agent@3")] is Stage.LIVE
    assert [a.parent_id for _, a in store.read(Adapter, id="agent@3")] == ["agent@1"]


def test_rollback_to_the_base_and_a_promotion_back(store: Store) -> None:
    loop, _ = loop_on(store)
    good_episode(store)
    run(loop)
    rollback(store, "agent", AdapterId("agent@0"), actor="person")
    promote(store, "agent", AdapterId("agent@1"), actor="person")
    assert store.stages("agent")[AdapterId("agent@1")] is Stage.LIVE
    with pytest.raises(TransitionError, match="nothing to roll back to"):
        rollback(store, "agent", AdapterId("agent@0"), actor="person")
        rollback(store, "agent", actor="person")


def test_every_move_is_on_record_with_its_reason(store: Store) -> None:
    loop, _ = loop_on(store)
    good_episode(store)
    run(loop)
    moves = [(m.adapter_id, m.after, m.actor) for _, m in store.read(Move)]
    assert ("agent@1", Stage.LIVE, "loop") in moves
    assert ("agent@0", Stage.RETIRED, "loop") in moves
    assert all(v.reason for _, v in store.read(Verdict))


def test_a_handful_of_examples_is_not_learned_from_alone(store: Store) -> None:
    loop, learner = loop_on(store)
    loop.learning, loop.clock = LearnerConfig(min_examples=2, max_wait_s=0.0), time.time
    good_episode(store, "e1")
    run(loop)
    assert learner.calls == []
    good_episode(store, "e2")
    run(loop)
    assert len(learner.calls) == 1
    good_episode(store, "e3")  # now there is something to replay beside it
    run(loop)
    assert len(learner.calls) == 2


def test_bad_answers_alone_do_not_start_a_first_update(store: Store) -> None:
    loop, learner = loop_on(store)
    good_episode(store, value=-1.0)
    run(loop)
    assert learner.calls == []


def test_what_the_gate_refused_gets_one_more_chance_in_company(store: Store) -> None:
    loop, learner = loop_on(store, Decision.FAIL)
    for name in ("e1", "e2", "e3"):
        good_episode(store, name)
        run(loop)
    first, second, third = (set(ids) for ids, _, _ in learner.calls)
    assert len(first) == 1
    assert first < second
    assert not first & third
    assert len(third) == 2  # the second episode's other chance, and the third episode


def test_after_a_promotion_nothing_is_tried_again(store: Store) -> None:
    loop, learner = loop_on(store)
    for name in ("e1", "e2"):
        good_episode(store, name)
        run(loop)
    assert [len(ids) for ids, _, _ in learner.calls] == [1, 1]


def repaired(store: Store, good: set[int]) -> dict[str, Stage]:
    loop, learner = loop_on(store)
    loop.gates = {Stage.CANDIDATE: [GateOfSteps(good)]}
    good_episode(store)
    run(loop, turns=8)
    assert len(learner.calls) == 1
    return {str(a): stage for a, stage in store.stages("agent").items()}


def test_a_step_that_does_harm_is_halved_until_it_passes(store: Store) -> None:
    stages = repaired(store, good={3})
    assert stages == {
        "agent@0": Stage.RETIRED,
        "agent@1": Stage.REJECTED,
        "agent@2": Stage.REJECTED,
        "agent@3": Stage.LIVE,
    }
    assert [a.parent_id for _, a in store.read(Adapter, id="agent@3")] == ["agent@0"]


def test_a_step_is_halved_twice_at_most(store: Store) -> None:
    stages = repaired(store, good=set())
    assert stages["agent@0"] is Stage.LIVE
    assert [a for a, stage in stages.items() if stage is Stage.REJECTED] == ["agent@1", "agent@2", "agent@3"]


def test_no_gate_has_a_step_halved_that_no_outcome_bears_out(store: Store) -> None:
    loop, learner = loop_on(store)
    learner.metrics = {"borne_out": 0.4}
    loop.gates = {Stage.CANDIDATE: [GateOfSteps({3})]}
    good_episode(store)
    run(loop, turns=8)
    assert dict(store.stages("agent")) == {"agent@0": Stage.LIVE, "agent@1": Stage.REJECTED}


def test_what_was_not_mended_by_halving_gets_its_second_chance(store: Store) -> None:
    loop, learner = loop_on(store)
    loop.gates = {Stage.CANDIDATE: [GateOfSteps(set())]}
    for name in ("e1", "e2"):
        good_episode(store, name)
        run(loop, turns=8)
    assert len(learner.calls[1][0]) == 2


def test_refused_feedback_that_no_outcome_bore_out_does_not_join_the_next_update(store: Store) -> None:
    loop, learner = loop_on(store, Decision.FAIL)
    learner.metrics = {"borne_out": 0.0}
    store.append(step("c-s0", "c"), feedback("correction", "c", step_id="c-s0", correction="better"))
    run(loop)
    good_episode(store)
    run(loop)
    assert [len(ids) for ids, _, _ in learner.calls] == [1, 1]


def test_refused_examples_leave_room_for_new_ones_and_none_is_dropped(store: Store) -> None:
    loop, learner = loop_on(store, Decision.FAIL)
    loop.learning = LearnerConfig(min_examples=1, max_examples=4)
    for name in ("a1", "a2", "a3"):
        good_episode(store, name)
    run(loop)
    for name in ("b1", "b2", "b3"):
        good_episode(store, name)
    run(loop)
    given = [set(ids) for ids, _, _ in learner.calls]
    assert len(given[0]) == 3
    assert given[0] < given[1]  # all refused ones, and one new
    assert len(given[1]) == 4
    assert len(set().union(*given)) == 6


def test_bad_answers_alone_do_not_crowd_out_good_ones(store: Store) -> None:
    loop, learner = loop_on(store)
    loop.learning = LearnerConfig(min_examples=1, max_examples=8)
    for k in range(230):  # more than a page of the log
        good_episode(store, f"bad{k}", value=-1.0)
    good_episode(store, "good")
    run(loop)
    assert [len(ids) for ids, _, _ in learner.calls] == [2]
    (made,) = [u for _, u in store.read(Update)]
    assert made.metrics["passed_over"] == 229


def test_bad_answers_alone_make_no_update_however_long_they_wait(store: Store) -> None:
    loop, learner = loop_on(store)
    loop.learning, loop.clock = LearnerConfig(min_examples=1, max_wait_s=0.0), time.time
    good_episode(store)
    run(loop)
    good_episode(store, "bad", value=-1.0)
    run(loop)
    assert len(learner.calls) == 1


# ------------------------------------------------------------------------------------------- a damaged live adapter


@dataclass
class DamagedFiles(CountingLearner):
    """A learner, and a gate that scores the live adapter, on a disk where these adapters are damaged."""

    damaged: set[str] = field(default_factory=set)
    name: str = "reads"

    def _read(self, adapter: Adapter) -> None:
        if adapter.id in self.damaged:
            raise DamagedAdapterError(adapter.id, f"{adapter.id} is damaged: digest mismatch")

    def update(
        self,
        examples: Sequence[Example],
        replay: Sequence[Example],
        parent: Adapter,
        number: int,
        traffic: Sequence[Step] = (),
        good: Set[StepId] = frozenset(),
    ) -> tuple[Update, Adapter | None]:
        self._read(parent)
        return super().update(examples, replay, parent, number, traffic, good)

    def check(self, candidate: Adapter, live: Adapter, anchor: Adapter) -> Verdict:
        self._read(candidate)
        self._read(live)
        decision = Decision.PASS if candidate.parent_id == live.id else Decision.FAIL
        return Verdict(adapter_id=candidate.id, created_at=1.0, gate=self.name, decision=decision)


def test_a_damaged_live_adapter_gives_way_to_its_nearest_sound_ancestor(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    loop, _ = loop_on(store)
    disk = DamagedFiles()
    loop.learner, loop.gates = disk, {Stage.CANDIDATE: [disk]}
    for number in range(3):
        good_episode(store, f"e{number}")
        run(loop)
    assert store.stages("agent", Stage.LIVE) == {"agent@3": Stage.LIVE}
    disk.damaged = {"agent@3", "agent@2"}
    good_episode(store, "later")
    turns = 0
    while loop.turn():
        turns += 1
    assert turns <= 5  # two steps back, one update and its verdict: nothing is tried for ever
    assert store.stages("agent") == {
        "agent@0": Stage.RETIRED,
        "agent@1": Stage.RETIRED,
        "agent@2": Stage.ROLLED_BACK,
        "agent@3": Stage.ROLLED_BACK,
        "agent@4": Stage.LIVE,
    }
    assert disk.calls[-1][1:] == ("agent@1", 4)
    assert "agent@3 is damaged: digest mismatch; agent@2 is live again" in caplog.text


def test_a_live_adapter_damaged_while_a_candidate_is_judged_gives_way_too(store: Store) -> None:
    loop, _ = loop_on(store)
    disk = DamagedFiles()
    loop.learner, loop.gates = disk, {Stage.CANDIDATE: [disk]}
    good_episode(store, "e0")
    run(loop)
    good_episode(store, "e1")
    assert loop.turn()  # agent@2, a child of agent@1
    disk.damaged = {"agent@1"}
    run(loop)
    stages = store.stages("agent")
    assert (stages[AdapterId("agent@1")], stages[AdapterId("agent@2")]) == (Stage.ROLLED_BACK, Stage.REJECTED)
    assert store.stages("agent", Stage.LIVE) == {"agent@0": Stage.LIVE}


def test_what_is_damaged_but_not_live_is_told(store: Store) -> None:
    loop, _ = loop_on(store)
    disk = DamagedFiles(damaged={"agent@1"})
    loop.gates = {Stage.CANDIDATE: [disk]}
    good_episode(store)
    assert loop.turn()
    with pytest.raises(DamagedAdapterError, match="agent@1"):
        loop.turn()
