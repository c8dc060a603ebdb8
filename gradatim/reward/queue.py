"""Which episodes to audit next: those whose label would help most, and, for the held-out half, any of them.

In the half that is fitted to, the most useful label is on an episode that the model is unsure of and whose sources
were seldom compared with the truth. In the held-out half the order is that of a digest, which is to say none: labels
chosen for being hard would make the risk look greater than it is. The two take turns. Knows no command line.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from gradatim.protocols import Store
from gradatim.reward.audited import AuditedReward
from gradatim.reward.calibrate import is_held_out
from gradatim.reward.evidence import Judged
from gradatim.types import EpisodeId, Feedback, Step

RECENT_STEPS = 1000  # among which episodes without feedback are looked for


@dataclass(frozen=True, slots=True)
class Wanted:
    """``good``: P(good) as far as it is known."""

    episode_id: EpisodeId
    good: float
    why: str


def queue(model: AuditedReward, limit: int) -> list[Wanted]:
    """The episodes to audit, the first first. ``model.follow`` must have been called."""
    rows = model.rows()
    open_rows = [row for row in rows if row.label is None and row.opinions]
    compared = Counter(o.rater for row in rows if row.label is not None for o in row.opinions)
    good = dict(zip((row.episode_id for row in open_rows), _probabilities(model, open_rows), strict=True))
    fitted = [row for row in open_rows if not is_held_out(row.episode_id)]
    fitted.sort(key=lambda row: (-_use(row, good[row.episode_id], compared), row.episode_id))
    held = sorted((r for r in open_rows if is_held_out(r.episode_id)), key=lambda row: _shuffled(row.episode_id))
    unsure = [Wanted(r.episode_id, good[r.episode_id], "its sources are unsure, or seldom audited") for r in fitted]
    anyone = [Wanted(r.episode_id, good[r.episode_id], "drawn at random, to measure the risk") for r in held]
    return in_turns(unsure, anyone)[:limit]


def unheard(store: Store, limit: int) -> list[Wanted]:
    """Recent episodes that nobody said anything of, in no order: what the model's states alone tell of such ones can
    only be learned from labels on them."""
    recent = {step.episode_id for _, step in store.newest(Step, limit=RECENT_STEPS)}
    silent = [e for e in sorted(recent, key=_shuffled) if not store.newest(Feedback, episode_id=e)]
    return [Wanted(e, 0.5, "drawn at random of those that nobody spoke of") for e in silent[:limit]]


def in_turns(*lists: Sequence[Wanted]) -> list[Wanted]:
    """One of each, and again."""
    return [wanted for wanted in chain.from_iterable(zip_longest(*lists)) if wanted is not None]


def _probabilities(model: AuditedReward, rows: Sequence[Judged]) -> list[float]:
    if model.model is not None and rows:
        return [float(p) for p in model.model.judge(rows)[0]]
    return [(1.0 + math.fsum(o.value for o in row.opinions) / len(row.opinions)) / 2.0 for row in rows]


def _use(row: Judged, good: float, compared: Counter[str]) -> float:
    """How little is known: bits of uncertainty, more of them where the raters were seldom audited."""
    p = min(max(good, 1e-6), 1.0 - 1e-6)
    bits = -(p * math.log2(p) + (1.0 - p) * math.log2(1.0 - p))
    unknown = sum(1.0 / (1.0 + compared[o.rater]) for o in row.opinions) / len(row.opinions)
    return (0.1 + bits) * (1.0 + unknown)


def _shuffled(episode_id: str) -> str:
    return hashlib.sha256(f"queue {episode_id}".encode("utf-8", "surrogatepass")).hexdigest()
