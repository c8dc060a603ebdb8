"""Dawid and Skene's model of noisy raters (1979), by EM: how often each says what when the truth is bad or good.

    q_i(y) ∝ π_y Π_j Π_c θ_g(j)(c | y)^(w_j n_ijc)        (E-step; anchored items keep their label)
    θ_g(c | y) = (Σ n_ijc q_i(y) + s θ⁰_g(c | y)) / Σ_c (…)   (M-step, with s pseudo-votes of a prior)

Two truths, any number of categories. Raters whose votes are few lean on ``prior``; raters who err together count for
less (``w``, see ``overlap``). It knows neither who the raters are nor where labels come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Votes:
    """V votes in parallel arrays. ``weight`` in (0, 1]: how sure the rater was."""

    item: Ints  # (V,) in [0, I)
    rater: Ints  # (V,) in [0, J)
    category: Ints  # (V,) in [0, C)
    weight: Floats  # (V,)


@dataclass(frozen=True, slots=True)
class DawidSkene:
    """A fitted model. ``confusion[j, y, c]``: how often rater j says c of an item whose truth is y (0 bad, 1 good)."""

    prior: float  # P(good) of an item without votes
    confusion: Floats  # (J, 2, C)

    def evidence(self, votes: Votes) -> Floats:
        """(V,) each vote's log-likelihood ratio of good against bad, in nats."""
        table = np.log(self.confusion[:, 1]) - np.log(self.confusion[:, 0])  # (J, C)
        out: Floats = table[votes.rater, votes.category] * votes.weight
        return out


def fit(
    votes: Votes,
    *,
    items: int,
    prior: Floats,
    labels: Ints | None = None,
    strength: float = 4.0,
    weight: Floats | None = None,
    iterations: int = 50,
    tolerance: float = 1e-6,
) -> tuple[DawidSkene, Floats]:
    """(model, P(good) of each item (I,)).

    ``prior`` (J, 2, C): what each rater is believed to do before its votes are seen, worth ``strength`` votes.
    ``labels`` (I,): 0 or 1 where the truth is known, -1 elsewhere. ``weight`` (J,): of each rater's evidence.
    """
    truth = np.full(items, -1, dtype=np.int64) if labels is None else labels
    known = truth >= 0
    scale = votes.weight if weight is None else votes.weight * weight[votes.rater]
    confusion = prior / prior.sum(axis=2, keepdims=True)
    base = 0.5
    good = np.full(items, -1.0)
    for _ in range(iterations):
        model = DawidSkene(base, confusion)
        evidence = model.evidence(Votes(votes.item, votes.rater, votes.category, scale))
        logit = np.log(base / (1.0 - base)) + np.bincount(votes.item, weights=evidence, minlength=items)
        before, good = good, np.where(known, truth, 1.0 / (1.0 + np.exp(-np.clip(logit, -40.0, 40.0))))
        if np.abs(good - before).max(initial=0.0) < tolerance:
            break
        base = float((good.sum() + 1.0) / (items + 2.0))
        confusion = _confusion(votes, good, prior, strength)
    return DawidSkene(base, confusion), good


def _confusion(votes: Votes, good: Floats, prior: Floats, strength: float) -> Floats:
    """(J, 2, C): the M-step."""
    raters, _, categories = prior.shape
    cell = votes.rater * categories + votes.category
    counts = np.empty((raters, 2, categories))
    for y, share in ((0, 1.0 - good), (1, good)):
        flat = np.bincount(cell, weights=votes.weight * share[votes.item], minlength=raters * categories)
        counts[:, y] = flat.reshape(raters, categories)
    counts += strength * prior / prior.sum(axis=2, keepdims=True) + _TINY
    out: Floats = counts / counts.sum(axis=2, keepdims=True)
    return out


def overlap(votes: Votes, truth: Floats, *, raters: int, categories: int, shrink: float = 20.0) -> Floats:
    """(J,) the weight of each rater's evidence: 1 over one plus the sum of its error correlations with the others.

    An error is a vote's distance from the truth (its category on [0, 1] less ``truth``, (I,)), less the rater's mean
    distance for that truth. Two raters' errors on the items that both judged are correlated, shrunk towards 0 by
    ``shrink`` items, and negative ones are taken for 0. k copies of one rater so have a weight of about 1/k each.
    """
    items = len(truth)
    error = np.full((items, raters), np.nan)
    for y in (False, True):
        of = (truth >= 0.5)[votes.item] == y
        place = votes.category[of] / max(1, categories - 1)
        n = np.bincount(votes.rater[of], minlength=raters)
        mean = np.bincount(votes.rater[of], weights=place, minlength=raters) / np.maximum(n, 1)
        error[votes.item[of], votes.rater[of]] = place - mean[votes.rater[of]]
    both = ~np.isnan(error)  # (I, J)
    error = np.where(both, error, 0.0)
    seen = both.T.astype(np.float64)  # (J, I)
    square = (error**2).T @ both  # (J, J): of the row's rater, over items that both judged
    shared = seen @ seen.T
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = (error.T @ error) / np.sqrt(square * square.T)
    correlation = np.nan_to_num(correlation) * shared / (shared + shrink)
    np.fill_diagonal(correlation, 0.0)
    out: Floats = 1.0 / (1.0 + np.maximum(correlation, 0.0).sum(axis=1))
    return out
