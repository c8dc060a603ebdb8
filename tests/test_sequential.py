"""The sequential tests against slow references, and their error rates by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradatim.stats import contrast, detector, paired, ratio
from gradatim.stats.contrast import Contrast
from gradatim.stats.detector import Detector
from gradatim.stats.paired import Paired
from gradatim.stats.ratio import Ratio

Floats = NDArray[np.float64]


def slow_contrast(units: list[tuple[int, float, float]], bound: float, direction: int) -> float:
    """The e-process one unit and one bet at a time, as the docstring's formulas read."""
    seen: list[float] = []
    wealth = [1.0] * len(contrast.ALTERNATIVES)
    for arm, reward, propensity in units:
        if math.isnan(reward):
            continue
        prior = [0.0, 1.0] * 2  # mean 1/2, variance 1/4
        mean = sum(seen + prior) / len(seen + prior)
        variance = max(sum(y * y for y in seen + prior) / len(seen + prior) - mean**2, 1e-3)
        z = (1 / propensity if arm else -1 / (1 - propensity)) * (reward - mean)
        for k, d in enumerate(contrast.ALTERNATIVES):
            widest = max(mean, 1 - mean) / min(propensity, 1 - propensity) + abs(bound)
            bet = min(d * propensity * (1 - propensity) / variance, 0.75 / widest)
            wealth[k] *= 1 + bet * direction * (z - bound)
        seen.append(reward)
    return sum(wealth) / len(wealth)


units = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.one_of(st.just(math.nan), st.floats(0, 1)),
        st.floats(0.01, 0.99),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=50)
@given(units, st.floats(-0.5, 0.5), st.sampled_from([1, -1]), st.integers(0, 30))
def test_the_contrast_is_the_reference_in_whatever_blocks_it_comes(
    rows: list[tuple[int, float, float]], bound: float, direction: int, cut: int
) -> None:
    quick = Contrast(bound, direction)
    for part in (rows[:cut], rows[cut:]):
        columns = np.array(part, dtype=np.float64).reshape(-1, 3).T
        quick.update(*columns)
    assert float(quick.log_e) == pytest.approx(math.log(slow_contrast(rows, bound, direction)), abs=1e-8)


@settings(deadline=None, max_examples=50)
@given(units, st.floats(-0.5, 0.5))
def test_swapping_the_arms_swaps_the_directions(rows: list[tuple[int, float, float]], bound: float) -> None:
    columns = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    better, worse = Contrast(bound, 1), Contrast(-bound, -1)
    better.update(*columns)
    worse.update(1 - columns[0], columns[1], 1 - columns[2])
    assert float(better.log_e) == pytest.approx(float(worse.log_e), abs=1e-8)


@settings(deadline=None, max_examples=50)
@given(units, st.floats(-0.5, 0.5), st.sampled_from([1, -1]))
def test_missing_rewards_change_nothing(rows: list[tuple[int, float, float]], bound: float, direction: int) -> None:
    plain, diluted = Contrast(bound, direction), Contrast(bound, direction)
    columns = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    plain.update(*columns)
    doubled = np.repeat(columns, 2, axis=1)
    doubled[1, ::2] = math.nan
    diluted.update(*doubled)
    assert float(plain.log_e) == pytest.approx(float(diluted.log_e), abs=1e-9)


def test_one_step_is_the_two_sample_e_value_of_zeros_and_ones() -> None:
    """With no bound and no clipping: p_A(y) / (pi p_1(y) + (1 - pi) p_0(y)), with p_1 - p_0 the alternative."""
    pi, mean = 0.3, 0.5
    for arm in (0, 1):
        for reward in (0.0, 1.0):
            e = 0.0
            for d in contrast.ALTERNATIVES:
                d = min(d, 0.75 * 0.25 / (0.5 / 0.3) / (pi * (1 - pi)))
                p = mean + ((1 - pi) * d if arm else -pi * d)
                e += (p if reward else 1 - p) / (mean if reward else 1 - mean)
            found = float(Contrast().update([arm], [reward], [pi])[0])
            assert found == pytest.approx(math.log(e / len(contrast.ALTERNATIVES)))


def trial(
    rng: np.random.Generator, runs: int, n: int, base: float, effect: float, pi: Floats
) -> tuple[Floats, Floats, Floats]:
    arm = (rng.random((runs, n)) < pi).astype(float)
    reward = (rng.random((runs, n)) < base + effect * arm).astype(float)
    return arm, reward, pi


@pytest.mark.parametrize(("base", "pi", "bound"), [(0.6, 0.1, 0.0), (0.95, 0.01, 0.0), (0.6, 0.5, -0.03)])
def test_no_more_nulls_than_alpha_ever_reach_one_over_alpha(base: float, pi: float, bound: float) -> None:
    """1,000 runs looked at after each of 3,000 units, on the boundary of the null, the coin's ramp in between."""
    rng = np.random.default_rng(5)
    coin = np.where(np.arange(3000) < 1000, pi / 2, pi)
    for direction in (1, -1):
        log_e = Contrast(bound, direction, (1000,)).update(*trial(rng, 1000, 3000, base, bound, coin))
        reached = (log_e >= math.log(1 / 0.05)).any(-1).mean()
        assert reached <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / 1000)


