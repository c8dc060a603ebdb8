"""Credit from other answers to the same state, over logged traffic (after GiGPO, arXiv:2505.10978, its anchor states).

Of each step it compares how episodes ended that gave this answer there with how those ended that gave another one:

    A_k = (mean value | state, answer  -  mean value | state, another answer) / 2

and believes it where Fisher's exact test on good and bad ends does (over all steps of an episode, a chance of 1 % to
be fooled at all). GiGPO's own advantage is of one episode against its group; here, with every answer logged, episodes
that answered alike stand together, which averages out what was decided elsewhere. Knows no tokens and no store.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from scipy.stats import hypergeom

from gradatim.credit.history import Lived

_FOOLED = 0.01  # chance, over one episode
Seen = dict[int, dict[int, list[float]]]  # state -> answer -> values of the episodes, one each


def contrast(this: Lived, states: Sequence[int], past: Sequence[tuple[Lived, Sequence[int]]]) -> list[float] | None:
    """(S,) in [-1, 1], 0 where nothing is known; None where that is so of every step.

    ``states`` (S,) are this episode's, under the key that the states of ``past`` have too.
    """
    seen = _table([*past, (this, states)], set(states))
    pairs = [_split(seen[s], a) for s, a in zip(states, this.actions, strict=True)]
    same_n, same_good, other_n, other_good = (np.array(x) for x in zip(*(_counts(*p) for p in pairs), strict=True))
    ends = (same_n + other_n, same_good + other_good, same_n)
    p_value = 2.0 * np.minimum(hypergeom.sf(same_good - 1, *ends), hypergeom.cdf(same_good, *ends))
    believed = (other_n > 0) & (p_value <= _FOOLED / len(states))
    if not believed.any():
        return None
    return [_difference(*pair) if b else 0.0 for pair, b in zip(pairs, believed, strict=True)]


def _table(episodes: Sequence[tuple[Lived, Sequence[int]]], among: set[int]) -> Seen:
    """An episode counts once for each answer that it gave to a state."""
    seen: Seen = defaultdict(lambda: defaultdict(list))
    for lived, states in episodes:
        for s, a in {(s, a) for s, a in zip(states, lived.actions, strict=True) if s in among}:
            seen[s][a].append(lived.value)
    return seen


def _split(answers: dict[int, list[float]], action: int) -> tuple[list[float], list[float]]:
    """How episodes ended that answered so, and those that answered otherwise."""
    return answers[action], [value for a, values in answers.items() if a != action for value in values]


def _counts(same: Sequence[float], other: Sequence[float]) -> tuple[int, int, int, int]:
    return len(same), sum(v > 0 for v in same), len(other), sum(v > 0 for v in other)


def _difference(same: Sequence[float], other: Sequence[float]) -> float:
    return (sum(same) / len(same) - sum(other) / len(other)) / 2.0
