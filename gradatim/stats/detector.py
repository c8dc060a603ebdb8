"""An e-detector for a fall of a bounded mean: the Shiryaev-Roberts sum of betting e-processes, one begun at each step.

M_t = (M_{t-1} + 1) (1 + lambda (m - Y_t)) with Y in [0, 1]; as long as the mean given the past is at least m, M_t - t
is a supermartingale, so that the average run length to a false alarm at M >= A is at least A, whatever the law of
the rewards, dependent ones included (Shin, Ramdas & Rinaldo, arXiv:2203.03532). Averaged over several bets lambda.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gradatim.stats.contrast import Floats

BETS = (0.05, 0.1, 0.2, 0.4, 0.8)  # of the largest bet that cannot lose everything


class Detector:
    """Watches for a mean below ``least`` (one number in [0, 1), or one for each stream)."""

    def __init__(self, least: ArrayLike, streams: tuple[int, ...] = ()) -> None:
        m = np.broadcast_to(np.asarray(least, dtype=np.float64), streams)[..., None]  # (..., 1)
        if np.any((m < 0.0) | (m >= 1.0)):
            raise ValueError("the mean that is watched for lies in [0, 1)")
        self._least = m
        self._bets = np.array(BETS) / (1.0 - m)  # (..., K)
        self._sums: Floats = np.zeros((*streams, len(BETS)))

    @property
    def value(self) -> Floats:
        """M now, of each stream: an alarm at A is false once in at least A units, on average."""
        return np.asarray(self._sums.mean(axis=-1), dtype=np.float64)

    def update(self, reward: ArrayLike) -> Floats:
        """The next N rewards of each stream; NaN changes nothing. (..., N) M after each."""
        y = np.asarray(reward, dtype=np.float64)
        out = np.empty(y.shape)
        for t in range(y.shape[-1]):
            factor = 1.0 + self._bets * (self._least - y[..., t, None])
            grown = np.minimum((self._sums + 1.0) * factor, 1e200)
            self._sums = np.where(np.isnan(y[..., t, None]), self._sums, grown)
            out[..., t] = self.value
        return out
