from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from gradatim.config import GateConfig
from gradatim.errors import AdapterError, LearnerError
from gradatim.protocols import Store
from gradatim.release.cases import ENOUGH, SPARE, Cases
from gradatim.release.gates import ReplayGate, StaticGate
from gradatim.release.harm import Leeway, Pairs, common_harm, harm, p_of_loss
from gradatim.store import open_store
from gradatim.types import Adapter, AdapterId, CaseScore, Decision, Example, Update

from .records import adapter, example


class TableScorer:
    """Says for each adapter which examples it answers right."""

    def __init__(self, right: Mapping[str, set[str]], broken: Sequence[str] = ()) -> None:
        self.right, self.broken = right, broken

    def score(self, adapter: Adapter, examples: Sequence[Example]) -> Sequence[CaseScore]:
        if adapter.id in self.broken:
            raise AdapterError(f"{adapter.id}: digest mismatch")
        known = self.right.get(adapter.id, set())
        return [CaseScore(logprob=-0.1 if e.id in known else -1.0, greedy=e.id in known) for e in examples]


def update(update_id: str = "u1", example_ids: tuple[str, ...] = (), **metrics: float) -> Update:
    return Update(
        id=update_id,
        created_at=1.0,
        applied=True,
        parent_id=AdapterId("agent@0"),
        example_ids=example_ids,
        metrics={"loss": 0.5, "delta_norm": 0.01} | metrics,
    )


BASE, CANDIDATE = adapter(0), adapter(1, parent=0)


def static(tmp_path: Path, made: Update | None, candidate: Adapter = CANDIDATE, broken: Sequence[str] = ()) -> str:
    with open_store(tmp_path / "s.db") as store:
        if made:
            store.append(made)
        verdict = StaticGate(store, TableScorer({}, broken), GateConfig()).check(candidate, BASE, BASE)
    return f"{verdict.decision}: {verdict.reason}"


def test_a_sound_candidate_passes_the_static_gate(tmp_path: Path) -> None:
    assert static(tmp_path, update()).startswith("pass")


def test_what_is_not_on_record_does_not_pass(tmp_path: Path) -> None:
    assert "not on record" in static(tmp_path, None)


