"""Measures that are watched for a change, over all requests and for each skill, with one bound for all of them.

``alarm`` is shared out: half of it over all requests, half over skills, and by each measure's weight, so that whatever
is watched, a false alarm of any comes once in ``alarm`` units at most (see ``stats.change``). Knows no store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gradatim.config import DriftConfig
from gradatim.skills import UNNAMED
from gradatim.stats.change import Changes
from gradatim.stats.daily import Daily

LEVELS = 0.01  # chance that the bounds of any level are wrong, of all series together


@dataclass(frozen=True, slots=True)
class Shift:
    """A change that was found. ``skill`` is empty where it is of all requests."""

    family: str
    skill: str
    rose: bool
    since: float  # Unix seconds: when the first unit of the change was served
    before: float
    after: float


class Series:
    """``families``: by name, how many measures it has and what share of all alarms is theirs. A family is one thing to
    a person, and has one alarm."""

    def __init__(self, families: Mapping[str, tuple[int, float]], config: DriftConfig) -> None:
        self._families = [name for name, (count, _) in families.items() for _ in range(count)]
        weights = np.array([share / count for count, share in families.values() for _ in range(count)])  # (M,)
        self._skills: list[str] = []
        self._most = config.skills
        scopes = np.full(1 + self._most, 0.5 / max(1, self._most))
        scopes[0] = 0.5 if self._most else 1.0
        shares = scopes[:, None] * weights  # (1 + skills, M)
        self._changes = Changes(
            shares.shape, 2.0 * config.alarm / shares, alpha=LEVELS * shares, tolerance=config.tolerance
        )
        self._daily = Daily((len(weights),), config.season_s)

    def see(self, values: ArrayLike, skill: str, at: float) -> list[Shift]:
        """The next unit: (M,) its measures in [0, 1], NaN where there is none."""
        y = np.asarray(values, dtype=np.float64)
        course, known = self._daily.predict(at), self._daily.is_known(at)
        rows = np.array([0, *self._rows_of(skill)])
        signs = self._changes.update(rows, np.broadcast_to(y, (len(rows), len(y))), course, at=at, watched=known)
        self._daily.update(y, at)
        return [self._shift(int(row), found) for row, found in zip(rows, signs, strict=True) if found.any()]

    def _rows_of(self, skill: str) -> Sequence[int]:
        if skill == UNNAMED or not skill:
            return ()
        if skill not in self._skills and len(self._skills) < self._most:
            self._skills.append(skill)
        return (1 + self._skills.index(skill),) if skill in self._skills else ()

    def _shift(self, row: int, signs: Any) -> Shift:
        """Of the first measure that was found to have changed; its family begins anew."""
        measure = int(np.flatnonzero(signs)[0])
        family = self._families[measure]
        before, after = self._changes.moved((row, measure))
        since = self._changes.began((row, measure))
        for other in [m for m, name in enumerate(self._families) if name == family]:
            if row == 0 and other == measure:
                self._daily.shift(other, after - before)
            self._changes.forget((row, other))
        skill = self._skills[row - 1] if row else ""
        return Shift(family, skill, bool(signs[measure] > 0), since, before, after)

    def state(self) -> dict[str, Any]:
        return {"skills": self._skills, "changes": arrays(self._changes), "daily": arrays(self._daily)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """ValueError, KeyError or TypeError for what is not a state of such series."""
        put_back(self._changes, state["changes"])
        put_back(self._daily, state["daily"])
        self._skills = list(state["skills"])


def arrays(of: Any) -> dict[str, Any]:
    """The state of a statistic, as JSON has it; exact."""
    return {name: getattr(of, name).tolist() for name in of.STATE}


def put_back(into: Any, state: Mapping[str, Any]) -> None:
    for name in into.STATE:
        value = np.array(state[name], dtype=np.float64)
        if value.shape != getattr(into, name).shape:
            raise ValueError(f"{name} has another shape: {value.shape}")
        setattr(into, name, value)
