"""What counts as harm: known good answers that a candidate gives less often than a reference, pair by pair.

It knows no store and no gate, and of an update only how far it is to be trusted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy import stats

from gradatim.config import GateConfig
from gradatim.types import CaseScore, Decision, Example, Update

DECISIVE = 0.25  # a change of an answer's chance that is more than two near-equal answers changing places


@dataclass(frozen=True, slots=True)
class Pairs:
    """How two adapters do on the same N cases.

    What counts is the chance of giving exactly the good answer, not whether greedy decoding does: where two answers are
    nearly equal, the least step flips all the cases that resemble each other at once, and means nothing.
    """

    n: int
    net: float  # expected number of good answers lost, over the N cases
    lost: int  # cases in which the good answer became decisively less likely
    won: int
    logprob: float  # mean difference of the good answer's log-probability, nats a token
    p_mean: float = 0.0  # one-sided t test: the chance of so low a mean gain if nothing were lost

    @staticmethod
    def of(cases: Sequence[Example], candidate: Sequence[CaseScore], reference: Sequence[CaseScore]) -> Pairs:
        gains = gained(cases, candidate, reference)
        return Pairs(
            n=len(gains),
            net=-sum(gains),
            lost=sum(gain < -DECISIVE for gain in gains),
            won=sum(gain > DECISIVE for gain in gains),
            logprob=sum(c.logprob - r.logprob for c, r in zip(candidate, reference, strict=True)) / max(1, len(gains)),
            p_mean=p_of_loss(gains),
        )

    @property
    def p_value(self) -> float:
        """Exact sign test: the chance of as many losses among the changed cases if losing and winning were alike."""
        changed = self.lost + self.won
        return float(stats.binomtest(self.lost, changed, 0.5, alternative="greater").pvalue) if changed else 1.0


def p_of_loss(gains: Sequence[float]) -> float:
    """One-sided t test of the mean of (N,) gains against none; 1 where they cannot tell."""
    if len(gains) < 2 or not any(gains):
        return 1.0
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    mean = statistics.fmean(gains)
    return float(stats.t.cdf(mean / error, len(gains) - 1)) if error else float(mean > 0.0)


def gained(cases: Sequence[Example], candidate: Sequence[CaseScore], reference: Sequence[CaseScore]) -> Sequence[float]:
    """How much likelier the candidate gives each good answer than the reference."""
    both = zip(cases, candidate, reference, strict=True)
    return [chance(c, len(case.chosen_ids)) - chance(r, len(case.chosen_ids)) for case, c, r in both]


def chance(score: CaseScore, tokens: int) -> float:
    """Of sampling exactly the good answer at temperature 1."""
    return math.exp(min(0.0, score.logprob * tokens))


@dataclass(frozen=True, slots=True)
class Leeway:
    """What harm a candidate is let pass with, by how well the feedback behind it is borne out.

    On known answers alone, an honest step that is too long and a short step in a harmful direction look the same. So
    only feedback that outcomes bear out gets the benefit of the doubt: its step may be halved, however great its harm
    was, since what passes at last is judged like any other. Any other is not repaired, and where the trust region
    shortened its step, the margin is shortened alike: a harm that grows with the step is refused at any length.
    """

    repaired: bool = True  # whether half of the step may be tried
    length: float = 1.0  # of the margin, as a share
    advice: str = ""

    @staticmethod
    def of(update: Update | None) -> Leeway:
        if update is None or update.is_borne_out:
            return Leeway()
        return Leeway(
            False,
            update.metrics.get("fresh_share", 1.0),
            "no smaller step is tried, as no outcome bears out most of its feedback (send one for corrected episodes)",
        )

    def allowed(self, margin: float, n: int) -> float:
        """Answers of n that may be lost in expectation."""
        return self.length * max(1.0, margin * n)

    @property
    def failed(self) -> Decision:
        """What becomes of a candidate that did harm."""
        return Decision.REPAIR if self.repaired else Decision.FAIL


FULL = Leeway()


def harm(pairs: Pairs, config: GateConfig, leeway: Leeway = FULL) -> tuple[Decision, str]:
    """Whether the candidate is worse than the reference on these cases, and why."""
    allowed, failed = leeway.allowed(config.margin, pairs.n), leeway.failed
    if pairs.net > allowed:
        return failed, f"{pairs.net:.1f} of {pairs.n} known good answers lost in expectation"
    if pairs.lost > pairs.won and pairs.p_value < config.alpha:
        return failed, f"{pairs.lost} lost, {pairs.won} won of {pairs.n} (sign test p = {pairs.p_value:.3f})"
    return Decision.PASS, ""


def lasting_harm(anchor: Pairs, config: GateConfig, leeway: Leeway = FULL) -> tuple[Decision, str]:
    """Whether the candidate is worse than the anchor. Most of that is the live adapter's own, and no smaller step mends
    it: so it must be plain, beyond the margin and beyond chance."""
    if not anchor.p_mean < config.alpha:
        return Decision.PASS, ""
    return harm(anchor, replace(config, margin=config.anchor_margin), leeway)


def common_harm(gains: Sequence[float], config: GateConfig, leeway: Leeway = FULL) -> tuple[Decision, str]:
    """Whether all skills together lost: small harm everywhere, which no skill shows alone. By the mean and a one-sided
    t test."""
    net = -sum(gains)
    p_value = p_of_loss(gains)
    if net <= leeway.allowed(config.margin, len(gains)) or not p_value < config.alpha:
        return Decision.PASS, ""
    return leeway.failed, f"{net:.1f} of {len(gains)} known good answers of all skills lost (t test p = {p_value:.3f})"