def test_a_candidate_of_another_parent_does_not_pass(tmp_path: Path) -> None:
    assert "no longer live" in static(tmp_path, update(), adapter(2, parent=1, update_id="u1"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_does_not_pass(tmp_path: Path, value: float) -> None:
    assert "not finite: kl" in static(tmp_path, update(kl=value))


def test_weights_that_moved_too_far_do_not_pass(tmp_path: Path) -> None:
    assert "norm" in static(tmp_path, update(delta_norm=7.0))


def test_an_update_that_does_not_say_how_far_it_moved_does_not_pass(tmp_path: Path) -> None:
    assert "delta_norm" in static(tmp_path, replace(update(), metrics={"loss": 0.5}))


def test_corrupt_files_do_not_pass(tmp_path: Path) -> None:
    assert "digest" in static(tmp_path, update(), broken=["agent@1"])


def replay(store: Store, right: Mapping[str, set[str]], config: GateConfig | None = None) -> tuple[Decision, str]:
    verdict = ReplayGate(store, TableScorer(right), config or GateConfig()).check(CANDIDATE, BASE, BASE)
    return verdict.decision, verdict.reason


def verified(prefix: str, n: int, skill: str, retained: bool = True) -> list[Example]:
    return [example(f"{prefix}{i}", skill=skill, verified=True, retained=retained) for i in range(n)]


def test_answers_that_were_trained_on_only_fill_up(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        store.append(*verified("a", 5, "few"), *verified("b", 30, "few", retained=False), *verified("c", 20, "many"))
        cases = Cases(store, most=96).choose()
    assert sum(e.id.startswith("a") for e in cases) == 5
    assert sum(e.id.startswith("b") for e in cases) == 7
    assert sum(e.id.startswith("c") for e in cases) == 20


def test_losing_known_good_answers_of_one_skill_is_not_paid_for_by_another(tmp_path: Path) -> None:
    old, new = verified("a", 20, "old"), verified("b", 20, "new")
    with open_store(tmp_path / "s.db") as store:
        store.append(*old, *new)
        right = {"agent@0": {e.id for e in old}, "agent@1": {e.id for e in [*old[6:], *new]}}
        decision, reason = replay(store, right)
    assert decision is Decision.REPAIR
    assert "old against live: 4.1 of 20" in reason


def test_harm_beyond_the_margin_is_repaired_however_great(tmp_path: Path) -> None:
    """A margin of 1 of 20 answers, beside gains elsewhere."""
    cases, new = verified("a", 20, "old"), verified("b", 20, "new")
    with open_store(tmp_path / "s.db") as store:
        store.append(*cases, *new)
        for lost, expected in ((1, Decision.PASS), (3, Decision.REPAIR), (12, Decision.REPAIR)):
            right = {"agent@0": {e.id for e in cases}, "agent@1": {e.id for e in [*cases[lost:], *new]}}
            assert replay(store, right)[0] is expected


def test_gains_without_losses_pass(tmp_path: Path) -> None:
    old, new = verified("a", 20, "old"), verified("b", 20, "new")
    with open_store(tmp_path / "s.db") as store:
        store.append(*old, *new)
        right = {"agent@0": {e.id for e in old}, "agent@1": {e.id for e in [*old, *new]}}
        assert replay(store, right)[0] is Decision.PASS


def test_an_update_is_not_its_own_witness(tmp_path: Path) -> None:
    mine, others = verified("m", 5, "s"), verified("o", 5, "s")
    with open_store(tmp_path / "s.db") as store:
        store.append(*mine, *others, update(example_ids=tuple(e.id for e in mine)))
        gate = ReplayGate(store, TableScorer({}), GateConfig())
        verdict = gate.check(CANDIDATE, BASE, BASE)
    assert verdict.evidence["cases"] == 5


def test_only_the_newest_verified_revision_is_a_case(tmp_path: Path) -> None:
    first = example("x#1", verified=True)
    with open_store(tmp_path / "s.db") as store:
        cases = Cases(store, most=96)
        store.append(first)
        assert [e.id for e in cases.choose()] == ["x#1"]
        store.append(example("x#2", step_id=first.step_id, verified=False))
        assert cases.choose() == []


def test_every_skill_gets_its_share_of_the_cases(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        store.append(*verified("a", 90, "common"), *verified("b", 3, "rare"))
        cases = Cases(store, most=20).choose()
    assert sum(e.skill == "rare" for e in cases) == 3
    assert sum(e.skill == "common" for e in cases) == 10


def test_the_memory_of_cases_is_bounded(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        for prefix, n, skill in (("a", 300, "old"), ("b", 300, "new")):
            store.append(*verified(prefix, n, skill), *verified(f"{prefix}t", n, skill, retained=False))
        store.append(*(example(f"own{i}", skill=f"skill {i}", verified=True) for i in range(50)))
        store.append(*verified("c", 2, "old"))
        cases = Cases(store, most=10)
        chosen = cases.choose()
        assert len(chosen) == 10 and {e.skill for e in chosen} == {"old", *(f"skill {i}" for i in range(41, 50))}
        assert len(cases) <= 10 * (10 + ENOUGH + SPARE)
        assert [e.id for e in Cases(store, most=10).choose()] == [e.id for e in chosen]


def test_a_case_that_cannot_be_scored_keeps_no_candidate_from_its_verdict(tmp_path: Path) -> None:
    class Short(TableScorer):
        def score(self, adapter: Adapter, examples: Sequence[Example]) -> Sequence[CaseScore]:
            if any(len(e.chosen_ids) > 5 for e in examples):
                raise LearnerError("its answer alone is too long")
            return super().score(adapter, examples)

    with open_store(tmp_path / "s.db") as store:
        store.append(*verified("a", 6, "s"), example("long", skill="s", verified=True, chosen_ids=(1,) * 9))
        verdict = ReplayGate(store, Short({}), GateConfig()).check(CANDIDATE, BASE, BASE)
        assert verdict.evidence["cases"] == 6 and verdict.decision is Decision.PASS
        with pytest.raises(AdapterError):
            ReplayGate(store, Short({}, broken=["agent@1"]), GateConfig()).check(CANDIDATE, BASE, BASE)


def test_a_verdict_says_how_well_each_skill_is_known(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        store.append(*verified("a", 20, "old"), *verified("b", 20, "new"))
        right = {"agent@1": {f"a{i}" for i in range(20)}}
        evidence = ReplayGate(store, TableScorer(right), GateConfig()).check(CANDIDATE, BASE, BASE).evidence
    assert evidence["old.chance"] == pytest.approx(math.exp(-0.2), abs=1e-3)  # two tokens of -0.1 each
    assert evidence["new.chance"] == pytest.approx(math.exp(-2.0), abs=1e-3)


def simulated(loss: float, runs: int = 400, n: int = 24, noise: float = 0.7) -> Mapping[Decision, float]:
    """Shares of the verdicts on candidates whose every answer's log-odds moved at random (standard deviation
    ``noise``), and of which a share ``loss`` of the known good answers became unlikely. Answers have 4 tokens; the live
    adapter gives them with chances from Beta(6, 1.5), four in five on average."""
    rng, config = random.Random(0), GateConfig()
    verdicts: Counter[Decision] = Counter()
    for _ in range(runs):
        cases = verified("c", n, "s")
        before = [rng.betavariate(6, 1.5) for _ in cases]
        after = [0.05 if rng.random() < loss else _moved(p, rng.gauss(0.0, noise)) for p in before]
        pairs = Pairs.of(cases, _scores(cases, after), _scores(cases, before))
        verdicts[harm(pairs, config)[0]] += 1
    return {decision: verdicts[decision] / runs for decision in Decision}


def test_a_little_harm_everywhere_is_seen() -> None:
    """Sixty answers, each a little less likely; and sixty that only moved at random."""
    rng, config = random.Random(0), GateConfig()
    gains = [rng.gauss(-0.1, 0.1) for _ in range(60)]
    assert common_harm(gains, config)[0] is Decision.REPAIR
    assert common_harm(gains, config, Leeway.of(update(borne_out=0.0)))[0] is Decision.FAIL
    refused = sum(bool(common_harm([rng.gauss(0.0, 0.15) for _ in range(60)], config)[1]) for _ in range(1000))
    assert refused / 1000 <= config.alpha
    assert common_harm([-0.9], config)[0] is Decision.PASS


def _moved(chance: float, log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-(math.log(chance / (1.0 - chance)) + log_odds)))


def _scores(cases: Sequence[Example], chances: Sequence[float]) -> Sequence[CaseScore]:
    both = zip(cases, chances, strict=True)
    return [CaseScore(logprob=math.log(chance) / len(case.chosen_ids), greedy=chance > 0.5) for case, chance in both]


def test_error_rates_of_the_replay_gate_by_simulation() -> None:
    """A harmless candidate is seldom held back; one that lost a third of its answers never goes live as it is."""
    harmless, harmful = simulated(0.0), simulated(1 / 3)
    assert harmless[Decision.PASS] >= 0.9
    assert harmful[Decision.PASS] <= 0.01


def test_likelihood_lost_by_answers_that_nobody_would_have_got_is_no_loss() -> None:
    assert harm(Pairs(n=5, net=0.25, lost=0, won=0, logprob=-0.9), GateConfig())[0] is Decision.PASS


def test_near_equal_answers_that_change_places_are_no_loss(tmp_path: Path) -> None:
    """Ten cases flip from just above to just below the other answer: greedy decoding loses all of them."""
    cases = verified("a", 10, "s")
    before = [CaseScore(logprob=math.log(0.51) / 2, greedy=True) for _ in cases]
    after = [CaseScore(logprob=math.log(0.49) / 2, greedy=False) for _ in cases]
    assert harm(Pairs.of(cases, after, before), GateConfig())[0] is Decision.PASS


def test_feedback_that_no_outcome_bears_out_gets_no_benefit_of_the_doubt(tmp_path: Path) -> None:
    """The same small harm is repaired where outcomes bear out what was taught, and refused where they do not."""
    cases, new = verified("a", 20, "old"), verified("b", 20, "new")
    right = {"agent@0": {e.id for e in cases}, "agent@1": {e.id for e in [*cases[3:], *new]}}
    for share, expected in ((0.5, Decision.REPAIR), (0.49, Decision.FAIL)):
        with open_store(tmp_path / f"{share}.db") as store:
            store.append(*cases, *new, update(borne_out=share))
            decision, reason = replay(store, right)
        assert decision is expected
        assert ("no outcome bears out" in reason) == (expected is Decision.FAIL)


@pytest.mark.parametrize("length", [1.0, 0.5, 0.25])
def test_a_harmful_direction_is_refused_at_any_length_of_its_step(length: float) -> None:
    """Harm in proportion to the step, 1.2 margins at its full length; the trust region may shorten it first."""
    doubtful = Leeway.of(update(borne_out=0.0, fresh_share=length))
    found = Pairs(n=20, net=1.2 * length, lost=0, won=0, logprob=-0.1)
    assert harm(found, GateConfig(), doubtful)[0] is Decision.FAIL
    assert common_harm([-0.06 * length - 0.0001 * i for i in range(20)], GateConfig(), doubtful)[0] is Decision.FAIL
    trusted = Leeway.of(update(borne_out=1.0, fresh_share=length))
    assert harm(found, GateConfig(), trusted)[0] is (Decision.REPAIR if length == 1.0 else Decision.PASS)


def against_anchor(tmp_path: Path, lost: int, won: int) -> Decision:
    """Of 20 answers: against the live adapter nothing changes."""
    cases = verified("a", 20, "old")
    at_anchor, now = cases[won:], cases[: 20 - lost]
    right = {"agent@0": at_anchor, "agent@1": now, "agent@2": now}
    with open_store(tmp_path / f"{lost}-{won}.db") as store:
        store.append(*cases)
        scorer = TableScorer({a: {e.id for e in known} for a, known in right.items()})
        return ReplayGate(store, scorer, GateConfig()).check(adapter(2, parent=1), adapter(1, parent=0), BASE).decision


def test_a_loss_against_the_anchor_must_be_beyond_the_margin_and_beyond_chance(tmp_path: Path) -> None:
    assert against_anchor(tmp_path, lost=1, won=0) is Decision.PASS
    assert against_anchor(tmp_path, lost=8, won=5) is Decision.PASS  # as likely chance
    assert against_anchor(tmp_path, lost=6, won=0) is Decision.REPAIR


def test_the_test_of_a_mean_is_that_of_scipy() -> None:
    dice = random.Random(0)
    gains = [dice.gauss(-0.1, 0.3) for _ in range(24)]
    assert p_of_loss(gains) == pytest.approx(stats.ttest_1samp(gains, 0.0, alternative="less").pvalue)
    assert [p_of_loss(g) for g in ([], [-1.0], [0.0, 0.0], [-0.5, -0.5], [0.5, 0.5])] == [1.0, 1.0, 1.0, 0.0, 1.0]


def test_an_update_of_too_few_users_does_not_pass(tmp_path: Path) -> None:
    users = ["ann", "ann", "", "bob"]
    taught = [example(f"x{i}", user=user) for i, user in enumerate(users)]
    with open_store(tmp_path / "s.db") as store:
        store.append(*taught, update(example_ids=tuple(e.id for e in taught)))
        for wanted, decision in ((0, Decision.PASS), (2, Decision.PASS), (3, Decision.FAIL)):
            gate = StaticGate(store, TableScorer({}), GateConfig(min_users=wanted))
            verdict = gate.check(CANDIDATE, BASE, BASE)
            assert verdict.decision is decision
            assert verdict.evidence.get("users", 2.0) == 2.0
    assert verdict.reason == "2 named users are behind it, and 3 are asked for"
