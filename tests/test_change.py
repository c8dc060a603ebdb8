"""Changes of means nobody knows beforehand: against a slow reference, and in simulation with a daily season."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradatim.config import DriftConfig
from gradatim.release.series import LEVELS, Series, arrays, put_back
from gradatim.release.sketch import length_of, log_length, sketch
from gradatim.stats.change import FEWEST, TILTS, Changes
from gradatim.stats.daily import DAY_S, Daily
from gradatim.stats.detector import BETS

PER_DAY = 2000


class Slow:
    """One stream, one number at a time, as the docstring of ``stats.change`` has it."""

    def __init__(self, alpha: float, tolerance: float) -> None:
        self.alpha, self.tolerance = alpha, tolerance
        self.past: list[tuple[float, float]] = []
        self.squares = 0.0
        self.low, self.high = -1.0, 2.0
        self.sums = [[0.0] * len(BETS), [0.0] * len(BETS)]

    def update(self, y: float, s: float) -> tuple[float, float]:
        n = len(self.past)
        mean = math.fsum(v - c for v, c in self.past) / n if n else 0.5
        if n >= FEWEST:
            log = math.log(2 * len(TILTS) / self.alpha)
            radius = min((log + (-math.log(1 - t) - t) * self.squares) / (t * n) for t in map(float, TILTS))
            self.low, self.high = max(self.low, mean - radius), min(self.high, mean + radius)
            least = min(max(self.low + s - self.tolerance, 0.0), 0.99)
            most = min(max(self.high + s + self.tolerance, 0.01), 1.0)
            for b, bet in enumerate(BETS):
                self.sums[0][b] = (self.sums[0][b] + 1.0) * (1.0 + bet / (1.0 - least) * (least - y))
                self.sums[1][b] = (self.sums[1][b] + 1.0) * (1.0 + bet / most * (y - most))
        self.squares += (y - min(max(mean + s, 0.0), 1.0)) ** 2
        self.past.append((y, s))
        return tuple(sum(side) / len(BETS) for side in self.sums)  # type: ignore[return-value]


def test_many_streams_at_once_are_what_one_by_one_would_be() -> None:
    rng = np.random.default_rng(0)
    fast = Changes((2,), 1e9, alpha=0.01, tolerance=0.01)
    slow = [Slow(0.01, 0.01), Slow(0.01, 0.01)]
    for t in range(400):
        course = 0.05 * math.sin(t / 30)
        y = (rng.random(2) < (0.7 if t < 300 else 0.3)).astype(float)
        if t % 7 == 0:
            y[1] = math.nan
        fast.update(slice(None), y, course, at=float(t))
        wanted = [one.update(float(v), course) if not math.isnan(v) else None for one, v in zip(slow, y, strict=True)]
        for i, value in enumerate(wanted):
            if value is not None:
                assert fast._sums[i].mean(axis=-1) == pytest.approx(value, rel=1e-9)
    assert 290 <= fast.began(0) <= 330


def test_a_part_of_the_streams_leaves_the_others_alone_and_a_state_comes_back_exactly() -> None:
    rng = np.random.default_rng(1)
    whole = Changes((3, 2), 1e6)
    for t in range(150):
        whole.update(np.array([0, 2]), rng.random((2, 2)), at=float(t))
    assert whole.moved((1, 0)) == (0.0, 0.0)
    copy = Changes((3, 2), 1e6)
    put_back(copy, arrays(whole))
    y = rng.random((2, 2))
    whole.update(np.array([0, 2]), y, at=150.0)
    copy.update(np.array([0, 2]), y, at=150.0)
    assert arrays(whole) == arrays(copy)
    with pytest.raises(ValueError, match="another shape"):
        put_back(Changes((2, 2), 1e6), arrays(whole))


def test_all_series_together_keep_the_bound_under_a_daily_season_and_a_fall_is_found() -> None:
    """Five series as they are weighed by default, in 30 runs of a week at 2,000 episodes a day, with a season of
    5 points up and down. Half of the runs lose 10 points after four days."""
    runs, n, change = 30, 7 * PER_DAY, 4 * PER_DAY
    shares = 0.5 * np.array([0.25, 0.25, 0.125, 0.125, 0.25 / 17])
    config = DriftConfig()
    series = Changes(
        (runs, len(shares)), 2.0 * config.alarm / shares, alpha=LEVELS * shares, tolerance=config.tolerance
    )
    daily, rng = Daily((runs, len(shares))), np.random.default_rng(2)
    first = np.full(runs, n)
    false = np.zeros(runs, dtype=bool)
    for t in range(n):
        at = t * DAY_S / PER_DAY
        mean = np.full((runs, len(shares)), 0.6 + 0.05 * math.sin(2.0 * math.pi * at / DAY_S))
        if t >= change:
            mean[: runs // 2, 0] -= 0.1
        y = (rng.random(mean.shape) < mean).astype(float)
        signs = series.update(slice(None), y, daily.predict(at), at=at, watched=daily.is_known(at))
        daily.update(y, at)
        fell = (signs[:, 0] == -1) & (np.arange(runs) < runs // 2) & (t >= change)
        first = np.where(fell & (first == n), t, first)
        signs[: runs // 2, 0] = 0 if t >= change else signs[: runs // 2, 0]
        false |= signs.any(axis=-1)
    assert false.mean() <= n / config.alarm + LEVELS  # 0.15
    delays = np.sort(first[: runs // 2] - change)
    assert delays[len(delays) // 2] <= 1600
    assert delays[-2] <= 2600


def test_a_daily_course_is_what_least_squares_finds() -> None:
    rng = np.random.default_rng(3)
    daily = Daily((1,))
    times = np.arange(6 * 640) * DAY_S / 640
    y = np.clip(0.5 + 0.1 * np.cos(2 * np.pi * times / DAY_S) + 0.1 * rng.standard_normal(len(times)), 0.0, 1.0)
    for at, value in zip(times, y, strict=True):
        daily.update([value], float(at))
    turn = 2 * np.pi * times / DAY_S
    f = np.stack([np.ones_like(turn), np.cos(turn), np.sin(turn), np.cos(2 * turn), np.sin(2 * turn)], axis=1)
    w = np.exp(-(times[-1] - times) / (14 * DAY_S))
    beta = np.linalg.solve((f * w[:, None]).T @ f + np.diag([1e-6, 100, 100, 100, 100]), (f * w[:, None]).T @ y)
    for at in (0.1, 0.4, 0.9):
        now = 2 * np.pi * at
        at_now = np.array([np.cos(now), np.sin(now), np.cos(2 * now), np.sin(2 * now)])
        mean = (f * w[:, None]).sum(0)[1:] / w.sum()
        assert daily.predict(6 * DAY_S + at * DAY_S)[0] == pytest.approx(beta[1:] @ (at_now - mean), abs=1e-9)


def test_before_two_days_nothing_is_predicted_and_without_a_season_nothing_is_waited_for() -> None:
    daily, none = Daily((1,)), Daily((1,), 0.0)
    for t in range(200):
        daily.update([float(t % 2)], t * 600.0)
        none.update([1.0], float(t))
    assert not daily.is_known(DAY_S)[0] and daily.predict(DAY_S)[0] == 0.0
    assert daily.is_known(2 * DAY_S)[0]
    assert none.is_known(0.5)[0] and none.predict(5.0)[0] == 0.0


def test_a_skill_is_watched_for_itself_and_a_family_alarms_once() -> None:
    config = DriftConfig(season_s=0.0, skills=2)
    series = Series({"one": (1, 0.5), "many": (3, 0.5)}, config)
    rng = np.random.default_rng(4)
    found = []
    for t in range(4000):
        skill = ("login", "search", "third")[t % 3]
        low = t >= 2000 and skill == "login"
        one = float(rng.random() < (0.2 if low else 0.8))
        many = [float(rng.random() < (0.9 if t >= 3000 else 0.5)) for _ in range(3)]
        found += series.see([one, *many], skill, float(t))
    ones = [s for s in found if s.family == "one"]
    assert [(s.skill, s.rose) for s in ones if s.skill] == [("login", False)]
    login = next(s for s in ones if s.skill)
    assert 1950 <= login.since <= 2100 and login.before > 0.6 > 0.4 > login.after
    assert [s.skill for s in found if s.family == "many" and not s.skill] == [""]


def test_a_sketch_knows_other_prompts_from_the_same_ones() -> None:
    rng = np.random.default_rng(5)

    def mean(low: int, high: int) -> np.typing.NDArray[np.float64]:
        rows = [sketch(tuple(map(int, rng.integers(low, high, 40)))) for _ in range(200)]
        return np.asarray(np.stack(rows).mean(axis=0))

    same, again, other = mean(0, 50), mean(0, 50), mean(30, 80)
    assert np.abs(same - again).max() < 0.03
    assert np.abs(same - other)[1:].max() > 0.06
    assert np.array_equal(sketch((1, 2, 3)), sketch((3, 1, 2)))
    assert sketch(()).shape == sketch((1,)).shape == (17,)
    assert length_of(log_length(100)) == 100 and log_length(10**9) == 1.0
