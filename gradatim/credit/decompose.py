"""Credit from a scorer of prefixes: what each step changed of the expected end (RUDDER, arXiv:1806.07857).

    d_k = g(steps 0..k) - g(steps 0..k-1),    a_k = c_k d_k + (R - g(all)) / S

so that an episode's credit sums to its reward R: what was expected before the first step, g(nothing), is carried by the
steps that moved the expectation to the side where it ended (c_k, else 1), what stays unexplained by all alike.

The scorer g is linear in events, of those few that go with the reward, and is fitted to every prefix of earlier
episodes: a late event that an early one foretells is so left with nothing to explain. An event that has not happened
yet counts as the chance that it still will, by what earlier episodes did from the same step on: what was not done is
so dated too, by when it could have been. It abstains where it explains too little of episodes it was not fitted to.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
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
_FOLDS = 5
_MOST_CARRIED = 3.0  # times its own difference that a step carries; more would be made of next to nothing


@dataclass(frozen=True, slots=True)
class Events:
    """Those that the scorer looks at. ``hopes`` (K + 1, columns): the chance that one still happens which has not in
    the first k steps; what is longer than K steps has the chances of K."""

    columns: dict[int, int]  # event -> column
    hopes: Floats

    def design(self, episode: Lived) -> Floats:
        """(S + 1, 1 + columns): a one, and of each event the chance that it is part of the episode."""
        steps = len(episode.events)
        out = np.ones((steps + 1, len(self.columns) + 1))
        out[:, 1:] = self.hopes[np.minimum(np.arange(steps + 1), len(self.hopes) - 1)]
        out[-1, 1:] = 0.0  # it is over
        for event, at in _first_times(episode, self.columns).items():
            out[at:, 1 + self.columns[event]] = 1.0
        return out


@dataclass(frozen=True, slots=True)
class PrefixScorer:
    """``fit``: share of the variance of held-out episodes' rewards that it explains at their end."""

    events: Events
    weights: Floats  # (1 + columns,), the first is the intercept
    fit: float

    def prefixes(self, episode: Lived) -> Floats:
        """(S + 1,) the expected reward after 0, 1, ..., S steps."""
        out: Floats = self.events.design(episode) @ self.weights
        return out

    def credit(self, episode: Lived) -> list[float]:
        """(S,) in [-1, 1], with the sum of its reward."""
        return [float(c) for c in share_rest(carried(self.prefixes(episode)), episode.value)]


def carried(expected: Floats) -> Floats:
    """(S,) differences of (S + 1,) expectations, so stretched on the side of the last one that they sum to it, as far
    as ``_MOST_CARRIED`` lets them. No sign changes."""
    differences: Floats = np.diff(expected)
    toward = differences > 0.0 if expected[-1] > 0.0 else differences < 0.0
    mass = float(np.abs(differences[toward]).sum())
    if mass == 0.0:
        return differences
    wanted = abs(float(expected[-1])) + float(np.abs(differences[~toward]).sum())
    return np.where(toward, differences * min(wanted / mass, _MOST_CARRIED), differences)


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
    events = _events(past)
    if not events.columns:
        return None
    return PrefixScorer(events, _regress(past, events), _held_out_fit(past))


def _events(past: Sequence[Lived]) -> Events:
    columns = _screen(past)
    return Events(columns, _hopes(past, columns))


def _held_out_fit(past: Sequence[Lived]) -> float:
    """R² of episodes that are predicted by scorers of the others."""
    wrong = total = 0.0
    mean = sum(e.value for e in past) / len(past)
    for fold in range(_FOLDS):
        fitted = [e for i, e in enumerate(past) if i % _FOLDS != fold]
        events = _events(fitted)
        weights = _regress(fitted, events)
        for episode in past[fold::_FOLDS]:
            wrong += (episode.value - float(events.design(episode)[-1] @ weights)) ** 2
            total += (episode.value - mean) ** 2
    return 1.0 - wrong / total if total else 0.0


def _first_times(episode: Lived, among: Collection[int]) -> dict[int, int]:
    """By event, after how many steps it had happened."""
    out: dict[int, int] = {}
    for k, events in enumerate((episode.given, *episode.events)):
        for event in events:
            if event in among:
                out.setdefault(event, k)
    return out


def _hopes(past: Sequence[Lived], columns: dict[int, int]) -> Floats:
    """(K + 1, columns): of the episodes that go on after k steps and have not seen it, the share that will."""
    longest = max(len(e.events) for e in past)
    running = np.zeros((longest + 1, len(columns)))
    later = np.zeros((longest + 1, len(columns)))
    for episode in past:
        running[: len(episode.events)] += 1.0
        for event, at in _first_times(episode, columns).items():
            running[at : len(episode.events), columns[event]] -= 1.0
            later[:at, columns[event]] += 1.0
    return later / np.maximum(running, 1.0)


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
    return {event: column for column, event in enumerate(best)}


def _regress(past: Sequence[Lived], events: Events) -> Floats:
    """Ridge regression on every prefix; each episode has the same weight."""
    size = len(events.columns) + 1
    gram: npt.NDArray[Any] = np.eye(size) * _RIDGE
    moment = np.zeros(size)
    gram[0, 0] = 1e-9
    for episode in past:
        x = events.design(episode)
        gram += x.T @ x / len(x)
        moment += x.sum(axis=0) * (episode.value / len(x))
    out: Floats = np.linalg.solve(gram, moment)
    return out
