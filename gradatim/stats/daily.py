"""The daily course of streams: what a mean rises and falls by with the time of day, learned as it goes.

Ridge regression on a constant and two harmonics of the day, with a memory of two weeks. What is predicted is the
difference to the stream's own mean, before the value is seen. Until a stream has run for two days its course cannot be
told from a change, and nothing is predicted. Knows the day alone: a weekend is a change.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradatim.stats.contrast import Floats

DAY_S = 86_400.0
DAYS_FIRST = 2.0  # that are seen before anything is said
_MEMORY_DAYS = 14.0
_RIDGE = 100.0  # units: as if so many had been seen without any course
_EVERY = 32  # units between two solutions
_MOST = 0.25  # largest difference predicted
_F = 5  # features


class Daily:
    """``period_s``: the length of the day; 0: there is no course, and nothing to wait for."""

    STATE: ClassVar = ("_gram", "_moment", "_weights", "_since", "_last", "_n")

    def __init__(self, streams: tuple[int, ...], period_s: float = DAY_S) -> None:
        self._period_s = period_s
        self._gram: Floats = np.zeros((*streams, _F, _F))
        self._moment: Floats = np.zeros((*streams, _F))
        self._weights: Floats = np.zeros((*streams, _F))
        self._since: Floats = np.full(streams, np.inf)  # time of the first unit
        self._last: Floats = np.array(-np.inf)
        self._n: Floats = np.array(0.0)

    def predict(self, at: float) -> Floats:
        """(...,) the course at a time, in Unix seconds."""
        if not self._period_s:
            return np.zeros(self._since.shape)
        weight = np.maximum(self._gram[..., 0, 0], 1.0)[..., None]
        away = self._features(at)[1:] - self._gram[..., 0, 1:] / weight
        course = (self._weights[..., 1:] * away).sum(axis=-1)
        return np.where(self.is_known(at), np.clip(course, -_MOST, _MOST), 0.0)

    def is_known(self, at: float) -> NDArray[np.bool_]:
        """(...,) of which streams the course is known by then."""
        return np.asarray(at - self._since >= DAYS_FIRST * self._period_s)

    def update(self, y: ArrayLike, at: float) -> None:
        """The next unit of every stream; NaN: it has none."""
        value = np.asarray(y, dtype=np.float64)
        known = ~np.isnan(value)
        self._since[known & np.isinf(self._since)] = at
        if not self._period_s:
            return
        passed_s = max(0.0, at - float(self._last)) if math.isfinite(self._last) else 0.0
        kept = math.exp(-passed_s / (_MEMORY_DAYS * self._period_s))
        f = self._features(at)
        self._gram = kept * self._gram + np.where(known[..., None, None], np.outer(f, f), 0.0)
        self._moment = kept * self._moment + np.where(known, np.where(known, value, 0.0), 0.0)[..., None] * f
        self._last, self._n = np.array(max(at, float(self._last))), self._n + 1.0
        if self._n % _EVERY == 0:
            ridge = np.diag([1e-6] + [_RIDGE] * (_F - 1))
            found = np.linalg.solve(self._gram + ridge, self._moment[..., None])[..., 0]
            self._weights = np.asarray(found, dtype=np.float64)

    def shift(self, stream: int, by: float) -> None:
        """The level of one stream moved, and not its course."""
        self._moment[stream] += by * self._gram[stream, 0]

    def _features(self, at: float) -> Floats:
        turn = 2.0 * math.pi * math.fmod(at, self._period_s) / self._period_s
        return np.array([1.0, math.cos(turn), math.sin(turn), math.cos(2.0 * turn), math.sin(2.0 * turn)])
