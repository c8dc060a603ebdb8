"""The gate of the stage ``canary``: what a candidate does to a small share of the traffic, and when that is enough.

Where the traffic is large, rewards of users decide: the candidate moves up when every class of sources that there was
before shows that it loses no more than a margin. Where too few rated episodes are to be expected, the offline pairs
have decided already, and the canary guards: it ends without an alarm after a few dozen episodes. Which of the two it is
is fixed when the canary begins, by what the store held then, and the verdict says it. What is undecided at the horizon
does not move up. State is a function of the store: a restart computes it anew.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradatim.config import Config
from gradatim.protocols import Store
from gradatim.release.gates import offline_pairs, orphaned, ruling
from gradatim.release.trial import Trial
from gradatim.release.units import CLASSES, Units, Usual, class_of
from gradatim.types import Adapter, Decision, Feedback, Move, Stage, Step, Verdict

_LOOK_BACK = 500  # records before the canary that say what is usual
_USUAL_SHARE = 0.05  # of the feedback that a class of sources must have had to be asked now
EXPIRED = "expired"  # in the evidence: undecided at its end, and no harm seen


@dataclass(frozen=True, slots=True)
class Before:
    """What the store says of the time before the canary began."""

    usual: Usual
    required: tuple[str, ...]  # classes of sources that there were
    users: int
    rated_per_s: float  # episodes
    served_per_s: float

    @staticmethod
    def of(store: Store, config: Config, position: int, at: float) -> Before:
        steps = [s for _, s in store.newest(Step, before=position, limit=_LOOK_BACK)]
        opinions = [
            f
            for _, f in store.newest(Feedback, before=position, limit=_LOOK_BACK)
            if f.kind in ("outcome", "score") and f.value is not None
        ]
        heard = Counter(class_of(f.source, config.release.trusted) for f in opinions)
        return Before(
            usual=Usual.of(steps),
            required=tuple(name for name in CLASSES if heard[name] > _USUAL_SHARE * len(opinions)),
            users=len({s.user for s in steps if s.user}),
            rated_per_s=_rate([f.episode_id for f in opinions], [f.created_at for f in opinions], at),
            served_per_s=_rate([s.episode_id for s in steps], [s.created_at for s in steps], at),
        )


def _rate(episodes: Sequence[str], times: Sequence[float], until: float) -> float:
    return len(set(episodes)) / max(1.0, until - min(times)) if times else 0.0


@dataclass(slots=True)
class _Run:
    """One canary so far, as far as the store was followed."""

    position: int  # of the move that began it
    begun_at: float
    units: Units
    trial: Trial
    pairs: float  # offline pairs that carry the decision; 0: its own evidence must


class CanaryGate:
    """Waits, passes, or takes back. It passes the router its share in ``evidence["share"]``."""

    name = "canary"

    def __init__(self, store: Store, config: Config, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._config, self._release, self._clock = store, config, config.release, clock
        self._run: _Run | None = None

    def check(self, candidate: Adapter, live: Adapter, anchor: Adapter) -> Verdict:
        run = self._followed(candidate, live)
        if candidate.parent_id != live.id or run is None:
            return self._verdict(candidate, live, Decision.FAIL, orphaned(candidate, live), {EXPIRED: 1.0})
        now = self._clock()
        run.trial.serve(run.units.served())
        run.trial.score(run.units.scored(now))
        decision, reason = self._decide(run, now)
        share = self._release.ramp[run.trial.level]
        evidence = {"share": share, "offline_pairs": run.pairs, **run.trial.evidence()}
        if decision is Decision.FAIL and not run.trial.harm:
            evidence[EXPIRED] = 1.0
        return self._verdict(candidate, live, decision, reason, evidence)

    def _decide(self, run: _Run, now: float) -> tuple[Decision, str]:
        trial, seen = run.trial, f"{run.trial.treated} rated episodes of the canary"
        if trial.harm:
            return Decision.FAIL, f"{trial.harm} ({seen})"
        if trial.proven:
            return Decision.PASS, f"the canary decided: no class of sources loses {self._release.margin:g} ({seen})"
        if run.pairs and trial.closed_treated >= self._release.guard_episodes:
            return Decision.PASS, (
                f"{run.pairs:.0f} offline pairs decided, as the traffic is too small for the canary to; "
                f"{trial.closed_treated} episodes of it raised no alarm"
            )
        if now - run.begun_at > self._release.horizon_s or trial.closed >= self._release.horizon_episodes:
            return Decision.FAIL, f"undecided at the end of its time ({seen})"
        return Decision.WAIT, f"not decided yet ({seen})"

    def _followed(self, candidate: Adapter, live: Adapter) -> _Run | None:
        moves = self._store.newest(Move, adapter_id=candidate.id)
        if not moves or moves[0][1].after is not Stage.CANARY:
            return None
        position, move = moves[0]
        if self._run is None or self._run.position != position:
            self._run = self._begin(candidate, live, position, move.created_at)
        return self._run

    def _begin(self, candidate: Adapter, live: Adapter, position: int, at: float) -> _Run:
        before, release = Before.of(self._store, self._config, position, at), self._release
        trial = Trial(
            release, before.required, min(release.min_users, before.users), at, level=self._first_level(before)
        )
        small = before.rated_per_s * release.horizon_s < release.decidable
        pairs = offline_pairs(self._store, candidate, release) if small else 0.0
        units = Units(self._store, self._config, candidate.id, live.id, position, before.usual)
        return _Run(position, at, units, trial, pairs)

    def _first_level(self, before: Before) -> int:
        """The smallest share that the traffic fills within a step of the ramp; the largest where none is."""
        release = self._release
        expected = before.served_per_s * max(1.0, release.ramp_s)
        enough = (i for i, share in enumerate(release.ramp) if share * expected >= release.ramp_episodes)
        return next(enough, len(release.ramp) - 1)

    def _verdict(
        self, candidate: Adapter, live: Adapter, decision: Decision, reason: str, evidence: dict[str, float]
    ) -> Verdict:
        return ruling(self.name, candidate, live, self._clock(), decision, reason, evidence)
