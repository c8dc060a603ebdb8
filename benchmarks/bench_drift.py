"""What changes beside the live adapter: false alarms, delay, and whether the adapter or the world is blamed rightly.

The shipped detector, as the shipped families weigh it, and the shipped comparison, in simulation: rewards are
Bernoulli, with a daily season of 5 points up and down; no model and no users. On the very same streams: ADWIN of river
at its default, and at 1e-5, which sees no time of day. A last part sends a page that is redesigned and comes back
through the shipped ``Drift``, and measures its CPU time per episode without the store's.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import harness

harness.threads()

import numpy as np
from numpy.typing import NDArray

from gradatim.config import Config, DriftConfig, ReleaseConfig
from gradatim.release.cause import CONTROL, LIVE, Rated, compare
from gradatim.release.drift import Drift
from gradatim.release.series import LEVELS
from gradatim.release.sketch import sketch
from gradatim.stats.change import Changes
from gradatim.stats.daily import DAY_S, Daily
from gradatim.testing.fakes import FakeStore
from gradatim.types import AdapterId, EpisodeId, Step, StepId, Verdict

PER_DAY, DAYS, CHANGE = 2000, 10, 8000
SHARES = 0.5 * np.array([0.25, 0.25, 0.125, 0.125, 0.25 / 17])  # rewards of two classes, answers, abstentions, a sketch
SEASON, BASE, LOST = 0.05, 0.6, 0.1
OLD, NEW = AdapterId("agent@1"), AdapterId("agent@2")
Flags = NDArray[np.bool_]


class Side(Protocol):
    def take(self, y: NDArray[np.float64], at: float) -> Flags:
        """(R, K) which streams alarm with this unit."""


class Shipped:
    def __init__(self, runs: int, config: DriftConfig) -> None:
        shape = (runs, len(SHARES))
        self.changes = Changes(shape, 2.0 * config.alarm / SHARES, alpha=LEVELS * SHARES, tolerance=config.tolerance)
        self.daily = Daily(shape, config.season_s)

    def take(self, y: NDArray[np.float64], at: float) -> Flags:
        known, course = self.daily.is_known(at), self.daily.predict(at)
        signs = self.changes.update(slice(None), y, course, at=at, watched=known)
        self.daily.update(y, at)
        return np.asarray(signs != 0)


class Adwin:
    """One for each stream."""

    def __init__(self, runs: int, delta: float) -> None:
        from river.drift import ADWIN

        self.each = [[ADWIN(delta=delta) for _ in SHARES] for _ in range(runs)]

    def take(self, y: NDArray[np.float64], at: float) -> Flags:
        found = np.zeros(y.shape, dtype=bool)
        for i, row in enumerate(self.each):
            for k, adwin in enumerate(row):
                adwin.update(float(y[i, k]))
                found[i, k] = adwin.drift_detected
        return found


def watched(side: Side, runs: int, lost: float, n: int, seed: int) -> tuple[float, list[float], float]:
    """(share of runs with a false alarm, delays until the fall of the first stream was found, share that missed it)"""
    rng = np.random.default_rng(seed)
    false, first = np.zeros(runs, dtype=bool), np.full(runs, n)
    for t in range(n):
        at = t * DAY_S / PER_DAY
        mean = np.full((runs, len(SHARES)), BASE + SEASON * math.sin(2.0 * math.pi * at / DAY_S))
        fallen = lost > 0.0 and t >= CHANGE
        mean[:, 0] -= lost * fallen
        found = side.take((rng.random(mean.shape) < mean).astype(np.float64), at)
        if fallen:
            first = np.where(found[:, 0] & (first == n), t, first)
        else:
            false |= found.any(axis=-1)
    told = first[first < n] - CHANGE
    return float(false.mean()), [float(d) for d in told], float((first == n).mean())


def blamed(lost: float, cases: int, share: float, seed: int) -> tuple[float, float]:
    """(share of what was told that is right, share of cases in which something was told)"""
    rng, right, told = np.random.default_rng(seed), 0, 0
    for case in range(cases):
        is_world, apart = case % 2 == 0, float(rng.uniform(-0.03, 0.03))
        units: list[Rated] = []
        for i in range(8000):
            live = bool(rng.random() < (1.0 - share if i < 4000 else 0.5))  # even shares from the alarm on
            fell = lost * (i >= 3000 and (live or is_world))
            reward = float(rng.random() < BASE + (0.0 if live else apart) - fell)
            units.append(Rated(float(i), NEW if live else OLD, LIVE if live else CONTROL, "", (reward, math.nan)))
        for n in range(4000, 8001, 250):
            found = compare(units[:n], 3000.0, 0)
            if found.is_the_world or found.is_the_adapter:
                told, right = told + 1, right + (found.is_the_world == is_world)
                break
    return right / max(1, told), told / cases


def returning(n: int) -> tuple[list[Verdict], float]:
    """A page in its old, its new and its old form again, n episodes each: what is told, and CPU seconds an episode."""
    config = Config(drift=DriftConfig(season_s=0.0, alarm=1e5), release=ReleaseConfig(canary=True, holdback=0.2))
    drift, rng, out = Drift(FakeStore(), config, clock=lambda: 0.0), np.random.default_rng(0), list[Verdict]()
    spent = 0.0
    for i in range(3 * n):
        old_page = i // n != 1
        live = bool(rng.random() < 0.8)
        good = 0.85 if old_page else 0.45
        prompt = tuple(int(t) for t in rng.integers(0 if old_page else 400, 1000, 200))
        step = Step(
            id=StepId(f"s{i}"),
            episode_id=EpisodeId(f"e{i}"),
            created_at=float(i),
            adapter_id=NEW if live else OLD,
            adapter_sha256="",
            stage="live" if live else "retired",
            prompt_ids=prompt,
            completion_ids=(1, 2),
            logprobs=(0.0, 0.0),
            text="ok",
            finish_reason="stop",
            coin={OLD: 0.2, NEW: 0.8},
        )
        began = time.process_time()
        sketch(prompt)
        out += drift.take(step, (float(rng.random() < good), math.nan), 0.0)
        spent += time.process_time() - began
    return out, spent / (3 * n)


def sides(runs: int) -> dict[str, Callable[[], Side]]:
    made: dict[str, Callable[[], Side]] = {"shipped": lambda: Shipped(runs, DriftConfig())}
    try:
        import river.drift
    except ModuleNotFoundError:
        return made
    assert river.drift is not None
    return made | {"adwin 2e-3": lambda: Adwin(runs, 0.002), "adwin 1e-5": lambda: Adwin(runs, 1e-5)}


def main(args: argparse.Namespace) -> None:
    runs, cases = (10, 10) if args.quick else (100, 100)
    calm = (5 if args.quick else DAYS) * PER_DAY
    details: dict[str, Any] = {"runs": runs, "cases": cases, "episodes": calm, "series": len(SHARES)}
    for name, make in sides(runs).items():
        false, _, _ = watched(make(), runs, 0.0, calm, seed=1)
        early, delays, missed = watched(make(), runs, LOST, CHANGE + 4000, seed=2)
        details[name] = {
            "false_alarm": false,
            "false_before_the_fall": early,
            "delay_median": harness.percentile(delays, 50),
            "delay_p90": harness.percentile(delays, 90),
            "missed": missed,
        }
    ours = details["shipped"]
    hard, told = blamed(0.1, cases, 0.05, 3)
    easy, told_easy = blamed(0.2, cases, 0.05, 4)
    found, cost_s = returning(400 if args.quick else 1000)
    worlds = sum(v.evidence.get("world") == 1.0 for v in found)
    rises = sum("rose" in v.reason and "rewards" in v.reason for v in found)
    bound = calm / DriftConfig().alarm + LEVELS
    goals = [
        harness.Goal("runs with a false alarm of any series, season +-5 points", ours["false_alarm"], f"<= {bound:g}"),
        harness.Goal("episodes until a fall of 10 points is found, median", ours["delay_median"], "<= 1600"),
        harness.Goal("the same, 90th percentile", ours["delay_p90"], "<= 2600"),
        harness.Goal("falls of 10 points not found within 4,000 episodes", ours["missed"], "<= 0.02"),
        harness.Goal("10 points lost, holdback 5 %: told rightly, of what is told", hard, ">= 0.95"),
        harness.Goal("10 points lost: told at all", told),
        harness.Goal("20 points lost: told rightly, of what is told", easy, ">= 0.95"),
        harness.Goal("20 points lost: told at all", told_easy, ">= 0.95"),
        harness.Goal("a redesigned page: told as the world's, once", worlds, "== 1"),
        harness.Goal("its return: a rise is told, once", rises, "== 1"),
        harness.Goal("CPU a judged episode, without the store's (ms)", 1000.0 * cost_s, "<= 1"),
    ]
    harness.report("bench_drift", goals, details, args)


if __name__ == "__main__":
    main(harness.options(__doc__).parse_args())
