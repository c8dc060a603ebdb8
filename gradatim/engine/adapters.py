"""Which adapter sits in which slot, who uses it, and when it may go.

Threads share it under one lock, held for microseconds. It knows nothing of tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from gradatim.errors import AdapterError, UnknownAdapterError
from gradatim.types import AdapterId

BASE_SLOT = 0


def is_base(adapter_id: AdapterId) -> bool:
    """``name@0`` is the frozen base, of any name: it needs no files and is always there."""
    return adapter_id.endswith("@0")


@dataclass(slots=True)
class _Entry:
    slot: int
    users: int = 0  # generations that are waiting or running on it
    used: int = 0  # larger: more recently
    leaving: bool = False  # unloaded as soon as the last user is gone


class AdapterPool:
    """Slots 1.. of ``slots`` adapters; slot 0 is the base. ``freed`` is called with each adapter that went."""

    def __init__(self, slots: int, freed: Callable[[AdapterId], None]) -> None:
        self._lock = Lock()
        self._slots = slots
        self._free = list(range(slots, 0, -1))
        self._entries: dict[AdapterId, _Entry] = {}
        self._bases: set[AdapterId] = set()
        self._clock = itertools.count(1)
        self._freed = freed

    def loaded(self) -> frozenset[AdapterId]:
        with self._lock:
            return frozenset(i for i, e in self._entries.items() if not e.leaving) | self._bases

    def acquire(self, adapter_id: AdapterId) -> int:
        """Count one more generation on it; its slot. UnknownAdapterError."""
        if is_base(adapter_id):
            return BASE_SLOT
        with self._lock:
            entry = self._entries.get(adapter_id)
            if entry is None or entry.leaving:
                raise UnknownAdapterError(f"adapter {adapter_id} is not loaded")
            entry.users += 1
            entry.used = next(self._clock)
            return entry.slot

    def release(self, adapter_id: AdapterId) -> None:
        """One generation on it has ended."""
        if is_base(adapter_id):
            return
        with self._lock:
            entry = self._entries[adapter_id]
            entry.users -= 1
            self._remove_if_done(adapter_id, entry)

    def revive(self, adapter_id: AdapterId) -> bool:
        """True where it is loaded already, if need be by taking back an unload that has not happened yet."""
        with self._lock:
            if is_base(adapter_id):
                self._bases.add(adapter_id)
                return True
            entry = self._entries.get(adapter_id)
            if entry is not None:
                entry.leaving = False
            return entry is not None

    def reserve(self) -> int:
        """A slot for a new adapter: a free one, or that of the least recently used one nobody uses. AdapterError."""
        with self._lock:
            if not self._free:
                idle = [(e.used, i) for i, e in self._entries.items() if not e.users]
                if not idle:
                    raise AdapterError(
                        f"all {self._slots} adapter slots are in use by running requests: wait for one to end, or "
                        "raise engine.adapter_slots"
                    )
                _, oldest = min(idle)
                self._remove(oldest)
            return self._free.pop()

    def publish(self, adapter_id: AdapterId, slot: int) -> None:
        """The slot is filled: generations may begin on it."""
        with self._lock:
            self._entries[adapter_id] = _Entry(slot, used=next(self._clock))

    def give_back(self, slot: int) -> None:
        """A reserved slot that was not filled after all."""
        with self._lock:
            self._free.append(slot)

    def unload(self, adapter_id: AdapterId) -> None:
        with self._lock:
            self._bases.discard(adapter_id)
            entry = self._entries.get(adapter_id)
            if entry is not None:
                entry.leaving = True
                self._remove_if_done(adapter_id, entry)

    def _remove_if_done(self, adapter_id: AdapterId, entry: _Entry) -> None:
        if entry.leaving and not entry.users:
            self._remove(adapter_id)

    def _remove(self, adapter_id: AdapterId) -> None:
        self._free.append(self._entries.pop(adapter_id).slot)
        self._freed(adapter_id)
