"""Calibration: the inductive Venn-Abers predictor (arXiv:1511.00213), and the expected calibration error.

A Venn-Abers predictor fits isotonic regression twice for each new score, with the score's label taken for 0 and for
1; one of the two probabilities it gives is calibrated, whatever the distribution. Knows only scores and labels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


Block = tuple[float, float]  # (sum, weight) of scores that share one value


def _stacks(mean: Floats, count: Floats, sign: float) -> list[tuple[Block, ...]]:
    """The pooled blocks of every prefix, nearest last; ``sign`` -1 for a sequence that must not rise."""
    stack: list[Block] = []
    out: list[tuple[Block, ...]] = [()]
    for value, mass in zip(mean.tolist(), count.tolist(), strict=True):
        total = value * mass
        while stack and sign * stack[-1][0] * mass >= sign * total * stack[-1][1]:
            total, mass = total + stack[-1][0], mass + stack[-1][1]
            stack.pop()
        stack.append((total, mass))
        out.append(tuple(stack))
    return out


def _between(total: float, mass: float, left: tuple[Block, ...], right: tuple[Block, ...]) -> float:
    """The value of one block after it was pooled with those to its left that are not lower, and to its right that are
    not higher; each stack is isotonic by itself."""
    i, j = len(left) - 1, len(right) - 1
    while True:
        if i >= 0 and left[i][0] * mass >= total * left[i][1]:
            total, mass, i = total + left[i][0], mass + left[i][1], i - 1
        elif j >= 0 and right[j][0] * mass <= total * right[j][1]:
            total, mass, j = total + right[j][0], mass + right[j][1], j - 1
        else:
            return total / mass


class VennAbers:
    """Made from calibration scores (N,) and labels (N,) in {0, 1}; N of at least 1.

    Between two neighbouring calibration scores the answer does not change, so both fits are made once for each gap
    and each distinct score, from the pooled blocks to its left and right; a prediction is a binary search.
    """

    def __init__(self, scores: Floats, labels: Floats) -> None:
        self._scores, index = np.unique(scores, return_inverse=True)  # (U,)
        count = np.bincount(index).astype(np.float64)
        good = np.bincount(index, weights=labels)
        left = _stacks(good / count, count, 1.0)
        right = _stacks((good / count)[::-1], count[::-1], -1.0)[::-1]
        self._at = np.array(  # (U, 2): a new score equal to the i-th
            [
                [_between(good[i] + y, count[i] + 1.0, left[i], right[i + 1]) for y in (0.0, 1.0)]
                for i in range(len(count))
            ]
        )
        self._gap = np.array(  # (U + 1, 2): one between the (i-1)-th and the i-th
            [[_between(y, 1.0, left[i], right[i]) for y in (0.0, 1.0)] for i in range(len(count) + 1)]
        )

    def interval(self, scores: Floats) -> tuple[Floats, Floats]:
        """((M,), (M,)): the probability of 1 if the new label were 0, and if it were 1."""
        left = np.searchsorted(self._scores, scores, side="left")
        same = (left < len(self._scores)) & (self._scores[np.minimum(left, len(self._scores) - 1)] == scores)
        pair = np.where(same[:, None], self._at[np.minimum(left, len(self._scores) - 1)], self._gap[left])  # (M, 2)
        return pair[:, 0], pair[:, 1]

    def probability(self, scores: Floats) -> Floats:
        """(M,) one probability: p1 / (1 - p0 + p1), which minimises the regret in log-loss (section 4)."""
        low, high = self.interval(scores)
        out: Floats = high / (1.0 - low + high)
        return out


def expected_calibration_error(probability: Floats, labels: Floats, *, bins: int = 15) -> float:
    """Mean distance of the predicted from the observed share of 1, over bins of equal size (the last ones may be one
    smaller). 0 for no data."""
    if len(probability) == 0:
        return 0.0
    order = np.argsort(probability, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, len(order))) if len(part)]
    gaps = [abs(float(probability[part].mean() - labels[part].mean())) * len(part) for part in parts]
    return sum(gaps) / len(order)
