"""How much an opinion counts, and the weighted mean of several. Knows nothing of episodes, steps or training."""

from __future__ import annotations

from collections.abc import Iterable

from gradatim.config import RewardConfig
from gradatim.types import Feedback


def weight(feedback: Feedback, config: RewardConfig) -> float:
    """The weight of its family of sources (``human`` of ``human:alice``), times its own confidence."""
    family = feedback.source.partition(":")[0]
    return config.weights.get(family, min(config.weights.values(), default=0.0)) * (feedback.confidence or 1.0)


def weigh(opinions: Iterable[Feedback], config: RewardConfig) -> tuple[float | None, float]:
    """(mean in [-1, 1] or None, total weight) of the opinions with a value; unknown is not rounded to anything."""
    rated = [(f.value, weight(f, config)) for f in opinions if f.value is not None]
    total = sum(w for _, w in rated)
    return (sum(v * w for v, w in rated) / total if total else None), total
