"""The loosest threshold whose error rate is below a stated risk at a stated confidence (Learn then Test, 2110.01052).

For each threshold t of a fixed grid, from the strictest to the loosest, the hypothesis "the error rate among what
scores t or more exceeds the risk" is tested on held-out labels by the exact binomial p-value

    P(Bin(n_t, risk) <= errors_t)

and the walk stops at the first that is not rejected (fixed-sequence testing, section 3 there). It begins not at the
strictest one, which few labels reach, but where the scorer's own expectation of its errors promises the smallest
p-value: that looks at scores, never at labels. The scorer must not have seen these labels. And, for afterwards, the
evidence that the risk is no longer kept. Knows no reward and no record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import betainc, betaln
from scipy.stats import binom

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Threshold:
    """``value``: None where no threshold keeps the risk. ``kept`` of ``labels`` scored it or more, ``errors`` of those
    were wrong."""

    value: float | None
    labels: int
    kept: int = 0
    errors: int = 0


def fewest(risk: float, level: float) -> int:
    """How many labels without any error it takes to reject at that level: (1 - risk)^n <= level."""
    return math.ceil(math.log(level) / math.log1p(-risk))


def choose(
    scores: Floats, wrong: Floats, expected: Floats, *, grid: Sequence[float], risk: float, confidence: float
) -> Threshold:
    """``scores`` (N,): higher is surer; ``wrong`` (N,) in {0, 1}; ``expected`` (N,) in [0, 1]: the chance of being
    wrong, as the scorer sees it. Neither ``grid`` nor ``expected`` may depend on ``wrong``; where ``expected`` is off,
    a good threshold may be missed, and the guarantee stands."""
    level = 1.0 - confidence
    descending = sorted(grid, reverse=True)
    above = scores[None, :] >= np.array(descending)[:, None]  # (G, N)
    kept, errors, hoped = above.sum(axis=1), above @ wrong, above @ expected
    possible = kept >= fewest(risk, level)
    if not possible.any():
        return Threshold(None, len(scores))
    promised = binom.cdf(hoped, np.maximum(kept, 1), risk)
    start = int(np.argmin(np.where(possible, promised, 2.0)))
    rejected = binom.cdf(errors, np.maximum(kept, 1), risk) <= level
    last = start
    while last < len(descending) and rejected[last]:
        last += 1
    if last == start:
        return Threshold(None, len(scores))
    return Threshold(float(descending[last - 1]), len(scores), int(kept[last - 1]), int(errors[last - 1]))


def log_evidence(errors: int, n: int, risk: float) -> float:
    """Log of an e-process against "the error rate is at most ``risk``": by Ville's inequality it exceeds log(1/a) with
    a chance of at most a however often it is looked at.

    A mixture of likelihood ratios over rates q uniform on (risk, 1): ∫ q^e (1-q)^(n-e) dq / (1-risk), over
    risk^e (1-risk)^(n-e).
    """
    a, b = errors + 1.0, n - errors + 1.0
    tail = float(betainc(b, a, 1.0 - risk))  # the mass of Beta(a, b) above risk, without cancellation
    if tail <= 0.0:
        return -math.inf
    mixture = float(betaln(a, b)) + math.log(tail) - math.log1p(-risk)
    return mixture - errors * math.log(risk) - (n - errors) * math.log1p(-risk)
