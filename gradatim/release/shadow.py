"""The gate of the stage ``shadow``: recent prompts, answered again by candidate and live adapter, beside the traffic.

Users see none of it. A few prompts a turn, so that the loop goes on judging in between; every pair that was compared is
kept, so that a restart goes on where it was. What decides is in ``comparison``. What is undecided when there are no
more prompts, or no more time, does not move on; or, where it is configured so, on the pairs of the replay gate, and the
verdict says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gradatim.config import Config
from gradatim.errors import AdapterError
from gradatim.protocols import Shelf, Store
from gradatim.release.comparison import GUARDS, Comparison, guards, is_malformed_call
from gradatim.release.gates import offline_pairs, orphaned, ruling
from gradatim.release.prompts import Prompts
from gradatim.release.units import Usual
from gradatim.types import Adapter, Decision, Episode, Feedback, Move, ShadowPair, Stage, Step, Verdict

log = logging.getLogger(__name__)

Replayer = Callable[[Adapter, Sequence[Step]], Sequence[Step | None]]  # the same steps, answered anew; None: it failed
Judge = Callable[[Episode], object]  # a critic, which may say Feedback
_LOOK_BACK = 500  # answers that say what is usual


@dataclass(slots=True)
class _Run:
    """One shadow so far."""

    position: int  # of the move that began it
    begun_at: float
    prompts: Prompts
    usual: Usual
    comparison: Comparison
    done: int = 0  # prompts, replayed or left out


class ShadowGate:
    """Waits, passes, or rejects."""

    name = "shadow"

    def __init__(
        self,
        store: Store,
        shelf: Shelf,
        config: Config,
        replay: Replayer,
        judge: Judge | None = None,
        *,
        unsound: Callable[[Step], bool] = is_malformed_call,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``judge``: none compares answers by ``GUARDS`` alone. ``unsound``: of an answer's tool calls."""
        self._store, self._shelf, self._config, self._shadow = store, shelf, config, config.shadow
        self._replay, self._judge, self._unsound, self._clock = replay, judge, unsound, clock
        self._run: _Run | None = None

    def check(self, candidate: Adapter, live: Adapter, anchor: Adapter) -> Verdict:
        run = self._followed(candidate)
        if candidate.parent_id != live.id or run is None:
            return self._verdict(candidate, live, Decision.FAIL, orphaned(candidate, live), {})
        if problem := self._advance(run, candidate, live):
            return self._verdict(candidate, live, Decision.FAIL, problem, {})
        pairs = offline_pairs(self._store, candidate, self._config.release)
        decision, reason = self._decide(run, pairs)
        return self._verdict(candidate, live, decision, reason, {"offline_pairs": pairs, **run.comparison.evidence()})

    def _decide(self, run: _Run, pairs: float) -> tuple[Decision, str]:
        found, by = run.comparison, "the critic" if self._judge else "what answers look like"
        if found.harm:
            return Decision.FAIL, f"{found.harm} (after {found.pairs} prompts)"
        if found.proven:
            return Decision.PASS, f"the shadow decided, by {by}: nothing is lost on {found.pairs} prompts"
        over = run.prompts.are_all and run.done >= len(run.prompts)
        if not over and self._clock() - run.begun_at <= self._shadow.horizon_s:
            return Decision.WAIT, f"not decided yet after {found.pairs} prompts"
        if self._shadow.undecided == "pairs" and pairs:
            return Decision.PASS, (
                f"{pairs:.0f} offline pairs decided; the shadow did not, and found no harm on {found.pairs} prompts"
            )
        return Decision.FAIL, f"undecided after {found.pairs} prompts"

    # ------------------------------------------------------------------ the answers

    def _followed(self, candidate: Adapter) -> _Run | None:
        moves = self._store.newest(Move, adapter_id=candidate.id)
        if not moves or moves[0][1].after is not Stage.SHADOW:
            return None
        position, move = moves[0]
        if self._run is None or self._run.position != position:
            self._run = self._begin(candidate, position, move.created_at)
        return self._run

    def _begin(self, candidate: Adapter, position: int, at: float) -> _Run:
        prompts = Prompts(self._store, candidate, self._shadow, position)
        before = [s for _, s in self._store.newest(Step, before=max(1, position), limit=_LOOK_BACK)]
        comparison = Comparison(self._shadow, prompts.skills, judged=self._judge is not None)
        run = _Run(position, at, prompts, Usual.of(before), comparison)
        for pair in sorted(self._shelf.load(ShadowPair, adapter_id=candidate.id), key=lambda p: p.number):
            comparison.take(pair)
            run.done = pair.number + 1
        return run

    def _advance(self, run: _Run, candidate: Adapter, live: Adapter) -> str:
        """A few prompts more; why the candidate cannot answer at all, or nothing."""
        if run.comparison.harm or run.comparison.proven:
            return ""
        chosen = run.prompts.take(run.done, self._shadow.at_once)
        after = min(len(run.prompts), run.done + self._shadow.at_once)
        steps = [step for _, step in chosen]
        try:
            ours = self._replay(candidate, steps) if steps else []
        except AdapterError as e:
            return str(e)
        lives = self._replay(live, steps) if steps else []
        made = [self._pair(candidate, run, *one) for one in zip(chosen, ours, lives, strict=True)]
        pairs = [pair for pair in made if pair is not None]
        self._shelf.change(put=pairs)
        for pair in pairs:
            run.comparison.take(pair)
        run.done = after
        return ""

    def _pair(
        self, candidate: Adapter, run: _Run, chosen: tuple[int, Step], ours: Step | None, live: Step | None
    ) -> ShadowPair | None:
        """None where the live adapter has no answer either: that says nothing."""
        number, step = chosen
        if live is None:
            log.warning("%s could not be answered again: it is left out of the comparison", step.id)
            return None
        return ShadowPair(
            adapter_id=candidate.id,
            step_id=step.id,
            number=number,
            skill=step.skill,
            guards=(1.0,) * len(GUARDS) if ours is None else guards(ours, run.usual.tokens, self._unsound(ours)),
            live_guards=guards(live, run.usual.tokens, self._unsound(live)),
            reward=None if ours is None else self._reward(step, ours),
            live_reward=self._reward(step, live),
        )

    def _reward(self, step: Step, answered: Step) -> float | None:
        """In [0, 1]; None where there is no critic, or it does not judge. It sees the episode up to that answer."""
        if self._judge is None:
            return None
        episode = self._store.episode(step.episode_id)
        before = [] if episode is None else [s for s in episode.steps if s.created_at < step.created_at]
        told = self._judge(Episode(id=step.episode_id, steps=(*before, answered)))
        if not isinstance(told, Feedback) or told.kind not in ("score", "outcome") or told.value is None:
            return None
        return (told.value + 1.0) / 2.0 if -1.0 <= told.value <= 1.0 else None

    def _verdict(
        self, candidate: Adapter, live: Adapter, decision: Decision, reason: str, evidence: dict[str, float]
    ) -> Verdict:
        return ruling(self.name, candidate, live, self._clock(), decision, reason, evidence)


def as_answered(step: Step, adapter: Adapter, **answer: object) -> Step:
    """The same request under another adapter; ``answer``: text, completion_ids, logprobs and finish_reason."""
    told: dict[str, object] = {"adapter_id": adapter.id, "adapter_sha256": adapter.sha256, "stage": "shadow"}
    plain: dict[str, object] = {"memory": {}, "drawn_logprobs": (), "coin": {}, "chain_key": ""}
    return replace(step, **(told | plain | answer))  # type: ignore[arg-type]
