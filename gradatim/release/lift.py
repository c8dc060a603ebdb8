"""What learning is worth: the reward under adapters that learned, less that under the frozen base, at the same time.

A share of new episodes stays on ``name@0`` by the coin (``release.base_share``), so that the difference is causal and
no season moves it. Its interval holds at all times at once: a bound is out when an e-process against it reached
2 / ``LEVEL`` (``stats.contrast``). Of lifts beyond one half it only says that they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradatim.release.series import arrays, put_back
from gradatim.release.units import CLASSES
from gradatim.stats.contrast import Contrast, Floats

LEVEL = 0.05
BOUNDS = np.linspace(-0.5, 0.5, 41)
_STREAMS = (len(CLASSES), len(BOUNDS))


class Lift:
    """``update`` in the order in which episodes were rated."""

    def __init__(self) -> None:
        self._above = Contrast(BOUNDS, 1, _STREAMS)
        self._below = Contrast(BOUNDS, -1, _STREAMS)
        self._sums: Floats = np.zeros((2, 2, len(CLASSES)))  # base, learned; count, sum of rewards

    def update(self, learned: bool, rewards: Sequence[float], propensity: float) -> None:
        """``propensity``: of a learned adapter against the base."""
        y = np.array(rewards)
        known = ~np.isnan(y)
        self._sums[int(learned)] += np.stack([known, np.where(known, y, 0.0)])
        spread = np.broadcast_to(y[:, None, None], (*_STREAMS, 1))
        for contrast in (self._above, self._below):
            contrast.update([float(learned)], spread, [propensity])

    def describe(self) -> dict[str, dict[str, float]]:
        """By class of sources that rated both: the lift, its interval, and what it rests on."""
        out = {}
        enough = math.log(2.0 / LEVEL)
        for i, name in enumerate(CLASSES):
            (n0, s0), (n1, s1) = self._sums[:, :, i]
            if min(n0, n1) < 1:
                continue
            low = BOUNDS[self._above.log_e[i] >= enough]
            high = BOUNDS[self._below.log_e[i] >= enough]
            out[name] = {
                "lift": round(float(s1 / n1 - s0 / n0), 4),
                "low": float(low.max()) if len(low) else -1.0,
                "high": float(high.min()) if len(high) else 1.0,
                "learned": int(n1),
                "base": int(n0),
            }
        return out

    def state(self) -> dict[str, Any]:
        return {"above": arrays(self._above), "below": arrays(self._below), "sums": self._sums.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        put_back(self._above, state["above"])
        put_back(self._below, state["below"])
        self._sums = np.array(state["sums"], dtype=np.float64).reshape(self._sums.shape)
