"""Opinions of many sources -> P(good), with reliabilities learned from audited labels and from agreement.

Dawid-Skene gives each rater's vote a log-likelihood ratio; votes of raters who err together count for less, no rater
and no family has more than a capped say, and what it cannot express (a judge who likes long answers, a family that is
wrong as a whole) is left to a logistic model on its log-odds and a few features, fitted to audited labels alone.
Knows no record, no store, and nothing of thresholds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradatim.reward.evidence import FAMILIES, Judged
from gradatim.stats import dawid_skene, logistic
from gradatim.stats.dawid_skene import DawidSkene, Votes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CATEGORIES = 3  # bad, unsure, good
MOST_RATERS = 64  # whose errors are compared with each other: those who voted most on labelled episodes
RATER_CAP = 3.0  # nats: most that one rater says of one episode (20 to 1)
FAMILY_CAP = 6.0  # nats: most that one family of sources says
_UNKNOWN = np.array([[0.6, 0.1, 0.3], [0.3, 0.1, 0.6]])  # (2, C): a rater of whom nothing is known
_FAMILY_STRENGTH = 10.0  # pseudo-votes of that
_RATER_STRENGTH = 6.0  # pseudo-votes of a rater's family
_RIDGE = 4.0  # of the logistic model, around "believe Dawid-Skene"


def category(value: float) -> int:
    return 0 if value < -1 / 3 else 2 if value > 1 / 3 else 1


@dataclass(frozen=True, slots=True)
class Combiner:
    """A fitted model. ``weight``: of each rater's evidence, below 1 where it errs together with others."""

    raters: Mapping[str, int]
    families: Mapping[str, int]
    model: DawidSkene  # of raters
    by_family: DawidSkene  # for raters who were not there
    weight: Floats  # (J,)
    length: tuple[float, float]  # mean, standard deviation
    coefficients: Floats  # (D,)

    def logits(self, rows: Sequence[Judged]) -> Floats:
        """(N,) log-odds that each episode is good."""
        if not rows:
            return np.zeros(0)
        out: Floats = self.features(rows) @ self.coefficients
        return out

    def log_odds(self, rows: Sequence[Judged]) -> Floats:
        """(N,) Dawid-Skene's, with what raters and families may say capped."""
        out = np.full(len(rows), np.log(self.model.prior / (1.0 - self.model.prior)))
        for i, row in enumerate(rows):
            said = dict.fromkeys(FAMILIES, 0.0)
            for o in row.opinions:
                said[o.family] += self._says(o.rater, o.family, category(o.value)) * o.weight
            out[i] += sum(min(max(s, -FAMILY_CAP), FAMILY_CAP) for s in said.values())
        return out

    def _says(self, rater: str, family: str, c: int) -> float:
        j = self.raters.get(rater)
        if j is None:
            good = self.by_family.confusion[self.families[family], :, c]
            ratio, weight = np.log(good[1] / good[0]), 1.0
        else:
            said = self.model.confusion[j, :, c]
            ratio, weight = np.log(said[1] / said[0]), float(self.weight[j])
        return float(np.clip(ratio, -RATER_CAP, RATER_CAP)) * weight

    def features(self, rows: Sequence[Judged]) -> Floats:
        """(N, D)."""
        return _features(rows, self.log_odds(rows), self.length)


def _features(rows: Sequence[Judged], log_odds: Floats, length: tuple[float, float]) -> Floats:
    mean, spread = length
    out = []
    for row, odds in zip(rows, log_odds.tolist(), strict=True):
        z = min(max((row.log_length - mean) / spread, -3.0), 3.0)
        values = [o.value for o in row.opinions]
        by_family = [_mean([o.value for o in row.opinions if o.family == f]) for f in FAMILIES]
        judge = by_family[FAMILIES.index("judge")]
        discord = float(np.std(values)) if values else 0.0
        out.append([1.0, odds, *by_family, odds * discord, z, z * judge])
    return np.array(out)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def fit(rows: Sequence[Judged]) -> Combiner:
    """From episodes with a label and episodes without; in whatever order they come."""
    rows = sorted(rows, key=lambda row: row.episode_id)
    labels = np.array([-1 if row.label is None else row.label for row in rows], dtype=np.int64)
    families = {family: i for i, family in enumerate(FAMILIES)}
    raters = {name: j for j, name in enumerate(sorted({o.rater for row in rows for o in row.opinions}))}
    family_of = {o.rater: o.family for row in rows for o in row.opinions}
    member = np.array([families[family_of[name]] for name in raters], dtype=np.int64)
    votes = _votes(rows, raters)
    flat = Votes(votes.item, member[votes.rater], votes.category, votes.weight)
    unknown = np.repeat(_UNKNOWN[None], len(families), axis=0)
    n = len(rows)
    by_family, _ = dawid_skene.fit(flat, items=n, prior=unknown, labels=labels, strength=_FAMILY_STRENGTH)
    prior = by_family.confusion[member]  # (J, 2, C)
    model, _ = dawid_skene.fit(votes, items=n, prior=prior, labels=labels, strength=_RATER_STRENGTH)
    weight = _weights(votes, labels, len(raters))
    if weight.min(initial=1.0) < 1.0:
        model, _ = dawid_skene.fit(votes, items=n, prior=prior, labels=labels, strength=_RATER_STRENGTH, weight=weight)
    lengths = np.array([row.log_length for row in rows])
    length = (float(lengths.mean()), float(lengths.std()) or 1.0) if n else (0.0, 1.0)
    plain = Combiner(raters, families, model, by_family, weight, length, _centre())
    return Combiner(raters, families, model, by_family, weight, length, _regress(plain, rows))


def _votes(rows: Sequence[Judged], raters: Mapping[str, int]) -> Votes:
    said = [(i, raters[o.rater], category(o.value), o.weight) for i, row in enumerate(rows) for o in row.opinions]
    item, rater, what, weight = zip(*said, strict=True) if said else ((), (), (), ())
    return Votes(
        np.array(item, dtype=np.int64),
        np.array(rater, dtype=np.int64),
        np.array(what, dtype=np.int64),
        np.array(weight, dtype=np.float64),
    )


def _weights(votes: Votes, labels: Ints, raters: int) -> Floats:
    """(J,) by how the raters' errors go together on labelled episodes."""
    known = labels[votes.item] >= 0
    most = [j for j, _ in Counter(votes.rater[known].tolist()).most_common(MOST_RATERS)]
    weight = np.ones(raters)
    if len(most) < 2:
        return weight
    place = np.full(raters, -1, dtype=np.int64)
    place[most] = np.arange(len(most))
    of = known & (place[votes.rater] >= 0)
    item = np.unique(votes.item[of], return_inverse=True)
    among = Votes(item[1], place[votes.rater[of]], votes.category[of], votes.weight[of])
    truth = labels[item[0]].astype(np.float64)
    weight[most] = dawid_skene.overlap(among, truth, raters=len(most), categories=CATEGORIES)
    return weight


def _centre() -> Floats:
    """Believe Dawid-Skene and nothing else."""
    out = np.zeros(5 + len(FAMILIES))
    out[1] = 1.0
    return out


def _regress(plain: Combiner, rows: Sequence[Judged]) -> Floats:
    known = [row for row in rows if row.label is not None and row.opinions]
    centre = _centre()
    if not known:
        return centre
    y = np.array([float(row.label or 0) for row in known])
    strength = np.full(len(centre), _RIDGE)
    strength[0] = 0.1
    return logistic.fit(plain.features(known), y, centre=centre, strength=strength)
