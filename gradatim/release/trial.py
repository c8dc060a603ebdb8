"""The decision of a canary: a pure function of its units, in their order.

Harm is looked for at every unit, in the rewards, in the answers themselves and in the coin; what does no harm moves up
only where the evidence of every class of sources that there was before the trial says so. Knows no store and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gradatim.config import ReleaseConfig
from gradatim.release.units import CLASSES, HARMS, Scored, Served
from gradatim.stats.contrast import Contrast, Floats
from gradatim.stats.ratio import Ratio

Flags = NDArray[np.bool_]

# a treated mean that is greater than the control's by more is harm
_TOLERATED = {"broken": 0.02, "cut short": 0.05, "aborted": 0.05, "length": 0.15, "latency": 0.15}
_UNUSED = 0.1  # share of a level for classes of sources that were silent before
_DOUBT = math.log(20.0)  # log e-value of a test of the coin that keeps from promoting, long before it rejects
_UNFAIR = "the {} are not shared out as the coin says: nothing can be concluded"


@dataclass(slots=True)
class Trial:
    """Of one canary against the live adapter. ``required``: the classes whose evidence a promotion needs; ``users``:
    how many of them it needs; ``begun_at``: Unix seconds."""

    config: ReleaseConfig
    required: Sequence[str]
    users: int = 0
    begun_at: float = 0.0
    level: int = 0  # place in the ramp
    harm: str = ""  # why it must be taken back; never unsaid
    proven: bool = False  # not worse than the margin allows, by all required classes
    treated: int = 0  # rated episodes of the canary
    scored: int = 0  # rated episodes of both arms
    closed: int = 0  # episodes of both arms past their feedback window, rated or not
    closed_treated: int = 0
    _guards: list[Contrast] = field(init=False)
    _coins: dict[str, Ratio] = field(init=False)
    _kept: dict[str, Contrast] = field(init=False)
    _worse: dict[str, Contrast] = field(init=False)
    _raters: set[str] = field(default_factory=set)
    _level_seen: int = 0  # treated episodes at this level
    _level_since: float = 0.0

    def __post_init__(self) -> None:
        self._guards = [Contrast(_TOLERATED[name], 1) for name in HARMS]
        self._coins = {name: Ratio() for name in ("episodes", "feedback", "abstentions")}
        self._kept = {name: Contrast(-self.config.margin, 1) for name in CLASSES}
        self._worse = {name: Contrast(0.0, -1) for name in CLASSES}
        self._level_since = self.begun_at

    # ------------------------------------------------------------------ what is seen at once

    def serve(self, units: Sequence[Served]) -> None:
        """Answers as they were given: the guards, the coin, and the ramp."""
        if self.harm or not units:
            return
        arm, propensity = _arms(units)
        harms = np.array([u.harms for u in units]).T  # (H, N)
        level = math.log(len(HARMS) / self.config.alpha_guard)
        for name, guard, values in zip(HARMS, self._guards, harms, strict=True):
            if (guard.update(arm, values, propensity) >= level).any():
                self.harm = self.harm or f"its answers: {name} more often or more than the live adapter's"
        if self._toss("episodes", arm, propensity, np.ones_like(arm))[0].any():
            self.harm = self.harm or _UNFAIR.format("episodes")
        for unit in units:
            self._climb(unit)

    def _toss(self, name: str, arm: Floats, propensity: Floats, counted: Floats) -> tuple[Flags, Flags]:
        """(N,) whether the coin is found not to be the one that was logged; (N,) whether that is in doubt."""
        log_e = self._coins[name].update(arm, propensity, counted)
        return log_e >= -math.log(self.config.alpha_ratio), log_e >= _DOUBT

    def _climb(self, unit: Served) -> None:
        self._level_seen += unit.treated
        enough = self._level_seen >= self.config.ramp_episodes
        if enough and unit.served_at - self._level_since >= self.config.ramp_s and not self.is_at_the_top:
            self.level, self._level_seen, self._level_since = self.level + 1, 0, unit.served_at

    @property
    def is_at_the_top(self) -> bool:
        return self.level >= len(self.config.ramp) - 1

    # ------------------------------------------------------------------ what users said of it

    def score(self, units: Sequence[Scored]) -> None:
        """Episodes whose feedback window has closed. After a decision nothing changes it."""
        if self.harm or self.proven or not units:
            return
        arm, propensity = _arms([u.served for u in units])
        rated = self._toss("feedback", arm, propensity, np.array([float(u.rated) for u in units]))
        abstained = self._toss("abstentions", arm, propensity, np.array([float(u.abstained) for u in units]))
        rewards = np.array([u.rewards for u in units]).T  # (C, N)
        kept, worse = self._bet(arm, rewards, propensity)
        against = [
            (_first(rated[0]), _UNFAIR.format("feedback")),
            (_first(abstained[0]), _UNFAIR.format("abstentions")),
            *((_first(w), f"worse than the live adapter, say {name}") for name, w in zip(CLASSES, worse, strict=True)),
        ]
        first_bad, why = min(against)
        first_good = _first(kept & self._floors(units, rewards) & ~rated[1] & ~abstained[1])
        if first_bad < len(units) and first_bad <= first_good:
            self.harm = why
        elif first_good < len(units):
            self.proven = True

    def _bet(self, arm: Floats, rewards: Floats, propensity: Floats) -> tuple[Flags, list[Flags]]:
        """(N,) whether every required class shows no loss, and of each class whether it shows one."""
        enough = -math.log(self.config.alpha)
        levels = levels_of(self.config.alpha_worse, self.required)
        kept = np.full(arm.shape, bool(self.required))
        worse: list[Flags] = []
        for i, name in enumerate(CLASSES):
            not_worse = self._kept[name].update(arm, rewards[i], propensity) >= enough
            worse.append(self._worse[name].update(arm, rewards[i], propensity) >= levels[name])
            if name in self.required:
                kept &= not_worse
        return kept, worse

    def _floors(self, units: Sequence[Scored], rewards: Floats) -> Flags:
        """(N,) whether enough was seen by then, of enough users, for long enough."""
        rated: Flags = np.logical_or.reduce(~np.isnan(rewards))
        treated = np.array([u.served.treated for u in units])
        self.closed, self.closed_treated = self.closed + len(units), self.closed_treated + int(treated.sum())
        seen = self.treated + np.cumsum(treated & rated)
        self.treated, self.scored = int(seen[-1]), self.scored + int(rated.sum())
        users = np.empty(len(units))
        for i, unit in enumerate(units):
            if rated[i] and treated[i] and unit.served.user:
                self._raters.add(unit.served.user)
            users[i] = len(self._raters)
        long = np.array([u.served.served_at for u in units]) - self.begun_at >= self.config.min_s
        return np.asarray(rated & (seen >= self.config.min_episodes) & (users >= self.users) & long)

    def evidence(self) -> dict[str, float]:
        """For the verdict: log e-values (3.7 is 1 / 0.025) and counts."""
        out = {"rated": float(self.scored), "canary_rated": float(self.treated)}
        for name in CLASSES:
            out |= {f"{name}.kept": float(self._kept[name].log_e), f"{name}.worse": float(self._worse[name].log_e)}
        out |= {f"guard.{name}": float(g.log_e) for name, g in zip(HARMS, self._guards, strict=True)}
        out |= {f"coin.{name}": float(r.log_e) for name, r in self._coins.items()}
        return {k: round(v, 4) for k, v in out.items()}


def levels_of(alpha: float, required: Sequence[str]) -> dict[str, float]:
    """Log e-value at which each class speaks of harm, with a chance of ``alpha`` in all where there is none. Those that
    there was feedback of before share it; a tenth is left for one that only now begins to speak."""
    others = [name for name in CLASSES if name not in required]
    if not required or not others:
        return dict.fromkeys(CLASSES, math.log(len(CLASSES) / alpha))
    used = {name: math.log(len(required) / (1.0 - _UNUSED) / alpha) for name in required}
    return used | {name: math.log(len(others) / _UNUSED / alpha) for name in others}


def _arms(units: Sequence[Served]) -> tuple[Floats, Floats]:
    return np.array([float(u.treated) for u in units]), np.array([u.propensity for u in units])


def _first(flags: Flags) -> int:
    """Index of the first true one; the length where there is none."""
    return int(flags.argmax()) if flags.any() else len(flags)
