"""Finds a change of the mean of bounded streams whose mean nobody knows beforehand; it may have a known daily course.

A stream in [0, 1] has conditional means m + s_t: a level m, and a course s_t that the caller predicts. The level lies,
at all times at once and with a chance of 1 - ``alpha``, within (Howard et al., arXiv:1810.08240, theorem 4; a union
over K tilts l, half of alpha for each side)

    sum(Y - s) / n  -+  min_l (log(2 K / alpha) + psi(l) V) / (l n),    psi(l) = -log(1 - l) - l,

V the sum of squared errors of a prediction made beforehand. With a_t, b_t the bounds so far, each narrowed by all
earlier ones, two e-detectors watch for means below a_t + s_t and above b_t + s_t (Shiryaev-Roberts sums of bets:
``detector``, arXiv:2203.03532); what they compare with sharpens for as long as nothing changes. As long as the level
stays within ``tolerance`` of a constant, M_t - t is a supermartingale wherever the bounds hold, so that by Doob

    P(an alarm at a threshold A within n units)  <=  alpha + 2 n / A

for each stream, and by summing for all. The change is dated as CUSUM dates it: to the last unit at which the bet
that has won most since had nothing to lose. Knows neither time nor what is measured. Streams are picked by an index of
the first axis.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradatim.stats.contrast import Floats
from gradatim.stats.detector import BETS

TILTS = 0.8 * 0.5 ** np.arange(8)
_PSI = -np.log1p(-TILTS) - TILTS
FEWEST = 100  # units of which a level is made before anything is compared with it
_BETS = np.array(BETS)
Rows = int | NDArray[np.int64] | slice


class Changes:
    """``threshold``: A, of each stream. Two sides: 0 a fall, 1 a rise."""

    STATE: ClassVar = ("_n", "_total", "_squares", "_low", "_high", "_sums", "_runs", "_began", "_since")

    def __init__(
        self, streams: tuple[int, ...], threshold: ArrayLike, *, alpha: ArrayLike = 0.001, tolerance: float = 0.01
    ) -> None:
        self._threshold = np.broadcast_to(np.asarray(threshold, dtype=np.float64), streams)
        self._log = np.log(2 * len(TILTS) / np.broadcast_to(np.asarray(alpha, dtype=np.float64), streams))
        self._tolerance = tolerance
        self._n: Floats = np.zeros(streams)
        self._total: Floats = np.zeros(streams)
        self._squares: Floats = np.zeros(streams)
        self._low: Floats = np.full(streams, -1.0)
        self._high: Floats = np.full(streams, 2.0)
        self._sums: Floats = np.zeros((*streams, 2, len(BETS)))
        self._runs: Floats = np.ones((*streams, 2, len(BETS)))
        self._began: Floats = np.zeros((*streams, 2, len(BETS)))
        self._since: Floats = np.zeros((*streams, 2, len(BETS), 2))  # since then: count, and sum

    def update(
        self, rows: Rows, y: ArrayLike, course: ArrayLike = 0.0, *, at: float = 0.0, watched: ArrayLike = True
    ) -> NDArray[np.int64]:
        """The next unit of each of ``rows``; NaN changes nothing. -1 where it fell, 1 where it rose, 0 where neither.

        ``course``: s, predicted before it was seen. ``at``: what dates the unit. ``watched``: where false, the level is
        learned and nothing is compared with it."""
        value = np.asarray(y, dtype=np.float64)
        s = np.broadcast_to(np.asarray(course, dtype=np.float64), value.shape)
        known = ~np.isnan(value)
        value = np.where(known, value, 0.0)
        compared = known & np.asarray(watched, dtype=np.bool_) & (self._n[rows] >= FEWEST)
        signs = self._bet(rows, value, s, compared, at)
        mean = self._mean(rows)
        predicted = np.clip(mean + s, 0.0, 1.0)
        self._n[rows] += known
        self._total[rows] += np.where(known, value - s, 0.0)
        self._squares[rows] += np.where(known, (value - predicted) ** 2, 0.0)
        return signs

    def _bet(self, rows: Rows, y: Floats, s: Floats, compared: NDArray[np.bool_], at: float) -> NDArray[np.int64]:
        low, high = self._bounds(rows)
        self._low[rows] = low = np.where(compared, np.maximum(self._low[rows], low), self._low[rows])
        self._high[rows] = high = np.where(compared, np.minimum(self._high[rows], high), self._high[rows])
        least = np.clip(low + s - self._tolerance, 0.0, 0.99)
        most = np.clip(high + s + self._tolerance, 0.01, 1.0)
        gain = np.stack([least - y, y - most], axis=-1)[..., None]  # (..., 2, 1)
        bets = _BETS / np.stack([1.0 - least, most], axis=-1)[..., None]  # (..., 2, B): none can lose everything
        factor = np.where(compared[..., None, None], 1.0 + bets * gain, 1.0)
        self._date(rows, factor, y - s, compared[..., None, None], at)
        self._sums[rows] = sums = np.minimum((self._sums[rows] + compared[..., None, None]) * factor, 1e200)
        found = (sums.mean(axis=-1) >= self._threshold[rows][..., None]) & compared[..., None]  # (..., 2)
        return np.where(found[..., 0], -1, np.where(found[..., 1], 1, 0))

    def _date(self, rows: Rows, factor: Floats, value: Floats, compared: NDArray[np.bool_], at: float) -> None:
        runs = self._runs[rows]
        begins = (runs <= 1.0) & compared  # (..., 2, B)
        self._began[rows] = np.where(begins, at, self._began[rows])
        self._runs[rows] = np.where(compared, np.minimum(np.maximum(runs, 1.0) * factor, 1e200), runs)
        unit = np.stack([np.ones_like(value), value], axis=-1)[..., None, None, :] * compared[..., None]
        self._since[rows] = np.where(begins[..., None], 0.0, self._since[rows]) + unit

    def _mean(self, rows: Rows) -> Floats:
        n = self._n[rows]
        return np.where(n > 0, self._total[rows] / np.maximum(n, 1.0), 0.5)

    def _bounds(self, rows: Rows) -> tuple[Floats, Floats]:
        n = np.maximum(self._n[rows], 1.0)[..., None]
        radius = ((self._log[rows][..., None] + _PSI * self._squares[rows][..., None]) / (TILTS * n)).min(axis=-1)
        mean = self._mean(rows)
        return mean - radius, mean + radius

    def began(self, row: Any) -> float:
        """``at`` of the unit with which the change of one stream began, by the bet that has won most since."""
        return float(self._began[row][self._best(row)])

    def moved(self, row: Any) -> tuple[float, float]:
        """(mean before, mean since) that unit, of one stream."""
        count, total = self._since[row][self._best(row)]
        before = max(1.0, float(self._n[row]) - count)
        return float((self._total[row] - total) / before), float(total / max(1.0, count))

    def _best(self, row: Any) -> tuple[int, ...]:
        runs = self._runs[row]  # (2, B)
        return tuple(int(i) for i in np.unravel_index(runs.argmax(), runs.shape))

    def forget(self, rows: Any) -> None:
        """Begin anew: what comes next is the new level."""
        for name, fresh in (("_n", 0.0), ("_total", 0.0), ("_squares", 0.0), ("_low", -1.0), ("_high", 2.0)):
            getattr(self, name)[rows] = fresh
        self._sums[rows], self._runs[rows], self._began[rows], self._since[rows] = 0.0, 1.0, 0.0, 0.0
