"""The gates that a candidate passes before it goes live: static checks, then paired replay.

What is not positively decided does not move on. Replay compares the candidate with the live adapter and with the
anchor on the same retained examples (pairs need 25 times fewer cases than a split of traffic), skill by skill, so
that no skill pays for another. Knows nothing of tensors: a Scorer tells how well an adapter gives a known good answer.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from scipy import stats

from gradatim.config import GateConfig
from gradatim.errors import AdapterError, LearnerError
from gradatim.protocols import Scorer, Store
from gradatim.release.cases import Cases
from gradatim.types import Adapter, CaseScore, Decision, Example, Update, Verdict

log = logging.getLogger(__name__)


def orphaned(candidate: Adapter, live: Adapter) -> str:
    """Why a candidate of another adapter than the live one cannot go on."""
    return f"its parent {candidate.parent_id} is no longer live ({live.id} is)"


class StaticGate:
    """Its files match their digest, it descends from the live adapter, its update was finite and small."""

    name = "static"

    def __init__(
        self, store: Store, scorer: Scorer, config: GateConfig, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._scorer, self._config, self._clock = store, scorer, config, clock

    def check(self, candidate: Adapter, live: Adapter, anchor: Adapter) -> Verdict:
        metrics = self._metrics(candidate)
        problem = self._problem(candidate, live, metrics)
        return Verdict(
            adapter_id=candidate.id,
            created_at=self._clock(),
            gate=self.name,
            decision=Decision.FAIL if problem else Decision.PASS,
            against=(live.id,),
            evidence={k: v for k, v in metrics.items() if math.isfinite(v)},
            reason=problem or "digest, lineage, finiteness and size are in order",
        )

    def _metrics(self, candidate: Adapter) -> Mapping[str, float]:
        found = self._store.read(Update, id=candidate.update_id)
        return found[-1][1].metrics if found else {}

    def _problem(self, candidate: Adapter, live: Adapter, metrics: Mapping[str, float]) -> str:
        if candidate.parent_id != live.id:
            return orphaned(candidate, live)
        if not metrics:
            return f"the update {candidate.update_id or '(none)'} that made it is not on record"
        bad = [k for k, v in metrics.items() if not math.isfinite(v)]
        if bad:
            return f"not finite: {', '.join(sorted(bad))}"
        moved = metrics.get("delta_norm")
        if moved is None:
            return "its update does not say how far the weights moved (delta_norm)"
        if moved > self._config.max_delta_norm:
            return f"its weights moved by {moved:.2f} of the base's norm"
        try:
            self._scorer.score(candidate, [])
        except AdapterError as e:
            return str(e)
        return ""


class PersonGate:
    """Waits until a person promotes or rejects it: the last gate where the loop only proposes."""

    name = "person"

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock

    def check(self, candidate: Adapter, live: Adapter, anchor: Adapter) -> Verdict:
        stale = candidate.parent_id != live.id
        return Verdict(
            adapter_id=candidate.id,
            created_at=self._clock(),
            gate=self.name,
            decision=Decision.FAIL if stale else Decision.WAIT,
            against=(live.id,),
            reason=orphaned(candidate, live)
            if stale
            else f"it passed; `gradatim adapters promote {candidate.id}` puts it live",
        )


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

    @staticmethod
    def of(cases: Sequence[Example], candidate: Sequence[CaseScore], reference: Sequence[CaseScore]) -> Pairs:
        gains = gained(cases, candidate, reference)
        return Pairs(
            n=len(gains),
            net=-sum(gains),
            lost=sum(gain < -DECISIVE for gain in gains),
            won=sum(gain > DECISIVE for gain in gains),
            logprob=sum(c.logprob - r.logprob for c, r in zip(candidate, reference, strict=True)) / max(1, len(gains)),
        )

    @property
    def p_value(self) -> float:
        """Exact sign test: the chance of as many losses among the changed cases if losing and winning were alike."""
        changed = self.lost + self.won
        return float(stats.binomtest(self.lost, changed, 0.5, alternative="greater").pvalue) if changed else 1.0


def gained(cases: Sequence[Example], candidate: Sequence[CaseScore], reference: Sequence[CaseScore]) -> Sequence[float]:
    """How much likelier the candidate gives each good answer than the reference."""
    both = zip(cases, candidate, reference, strict=True)
    return [chance(c, len(case.chosen_ids)) - chance(r, len(case.chosen_ids)) for case, c, r in both]


def chance(score: CaseScore, tokens: int) -> float:
    """Of sampling exactly the good answer at temperature 1."""
    return math.exp(min(0.0, score.logprob * tokens))


def harm(pairs: Pairs, config: GateConfig) -> tuple[Decision, str]:
    """Whether the candidate is worse than the reference on these cases, and why. Small harm may be repaired."""
    allowed = max(1.0, config.margin * pairs.n)
    failed = Decision.REPAIR if pairs.net <= config.repair * allowed else Decision.FAIL
    if pairs.net > allowed:
        return failed, f"{pairs.net:.1f} of {pairs.n} known good answers lost in expectation"
    if pairs.lost > pairs.won and pairs.p_value < config.alpha:
        return failed, f"{pairs.lost} lost, {pairs.won} won of {pairs.n} (sign test p = {pairs.p_value:.3f})"
    return Decision.PASS, ""


def common_harm(gains: Sequence[float], config: GateConfig) -> tuple[Decision, str]:
    """Whether all skills together lost: small harm everywhere, which no skill shows alone. By the mean and a one-sided
    t test."""
    net = -sum(gains)
    allowed = max(1.0, config.margin * len(gains))
    if len(gains) < 2 or net <= allowed:
        return Decision.PASS, ""
    p_value = float(stats.ttest_1samp(gains, 0.0, alternative="less").pvalue)
    if not p_value < config.alpha:
        return Decision.PASS, ""
    failed = Decision.REPAIR if net <= config.repair * allowed else Decision.FAIL
    return failed, f"{net:.1f} of {len(gains)} known good answers of all skills lost (t test p = {p_value:.3f})"


_GRAVITY = (Decision.PASS, Decision.REPAIR, Decision.FAIL)


class ReplayGate:
    """Paired replay on retained cases, and on verified ones already trained on, against live and anchor."""

    name = "replay"

    def __init__(
        self, store: Store, scorer: Scorer, config: GateConfig, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._scorer, self._config, self._clock = store, scorer, config, clock
        self._cases = Cases(store, config.max_cases)

    def check(self, candidate: Adapter, live: Adapter, anchor: Adapter) -> Verdict:
        cases = self._scorable(candidate, self._cases.choose(exclude=self._trained_by(candidate)))
        evidence: dict[str, float] = {"cases": len(cases)}
        reasons = []
        decision = Decision.PASS
        if cases:
            scores = {a.id: self._scorer.score(a, cases) for a in (candidate, live, anchor)}
            for reference in {live.id, anchor.id}:
                label = "live" if reference == live.id else "anchor"
                config = self._config if label == "live" else replace(self._config, margin=self._config.anchor_margin)
                for skill, rows in _by_skill(cases).items():
                    pairs = Pairs.of(
                        [cases[i] for i in rows],
                        [scores[candidate.id][i] for i in rows],
                        [scores[reference][i] for i in rows],
                    )
                    evidence |= {f"{skill}.{label}.{k}": v for k, v in _numbers(pairs).items()}
                    found, problem = harm(pairs, config)
                    decision = max(decision, found, key=_GRAVITY.index)
                    if problem:
                        reasons.append(f"{skill} against {label}: {problem}")
            evidence |= _chances(cases, scores[candidate.id])
            found, problem = common_harm(gained(cases, scores[candidate.id], scores[live.id]), self._config)
            decision = max(decision, found, key=_GRAVITY.index)
            if problem:
                reasons.append(problem)
        return Verdict(
            adapter_id=candidate.id,
            created_at=self._clock(),
            gate=self.name,
            decision=decision,
            against=(live.id, anchor.id),
            evidence=evidence,
            reason="; ".join(reasons) or self._passed(cases),
        )

    def _scorable(self, candidate: Adapter, cases: Sequence[Example]) -> Sequence[Example]:
        """Without those that cannot be scored, such as an answer longer than the learner takes: one of them must not
        keep every candidate from its verdict."""
        try:
            self._scorer.score(candidate, cases)
            return cases
        except AdapterError:
            raise
        except LearnerError:
            return [case for case in cases if self._can_be_scored(candidate, case)]

    def _can_be_scored(self, candidate: Adapter, case: Example) -> bool:
        try:
            self._scorer.score(candidate, [case])
        except AdapterError:
            raise
        except LearnerError as e:
            log.warning("left out of the comparison: %s", e)
            return False
        return True

    def _passed(self, cases: Sequence[Example]) -> str:
        if not cases:
            return "no verified good answers yet to compare on: the static checks carry the decision"
        return f"no skill worse than live or anchor on {len(cases)} known good answers"

    def _trained_by(self, candidate: Adapter) -> frozenset[str]:
        found = self._store.read(Update, id=candidate.update_id)
        return frozenset(found[-1][1].example_ids) if found else frozenset()


def _by_skill(cases: Sequence[Example]) -> Mapping[str, list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for i, case in enumerate(cases):
        rows[case.skill].append(i)
    return rows


def _chances(cases: Sequence[Example], scores: Sequence[CaseScore]) -> Mapping[str, float]:
    """Of each skill, how likely the adapter is to give a known good answer; replay goes by it."""
    chances = [chance(score, len(case.chosen_ids)) for case, score in zip(cases, scores, strict=True)]
    return {f"{s}.chance": round(sum(chances[i] for i in rows) / len(rows), 3) for s, rows in _by_skill(cases).items()}


def _numbers(pairs: Pairs) -> dict[str, float]:
    return {
        "n": pairs.n,
        "net": round(pairs.net, 2),
        "lost": pairs.lost,
        "won": pairs.won,
        "logprob": round(pairs.logprob, 4),
    }
