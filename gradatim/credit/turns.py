"""Turn-level generalized advantage estimation (Schulman 2016, arXiv:1506.02438, eq. 16; a turn is a step here).

    delta_k = r_k + V(s_{k+1}) - V(s_k),    A_k = Σ_l lambda^l delta_{k+l},

undiscounted, the reward R at the end: r_k = 0 and V(s_S) = R. V is a scorer of prefixes. A step is credited with what
came after it too, the less the later it came; lambda 0 is the difference of the next two values alone (which sums to
R - V(s_0)), lambda 1 is R - V(s_k). The sum is not kept. Knows no episodes.
"""

from __future__ import annotations

from collections.abc import Sequence


def advantages(values: Sequence[float], reward: float, lam: float) -> list[float]:
    """(S,) not clipped. ``values`` (S + 1,): V after 0, 1, ..., S steps; the last one gives way to the reward."""
    ahead = [*values[1:-1], reward]
    out = [0.0] * len(ahead)
    following = 0.0
    for k in reversed(range(len(ahead))):
        following = ahead[k] - values[k] + lam * following
        out[k] = following
    return out
