"""An e-process for the difference of two arms whose coin is known: betting on the inverse-propensity contrast.

For unit t with arm A (1 treated, 0 control), propensity pi = P(A = 1 | past) and reward Y in [0, 1]

    Z = (A / pi - (1 - A) / (1 - pi)) (Y - c),    E[Z | past] = E[Y | 1] - E[Y | 0] = delta

for any c that the past determines (augmented inverse propensity weighting; Karampatziakis et al., arXiv:2102.09540).
Under H0: delta <= bound the wealth  prod (1 + lambda (Z - bound))  of a gambler whose bets lambda >= 0 the past
determines is a non-negative supermartingale (Waudby-Smith & Ramdas, arXiv:2010.09686), so that by Ville's inequality it
ever reaches 1 / alpha with a chance of at most alpha, however often one looks and whatever drifts, as long as the coin
is fair. Bets are growth-optimal for an alternative delta = bound + d, lambda = d / Var(Z), with the variance so far:
for rewards 0 and 1 that is the two-sample e-value p_A(y) / (pi p_1(y) + (1 - pi) p_0(y)) (Turner, Ly & Gruenwald,
arXiv:2106.02693), here with a bound and for any reward in [0, 1]. Wealth is spread over several d.

Every array may have leading axes for independent streams; the last one is time.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

ALTERNATIVES = (0.03, 0.06, 0.12, 0.24)  # differences beyond the bound that are bet on
_MOST = 0.75  # of its wealth that a bet may lose in one step
_PRIOR = 4.0  # units with mean 1/2 and variance 1/4 that are thought before the first


class Contrast:
    """Log e-process against H0: delta <= bound (``direction`` +1) or H0: delta >= bound (-1), for |bound| <= 0.5: one
    number, or one for each stream.

    Swapping the arms and the sign of the bound swaps the two directions exactly.
    """

    STATE: ClassVar = ("_wealth", "_n", "_sum", "_squares")

    def __init__(self, bound: ArrayLike = 0.0, direction: int = 1, streams: tuple[int, ...] = ()) -> None:
        self._bound: Floats = np.broadcast_to(np.asarray(bound, dtype=np.float64), streams)[..., None]  # (..., 1)
        if not (np.abs(self._bound) <= 0.5).all() or direction not in (1, -1):
            raise ValueError("a bound lies in [-0.5, 0.5], a direction is 1 or -1")
        self._direction = direction
        self._wealth: Floats = np.zeros((*streams, len(ALTERNATIVES)))  # log
        self._n: Floats = np.zeros(streams)
        self._sum: Floats = np.zeros(streams)
        self._squares: Floats = np.zeros(streams)

    @property
    def log_e(self) -> Floats:
        """Now, of each stream."""
        return _mean_exp(self._wealth)

    def update(self, arm: ArrayLike, reward: ArrayLike, propensity: ArrayLike) -> Floats:
        """The next N units of each stream; NaN: no reward, changes nothing. (..., N) log e after each."""
        a, y, pi = (np.asarray(x, dtype=np.float64) for x in (arm, reward, propensity))  # (..., N)
        known = ~np.isnan(y)
        y = np.where(known, y, 0.0)
        mean, variance = self._past(y, known)
        z = (a / pi - (1.0 - a) / (1.0 - pi)) * (y - mean)
        gain = self._direction * (z - self._bound)
        rare = np.minimum(pi, 1.0 - pi)
        largest = _MOST / (np.maximum(mean, 1.0 - mean) / rare + np.abs(self._bound))
        unit = pi * (1.0 - pi) / variance  # 1 / Var(Z), by the variance within the arms
        alternatives = np.array(ALTERNATIVES)
        bets = np.minimum(unit[..., None] * alternatives, largest[..., None])  # (..., N, K)
        steps = np.log1p(bets * np.where(known, gain, 0.0)[..., None])
        wealth = self._wealth[..., None, :] + np.cumsum(steps, axis=-2)
        if y.shape[-1]:
            self._wealth = wealth[..., -1, :]
            self._n = self._n + known.sum(-1)
            self._sum = self._sum + y.sum(-1)
            self._squares = self._squares + (y * y).sum(-1)
        return _mean_exp(wealth)

    def _past(self, y: Floats, known: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """(..., N) mean and variance of the rewards before each unit."""
        n = _PRIOR + self._n[..., None] + _before(known.astype(np.float64))
        mean = (_PRIOR / 2 + self._sum[..., None] + _before(y)) / n
        squares = (_PRIOR / 2 + self._squares[..., None] + _before(y * y)) / n
        return mean, np.maximum(squares - mean * mean, 1e-3)


def _before(x: Floats) -> Floats:
    """Cumulative sums without the own term."""
    return np.cumsum(x, axis=-1) - x


def _mean_exp(log_x: Floats) -> Floats:
    """log of the mean of exp(x) over the last axis."""
    top = log_x.max(axis=-1)
    out: Any = top + np.log(np.exp(log_x - top[..., None]).mean(axis=-1))
    return np.asarray(out, dtype=np.float64)
