"""What is watched of a live adapter: the gate of the stage ``live``. It passes, suspends promotions, or rolls back.

Three signals, from the store's records alone. Broken answers (empty, undecodable, in circles) act at once. A standing
holdback on the last good adapter is compared with it all the time. And a fast detector compares its rewards with those
before it went live; since the time of day moves those too, its alarm only suspends promotions and evens the shares out,
and the concurrent contrast, which no season moves, confirms or clears it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gradatim.config import Config, ReleaseConfig
from gradatim.protocols import Store
from gradatim.release.gates import ruling
from gradatim.release.units import CLASSES, Scored, Served, Units, Usual, is_broken, rewards_of
from gradatim.stats.contrast import Contrast
from gradatim.stats.detector import Detector
from gradatim.types import Adapter, Decision, Feedback, Move, Stage, Step, Verdict

_LOOK_BACK = 1000  # records before it went live that say what was usual
_ENOUGH = 100  # rewards of a class without which its past is not known
_BROKEN_ALARM = 1e6  # answers between two false alarms of the hard guard, at least
_STANDING = 0.01  # chance of the standing contrast to roll back one that is not worse by the margin
_EVEN = 0.5  # the last good adapter's share while an alarm is looked into


@dataclass(slots=True)
class Watch:
    """The decision: a pure function of the units in their order. ``usual``: mean reward of each class before it went
    live, NaN where it is not known; ``broken``: share of broken answers then."""

    config: ReleaseConfig
    usual: Sequence[float]
    broken: float = 0.0
    harm: str = ""  # why it is rolled back; never unsaid
    alarms: int = 0
    world: int = 0  # alarms that were cleared: both adapters fell, so it was not the live one
    seen: int = 0  # rewards
    _hard: Detector = field(init=False)
    _fast: dict[str, Detector] = field(init=False)
    _standing: dict[str, Contrast] = field(init=False)
    _confirming: dict[str, Contrast] = field(init=False)
    _left: int = 0  # rated episodes until an alarm is cleared
    _lately: list[list[float]] = field(default_factory=list)  # of each class: sum and count of rewards since an alarm

    def __post_init__(self) -> None:
        self._hard = Detector(1.0 - min(0.3, 2.0 * self.broken + 0.02))
        self._standing = self._contrasts(-self.config.margin)
        self._reset()

    def _contrasts(self, bound: float = 0.0) -> dict[str, Contrast]:
        return {name: Contrast(bound, -1) for name in CLASSES}

    def _reset(self) -> None:
        least = {n: m - self.config.tolerance for n, m in zip(CLASSES, self.usual, strict=True) if not math.isnan(m)}
        self._fast = {name: Detector(max(0.0, m)) for name, m in least.items()}
        self._confirming = self._contrasts()

    @property
    def is_suspicious(self) -> bool:
        return self._left > 0

    def serve(self, units: Sequence[Served]) -> None:
        """Answers as they were given."""
        broken = np.array([u.harms[0] for u in units if u.treated])
        if not self.harm and (self._hard.update(1.0 - broken) >= _BROKEN_ALARM).any():
            self.harm = "its answers are broken"

    def score(self, units: Sequence[Scored]) -> None:
        """Episodes whose feedback window has closed."""
        for unit in units:
            if not self.harm:
                self._take(unit)

    def _take(self, unit: Scored) -> None:
        rated = not all(map(math.isnan, unit.rewards))
        self.seen += rated
        self.harm = self._contrast(self._standing, unit, _STANDING)
        if self.is_suspicious:
            self.harm = self.harm or self._contrast(self._confirming, unit, self.config.alpha_confirm)
            self._left -= rated
            self._count(unit)
            if not self.is_suspicious:
                self._clear()
        elif unit.served.treated and self._is_alarming(unit):
            self.alarms += 1
            self._left = self.config.confirm_episodes
            self._confirming = self._contrasts()
            self._lately = [[0.0, 0.0] for _ in CLASSES]

    def _count(self, unit: Scored) -> None:
        for counted, reward in zip(self._lately, unit.rewards, strict=True):
            if not math.isnan(reward):
                counted[0], counted[1] = counted[0] + reward, counted[1] + 1

    def _clear(self) -> None:
        """The world changed, not the adapter: what is usual from now on is what was seen of both since the alarm."""
        self.world += 1
        self.usual = [s / n if n >= _ENOUGH else math.nan for s, n in self._lately]
        self._reset()

    def _contrast(self, contrasts: dict[str, Contrast], unit: Scored, alpha: float) -> str:
        if math.isnan(unit.served.propensity):
            return ""
        for name, reward in zip(CLASSES, unit.rewards, strict=True):
            if math.isnan(reward):
                continue
            log_e = contrasts[name].update([unit.served.treated], [reward], [unit.served.propensity])
            if log_e[-1] >= math.log(len(CLASSES) / alpha):
                return f"worse than the last good adapter, say {name}"
        return ""

    def _is_alarming(self, unit: Scored) -> bool:
        threshold = self.config.alarm * max(1, len(self._fast))
        found = [
            self._fast[name].update([reward])[-1] >= threshold
            for name, reward in zip(CLASSES, unit.rewards, strict=True)
            if name in self._fast and not math.isnan(reward)
        ]
        return any(found)


@dataclass(slots=True)
class _Run:
    position: int
    last_good: str
    units: Units
    watch: Watch


class WatchGate:
    """``check(live, last good, anchor)``: PASS, WAIT while an alarm is looked into, FAIL to roll back."""

    name = "watch"

    def __init__(self, store: Store, config: Config, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._config, self._clock = store, config, clock
        self._run: _Run | None = None

    def check(self, candidate: Adapter, live: Adapter, anchor: Adapter) -> Verdict:
        watch = self._followed(candidate, live)
        decision, share = Decision.PASS, self._config.release.holdback_share
        reason = f"nothing against it after {watch.seen} rewards"
        if watch.harm:
            decision, reason = Decision.FAIL, f"{watch.harm} ({watch.seen} rewards)"
        elif watch.is_suspicious:
            decision, share = Decision.WAIT, _EVEN
            reason = f"rewards fell below those before it; compared with {live.id} at even shares"
        evidence = {
            "share": share,
            "rewards": float(watch.seen),
            "alarms": float(watch.alarms),
            "world": float(watch.world),
        }
        return ruling(self.name, candidate, live, self._clock(), decision, reason, evidence)

    def _followed(self, adapter: Adapter, last_good: Adapter) -> Watch:
        position = next((p for p, m in self._store.newest(Move, adapter_id=adapter.id) if m.after is Stage.LIVE), 0)
        if self._run is None or (self._run.position, self._run.last_good) != (position, last_good.id):
            self._run = self._begin(adapter, last_good, position)
        run = self._run
        run.watch.serve(run.units.served())
        run.watch.score(run.units.scored(self._clock()))
        return run.watch

    def _begin(self, adapter: Adapter, last_good: Adapter, position: int) -> _Run:
        steps = [s for _, s in self._store.newest(Step, before=max(1, position), limit=_LOOK_BACK)]
        feedback = [f for _, f in self._store.newest(Feedback, before=max(1, position), limit=_LOOK_BACK)]
        rewards = [rewards_of([f], self._config) for f in feedback if not f.retracted]
        by_class = [[r[i] for r in rewards if not math.isnan(r[i])] for i in range(len(CLASSES))]
        usual = [sum(r) / len(r) if len(r) >= _ENOUGH else math.nan for r in by_class]
        broken = sum(map(is_broken, steps)) / max(1, len(steps))
        units = Units(self._store, self._config, adapter.id, last_good.id, position, Usual.of(steps), tossed_only=False)
        return _Run(position, last_good.id, units, Watch(self._config.release, usual, broken))
