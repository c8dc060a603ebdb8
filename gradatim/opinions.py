"""How much an opinion counts, the weighted mean of several, and which need no reward. Knows nothing of training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import fsum

from gradatim.config import RewardConfig
from gradatim.types import Case, Feedback, Step

_OWN = ("correction", "preference", "comment")  # kinds that say of one step what is right, whatever came of the episode


def on_own_steps(case: Case) -> Case:
    """What is left to learn from where the reward abstained: nothing that an outcome or a score says."""
    return replace(case, feedback=tuple(f for f in case.feedback if f.kind in _OWN))


def newest(feedback: Iterable[Feedback], kind: str, step: Step) -> Feedback | None:
    """The last word of that kind on a step."""
    found = [f for f in feedback if f.kind == kind and f.step_id == step.id]
    return max(found, key=lambda f: f.created_at, default=None)


def is_confirmed(step: Step, correction: Feedback) -> bool:
    """Whether what is given as the better answer is the answer."""
    return correction.correction.strip() == step.text.strip()


def is_held_out(feedback: Feedback, config: RewardConfig) -> bool:
    """From a source that is kept for judging."""
    return any(fnmatchcase(feedback.source, pattern) for pattern in config.held_out)


def without_held_out(case: Case, config: RewardConfig) -> Case:
    """What may be learned from."""
    if not config.held_out:
        return case
    return replace(case, feedback=tuple(f for f in case.feedback if not is_held_out(f, config)))


def weight(feedback: Feedback, config: RewardConfig) -> float:
    """The weight of its family of sources (``human`` of ``human:alice``), times its own confidence."""
    family = feedback.source.partition(":")[0]
    return config.weights.get(family, min(config.weights.values(), default=0.0)) * (feedback.confidence or 1.0)


def weigh(opinions: Iterable[Feedback], config: RewardConfig) -> tuple[float | None, float]:
    """(mean in [-1, 1] or None, total weight) of the opinions with a value; unknown is not rounded to anything.

    What a source says of one thing again and again counts as much as its surest word on it, with the mean of its
    values: a flood weighs no more than one opinion. The order makes no difference.
    """
    said: dict[tuple[str, str, str | None], list[tuple[float, float]]] = {}
    for f in opinions:
        if f.value is not None:
            said.setdefault((f.source, f.kind, f.step_id), []).append((f.value, weight(f, config)))
    once = [(_mean(values), max(w for _, w in values)) for values in said.values()]
    total = fsum(w for _, w in once)
    return (fsum(v * w for v, w in once) / total if total else None), total


def _mean(values: Sequence[tuple[float, float]]) -> float:
    total = fsum(w for _, w in values)
    return fsum(v * w for v, w in values) / total if total else 0.0
