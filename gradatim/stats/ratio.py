"""A sequential test for a sample ratio mismatch: does the arm that was seen follow the coin that was tossed?

For a unit with propensity pi the alternative tilts the odds by e^theta. The likelihood ratio of tilted to fair coin,
averaged over tilts of either sign, is a martingale with start 1 where the coin is fair, so that it ever reaches
1 / alpha with a chance of at most alpha (Lindon & Malek, arXiv:2011.03567, with a discrete prior). It is used on all
units, and on those with feedback alone, which a change that silences unhappy users would thin out in one arm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gradatim.stats.contrast import Floats, _mean_exp

TILTS = (-2.0, -1.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0, 2.0)  # of the log odds


class Ratio:
    """Log e-process against H0: P(arm = 1) is the propensity."""

    def __init__(self, streams: tuple[int, ...] = ()) -> None:
        self._wealth: Floats = np.zeros((*streams, len(TILTS)))

    @property
    def log_e(self) -> Floats:
        """Now, of each stream."""
        return _mean_exp(self._wealth)

    def update(self, arm: ArrayLike, propensity: ArrayLike, counted: ArrayLike | None = None) -> Floats:
        """The next N units of each stream, of which those ``counted``. (..., N) log e after each."""
        a, pi = np.asarray(arm, dtype=np.float64), np.asarray(propensity, dtype=np.float64)  # (..., N)
        tilts = np.array(TILTS)
        normal = np.log1p(pi[..., None] * np.expm1(tilts))  # log(pi e^theta + 1 - pi)
        steps = a[..., None] * tilts - normal  # (..., N, K)
        if counted is not None:
            steps = steps * np.asarray(counted, dtype=np.float64)[..., None]
        wealth = self._wealth[..., None, :] + np.cumsum(steps, axis=-2)
        if a.shape[-1]:
            self._wealth = wealth[..., -1, :]
        return _mean_exp(wealth)
