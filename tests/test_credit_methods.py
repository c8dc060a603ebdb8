"""Each method of credit against a slow reference in plain Python floats (float64), and how methods are blended."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradatim.config import CreditConfig, LearnerConfig, RewardConfig
from gradatim.credit import HorizonCredit, decompose
from gradatim.credit.anchors import contrast
from gradatim.credit.answer import Answer, Blend
from gradatim.credit.decompose import carried
from gradatim.credit.history import Lived
from gradatim.credit.implicit import line
from gradatim.credit.methods import Methods
from gradatim.credit.turns import advantages
from gradatim.learner.lineage import Beside, save
from gradatim.learner.ratios import StepRatios
from gradatim.learner.scorer import TorchScorer
from gradatim.testing.fakes import FakeStore
from gradatim.types import Adapter, AdapterId, Case, Credit, Episode, EpisodeId, Move, Reward, Stage, StepId
from tests import records
from tests.tiny import tiny_base, tiny_weights


def a_life(actions: list[int], value: float, *, states: list[int] | None = None) -> Lived:
    at = tuple(states or range(len(actions)))
    events = tuple(frozenset({100 * s + a}) for s, a in zip(at, actions, strict=True))
    return Lived(value, at, at, tuple(actions), frozenset(), events)


# --------------------------------------------------------------------------------------------------- GAE


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30), st.floats(-1, 1), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_gae_is_the_sum_of_discounted_differences(values: list[float], reward: float, lam: float) -> None:
    steps = len(values) - 1
    ahead = [*values[1:-1], reward]
    delta = [ahead[k] - values[k] for k in range(steps)]
    slow = [sum(lam**j * delta[k + j] for j in range(steps - k)) for k in range(steps)]
    assert advantages(values, reward, lam) == pytest.approx(slow)
    assert sum(advantages(values, reward, 0.0)) == pytest.approx(reward - values[0])
    assert advantages(values, reward, 1.0) == pytest.approx([reward - v for v in values[:-1]])


def test_gae_uses_the_scorer_of_prefixes_and_abstains_with_it() -> None:
    rng = random.Random(0)
    past = []
    for _ in range(60):
        right = rng.random() < 0.5
        past.append(a_life([0, 1 if right else 2, rng.randrange(3), rng.randrange(3)], 1.0 if right else -1.0))
    methods = Methods(CreditConfig(gae_lambda=0.0))
    answer = methods.answer("gae", past[0], past, 60)
    assert answer is not None and answer.method == "gae"
    assert max(range(4), key=lambda k: abs(answer.shares[k])) == 1
    assert "expected reward" in answer.why[1]
    assert Methods(CreditConfig()).answer("gae", past[0], past[:10], 10) is None
    assert Methods(CreditConfig(least_fit=1.1)).answer("gae", past[0], past, 60) is None


# ------------------------------------------------------------------------------------------ other answers


def slow_chance(answers: dict[int, list[float]], action: int, steps: int) -> float:
    """P(it mattered), by products of single ends (Polya's urn) in place of Beta functions."""
    ends = [v for values in answers.values() for v in values]
    mean = (sum(v > 0 for v in ends) + 0.5) / (len(ends) + 1.0)

    def urn(values: list[float]) -> float:
        good, n, chance = 0, 0, 1.0
        for v in values:
            p = (good + mean) / (n + 1.0)
            chance *= p if v > 0 else 1.0 - p
            good, n = good + (v > 0), n + 1
        return chance

    alone = math.prod(mean if v > 0 else 1.0 - mean for v in ends)
    table = math.prod(urn(values) for values in answers.values())
    others = [v for a, values in answers.items() if a != action for v in values]
    factor = (table + urn(answers[action]) * urn(others)) / 2.0 / alone
    return factor / (factor + steps)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_the_chance_that_an_answer_mattered(seen: list[tuple[int, bool]]) -> None:
    lives = [a_life([action, 9], 1.0 if good else -1.0) for action, good in seen]
    this, past = lives[0], lives[1:]
    by_action: dict[int, list[float]] = {}
    for action, good in seen:
        by_action.setdefault(action, []).append(1.0 if good else -1.0)
    mattered = slow_chance(by_action, seen[0][0], 2)
    answer = contrast(this, this.states, [(e, e.states) for e in past])
    others = any(action != seen[0][0] for action, _ in seen)
    if not others or mattered < 0.05:
        assert answer is None
    else:
        assert answer is not None
        assert answer.sure == pytest.approx(mattered)
        assert answer.shares[1] == 0.0


def test_answers_that_never_repeat_are_no_evidence() -> None:
    rng = random.Random(0)
    lives = [a_life([i], rng.choice([1.0, -1.0])) for i in range(40)]
    answer = contrast(lives[0], lives[0].states, [(e, e.states) for e in lives[1:]])
    assert answer is None or answer.sure < 0.7  # one step: even odds beforehand


def test_the_stated_chance_is_the_share_of_worlds_in_which_it_is_so() -> None:
    """Worlds drawn as the method supposes them: each of 8 steps matters with a chance of 1/8, by a chance of a good end
    of its own for each of two answers. Of steps said to matter with a chance of p, a share p does."""
    rng = np.random.default_rng(0)
    said: list[float] = []
    true: list[bool] = []
    for _ in range(400):
        k, mean = int(rng.integers(8)), float(rng.uniform(0.2, 0.8))
        matters = bool(rng.random() < 1 - (7 / 8) ** 8)
        chances = rng.beta(mean, 1 - mean, 2) if matters else np.array([mean, mean])
        actions = rng.integers(0, 2, (16, 8))
        lives = [a_life(list(map(int, row)), 1.0 if rng.random() < chances[row[k]] else -1.0) for row in actions]
        answer = contrast(lives[0], lives[0].states, [(e, e.states) for e in lives[1:]])
        shares = np.zeros(8) if answer is None else np.array([_chance(why) for why in answer.why])
        said += shares.tolist()
        true += [matters and j == k for j in range(8)]
    p, is_so = np.array(said), np.array(true)
    for low, high in ((0.05, 0.3), (0.3, 0.7), (0.7, 1.01)):
        within = (p >= low) & (p < high)
        assert within.sum() > 20
        assert is_so[within].mean() == pytest.approx(p[within].mean(), abs=0.15)


def _chance(why: str) -> float:
    return float(why.rpartition(" ")[2]) if "mattered with a chance of" in why else 0.0


# ------------------------------------------------------------------------------------- scorer of prefixes


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=20))
@settings(max_examples=200, deadline=None)
def test_what_was_expected_before_is_carried_without_a_change_of_sign(values: list[float]) -> None:
    differences = np.diff(values)
    out = carried(np.array(values))
    assert ((out * differences >= 0.0) | (np.abs(differences) < 1e-12)).all()
    toward = differences > 0 if values[-1] > 0 else differences < 0
    mass = np.abs(differences[toward]).sum()
    wanted = abs(values[-1]) + np.abs(differences[~toward]).sum()
    if mass and wanted <= 3.0 * mass:
        assert out.sum() == pytest.approx(values[-1], abs=1e-9)


