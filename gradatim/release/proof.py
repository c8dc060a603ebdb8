"""Whether what was learned is better than the anchor, and how many updates went live since that was last proven.

Replay refuses harm that can be seen. A loss of one answer in a hundred cannot be seen on some hundred answers, and a
hundred such losses add up. So only ``gate.unproven`` updates in a row may go live without proof that they are better
than the anchor, and the next one needs it. Proof is an e-value (``stats.pooled``) on known answers that nothing was
ever trained on, one difference for each prompt, against H0: no better than the anchor on average over all of them. The
k-th try since the last proof is at level 6 ALPHA / (pi k)^2, which sums to ALPHA, so that trying again and again does
not help; what is refused for harm is no try. Or it is traffic that shows the live adapter to be better, where the
frozen base is the anchor and answers some of it (``release.lift``).

Where it stands is read from the verdicts of the replay gate, each of which records it: a restart changes nothing, and
a rollback goes back to the count of the adapter that is live again. What it does not know: that the answers it compares
on were mostly drawn by adapters newer than the anchor, whose own they are. It is no bound for each skill by itself.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from gradatim.config import GateConfig
from gradatim.protocols import Store
from gradatim.stats.pooled import log_e
from gradatim.types import APPROVAL, Adapter, Example, Verdict

REPLAY = "replay"  # the gate whose verdicts record it
MISSING = "proof.missing"  # 1 in the evidence of a refusal for want of it
ALPHA = 0.05  # chance of a proof, in all tries since the last one, where nothing is better than the anchor
FARTHEST = 100  # adapters that are looked back on, where none of them says how it stood: it was live before this rule
PROVABLE = 30  # prompts that were never trained on; with fewer none is asked for


@dataclass(frozen=True, slots=True)
class Standing:
    """Of the live adapter, before a candidate: what went live since the anchor or the last proof, and how often a proof
    was tried since."""

    unproven: int = 0
    tries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What speaks for a candidate against the anchor."""

    before: Standing
    gains: Sequence[float]  # (N,) by how much likelier it gives the answers to N prompts that were never trained on
    harmless: bool = True  # all else lets it pass; if not, its proof would prove nothing that goes live
    lift: float = -1.0  # lower bound of the live adapter's over the anchor in traffic; -1: none

    @property
    def is_tried(self) -> bool:
        return self.harmless and len(self.gains) >= PROVABLE

    @property
    def tries(self) -> int:
        return self.before.tries + self.is_tried

    @property
    def log_e(self) -> float:
        return log_e(self.gains)

    @property
    def needed(self) -> float:
        """The log e-value that is proof at this try."""
        return math.log(max(1, self.tries) ** 2 * math.pi**2 / 6.0 / ALPHA)

    @property
    def is_given(self) -> bool:
        return self.is_tried and self.log_e >= self.needed

    @property
    def unproven(self) -> int:
        """Updates that would be live without proof, this one included."""
        if self.is_given:
            return 0
        return 1 + (0 if self.lift >= 0.0 else self.before.unproven)

    @property
    def after(self) -> Standing:
        """Where it goes live."""
        return Standing(self.unproven, 0 if self.is_given else self.tries)

    def evidence(self) -> dict[str, float]:
        out = {"unproven": float(self.unproven), "proof.tries": float(self.tries)}
        out |= {"proof.cases": float(len(self.gains)), "proof.gained": round(sum(self.gains), 2)}
        out |= {"proof.log_e": round(self.log_e, 4), "proof.needed": round(self.needed, 4)}
        return out | ({"proof.lift": self.lift} if self.lift > -1.0 else {})

    def missing(self, config: GateConfig, live: Adapter, anchor: Adapter) -> str:
        """Why it cannot go on without; empty where it can."""
        if not config.unproven or not self.is_tried or self.unproven <= config.unproven:
            return ""
        return (
            f"with it {self.unproven} updates in a row would be live without proof that they are better than "
            f"{anchor.id}, and {config.unproven} may be: {sum(self.gains):+.1f} of {len(self.gains)} held-out answers "
            f"gained, log e {self.log_e:.1f} where {self.needed:.1f} is proof. More confirmed good answers help, or "
            f"release.base_share; or `gradatim adapters approve {live.id}`, if you find that it does well"
        )


def held_out(cases: Sequence[Example], gains: Sequence[float]) -> Sequence[float]:
    """(N,) the mean gain of each prompt, of those that were never trained on: one that comes often is one witness."""
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for case, gain in zip(cases, gains, strict=True):
        if case.retained:
            by_prompt[case.state or case.id].append(gain)
    return [statistics.fmean(found) for found in by_prompt.values()]


def standing(store: Store, live: Adapter, anchor: Adapter) -> Standing:
    """As the verdicts record it."""
    return Standing(_unproven(store, live, anchor), _tries(store, live, anchor))


def awaited(store: Store) -> Verdict | None:
    """The refusal for want of proof that stands: the newest verdict is one, and no person approved an adapter since."""
    for position, verdict in store.newest(Verdict, gate=REPLAY):
        approved = store.newest(Verdict, gate=APPROVAL)
        overruled = approved and approved[0][0] > position
        return verdict if verdict.evidence.get(MISSING) and not overruled else None
    return None


def _unproven(store: Store, live: Adapter, anchor: Adapter) -> int:
    """Back from the live adapter to the last count against this anchor, to the anchor itself, to the first one, or so
    far."""
    count, at = 0, live
    while at.id != anchor.id and at.parent_id is not None and count < FARTHEST:
        for _, verdict in store.newest(Verdict, adapter_id=at.id, gate=REPLAY):
            if _is_against(verdict, anchor):
                return count + int(verdict.evidence["unproven"])
        count += 1
        parent = store.newest(Adapter, id=at.parent_id)
        if not parent:
            break
        at = parent[0][1]
    return count


def _tries(store: Store, live: Adapter, anchor: Adapter) -> int:
    """Of the newest verdict, whatever became of its candidate; none where that is live and was proof."""
    for _, verdict in store.newest(Verdict, gate=REPLAY):
        given = verdict.adapter_id == live.id and verdict.evidence.get("unproven") == 0.0
        return int(verdict.evidence["proof.tries"]) if _is_against(verdict, anchor) and not given else 0
    return 0


def _is_against(verdict: Verdict, anchor: Adapter) -> bool:
    """The anchor is named last. A verdict of before there was a count says nothing of it."""
    return verdict.against[-1:] == (anchor.id,) and "unproven" in verdict.evidence
