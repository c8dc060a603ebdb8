"""An e-process for the mean of paired differences: both arms did the same work, as in a replay of the same prompts.

For differences D in [-1, 1], H0: E[D | past] <= bound, wealth prod (1 + lambda (D - bound)) with bets that the past
determines: as in ``contrast``, without a coin (Waudby-Smith & Ramdas, arXiv:2010.09686).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

ALTERNATIVES = (0.01, 0.02, 0.05, 0.1, 0.2)  # means beyond the bound that are bet on,
SHARES = (0.1, 0.25, 0.4, 0.15, 0.1)  # with these shares of the wealth at the start: most on what must be found soon
_MOST = 0.75  # of its wealth that a bet may lose in one step
_PRIOR = 4.0  # pairs that are thought before the first, with variance 1/10


class Paired:
    """Log e-process against H0: mean <= bound (``direction`` +1) or >= bound (-1), |bound| <= 0.5."""

    def __init__(self, bound: float = 0.0, direction: int = 1) -> None:
        if not -0.5 <= bound <= 0.5 or direction not in (1, -1):
            raise ValueError("a bound lies in [-0.5, 0.5], a direction is 1 or -1")
        self._bound, self._direction = bound, direction
        self._wealth = [math.log(share) for share in SHARES]
        self._n, self._sum, self._squares = _PRIOR, 0.0, _PRIOR * 0.1

    @property
    def log_e(self) -> float:
        top = max(self._wealth)
        return top + math.log(sum(math.exp(w - top) for w in self._wealth))

    def update(self, differences: Sequence[float], *, learn: bool = True) -> list[float]:
        """The next N pairs; log e after each. ``learn``: whether later bets go by them too. ValueError for a difference
        that is not in [-1, 1]."""
        out = []
        for difference in differences:
            if not -1.0 <= difference <= 1.0:
                raise ValueError(f"a difference of two rewards lies in [-1, 1], not {difference}")
            self._take(difference)
            if learn:
                self._n, self._sum = self._n + 1, self._sum + difference
                self._squares += difference**2
            out.append(self.log_e)
        return out

    def _take(self, difference: float) -> None:
        mean = self._sum / self._n
        variance = max(self._squares / self._n - mean * mean, 1e-3)
        gain = self._direction * (difference - self._bound)
        largest = _MOST / (1.0 + abs(self._bound))
        for k, d in enumerate(ALTERNATIVES):
            self._wealth[k] += math.log1p(min(d / variance, largest) * gain)
