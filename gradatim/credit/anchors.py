"""Credit from other answers to the same state, over logged traffic (after GiGPO, arXiv:2505.10978, its anchor states).

Of each step it compares how episodes ended that gave this answer there with how those ended that gave another one:

    A_k = w_k (mean value | state, answer  -  mean value | state, another answer) / 2

w_k is the chance that the answer mattered there at all, by a Bayes factor: ends that depend on the answer, with a
Beta prior of weight 1 at the mean of all ends for each, against ends that do not; one of an episode's S steps is
expected to matter, before anything was seen. The dependence is half of the time one of each answer, half of the time
one of this answer against all others. GiGPO's own advantage is of one episode against its group; here, with every
answer logged, episodes that answered alike stand together, which averages out what was decided elsewhere. Does not
keep the sum. Knows no tokens and no store.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import betaln

from gradatim.credit.answer import Answer
from gradatim.credit.history import Lived

Floats = npt.NDArray[np.float64]
Seen = dict[int, dict[int, list[float]]]  # state -> answer -> values of the episodes, one each
_UNLIKELY = 0.05  # a step that mattered with less than this chance is taken for one that did not


class _Ends(NamedTuple):
    """How episodes ended that answered so, and those that answered otherwise."""

    same: Sequence[float]
    other: Sequence[float]

    @property
    def difference(self) -> float:
        """Each mean with one more end, at the mean of all."""
        pooled = (sum(self.same) + sum(self.other)) / (len(self.same) + len(self.other))
        same, other = ((sum(v) + pooled) / (len(v) + 1) for v in self)
        return (same - other) / 2.0


def contrast(
    this: Lived, states: Sequence[int], past: Sequence[tuple[Lived, Sequence[int]]], method: str = "anchor"
) -> Answer | None:
    """None where nobody ever answered otherwise.

    ``states`` (S,) are this episode's, under the key that the states of ``past`` have too.
    """
    seen = _table([*past, (this, states)], set(states))
    ends = [_split(seen[s], a) for s, a in zip(states, this.actions, strict=True)]
    if not any(e.other for e in ends):
        return None
    log_odds = np.array([_log_bayes_factor(seen[s], e) for s, e in zip(states, ends, strict=True)]) - np.log(len(ends))
    mattered = 1.0 / (1.0 + np.exp(-np.clip(log_odds, -50.0, 50.0)))  # (S,)
    mattered[mattered < _UNLIKELY] = 0.0
    sure = float(1.0 - np.prod(1.0 - mattered))
    if sure == 0.0:
        return None
    shares = [float(w) * e.difference / sure if w else 0.0 for w, e in zip(mattered, ends, strict=True)]
    return Answer(method, shares, [_why(float(w), e) for w, e in zip(mattered, ends, strict=True)], sure)


def _table(episodes: Sequence[tuple[Lived, Sequence[int]]], among: set[int]) -> Seen:
    """An episode counts once for each answer that it gave to a state."""
    seen: Seen = defaultdict(lambda: defaultdict(list))
    for lived, states in episodes:
        for s, a in {(s, a) for s, a in zip(states, lived.actions, strict=True) if s in among}:
            seen[s][a].append(lived.value)
    return seen


def _split(answers: dict[int, list[float]], action: int) -> _Ends:
    return _Ends(answers[action], [value for a, values in answers.items() if a != action for value in values])


def _log_bayes_factor(answers: dict[int, list[float]], ends: _Ends) -> float:
    """Of ends that depend on the answer against ends that do not; 0 where each answer was given once, and no evidence
    at all where nobody answered otherwise."""
    if not ends.other:
        return -np.inf
    by_answer = np.array([_count(values) for values in answers.values()])  # (A, 2) good and bad ends
    apart = np.array([_count(ends.same), _count(ends.other)])
    good, bad = apart.sum(axis=0)
    mean = (good + 0.5) / (good + bad + 1.0)
    alone = good * np.log(mean) + bad * np.log1p(-mean)
    return float(np.logaddexp(_dependent(by_answer, mean), _dependent(apart, mean)) - np.log(2.0) - alone)


def _count(values: Sequence[float]) -> tuple[float, float]:
    good = sum(v > 0 for v in values)
    return float(good), float(len(values) - good)


def _dependent(counts: Floats, mean: float) -> float:
    """log of the chance of these ends, each row with a chance of its own from Beta(mean, 1 - mean)."""
    own = betaln(counts[:, 0] + mean, counts[:, 1] + 1.0 - mean)
    return float((own - betaln(mean, 1.0 - mean)).sum())


def _why(mattered: float, ends: _Ends) -> str:
    if not mattered:
        return "no sign that the answer mattered here"
    good, others = (sum(v > 0 for v in values) for values in ends)
    told = f"{good} of {len(ends.same)} that answered so ended well, {others} of {len(ends.other)} others"
    return f"{told}; it mattered with a chance of {mattered:.2f}"