def test_an_event_that_has_not_happened_counts_as_the_chance_that_it_will() -> None:
    rng = random.Random(3)
    lives = [a_life([rng.randrange(3) for _ in range(rng.randint(3, 6))], 1.0) for _ in range(40)]
    columns = {101: 0, 202: 1}
    hopes = decompose._hopes(lives, columns)
    for event, column in columns.items():
        for k in range(6):
            going_on = [e for e in lives if len(e.events) > k and all(event not in seen for seen in e.events[:k])]
            later = sum(any(event in seen for seen in e.events[k:]) for e in going_on)
            assert hopes[k, column] == pytest.approx(later / max(1, len(going_on)))


def test_what_was_not_done_is_blamed_on_the_step_at_which_it_could_have_been() -> None:
    rng = random.Random(0)
    past = []
    for _ in range(80):
        actions = [rng.randrange(50, 99) for _ in range(12)]  # no two read alike,
        right = rng.random() < 0.4
        actions[3] = 7 if right else rng.randrange(1000, 9999)  # nor do the wrong ones
        past.append(a_life(actions, 1.0 if right else -1.0))
    failed = next(e for e in past if e.value < 0)
    scorer = decompose.fit(past)
    assert scorer is not None and scorer.fit > 0.8
    credit = np.abs(scorer.credit(failed))
    assert credit[3] / credit.sum() > 0.8


