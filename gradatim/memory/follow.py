"""Follows the log: feedback becomes memory within a fraction of a second, whoever gave it and wherever it came in.

It runs beside the server, since that is where memory is read. Each case is judged by the same reward model and credit
assigner as in learning, but at once: an episode that is judged again, revised or retracted is remembered anew. Then
keys are made for what lacks one in a space that requests come in: after a promotion, a restart, or for answers given
while memory was off. Until then the keys of another space stand in for them where a check allows it: steps that are
placed by the new weights must be nearest to themselves among the old keys. Whatever fails is counted and tried again;
nothing here ever ends serving.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gradatim.config import RewardConfig
from gradatim.errors import GradatimError, OverloadedError, UnknownAdapterError
from gradatim.memory.decisions import CURSOR, DecisionMemory
from gradatim.memory.entries import entries_of
from gradatim.memory.key_space import KeySpace, Turn
from gradatim.memory.tell import Teller
from gradatim.opinions import on_own_steps, without_held_out
from gradatim.protocols import CreditAssigner, RewardModel, Store, Tokenizer
from gradatim.types import DRIFT, AdapterId, Case, MemoryUse, Step, StepId, Verdict, is_new_world

log = logging.getLogger(__name__)
WORLDS = "memory.worlds"  # cursor: of each new world up to here an epoch was begun
POLL_S = 0.1
LEDGER_S = 2.0
_LONGEST_PAUSE_S = 10.0
_CASES = 50  # in one turn
_KEYS = 8  # made in one turn, one after the other: requests go first
PROBES = 64  # steps on which the keys of another space are checked
_FOUND = 0.95  # share of them that must find themselves
Place = Callable[[Step, AdapterId], Awaitable[NDArray[np.float32]]]


class Follower:
    """``place`` gives the state of a step under some weights; ``teller`` fills the token memory, if there is one."""

    def __init__(
        self,
        memory: DecisionMemory,
        store: Store,
        *,
        reward_model: RewardModel,
        credit: CreditAssigner,
        tokenizer: Tokenizer,
        place: Place,
        teller: Teller | None = None,
        rewards: RewardConfig | None = None,
    ) -> None:
        self._rewards = rewards or RewardConfig()
        self._teller = teller
        self._memory, self._store, self._place = memory, store, place
        self._reward_model, self._credit, self._tokenizer = reward_model, credit, tokenizer
        self._looked = -1  # position of the newest verdict on the world; before the first look there is none
        self._tried: dict[str, list[bool]] = {}  # space -> probes that found themselves
        self._looked_around_at = -LEDGER_S
        self._skipped: set[tuple[StepId, str]] = set()  # that cannot be placed

    async def watch(self) -> None:
        failures = 0
        while True:
            try:
                worked = await self.turn()
                failures = 0
            except Exception as e:
                failures += 1
                worked = False
                self._memory.counts["failed"] += 1
                log.error("memory could not follow the feedback: %s", e, exc_info=not isinstance(e, GradatimError))
            if not worked:
                await asyncio.sleep(min(POLL_S * 2**failures, _LONGEST_PAUSE_S))

    async def turn(self) -> bool:
        """Take in new feedback, or else make some keys. True if anything was done."""
        if await asyncio.to_thread(self.take):
            return True
        await self._look_around()
        placed = (self._memory.config.decisions or self._memory.config.retrieval) and await self.tend()
        told = self._teller is not None and await self._teller.turn()
        return placed or told

    async def _look_around(self) -> None:
        """Now and then: the ledger is written by the loop's process, or by hand, and keys have become more or fewer."""
        if time.monotonic() - self._looked_around_at >= LEDGER_S:
            await asyncio.to_thread(self._memory.reread_retired)
            await asyncio.to_thread(self._memory.maintain)
            self._looked_around_at = time.monotonic()

    # ------------------------------------------------------------------------------------ feedback -> entries

    def take(self) -> bool:
        self._begin_epochs()
        cases = self._store.cases(after=self._store.cursor(CURSOR), limit=_CASES)
        for case in cases:
            self._remember(case)
        return bool(cases)

    def _begin_epochs(self) -> None:
        """Where the world was found to have changed, what is remembered of the old one counts no more."""
        if self._looked < 0:
            self._looked = self._store.cursor(WORLDS)
        for position, verdict in self._store.read(Verdict, after=self._looked, gate=DRIFT):
            if is_new_world(verdict):
                made = self._memory.epoch(None, actor=DRIFT, reason=verdict.reason, cursors={WORLDS: position})
                log.warning("epoch %d of the memory has begun: %s", made.number, verdict.reason)
            self._looked = position

    def _remember(self, case: Case) -> None:
        case = without_held_out(case, self._rewards)
        reward = self._reward_model.score(case)
        if reward.value is None:
            case = on_own_steps(case)
        credit = self._credit.assign(case, reward)
        entries = entries_of(
            case,
            reward,
            credit,
            tenant=lambda step: self._memory.tenant(step.user),
            tokenizer=self._tokenizer,
            answer=lambda step_id: self._store.step(id=step_id),
        )
        shares = dict(zip(credit.step_ids, credit.advantages, strict=True))
        uses = [use for step in case.episode.steps for use in _uses(step, shares.get(step.id, 0.0))]
        answers = [step.id for step in case.episode.steps if step.memory]
        self._memory.write(case.episode.id, entries, uses, answers, cursor=case.position)

    # -------------------------------------------------------------------------------------------- keys

    async def tend(self) -> bool:
        """Make a few keys. An engine that is busy is left alone."""
        found = self._memory.unkeyed(_KEYS + len(self._skipped))
        lacking = [(step_id, space) for step_id, space in found if (step_id, space.id) not in self._skipped]
        for step_id, space in lacking[:_KEYS]:
            self._tried.setdefault(space.id, [])
            try:
                await self._make_key(step_id, space)
            except OverloadedError:
                return False
            except UnknownAdapterError:
                self._memory.unwanted(space.id)
                return True
        if not lacking:
            self._memory.tended()
            for space_id in [s for s in self._tried if self._tried[s]]:
                self._memory.bridge(space_id, None)  # it has all of its own keys
                self._tried[space_id] = []
        return bool(lacking)

    async def _make_key(self, step_id: StepId, space: KeySpace[Turn]) -> None:
        step = await asyncio.to_thread(self._store.step, id=step_id)
        try:
            if step is None:
                raise ValueError("it is not in the store")
            key = space.key(await self._place(step, space.adapter_id))
        except (OverloadedError, UnknownAdapterError):
            raise
        except (GradatimError, ValueError) as e:
            self._skipped.add((step_id, space.id))
            self._memory.counts["unreadable"] += 1
            log.warning("step %s has no key: %s", step_id, e)
            return
        other = self._memory.fullest(but=space.id)
        if other is not None and len(self._tried.get(space.id, [])) < PROBES:
            found = self._memory.finds_itself(step_id, key, other)
            if found is not None:
                self._probe(space.id, other, found)
        await asyncio.to_thread(self._memory.put_key, step_id, space.id, key)

    def _probe(self, space: str, other: str, found: bool) -> None:
        """Old keys stand in from the first few probes on, for as long as enough of them find themselves."""
        probes = self._tried.setdefault(space, [])
        probes.append(found)
        good = len(probes) >= 4 and enough(probes)
        self._memory.bridge(space, other if good else None)


def _uses(step: Step, share: float) -> Iterator[MemoryUse]:
    """What an answer came to for the entries that were for it: far ones had less of a say. Older records do not tell
    how far, and what only stood in the prompt was there in full."""
    if not share:
        return
    reach = step.memory.get("reach", ())
    for i, entry_id in enumerate(step.memory.get("for", ())):
        yield MemoryUse(answer_id=step.id, entry_id=entry_id, value=share * (reach[i] if i < len(reach) else 1.0))


def enough(probes: Sequence[bool]) -> bool:
    return sum(probes) >= _FOUND * len(probes)
