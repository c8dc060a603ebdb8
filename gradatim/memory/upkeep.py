"""Looking after what is on a memory's shelf: whether it is what answers are made with, and what may be thrown away.

Pure functions of the shelf and of what is in this process; their caller holds the locks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from gradatim.memory.contents import Contents, read
from gradatim.protocols import Shelf
from gradatim.types import Kept, MemoryEntry, MemoryKey, MemoryRetirement, MemorySpace, MemoryUse

Drop = tuple[type[Kept], Mapping[str, str]]


def check(shelf: Shelf, contents: Contents, stray_tokens: Sequence[str]) -> dict[str, Any]:
    """Entries one by one, and the checksum of every key."""
    entries = {e.id: e for e in shelf.load(MemoryEntry)}
    keys = shelf.load(MemoryKey)
    here = contents.entries
    problems = {
        "lost": sorted(entries.keys() - here.keys()),
        "extra": sorted(here.keys() - entries.keys()),
        "differing": sorted(i for i in entries.keys() & here.keys() if entries[i] != here[i]),
        "damaged_keys": sorted(k.step_id for k in keys if read(k) is None),
        "stray_tokens": list(stray_tokens),
    }
    return {"ok": not any(problems.values()), "entries": len(entries), "keys": len(keys), **problems}


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


def by_adapter(ledger: Iterable[MemoryRetirement]) -> Mapping[str, list[MemoryRetirement]]:
    """By the digest of the weights that know them."""
    out: dict[str, list[MemoryRetirement]] = defaultdict(list)
    for row in ledger:
        out[row.adapter_sha256].append(row)
    return out
