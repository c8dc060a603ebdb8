"""Judged decision memory: what was said of an answer changes the next one in the same situation.

The shelf is the truth, what is in this process is made of it at the start. What is written is durable before it
counts, what is forgotten stops counting before the call returns. One lock guards what the engine's thread looks at and
is held for a search at most; another keeps writers in line while they wait for the disk.

Tenants never share an index. Knows nothing of HTTP, and of feedback only what ``entries`` made of it.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from gradatim.config import MemoryConfig
from gradatim.errors import StoreError
from gradatim.memory import upkeep
from gradatim.memory.contents import SAME_PLACE, Contents, Whose, covers
from gradatim.memory.key_space import Floats, KeySpace, Turn, check_space, made_with, to_bytes
from gradatim.memory.notes import Notes
from gradatim.memory.recall import Neighbourhood, Recall
from gradatim.memory.spaces import Spaces
from gradatim.memory.token_folders import TokenFolders
from gradatim.memory.upkeep import Drop, drops_of
from gradatim.protocols import Recollection, Shelf
from gradatim.types import (
    AdapterId,
    EpisodeId,
    Kept,
    MemoryEntry,
    MemoryEpoch,
    MemoryKey,
    MemoryNote,
    MemoryRetirement,
    MemorySpace,
    MemoryUse,
    StepId,
    Tombstone,
)

if TYPE_CHECKING:
    from torch import Tensor

    from gradatim.memory.tokens import TokenMemory

CURSOR = "memory.judged"  # feedback up to here has been remembered
SCOPES: Sequence[str] = get_args(get_type_hints(Tombstone)["scope"])
_MADE_OF_ENTRIES = (MemoryKey, MemorySpace, MemoryUse, MemoryRetirement)


class DecisionMemory:
    """``space``: that of the base alone; digests are empty where no model is served. ``tokens``, or what it left in
    ``folders``, is kept in step with what is remembered. ForeignMemoryError where what is on the shelf was made with
    another model, unless it is only ``looked_at``; StoreError."""

    def __init__(
        self,
        shelf: Shelf,
        config: MemoryConfig,
        space: KeySpace[Turn],
        *,
        tokens: TokenMemory | None = None,
        folders: TokenFolders | None = None,
        looked_at: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self.notes = Notes(shelf, by_user=config.tenants == "user", clock=clock)
        self._shelf, self._clock = shelf, clock
        self._writing = threading.RLock()
        self._lock = threading.Lock()
        kept = shelf.load(MemorySpace)
        for row in () if looked_at else kept:
            check_space(row, space)
        self._spaces = Spaces(space, kept)
        self._all = Contents(by_scope=config.scopes == "system")
        self._all.tokens = tokens or folders
        self._tokens, self._folders = tokens, folders
        upkeep.read_into(self._all, shelf)
        if folders is not None:
            folders.prune(self._all.entries.keys())

    # ---------------------------------------------------------------------------------------------- reading

    def tenant(self, user: str) -> str:
        """Whose memory a request of this user reads, and its feedback writes."""
        return user if self.config.tenants == "user" else ""

    def recollect(self, user: str, adapter_id: AdapterId, adapter_sha256: str, scope: str = "") -> Recall:
        """For one request that these weights answer."""
        self.counts["recalls"] += 1
        return Recall(
            self, self.config, self._all.whose(self.tenant(user), scope), self.expect(adapter_id, adapter_sha256)
        )

    def expect(self, adapter_id: AdapterId, adapter_sha256: str) -> KeySpace[Turn]:
        """Make keys for requests that these weights answer."""
        with self._lock:
            return self._spaces.expect(adapter_id, adapter_sha256, self._clock())

    def near(self, whose: Whose, space: KeySpace[Turn], key: Floats, floor: float) -> Neighbourhood:
        """See ``recall.Source``. In the order of the entries' ids, so that sums do not depend on history. What is
        retired is known at its own place; in other words nobody has looked, so there it counts as it did."""
        with self._lock:
            found = sorted(
                self._all.near(whose, space.id, self._spaces.stand_in(space.id), key, floor),
                key=lambda pair: pair[0].id,
            )
            is_known = [
                cosine >= SAME_PLACE and self._all.is_known(entry, space.adapter_sha256) for entry, cosine in found
            ]
            known = [pair for pair, is_so in zip(found, is_known, strict=True) if is_so]
            left = [pair for pair, is_so in zip(found, is_known, strict=True) if not is_so]
            return Neighbourhood(left, self._all.versions[whose.tenant], self._all.since(whose.tenant), known)

    def version(self, tenant: str) -> int:
        return self._all.versions[tenant]

    def holds(self, whose: Whose) -> bool:
        """Whether anything is remembered there."""
        return self._all.held[whose] > 0

    def answered(self, recollection: Recollection, step_ids: Sequence[StepId], *, steered: bool) -> None:
        """Keep the key of an answer until it is judged."""
        with self._lock:
            self.counts["steered"] += steered
            if not isinstance(recollection, Recall) or recollection.key is None:
                return
            self._spaces.wait(step_ids, recollection.space.id, recollection.key)

    # ---------------------------------------------------------------------------------------------- writing

    def write(
        self,
        episode_id: EpisodeId,
        entries: Sequence[MemoryEntry],
        uses: Sequence[MemoryUse] = (),
        answers: Sequence[StepId] = (),
        *,
        cursor: int | None = None,
    ) -> int:
        """Replace what is remembered of an episode by ``entries``, and what its ``answers`` say of the entries that
        were for them by ``uses``. Durable and in effect when it returns; gives how many entries are new or changed.
        StoreError: nothing changed."""
        with self._writing:
            kept = [self._dated(e) for e in entries if not any(covers(t, e) for t in self._all.tombstones)]
            gone = self._all.by_episode.get(episode_id, set()) - {e.id for e in kept}
            changed = [e for e in kept if self._all.entries.get(e.id) != e]
            keys = self._waiting_keys(kept)
            known = [use for use in uses if use.entry_id in self._all.entries]
            drop = drops_of(self._all, gone, but={e.step_id for e in kept})
            drop += [(MemoryUse, {"answer_id": a}) for a in answers]
            self._change([*changed, *keys, *known], drop, cursor)
            with self._lock:
                for entry in changed:
                    self._all.put(entry)
                self._all.take(gone)  # after what takes its place, which keeps its key
                for key in keys:
                    self._all.put_key(key)
                self._all.use(answers, known)
                self._spaces.untended = True
                self.counts["written"] += len(changed)
            self._drop_harmful({use.entry_id for use in known})
            self._evict({e.tenant for e in changed})
            return len(changed)

    def start_from(self, position: int) -> None:
        """Where nothing was ever remembered: begin with the feedback that comes from now on."""
        self._shelf.change(cursors={CURSOR: position})

    def forget(self, scope: str, value: str, *, actor: str, reason: str = "") -> Mapping[str, Any]:
        """Of a user, tenant, episode, source or entry, or all: what was given up to now is gone by the next token, for
        good. Says how much. StoreError for another scope."""
        if scope not in SCOPES:
            raise StoreError(f"{scope!r} cannot be forgotten: it must be one of {', '.join(SCOPES)}")
        with self._writing:
            tombstone = Tombstone(
                id=f"t-{uuid.uuid4().hex}",
                scope=scope,  # type: ignore[arg-type]  # checked above
                value=value,
                created_at=self._clock(),
                actor=actor,
                reason=reason,
            )
            gone = {e.id for e in self._all.entries.values() if covers(tombstone, e)}
            everything: list[Drop] = [(kind, {}) for kind in _MADE_OF_ENTRIES] if scope == "all" else []
            notes = self.notes.covered(tombstone)
            unpinned: list[Drop] = [(MemoryNote, {"id": note.id}) for note in notes]
            self._shelf.change(put=[tombstone], drop=[*drops_of(self._all, gone), *everything, *unpinned])
            with self._lock:
                self._all.take(gone)
                self.notes.take(notes)
                self._all.tombstones.append(tombstone)
                if scope != "entry":
                    self._spaces.forget_waiting()
            told = {"entries": len(gone), "notes": len(notes)}
            return {"scope": scope, "value": value, **told, "at": tombstone.created_at}

    def epoch(
        self, tenant: str | None, *, actor: str, reason: str = "", cursors: Mapping[str, int] | None = None
    ) -> MemoryEpoch:
        """From now on nothing counts that was remembered before: of one tenant, or of all (None). ``cursors`` are set
        with it."""
        with self._writing:
            made = MemoryEpoch(
                id=f"e-{uuid.uuid4().hex}",
                number=1 + self._all.newest_epoch(),
                tenant=tenant,
                created_at=self._clock(),
                actor=actor,
                reason=reason,
            )
            self._set_epoch(made, cursors)
            return made

    def undo_epoch(self, tenant: str | None) -> MemoryEpoch | None:
        """Take back the newest epoch of that tenant, or of all; what was remembered since stays. None: no epoch."""
        with self._writing:
            begun = [e for e in self._all.epochs.values() if e.tenant == tenant and e.undone_at is None]
            if not begun:
                return None
            undone = replace(max(begun, key=lambda e: e.number), undone_at=self._clock())
            self._set_epoch(undone)
            return undone

    # ------------------------------------------------------------------------------------------- key spaces

    def unkeyed(self, limit: int) -> list[tuple[StepId, KeySpace[Turn]]]:
        """Steps without a key in a space that requests come in, the newest such space first."""
        with self._lock:
            wanted = self._spaces.wanted() if self._spaces.untended else ()
            lacking = ((step, space) for space in wanted for step in self._all.without_key(space.id))
            return list(islice(lacking, limit))

    def tended(self) -> None:
        """Every step has the keys that it can have; ``unkeyed`` is not asked again before that changes."""
        with self._lock:
            self._spaces.untended = False

    def put_key(self, step_id: StepId, space: str, key: Floats) -> None:
        """Where a remembered step lies in a space. Durable and in effect when it returns."""
        with self._writing:
            if step_id in self._all.by_step:
                kept = MemoryKey(step_id=step_id, space=space, key=to_bytes(key))
                self._change([kept], [], None)
                with self._lock:
                    self._all.put_key(kept)

    def unwanted(self, space: str) -> None:
        """Its weights are gone; nothing is made for it any more until a request comes in it."""
        with self._lock:
            self._spaces.unwanted(space)

    def bridge(self, space: str, to: str | None) -> None:
        """Let keys of another space stand in for those that this one lacks; None: no longer."""
        with self._lock:
            self._spaces.bridge(space, to)

    def fullest(self, *, but: str) -> str | None:
        """The space with most keys."""
        with self._lock:
            return self._all.fullest(but=but)

    def finds_itself(self, step_id: StepId, key: Floats, space: str) -> bool | None:
        """See ``Contents.finds_itself``."""
        with self._lock:
            return self._all.finds_itself(step_id, key, space)

    def untold(self, limit: int, but: Set[tuple[str, str]]) -> list[tuple[MemoryEntry, KeySpace[Turn]]]:
        """What the token memory lacks in the spaces that requests come in, the newest first; ``but`` for some entries
        and spaces that cannot be read. What was written to disk is taken over first."""
        with self._lock:
            tokens, wanted, revision = self._tokens, self._spaces.wanted(), self._all.revision
            if tokens is None or tokens.complete(revision, wanted):
                return []
            told = self._all.told()
        for key, held in tokens.written(told, wanted):
            with self._lock:
                tokens.adopt(key, held, self._all.told())
        return tokens.lacking(revision, told, wanted, but)[:limit]

    def tell(self, entry: MemoryEntry, space: KeySpace[Turn], states: Tensor) -> None:
        """``states`` (T, H) are those that its tokens come after. In effect for the next token when it returns, if the
        entry is still remembered as it was. MemoryKeyError."""
        with self._lock:
            if self._tokens is not None and self._all.tells(entry) and self._spaces.wants(space.id):
                self._tokens.add(entry, space, states)

    def maintain(self) -> None:
        """Make keys that are many faster to search, and give back the room of those that are gone. May take seconds;
        searches and changes go on meanwhile."""
        with self._lock:
            indexes = list(self._all.indexes.items())
        for at, index in indexes:
            if index.worn:
                with index.still():
                    held = index.held()
                    fresh = index.compacted(held)
                with self._lock:
                    if self._all.indexes.get(at) is index and fresh.stands_for(index, len(held.alive)):
                        self._all.indexes[at] = fresh
            elif index.full:
                index.seal()

    # ---------------------------------------------------------------------------------------------- looking

    def stats(self) -> dict[str, float]:
        with self._lock:
            counts = {
                name: self.counts[name] for name in ("recalls", "steered", "shown", "written", "failed", "unreadable")
            }
            tokens = {} if self._tokens is None else self._tokens.stats()
            more = {"spaces": len(self._spaces), "notes": len(self.notes.show())}
            return {**self._all.stats(), **tokens, **counts, **more}

    def show(self, *, tenant: str | None = None, step_id: str = "", limit: int = 100) -> list[dict[str, Any]]:
        """Entries, the newest first; of one tenant or step."""
        with self._lock:
            return self._all.rows(tenant, step_id, limit)

    @property
    def made_with(self) -> Mapping[str, str]:
        """Digests of what is served, empty where they are not known."""
        return made_with(self._spaces.base.base_sha256, self._spaces.base.tokenizer_sha256)

    def check(self) -> dict[str, Any]:
        """Compare what answers are made with to the shelf: entries one by one, the checksum of every key, and what the
        keys there and on disk were made with."""
        with self._writing:
            unusable = upkeep.foreign_spaces(self._shelf, self._spaces.base)
            if self._folders is not None:
                ours = self.made_with if self._tokens is None else self._tokens.space.made_with
                unusable += self._folders.unusable(ours)
            stray = [] if self._tokens is None else self._tokens.stray(self._all.told())
            return upkeep.check(self._shelf, self._all, stray_tokens=stray, unusable=unusable)

    def compact(self) -> dict[str, Any]:
        """Delete what nothing is answered with any more: keys of spaces that no request comes in, and what is left of
        entries that are gone. Where no request came yet, the space with most keys stays."""
        with self._writing:
            with self._lock:
                needed = self._spaces.needed() or {self._all.fullest() or ""}
            drop, told = upkeep.leftovers(self._shelf, self._all, needed)
            self._shelf.change(drop=drop)
            with self._lock:
                for at in [at for at in self._all.indexes if at[1] in told["spaces"]]:
                    del self._all.indexes[at]
                self._spaces.drop(told["spaces"])
            return {name: len(gone) for name, gone in told.items()}

    def reread_retired(self) -> None:
        """What the loop or a person retired meanwhile. In effect when it returns."""
        with self._lock:
            digests = {space.adapter_sha256 for space in self._spaces.wanted()}
        for digest in sorted(digests):
            ledger = self._shelf.load(MemoryRetirement, adapter_sha256=digest)
            with self._lock:
                self._all.retire(digest, ledger)

    # ----------------------------------------------------------------------------------------------- inside

    def _waiting_keys(self, entries: Sequence[MemoryEntry]) -> list[MemoryKey]:
        """Those that the entries' steps lack."""
        with self._lock:
            found = self._spaces.waiting({entry.step_id for entry in entries})
            return [k for k in found if k.step_id not in self._all.by_step or not self._all.has_key(k.step_id, k.space)]

    def _change(self, put: Sequence[Kept], drop: Sequence[Drop], cursor: int | None) -> None:
        spaces = self._spaces.rows_of(kept for kept in put if isinstance(kept, MemoryKey))
        self._shelf.change(put=[*put, *spaces], drop=drop, cursors=None if cursor is None else {CURSOR: cursor})

    def _set_epoch(self, epoch: MemoryEpoch, cursors: Mapping[str, int] | None = None) -> None:
        self._shelf.change(put=[epoch], cursors=cursors)
        with self._lock:
            self._all.epochs[epoch.id] = epoch
            for tenant in list(self._all.sizes) if epoch.tenant is None else [epoch.tenant]:
                self._all.renew(tenant)

    def _dated(self, entry: MemoryEntry) -> MemoryEntry:
        """An entry belongs to the epoch in which it was first written."""
        known = self._all.entries.get(entry.id)
        return replace(entry, epoch=self._all.newest_epoch() if known is None else known.epoch)

    def _drop_harmful(self, ids: set[str]) -> None:
        """An entry that harmed much more than it helped has its tombstone; see ``Contents.worth``."""
        for entry_id in sorted(ids):
            helped, harmed = self._all.helped(entry_id)
            if entry_id in self._all.entries and self._all.worth(entry_id) <= -self.config.harm:
                self.forget("entry", entry_id, actor="memory", reason=f"it helped {helped} answers and harmed {harmed}")

    def _evict(self, tenants: set[str]) -> None:
        """Keep each tenant within its bound, with some room so that it is not done at every write."""
        for tenant in tenants:
            over = self._all.sizes[tenant] - self.config.max_entries
            if over > 0:
                gone = self._all.least_useful(tenant, over + self.config.max_entries // 50)
                self._shelf.change(drop=drops_of(self._all, gone))
                with self._lock:
                    self._all.take(gone)
