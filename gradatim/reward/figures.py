"""How well the reward does, in figures: what audited labels said afterwards, and how reliable each source is.

Knows neither the store nor how anything is decided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gradatim.reward.aggregate import Combiner
from gradatim.reward.evidence import FAMILIES, Judged
from gradatim.stats.venn_abers import expected_calibration_error

SHOWN = 20  # sources, those that audited labels say most of


@dataclass(frozen=True, slots=True)
class Audit:
    """An audited label, and what had been said of its episode before: P(good), or None for an abstention."""

    good: float | None
    label: int


def realised(audits: Sequence[Audit]) -> dict[str, float | int | None]:
    """Of the newest audited labels: how many episodes had been left unjudged, and how wrong the others were."""
    judged = [audit for audit in audits if audit.good is not None]
    good = np.array([audit.good for audit in judged], dtype=np.float64)
    labels = np.array([audit.label for audit in judged], dtype=np.float64)
    wrong = (good > 0.5) != (labels > 0.5)
    return {
        "window_labels": len(audits),
        "window_coverage": len(judged) / len(audits) if audits else None,
        "window_selective_risk": float(wrong.mean()) if judged else None,
        "window_ece": expected_calibration_error(good, labels) if judged else None,
    }


@dataclass(frozen=True, slots=True)
class Reliability:
    """``right``: of the opinions that are not unsure, the share that is right, as far as labels and agreement tell;
    ``independence``: what a vote counts, below 1 where the source errs together with others. Means over a source's
    raters, by their opinions."""

    source: str
    family: str
    opinions: int
    audited: int
    right: float
    independence: float


def reliabilities(combiner: Combiner, rows: Sequence[Judged]) -> list[Reliability]:
    """The best known sources first; users of one source are taken together."""
    opinions = Counter(o.rater for row in rows for o in row.opinions)
    audited = Counter(o.rater for row in rows if row.label is not None for o in row.opinions)
    raters: dict[str, list[str]] = {}
    family: dict[str, str] = {}
    for o in (o for row in rows for o in row.opinions if o.rater in combiner.raters):
        family[o.rater.partition("|")[0]] = o.family
    for rater in sorted(combiner.raters.keys() & opinions.keys()):
        raters.setdefault(rater.partition("|")[0], []).append(rater)
    right = _right(combiner)
    out = []
    for source, members in raters.items():
        index = [combiner.raters[rater] for rater in members]
        share = np.array([float(opinions[rater]) for rater in members])
        out.append(
            Reliability(
                source,
                family[source],
                int(share.sum()),
                sum(audited[rater] for rater in members),
                float(np.average(right[index], weights=share)),
                float(np.average(combiner.weight[index], weights=share)),
            )
        )
    return sorted(out, key=lambda r: (-r.audited, -r.opinions, r.source))


def _right(combiner: Combiner) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(J,) P(vote is right | it is not unsure) of each rater, by Dawid-Skene's tables (J, 2, C)."""
    good, table = combiner.model.prior, combiner.model.confusion
    right = good * table[:, 1, -1] + (1.0 - good) * table[:, 0, 0]
    wrong = good * table[:, 1, 0] + (1.0 - good) * table[:, 0, -1]
    out: np.ndarray[Any, np.dtype[np.float64]] = right / (right + wrong)
    return out


def by_source(found: Sequence[Reliability]) -> list[dict[str, Any]]:
    """As plain values, the first ones."""
    return [asdict(r) for r in found[:SHOWN]]


def by_family(found: Sequence[Reliability]) -> Mapping[str, dict[str, float]]:
    """The mean of each family's sources, by their opinions."""
    out = {}
    for name in FAMILIES:
        members = [r for r in found if r.family == name]
        if members:
            opinions = sum(r.opinions for r in members)
            out[name] = {"right": sum(r.right * r.opinions for r in members) / opinions, "opinions": float(opinions)}
    return out
