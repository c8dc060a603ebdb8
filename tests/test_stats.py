"""Each statistic against a slow reference, and the error rate of what promises one."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from gradatim.stats import dawid_skene, learn_then_test, logistic
from gradatim.stats.dawid_skene import Votes
from gradatim.stats.venn_abers import VennAbers, expected_calibration_error

Floats = npt.NDArray[np.float64]

# ------------------------------------------------------------------------------------------------- Dawid-Skene


def naive_em(
    votes: Votes, items: int, prior: Floats, labels: npt.NDArray[np.int64], strength: float, iterations: int
) -> tuple[Floats, Floats]:
    """The formulas of the module, a vote at a time: (confusion, P(good))."""
    raters = prior.shape[0]
    theta = np.array([[row / row.sum() for row in rater] for rater in prior])
    base = 0.5
    q = np.zeros(items)
    for _ in range(iterations):
        for i in range(items):
            like = [math.log(1 - base), math.log(base)]
            for v in range(len(votes.item)):
                if votes.item[v] == i:
                    for y in (0, 1):
                        like[y] += votes.weight[v] * math.log(theta[votes.rater[v], y, votes.category[v]])
            q[i] = labels[i] if labels[i] >= 0 else 1.0 / (1.0 + math.exp(like[0] - like[1]))
        base = (q.sum() + 1) / (items + 2)
        for j in range(raters):
            for y in (0, 1):
                count = strength * prior[j, y] / prior[j, y].sum() + 1e-12
                for v in range(len(votes.item)):
                    if votes.rater[v] == j:
                        share = q[votes.item[v]] if y else 1 - q[votes.item[v]]
                        count[votes.category[v]] += votes.weight[v] * share
                theta[j, y] = count / count.sum()
    return theta, q


def random_votes(rng: np.random.Generator, items: int, raters: int, n: int) -> Votes:
    return Votes(
        rng.integers(0, items, n),
        rng.integers(0, raters, n),
        rng.integers(0, 3, n),
        rng.choice([0.5, 1.0], n),
    )


@pytest.mark.parametrize("seed", range(5))
def test_dawid_skene_is_the_naive_em(seed: int) -> None:
    rng = np.random.default_rng(seed)
    votes = random_votes(rng, 12, 4, 40)
    prior = np.repeat(np.array([[[0.6, 0.1, 0.3], [0.3, 0.1, 0.6]]]), 4, axis=0)
    labels = rng.choice([-1, -1, 0, 1], 12).astype(np.int64)
    model, good = dawid_skene.fit(votes, items=12, prior=prior, labels=labels, iterations=30, tolerance=0.0)
    confusion, expected = naive_em(votes, 12, prior, labels, 4.0, 30)
    assert model.confusion == pytest.approx(confusion, abs=1e-10)
    assert good == pytest.approx(expected, abs=1e-10)


def test_dawid_skene_finds_who_lies() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 400)
    accuracy = (0.9, 0.8, 0.2)
    item = np.tile(np.arange(400), 3)
    rater = np.repeat(np.arange(3), 400)
    right = rng.random(1200) < np.array(accuracy)[rater]
    votes = Votes(item, rater, np.where(right, truth[item], 1 - truth[item]), np.ones(1200))
    labels = np.where(np.arange(400) < 40, truth, -1)
    model, good = dawid_skene.fit(votes, items=400, prior=np.full((3, 2, 2), 0.5), labels=labels)
    assert model.confusion[:, 1, 1] == pytest.approx(accuracy, abs=0.06)
    assert ((good > 0.5) == truth).mean() > 0.9


def test_copies_of_one_rater_count_about_once() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 300)
    said = np.where(rng.random(300) < 0.7, truth, 1 - truth)
    other = np.where(rng.random(300) < 0.7, truth, 1 - truth)
    item = np.tile(np.arange(300), 5)
    rater = np.repeat(np.arange(5), 300)
    votes = Votes(item, rater, np.concatenate([said] * 4 + [other]), np.ones(1500))
    weight = dawid_skene.overlap(votes, truth.astype(float), raters=5, categories=2)
    assert weight[:4] == pytest.approx(0.25, abs=0.05)
    assert weight[4] > 0.75


# ------------------------------------------------------------------------------------------------- logistic


def test_logistic_regression_is_at_its_minimum() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 3))
    y = (rng.random(80) < logistic.sigmoid(x @ np.array([1.0, -2.0, 0.0]))).astype(float)
    centre, strength = np.array([1.0, 0.0, 0.0]), np.array([0.5, 2.0, 1.0])
    b = logistic.fit(x, y, centre=centre, strength=strength)
    gradient = x.T @ (logistic.sigmoid(x @ b) - y) + strength * (b - centre)
    assert np.abs(gradient).max() < 1e-5


def test_logistic_regression_without_data_stays_at_its_centre_and_survives_separation() -> None:
    centre, strength = np.array([1.0, -1.0]), np.array([1.0, 1.0])
    assert logistic.fit(np.zeros((0, 2)), np.zeros(0), centre=centre, strength=strength) == pytest.approx(centre)
    x = np.array([[-1e3, 1.0], [1e3, 1.0]])
    assert np.isfinite(logistic.fit(x, np.array([0.0, 1.0]), centre=centre, strength=strength)).all()


# ------------------------------------------------------------------------------------------------ calibration


def isotonic(y: Floats, w: Floats) -> Floats:
    """The reference of the predictor below, itself checked against the formula."""
    return np.asarray(isotonic_regression(y, weights=w).x)


def slow_isotonic(y: Floats, w: Floats) -> Floats:
    """The min-max formula, in O(N³)."""
    n = len(y)

    def mean(a: int, b: int) -> float:
        return float((y[a : b + 1] * w[a : b + 1]).sum() / w[a : b + 1].sum())

    return np.array([max(min(mean(a, b) for b in range(i, n)) for a in range(i + 1)) for i in range(n)])


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5)), min_size=1, max_size=12))
@settings(deadline=None, max_examples=60)
def test_isotonic_regression_is_the_min_max_formula(points: list[tuple[float, int]]) -> None:
    y, w = np.array([p[0] for p in points]), np.array([float(p[1]) for p in points])
    assert isotonic(y, w) == pytest.approx(slow_isotonic(y, w), abs=1e-9)


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1)), min_size=1, max_size=25),
    st.lists(st.integers(-1, 17), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=100)
def test_venn_abers_is_two_isotonic_fits_for_each_score(points: list[tuple[int, int]], asked: list[int]) -> None:
    scores, labels = np.array([float(p[0]) for p in points]), np.array([float(p[1]) for p in points])
    new = np.array(asked) / 2.0
    low, high = VennAbers(scores, labels).interval(new)
    for k, x in enumerate(new):
        for label, got in ((0.0, low[k]), (1.0, high[k])):
            every, index = np.unique(np.append(scores, x), return_inverse=True)
            count = np.bincount(index).astype(float)
            mean = np.bincount(index, weights=np.append(labels, label)) / count
            assert got == pytest.approx(isotonic(mean, count)[np.searchsorted(every, x)], abs=1e-9)
    p = VennAbers(scores, labels).probability(new)
    assert ((low <= p + 1e-12) & (p <= high + 1e-12)).all()
    assert (np.diff(VennAbers(scores, labels).probability(np.sort(new))) >= -1e-12).all()


def test_venn_abers_calibrates_a_distorted_score() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(6000)
    y = (rng.random(6000) < p).astype(float)
    distorted = p**3
    calibrated = VennAbers(distorted[:1000], y[:1000]).probability(distorted[1000:])
    assert expected_calibration_error(distorted[1000:], y[1000:]) > 0.2
    assert expected_calibration_error(calibrated, y[1000:]) < 0.04


def test_calibration_error_of_known_cases() -> None:
    assert expected_calibration_error(np.array([0.2] * 10), np.array([1.0, 0.0, 0.0, 0.0, 0.0] * 2), bins=1) == 0.0
    assert expected_calibration_error(np.array([0.9] * 4), np.zeros(4)) == pytest.approx(0.9)
    assert expected_calibration_error(np.zeros(0), np.zeros(0)) == 0.0


# ------------------------------------------------------------------------------------------- learn then test


def sample(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    """(how sure, wrong): errors grow rarer the surer."""
    sure = 0.5 + 0.5 * rng.random(n)
    return sure, (rng.random(n) < 0.5 * (1.0 - sure)).astype(float)


def risk_above(t: float) -> float:
    """Of that population: the mean of (1 - s) / 2 over s uniform on [t, 1]."""
    return 0.25 * (1.0 - t)


@pytest.mark.parametrize(("n", "risk", "power"), [(100, 0.1, 0.1), (400, 0.1, 0.9), (1000, 0.05, 0.7)])
def test_the_stated_risk_is_kept_as_often_as_stated(n: int, risk: float, power: float) -> None:
    rng = np.random.default_rng(n)
    grid = [0.5 + 0.01 * k for k in range(50)]
    runs, broken, found = 1000, 0, 0
    for _ in range(runs):
        sure, wrong = sample(rng, n)
        chosen = learn_then_test.choose(sure, wrong, (1.0 - sure) / 2, grid=grid, risk=risk, confidence=0.9)
        found += chosen.value is not None
        broken += chosen.value is not None and risk_above(chosen.value) > risk
    assert broken / runs <= 0.1 + 2.6 * math.sqrt(0.1 * 0.9 / runs)
    assert found / runs >= power


def test_a_hopeless_scorer_gets_no_threshold() -> None:
    rng = np.random.default_rng(0)
    grid = [0.5 + 0.01 * k for k in range(50)]
    got = 0
    for _ in range(300):
        sure = 0.5 + 0.5 * rng.random(200)
        wrong = (rng.random(200) < 0.3).astype(float)
        got += learn_then_test.choose(sure, wrong, 1 - sure, grid=grid, risk=0.1, confidence=0.9).value is not None
    assert got / 300 <= 0.1


def test_too_few_labels_give_no_threshold() -> None:
    few = learn_then_test.fewest(0.1, 0.1)
    assert few == 22
    for n in (0, few - 1, few):
        ones, zeros = np.ones(n), np.zeros(n)
        chosen = learn_then_test.choose(ones, zeros, zeros, grid=[0.5], risk=0.1, confidence=0.9)
        assert (chosen.value is not None) == (n == few)


def test_the_evidence_against_the_risk_is_the_integral() -> None:
    q = np.linspace(0.1, 1.0, 200_001)
    for errors, n in ((0, 5), (3, 10), (10, 12), (0, 0)):
        ratio = (q / 0.1) ** errors * ((1 - q) / 0.9) ** (n - errors)
        integral = float(((ratio[1:] + ratio[:-1]) / 2 * np.diff(q)).sum() / 0.9)
        assert learn_then_test.log_evidence(errors, n, 0.1) == pytest.approx(math.log(integral), abs=1e-4)


def test_watching_for_ever_alarms_as_rarely_as_stated_and_finds_a_broken_risk() -> None:
    rng = np.random.default_rng(0)

    def first_alarm(rate: float) -> int | None:
        errors = np.cumsum(rng.random(300) < rate)
        for n in range(1, 301):
            if learn_then_test.log_evidence(int(errors[n - 1]), n, 0.1) > math.log(20):
                return n
        return None

    assert sum(first_alarm(0.1) is not None for _ in range(200)) / 200 <= 0.05 + 0.03
    delays = [first_alarm(0.3) for _ in range(100)]
    assert sum(d is not None and d <= 150 for d in delays) >= 95
