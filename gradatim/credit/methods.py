"""The methods of credit for long episodes that look at logged traffic, by their names in the configuration.

    fork           other answers to exactly this prompt
    anchor         other answers to this observation, whatever came before
    decomposition  what each step changed of a scorer of prefixes; sums to the reward
    gae            the same scorer as the value of a state, turn-level GAE

Knows no store.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from gradatim.config import CreditConfig
from gradatim.credit import decompose
from gradatim.credit.anchors import contrast
from gradatim.credit.answer import Answer
from gradatim.credit.history import Lived
from gradatim.credit.turns import advantages

_REFIT = 1.1  # the scorer is fitted anew when there have been this many times as many episodes


class Methods:
    """Holds the scorer, fitted to the traffic that it was last asked with."""

    def __init__(self, config: CreditConfig) -> None:
        self._config = config
        self._scorer: decompose.PrefixScorer | None = None
        self._fitted_to = 0

    def answer(self, method: str, this: Lived, past: Sequence[Lived], seen: int) -> Answer | None:
        """None where it abstains. ``past``: the newest of all episodes, of which ``seen`` have ever been."""
        if method == "fork":
            return contrast(this, this.states, [(e, e.states) for e in past], method)
        if method == "anchor":
            return contrast(this, this.observations, [(e, e.observations) for e in past], method)
        scorer = self._fitted(past, seen)
        if scorer is None:
            return None
        expected = scorer.prefixes(this)
        if method == "gae":
            raw = advantages([float(v) for v in expected], this.value, self._config.gae_lambda)
            shares = [float(a) for a in np.clip(raw, -1.0, 1.0)]
        else:
            shares = scorer.credit(this)
        why = [f"expected reward {a:+.2f} before, {b:+.2f} after it" for a, b in pairwise(expected)]
        return Answer(method, shares, why)

    def _fitted(self, past: Sequence[Lived], seen: int) -> decompose.PrefixScorer | None:
        """The scorer, where it explains enough."""
        if len(past) >= decompose.FEWEST and seen >= self._fitted_to * _REFIT:
            self._scorer, self._fitted_to = decompose.fit(past), seen
        if self._scorer is None or self._scorer.fit < self._config.least_fit:
            return None
        return self._scorer
