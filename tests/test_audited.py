"""The reward that audited labels anchor: when it takes over, what it may not be moved by, and what a kill costs it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradatim.app import diagnosis, offline
from gradatim.app.home import Home
from gradatim.config import Config, RewardConfig
from gradatim.protocols import Store
from gradatim.reward import FITTED, AuditedReward, WeightedReward, aggregate, queue
from gradatim.reward.abstain import FAULT, FAULT_VALUE, fault
from gradatim.reward.calibrate import calibrate, is_held_out
from gradatim.reward.evidence import Judged, Opinion, evidence, label_of
from gradatim.reward.ledger import Ledger
from gradatim.store import open_store
from gradatim.testing.fakes import FakeStore
from gradatim.types import Case, Episode, EpisodeId, Feedback, Record, Reward, StepId

from .records import case_of, feedback, step

CONFIG = RewardConfig(audited=("human:audit*",), min_labels=60, risk=0.2)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "s.db") as opened:
        yield opened


def said(episode: str, source: str, value: float | None, kind: str = "score", **given_: object) -> Feedback:
    return Feedback(
        id=f"{episode}-{source}-{kind}",
        created_at=1.0,
        kind="outcome" if kind == "outcome" else "score",
        source=source,
        episode_id=EpisodeId(episode),
        value=value,
        **given_,  # type: ignore[arg-type]
    )


def an_episode(name: str, good: bool, rng: random.Random, audited: bool) -> list[Feedback]:
    """A click that is right in 60 %, of half a judge that is right in 99 %, and, of some, an audit."""
    sign = 1.0 if good else -1.0
    out = [said(name, "implicit:click", sign if rng.random() < 0.6 else -sign)]
    if rng.random() < 0.5:
        out.append(said(name, "judge:j", sign if rng.random() < 0.99 else -sign))
    return [*out, said(name, "human:audit-kim", sign, "outcome")] if audited else out


def fill(store: Store, n: int, *, audited: int, seed: int = 0, first: int = 0) -> None:
    rng = random.Random(seed)
    records: list[Record] = []
    for i in range(first, first + n):
        name = f"e{i}"
        opinions = an_episode(name, rng.random() < 0.5, rng, i - first < audited)
        records += [step(f"s-{name}", name, user=f"u{i % 7}"), *opinions]
    store.append(*records)


def last_case(store: Store, episode: str) -> Case:
    return next(c for c in store.cases(after=0, limit=10_000) if c.episode.id == episode)


# ---------------------------------------------------------------------------------------------- which rule speaks


def test_without_audited_labels_it_is_the_weighted_rule(store: Store) -> None:
    fill(store, 30, audited=0)
    model, weighted = AuditedReward(store, CONFIG, clock=lambda: 1.0), WeightedReward(CONFIG, clock=lambda: 1.0)
    for case in store.cases():
        assert model.score(case) == weighted.score(case)
    assert store.cursor(FITTED) == 0


def test_an_audited_label_is_the_reward(store: Store) -> None:
    case = case_of(feedback("outcome", value=-1.0, source="human:audit-kim"), feedback("score", value=1.0))
    assert AuditedReward(store, CONFIG).score(case).value == -1.0
    both = case_of(
        feedback("outcome", value=-1.0, source="human:audit-kim"),
        feedback("outcome", value=1.0, source="human:audit-bo"),
    )
    assert AuditedReward(store, CONFIG).score(both).value is None  # they contradict each other: weighed, it is 0


def test_only_a_known_outcome_of_a_named_source_is_a_label() -> None:
    audit = feedback("outcome", value=1.0, source="human:audit-kim")
    assert label_of([audit], CONFIG.audited) == 1
    assert label_of([replace(audit, value=None)], CONFIG.audited) is None
    assert label_of([replace(audit, kind="score")], CONFIG.audited) is None
    assert label_of([replace(audit, source="human:auditor2"), replace(audit, value=-1.0)], CONFIG.audited) is None
    assert label_of([replace(audit, source="critic:tests")], CONFIG.audited) is None
    assert label_of([replace(audit, source="critic:tests")], ("critic:tests",)) == 1


def test_with_enough_labels_it_is_calibrated_and_abstains_where_it_is_not_sure(store: Store) -> None:
    fill(store, 300, audited=200)
    model = AuditedReward(store, replace(CONFIG, risk=0.1))
    model.follow(10_000)
    rewards = {c.episode.id: model.score(c) for c in store.cases(limit=1000)}
    assert model.is_calibrated
    assert model.model is not None and model.model.threshold.value is not None
    open_ones = [r for e, r in rewards.items() if int(e[1:]) >= 200]
    assert all(r.value is None or r.reason.startswith("P(good)") for r in open_ones)
    judged = [r for r in open_ones if r.value is not None]
    assert len(judged) > 30
    agree = last_case(store, judged[0].episode_id)
    by_judge = next(f.value for f in agree.feedback if f.source == "judge:j")
    assert by_judge is not None and judged[0].value is not None and judged[0].value * by_judge > 0
    unsure = model.score(case_of(feedback("score", value=1.0, source="implicit:click")))
    assert unsure.value is None and "not sure enough" in unsure.reason
    alone = model.score(case_of(feedback("score", value=1.0, source="critic:new")))
    assert alone.value is None and "no audited episode" in alone.reason


def test_with_few_labels_it_abstains_and_says_so(store: Store) -> None:
    fill(store, 40, audited=20)
    model = AuditedReward(store, replace(CONFIG, model="calibrated"))
    reward = model.score(last_case(store, "e39"))
    assert reward.value is None
    assert "too few audited labels (20)" in reward.reason


def test_labels_without_other_opinions_teach_it_nothing(store: Store) -> None:
    for i in range(80):
        name = f"e{i}"
        store.append(step(f"s{i}", name), said(name, "human:audit-kim", 1.0 if i % 2 else -1.0, "outcome"))
    model = AuditedReward(store, CONFIG)
    model.follow(10_000)
    assert not model.is_calibrated


def test_a_correction_alone_stays_neutral(store: Store) -> None:
    fill(store, 200, audited=200)
    model = AuditedReward(store, CONFIG)
    model.follow(10_000)
    assert model.is_calibrated
    assert model.score(case_of(feedback("correction", step_id="s0", correction="x"))).value == 0.0


# ------------------------------------------------------------------------------------------------ kills and cursors


def test_a_kill_loses_nothing(store: Store) -> None:
    fill(store, 150, audited=120)
    first = AuditedReward(store, CONFIG, clock=lambda: 1.0)
    first.follow(10_000)
    fill(store, 10, audited=0, first=150)  # not enough that is new to fit again
    after = AuditedReward(store, CONFIG, clock=lambda: 1.0)
    reader = AuditedReward(store, CONFIG, clock=lambda: 1.0, read_only=True)
    assert store.cursor(FITTED) > 0
    for case in store.cases(limit=1000):
        told = first.score(case)
        assert after.score(case) == told
        assert reader.score(case) == told


def test_a_reader_moves_no_cursor(store: Store) -> None:
    fill(store, 150, audited=120)
    reader = AuditedReward(store, CONFIG, read_only=True)
    reader.follow(10_000)
    assert store.cursor(FITTED) == 0 and not reader.is_calibrated


def test_a_ledger_is_the_same_in_however_many_pieces_it_is_read(store: Store) -> None:
    fill(store, 30, audited=10)
    store.append(said("e3", "judge:j", -1.0), said("e4", "human:audit-kim", 1.0, "outcome", retracted=True))
    end = max(c.position for c in store.cases(limit=100))
    whole, parts = Ledger(store, CONFIG), Ledger(store, CONFIG)
    whole.advance(end)
    for position in range(1, end + 1):
        parts.advance(position)
    assert whole.rows() == parts.rows()
    assert whole.labels == parts.labels == 9
    upto = Ledger(store, CONFIG)
    upto.advance(end - 1)
    assert upto.labels == 10


def test_when_rewards_no_longer_keep_the_risk_old_labels_are_not_held_out(store: Store) -> None:
    fill(store, 150, audited=150)
    model = AuditedReward(store, CONFIG)
    model.follow(10_000)
    assert model.model is not None and model.model.threshold.labels > 40
    for i in range(1000, 1004):  # the world turned round: what the model is sure of is wrong
        name = f"e{i}"
        reward = Reward(episode_id=EpisodeId(name), created_at=1.0, value=0.9, confidence=0.9, reason="P(good) 0.95")
        audit = said(name, "human:audit-kim", -1.0, "outcome")
        click = said(name, "implicit:click", 1.0)
        store.append(step(f"s-{name}", name), said(name, "judge:j", 1.0), click, reward, audit)
    model.follow(100_000)
    assert model.ledger.alarms == 1
    assert model.model.threshold.labels <= 12
    both = [feedback("score", value=1.0, source=source) for source in ("judge:j", "implicit:click")]
    reward = model.score(case_of(*both))
    assert reward.value is None and "too few audited labels" in reward.reason


# ------------------------------------------------------------------------------------------------------ properties


def population(seed: int, n: int = 240, labelled: int = 160) -> list[Judged]:
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        good = rng.random() < 0.5
        opinions = tuple(
            Opinion(rater, rater.partition(":")[0], (1.0 if good else -1.0) * (1 if rng.random() < right else -1), 1.0)
            for rater, right in (("critic:c", 0.8), ("human:h", 0.9), ("judge:j", 0.7))
            if rng.random() < 0.8
        )
        rows.append(Judged(EpisodeId(f"e{i}"), opinions, rng.gauss(4.0, 1.0), int(good) if i < labelled else None))
    return rows


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=10)
def test_the_order_of_feedback_makes_no_difference(shuffle: random.Random) -> None:
    rows = population(3)
    shuffled = list(rows)
    shuffle.shuffle(shuffled)
    assert np.array_equal(aggregate.fit(rows).logits(rows), aggregate.fit(shuffled).logits(rows))
    given_ = [said("e", s, v) for s, v in (("human:a", 0.3), ("judge:b", -0.7), ("human:a", 0.1), ("x:y", 1.0))]
    given_ = [replace(f, id=str(i)) for i, f in enumerate(given_)]
    mixed = list(given_)
    shuffle.shuffle(mixed)
    steps = (step(),)
    assert evidence(EpisodeId("e"), steps, given_, ()) == evidence(EpisodeId("e"), steps, mixed, ())
    weighted = WeightedReward(RewardConfig(), clock=lambda: 1.0)
    assert weighted.score(case_of(*given_)).value == weighted.score(case_of(*mixed)).value


@given(st.integers(1, 30), st.sampled_from([1.0, -1.0]), st.sampled_from(["human:a", "judge:b", "implicit:c"]))
@settings(deadline=None, max_examples=30)
def test_a_flood_on_one_episode_is_one_opinion(times: int, value: float, source: str) -> None:
    other = said("e", "human:other", -value)
    flood = [replace(said("e", source, value), id=str(i)) for i in range(times)]
    steps = (step(),)
    once = evidence(EpisodeId("e"), steps, [other, flood[0]], ())
    assert evidence(EpisodeId("e"), steps, [other, *flood], ()) == once
    weighted = WeightedReward(RewardConfig(), clock=lambda: 1.0)
    one, many = weighted.score(case_of(other, flood[0])), weighted.score(case_of(other, *flood))
    assert (one.value, one.confidence, one.reason) == (many.value, many.confidence, many.reason)


def flood(store: Store, numbers: range, value: float) -> None:
    store.append(
        *(step(f"f{i}", f"flood{i}") for i in numbers), *(said(f"flood{i}", "human:mallory", value) for i in numbers)
    )


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_a_flood_over_many_episodes_changes_nothing_beyond_its_cap(store: Store, value: float) -> None:
    config = replace(CONFIG, source_cap=20)
    fill(store, 150, audited=120)
    flood(store, range(20), value)
    at_cap = Ledger(store, config)
    at_cap.advance(10_000)
    before = calibrate(at_cap.rows(), config)
    flood(store, range(20, 120), value)
    flooded = Ledger(store, config)
    flooded.advance(10_000)
    after = calibrate(flooded.rows(), config)
    assert sum(o.rater == "human:mallory" for row in flooded.rows() for o in row.opinions) == 20
    rows = population(1, 50, 0)
    assert after.threshold == before.threshold
    assert after.combiner.logits(rows) == pytest.approx(before.combiner.logits(rows), abs=1e-9)


def test_no_rater_and_no_family_says_more_than_its_cap() -> None:
    rows = population(0)
    model = aggregate.fit(rows)
    alone = model.log_odds([Judged(EpisodeId("x"), (Opinion("human:h", "human", 1.0, 1.0),), 4.0)])[0]
    neutral = model.log_odds([Judged(EpisodeId("x"), (), 4.0)])[0]
    assert abs(alone - neutral) <= aggregate.RATER_CAP
    crowd = tuple(Opinion(f"human:new{i:03d}", "human", 1.0, 1.0) for i in range(200))
    assert abs(model.log_odds([Judged(EpisodeId("x"), crowd, 4.0)])[0] - neutral) <= aggregate.FAMILY_CAP


def test_a_source_that_copies_another_adds_little() -> None:
    rows = population(5)
    copied = [
        replace(r, opinions=(*r.opinions, *(replace(o, rater="judge:k") for o in r.opinions if o.rater == "judge:j")))
        for r in rows
    ]
    one, two = aggregate.fit(rows), aggregate.fit(copied)
    by_one = Judged(EpisodeId("x"), (Opinion("judge:j", "judge", 1.0, 1.0),), 4.0)
    by_two = replace(by_one, opinions=(*by_one.opinions, Opinion("judge:k", "judge", 1.0, 1.0)))
    assert two.log_odds([by_two])[0] == pytest.approx(one.log_odds([by_one])[0], abs=0.25)


def test_held_out_labels_do_not_touch_what_is_fitted() -> None:
    rows = population(2)
    turned = [replace(r, label=1 - r.label) if r.label is not None and is_held_out(r.episode_id) else r for r in rows]
    one, other = calibrate(rows, CONFIG), calibrate(turned, CONFIG)
    assert np.array_equal(one.combiner.logits(rows), other.combiner.logits(rows))
    assert one.threshold.value is not None and other.threshold.value is None


def test_the_whole_model_keeps_the_stated_risk() -> None:
    """Of 40 populations, in at least 90 % (less two standard errors) the share of wrong rewards is below the risk."""
    runs, broken, judged = 40, 0, 0
    for seed in range(runs):
        rows = population(seed, 1400, 200)
        truth = {r.episode_id: r.label for r in population(seed, 1400, 1400)}
        fresh = rows[200:]
        model = calibrate(rows[:600], CONFIG)
        if model.threshold.value is None:
            continue
        good, sure = model.judge(fresh)
        kept = sure >= model.threshold.value
        wrong = np.array([(g >= 0.5) != truth[r.episode_id] for g, r in zip(good, fresh, strict=True)])
        judged += 1
        broken += bool(wrong[kept].mean() > CONFIG.risk)
    assert judged > 30
    assert broken / runs <= 0.1 + 2 * (0.1 * 0.9 / runs) ** 0.5


# ----------------------------------------------------------------------------------------------------- abstaining


@given(
    st.sampled_from(["", "click 2"]),
    st.sampled_from(["stop", "length", "aborted"]),
    st.lists(st.tuples(st.sampled_from(["human:a", "judge:b", "implicit:c"]), st.floats(-1, 1)), max_size=4),
)
@settings(deadline=None, max_examples=60)
def test_an_abstention_is_never_worth_anything(text: str, finish: str, opinions: Sequence[tuple[str, float]]) -> None:
    """Whatever keeps the model from judging: no value, or one below zero."""
    config = replace(CONFIG, model="calibrated")
    given_ = (feedback("score", value=v, source=s) for s, v in opinions)
    case = case_of(*given_, steps=(step(text=text, finish_reason=finish),))
    reward = AuditedReward(FakeStore(), config).score(case)
    assert reward.value is None or reward.value in (0.0, FAULT_VALUE)
    assert reward.value != 0.0 or not opinions


def test_what_its_own_doing_made_unjudgeable_is_worth_what_a_failure_is(store: Store) -> None:
    judge = AuditedReward(store, replace(CONFIG, model="calibrated"))
    unknown = feedback("outcome", value=None, source="critic:tests")
    dodged = case_of(unknown, steps=(step(text="Could you say that again?"),))
    assert judge.score(dodged).value == FAULT_VALUE == -1.0
    assert judge.score(dodged).reason.startswith(FAULT)
    assert judge.score(case_of(unknown, steps=(step(text="It is done."),))).value is None
    assert judge.score(replace(dodged, feedback=())).value is None  # retracted: nothing is said of it any more
    weighted = AuditedReward(store, replace(CONFIG, model="weighted"))
    assert weighted.score(dodged).value is None  # without audited labels unknown is never rounded


def test_what_is_the_agents_fault() -> None:
    def of(*steps: dict[str, Any]) -> str:
        return fault(Episode(id=EpisodeId("e"), steps=tuple(step(f"s{i}", **s) for i, s in enumerate(steps))))

    assert of({}) == ""
    assert of({"text": " "}) == "its last answer is empty"
    assert "cut off" in of({"finish_reason": "length"})
    assert of({"finish_reason": "aborted", "text": ""}) == ""
    assert "three times" in of({}, {}, {})
    assert of({}, {}, {"completion_ids": (1,)}) == ""
    assert "cannot be read" in of({"text": "<tool_call>{name: oops</tool_call>"})
    assert "cannot be read" in of({"text": "ok <tool_call>{"})
    assert of({"text": '<tool_call>{"name": "look", "arguments": {}}</tool_call>'}) == ""
    assert "asked back" in of({"text": "Could you tell me more about it?"})
    assert of({"text": "It is the blue one. Can I help you with anything else?"}) == ""
    assert of({"text": "Which one?"}, {}) == ""  # it was answered
    assert fault(Episode(id=EpisodeId("e"), steps=())) == ""


def test_users_are_raters_of_their_own() -> None:
    steps = (step(user="bob"),)
    row = evidence(EpisodeId("e"), steps, [said("e", "human:thumb", 1.0), said("e", "judge:j", 1.0)], ())
    assert [o.rater for o in row.opinions] == ["human:thumb|bob", "judge:j"]


def test_opinions_on_steps_count_where_there_is_none_on_the_episode() -> None:
    on_step = replace(said("e", "human:a", -1.0), step_id=StepId("s0"), id="1")
    whole = replace(said("e", "human:a", 1.0), id="2")
    (only,) = evidence(EpisodeId("e"), (step(),), [on_step], ()).opinions
    assert only.value == -1.0
    (both,) = evidence(EpisodeId("e"), (step(),), [on_step, whole], ()).opinions
    assert both.value == 1.0


# ------------------------------------------------------------------------------------------------- what is shown


def test_the_queue_takes_turns_and_lists_nothing_that_is_audited(store: Store) -> None:
    fill(store, 60, audited=20)
    model = AuditedReward(store, CONFIG, read_only=True)
    model.follow(10_000)
    wanted = queue(model, 1000)
    assert len(wanted) == len({w.episode_id for w in wanted}) == 40
    assert all(int(w.episode_id[1:]) >= 20 for w in wanted)
    halves = [is_held_out(w.episode_id) for w in wanted[:20]]
    assert halves == [False, True] * 10
    unsure = [abs(w.good - 0.5) for w in wanted if not is_held_out(w.episode_id)]
    assert unsure[0] < unsure[-1]
    assert queue(model, 3) == wanted[:3]


def test_the_command_lists_them_with_their_last_answer(tmp_path: Path) -> None:
    config = Config(data_dir=tmp_path)
    Home(tmp_path).prepare()
    with open_store(Home(tmp_path).store) as opened:
        fill(opened, 4, audited=1)
    rows = offline.audit_queue(config, 2)
    assert [set(row) for row in rows] == [{"episode", "response", "good", "why", "answer"}] * 2
    assert rows[0]["response"] == f"s-{rows[0]['episode']}" and rows[0]["answer"] == "click 2"


@pytest.mark.parametrize(
    ("told", "level", "words"),
    [
        ({"rule": "weighted", "audited_labels": 0}, "info", "no outcome came from a source"),
        ({"rule": "weighted", "audited_labels": 7}, "info", "7 audited labels of the 60"),
        ({"rule": "calibrated", "acts_from": None, "held_out_labels": 9}, "wait", "9 held-out labels show no way"),
        ({"rule": "calibrated", "acts_from": 0.8, "coverage": 0.5}, "good", "50 % of open episodes"),
    ],
)
def test_doctor_says_which_rule_judges(told: dict[str, Any], level: str, words: str) -> None:
    base = {"audited_labels": 80, "labels_wanted": 60, "risk": 0.1, "confidence": 0.9}
    (finding,) = diagnosis._reward({**base, **told})
    assert finding.level == level
    assert words in finding.detail


def test_what_status_shows(store: Store) -> None:
    fill(store, 150, audited=120)
    model = AuditedReward(store, CONFIG)
    model.follow(10_000)
    told = model.describe()
    assert told["rule"] == "calibrated" and told["audited_labels"] == 120
    assert isinstance(told["held_out_labels"], int) and 30 < told["held_out_labels"] < 90
    assert isinstance(told["coverage"], float) and told["coverage"] > 0.3
    assert isinstance(told["selective_risk"], float) and told["selective_risk"] <= CONFIG.risk


def test_realised_figures_are_of_what_was_said_before_the_labels_came(store: Store) -> None:
    def judged(name: str, value: float | None) -> Reward:
        return Reward(episode_id=EpisodeId(name), created_at=1.0, value=value, confidence=0.9, reason="mean")

    told: list[tuple[str, float | None, float]] = [("a", 0.8, 1.0), ("b", 0.6, -1.0), ("c", None, 1.0)]
    for name, value, truth in told:
        store.append(step(f"s-{name}", name), judged(name, value), said(name, "human:audit-kim", truth, "outcome"))
        store.append(judged(name, truth))  # afterwards it is the label, which says nothing of how good it was before
    store.append(step("s-d", "d"), said("d", "human:audit-kim", 1.0, "outcome"))  # never judged before
    model = AuditedReward(store, CONFIG)
    model.follow(10_000)
    seen = model.describe()
    assert seen["window_labels"] == 3
    assert seen["window_coverage"] == pytest.approx(2 / 3)
    assert seen["window_selective_risk"] == pytest.approx(1 / 2)
    assert seen["window_ece"] == pytest.approx((0.1 + 0.8) / 2)


def test_reliabilities_are_near_the_truth_and_take_users_together(store: Store) -> None:
    fill(store, 400, audited=300)
    model = AuditedReward(store, CONFIG)
    model.follow(10_000)
    found = {row["source"]: row for row in model.describe()["sources"]}
    assert set(found) == {"implicit:click", "judge:j"}
    assert found["implicit:click"]["right"] == pytest.approx(0.6, abs=0.08)
    assert found["judge:j"]["right"] == pytest.approx(0.99, abs=0.03)
    assert found["implicit:click"]["opinions"] == 400
    assert found["implicit:click"]["audited"] == 300
    assert model.describe()["families"]["judge"]["right"] == pytest.approx(found["judge:j"]["right"])


def test_it_says_why_a_rule_speaks(store: Store) -> None:
    fill(store, 40, audited=20)
    model = AuditedReward(store, CONFIG)
    model.follow(10_000)
    assert model.describe()["why"] == "20 audited labels of the 60 that calibration takes"
    fill(store, 200, audited=180, first=100)
    model.follow(10_000)
    assert model.describe()["why"] == "fitted to 200 audited labels"
    fixed = AuditedReward(store, replace(CONFIG, model="weighted"))
    assert fixed.describe()["why"] == 'reward.model = "weighted"'
