"""Nearest neighbours among one tenant's keys in one space: new ones are searched exactly, old ones through sealed faiss
segments.

Keys have the names of what they were made of, one or many to a name. Each is kept in one place, rounded by its codec,
and distances are computed from what is kept, by the same sum wherever it lies: sealing costs candidates, never order.
A removed key is hidden by its bit, and overwritten, at once. It knows no tokens, models or tenants.

Shapes: N rows ever added, D width of a key, E numbers that are kept of it, B queries, K neighbours asked for.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradatim.errors import MemoryKeyError, StoreError
from gradatim.memory.codec import Codec, Codes, Floats, flat_codes, halves
from gradatim.memory.segments import WHOLE_ROWS, Rows, Segment, built

HOT_ROWS = 20_000  # rows searched exactly before they are sealed
_TIES = 8  # rows looked for beyond K, so that of equally near ones the oldest are taken
_FIRST_ROWS = 8  # that there is room for: most tenants and scopes have few
_WORTH_COMPACTING = 1024  # rows that were removed

Spans = Mapping[str, Sequence[tuple[int, int]]]  # rows [start, end) of each name


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """All that an index holds, at one time. Rows of no name were removed."""

    segments: tuple[Segment, ...]  # from row 0 on
    codes: Codes  # (n, code_bytes) of the rows after
    alive: NDArray[np.bool_]  # (N,) whether a row may be found
    spans: Spans


class KeyIndex:
    """Rows of keys, numbered from 0 in the order in which they came. All methods may be called from any thread.

    ``codec`` is how keys are kept: in half precision if it is not given. ``whole_rows``: sealed parts of so many are
    searched exactly too."""

    def __init__(
        self, width: int, codec: Codec | None = None, *, hot_rows: int = HOT_ROWS, whole_rows: int = WHOLE_ROWS
    ):
        self.width = width
        self.codec = codec or halves(width)
        self._hot_rows, self._whole_rows = hot_rows, whole_rows
        self._lock = threading.RLock()  # of everything below
        self._building = threading.RLock()  # what is in a segment changes by one thread at a time; taken first
        self._hot = self.codec.flat()  # the unsealed rows
        self._alive: NDArray[np.bool_] = np.zeros(0, np.bool_)  # (capacity,) whether a row may be found
        self._rows = 0
        self._removed = 0
        self._segments: tuple[Segment, ...] = ()
        self._spans: dict[str, tuple[range, ...]] = {}  # rows of each name
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
        """Memory that its rows take, without their names."""
        return sum(s.size_bytes for s in self._segments) + int(self._hot.codes.size()) + self._alive.nbytes

    # ------------------------------------------------------------------------------------------ changes

    def add(self, name: str, keys: Floats) -> range:
        """Their new row numbers, beside those that the name has. ``keys`` (n, D). MemoryKeyError where a number is not
        finite in half precision."""
        codes = self._encoded(keys)
        with self._lock:
            rows = self._append(codes)
            self._own(name, rows)
            return rows

    def replace(self, name: str, keys: Floats) -> tuple[range, list[range]]:
        """The same in place of all rows that the name had, which are the second that is given. Where the new ones are
        refused the old ones stay."""
        codes = self._encoded(keys)
        with self._lock:
            gone = self.remove(name)
            rows = self._append(codes)
            self._own(name, rows)
            return rows, gone

    def remove(self, name: str) -> list[range]:
        """From the next search on none of its rows is found, and their keys are gone. Which ones; a name that is not
        there has none."""
        with self._lock:
            gone = list(self._spans.pop(name, ()))
            for rows in gone:
                self._alive[rows.start : rows.stop] = False
                self._removed += len(rows)
                if len(rows) and (segment := self._segment_of(rows.start)) is not None:
                    segment.erase(np.arange(rows.start, rows.stop))
                else:
                    self._hot_codes()[rows.start - self.sealed : rows.stop - self.sealed] = self.codec.far
            return gone

    def _segment_of(self, row: int) -> Segment | None:
        """None of an unsealed one. What was added at once lies in one part."""
        return next((s for s in self._segments if row < s.end), None)

    def fill(self, segments: Sequence[Segment], codes: Codes, spans: Spans) -> None:
        """What an index held, into an empty one. StoreError where the parts do not fit; nothing has changed then."""
        at = 0
        for s in segments:
            if s.start != at or s.index.d != self.codec.dims:
                raise StoreError(f"a segment of rows {s.start} to {s.end} does not fit what is before it")
            at = s.end
        if codes.shape[1:] != (self.codec.code_bytes,):
            raise StoreError(f"codes of shape {codes.shape} are not of {self.codec.code_bytes} bytes each")
        rows = sorted((a, b, name) for name, some in spans.items() for a, b in some)
        if any(a < 0 or a > b for a, b, _ in rows) or any(x[1] > y[0] for x, y in pairwise(rows)):
            raise StoreError("rows are of two names")
        if rows and rows[-1][1] > at + len(codes):
            raise StoreError(f"names of {rows[-1][1]} rows do not fit {at + len(codes)}")
        with self._lock:
            assert self._rows == 0
            self._segments, self._rows = tuple(segments), at
            self._append(codes)
            self._alive[:] = False
            for start, end, name in rows:
                self._own(name, range(start, end))
                self._alive[start:end] = True
            self._removed = self._rows - int(self._alive.sum())
            self._hot_codes()[~self._alive[at : self._rows]] = self.codec.far

    def compacted(self, held: Held) -> KeyIndex:
        """An index of the same keys that never held what was removed; ``held`` is of this one, which stays ``still``.
        What this one is told in the meantime is not in it: see ``stands_for``. May take seconds."""
        at = np.concatenate([[0], np.cumsum(held.alive)])  # the new number of each row
        out = KeyIndex(self.width, self.codec, hot_rows=self._hot_rows, whole_rows=self._whole_rows)
        segments = []
        for segment in held.segments:
            left = held.alive[segment.start : segment.end]
            if left.any():
                segments.append(self._built(int(at[segment.start]), segment.codes[left], left[left]))
        sealed = held.segments[-1].end if held.segments else 0
        spans = {name: [(int(at[a]), int(at[b])) for a, b in rows] for name, rows in held.spans.items()}
        out.fill(segments, held.codes[held.alive[sealed:]], spans)
        return out

    def stands_for(self, other: KeyIndex, rows: int) -> bool:
        """Whether this compacted one may take the place of ``other``, which had that many rows when it was begun: what
        was removed there since is removed here; where something was added since it is out of date."""
        if other.rows != rows:
            return False
        for name in self.names - other.names:
            self.remove(name)
        return True

    def _encoded(self, keys: Floats) -> Codes:
        """(n, D) -> (n, code_bytes)."""
        if keys.ndim != 2 or keys.shape[1] != self.width:
            raise MemoryKeyError(f"keys of shape {keys.shape} do not fit an index of width {self.width}")
        with np.errstate(over="ignore"):
            if not np.isfinite(keys.astype(np.float16)).all():
                raise MemoryKeyError("a key holds NaN, an infinity or a number above 65504; it is not stored")
        return self.codec.encode(keys)

    def _append(self, codes: Codes) -> range:
        start, end = self._rows, self._rows + len(codes)
        if end > len(self._alive):
            self._alive = _grown(self._alive, max(end, 2 * len(self._alive), _FIRST_ROWS))
        if len(codes):
            self._hot.add_sa_codes(codes)
        self._alive[start:end] = True
        self._rows = end
        return range(start, end)

    def _own(self, name: str, rows: range) -> None:
        self._spans[name] = (*self._spans.get(name, ()), rows)
        self._starts.append(rows.start)
        self._owners.append(name)

    # ------------------------------------------------------------------------------------------ looking

    def alive(self) -> NDArray[np.bool_]:
        """A copy, (N,): whether a row may be found."""
        with self._lock:
            return self._alive[: self._rows].copy()

    def spans(self) -> dict[str, list[tuple[int, int]]]:
        """Rows [start, end) of each name."""
        with self._lock:
            spans = self._spans.copy()
        return _pairs(spans)

    def name_of(self, row: int) -> str | None:
        """Whose a row is; None where it was removed."""
        with self._lock:
            if not (0 <= row < self._rows and self._alive[row]):
                return None
            return self._owners[bisect_right(self._starts, row) - 1]

    def of(self, name: str) -> Floats:
        """The keys of a name (n, E), as they are kept."""
        with self._lock:
            return np.concatenate([self._between(rows) for rows in self._spans[name]])

    def _between(self, rows: range) -> Floats:
        if len(rows) and (segment := self._segment_of(rows.start)) is not None:
            return segment.of(np.arange(rows.start, rows.stop))
        return self.codec.decode(self._hot_codes()[rows.start - self.sealed : rows.stop - self.sealed])

    def _hot_codes(self) -> Codes:
        """(n, code_bytes) of the unsealed rows, until the next change: to be read or written under the lock."""
        return flat_codes(self._hot)

    @contextmanager
    def still(self) -> Iterator[None]:
        """While it holds no segment is built. Searches and changes go on."""
        with self._building:
            yield

    def held(self) -> Held:
        """All of it, without what was removed. Its segments are this one's own: they are all there is for as long as it
        is ``still``."""
        with self._lock:
            segments, codes, alive, spans = self._segments, self._hot_codes().copy(), self.alive(), self._spans.copy()
        return Held(segments, codes, alive, _pairs(spans))

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
        seen, count = np.ascontiguousarray(self.codec.seen(queries), np.float32), k + _TIES
        with self._lock:
            parts = [s.search(seen, count) for s in self._segments]
            if self._hot.ntotal:
                distances, rows = self._hot.search(seen, count)
                parts.append((distances, np.where(rows < 0, rows, rows + self.sealed)))
            if not parts:
                return np.full((len(seen), k), np.inf, np.float32), np.full((len(seen), k), -1)
            distances, rows = parts[0] if len(parts) == 1 else (np.concatenate(x, 1) for x in zip(*parts, strict=True))
            gone = (rows < 0) | ~self._alive[rows]
        distances[gone], rows[gone] = np.inf, -1
        order = np.lexsort((rows, distances), 1)[:, :k]
        of = np.arange(len(seen))[:, None]
        return distances[of, order], rows[of, order]

    # ---------------------------------------------------------------------------------------- segments

    def seal(self) -> None:
        """Put all unsealed rows into a segment, together with the youngest segments that are no larger, so that there
        are few. Searches and changes go on meanwhile."""
        with self._building:
            with self._lock:
                start, end, kept = self.sealed, self._rows, list(self._segments)
                alive, merged = self._alive[:end].copy(), [self._hot_codes().copy()]
            while kept and len(kept[-1]) <= end - start:
                segment = kept.pop()
                start = segment.start
                merged.append(segment.codes)
            if end == start:
                return
            segment = self._built(start, np.concatenate(merged[::-1]), alive[start:])
            with self._lock:
                segment.erase((alive[start:] & ~self._alive[start:end]).nonzero()[0] + start)  # removed meanwhile
                self._adopt((*kept, segment))

    def _built(self, start: int, codes: Codes, alive: NDArray[np.bool_]) -> Segment:
        return built(start, self.codec, codes, alive, whole_rows=self._whole_rows)

    def _adopt(self, segments: tuple[Segment, ...]) -> None:
        before, self._segments = self.sealed, segments
        left = self._hot_codes()[self.sealed - before :].copy()
        self._hot = self.codec.flat()
        if len(left):
            self._hot.add_sa_codes(left)


def _pairs(spans: Mapping[str, Sequence[range]]) -> dict[str, list[tuple[int, int]]]:
    return {name: [(r.start, r.stop) for r in rows] for name, rows in spans.items()}


def _grown(array: Any, capacity: int) -> Any:
    out = np.zeros((capacity, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out
