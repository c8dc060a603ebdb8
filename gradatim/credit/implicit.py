"""Credit from what preference training has taught: the implicit reward of each step (PRIME, arXiv:2502.01456, eq. 3;
iStar, arXiv:2509.19199), without a reward model of steps.

    r_k = beta Σ_{tokens t of step k} (log pi(y_t | ...) - log pi_ref(y_t | ...))

pi is the live adapter, pi_ref the frozen base: of a policy that DPO made, beta times the log-ratio of a whole answer is
its reward up to a constant (Rafailov 2023, eq. 5), and the terms before a step tell what was expected then. Beta and
the constant are fitted by least squares to how earlier episodes ended; the credit is shared as a scorer of prefixes
shares it, and sums to the reward. Only episodes that the live adapter cannot have been trained on count, or it would
agree with its own lessons. Abstains where leave-one-out explains too little. Knows no tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradatim.credit.answer import Answer
from gradatim.credit.decompose import FEWEST, carried, share_rest
from gradatim.credit.history import History
from gradatim.protocols import LogRatios
from gradatim.types import Episode, EpisodeId

Floats = npt.NDArray[np.float64]
WINDOW = 32  # episodes, the newest, that beta is fitted to: each costs two passes over its steps
_METHOD = "implicit"


@dataclass(frozen=True, slots=True)
class Line:
    """value = intercept + beta * sum of log-ratios. ``fit``: R², each episode predicted by the others."""

    intercept: float
    beta: float
    fit: float


def line(sums: Floats, values: Floats) -> Line | None:
    """(N,) each; None where they do not differ."""
    centred = sums - sums.mean()
    spread, total = float(centred @ centred), float(np.var(values)) * len(values)
    if spread <= 0.0 or total <= 0.0:
        return None
    beta = float(centred @ values) / spread
    residual = values - values.mean() - beta * centred
    leverage = 1.0 / len(values) + centred**2 / spread
    wrong = float(((residual / np.maximum(1.0 - leverage, 1e-9)) ** 2).sum())
    alone = float((((values - values.mean()) / (1.0 - 1.0 / len(values))) ** 2).sum())
    return Line(float(values.mean()) - beta * float(sums.mean()), beta, 1.0 - wrong / alone)


class ImplicitCredit:
    """``history`` names the earlier episodes, ``ratios`` reads them."""

    def __init__(self, ratios: LogRatios, history: History, least_fit: float) -> None:
        self._ratios, self._history, self._least_fit = ratios, history, least_fit
        self._sums: OrderedDict[tuple[str, EpisodeId], float | None] = OrderedDict()

    def answer(self, episode: Episode, value: float) -> Answer | None:
        """None where it abstains."""
        found = self._line(episode.id)
        if found is None or found.beta <= 0.0 or found.fit < self._least_fit:
            return None
        ratios = self._ratios.of(episode)
        if ratios is None:
            return None
        expected = found.intercept + found.beta * np.concatenate(([0.0], np.cumsum(ratios)))  # (S + 1,)
        why = [f"log pi / pi_ref {r:+.2f} nats, beta {found.beta:.3f}, R² {found.fit:.2f}" for r in ratios]
        return Answer(_METHOD, [float(c) for c in share_rest(carried(expected), value)], why)

    def _line(self, but: EpisodeId) -> Line | None:
        known = [(self._sum(i), v) for i, v in self._history.newest(WINDOW, but=but)]
        pairs = [(total, v) for total, v in known if total is not None]
        if len(pairs) < FEWEST:
            return None
        sums, values = np.array(pairs).T
        return line(sums, values)

    def _sum(self, episode_id: EpisodeId) -> float | None:
        key = (self._ratios.version(), episode_id)
        if key not in self._sums:
            ratios = self._ratios.of(self._history.episode(episode_id))
            self._sums[key] = None if ratios is None else float(sum(ratios))
            while len(self._sums) > 2 * WINDOW:
                self._sums.popitem(last=False)
        return self._sums[key]
