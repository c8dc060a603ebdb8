"""The statistics that decide a release, in simulation: how often they are wrong, and how long they take.

The e-processes, thresholds and detectors are the shipped ones, run over many trials at once; whole trials of the
shipped decision (``release.trial``, ``release.watch``) are run beside them, fewer, to see that they decide alike.
On the very same streams: a z test that is looked at every 100 requests (naive peeking), the mixture sequential ratio
test with a plug-in variance, and a fixed threshold on the success rate. Rewards are synthetic: Bernoulli, no model, no
users. Intervals in the details are exact 99 % ones of Clopper and Pearson.
"""

from __future__ import annotations

import argparse
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import harness

harness.threads()

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gradatim.config import GateConfig, ReleaseConfig, ShadowConfig
from gradatim.release.comparison import Comparison
from gradatim.release.harm import Pairs, harm, lasting_harm, p_of_loss
from gradatim.release.proof import PROVABLE, Proof, Standing
from gradatim.release.trial import Trial, levels_of
from gradatim.release.units import CLASSES, Scored, Served
from gradatim.release.watch import Watch
from gradatim.stats.contrast import Contrast
from gradatim.stats.detector import Detector
from gradatim.stats.paired import Paired
from gradatim.types import AdapterId, Decision, EpisodeId, ShadowPair, StepId

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
BLOCK = 500  # requests simulated at once
RELEASE = ReleaseConfig(margin=0.0)  # a candidate must be better: its null is an adapter that changes nothing
MSPRT_TAU = 0.05
FLOOR, LOOKS, PER_LOOK, FAILURES = 0.55, 10, 50, 3  # of the fixed threshold gate


@dataclass(frozen=True, slots=True)
class World:
    """``effect`` on the success rate ``base`` of the candidate, which gets ``share`` of the episodes."""

    effect: float
    base: float = 0.6
    share: float = 0.1
    drift: float = 0.0  # the base swings by so much, over 5,000 requests
    users: float = 0.0  # standard deviation of users' own base rates; activity is heavy-tailed (Zipf 1.5)
    asked: float = 1.0  # share with feedback; of failures twice as much is reported as of successes

    def draw(self, rng: np.random.Generator, runs: int, at: int) -> tuple[Floats, Floats]:
        """(R, N) arms and rewards, NaN without feedback."""
        arm = (rng.random((runs, BLOCK)) < self.share).astype(float)
        base = self.base + self.drift * np.sin(2 * np.pi * (at + np.arange(BLOCK)) / 5000)
        mean = base + self.effect * arm
        if self.users:
            who = rng.zipf(1.5, (runs, BLOCK)) % 997
            mean = mean + self.users * np.sin(who * 12.9898)
        reward = (rng.random((runs, BLOCK)) < np.clip(mean, 0.0, 1.0)).astype(float)
        if self.asked < 1.0:
            told = rng.random((runs, BLOCK)) < self.asked * np.where(reward == 0.0, 1.0, 0.5)
            reward = np.where(told, reward, np.nan)
        return arm, reward


class Method(ABC):
    """One way to decide, on R trials at once: +1 promotes, -1 takes back."""

    def __init__(self, runs: int) -> None:
        self.decided: NDArray[np.int64] = np.zeros(runs, dtype=np.int64)
        self.at: NDArray[np.int64] = np.zeros(runs, dtype=np.int64)

    def take(self, arm: Floats, reward: Floats, share: float, at: int) -> None:
        up, down = self.signals(arm, reward, share)
        for i, (good, bad) in enumerate(zip(up, down, strict=True)):
            if self.decided[i] or not (good.any() or bad.any()):
                continue
            first = [int(x.argmax()) if x.any() else BLOCK for x in (good, bad)]
            self.decided[i], self.at[i] = (-1 if first[1] <= first[0] else 1), at + min(first) + 1

    @abstractmethod
    def signals(self, arm: Floats, reward: Floats, share: float) -> tuple[Flags, Flags]:
        """(R, N) whether it would promote, or take back, after each request."""


