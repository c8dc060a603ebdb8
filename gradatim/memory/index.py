"""Exact search over the keys of one tenant in one key space: a matrix of unit vectors, float32, in memory.

At the sizes of a decision memory (a few entries an episode, 10^4 a tenant) one matrix-vector product is faster than
asking an approximate index, adds and deletes cost microseconds, and what was deleted is gone: nothing was trained on
it. Rows are kept in the order in which they were added where possible; a deleted one is overwritten by the last.

Knows nothing of what the keys mean. Not safe for use from several threads: its owner holds a lock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradatim.errors import MemoryKeyError

Floats = NDArray[np.float32]


class FlatIndex:
    """ids and unit keys (N, H)."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._keys: Floats = np.empty((16, width), dtype=np.float32)
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, entry_id: str) -> bool:
        return entry_id in self._rows

    def add(self, entry_id: str, key: Floats) -> None:
        """``key`` is a unit vector (H,); one that is known by that id is replaced. MemoryKeyError."""
        if key.shape != (self.width,):
            raise MemoryKeyError(f"a key of {key.shape} does not belong among those of width {self.width}")
        row = self._rows.get(entry_id)
        if row is None:
            row = len(self._ids)
            if row == len(self._keys):
                grown = np.empty((2 * row, self.width), dtype=np.float32)
                grown[:row] = self._keys
                self._keys = grown
            self._ids.append(entry_id)
            self._rows[entry_id] = row
        self._keys[row] = key

    def remove(self, entry_id: str) -> None:
        """Nothing happens where it is not there."""
        row = self._rows.pop(entry_id, None)
        if row is None:
            return
        last = self._ids.pop()
        if last != entry_id:
            self._ids[row] = last
            self._rows[last] = row
            self._keys[row] = self._keys[len(self._ids)]

    def key(self, entry_id: str) -> Floats:
        found: Floats = self._keys[self._rows[entry_id]].copy()
        return found

    def search(self, key: Floats, floor: float, most: int | None = None) -> Sequence[tuple[str, float]]:
        """(id, cosine) of the nearest ``most`` of those that are at least ``floor`` near, in the order of their ids.
        Of equally near ones at the end of these, which is left out is not said."""
        near = self._keys[: len(self._ids)] @ key  # (N,)
        found = np.flatnonzero(near >= floor)
        if most is not None and len(found) > most:
            found = found[np.argpartition(-near[found], most)[:most]]
        return sorted((self._ids[row], float(near[row])) for row in found.tolist())
