"""Looking after what is on a memory's shelf: reading it, whether it is what answers are made with, and what may be
thrown away.

Functions of the shelf and of what is in this process; their caller holds the locks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any

from gradatim.memory.contents import Contents, read
from gradatim.memory.key_space import KeySpace, Turn, difference, made_with
from gradatim.protocols import Shelf
from gradatim.types import (
    Kept,
    MemoryEntry,
    MemoryEpoch,
    MemoryKey,
    MemoryRetirement,
    MemorySpace,
    MemoryUse,
    StepId,
    Tombstone,
)

Drop = tuple[type[Kept], Mapping[str, str]]


def read_into(contents: Contents, shelf: Shelf) -> Contents:
    """All that is remembered."""
    contents.epochs = {e.id: e for e in shelf.load(MemoryEpoch)}
    contents.tombstones = list(shelf.load(Tombstone))
    for entry in shelf.load(MemoryEntry):
        contents.put(entry)
    for key in shelf.load(MemoryKey):
        contents.put_key(key)
    contents.use((), [u for u in shelf.load(MemoryUse) if u.entry_id in contents.entries])
    for digest, ledger in _by_adapter(shelf.load(MemoryRetirement)).items():
        contents.retire(digest, ledger)
    return contents


def check(shelf: Shelf, contents: Contents, *, stray_tokens: Sequence[str], unusable: Sequence[str]) -> dict[str, Any]:
    """Entries one by one, and the checksum of every key. ``unusable``: what was found to be made with something else
    than is served."""
    entries = {e.id: e for e in shelf.load(MemoryEntry)}
    keys = shelf.load(MemoryKey)
    here = contents.entries
    problems = {
        "lost": sorted(entries.keys() - here.keys()),
        "extra": sorted(here.keys() - entries.keys()),
        "differing": sorted(i for i in entries.keys() & here.keys() if entries[i] != here[i]),
        "damaged_keys": sorted(k.step_id for k in keys if read(k) is None),
        "stray_tokens": list(stray_tokens),
        "unusable": list(unusable),
    }
    return {"ok": not any(problems.values()), "entries": len(entries), "keys": len(keys), **problems}


def foreign_spaces(shelf: Shelf, ours: KeySpace[Turn]) -> list[str]:
    """Of the key spaces on the shelf: those that were made with something else, and with what."""
    said = [
        difference(
            f"key space {row.id[:12]}", made_with(row.base_sha256, row.tokenizer_sha256, row.layers), ours.made_with
        )
        for row in shelf.load(MemorySpace)
    ]
    return [one for one in said if one]


def drops_of(contents: Contents, ids: Iterable[str], *, but: Set[StepId] = frozenset()) -> list[Drop]:
    """Entries with what they did and, ``but`` for some steps, the keys of those of which nothing is left."""
    gone = set(ids)
    drop: list[Drop] = []
    for entry_id in sorted(gone):
        drop.append((MemoryEntry, {"id": entry_id}))
        drop += [(kind, {"entry_id": entry_id}) for kind in (MemoryUse, MemoryRetirement)]
    return drop + [(MemoryKey, {"step_id": step}) for step in contents.without(gone) if step not in but]


def leftovers(shelf: Shelf, contents: Contents, spaces: Collection[str]) -> tuple[list[Drop], dict[str, set[str]]]:
    """What may be deleted, and its ids: key spaces other than ``spaces`` with all their keys; keys, uses and
    retirements of what is no longer remembered."""
    idle = {s.id for s in shelf.load(MemorySpace)} - set(spaces)
    keys = {k.step_id for k in shelf.load(MemoryKey) if k.step_id not in contents.by_step}
    used = {u.entry_id for u in shelf.load(MemoryUse)} | {r.entry_id for r in shelf.load(MemoryRetirement)}
    orphans = used - contents.entries.keys()
    drop: list[Drop] = []
    for space in sorted(idle):
        drop += [(MemoryKey, {"space": space}), (MemorySpace, {"id": space})]
    drop += [(MemoryKey, {"step_id": step}) for step in sorted(keys)]
    drop += [(kind, {"entry_id": i}) for i in sorted(orphans) for kind in (MemoryUse, MemoryRetirement)]
    return drop, {"spaces": idle, "keys": set(keys), "orphans": orphans}


def _by_adapter(ledger: Iterable[MemoryRetirement]) -> Mapping[str, list[MemoryRetirement]]:
    """By the digest of the weights that know them."""
    out: dict[str, list[MemoryRetirement]] = defaultdict(list)
    for row in ledger:
        out[row.adapter_sha256].append(row)
    return out
