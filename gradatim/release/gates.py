"""The gates that a candidate passes before it goes live: static checks, then paired replay.

What is not positively decided does not move on. Replay compares the candidate with the live adapter and with the
anchor on the same retained examples (pairs need 25 times fewer cases than a split of traffic), skill by skill, so
that no skill pays for another; what counts as harm is in ``harm``, and how much may go live without proof of good in
``proof``. Knows nothing of tensors: a Scorer tells how well an adapter gives a known good answer.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gradatim.config import GateConfig, ReleaseConfig
from gradatim.errors import AdapterError, LearnerError
from gradatim.protocols import Scorer, Store
from gradatim.release.cases import Cases
from gradatim.release.harm import Leeway, Pairs, chance, common_harm, gained, harm, lasting_harm
from gradatim.release.proof import MISSING, REPLAY, Proof, held_out, standing
from gradatim.types import Adapter, AdapterId, CaseScore, Decision, Example, Update, Verdict

log = logging.getLogger(__name__)


def ruling(
    gate: str, candidate: Adapter, live: Adapter, at: float, decision: Decision, reason: str, evidence: dict[str, float]
) -> Verdict:
    """The verdict of a gate that compares two adapters in traffic."""
    return Verdict(
        adapter_id=candidate.id,
        created_at=at,
        gate=gate,
        decision=decision,
        against=(live.id,),
        evidence=evidence,
        reason=reason,
    )


def orphaned(candidate: Adapter, live: Adapter) -> str:
    """Why a candidate of another adapter than the live one cannot go on."""
    return f"its parent {candidate.parent_id} is no longer live ({live.id} is)"


def offline_pairs(store: Store, candidate: Adapter, release: ReleaseConfig) -> float:
    """Known good answers on which the replay gate passed it, where they are enough to carry a decision; else 0."""
    for _, verdict in store.newest(Verdict, adapter_id=candidate.id, gate=ReplayGate.name):
        cases = verdict.evidence.get("cases", 0.0)
        return cases if verdict.decision is Decision.PASS and cases >= release.min_pairs else 0.0
    return 0.0


def _update(store: Store, candidate: Adapter) -> Update | None:
    """What made it."""
    found = store.read(Update, id=candidate.update_id)
    return found[-1][1] if found else None


class StaticGate:
    """Its files match their digest, its parent is the live adapter, its update finite, small and of enough users."""

    name = "static"

    def __init__(
        self, store: Store, scorer: Scorer, config: GateConfig, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._scorer, self._config, self._clock = store, scorer, config, clock

    def check(self, candidate: Adapter, live: Adapter, anchor: Adapter) -> Verdict:
        update = _update(self._store, candidate)
        metrics = update.metrics if update else {}
        users = self._users(update) if update and self._config.min_users else None
        problem = self._problem(candidate, live, metrics) or self._too_few(users)
        return Verdict(
            adapter_id=candidate.id,
            created_at=self._clock(),
            gate=self.name,
            decision=Decision.FAIL if problem else Decision.PASS,
            against=(live.id,),
            evidence={k: v for k, v in metrics.items() if math.isfinite(v)}
            | ({} if users is None else {"users": float(users)}),
            reason=problem or "digest, lineage, finiteness and size are in order",
        )

    def _users(self, update: Update) -> int:
        """Named ones, behind what it was taught."""
        found = (e for i in update.example_ids for _, e in self._store.newest(Example, id=i))
        return len({e.user for e in found if e.user})

    def _too_few(self, users: int | None) -> str:
        if users is None or users >= self._config.min_users:
            return ""
        return f"{users} named users are behind it, and {self._config.min_users} are asked for"

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


_GRAVITY = (Decision.PASS, Decision.REPAIR, Decision.FAIL)


class ReplayGate:
    """Paired replay on retained cases, and on verified ones already trained on, against live and anchor. ``lift``: the
    lower bound of an adapter's over the frozen base in traffic, where some of it is answered by that."""

    name = REPLAY

    def __init__(
        self,
        store: Store,
        scorer: Scorer,
        config: GateConfig,
        *,
        lift: Callable[[AdapterId], float] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._scorer, self._config, self._clock = store, scorer, config, clock
        self._lift = lift
        self._cases = Cases(store, config.max_cases)

    def check(self, candidate: Adapter, live: Adapter, anchor: Adapter) -> Verdict:
        update = _update(self._store, candidate)
        trained = frozenset(update.example_ids) if update else frozenset()
        cases = self._scorable(candidate, self._cases.choose(exclude=trained))
        found = _Findings(self._config, Leeway.of(update))
        gains: Sequence[float] = ()
        if cases:
            scores = {a.id: self._scorer.score(a, cases) for a in (candidate, live, anchor)}
            beside = scores[anchor.id] if anchor.id != live.id else None
            found.compare(cases, scores[candidate.id], scores[live.id], beside)
            gains = gained(cases, scores[candidate.id], scores[anchor.id])
        proof = Proof(
            before=standing(self._store, live, anchor),
            gains=held_out(cases, gains),
            harmless=found.decision is Decision.PASS,
            lift=self._lift(live.id) if self._lift is not None and anchor.parent_id is None else -1.0,
        )
        missing = proof.missing(self._config, live, anchor)
        return Verdict(
            adapter_id=candidate.id,
            created_at=self._clock(),
            gate=self.name,
            decision=Decision.FAIL if missing else found.decision,
            against=tuple(dict.fromkeys((live.id, anchor.id))),
            evidence={"cases": len(cases)} | found.evidence | proof.evidence() | ({MISSING: 1.0} if missing else {}),
            reason=missing or found.reason or self._passed(cases),
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


@dataclass(slots=True)
class _Findings:
    """The gravest decision of all comparisons, with its reasons and figures."""

    config: GateConfig
    leeway: Leeway
    decision: Decision = Decision.PASS
    evidence: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str:
        advice = [self.leeway.advice] if self.reasons and self.leeway.advice else []
        return "; ".join([*self.reasons, *advice])

    def compare(
        self,
        cases: Sequence[Example],
        candidate: Sequence[CaseScore],
        live: Sequence[CaseScore],
        anchor: Sequence[CaseScore] | None,
    ) -> None:
        """``anchor``: none where it is live."""
        for skill, rows in _by_skill(cases).items():
            against = [Pairs.of(*_at(rows, cases, candidate, other)) for other in (live, anchor) if other is not None]
            self._skill(skill, *against)
        self.evidence |= _chances(cases, candidate)
        self._add("", *common_harm(gained(cases, candidate, live), self.config, self.leeway))

    def _skill(self, skill: str, live: Pairs, anchor: Pairs | None = None) -> None:
        self.evidence |= {f"{skill}.live.{k}": v for k, v in _numbers(live).items()}
        self._add(f"{skill} against live: ", *harm(live, self.config, self.leeway))
        if anchor is None:
            return
        self.evidence |= {f"{skill}.anchor.{k}": v for k, v in _numbers(anchor).items()}
        self._add(f"{skill} against anchor: ", *lasting_harm(anchor, self.config, self.leeway))

    def _add(self, where: str, decision: Decision, problem: str) -> None:
        self.decision = max(self.decision, decision, key=_GRAVITY.index)
        if problem:
            self.reasons.append(f"{where}{problem}")


def _at(
    rows: Sequence[int], cases: Sequence[Example], *scores: Sequence[CaseScore]
) -> tuple[list[Example], list[CaseScore], list[CaseScore]]:
    mine, others = ([of_one[i] for i in rows] for of_one in scores)
    return [cases[i] for i in rows], mine, others


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
