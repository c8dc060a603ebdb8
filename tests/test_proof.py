"""How much may go live without proof: the e-value, the count and its memory, and the error rate of the whole rule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradatim.config import GateConfig
from gradatim.release.gates import ReplayGate
from gradatim.release.proof import ALPHA, FARTHEST, PROVABLE, Proof, Standing, awaited, held_out, standing
from gradatim.release.traffic import approve, rollback
from gradatim.stats.pooled import BETS, log_e
from gradatim.store import SqlStore, open_store
from gradatim.types import Adapter, AdapterId, CaseScore, Decision, Example, Move, Stage, Verdict

from .records import adapter, example

CASES = 40

# -------------------------------------------------------------------------------------------------- the e-value


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1, 1), max_size=30))
def test_the_e_value_is_the_mean_of_the_products(differences: list[float]) -> None:
    slow = math.fsum(math.prod(1 + bet * d for d in differences) for bet in BETS) / len(BETS)
    assert log_e(differences) == pytest.approx(math.log(slow), abs=1e-9)
    assert log_e(differences[::-1]) == pytest.approx(log_e(differences), abs=1e-9)


@pytest.mark.parametrize("skills", [(0.0,), (0.3, -0.3), (0.6, -0.2, -0.2, -0.2)])
def test_its_mean_is_at_most_one_where_nothing_is_gained_on_average_over_skills(skills: Sequence[float]) -> None:
    """Exactly, over all outcomes of two cases of each skill with answers won and lost whole."""
    means = [mean for mean in skills for _ in range(2)]
    expected = 0.0
    for outcome in itertools.product((-1.0, 1.0), repeat=len(means)):
        chance = math.prod((1 + d * mean) / 2 for d, mean in zip(outcome, means, strict=True))
        expected += chance * math.exp(log_e(outcome))
    assert expected <= 1.0 + 1e-12


@pytest.mark.parametrize("wrong", [1.5, -1.5, math.nan])
def test_what_is_no_difference_of_chances_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError):
        log_e([0.0, wrong])


# ----------------------------------------------------------------------------------------------------- the rule


def test_a_prompt_that_comes_often_is_one_witness_and_what_was_trained_on_is_none() -> None:
    cases = [example(f"x{i}", state="same", retained=True) for i in range(3)]
    cases += [example("y", state="other", retained=True), example("z", retained=False)]
    assert held_out(cases, [0.1, 0.2, 0.3, -0.5, 0.9]) == pytest.approx([0.2, -0.5])


def test_the_levels_of_all_tries_sum_to_alpha() -> None:
    levels = [math.exp(-Proof(before=Standing(0, k), gains=[0.0] * PROVABLE).needed) for k in range(100_000)]
    assert ALPHA * 0.999 < sum(levels) <= ALPHA


def test_with_few_prompts_nothing_is_asked_and_everything_is_counted() -> None:
    few = Proof(before=Standing(unproven=9, tries=2), gains=[0.9] * (PROVABLE - 1))
    assert few.after == Standing(unproven=10, tries=2) and not few.is_given
    assert not few.missing(GateConfig(), adapter(1), adapter(0))


def test_traffic_that_shows_a_gain_is_proof_for_the_live_adapter_and_not_for_the_candidate() -> None:
    before, gains = Standing(unproven=3), [0.0] * CASES
    assert Proof(before=before, gains=gains, lift=0.0).unproven == 1
    assert Proof(before=before, gains=gains, lift=-0.025).unproven == 4


def test_any_number_may_go_live_where_the_budget_is_switched_off() -> None:
    proof = Proof(before=Standing(unproven=50), gains=[-0.1] * CASES)
    assert proof.missing(GateConfig(), adapter(1), adapter(0))
    assert not proof.missing(GateConfig(unproven=0), adapter(1), adapter(0))


def stream(steps: Iterable[float], cases: int, turnover: float, seed: int) -> tuple[float, int, int]:
    """True gain over the anchor after candidates that change the live one by ``steps``, and how many of them were proof
    or were held back, where nothing but the budget holds them back: no harm is ever seen."""
    config, rng = GateConfig(), np.random.default_rng(seed)
    gained, known, before, proofs, held = 0.0, np.zeros(cases), Standing(), 0, 0
    for step in steps:
        renewed = rng.random(cases) < turnover
        known[renewed] = outcomes(gained, int(renewed.sum()), rng)
        after = np.clip(known + outcomes(step, cases, rng), -1.0, 1.0)
        proof = Proof(before=before, gains=after.tolist())
        proofs += proof.is_given
        if proof.missing(config, adapter(1), adapter(0)):
            before, held = Standing(before.unproven, proof.tries), held + 1
        else:
            before, gained, known = proof.after, gained + step, after
    return gained, proofs, held


def outcomes(mean: float, n: int, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    changed = max(0.1, abs(mean))
    return rng.choice([-1.0, 0.0, 1.0], n, p=[(changed - mean) / 2, 1 - changed, (changed + mean) / 2])


@pytest.mark.parametrize("turnover", [0.0, 0.05, 1.0])
def test_the_error_rate_of_a_hundred_tries_by_simulation(turnover: float) -> None:
    """Nothing is better or worse than the anchor, and what is lucky on the cases that stay goes live."""
    runs = 200
    false = sum(stream([0.0] * 100, 96, turnover, seed)[1] > 0 for seed in range(runs))
    assert false / runs <= ALPHA


def test_a_slow_boil_loses_no_more_than_its_budget_and_honest_gains_are_not_held_up() -> None:
    boiled = [stream([-0.01] * 100, 96, 0.05, seed)[0] for seed in range(50)]
    assert np.mean(boiled) >= -0.04
    held = [stream([0.1] * 3 + [0.0] * 30, 96, 1.0, seed)[2] for seed in range(20)]
    assert sum(held) == 0


# ------------------------------------------------------------------------------------------------- in the store


class Chances:
    """Says with what chance each adapter gives every good answer."""

    def __init__(self, chances: Mapping[int, float]) -> None:
        self.chances = chances

    def score(self, adapter: Adapter, examples: Sequence[Example]) -> Sequence[CaseScore]:
        p = self.chances.get(adapter.step, 0.5)
        return [CaseScore(logprob=math.log(p) / len(e.chosen_ids), greedy=False) for e in examples]


class Lineage:
    """Candidates one after the other, each of the live adapter, by the shipped gate and store."""

    def __init__(self, store: SqlStore, chances: Mapping[int, float] | None = None, lift: float = -1.0) -> None:
        self.store, self.lift = store, lift
        self.scorer = Chances(chances or {})
        self.anchor = adapter(0)
        if not store.newest(Adapter):
            store.append(self.anchor)
            store.append(*(example(f"x{i}", verified=True, retained=True) for i in range(CASES)))

    @property
    def live(self) -> Adapter:
        (live,) = self.store.stages("agent", Stage.LIVE)
        return self.store.newest(Adapter, id=live)[0][1]

    def judge(self) -> Verdict:
        """The next candidate, and what becomes of it."""
        live, step = self.live, 1 + self.store.newest(Adapter)[0][1].step
        made = adapter(step, parent=live.step)
        self.store.append(made)
        gate = ReplayGate(self.store, self.scorer, GateConfig(), lift=lambda of: self.lift)
        verdict = gate.check(made, live, self.anchor)
        passed = verdict.decision is Decision.PASS
        moves = [self.move(made.id, Stage.CANDIDATE, Stage.LIVE if passed else Stage.REJECTED)]
        if passed:
            moves.insert(0, self.move(live.id, Stage.LIVE, Stage.RETIRED))
        self.store.move(*moves, verdicts=[verdict])
        return verdict

    @staticmethod
    def move(of: AdapterId, before: Stage, after: Stage) -> Move:
        return Move(adapter_id=of, created_at=1.0, before=before, after=after, actor="loop")


def counts(verdicts: Iterable[Verdict]) -> list[float]:
    return [v.evidence["unproven"] for v in verdicts]


def test_three_go_live_without_proof_and_the_fourth_needs_it(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        told = [Lineage(store).judge() for _ in range(5)]  # each one after a restart
        assert [v.decision for v in told] == [Decision.PASS] * 3 + [Decision.FAIL] * 2
        assert counts(told) == [1, 2, 3, 4, 4]
        assert [v.evidence["proof.tries"] for v in told] == [1, 2, 3, 4, 5]
        assert awaited(store) == told[-1]
        for words in ("4 updates in a row", "better than agent@0", "+0.0 of 40", "base_share", "approve agent@3"):
            assert words in told[-1].reason


def test_a_proof_fills_the_budget_again(tmp_path: Path) -> None:
    """The fourth gives the good answers more often; what follows is as good as it, and so is proven too."""
    with open_store(tmp_path / "s.db") as store:
        lineage = Lineage(store, dict.fromkeys(range(4, 9), 0.9))
        told = [lineage.judge() for _ in range(8)]
        assert all(v.decision is Decision.PASS for v in told)
        assert counts(told) == [1, 2, 3, 0, 0, 0, 0, 0]
        assert [v.evidence["proof.tries"] for v in told] == [1, 2, 3, 4, 1, 1, 1, 1]
        assert awaited(store) is None


def test_a_gain_of_one_that_was_not_let_live_proves_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        lineage = Lineage(store, {4: 0.9})
        for _ in range(3):
            lineage.judge()
        made = adapter(4, parent=3)
        store.append(made)
        verdict = ReplayGate(store, lineage.scorer, GateConfig()).check(made, lineage.live, lineage.anchor)
        assert verdict.evidence["unproven"] == 0.0
        store.move(lineage.move(made.id, Stage.CANDIDATE, Stage.REJECTED), verdicts=[verdict])
        assert standing(store, lineage.live, lineage.anchor) == Standing(unproven=3, tries=4)
        assert lineage.judge().decision is Decision.FAIL


def test_what_is_refused_for_harm_is_no_try(tmp_path: Path) -> None:
    """However good it were against the anchor."""
    with open_store(tmp_path / "s.db") as store:
        lineage = Lineage(store, {1: 0.99, 2: 0.9})
        first, second = lineage.judge(), lineage.judge()
        assert first.evidence["unproven"] == 0.0 and second.decision is not Decision.PASS
        assert second.evidence["proof.log_e"] > second.evidence["proof.needed"]
        assert second.evidence["proof.tries"] == 0.0 and second.evidence["unproven"] == 1.0


def test_of_a_long_lineage_that_never_said_only_so_much_is_looked_at(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        of = [adapter(0), *(adapter(i, parent=i - 1) for i in range(1, FARTHEST + 50))]
        for made in of:
            store.append(made)
            if made.step:  # there is room for one candidate at a time
                store.move(Lineage.move(made.id, Stage.CANDIDATE, Stage.REJECTED))
        assert standing(store, of[-1], of[0]) == Standing(unproven=FARTHEST)
        assert standing(store, of[40], of[0]) == Standing(unproven=40)


def test_a_person_who_moves_the_anchor_fills_it_too(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        lineage = Lineage(store)
        for _ in range(4):
            lineage.judge()
        assert awaited(store) is not None
        approve(store, "agent", AdapterId("agent@2"), actor="ann")
        assert awaited(store) is None
        lineage.anchor = adapter(2, parent=1)
        assert standing(store, lineage.live, lineage.anchor) == Standing(unproven=1, tries=0)  # agent@3 is live
        assert counts(lineage.judge() for _ in range(3)) == [2, 3, 4]


def test_a_rollback_goes_back_to_the_count_of_the_one_that_is_live_again(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        lineage = Lineage(store)
        for _ in range(4):
            lineage.judge()
        rollback(store, "agent", actor="ann")
        assert lineage.live.id == "agent@2"
        assert standing(store, lineage.live, lineage.anchor) == Standing(unproven=2, tries=4)
        assert counts(lineage.judge() for _ in range(2)) == [3, 4]


def test_what_went_live_by_hand_or_before_there_was_a_count_counts(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        lineage = Lineage(store)
        for step in (1, 2):
            store.append(adapter(step, parent=step - 1))
            live = lineage.live.id
            store.move(
                lineage.move(live, Stage.LIVE, Stage.RETIRED),
                lineage.move(AdapterId(f"agent@{step}"), Stage.CANDIDATE, Stage.LIVE),
            )
        assert counts(lineage.judge() for _ in range(3)) == [3, 4, 4]


def test_traffic_answered_by_the_base_lets_learning_go_on(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        told = [Lineage(store, lift=0.0).judge() for _ in range(6)]
        assert counts(told) == [1] * 6 and all(v.evidence["proof.lift"] == 0.0 for v in told)


def test_traffic_against_the_base_says_nothing_of_another_anchor(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        lineage = Lineage(store, lift=0.0)
        lineage.judge()
        approve(store, "agent", AdapterId("agent@1"), actor="ann")
        lineage.anchor = adapter(1, parent=0)
        assert counts(lineage.judge() for _ in range(4)) == [1, 2, 3, 4]
