"""Is it the live adapter or is it the world? Rewards fell: did they fall for adapters that did not change as well?

Two stories are weighed, with even odds before: the world changed, and whoever answered beside the live adapter lost as
much; or the live adapter is at fault, and they lost nothing. With x what such a control lost, s^2 the variance
of that estimate and d what was lost on the live adapter, the log odds are

    log N(x; d, s^2) - log N(x; 0, s^2) = d (x - d / 2) / s^2

and the controls' add up. What a control was worth before is known from its own rewards, and from those of the live
adapter, to which one that passed the gates is close. Posterior odds may be looked at at any time. Means are taken to be
normal, so a control speaks from ``FEWEST`` rewards on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gradatim.types import AdapterId

LIVE, CONTROL = "live", "control"  # arms; anything else is neither
FEWEST = 20
SURE = 0.95  # of one story, to tell it
_ALIKE = 0.03  # standard deviation of the difference between two adapters that users got


@dataclass(frozen=True, slots=True)
class Rated:
    """An episode that somebody rated. A reward is in [0, 1], NaN where its class said nothing."""

    served_at: float
    adapter_id: AdapterId
    arm: str
    skill: str
    rewards: tuple[float, ...]  # one of each class of sources


@dataclass(frozen=True, slots=True)
class Mean:
    n: int = 0
    value: float = math.nan
    variance: float = math.inf  # of the mean


@dataclass(frozen=True, slots=True)
class Comparison:
    """``world``: how likely it is the world that changed, given one of the two stories."""

    world: float = 0.5
    before: Mean = Mean()
    after: Mean = Mean()
    controls: Mapping[AdapterId, tuple[float, Mean]] = field(default_factory=dict)  # before, and after

    @property
    def is_the_world(self) -> bool:
        return self.world >= SURE

    @property
    def is_the_adapter(self) -> bool:
        return self.world <= 1.0 - SURE


def compare(rated: Sequence[Rated], since: float, source: int, skill: str = "") -> Comparison:
    """``since``: Unix seconds of the change; ``source``: the class of rewards that fell, for that skill or for all."""
    known = [u for u in rated if not math.isnan(u.rewards[source]) and skill in ("", u.skill)]
    before = [u for u in known if u.served_at < since]
    after = [u for u in known if u.served_at >= since]
    live = _mean(u.rewards[source] for u in before if u.arm == LIVE)
    now = _mean(u.rewards[source] for u in after if u.arm == LIVE)
    if min(live.n, now.n) < FEWEST:
        return Comparison(before=live, after=now)
    lost = live.value - now.value
    log_odds, controls = 0.0, {}
    for adapter_id, mean in _controls(after, source).items():
        own = _mean(u.rewards[source] for u in before if u.adapter_id == adapter_id)
        was = _both(own, Mean(1, live.value, live.variance + _ALIKE**2))
        controls[adapter_id] = (was.value, mean)
        variance = was.variance + mean.variance + (live.variance + now.variance) / 4.0
        log_odds += max(0.0, lost) * (was.value - mean.value - lost / 2.0) / variance
    world = 1.0 / (1.0 + math.exp(-min(50.0, max(-50.0, log_odds))))
    return Comparison(world, live, now, controls)


def _controls(after: Sequence[Rated], source: int) -> Mapping[AdapterId, Mean]:
    rewards: dict[AdapterId, list[float]] = defaultdict(list)
    for unit in after:
        if unit.arm == CONTROL:
            rewards[unit.adapter_id].append(unit.rewards[source])
    return {a: _mean(values) for a, values in sorted(rewards.items()) if len(values) >= FEWEST}


def _mean(values: Iterable[float]) -> Mean:
    """With one more value of variance 1/4, so that a few equal ones are not taken for certain."""
    x = list(values)
    if not x:
        return Mean()
    mean = math.fsum(x) / len(x)
    spread = (math.fsum((v - mean) ** 2 for v in x) + 0.25) / (len(x) + 1)
    return Mean(len(x), mean, spread / len(x))


def _both(a: Mean, b: Mean) -> Mean:
    """Weighted by how sure each is."""
    if not a.n:
        return b
    weight = 1.0 / a.variance + 1.0 / b.variance
    return Mean(a.n + b.n, (a.value / a.variance + b.value / b.variance) / weight, 1.0 / weight)
