"""From fast memory to slow: what the weights know by themselves is retired, what memory keeps supplying is rehearsed.

After a promotion every answer that counts as good is scored without memory, teacher-forced, under the adapter that is
live: on its own prompt, and on the prompts of the nearest other steps where the same answer was right, which stand for
paraphrases. What is known in all these places is entered into a ledger, under the digest of these weights; what was
said against the answer that it replaced goes with it. It is silent at its own place from then on, and speaks elsewhere
as before: what was not looked at, memory must not lack. Nothing is deleted. Other weights have no such rows, so after
the next promotion or a rollback an entry counts again until it was looked at anew.

It runs where the weights can be read: in the loop's process, or by hand. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradatim.config import MemoryConfig
from gradatim.errors import AdapterError, GradatimError
from gradatim.memory.contents import SAME_PLACE, Contents
from gradatim.memory.upkeep import read_into
from gradatim.protocols import Scorer, Shelf, Store
from gradatim.types import (
    Adapter,
    CaseScore,
    Example,
    MemoryEntry,
    MemoryRetirement,
    MemoryUse,
    Stage,
    Step,
    StepId,
)

log = logging.getLogger(__name__)
SURE = 0.5  # chance of the whole answer on its own prompt
LIKE = 0.4  # cosine of a step that stands for a paraphrase
PARAPHRASES = 2  # of each entry, at most
MOST = 256  # entries looked at in one run, those that helped most first
SUPPLIED = 2  # answers that an entry helped, net, before it is rehearsed first


@dataclass(frozen=True, slots=True)
class Looked:
    """One entry under the live weights."""

    entry: MemoryEntry
    chance: float
    paraphrases: int
    known: bool


class Consolidation:
    """``name``: of the agent, whose live adapter is looked at."""

    def __init__(
        self,
        store: Store,
        shelf: Shelf,
        scorer: Scorer,
        config: MemoryConfig,
        name: str,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._shelf, self._scorer = store, shelf, scorer
        self._config, self._name, self._clock = config, name, clock
        self._done: str | None = None  # digest of the adapter that was looked at last

    def turn(self) -> None:
        """Run where other weights are live than the last time. What fails is logged: learning goes on."""
        live = live_adapter(self._store, self._name)
        if live is None or live.sha256 == self._done:
            return
        self._done = live.sha256
        if live.step == 0:
            return
        try:
            told = self.run()
            log.info("%s: %d of %d remembered answers are retired", live.id, told["retired"], told["looked_at"])
        except AdapterError:
            raise
        except GradatimError as e:
            log.error("memory was not consolidated: %s", e)

    def run(self) -> dict[str, Any]:
        """Retire what the live adapter knows. Says what it did. StoreError, AdapterError, LearnerError."""
        live = live_adapter(self._store, self._name)
        if live is None:
            return {"adapter": None, "looked_at": 0, "retired": 0, "entries": []}
        contents = read_into(Contents(by_scope=self._config.scopes == "system"), self._shelf)
        settled = {
            (row.entry_id, row.position) for row in self._shelf.load(MemoryRetirement, adapter_sha256=live.sha256)
        }
        looked = self._look(live, contents, [e for e in _good(contents) if (e.id, e.position) not in settled][:MOST])
        self._shelf.change(put=[row for one in looked if one.known for row in self._rows(one, live, contents)])
        return {
            "adapter": live.id,
            "looked_at": len(looked),
            "retired": sum(one.known for one in looked),
            "entries": [_told(one, contents) for one in looked],
        }

    def _look(self, live: Adapter, contents: Contents, entries: Sequence[MemoryEntry]) -> list[Looked]:
        space = contents.fullest()  # keys of one space can be compared, whichever it is
        out: list[Looked] = []
        for entry in entries:
            steps = [self._store.step(id=i) for i in (entry.step_id, *_alike(entry, contents, space))]
            cases = [_case(entry, step) for step in steps if step is not None]
            if steps[0] is None:
                continue
            scores = self._scorer.score(live, cases)
            chance = math.exp(scores[0].logprob * len(entry.tokens))
            out.append(Looked(entry, chance, len(cases) - 1, _is_known(scores, chance)))
        return out

    def _rows(self, one: Looked, live: Adapter, contents: Contents) -> list[MemoryRetirement]:
        """Of the entry, and of what was said against another answer at the same step."""
        return [
            MemoryRetirement(
                id=f"r-{uuid.uuid4().hex}",
                entry_id=entry_id,
                position=contents.entries[entry_id].position,
                adapter_sha256=live.sha256,
                adapter_id=live.id,
                chance=one.chance,
                created_at=self._clock(),
            )
            for entry_id in contents.by_step[one.entry.step_id]
            if entry_id == one.entry.id or contents.entries[entry_id].value < 0.0
        ]


def live_adapter(store: Store, name: str) -> Adapter | None:
    """None before the first start."""
    for adapter_id in store.stages(name, Stage.LIVE):
        for _, adapter in store.newest(Adapter, id=adapter_id):
            return adapter
    return None


def undo(shelf: Shelf, store: Store, name: str, *, clock: Callable[[], float] = time.time) -> dict[str, Any]:
    """Let everything count again that the live adapter made needless; it is not retired again under this one."""
    live = live_adapter(store, name)
    rows = [] if live is None else shelf.load(MemoryRetirement, adapter_sha256=live.sha256)
    undone = [replace(row, undone_at=clock()) for row in rows if row.undone_at is None]
    shelf.change(put=undone)
    return {"adapter": None if live is None else live.id, "undone": len(undone)}


def supplied(shelf: Shelf, adapter_sha256: str) -> list[StepId]:
    """The steps whose answers memory keeps having to supply, the most used first."""
    known = {row.entry_id for row in shelf.load(MemoryRetirement, adapter_sha256=adapter_sha256) if not row.undone_at}
    net: Counter[str] = Counter()
    for use in shelf.load(MemoryUse):
        net[use.entry_id] += 1 if use.value > 0.0 else -1
    steps = {e.id: e.step_id for e in shelf.load(MemoryEntry) if e.value > 0.0 and e.id not in known}
    wanted = [i for i, count in net.most_common() if count >= SUPPLIED and i in steps]
    return list(dict.fromkeys(steps[i] for i in wanted))


def _good(contents: Contents) -> list[MemoryEntry]:
    def rank(entry: MemoryEntry) -> tuple[int, float, str]:
        helped, harmed = contents.helped(entry.id)
        return harmed - helped, -entry.created_at, entry.id

    return sorted(contents.told(), key=rank)


def _alike(entry: MemoryEntry, contents: Contents, space: str | None) -> list[StepId]:
    """The nearest steps of the tenant, in other words, at which the same answer was judged good."""
    whose = contents.whose_is(entry)
    index = contents.indexes.get((whose, space or ""))
    if index is None or entry.step_id not in index:
        return []
    near = contents.near(whose, space or "", None, index.of(entry.step_id)[0], LIKE)
    steps = [e.step_id for e, cosine in near if e.value > 0.0 and e.tokens == entry.tokens and cosine < SAME_PLACE]
    return list(dict.fromkeys(steps))[:PARAPHRASES]


def _case(entry: MemoryEntry, step: Step) -> Example:
    return Example(
        id=f"{entry.id}#{entry.position} at {step.id}",
        created_at=entry.created_at,
        episode_id=step.episode_id,
        step_id=step.id,
        prompt_ids=step.prompt_ids,
        chosen_ids=entry.tokens,
        origin="memory",
    )


def _is_known(scores: Sequence[CaseScore], chance: float) -> bool:
    return chance >= SURE and all(score.greedy for score in scores)


def _told(one: Looked, contents: Contents) -> dict[str, Any]:
    helped, harmed = contents.helped(one.entry.id)
    told = {"helped": helped, "harmed": harmed, "chance": one.chance, "paraphrases": one.paraphrases}
    return {"id": one.entry.id, "tenant": one.entry.tenant, **told, "retired": one.known}
