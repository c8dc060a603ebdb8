"""Credit from a scorer of prefixes: what each step changed of the expected end (RUDDER, arXiv:1806.07857).

    a_k = g(steps 0..k) - g(steps 0..k-1) + (R - Σ of these) / S

so that an episode's credit sums to its reward R. The scorer g is linear in which events have happened so far, of those
few that go with the reward, and is fitted to every prefix of earlier episodes: a late event that an early one foretells
is so left with nothing to explain. It abstains where it explains too little of episodes it was not fitted to.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradatim.credit.history import Lived

Floats = npt.NDArray[np.float64]
MOST_EVENTS = 48  # that the scorer looks at
FEWEST = 20  # episodes, below which it does not try
_SUPPORT = 3  # episodes with, and without an event
_RIDGE = 0.3


@dataclass(frozen=True, slots=True)
class PrefixScorer:
    """``fit``: share of the variance of held-out episodes' rewards that it explains at their end."""

    columns: dict[int, int]  # event -> column
    weights: Floats  # (1 + columns,), the first is the intercept
    fit: float

    def prefixes(self, episode: Lived) -> Floats:
        """(S + 1,) the expected reward after 0, 1, ..., S steps."""
        out: Floats = _design(episode, self.columns) @ self.weights
        return out

    def credit(self, episode: Lived) -> list[float]:
        """(S,) in [-1, 1], with the sum of its reward."""
        return [float(c) for c in share_rest(np.diff(self.prefixes(episode)), episode.value)]


def share_rest(credit: Floats, total: float) -> Floats:
    """``credit`` (S,) cut to [-1, 1], and what is missing to ``total`` shared evenly by those that have room for it.
    ``|total|`` must not exceed S."""
    out = np.clip(credit, -1.0, 1.0)
    for _ in range(len(out) + 1):
        rest = total - float(out.sum())
        room = out < 1.0 if rest > 0 else out > -1.0
        if abs(rest) < 1e-12 or not room.any():
            break
        out = np.where(room, np.clip(out + rest / room.sum(), -1.0, 1.0), out)
    return out


def fit(past: Sequence[Lived]) -> PrefixScorer | None:
    """None with too few episodes, or where no event goes with the reward."""
    if len(past) < FEWEST:
        return None
    explained = _held_out_fit(past)
    columns = _screen(past)
    if not columns:
        return None
    return PrefixScorer(columns, _regress(past, columns), explained)


def _held_out_fit(past: Sequence[Lived]) -> float:
    """R² over two halves, each predicted by a scorer of the other."""
    wrong = total = 0.0
    mean = sum(e.value for e in past) / len(past)
    for half in (0, 1):
        fitted, held = past[half::2], past[1 - half :: 2]
        columns = _screen(fitted)
        weights = _regress(fitted, columns)
        for episode in held:
            wrong += (episode.value - float(_design(episode, columns)[-1] @ weights)) ** 2
            total += (episode.value - mean) ** 2
    return 1.0 - wrong / total if total else 0.0


def _screen(past: Sequence[Lived]) -> dict[int, int]:
    """The events whose presence goes with the reward beyond what the best of so many would by chance."""
    present: Counter[int] = Counter()
    weighted: defaultdict[int, float] = defaultdict(float)
    mean = sum(e.value for e in past) / len(past)
    spread = math.sqrt(sum((e.value - mean) ** 2 for e in past) / len(past))
    for episode in past:
        for event in episode.given.union(*episode.events):
            present[event] += 1
            weighted[event] += episode.value - mean
    n = len(past)
    candidates = [e for e, k in present.items() if _SUPPORT <= k <= n - _SUPPORT]
    if not candidates or spread == 0.0:
        return {}
    least = math.sqrt(2.0 * math.log(len(candidates))) + 1.0
    z = {e: abs(weighted[e]) / (spread * math.sqrt(present[e] * (n - present[e]) / n)) for e in candidates}
    best = sorted((e for e in candidates if z[e] > least), key=lambda e: (-z[e], e))[:MOST_EVENTS]
    return {event: column for column, event in enumerate(best, start=1)}


def _design(episode: Lived, columns: dict[int, int]) -> Floats:
    """(S + 1, 1 + columns): which events have happened."""
    out = np.zeros((len(episode.events) + 1, len(columns) + 1))
    out[:, 0] = 1.0
    for k, events in enumerate((episode.given, *episode.events)):
        for event in events:
            if event in columns:
                out[k:, columns[event]] = 1.0
    return out


def _regress(past: Sequence[Lived], columns: dict[int, int]) -> Floats:
    """Ridge regression on every prefix; each episode has the same weight."""
    size = len(columns) + 1
    gram: npt.NDArray[Any] = np.eye(size) * _RIDGE
    moment = np.zeros(size)
    gram[0, 0] = 1e-9
    for episode in past:
        x = _design(episode, columns)
        gram += x.T @ x / len(x)
        moment += x.sum(axis=0) * (episode.value / len(x))
    out: Floats = np.linalg.solve(gram, moment)
    return out
