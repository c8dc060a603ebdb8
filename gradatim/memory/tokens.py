"""Answers that were judged good, token by token: what came next there becomes likelier where the text stands alike.

One store for each tenant and key space, made of what decision memory remembers and dropped with it, so that a revision,
a retraction, a new epoch and ``forget`` hold for the next token. What it writes to disk saves reading those answers
anew after a restart, and is gone as soon as something in it is dropped. It knows no engine and no feedback.

Shapes: M rows that draw, H hidden size, V vocabulary, T tokens of one answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradatim.errors import StoreError
from gradatim.memory.key_space import EachToken, KeySpace, Turn
from gradatim.memory.knn_lm import KnnLm
from gradatim.memory.recall import Recall
from gradatim.memory.token_folders import TokenFolders
from gradatim.memory.token_store import TokenStore
from gradatim.protocols import Recollection
from gradatim.types import Blend, MemoryEntry

log = logging.getLogger(__name__)
_WRITE_EVERY_S = 30.0
HOT_ROWS = 1024  # searched exactly, at a quarter of a millisecond; those before them through the index
Key = tuple[str, str]  # tenant and space


@dataclass(slots=True)
class _Held:
    store: TokenStore
    entries: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by id: the tokens that are in it
    unwritten: bool = False  # something was added since it was written
    drops: int = 0


class TokenMemory:
    """Implements ``protocols.TokenMixer``. ``space`` is that of the base alone, ``vocabulary`` how many tokens there
    are; ``max_tokens`` bounds each store, ``folders`` is where they are written (None: nowhere).

    The spaces that its methods are given are those of the requests, whose weights it reads the answers with.

    What changes it is called by its owner under the owner's lock; ``mix``, ``maintain`` and ``stats`` by anybody.
    """

    def __init__(
        self,
        space: KeySpace[EachToken],
        knn: KnnLm,
        *,
        vocabulary: int,
        max_tokens: int,
        folders: TokenFolders | None = None,
        hot_rows: int = HOT_ROWS,
    ) -> None:
        self.space, self.vocabulary = space, vocabulary
        self._hot_rows = hot_rows
        self._knn, self._max_tokens, self._folders = knn, max_tokens, folders
        self._lock = threading.Lock()  # of the stores' table; never held while anything is searched or built
        self._held: dict[Key, _Held] = {}
        self._looked_for: set[Key] = set()  # on disk
        self._written_at = time.monotonic()
        self._complete: tuple[int, frozenset[str]] | None = None  # the revision and the spaces that lack nothing
        self._counts: Counter[str] = Counter()
        self._lambdas = 0.0

    # ------------------------------------------------------------------------------------------- drawing

    def mix(self, recollections: Sequence[Recollection], states: Tensor, logits: Tensor) -> Mapping[int, Blend]:
        """See ``protocols.TokenMixer``."""
        recalls = [r if isinstance(r, Recall) else None for r in recollections]
        stores = [None if r is None else self._store(r.tenant, r.space.id) for r in recalls]
        self._counts["drawn"] += sum(r is not None for r in recalls)
        if not any(stores):  # one that is empty is none
            return {}
        mixed = self._knn.mix(states, logits, stores)
        blends = mixed.blends()
        for recall, searched, share in zip(recalls, mixed.searched.tolist(), mixed.lambdas.tolist(), strict=True):
            if recall is not None and searched:
                recall.tokens.searched += 1
                recall.tokens.mixed += share > 0.0
                recall.tokens.lambdas += share
        self._counts["searched"] += int(mixed.searched.sum())
        self._counts["mixed"] += len(blends)
        self._lambdas += float(mixed.lambdas.sum())
        return blends

    def _store(self, tenant: str, space: str) -> TokenStore | None:
        held = self._held.get((tenant, space))
        return None if held is None else held.store

    # ------------------------------------------------------------------------------------------- filling

    def complete(self, revision: int, spaces: Sequence[KeySpace[Turn]]) -> bool:
        """Whether nothing was lacking when it was looked for, and nothing has changed since."""
        return self._complete == (revision, frozenset(space.id for space in spaces))

    def lacking(
        self,
        revision: int,
        told: Sequence[MemoryEntry],
        spaces: Sequence[KeySpace[Turn]],
        but: Set[tuple[str, str]],
    ) -> list[tuple[MemoryEntry, KeySpace[Turn]]]:
        """Which of ``told`` should be in the stores of ``spaces`` and are not, ``but`` for some (entry, space): in the
        order of the spaces, the newest answer first. What should not be there is dropped. ``revision`` is that of
        what is remembered."""
        wanted = frozenset(space.id for space in spaces)
        fitting = self._fitting(told)
        with self._lock:
            self._held = {key: held for key, held in self._held.items() if key[1] in wanted}
            for held in self._held.values():
                for entry_id in held.entries.keys() - fitting.keys():
                    self._take(held, entry_id)
            out = [
                (entry, space)
                for space in spaces
                for entry in fitting.values()
                if (entry.id, space.id) not in but and not self._has(entry, space)
            ]
        self._complete = None if out else (revision, wanted)
        return out

    def _fitting(self, told: Sequence[MemoryEntry]) -> dict[str, MemoryEntry]:
        """The newest answers of each tenant, up to its bound."""
        taken: Counter[str] = Counter()
        out: dict[str, MemoryEntry] = {}
        for entry in sorted(told, key=lambda e: (e.created_at, e.id), reverse=True):
            taken[entry.tenant] += len(entry.tokens)
            if taken[entry.tenant] <= self._max_tokens:
                out[entry.id] = entry
        return out

    def _has(self, entry: MemoryEntry, space: KeySpace[Turn]) -> bool:
        held = self._held.get((entry.tenant, space.id))
        return held is not None and held.entries.get(entry.id) == entry.tokens

    def add(self, entry: MemoryEntry, space: KeySpace[Turn], states: Tensor) -> None:
        """``states`` (T, H) that the tokens of the entry come after. MemoryKeyError: nothing has changed."""
        with self._lock:
            key = (entry.tenant, space.id)
            held = self._held.get(key) or _Held(TokenStore(self._own(space), self.vocabulary, hot_rows=self._hot_rows))
            held.store.revise(entry.id, states, torch.tensor(entry.tokens))
            held.entries[entry.id] = entry.tokens
            held.unwritten = True
            self._held[key] = held

    def _own(self, space: KeySpace[Turn]) -> KeySpace[EachToken]:
        """Its own keys of the same weights."""
        return self.space.under(space.adapter_id, space.adapter_sha256)

    def drop(self, tenant: str, entry_id: str) -> None:
        """Out of every space, and from disk."""
        with self._lock:
            for (owner, _), held in self._held.items():
                if owner == tenant and entry_id in held.entries:
                    self._take(held, entry_id)
            self._erase(tenant, entry_id)

    def _erase(self, tenant: str, entry_id: str) -> None:
        """What lies on disk, with an entry in it; what is held is written anew."""
        for (owner, _), held in self._held.items():
            held.unwritten = held.unwritten or owner == tenant
        if self._folders is not None:
            self._folders.drop(tenant, entry_id)

    def _take(self, held: _Held, entry_id: str) -> None:
        held.store.forget(entry_id)
        del held.entries[entry_id]
        held.drops += 1

    @property
    def worn(self) -> bool:
        """Something was added or dropped since it was written to disk."""
        with self._lock:
            return any(held.unwritten for held in self._held.values())

    def maintain(self) -> None:
        """Make what is new faster to search, give back the room of what was dropped, and write what is new to disk now
        and then. May take seconds; searches go on meanwhile."""
        with self._lock:
            all_held = list(self._held.values())
        due = time.monotonic() - self._written_at >= _WRITE_EVERY_S
        for held in all_held:
            if held.store.index.worn:
                self._compact(held)
            elif held.store.index.full:
                held.store.index.seal()
        if due:
            self.write()

    # ---------------------------------------------------------------------------------------------- disk

    def write(self) -> None:
        """All that is new, now."""
        with self._lock:
            all_held = list(self._held.items())
        for key, held in all_held:
            if held.unwritten:
                self._write(key, held)
        self._written_at = time.monotonic()

    def _write(self, key: Key, held: _Held) -> None:
        """What was dropped in the meantime is not left there. A fault is counted: memory goes on."""
        if self._folders is None:
            return
        drops, held.unwritten = held.drops, False
        try:
            held.store.save(self._folders.path(key[0], held.store.space.id))
        except StoreError as e:
            held.unwritten = True
            self._counts["unwritten"] += 1
            log.error("%s", e)
        with self._lock:
            self._folders.keep(key[0], {h.store.space.id for (owner, _), h in self._held.items() if owner == key[0]})
            if held.drops != drops:
                self._erase(key[0], "one that was dropped")

    def written(self, told: Sequence[MemoryEntry], spaces: Sequence[KeySpace[Turn]]) -> Iterator[tuple[Key, _Held]]:
        """Stores that lie on disk and were not looked for yet. What is damaged or foreign is left, and made anew."""
        for tenant in dict.fromkeys(entry.tenant for entry in told):
            for space in spaces:
                key = (tenant, space.id)
                if self._folders is None or key in self._looked_for:
                    continue
                self._looked_for.add(key)
                own = self._own(space)
                path = self._folders.path(tenant, own.id)
                if not path.exists():
                    continue
                try:
                    store = TokenStore.load(path, own, self.vocabulary, hot_rows=self._hot_rows)
                except StoreError as e:
                    log.warning("a token memory is made anew: %s", e)
                    continue
                yield key, _Held(store, store.said())

    def adopt(self, key: Key, held: _Held, told: Sequence[MemoryEntry]) -> None:
        """Take a store over, but for what is not remembered as it is there."""
        known = {entry.id: entry.tokens for entry in told if entry.tenant == key[0]}
        with self._lock:
            if key in self._held:
                return
            stale = [i for i, tokens in held.entries.items() if known.get(i) != tokens]
            for entry_id in stale:
                self._take(held, entry_id)
            self._held[key] = held
            if stale:
                self._erase(key[0], stale[0])

    def _compact(self, held: _Held) -> None:
        """Unless something was added in the meantime."""
        before = held.store
        rows = before.index.rows
        after = before.compacted()
        with self._lock:
            if held.store is before and after.stands_for(before, rows):
                held.store = after

    def stray(self, told: Sequence[MemoryEntry]) -> list[str]:
        """Entries that are in a store and should not be, or not as they are."""
        known = {(entry.tenant, entry.id): entry.tokens for entry in told}
        with self._lock:
            found = {(key[0], i): tokens for key, held in self._held.items() for i, tokens in held.entries.items()}
        return sorted(at[1] for at, tokens in found.items() if known.get(at) != tokens)

    def stats(self) -> dict[str, float]:
        """``retrieved``: the share of drawn tokens that it had a part in; ``lambda``: its mean part in those."""
        with self._lock:
            stores = [held.store for held in self._held.values()]
        return {
            "tokens": sum(map(len, stores)),
            "token_bytes": sum(store.index.size_bytes + 4 * store.index.rows for store in stores),
            "drawn": self._counts["drawn"],
            "searched": self._counts["searched"],
            "retrieved": self._counts["mixed"] / max(1, self._counts["drawn"]),
            "lambda": self._lambdas / max(1, self._counts["mixed"]),
            "unwritten": self._counts["unwritten"],
        }
