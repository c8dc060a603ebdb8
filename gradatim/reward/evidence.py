"""What was said of one episode, as the learned reward sees it: one opinion a rater, its traits, its audited label.

A rater is a source; of sources that speak for many people (``human``, ``implicit``) it is the source together with the
user of the episode, so that every user has a reliability of their own. Whatever a rater says of one episode, and
however often, is one opinion. Knows neither the store nor how opinions are weighed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gradatim.types import EpisodeId, Feedback, Step

FAMILIES = ("human", "critic", "judge", "implicit", "other", "model")
_OF_USERS = ("human", "implicit")


@dataclass(frozen=True, slots=True)
class Opinion:
    """``value`` in [-1, 1]: the mean of what the rater said; ``weight`` in (0, 1]: how sure it was."""

    rater: str
    family: str
    value: float
    weight: float


@dataclass(frozen=True, slots=True)
class Judged:
    """One episode. ``label``: 1 good, 0 bad, where an audited source said so."""

    episode_id: EpisodeId
    opinions: tuple[Opinion, ...]  # sorted by rater
    log_length: float  # of the natural log of one plus the tokens answered
    label: int | None = None


def family_of(source: str) -> str:
    family = source.partition(":")[0]
    return family if family in FAMILIES else "other"


def rater_of(feedback: Feedback, user: str) -> str:
    of_users = user and family_of(feedback.source) in _OF_USERS
    return f"{feedback.source}|{user}" if of_users else feedback.source


def is_audited(feedback: Feedback, audited: Sequence[str]) -> bool:
    """An outcome, true or false, from a source that one of the patterns names (``human:audit*``)."""
    return feedback.kind == "outcome" and any(fnmatchcase(feedback.source, pattern) for pattern in audited)


def label_of(feedback: Iterable[Feedback], audited: Sequence[str]) -> int | None:
    """1 good, 0 bad; None where no audited source spoke, or they contradict each other."""
    said = {f.value > 0 for f in feedback if is_audited(f, audited) and f.value}
    return int(said.pop()) if len(said) == 1 else None


def evidence(
    episode_id: EpisodeId, steps: Sequence[Step], feedback: Sequence[Feedback], audited: Sequence[str]
) -> Judged:
    """``feedback``: the newest revision of each, none of them retracted. Opinions on the episode, or, of a rater who
    gave none, on its steps."""
    user = next((step.user for step in reversed(steps) if step.user), "")
    whole: dict[str, list[Feedback]] = defaultdict(list)
    parts: dict[str, list[Feedback]] = defaultdict(list)
    for f in feedback:
        if f.kind in ("score", "outcome") and f.value is not None and not is_audited(f, audited):
            (whole if f.step_id is None or f.kind == "outcome" else parts)[rater_of(f, user)].append(f)
    tokens = sum(len(step.completion_ids) for step in steps)
    return Judged(
        episode_id,
        tuple(_opinion(rater, whole.get(rater) or parts[rater]) for rater in sorted({*whole, *parts})),
        math.log1p(tokens),
        label_of(feedback, audited),
    )


def _opinion(rater: str, said: Sequence[Feedback]) -> Opinion:
    values = [f.value for f in said if f.value is not None]
    value = math.fsum(values) / len(values)
    sure = math.fsum(f.confidence or 1.0 for f in said) / len(said)
    return Opinion(rater, family_of(said[0].source), value, sure)