def test_the_expectation_under_the_null_is_at_most_one() -> None:
    rng = np.random.default_rng(6)
    arm, _, pi = trial(rng, 5_000, 30, 0.6, 0.0, np.full(30, 0.2))
    reward = rng.beta(2.0, 1.0, (5_000, 30))
    e = np.exp(Contrast(0.0, 1, (5_000,)).update(arm, reward, pi)[:, -1])
    assert e.mean() <= 1.0 + 3 * e.std() / math.sqrt(5_000)


def test_a_difference_is_found() -> None:
    rng = np.random.default_rng(7)
    log_e = Contrast(0.0, -1, (200,)).update(*trial(rng, 200, 6000, 0.6, -0.1, np.full(6000, 0.1)))
    assert (log_e >= math.log(10)).any(-1).mean() >= 0.97


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0.01, 0.99), st.booleans()), max_size=30), st.integers(0, 30))
def test_the_ratio_is_the_reference(rows: list[tuple[int, float, bool]], cut: int) -> None:
    quick = Ratio()
    for part in (rows[:cut], rows[cut:]):
        columns = np.array(part, dtype=np.float64).reshape(-1, 3).T
        quick.update(*columns)
    e = 0.0
    for theta in ratio.TILTS:
        e_theta = 1.0
        for arm, pi, counted in rows:
            tilted = pi * math.exp(theta) / (1 - pi + pi * math.exp(theta))
            if counted:
                e_theta *= (tilted if arm else 1 - tilted) / (pi if arm else 1 - pi)
        e += e_theta / len(ratio.TILTS)
    assert float(quick.log_e) == pytest.approx(math.log(e), abs=1e-8)


def test_a_fair_coin_is_rarely_called_unfair_and_an_unfair_one_is() -> None:
    rng = np.random.default_rng(8)
    pi = np.full(3000, 0.1)
    fair = Ratio((500,)).update(rng.random((500, 3000)) < pi, pi)
    assert (fair >= math.log(1 / 0.01)).any(-1).mean() <= 0.01 + 2.6 * math.sqrt(0.01 * 0.99 / 500)
    silenced = Ratio((200,)).update(rng.random((200, 3000)) < 0.06, pi)
    assert (silenced >= math.log(1 / 0.001)).any(-1).mean() >= 0.99


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(st.just(math.nan), st.floats(0, 1)), max_size=30), st.floats(0, 0.95), st.integers(0, 30))
def test_the_detector_is_the_sum_over_every_start(rewards: list[float], least: float, cut: int) -> None:
    quick = Detector(least)
    quick.update(rewards[:cut])
    quick.update(rewards[cut:])
    known = [y for y in rewards if not math.isnan(y)]
    total = 0.0
    for share in detector.BETS:
        factors = [1 + share / (1 - least) * (least - y) for y in known]
        total += sum(math.prod(factors[start:]) for start in range(len(known))) / len(detector.BETS)
    assert float(quick.value) == pytest.approx(total, rel=1e-9)


def test_false_alarms_are_rarer_than_one_in_the_threshold() -> None:
    """E[M_t] <= t in control, so that an alarm at A within n units has a chance of at most n / A."""
    rng = np.random.default_rng(9)
    values = Detector(0.58, (300,)).update((rng.random((300, 2000)) < 0.58).astype(float))
    assert (values >= 2e4).any(-1).mean() <= 0.1 + 2.6 * math.sqrt(0.1 * 0.9 / 300)
    garbage = Detector(0.95).update(np.zeros(50))
    assert int((garbage >= 1e6).argmax()) < 10


def test_paired_bets_keep_their_level_and_find_a_difference() -> None:
    """On the boundary of the null, looked at after each of 400 pairs with a tenth of them different."""
    rng = np.random.default_rng(10)
    reached = {}
    for mean in (-0.02, 0.05):
        lost, won = 0.05 - mean / 2, 0.05 + mean / 2
        runs = [rng.choice([-1.0, 0.0, 1.0], size=400, p=[lost, 0.9, won]) for _ in range(300)]
        reached[mean] = np.mean([max(Paired(-0.02).update(d.tolist())) >= math.log(20) for d in runs])
    assert reached[-0.02] <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / 300)
    assert reached[0.05] >= 0.9


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1, 1), max_size=30), st.floats(-0.5, 0.5))
def test_pairs_the_other_way_round_swap_the_directions(differences: list[float], bound: float) -> None:
    one, other = Paired(bound, 1), Paired(-bound, -1)
    assert one.update(differences) == pytest.approx(other.update([-d for d in differences]), abs=1e-9)
    wealth = list(paired.SHARES)
    for i, d in enumerate(differences):
        seen = differences[:i]
        n, mean = 4 + i, sum(seen) / (4 + i)
        variance = max((0.4 + sum(x * x for x in seen)) / n - mean**2, 1e-3)
        bets = [min(a / variance, 0.75 / (1 + abs(bound))) for a in paired.ALTERNATIVES]
        wealth = [w * (1 + bet * (d - bound)) for w, bet in zip(wealth, bets, strict=True)]
    assert one.log_e == pytest.approx(math.log(sum(wealth)), abs=1e-8)


def test_what_cannot_be_is_refused() -> None:
    for bound, direction in ((0.6, 1), (0.0, 0), (math.nan, 1)):
        with pytest.raises(ValueError, match="bound"):
            Contrast(bound, direction)
    with pytest.raises(ValueError, match="difference"):
        Paired().update([1.5])
    with pytest.raises(ValueError, match="mean"):
        Detector(1.0)
