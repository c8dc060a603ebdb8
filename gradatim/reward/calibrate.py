"""From a combiner to decisions that keep a stated risk: which half of the labels does what, and what came of it.

Labels of one half of all episodes, drawn by a digest of their ids, are fitted to; those of the other half are held
out, give the threshold (Learn then Test) and, where they are many, the calibration (Venn-Abers). An episode is in its
half before anybody thinks of auditing it, so whoever chooses what to audit in the first half does the second no harm.
Knows neither the store nor what becomes of an abstention.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gradatim.config import RewardConfig
from gradatim.reward import aggregate
from gradatim.reward.aggregate import Combiner
from gradatim.reward.evidence import Judged
from gradatim.stats.learn_then_test import Threshold, choose
from gradatim.stats.logistic import sigmoid
from gradatim.stats.venn_abers import VennAbers, expected_calibration_error

Floats = npt.NDArray[np.float64]

GRID = tuple(0.5 + 0.005 * k for k in range(100))  # of P(the sign is right)
FEWEST_OF_A_KIND = 5  # labels of good, and of bad episodes, in the fitted half
FEWEST_ALIKE = 5  # fitted labels on episodes that just these families of sources spoke of; with fewer, it abstains
VENN_ABERS_FROM = 500  # held-out labels; with fewer, the logistic model's own probability is the better calibrated one


def is_held_out(episode_id: str) -> bool:
    return hashlib.sha256(episode_id.encode("utf-8", "surrogatepass")).digest()[0] % 2 == 1


@dataclass(frozen=True, slots=True)
class Calibrated:
    """``threshold.value`` is in P(the sign is right). ``ece`` is that of held-out labels. ``coverage``: the share of
    the episodes without a label that would get a reward; 0 where no threshold keeps the risk."""

    combiner: Combiner
    threshold: Threshold
    calibrator: VennAbers | None
    labels: int
    ece: float
    coverage: float
    known: frozenset[frozenset[str]]  # which families spoke, on labelled episodes

    def judge(self, rows: Sequence[Judged]) -> tuple[Floats, Floats]:
        """((N,) P(good), (N,) how sure the sign is; what it decides by). The two agree on the sign. Of combinations of
        sources that labels say nothing of, it is not sure at all."""
        raw = sigmoid(self.combiner.logits(rows))
        alike = np.array([_spoke(row) in self.known for row in rows], dtype=bool)
        sure = np.where(alike, np.maximum(raw, 1.0 - raw), 0.0)
        if self.calibrator is None:
            return raw, sure
        p = self.calibrator.probability(raw)
        return np.where(raw >= 0.5, np.maximum(p, 0.5), np.minimum(p, 0.5)), sure


def is_enough(rows: Sequence[Judged], config: RewardConfig) -> bool:
    """Whether there are labels enough, of both kinds, on episodes that other sources spoke of as well."""
    known = [row for row in rows if row.label is not None and row.opinions]
    fitted = [row.label for row in known if not is_held_out(row.episode_id)]
    return len(known) >= config.min_labels and min(fitted.count(0), fitted.count(1)) >= FEWEST_OF_A_KIND


def calibrate(rows: Sequence[Judged], config: RewardConfig, *, stale: frozenset[str] = frozenset()) -> Calibrated:
    """``stale``: episodes whose labels are from before the world changed: still fitted to, no longer held out."""
    fitted = [replace(r, label=None) if is_held_out(r.episode_id) else r for r in rows]
    combiner = aggregate.fit(fitted)
    alike = Counter(_spoke(row) for row in fitted if row.label is not None)
    known = frozenset(spoke for spoke, n in alike.items() if spoke and n >= FEWEST_ALIKE)
    held = [r for r in rows if r.label is not None and is_held_out(r.episode_id) and _spoke(r) in known]
    held = sorted((r for r in held if r.episode_id not in stale), key=lambda row: row.episode_id)
    raw = sigmoid(combiner.logits(held))
    labels = np.array([float(row.label or 0) for row in held])
    sure = np.maximum(raw, 1.0 - raw)
    wrong = ((raw >= 0.5) != (labels >= 0.5)).astype(np.float64)
    threshold = choose(sure, wrong, 1.0 - sure, grid=GRID, risk=config.risk, confidence=config.confidence)
    calibrator = VennAbers(raw, labels) if len(held) >= VENN_ABERS_FROM else None
    labelled = sum(row.label is not None for row in rows)
    open_rows = [row for row in rows if row.label is None and row.opinions]
    ece = expected_calibration_error(raw, labels)
    out = Calibrated(combiner, threshold, calibrator, labelled, ece, 0.0, known)
    if threshold.value is None or not open_rows:
        return out
    return replace(out, coverage=float((out.judge(open_rows)[1] >= threshold.value).mean()))


def _spoke(row: Judged) -> frozenset[str]:
    return frozenset(o.family for o in row.opinions)
