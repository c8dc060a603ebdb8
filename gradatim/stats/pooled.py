"""An e-value for the mean of independent differences of unlike kinds, such as the cases of several skills.

For D_i in [-1, 1] with means mu_i, H0: sum mu_i <= 0, and a bet lambda in [0, 1) that is fixed beforehand,
E prod (1 + lambda D_i) = prod (1 + lambda mu_i) <= (1 + lambda mean(mu))^n <= 1 by independence and the inequality of
the means; so by Markov's inequality the mixture over several bets reaches 1 / alpha with a chance of at most alpha, for
any law of the differences and any n (the capital of Waudby-Smith & Ramdas, arXiv:2010.09686, with bets that do not
adapt: adaptive ones would need every mu_i <= 0). It knows no order, and is no e-process over the pooled null.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BETS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # shares of the capital, which is spread over them evenly


def log_e(differences: Sequence[float]) -> float:
    """Of (N,) differences, against H0 that they are not above 0 on average. ValueError for one out of [-1, 1]."""
    d = np.asarray(differences, dtype=np.float64)  # (N,)
    if not (np.abs(d) <= 1.0).all():  # NaN too
        raise ValueError("a difference of two chances lies in [-1, 1]")
    capital = np.log1p(np.outer(BETS, d)).sum(-1)  # (K,) log
    top = capital.max()
    return float(top + np.log(np.exp(capital - top).mean()))
