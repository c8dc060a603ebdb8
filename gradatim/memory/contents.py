"""What is remembered, in this process: entries, their keys by tenant and space, what they did, epochs, tombstones.

Made of the shelf at the start and changed after it. No locks and no files: its owner has both.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gradatim.errors import MemoryKeyError
from gradatim.memory.key_index import KeyIndex
from gradatim.memory.key_space import from_bytes
from gradatim.types import (
    EpisodeId,
    MemoryEntry,
    MemoryEpoch,
    MemoryKey,
    MemoryRetirement,
    MemoryUse,
    StepId,
    Tombstone,
)

Floats = NDArray[np.float32]
SAME_PLACE = 0.98  # cosine from which on two steps were asked the same, and not the like in other words
NEIGHBOURS = 64  # places whose judgements count: of thousands, many far ones would outweigh the few near ones


class Whose(NamedTuple):
    """Answers that one request may be changed by; each has an index of its own."""

    tenant: str
    scope: str = ""  # the kind of task


class Drops(Protocol):
    """Something that is made of entries."""

    def drop(self, tenant: str, entry_id: str) -> None:
        """Nothing of that entry is in it when this returns."""


class Contents:
    """Everything that a search or an operator looks at. ``by_scope``: kinds of tasks are kept apart."""

    def __init__(self, *, by_scope: bool) -> None:
        self._by_scope = by_scope
        self.entries: dict[str, MemoryEntry] = {}
        self.by_step: dict[StepId, list[str]] = {}
        self.by_episode: dict[EpisodeId, set[str]] = defaultdict(set)
        self.sizes: Counter[str] = Counter()  # entries by tenant
        self.held: Counter[Whose] = Counter()  # entries by where they count
        self.indexes: dict[tuple[Whose, str], KeyIndex] = {}  # by that and space
        self.versions: Counter[str] = Counter()  # by tenant: rises when something is taken out or changed
        self.epochs: dict[str, MemoryEpoch] = {}
        self.tombstones: list[Tombstone] = []
        self.tokens: Drops | None = None
        self.revision = 0  # rises with every change of what counts
        self.damaged = 0  # keys that could not be read
        self.retired: dict[str, dict[str, int]] = {}  # digest of an adapter -> entry -> its position when it retired
        self._uses: dict[str, dict[StepId, float]] = defaultdict(dict)  # entry -> answers
        self._used_by: dict[StepId, set[str]] = defaultdict(set)  # answer -> entries

    # ------------------------------------------------------------------------------------------- entries

    def put(self, entry: MemoryEntry) -> None:
        """One of the same id is replaced, and keeps its key."""
        self.revision += 1
        self._drop_tokens(entry.id, but=entry)
        if entry.id not in self.entries:
            self.by_step.setdefault(entry.step_id, []).append(entry.id)
            self.by_episode[entry.episode_id].add(entry.id)
            self.sizes[entry.tenant] += 1
            self.held[self.whose_is(entry)] += 1
        else:
            self.versions[entry.tenant] += 1
        self.entries[entry.id] = entry

    def take(self, ids: Iterable[str]) -> None:
        """Out of everything, their keys too."""
        for entry_id in list(ids):
            self.revision += 1
            self._drop_tokens(entry_id)
            entry = self.entries.pop(entry_id, None)
            if entry is None:
                continue
            own = self.whose_is(entry)
            self.by_episode[entry.episode_id].discard(entry_id)
            self.sizes[entry.tenant] -= 1
            self.held[own] -= 1
            self.versions[entry.tenant] += 1
            for answer_id in self._uses.pop(entry_id, {}):
                self._used_by[answer_id].discard(entry_id)
            self.by_step[entry.step_id].remove(entry_id)
            if not self.by_step[entry.step_id]:
                del self.by_step[entry.step_id]
                for (whose, _), index in self.indexes.items():
                    if whose == own:
                        index.remove(entry.step_id)

    def without(self, ids: set[str]) -> list[StepId]:
        """The steps of which nothing would be left."""
        steps = {self.entries[i].step_id for i in ids if i in self.entries}
        return sorted(s for s in steps if set(self.by_step[s]) <= ids)

    def use(self, answers: Iterable[StepId], uses: Iterable[MemoryUse]) -> None:
        """What ``answers`` said of the entries that were for them is replaced by ``uses``."""
        for answer in answers:
            for entry_id in self._used_by.pop(answer, ()):
                self._uses[entry_id].pop(answer, None)
        for use in uses:
            self._uses[use.entry_id][use.answer_id] = use.value
            self._used_by[use.answer_id].add(use.entry_id)

    def helped(self, entry_id: str) -> tuple[int, int]:
        """How many answers it helped, and how many it harmed."""
        values = self._uses.get(entry_id, {}).values()
        return sum(v > 0.0 for v in values), sum(v < 0.0 for v in values)

    def worth(self, entry_id: str) -> float:
        """The sum of what it did: 1 for a good answer at its very place, less for one farther away."""
        return sum(self._uses.get(entry_id, {}).values())

    def retire(self, adapter_sha256: str, ledger: Iterable[MemoryRetirement]) -> None:
        """What these weights know by themselves is replaced by what the ledger says; undone rows say nothing."""
        rows = sorted(ledger, key=lambda row: row.position)  # the newest revision of an entry last
        now = {row.entry_id: row.position for row in rows if row.undone_at is None}
        if now != self.retired.get(adapter_sha256, {}):
            self.retired[adapter_sha256] = now
            for tenant in self.sizes:
                self.versions[tenant] += 1

    def is_known(self, entry: MemoryEntry, adapter_sha256: str) -> bool:
        """Whether these weights were found to know it by themselves."""
        return self.retired.get(adapter_sha256, {}).get(entry.id) == entry.position

    def _drop_tokens(self, entry_id: str, but: MemoryEntry | None = None) -> None:
        """Out of the token memory, unless ``but`` says the same there."""
        entry = self.entries.get(entry_id)
        if self.tokens is None or entry is None or entry.value <= 0.0:
            return
        if but is None or (entry.tenant, entry.tokens) != (but.tenant, but.tokens):
            self.tokens.drop(entry.tenant, entry.id)

    def tells(self, entry: MemoryEntry) -> bool:
        """Whether these tokens may go into a token memory: of an answer that was judged good, of the current epoch."""
        known = self.entries.get(entry.id)
        same = known is not None and (known.tenant, known.tokens) == (entry.tenant, entry.tokens)
        return same and entry.value > 0.0 and entry.epoch >= self.since(entry.tenant)

    def rows(self, tenant: str | None, step_id: str, limit: int) -> list[dict[str, Any]]:
        """The newest entries first; of one tenant or step."""
        found = [
            e for e in self.entries.values() if tenant in (None, e.tenant) and (not step_id or e.step_id == step_id)
        ]
        found.sort(key=lambda e: (e.created_at, e.id), reverse=True)
        return [self.row(entry) for entry in found[:limit]]

    def told(self) -> list[MemoryEntry]:
        """All that may."""
        since = {tenant: self.since(tenant) for tenant in self.sizes}
        return [e for e in self.entries.values() if e.value > 0.0 and e.epoch >= since[e.tenant]]

    # ---------------------------------------------------------------------------------------------- keys

    def put_key(self, kept: MemoryKey) -> None:
        """Counted and left out where it is damaged or has another width; it can be made anew."""
        ids = self.by_step.get(kept.step_id)
        key = read(kept)
        if key is None:
            self.damaged += 1
        if not ids or key is None:
            return
        at = (self.whose_is(self.entries[ids[0]]), kept.space)
        index = self.indexes.setdefault(at, KeyIndex(len(key)))
        try:
            index.replace(kept.step_id, key[None])
        except MemoryKeyError:
            self.damaged += 1

    def has_key(self, step_id: StepId, space: str) -> bool:
        index = self.indexes.get((self.whose_step(step_id), space))
        return index is not None and step_id in index

    def fullest(self, *, but: str = "") -> str | None:
        """The space with most keys; where several have as many, the last by name."""
        sizes: Counter[str] = Counter()
        for (_, space), index in self.indexes.items():
            sizes[space] += len(index) if space != but else 0
        return max((s for s in sizes if sizes[s]), key=lambda space: (sizes[space], space), default=None)

    def without_key(self, space: str) -> Iterator[StepId]:
        """Steps that have none in that space."""
        return (step_id for step_id in self.by_step if not self.has_key(step_id, space))

    def finds_itself(self, step_id: StepId, key: Floats, space: str) -> bool | None:
        """Whether a step, placed by a key of other weights, is nearest to itself in this space (self-retrieval), or to
        one that lies where it does. None where it has no key there."""
        if step_id not in self.by_step or not self.has_key(step_id, space):
            return None
        index = self.indexes[self.whose_step(step_id), space]
        if index.width != len(key):  # made of something else: of other layers, or by an encoder
            return None
        ((nearest, _),) = index.near(key, 1)
        return nearest == step_id or float(index.of(step_id)[0] @ index.of(nearest)[0]) > 0.999

    def whose(self, tenant: str, scope: str) -> Whose:
        return Whose(tenant, scope if self._by_scope else "")

    def whose_is(self, entry: MemoryEntry) -> Whose:
        return self.whose(entry.tenant, entry.scope)

    def whose_step(self, step_id: StepId) -> Whose:
        return self.whose_is(self.entries[self.by_step[step_id][0]])

    def near(
        self, whose: Whose, space: str, stand_in: str | None, key: Floats, floor: float
    ) -> Iterator[tuple[MemoryEntry, float]]:
        """Entries that count and their cosines, of the keys in a space, and of those that only ``stand_in`` has."""
        since = self.since(whose.tenant)
        own = self.indexes.get((whose, space))
        other = self.indexes.get((whose, stand_in)) if stand_in is not None and stand_in != space else None
        found = own.near(key, NEIGHBOURS, floor) if own is not None else []
        if other is not None:
            elsewhere = other.near(key, NEIGHBOURS, floor)
            found += [(step, near) for step, near in elsewhere if own is None or step not in own]
        for step_id, cosine in sorted(found, key=lambda pair: -pair[1])[:NEIGHBOURS]:
            for entry_id in self.by_step.get(StepId(step_id), ()):
                if self.entries[entry_id].epoch >= since:
                    yield self.entries[entry_id], cosine

    # -------------------------------------------------------------------------------------------- epochs

    def since(self, tenant: str) -> int:
        """The epoch of which an entry must be, at least, to count."""
        mine = [e.number for e in self.epochs.values() if e.tenant in (None, tenant) and e.undone_at is None]
        return max(mine, default=0)

    def renew(self, tenant: str) -> None:
        """An epoch of that tenant has begun or ended."""
        self.versions[tenant] += 1
        self.revision += 1
        for entry in [e for e in self.entries.values() if e.tenant == tenant and e.epoch < self.since(tenant)]:
            self._drop_tokens(entry.id)

    def newest_epoch(self) -> int:
        return max((e.number for e in self.epochs.values()), default=0)

    # ------------------------------------------------------------------------------------------- looking

    def least_useful(self, tenant: str, count: int) -> set[str]:
        """What no longer counts goes first, then what helped least, then the oldest."""
        since = self.since(tenant)

        def rank(entry: MemoryEntry) -> tuple[bool, int, float, str]:
            helped, harmed = self.helped(entry.id)
            return entry.epoch >= since, helped - harmed, entry.created_at, entry.id

        own = sorted((e for e in self.entries.values() if e.tenant == tenant), key=rank)
        return {e.id for e in own[:count]}

    def row(self, entry: MemoryEntry) -> dict[str, Any]:
        """For people and machines."""
        helped, harmed = self.helped(entry.id)
        whose = self.whose_is(entry)
        return {
            "id": entry.id,
            "tenant": entry.tenant,
            "scope": entry.scope,
            "user": entry.user,
            "episode_id": entry.episode_id,
            "response_id": entry.step_id,
            "created_at": entry.created_at,
            "tokens": list(entry.tokens),
            "value": entry.value,
            "sources": list(entry.sources),
            "epoch": entry.epoch,
            "active": entry.epoch >= self.since(entry.tenant),
            "retired_under": sorted(
                sha[:16] for sha, rows in self.retired.items() if rows.get(entry.id) == entry.position
            ),
            "helped": helped,
            "harmed": harmed,
            "spaces": sorted(s for (w, s), i in self.indexes.items() if w == whose and entry.step_id in i),
        }

    def stats(self) -> dict[str, int]:
        told = [self.helped(entry_id) for entry_id in self._uses]
        key_bytes = sum(index.size_bytes for index in self.indexes.values())
        return {
            "entries": len(self.entries),
            "active": sum(e.epoch >= self.since(e.tenant) for e in self.entries.values()),
            "retired": len({i for rows in self.retired.values() for i in rows if i in self.entries}),
            "tenants": sum(n > 0 for n in self.sizes.values()),
            "scopes": len({entry.scope for entry in self.entries.values()}),
            "keys": sum(map(len, self.indexes.values())),
            "helped": sum(helped for helped, _ in told),
            "harmed": sum(harmed for _, harmed in told),
            "epochs": sum(e.undone_at is None for e in self.epochs.values()),
            "tombstones": len(self.tombstones),
            "bytes": key_bytes + sum(12 * len(e.tokens) for e in self.entries.values()),
            "damaged": self.damaged,
        }


def read(kept: MemoryKey) -> Floats | None:
    """None where it is damaged."""
    try:
        return from_bytes(kept.key)
    except MemoryKeyError:
        return None


def covers(tombstone: Tombstone, entry: MemoryEntry) -> bool:
    """Whether what was given up to that time, and is now forgotten, is in this entry."""
    value = tombstone.value
    if tombstone.scope == "entry":
        return entry.id == value
    if entry.created_at > tombstone.created_at:
        return False
    if tombstone.scope == "source":
        return value in entry.sources
    return tombstone.scope == "all" or value == {
        "user": entry.user,
        "tenant": entry.tenant,
        "episode": entry.episode_id,
    }.get(tombstone.scope)