def test_a_full_window_is_still_fitted_anew() -> None:
    rng = random.Random(0)

    def lives(good: int, n: int) -> list[Lived]:
        actions = [[rng.randrange(3), rng.randrange(3)] for _ in range(n)]
        return [a_life(a, 1.0 if a[0] == good else -1.0) for a in actions]

    before, after = lives(1, 60), lives(2, 60)
    methods = Methods(CreditConfig(window=60))
    this = a_life([2, 0], 1.0)
    was = methods.answer("decomposition", this, before, 60)
    now = methods.answer("decomposition", this, after, 120)
    assert was is not None and now is not None
    assert now.shares[0] > 0.5 > was.shares[0]


# ----------------------------------------------------------------------------------------- implicit reward


def test_the_line_and_its_fit_against_leaving_each_one_out() -> None:
    rng = np.random.default_rng(0)
    sums = rng.normal(size=25)
    values = np.clip(0.5 * sums + 0.3 * rng.normal(size=25), -1, 1)
    found = line(sums, values)
    assert found is not None
    slope, intercept = np.polyfit(sums, values, 1)
    assert (found.beta, found.intercept) == pytest.approx((slope, intercept))
    wrong = total = 0.0
    for i in range(25):
        rest = np.arange(25) != i
        a, b = np.polyfit(sums[rest], values[rest], 1)
        wrong += (values[i] - (a * sums[i] + b)) ** 2
        total += (values[i] - values[rest].mean()) ** 2
    assert found.fit == pytest.approx(1.0 - wrong / total)
    assert line(np.ones(25), values) is None and line(sums, np.ones(25)) is None


def test_noise_is_seldom_taken_for_a_fit() -> None:
    rng = np.random.default_rng(1)
    found = [line(rng.normal(size=20), rng.choice([-1.0, 1.0], 20)) for _ in range(500)]
    passed = sum(f is not None and f.beta > 0 and f.fit >= CreditConfig().least_fit for f in found)
    assert passed <= 0.03 * 500


class _Served:
    """A store with a live adapter of random weights, and a scorer on the real tiny model."""

    def __init__(self, folder: Path) -> None:
        base = tiny_base()
        self.config = LearnerConfig(threads=1)
        self.store = FakeStore()
        self.base = records.adapter(0, base_sha256=base.sha256, sha256=base.sha256)
        made = save(base, folder, "agent", tiny_weights(base.model), Beside(), self.base, 1, "u1")
        self.live = replace(made, created_at=100.0)
        self.store.append(self.base, self.live)
        moves = (("agent@0", Stage.LIVE, Stage.RETIRED), ("agent@1", Stage.CANDIDATE, Stage.LIVE))
        self.store.move(
            *(
                Move(adapter_id=AdapterId(name), created_at=1.0, before=before, after=after, actor="test")
                for name, before, after in moves
            )
        )
        self.scorer = TorchScorer(base, self.config, folder)
        self.ratios = StepRatios(self.store, self.scorer, "agent")
        self.folder = folder

    def episode(self, name: str, rng: random.Random, steps: int = 12, at: float = 200.0) -> Episode:
        made = [
            records.step(
                f"{name}-{k}",
                name,
                created_at=at,
                prompt_ids=tuple(rng.randrange(1, 97) for _ in range(6)),
                completion_ids=tuple(rng.randrange(1, 97) for _ in range(3)),
            )
            for k in range(steps)
        ]
        return Episode(id=EpisodeId(name), steps=tuple(made))


@pytest.fixture
def served(tmp_path: Path) -> _Served:
    return _Served(tmp_path)