class Shipped(Method):
    """The contrasts and thresholds of ``Trial``."""

    def __init__(self, runs: int, release: ReleaseConfig = RELEASE) -> None:
        super().__init__(runs)
        self.kept, self.worse = Contrast(-release.margin, 1, (runs,)), Contrast(0.0, -1, (runs,))
        self.levels = math.log(1 / release.alpha), levels_of(release.alpha_worse, CLASSES[:1])[CLASSES[0]]

    def signals(self, arm: Floats, reward: Floats, share: float) -> tuple[Flags, Flags]:
        pi = np.full(BLOCK, share)
        up, down = self.kept.update(arm, reward, pi), self.worse.update(arm, reward, pi)
        return up >= self.levels[0], down >= self.levels[1]


class Moments(Method):
    """Counts and means of both arms after every request."""

    def __init__(self, runs: int) -> None:
        super().__init__(runs)
        self.state: Floats = np.zeros((4, runs, 1))

    def moments(self, arm: Floats, reward: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        known = ~np.isnan(reward)
        y = np.where(known, reward, 0.0)
        rows = np.stack([arm * known, (1 - arm) * known, arm * y, (1 - arm) * y])
        n1, n0, s1, s0 = sums = np.cumsum(rows, axis=-1) + self.state
        self.state = sums[..., -1:]
        m1, m0 = s1 / np.maximum(n1, 1), s0 / np.maximum(n0, 1)
        variance = m1 * (1 - m1) / np.maximum(n1, 1) + m0 * (1 - m0) / np.maximum(n0, 1)
        return n1, n0, m1 - m0, variance


class Peeking(Moments):
    """A two-sided z test at 5 % after every 100 requests."""

    def signals(self, arm: Floats, reward: Floats, share: float) -> tuple[Flags, Flags]:
        n1, n0, delta, variance = self.moments(arm, reward)
        z = delta / np.sqrt(np.maximum(variance, 1e-12))
        look = (np.arange(1, BLOCK + 1) % 100 == 0) & (n1 > 1) & (n0 > 1)
        return look & (z > 1.96), look & (z < -1.96)


class PlugIn(Moments):
    """Mixture sequential ratio test with the estimated variance at every request (arXiv:1512.04922), 2.5 % a side."""

    def signals(self, arm: Floats, reward: Floats, share: float) -> tuple[Flags, Flags]:
        n1, n0, delta, variance = self.moments(arm, reward)
        v, t = np.maximum(variance, 1e-12), MSPRT_TAU**2
        log_e = 0.5 * np.log(v / (v + t)) + delta**2 * t / (2 * v * (v + t))
        reached = (log_e >= math.log(1 / 0.05)) & (n1 >= 5) & (n0 >= 5)
        return reached & (delta > 0), reached & (delta < 0)


class Threshold(Moments):
    """Ten looks at 50 canary rewards each; three below the floor take back, the tenth promotes."""

    def __init__(self, runs: int) -> None:
        super().__init__(runs)
        self.looks: NDArray[np.int64] = np.zeros((3, runs), dtype=np.int64)  # rewards, successes, looks
        self.failed: NDArray[np.int64] = np.zeros(runs, dtype=np.int64)

    def signals(self, arm: Floats, reward: Floats, share: float) -> tuple[Flags, Flags]:
        up, down = np.zeros(arm.shape, dtype=bool), np.zeros(arm.shape, dtype=bool)
        for t in range(BLOCK):
            counted = (arm[:, t] == 1) & ~np.isnan(reward[:, t])
            self.looks[0] += counted
            self.looks[1] += counted & (reward[:, t] == 1)
            full = self.looks[0] >= PER_LOOK
            self.failed += full & (self.looks[1] < FLOOR * self.looks[0])
            self.looks[2] += full
            self.looks[:2, full] = 0
            down[:, t] = self.failed >= FAILURES
            up[:, t] = (self.looks[2] >= LOOKS) & (self.failed < FAILURES)
        return up, down


METHODS: Mapping[str, Callable[[int], Method]] = {
    "shipped": Shipped,
    "naive peeking": Peeking,
    "plug-in mSPRT": PlugIn,
    "fixed threshold": Threshold,
}


@dataclass(slots=True)
class Tally:
    decided: list[int] = field(default_factory=list)
    at: list[int] = field(default_factory=list)

    def add(self, method: Method, horizon: int) -> None:
        self.decided += method.decided.tolist()
        self.at += [int(t) if d else horizon for d, t in zip(method.decided, method.at, strict=True)]

    def row(self, within: int = 0) -> dict[str, Any]:
        n, up, down = len(self.decided), self.decided.count(1), self.decided.count(-1)
        row: dict[str, Any] = {
            "runs": n,
            "promoted": up / n,
            "promoted_99": interval(up, n),
            "taken_back": down / n,
            "median_at": float(np.median(self.at)),
            "p90_at": float(np.quantile(self.at, 0.9)),
        }
        if within:
            row["taken_back_within"] = (
                sum(d < 0 and t <= within for d, t in zip(self.decided, self.at, strict=True)) / n
            )
        return row


def interval(k: int, n: int) -> list[float]:
    """Exact, 99 %."""
    low = float(stats.beta.ppf(0.005, k, n - k + 1)) if k else 0.0
    return [low, float(stats.beta.ppf(0.995, k + 1, n - k)) if k < n else 1.0]


def trials(
    world: World, runs: int, horizon: int, makers: Mapping[str, Callable[[int], Method]], seed: int, group: int = 50
) -> dict[str, Tally]:
    """Groups of trials, each until every method has decided or the horizon is reached."""
    rng = np.random.default_rng(seed)
    tallies = {name: Tally() for name in makers}
    for start in range(0, runs, group):
        size = min(group, runs - start)
        methods = {name: make(size) for name, make in makers.items()}
        for at in range(0, horizon, BLOCK):
            open_ones = [m for m in methods.values() if not m.decided.all()]
            if not open_ones:
                break
            arm, reward = world.draw(rng, size, at)
            for method in open_ones:
                method.take(arm, reward, world.share, at)
        for name, method in methods.items():
            tallies[name].add(method, horizon)
    return tallies


# ------------------------------------------------------------------------------------- the shipped decision


def whole(world: World, runs: int, horizon: int, seed: int) -> dict[str, float]:
    """Whole trials of the shipped decision, and how many of them decide as the contrasts alone do."""
    release = ReleaseConfig(margin=0.0, min_episodes=0, min_s=0.0)
    rng = np.random.default_rng(seed)
    same = promoted = 0
    for _ in range(runs):
        trial, bare = Trial(release, CLASSES[:1]), Shipped(1, release)
        for at in range(0, horizon, BLOCK):
            if trial.harm or trial.proven:
                break
            arm, reward = world.draw(rng, 1, at)
            bare.take(arm, reward, world.share, at)
            units = [unit(i, a == 1.0, world.share, y) for i, (a, y) in enumerate(zip(arm[0], reward[0], strict=True))]
            trial.serve([u.served for u in units])
            trial.score(units)
        decided = -1 if trial.harm else int(trial.proven)
        same += int(decided == bare.decided[0])
        promoted += decided == 1
    return {"runs": runs, "promoted": promoted / runs, "as the contrasts": same / runs}


def unit(i: int, treated: bool, share: float, reward: float) -> Scored:
    served = Served(EpisodeId(str(i)), treated, share, 0.0, 0.0, "", (0.0, 0.0, 0.0, 0.5, 0.5))
    rated = not math.isnan(reward)
    return Scored(served, (reward, math.nan), rated, False)


# ------------------------------------------------------------------------------------------------ the watch


class Streams(Detector):
    """Streams that can be begun anew."""

    def forget(self, which: NDArray[np.bool_]) -> None:
        self._sums = np.where(which[:, None], 0.0, self._sums)


class Pairwise(Contrast):
    """Streams that can be begun anew."""

    def forget(self, which: NDArray[np.bool_]) -> None:
        self._wealth = np.where(which[:, None], 0.0, self._wealth)
        self._n, self._sum, self._squares = (np.where(which, 0.0, x) for x in (self._n, self._sum, self._squares))


def watch(
    runs: int, n: int, live: Callable[[int], float], good: Callable[[int], float], seed: int
) -> NDArray[np.int64]:
    """When each of R live adapters is rolled back, n where it is not: the control flow of ``Watch``, many at once, with
    one class of sources, a usual reward of 0.6 and the default shares."""
    release, rng = ReleaseConfig(canary=True), np.random.default_rng(seed)
    fast = Streams(0.6 - release.tolerance, (runs,))
    standing, confirming = (Pairwise(bound, -1, (runs,)) for bound in (-release.margin, 0.0))
    left, ended = np.zeros(runs, dtype=np.int64), np.full(runs, n)
    levels = math.log(len(CLASSES) / 0.01), math.log(len(CLASSES) / release.alpha_confirm)
    for t in range(n):
        share = np.where(left > 0, 0.5, 1.0 - release.holdback_share)
        treated = rng.random(runs) < share
        reward = (rng.random(runs) < np.where(treated, live(t), good(t))).astype(float)
        column = treated[:, None].astype(float), reward[:, None], share[:, None]
        suspicious = left > 0
        bad = standing.update(*column)[:, 0] >= levels[0]
        only = np.where(suspicious, reward, np.nan)[:, None]
        bad |= suspicious & (confirming.update(column[0], only, column[2])[:, 0] >= levels[1])
        left = left - suspicious
        cleared = suspicious & (left == 0)
        seen = np.where(treated & ~suspicious, reward, np.nan)[:, None]
        alarm = (fast.update(seen)[:, 0] >= release.alarm) & treated & ~suspicious
        left = np.where(alarm, release.confirm_episodes, left)
        fast.forget(cleared)
        confirming.forget(alarm)
        ended = np.where(bad & (ended == n), t + 1, ended)
        if (ended < n).all():
            break
    return ended


def one_watch(n: int, live: float, good: float, seed: int) -> int:
    """The same of the shipped ``Watch``, one unit at a time."""
    release, rng = ReleaseConfig(canary=True), np.random.default_rng(seed)
    watch = Watch(release, (0.6, math.nan))
    for t in range(n):
        share = 0.5 if watch.is_suspicious else 1.0 - release.holdback_share
        treated = bool(rng.random(1)[0] < share)
        reward = float(rng.random(1)[0] < (live if treated else good))
        watch.score([unit(t, treated, share, reward)])
        if watch.harm:
            return t + 1
    return n


def garbage(runs: int, share: float, seed: int) -> list[int]:
    """Requests until the hard guard rolls back an adapter of whose answers that share is broken."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(runs):
        subject = Watch(ReleaseConfig(canary=True), (math.nan, math.nan), broken=0.01)
        at = 0
        while not subject.harm and at < 1000:
            broken = float(rng.random() < share)
            subject.serve([Served(EpisodeId(str(at)), True, 0.95, 0.0, 0.0, "", (broken, 0, 0, 0.5, 0.5))])
            at += 1
        out.append(at)
    return out


# ------------------------------------------------------------------------------------------ pairs and anchor


def pairs(effect: float, runs: int, seed: int, discordant: float = 0.2) -> dict[str, float]:
    """Prompts until paired bets (no loss of 0.02, or a loss, at 2.5 %) decide; that share of answers differs."""
    rng = random.Random(seed)
    at, up = [], 0
    for _ in range(runs):
        kept, worse = Paired(-0.02, 1), Paired(0.0, -1)
        n, decided = 0, 0
        while not decided and n < 5000:
            place, n = rng.random(), n + 1
            d = 1.0 if place < (discordant + effect) / 2 else -1.0 if place < discordant else 0.0
            good, bad = kept.update([d])[0], worse.update([d])[0]
            decided = -1 if bad >= math.log(40) else int(good >= math.log(40))
        at.append(n)
        up += decided == 1
    return {"runs": runs, "median": float(np.median(at)), "passed": up / runs}


def shadow(effect: float, changed: float, runs: int, seed: int) -> dict[str, float]:
    """Whole comparisons of the shadow: that share of answers is judged differently, and looks no different."""
    config, rng = ShadowConfig(prompts=3000), random.Random(seed)
    looks = (0.0, 0.0, 0.0, 0.0, 0.3)
    at, passed, out = [], 0, 0
    for _ in range(runs):
        comparison, n = Comparison(config, ["s"], judged=True), 0
        while n < config.prompts and not (comparison.harm or comparison.proven):
            place, n = rng.random(), n + 1
            gain = 1.0 if place < (changed + effect) / 2 else -1.0 if place < changed else 0.0
            live = 0.5 - gain / 2
            comparison.take(
                ShadowPair(
                    adapter_id=AdapterId("agent@1"),
                    step_id=StepId(str(n)),
                    number=n,
                    skill="s",
                    guards=looks,
                    live_guards=looks,
                    reward=live + gain,
                    live_reward=live,
                )
            )
        at.append(n)
        passed, out = passed + comparison.proven, out + bool(comparison.harm)
    return {"runs": runs, "median": float(np.median(at)), "passed": passed / runs, "rejected": out / runs}


def shadow_goals(scale: float, details: dict[str, Any]) -> list[harness.Goal]:
    runs = max(5, round(200 * scale))
    margin = ShadowConfig().margin
    kinds = {"no effect": (0.0, 0.1), "no answer differs": (0.0, 0.0), "at the margin": (-margin, 0.1)}
    kinds |= {"-10 points": (-0.1, 0.2)}
    found = {name: shadow(*kind, runs, seed=8) for name, kind in kinds.items()}
    details["shadow"] = found
    return [
        harness.Goal("shadow: passed at the margin, its edge", found["at the margin"]["passed"], "<= 0.025"),
        harness.Goal("shadow: rejected without effect", found["no effect"]["rejected"], "<= 0.05"),
        harness.Goal("shadow: passed at -10 points", found["-10 points"]["passed"], "<= 0.005"),
        *(harness.Goal(f"shadow: median prompts, {name}", of["median"]) for name, of in found.items()),
    ]


def boil(candidates: int, cases: int, rules: Collection[str], turnover: float, seed: int) -> float:
    """True loss against the anchor after a stream of candidates, each 0.01 +- 0.01 worse than the live adapter, judged
    by the shipped rules: of losses against live, and with ``anchor`` against the anchor on the same cases, with
    ``proof`` by the budget of updates without proof. Before each candidate a share ``turnover`` of the cases is new."""
    config, rng = GateConfig(), np.random.default_rng(seed)
    lost, gained = 0.0, np.zeros(cases)  # gained: by live over the anchor, in each case
    before = Standing()
    for _ in range(candidates):
        step = rng.normal(-0.01, 0.01)
        renewed = rng.random(cases) < turnover
        gained[renewed] = moved(lost, int(renewed.sum()), rng)
        change = moved(step, cases, rng)
        live, anchor = pairs_of(change), pairs_of(gained + change)
        refused = harm(live, config)[0] is not Decision.PASS
        refused |= "anchor" in rules and lasting_harm(anchor, config)[0] is not Decision.PASS
        now = np.clip(gained + change, -1.0, 1.0)
        proof = Proof(before=before, gains=now.tolist(), harmless=not refused)
        refused |= "proof" in rules and proof.unproven > config.unproven
        before = Standing(before.unproven, proof.tries) if refused else proof.after
        if not refused:
            lost += step
            gained += change
    return -lost


def cases_for_proof(gain: float, seed: int, runs: int = 100) -> float:
    """Median number of held-out answers that prove a gain at the first try, where one answer is lost for six won."""
    rng = np.random.default_rng(seed)
    won, lost = 1.2 * gain, 0.2 * gain
    found = []
    for _ in range(runs):
        gains = rng.choice([-1.0, 0.0, 1.0], size=20_000, p=[lost, 1.0 - won - lost, won])
        n = PROVABLE
        while n < len(gains) and not Proof(before=Standing(), gains=gains[:n].tolist()).is_given:
            n = math.ceil(1.05 * n)
        found.append(n)
    return float(np.median(found))


def boil_goals(scale: float, details: dict[str, Any]) -> list[harness.Goal]:
    seeds = range(max(5, round(50 * scale)))
    kinds: dict[str, tuple[int, Collection[str], float]] = {
        "live alone": (96, (), 1.0),
        "anchor, no budget": (96, ("anchor",), 0.05),
        "anchor, no budget, 2,000 cases": (2000, ("anchor",), 0.05),
        "shipped": (96, ("anchor", "proof"), 0.05),
        "shipped, 2,000 cases": (2000, ("anchor", "proof"), 0.05),
        "shipped, all cases new": (96, ("anchor", "proof"), 1.0),
        "shipped, no case new": (96, ("anchor", "proof"), 0.0),
    }
    streams = {name: [boil(100, *kind, seed) for seed in seeds] for name, kind in kinds.items()}
    details["boil"] = {
        name: {"mean": float(np.mean(of)), "95 %": float(np.quantile(of, 0.95)), "losses": of}
        for name, of in streams.items()
    }
    needed = {gain: cases_for_proof(gain, seed=9) for gain in (0.4, 0.1, 0.05)}
    details["held-out answers that prove a gain"] = {str(gain): n for gain, n in needed.items()}
    goals = []
    for name, of in streams.items():
        target = "<= 0.04" if name.startswith("shipped") else "reported"
        goals.append(harness.Goal(f"100 slightly worse candidates, {name}: mean loss", float(np.mean(of)), target))
    return goals + [
        harness.Goal(f"held-out answers that prove a gain of {gain}, median", n) for gain, n in needed.items()
    ]


def moved(effect: float, cases: int, rng: np.random.Generator) -> Floats:
    """Lost, kept or won, of each case: a tenth of them, or as many as it takes, change."""
    effect = min(1.0, max(-1.0, effect))
    changed = max(0.1, abs(effect))
    return rng.choice([-1.0, 0.0, 1.0], size=cases, p=[(changed - effect) / 2, 1 - changed, (changed + effect) / 2])


def pairs_of(gains: Floats) -> Pairs:
    return Pairs(
        n=len(gains),
        net=-float(gains.sum()),
        lost=int((gains < 0).sum()),
        won=int((gains > 0).sum()),
        logprob=0.0,
        p_mean=p_of_loss(gains.tolist()),
    )


# ---------------------------------------------------------------------------------------------------- goals


def canary_goals(scale: float, details: dict[str, Any]) -> list[harness.Goal]:
    long, short = max(20, round(10_000 * scale)), max(20, round(500 * scale))
    out: list[harness.Goal] = []

    def shipped(label: str, world: World, runs: int, horizon: int, release: ReleaseConfig = RELEASE) -> dict[str, Any]:
        tally = trials(world, runs, horizon, {"shipped": lambda n: Shipped(n, release)}, seed=len(details))
        details[label] = tally["shipped"].row(within=6000)
        print(label, details[label], flush=True)
        return dict(details[label])

    null = shipped("no effect", World(0.0), long, 20_000)
    worse = shipped("-5 points", World(-0.05), long, 20_000)
    bad = shipped("-10 points", World(-0.10), long, 20_000)
    better = shipped("+5 points", World(0.05), max(short, long // 10), 20_000)
    out += [
        harness.Goal("promoted of those without effect", null["promoted"], "<= 0.025"),
        harness.Goal("promoted at -5 points", worse["promoted"], "<= 0.005"),
        harness.Goal("promoted at -10 points", bad["promoted"], "<= 0.001"),
        harness.Goal("taken back within 6,000 requests at -10 points", bad["taken_back_within"], ">= 0.99"),
        harness.Goal("median requests to decide, -5 points", worse["median_at"], "<= 9000"),
        harness.Goal("median requests to decide, +5 points", better["median_at"], "<= 9000"),
    ]
    hard = {
        "1 % canary": World(0.0, share=0.01),
        "base 0.95": World(0.0, base=0.95),
        "base swings by 0.2": World(0.0, drift=0.2),
        "heavy-tailed users": World(0.0, users=0.25),
        "selective feedback": World(0.0, asked=0.5),
    }
    for label, world in hard.items():
        row = shipped(f"no effect, {label}", world, short, 20_000)
        out.append(harness.Goal(f"promoted without effect, {label}", row["promoted"], "<= 0.025"))
    margin = ReleaseConfig()
    edge = shipped("margin 0.03, -3 points", World(-0.03), short, 20_000, margin)
    same = shipped("margin 0.03, no effect, even shares", World(0.0, share=0.5), short, 20_000, margin)
    out += [
        harness.Goal("default margin: promoted at -3 points, its edge", edge["promoted"], "<= 0.025"),
        harness.Goal("default margin: promoted without effect, even shares", same["promoted"]),
    ]
    return out


def peer_goals(scale: float, details: dict[str, Any]) -> list[harness.Goal]:
    out = []
    for effect in (0.0, -0.05, -0.10):
        tallies = trials(World(effect), max(20, round(400 * scale)), 20_000, METHODS, seed=77)
        details[f"same streams, {effect:+.2f}"] = {name: tally.row() for name, tally in tallies.items()}
        for name, tally in tallies.items():
            out.append(harness.Goal(f"{name}: promoted at {effect:+.2f}", tally.row()["promoted"]))
    return out


def watch_goals(scale: float, details: dict[str, Any]) -> list[harness.Goal]:
    runs = max(10, round(300 * scale))
    n = 40_000 if scale >= 0.5 else 8000
    fell = watch(runs, 6000, lambda t: 0.5, lambda t: 0.6, seed=1)

    def season(t: int) -> float:
        return 0.6 + 0.05 * math.sin(2 * math.pi * t / 5000)

    calm = watch(runs, n, season, season, seed=2)
    broken = {share: garbage(max(20, runs // 3), share, seed=3) for share in (1.0, 0.5)}
    few = max(5, runs // 15)
    alone = [one_watch(6000, 0.5, 0.6, seed) for seed in range(few)]
    details["watch"] = {
        "runs": runs,
        "median feedbacks to roll back at -10 points": float(np.median(fell)),
        "the same, the shipped class alone": {"runs": few, "median": float(np.median(alone))},
        "false rollbacks under season, 99 %": interval(int((calm < n).sum()), runs),
        "garbage": {str(k): {"median": float(np.median(v)), "most": max(v)} for k, v in broken.items()},
    }
    return [
        harness.Goal("-10 points: rolled back within 2,500 feedbacks", float((fell <= 2500).mean()), ">= 0.95"),
        harness.Goal(f"season of +-5 points: false rollbacks in {n:,}", float((calm < n).mean()), "<= 0.02"),
        harness.Goal("requests until garbage is rolled back, most", float(max(broken[1.0])), "<= 50"),
        harness.Goal("the same where half is garbage", float(max(broken[0.5])), "<= 50"),
    ]


def other_goals(scale: float, details: dict[str, Any]) -> list[harness.Goal]:
    runs = max(10, round(200 * scale))
    found = {effect: pairs(effect, runs, seed=5) for effect in (0.05, -0.05)}
    checked = {effect: whole(World(effect), max(5, round(60 * scale)), 8000, seed=6) for effect in (0.0, -0.10)}
    details |= {"pairs": found, "whole trials": checked}
    return [
        harness.Goal("pairs: median prompts to decide, +5 points", found[0.05]["median"], "<= 700"),
        harness.Goal("pairs: median prompts to decide, -5 points", found[-0.05]["median"], "<= 700"),
        harness.Goal(
            "whole trials that decide as their contrasts",
            min(c["as the contrasts"] for c in checked.values()),
            ">= 0.99",
        ),
    ]


def parsed() -> argparse.Namespace:
    parser = harness.options(__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of runs")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=tuple(PARTS), help="these parts alone")
    return parser.parse_args()


PARTS: dict[str, Callable[[float, dict[str, Any]], list[harness.Goal]]] = {
    "canary": canary_goals,
    "watch": watch_goals,
    "other": other_goals,
    "boil": boil_goals,
    "shadow": shadow_goals,
    "peers": peer_goals,
}


def main() -> None:
    args = parsed()
    scale = 0.004 if args.quick else args.scale
    details: dict[str, Any] = {"scale": scale}
    goals: list[harness.Goal] = []
    for name in args.only:
        goals += PARTS[name](scale, details)
        print(f"{name} done", flush=True)
    harness.report("bench_gates", goals, details, args)


if __name__ == "__main__":
    main()
