"""The learning loop: everything that happens between a user's thumb and a better model.

    Feedback -> Reward -> Credit -> Example -> Update -> Adapter -> Verdict -> Move

It knows no concrete class, only protocols, and keeps no state but cursors in the store: it may be killed at any point
and started again. One candidate at a time is on its way up, or the learner would run ahead of what the gates judge.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import islice

from gradatim.config import LearnerConfig, LoopConfig, RewardConfig
from gradatim.errors import DamagedAdapterError, StoreError
from gradatim.opinions import on_own_steps, without_held_out
from gradatim.protocols import CreditAssigner, ExampleBuilder, Gate, Learner, Replay, RewardModel, Store
from gradatim.silence import SILENT, Silence
from gradatim.types import (
    APPROVAL,
    ON_THE_WAY,
    Adapter,
    AdapterId,
    Case,
    Decision,
    Example,
    Move,
    Record,
    Reward,
    Stage,
    Step,
    StepId,
    Update,
    Verdict,
)

log = logging.getLogger(__name__)

JUDGED = "loop.judged"  # cursor: feedback up to here has been turned into rewards
LEARNED = "loop.learned"  # cursor: examples up to here have been given to the learner
SECOND_CHANCE_AMONG = 64  # updates of the live adapter; what was refused before them is not tried again
FRESH = 8  # answers to users on which a candidate's distance from the live adapter is measured
_SUPPLIED_NATS = math.log(10.0)
WATCH = "watch"  # the actor of its moves
SMALLEST_STEP = 0.25  # of a trained change: a smaller share of it is not worth a verdict


def is_ripe(examples: Sequence[Example], live: AdapterId, config: LearnerConfig, now: float) -> bool:
    """Whether an update should be made of these: they show enough good answers, or the oldest one has waited its time
    and there is something to replay beside them. A handful alone moves the weights at random, and bad answers alone
    teach nothing but to say something else."""
    good = [e for e in examples if e.instructive]
    if len(good) >= config.min_examples:
        return True
    waited_s = now - min((e.created_at for e in good), default=now)
    return bool(good) and not live.endswith("@0") and waited_s >= config.max_wait_s


@dataclass(frozen=True, slots=True)
class Waiting:
    """Examples for the next update, the cursor after them, and how many were passed over before it."""

    cursor: int
    examples: Sequence[Example]
    passed_over: int


def _is_supplied(step: Step) -> bool:
    """Whether the weights alone would have said it a tenth as often as they did with what a memory added."""
    return bool(step.drawn_logprobs) and sum(step.drawn_logprobs) - sum(step.logprobs) > _SUPPLIED_NATS


def _is_unknown(judgement: Sequence[Record]) -> bool:
    return any(isinstance(r, Reward) and r.value is None for r in judgement)


@dataclass(slots=True, kw_only=True)
class Loop:
    """``gates``: what an adapter in a stage must pass, in order, to move to that stage's entry in ``path``."""

    name: str
    store: Store
    reward_model: RewardModel
    credit: CreditAssigner
    examples: ExampleBuilder
    replay: Replay
    learner: Learner
    gates: Mapping[Stage, Sequence[Gate]]
    path: Mapping[Stage, Stage] = field(default_factory=lambda: {Stage.CANDIDATE: Stage.LIVE})
    config: LoopConfig = field(default_factory=LoopConfig)
    learning: LearnerConfig = field(default_factory=LearnerConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    cool_down_s: float = 0.0  # after the watch rolled back
    clock: Callable[[], float] = time.time

    def turn(self, *, flush: bool = False) -> bool:
        """Judge what is new, decide on the adapter on its way up, or else learn. True if anything was done.

        ``flush`` waits for nothing: neither for an episode to settle nor for a batch to fill.
        """
        judged = self.judge(flush=flush)
        if not self.watch():
            return judged
        candidate = self._on_the_way()
        try:
            if candidate is not None:
                return self.decide(*candidate) or judged
            return self.learn(flush=flush) or judged
        except DamagedAdapterError as e:
            if e.adapter_id != self._live():
                raise
            self._step_back(str(e))
            return True

    # ------------------------------------------------------------------ feedback -> examples

    def judge(self, *, flush: bool = False) -> bool:
        """Every episode that feedback touched gets a reward (or an abstention), credit and examples, in one write."""
        worked = self._judge_silent() if self.rewards.silence_s else False
        while cases := self.store.cases(after=self.store.cursor(JUDGED)):
            for case in cases:
                if not (flush or self._settled(case)):
                    return worked
                self.store.append(*self._judgement(case), cursors={JUDGED: case.position})
                worked = True
        return worked

    def _judge_silent(self) -> bool:
        """Some of the episodes that nobody said anything of. Of those that cannot be judged nothing is recorded."""
        before = self.store.cursor(SILENT)
        cases, at = Silence(self.store, self.rewards.silence_s, self.clock).look(self.store.cursor(JUDGED))
        judged = (self._judgement(case) for case in cases)
        known = [r for records in judged for r in records if not _is_unknown(records)]
        if at != before:
            self.store.append(*known, cursors={SILENT: at})
        return bool(known)

    def _settled(self, case: Case) -> bool:
        """It has an outcome, or its newest feedback has been the last for a while."""
        final = any(f.kind == "outcome" for f in case.feedback)
        return final or self.clock() - case.touched_at >= self.config.settle_s

    def _judgement(self, case: Case) -> Sequence[Record]:
        said, case = case.feedback, without_held_out(case, self.rewards)
        if said and not case.feedback and not self.store.newest(Reward, episode_id=case.episode.id):
            return []  # only those who are kept for judging spoke
        reward = self.reward_model.score(case)
        if reward.value is None:  # never trained on; but what was said of single steps needs no reward
            case = on_own_steps(case)
        credit = self.credit.assign(case, reward)
        return [reward, credit, *self.examples.build(case, reward, credit)]

    # ------------------------------------------------------------------ examples -> candidate

    def waiting(self, beside: int = 0) -> Waiting:
        """What the next update would learn from, with room left for ``beside``.

        Of bad answers without a good one to the same prompt it takes the first few and passes over the others, which
        have their use when a good one comes and makes a pair of them; and so over what is more than one named user's
        share.
        """
        most = max(self.learning.max_examples - beside, self.learning.min_examples)
        alone, of_one = most // 8, max(1, int(self.learning.user_share * most))
        newest: dict[str, Example] = {}
        passed_over = 0
        cursor = self.store.cursor(LEARNED)
        for position, example in self._examples_after(cursor):
            usable = not example.retained and bool(example.chosen_ids or example.rejected_ids)
            if usable and example.step_id not in newest and len(newest) == most:
                break
            cursor = position
            newest.pop(example.step_id, None)
            if not usable:
                continue
            flooded = example.user and sum(e.user == example.user for e in newest.values()) >= of_one
            if flooded or (not example.instructive and sum(not e.instructive for e in newest.values()) >= alone):
                passed_over += 1
                continue
            newest[example.step_id] = example
        return Waiting(cursor, list(newest.values()), passed_over)

    def _examples_after(self, position: int) -> Iterator[tuple[int, Example]]:
        while page := self.store.read(Example, after=position, limit=200):
            yield from page
            position = page[-1][0]

    def learn(self, *, flush: bool = False) -> bool:
        """One update from what waits, if there is enough of it."""
        live = self._adapter(self._live())
        refused = self._second_chance(live)
        waiting = self.waiting(beside=len(refused))
        examples = waiting.examples
        if not examples or not (flush or is_ripe(examples, live.id, self.learning, self.clock())):
            return False
        revised = {e.step_id for e in examples}
        examples = [*(e for e in refused if e.step_id not in revised), *examples]
        replay = self.replay.draw(self.learning.replayed(len(examples)), exclude=frozenset(e.id for e in examples))
        traffic = self._traffic(but={e.step_id for e in examples})
        good = frozenset(s.id for s in traffic if self._is_good(s))
        update, adapter = self.learner.update(examples, replay, live, self._next_step(), traffic, good)
        update = replace(update, metrics={**update.metrics, "passed_over": float(waiting.passed_over)})
        made: list[Record] = [update] if adapter is None else [update, adapter]
        self.store.append(*made, cursors={LEARNED: waiting.cursor})
        return True

    def _traffic(self, but: Set[StepId]) -> Sequence[Step]:
        """The newest answers to users, ``but`` those that are trained on now, which say nothing about what is not; and
        without those known to be bad, which are to change, and those that a memory supplied, which adapters had yet to
        learn. They are the live adapter's or, while it is young, those of the ones that were live just before."""
        newest = (s for _, s in self.store.newest(Step, limit=16 * FRESH) if s.id not in but)
        routed = (s for s in newest if s.stage == Stage.LIVE and s.adapter_id.rpartition("@")[0] == self.name)
        whole = (s for s in routed if s.trainable and s.finish_reason != "aborted" and s.completion_ids)
        return list(islice((s for s in whole if not _is_supplied(s) and not self._is_bad(s)), FRESH))

    def _is_bad(self, step: Step) -> bool:
        return any(e.rejected_ids == step.completion_ids for _, e in self.store.newest(Example, step_id=step.id))

    def _is_good(self, step: Step) -> bool:
        return any(e.chosen_ids == step.completion_ids for _, e in self.store.newest(Example, step_id=step.id))

    def _second_chance(self, live: Adapter) -> Sequence[Example]:
        """What the gate refused last joins the next update once: a few examples more often do harm by themselves than
        in company. Refused twice, they are out for good; so are those of an update most of which no outcome bore out,
        or they would pass unseen among others."""
        made = self.store.newest(Update, parent_id=live.id, limit=SECOND_CHANCE_AMONG)
        refused = (update for _, update in made if self._refused_whole(update))  # newest first
        last, before = next(refused, None), next(refused, None)
        if last is None:
            return []
        twice = before.example_ids if before else ()
        found = [e for i in last.example_ids if i not in twice for _, e in self.store.newest(Example, id=i)]
        return found if last.is_borne_out else [e for e in found if e.verified]

    def _refused_whole(self, update: Update) -> bool:
        """By the gates, and not as a smaller share of a step that was refused before."""
        if update.adapter_id is None or update.scale < 1.0:
            return False
        return any(m.after is Stage.REJECTED for _, m in self.store.newest(Move, adapter_id=update.adapter_id))

    # ------------------------------------------------------------------ live, or not any longer

    def watch(self) -> bool:
        """Whether the live adapter is thought sound; while it is not, nothing is learned and nothing moves up. One that
        the gates of its stage speak against is rolled back here, and what made it is not trained on again: it is in no
        live adapter's lineage."""
        gates = self.gates.get(Stage.LIVE, ())
        if not gates:
            return True
        live = self._adapter(self._live())
        last_good = self._last_good(live)
        sound = not self._is_cooling_down()
        if last_good is None:
            return sound
        for gate in gates:
            verdict = gate.check(live, self._adapter(last_good), self._anchor())
            if verdict.decision in (Decision.FAIL, Decision.REPAIR):
                self._roll_back(live.id, last_good, verdict)
                return False
            self._tell(verdict)
            sound = sound and verdict.decision is Decision.PASS
        return sound

    def _roll_back(self, live: AdapterId, last_good: AdapterId, verdict: Verdict) -> None:
        log.error("%s is rolled back: %s; %s is live again", live, verdict.reason, last_good)
        off = self._move(live, Stage.LIVE, Stage.ROLLED_BACK, verdict.reason)
        on = self._move(last_good, Stage.RETIRED, Stage.LIVE, verdict.reason)
        self.store.move(replace(off, actor=WATCH), replace(on, actor=WATCH), verdicts=[verdict])

    def _is_cooling_down(self) -> bool:
        """The watch rolled back a short while ago."""
        rolled_back = (m for _, m in self.store.newest(Move, limit=64) if m.actor == WATCH)
        return any(self.clock() - m.created_at < self.cool_down_s for m in rolled_back)

    def _tell(self, verdict: Verdict) -> None:
        """Record what the router goes by, where it changed: the share that a gate gives to an arm."""
        share = verdict.evidence.get("share")
        told = self.store.newest(Verdict, adapter_id=verdict.adapter_id, gate=verdict.gate)
        if share is not None and (not told or told[0][1].evidence.get("share") != share):
            self.store.append(verdict)

    # ------------------------------------------------------------------ candidate -> live, or not

    def decide(self, adapter: Adapter, stage: Stage) -> bool:
        """Ask the gates of its stage in order; the first that does not pass decides."""
        live = self._live()
        verdicts: list[Verdict] = []
        for gate in self.gates.get(stage, ()):
            verdicts.append(gate.check(adapter, self._adapter(live), self._anchor()))
            if verdicts[-1].decision is not Decision.PASS:
                break
        decision = verdicts[-1].decision if verdicts else Decision.FAIL  # no gate, no evidence: it does not move
        reason = verdicts[-1].reason if verdicts else f"no gate is set for stage {stage}"
        if decision is Decision.WAIT:
            self._tell(verdicts[-1])
            return False
        after = self.path[stage] if decision is Decision.PASS else self._out(stage, verdicts)
        update = self._update(adapter) if decision is Decision.REPAIR else None
        if update is not None:
            reason += "; half of the step is tried"
        moves = [self._move(adapter.id, stage, after, reason)]
        if after is Stage.LIVE:
            moves.insert(0, self._move(live, Stage.LIVE, Stage.RETIRED, f"replaced by {adapter.id}"))
        self.store.move(*moves, verdicts=verdicts)
        if update is not None:  # killed before this, the examples still have their second chance
            self.store.append(*self.learner.shrink(update, adapter, self._adapter(live), self._next_step()))
        return True

    def _out(self, stage: Stage, verdicts: Sequence[Verdict]) -> Stage:
        """Rejected; rolled back where it did harm to users, so that its examples get no second chance."""
        harmful = stage is Stage.CANARY and not (verdicts and verdicts[-1].evidence.get("expired"))
        return Stage.ROLLED_BACK if harmful else Stage.REJECTED

    def _update(self, adapter: Adapter) -> Update | None:
        """What made it, where a smaller step may still be tried: never of what no outcome bears out, whichever gate
        asks for it."""
        for _, update in self.store.read(Update, id=adapter.update_id):
            return update if update.scale > SMALLEST_STEP and update.is_borne_out else None
        return None

    def _move(self, adapter_id: AdapterId, before: Stage, after: Stage, reason: str) -> Move:
        return Move(
            adapter_id=adapter_id, created_at=self.clock(), before=before, after=after, actor="loop", reason=reason
        )

    def _step_back(self, reason: str) -> None:
        """The live adapter cannot be learned from for good, nor be served after a restart: its newest ancestor that
        was live takes its place, as the server would have it at its next start."""
        live = self._adapter(self._live())
        at = self._last_good(live)
        if at is None:
            raise StoreError(f"{reason}; and it has no ancestor to go back to")
        log.error("%s; %s is live again", reason, at)
        self.store.move(
            self._move(live.id, Stage.LIVE, Stage.ROLLED_BACK, reason),
            self._move(at, Stage.RETIRED, Stage.LIVE, reason),
        )

    # ------------------------------------------------------------------ look-ups

    def _last_good(self, live: Adapter) -> AdapterId | None:
        """Its newest ancestor that was live and was not rolled back."""
        retired, at = self.store.stages(self.name, Stage.RETIRED), live.parent_id
        while at is not None and at not in retired:
            at = self._adapter(at).parent_id
        return at

    def _anchor(self) -> Adapter:
        """The last adapter that a person approved and that was not taken back since, or the base."""
        out = self.store.stages(self.name, Stage.ROLLED_BACK, Stage.REJECTED)
        for _, approval in self.store.newest(Verdict, gate=APPROVAL, limit=100):
            if approval.adapter_id.rpartition("@")[0] == self.name and approval.adapter_id not in out:
                return self._adapter(approval.adapter_id)
        return self._adapter(AdapterId(f"{self.name}@0"))

    def _on_the_way(self) -> tuple[Adapter, Stage] | None:
        for adapter_id, stage in self.store.stages(self.name, *ON_THE_WAY).items():
            return self._adapter(adapter_id), stage
        return None

    def _next_step(self) -> int:
        return 1 + max(adapter.step for _, adapter in self.store.newest(Adapter, name=self.name))

    def _live(self) -> AdapterId:
        for adapter_id in self.store.stages(self.name, Stage.LIVE):
            return adapter_id
        raise StoreError(f"{self.name} has no live adapter: start `gradatim serve` on this data directory once")

    def _adapter(self, adapter_id: AdapterId) -> Adapter:
        for _, adapter in self.store.read(Adapter, id=adapter_id):
            return adapter
        raise StoreError(f"{adapter_id} has a stage but no record")