def slow_logprob(served: _Served, adapter: Adapter, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """Token by token, by the model alone."""
    shared = served.scorer._trainable
    with shared.lock, torch.no_grad():
        shared.wear(adapter, served.folder)
        total = 0.0
        for k, token in enumerate(answer):
            logits = shared.model(torch.tensor([[*prompt, *answer[:k]]])).logits[0, -1].double()
            total += float(torch.log_softmax(logits, -1)[token])
    return total


def test_log_ratios_are_those_of_the_model(served: _Served) -> None:
    episode = served.episode("e", random.Random(0), steps=3)
    ratios = served.ratios.of(episode)
    assert ratios is not None
    for step, ratio in zip(episode.steps, ratios, strict=True):
        pi, ref = (slow_logprob(served, a, step.prompt_ids, step.completion_ids) for a in (served.live, served.base))
        assert ratio == pytest.approx(pi - ref, abs=1e-4)
    assert served.ratios.version() == served.live.sha256
    early = served.episode("early", random.Random(0), steps=3, at=50.0)
    assert served.ratios.of(early) is None, "the live adapter may have been trained on it"


def test_implicit_credit_through_the_store_sums_to_the_reward(served: _Served) -> None:
    """Episodes end well where the live adapter likes them more than the base does."""
    rng = random.Random(0)
    episodes = [served.episode(f"e{i}", rng) for i in range(26)]
    totals = [sum(served.ratios.of(e) or ()) for e in episodes]
    middle = sorted(totals)[13]
    values = [1.0 if total > middle else -1.0 for total in totals]
    *past, this = zip(episodes, values, strict=True)
    for episode, value in past:
        served.store.append(
            *episode.steps, Reward(episode_id=episode.id, created_at=300.0, value=value, confidence=0.9)
        )
    credit = HorizonCredit(served.store, CreditConfig(order=("implicit",)), RewardConfig(), ratios=served.ratios)
    outcome = records.feedback("outcome", this[0].id, value=this[1])
    case = Case(position=1, episode=this[0], feedback=(outcome,), touched_at=1.0)
    reward = Reward(episode_id=this[0].id, created_at=1.0, value=this[1], confidence=0.9)
    found = credit.assign(case, reward)
    assert set(found.methods) == {"implicit"}
    assert sum(found.advantages) == pytest.approx(this[1])
    assert "log pi / pi_ref" in found.reasons[0]
    without = HorizonCredit(served.store, CreditConfig(order=("implicit",)), RewardConfig())
    assert set(without.assign(case, reward).methods) == {"outcome"}


# --------------------------------------------------------------------------------------------------- blend


def plain(*shares: float, methods: tuple[str, ...] = ()) -> Credit:
    ids = tuple(StepId(str(k)) for k in range(len(shares)))
    named = methods or ("outcome",) * len(shares)
    return Credit(
        episode_id=EpisodeId("e"), created_at=0.0, step_ids=ids, advantages=shares, methods=named, reasons=named
    )


def test_what_a_method_is_not_sure_of_is_left_to_the_next() -> None:
    blend = Blend(plain(0.5, 0.5))
    blend.add(Answer("first", (1.0, 0.0), ("a", "b"), sure=0.6))
    blend.add(Answer("second", (0.0, -1.0), ("c", "d"), sure=0.5))
    found = blend.result()
    assert found.advantages == pytest.approx((0.6 + 0.2 * 0.5, -0.2 + 0.2 * 0.5))
    assert found.methods == ("first", "second")
    assert found.reasons == ("a (weight 0.60)", "d (weight 0.20)")


def test_a_method_that_is_as_good_as_sure_leaves_nothing() -> None:
    blend = Blend(plain(0.5, 0.5))
    blend.add(Answer("first", (1.0, 0.0), ("a", "b"), sure=0.97))
    assert blend.is_done
    assert blend.result().advantages == (1.0, 0.0)
    assert blend.result().methods == ("first", "first")


def test_one_that_knows_nothing_changes_nothing() -> None:
    before = plain(0.5, -1.0, methods=("outcome", "correction"))
    blend = Blend(before)
    blend.add(Answer("first", (1.0, 1.0), ("a", "b"), sure=0.01))
    assert blend.result() is before
    blend.add(Answer("second", (1.0, 1.0), ("a", "b")))
    assert blend.result().methods == ("second", "correction")
    assert blend.result().advantages == (1.0, -1.0)
