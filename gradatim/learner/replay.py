"""What to rehearse: the examples that made the live adapter and its ancestors, drawn evenly over skills and origins.

Kept in memory is only an index (a reservoir of ids); examples are read from the store when they are drawn. The log
is read once, in order, and then only its new end. It knows no tokens and no losses.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TypeVar

from gradatim.protocols import Store
from gradatim.types import AdapterId, Example, Record, Stage, StepId, Update

CAPACITY = 20_000  # steps in the index; beyond it a uniform sample of them

R = TypeVar("R", bound=Record)


@dataclass(slots=True)
class _Entry:
    """The newest revision of one step's example, and the adapter that was trained on it."""

    id: str
    step_id: StepId
    skill: str
    origin: str
    position: int
    rehearsable: bool  # has a good answer, and is not kept for the gate
    adapter_id: AdapterId | None = None


class StoreReplay:
    """A ``protocols.Replay`` over the store's log.

    Never drawn: examples that are not in the live adapter's lineage (refused, rejected, rolled back and whatever was
    built on those), retained and withdrawn ones, superseded revisions, and answers to avoid, which would be pushed
    down again and again against an ever newer parent.
    """

    def __init__(self, store: Store, name: str, seed: int, capacity: int = CAPACITY) -> None:
        self._store = store
        self._name = name
        self._seed = seed
        self._capacity = capacity
        self._entries: list[_Entry] = []
        self._slot: dict[StepId, int] = {}
        self._by_id: dict[str, _Entry] = {}
        self._parents: dict[AdapterId, AdapterId] = {}
        self._arrived = 0  # steps seen so far
        self._reservoir = random.Random(seed)
        self._examples_read = 0  # store positions
        self._updates_read = 0

    def draw(self, n: int, *, exclude: Set[str] = frozenset()) -> Sequence[Example]:
        """Up to ``n`` examples, no two of one step, none whose id is in ``exclude``."""
        if n <= 0:
            return []
        self._catch_up()
        lineage = self._lineage()
        strata: dict[tuple[str, str], list[_Entry]] = defaultdict(list)
        for entry in self._entries:
            if entry.adapter_id in lineage and entry.rehearsable and entry.id not in exclude:
                strata[entry.skill, entry.origin].append(entry)
        rng = random.Random(f"{self._seed}:{self._updates_read}")
        chosen = _in_turns([_shuffled(strata[key], rng) for key in sorted(strata)], n, rng)
        return [example for entry in chosen for _, example in self._store.read(Example, id=entry.id, limit=1)]

    def _lineage(self) -> Set[AdapterId]:
        """The live adapter and its ancestors, without the base."""
        stages = self._store.stages(self._name)
        at = next((a for a, stage in stages.items() if stage is Stage.LIVE), None)
        lineage: set[AdapterId] = set()
        while at in self._parents:
            lineage.add(at)
            at = self._parents[at]
        return lineage

    def _catch_up(self) -> None:
        for position, example in self._new(Example, self._examples_read):
            self._examples_read = position
            self._note(position, example)
        for position, update in self._new(Update, self._updates_read):
            self._updates_read = position
            if update.adapter_id is not None:
                self._parents[update.adapter_id] = update.parent_id
            for example_id in update.example_ids if update.applied else ():
                if (entry := self._by_id.get(example_id)) is not None:
                    entry.adapter_id = update.adapter_id

    def _new(self, kind: type[R], after: int) -> Iterator[tuple[int, R]]:
        while rows := self._store.read(kind, after=after, limit=1000):
            yield from rows
            after = rows[-1][0]

    def _note(self, position: int, example: Example) -> None:
        """Replace an older revision in place; a new step joins the reservoir (Vitter 1985, algorithm R)."""
        rehearsable = bool(example.chosen_ids) and not example.retained
        entry = _Entry(example.id, example.step_id, example.skill, example.origin, position, rehearsable)
        known = self._slot.get(example.step_id)
        if known is not None:
            self._put(known, entry)
            return
        self._arrived += 1
        if len(self._entries) < self._capacity:
            self._entries.append(entry)
            self._index(len(self._entries) - 1, entry)
        elif (slot := self._reservoir.randrange(self._arrived)) < self._capacity:
            self._put(slot, entry)

    def _put(self, slot: int, entry: _Entry) -> None:
        old = self._entries[slot]
        del self._slot[old.step_id], self._by_id[old.id]
        self._entries[slot] = entry
        self._index(slot, entry)

    def _index(self, slot: int, entry: _Entry) -> None:
        self._slot[entry.step_id] = slot
        self._by_id[entry.id] = entry


def _shuffled(entries: Sequence[_Entry], rng: random.Random) -> list[_Entry]:
    """In random order, the newest twice as likely to come early as the oldest (Efraimidis and Spirakis 2006)."""
    oldest_first = sorted(entries, key=lambda e: e.position)
    keys = {e.id: rng.random() ** (1.0 / (1.0 + k / len(entries))) for k, e in enumerate(oldest_first)}
    return sorted(oldest_first, key=lambda e: keys[e.id], reverse=True)


def _in_turns(strata: list[list[_Entry]], n: int, rng: random.Random) -> list[_Entry]:
    """One from each stratum in turn, in a random order of strata, until there are ``n`` or none is left."""
    rng.shuffle(strata)
    out: list[_Entry] = []
    for k in range(max(map(len, strata), default=0)):
        for stratum in strata:
            if k < len(stratum) and len(out) < n:
                out.append(stratum[k])
    return out
