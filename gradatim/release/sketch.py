"""A prompt as 17 numbers in [0, 1], cheap enough for every request: its length, and 16 projections of its tokens.

The square roots of the tokens' shares are a vector of length 1 (their distances are Hellinger's); each projection adds
them up with signs that a hash of the token gives (Achlioptas 2003, Database-friendly random projections). Prompts of
another kind move the mean of some of them. Knows no words and no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradatim.stats.contrast import Floats

PROJECTIONS = 16
_LONGEST = 1024  # tokens that are looked at, from the end


def log_length(tokens: int) -> float:
    """In [0, 1]: twice as long is 1/16 more, 65,535 tokens are 1."""
    return min(1.0, math.log2(1.0 + tokens) / 16.0)


def length_of(value: float) -> int:
    """The tokens of a ``log_length``."""
    return round(math.exp2(16.0 * value) - 1.0)


def sketch(prompt_ids: Sequence[int]) -> Floats:
    """(1 + PROJECTIONS,)."""
    out = np.full(1 + PROJECTIONS, 0.5)
    out[0] = log_length(len(prompt_ids))
    if prompt_ids:
        tokens, counts = np.unique(np.array(prompt_ids[-_LONGEST:], dtype=np.uint64), return_counts=True)
        bits = (_mixed(tokens)[:, None] >> np.arange(PROJECTIONS, dtype=np.uint64)) & np.uint64(1)  # (U, K)
        projected = np.sqrt(counts / counts.sum()) @ (1.0 - 2.0 * bits)  # (K,), each about N(0, 1) over hashes
        out[1:] = 0.5 + 0.5 * np.tanh(0.5 * projected)
    return out


def _mixed(x: np.typing.NDArray[np.uint64]) -> np.typing.NDArray[np.uint64]:
    """splitmix64 (Steele, Lea & Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
