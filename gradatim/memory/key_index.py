"""Nearest neighbours among one tenant's keys in one space: new ones are searched exactly, old ones through sealed faiss
segments.

Keys have the names of what they were made of, one or many to a name. They are kept in half precision, and every
candidate's distance is computed again from them: what a segment's quantiser rounds away costs candidates, never order.
A removed key is hidden at once by its bit. The segments are derived: they can be thrown away and built again from the
keys. It knows no tokens, models or tenants.

Shapes: N rows ever added, D width of a key, B queries, K neighbours asked for, C candidates of a segment.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradatim.errors import MemoryKeyError, StoreError
from gradatim.memory.segments import Floats, Rows, Segment, built, parsed, selector_of

Halves: TypeAlias = NDArray[np.float16]

HOT_ROWS = 20_000  # rows searched exactly before they are sealed
PROBES = 16  # inverted lists looked at in a segment
CANDIDATES = 64  # rows of each part whose exact distances are computed
_FIRST_ROWS = 8  # that there is room for: most tenants and scopes have few
_WORTH_COMPACTING = 1024  # rows that were removed


class KeyIndex:
    """Rows of keys, numbered from 0 in the order in which they came. All methods may be called from any thread."""

    def __init__(self, width: int, *, hot_rows: int = HOT_ROWS, probes: int = PROBES, candidates: int = CANDIDATES):
        self.width = width
        self._hot_rows, self._probes, self._candidates = hot_rows, probes, candidates
        self._lock = threading.RLock()  # of everything below
        self._building = threading.Lock()  # one segment at a time
        self._keys: Halves = np.zeros((0, width), np.float16)  # (capacity, D)
        self._hot: Floats = np.zeros((0, width), np.float32)  # the unsealed rows once more
        self._norms: Floats = np.zeros(0, np.float32)  # squared, of the same
        self._alive: NDArray[np.bool_] = np.zeros(0, np.bool_)  # (capacity,) whether a row may be found
        self._selector: Any = None  # the same of the sealed rows, for faiss; None where none of them was removed
        self._selecting = True  # the selector is what it should be
        self._rows = 0
        self._removed = 0
        self._segments: tuple[Segment, ...] = ()
        self._spans: dict[str, list[range]] = {}  # rows of each name
        self._starts: list[int] = []  # of all spans there ever were, ascending, and whose they were
        self._owners: list[str] = []

    def __len__(self) -> int:
        """Rows that can be found."""
        return self._rows - self._removed

    def __contains__(self, name: str) -> bool:
        return name in self._spans

    @property
    def names(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._spans)

    @property
    def rows(self) -> int:
        """All that were ever added."""
        return self._rows

    @property
    def removed(self) -> int:
        return self._removed

    @property
    def sealed(self) -> int:
        """Rows [0, sealed) are in segments."""
        segments = self._segments
        return segments[-1].end if segments else 0

    @property
    def full(self) -> bool:
        """Whether enough rows are unsealed for a new segment."""
        return self._rows - self.sealed >= self._hot_rows

    @property
    def worn(self) -> bool:
        """Whether most of it is what was removed, so that ``compacted`` pays."""
        return self._removed > max(len(self), _WORTH_COMPACTING)

    @property
    def size_bytes(self) -> int:
        sealed = self.sealed
        return self.width * (2 * self._rows + 4 * (self._rows - sealed)) + (self.width + 8) * sealed

    # ------------------------------------------------------------------------------------------ changes

    def add(self, name: str, keys: Floats) -> range:
        """Their new row numbers, beside those that the name has. ``keys`` (n, D). MemoryKeyError where a number is not
        finite in half precision."""
        half = self._half(keys)
        with self._lock:
            rows = self._append(half)
            self._own(name, rows)
            return rows

    def replace(self, name: str, keys: Floats) -> tuple[range, list[range]]:
        """The same in place of all rows that the name had, which are the second that is given. Where the new ones are
        refused the old ones stay."""
        half = self._half(keys)
        with self._lock:
            gone = self.remove(name)
            rows = self._append(half)
            self._own(name, rows)
            return rows, gone

    def remove(self, name: str) -> list[range]:
        """From the next search on none of its rows is found, and their keys are zero. Which ones; a name that is not
        there has none."""
        with self._lock:
            gone = self._spans.pop(name, [])
            for rows in gone:
                span = slice(rows.start, rows.stop)
                self._alive[span] = False
                self._keys[span] = 0
                self._hot[max(0, rows.start - self.sealed) : max(0, rows.stop - self.sealed)] = 0
                self._removed += len(rows)
                self._selecting = self._selecting and rows.start >= self.sealed
            return gone

    def fill(self, keys: Halves, spans: Mapping[str, Sequence[tuple[int, int]]]) -> None:
        """Rows (N, D) of an index that was written, and whose they are, into an empty one. Those of nobody were
        removed."""
        with self._lock:
            assert self._rows == 0
            self._append(keys)
            self._alive[:] = False
            for start, end, name in sorted((a, b, name) for name, some in spans.items() for a, b in some):
                self._own(name, range(start, end))
                self._alive[start:end] = True
            self._removed = self._rows - int(self._alive.sum())

    def compacted(self) -> KeyIndex:
        """An unsealed index of the same keys that never held what was removed. What this one was told in the meantime
        is not in it: see ``stands_for``."""
        with self._lock:
            alive, keys = self._alive[: self._rows], self._keys[: self._rows]
            keys = keys[alive]
            at = [0, *np.cumsum(alive).tolist()]  # the new number of each row
            spans = {name: [(at[r.start], at[r.stop]) for r in rows] for name, rows in self._spans.items()}
        out = KeyIndex(self.width, hot_rows=self._hot_rows, probes=self._probes, candidates=self._candidates)
        out.fill(keys, spans)
        return out

    def stands_for(self, other: KeyIndex, rows: int) -> bool:
        """Whether this compacted one may take the place of ``other``, which had that many rows when it was begun: what
        was removed there since is removed here; where something was added since it is out of date."""
        if other.rows != rows:
            return False
        for name in self.names - other.names:
            self.remove(name)
        return True

    def _half(self, keys: Floats) -> Halves:
        if keys.ndim != 2 or keys.shape[1] != self.width:
            raise MemoryKeyError(f"keys of shape {keys.shape} do not fit an index of width {self.width}")
        with np.errstate(over="ignore"):
            half = keys.astype(np.float16)
        if not np.isfinite(half).all():
            raise MemoryKeyError("a key holds NaN, an infinity or a number above 65504; it is not stored")
        return half

    def _append(self, half: Halves) -> range:
        start, end = self._rows, self._rows + len(half)
        self._reserve(end)
        self._keys[start:end] = half
        hot = slice(start - self.sealed, end - self.sealed)
        self._hot[hot] = half
        self._norms[hot] = np.square(self._hot[hot]).sum(1)
        self._alive[start:end] = True
        self._rows = end
        return range(start, end)

    def _own(self, name: str, rows: range) -> None:
        self._spans.setdefault(name, []).append(rows)
        self._starts.append(rows.start)
        self._owners.append(name)

    def _reserve(self, rows: int) -> None:
        if rows > len(self._keys):
            capacity = max(rows, 2 * len(self._keys), _FIRST_ROWS)
            self._keys = _grown(self._keys, capacity)
            self._alive = _grown(self._alive, capacity)
        if rows - self.sealed > len(self._hot):
            capacity = max(rows - self.sealed, 2 * len(self._hot), _FIRST_ROWS)
            self._hot, self._norms = _grown(self._hot, capacity), _grown(self._norms, capacity)

    # ------------------------------------------------------------------------------------------ looking

    def alive(self) -> NDArray[np.bool_]:
        """A copy, (N,): whether a row may be found."""
        with self._lock:
            return self._alive[: self._rows].copy()

    def keys(self) -> Halves:
        """A copy, (N, D); rows that were removed are zero."""
        with self._lock:
            return self._keys[: self._rows].copy()

    def spans(self) -> dict[str, list[tuple[int, int]]]:
        """Rows [start, end) of each name."""
        with self._lock:
            return {name: [(r.start, r.stop) for r in rows] for name, rows in self._spans.items()}

    def name_of(self, row: int) -> str | None:
        """Whose a row is; None where it was removed."""
        with self._lock:
            if not (0 <= row < self._rows and self._alive[row]):
                return None
            return self._owners[bisect_right(self._starts, row) - 1]

    def of(self, name: str) -> Floats:
        """The keys of a name (n, D), as they are kept."""
        with self._lock:
            keys = [self._keys[r.start : r.stop] for r in self._spans[name]]
            return np.concatenate(keys).astype(np.float32)

    # ------------------------------------------------------------------------------------------ search

    def near(self, key: Floats, k: int, floor: float = -2.0) -> list[tuple[str, float]]:
        """(name, cosine) of the nearest K keys to a vector (D,), all of length 1, that are at least ``floor`` near, the
        nearest first."""
        distances, rows = self.search(key[None], k)
        with self._lock:
            found = [(self.name_of(row), 1.0 - d / 2.0) for d, row in zip(distances[0], rows[0].tolist(), strict=True)]
        return [(name, float(cosine)) for name, cosine in found if name is not None and cosine >= floor]

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        """Squared distances (B, K), ascending, and rows (B, K); of ties the older row is first. Where fewer are to be
        had the rest is inf and -1. ``queries`` (B, D), finite."""
        with self._lock:
            parts = [self._among_hot(queries, k)]
            if self._segments:
                wanted, selector = max(k, self._candidates), self._selected()
                parts += [s.search(queries, wanted, self._probes, selector) for s in self._segments]
            candidates = np.sort(np.concatenate(parts, 1), 1)  # (B, C'), -1 first
            return self._nearest(queries, candidates, k)

    def _selected(self) -> Any:
        if not self._selecting:
            self._selector, self._selecting = selector_of(self._alive[: self.sealed]), True
        return self._selector

    def _among_hot(self, queries: Floats, k: int) -> Rows:
        """The best unsealed rows, (B, <= K) in no order, -1 for one that was removed."""
        sealed, n = self.sealed, self._rows - self.sealed
        if n == 0:
            return np.zeros((len(queries), 0), np.int64)
        scores = self._norms[:n] - 2.0 * (queries @ self._hot[:n].T)  # (B, n), less |q|^2
        scores[:, ~self._alive[sealed : sealed + n]] = np.inf
        wanted = min(n, max(k, self._candidates))
        best = np.argpartition(scores, wanted - 1, 1)[:, :wanted]
        gone = np.isinf(np.take_along_axis(scores, best, 1))
        return np.where(gone, -1, best + sealed)

    def _nearest(self, queries: Floats, candidates: Rows, k: int) -> tuple[Floats, Rows]:
        exact = self._keys[candidates].astype(np.float32)  # (B, C', D)
        exact -= queries[:, None]
        distances = np.einsum("bcd,bcd->bc", exact, exact)  # (B, C')
        distances[candidates < 0] = np.inf
        order = np.argsort(distances, 1, kind="stable")[:, :k]
        found, rows = (np.take_along_axis(x, order, 1) for x in (distances, candidates))
        short = k - found.shape[1]
        if short > 0:
            found = np.pad(found, ((0, 0), (0, short)), constant_values=np.inf)
            rows = np.pad(rows, ((0, 0), (0, short)), constant_values=-1)
        return found, rows

    # ---------------------------------------------------------------------------------------- segments

    def seal(self) -> None:
        """Put all unsealed rows into a segment, together with the youngest segments that are no larger, so that there
        are few. Searches and changes go on meanwhile."""
        with self._building:
            with self._lock:
                end, kept = self._rows, list(self._segments)
                start = self.sealed
                while kept and kept[-1].end - kept[-1].start <= end - start:
                    start = kept.pop().start
                alive, keys = self._alive[start:end].copy(), self._keys[start:end]
            if end == start:
                return
            rows = np.flatnonzero(alive)
            segment = built(start, end, keys[rows].astype(np.float32), rows + start)
            with self._lock:
                self._adopt((*kept, segment))

    def _adopt(self, segments: tuple[Segment, ...]) -> None:
        self._segments = segments
        left = self._rows - self.sealed
        self._hot = np.zeros((max(left, _FIRST_ROWS), self.width), np.float32)
        self._hot[:left] = self._keys[self.sealed : self._rows]
        self._norms = np.zeros(len(self._hot), np.float32)
        self._norms[:left] = np.square(self._hot[:left]).sum(1)
        self._selecting = False

    def segments(self) -> tuple[Segment, ...]:
        """The sealed ones, without what was removed."""
        with self._lock:
            if (selector := self._selected()) is not None:
                for segment in self._segments:
                    segment.keep(selector)
            return self._segments

    def restore(self, segments: Sequence[tuple[int, int, bytes]]) -> None:
        """Take over segments that were written for these very rows, as (start, end, bytes) from row 0 on.
        StoreError where they are not what they should be; nothing has changed then."""
        read: list[Segment] = []
        at = 0
        for start, end, data in segments:
            segment = parsed(start, end, data)
            width, count = segment.index.d, segment.index.ntotal
            if start != at or not start < end <= self._rows or width != self.width or count > end - start:
                raise StoreError(f"a segment of rows {start} to {end} does not fit {self._rows} rows")
            read.append(segment)
            at = end
        with self._lock:
            self._adopt(tuple(read))


def _grown(array: Any, capacity: int) -> Any:
    out = np.zeros((capacity, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out
