"""Nearest neighbours among one tenant's keys: new ones are searched exactly, old ones through sealed faiss segments.

The keys themselves are kept, in half precision, and every candidate's distance is computed again from them: what a
segment's quantiser rounds away costs candidates, never order. A removed row is hidden at once by its bit. The segments
are derived: they can be thrown away and built again from the keys. It knows no tokens, models, sources or tenants.

Shapes: N rows ever added, D width of a key, B queries, K neighbours asked for, C candidates of a segment.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from gradatim.errors import MemoryKeyError, StoreError

Floats: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.int64]

HOT_ROWS = 20_000  # rows searched exactly before they are sealed
PROBES = 16  # inverted lists looked at in a segment
CANDIDATES = 64  # rows of each part whose exact distances are computed
_ROWS_OF_A_LIST = 39  # faiss asks for as many training points
_MOST_TRAINING_ROWS = 60_000


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, end) in an IVF,SQ8 index under their own numbers."""

    start: int
    end: int
    index: Any  # faiss.IndexIVF

    def to_bytes(self) -> bytes:
        return bytes(faiss.serialize_index(self.index).tobytes())


class KeyIndex:
    """Rows of keys, numbered from 0 in the order in which they came. All methods may be called from any thread."""

    def __init__(self, width: int, *, hot_rows: int = HOT_ROWS, probes: int = PROBES, candidates: int = CANDIDATES):
        self.width = width
        self._hot_rows, self._probes, self._candidates = hot_rows, probes, candidates
        self._lock = threading.RLock()  # of everything below
        self._building = threading.Lock()  # one segment at a time
        self._keys: NDArray[np.float16] = np.zeros((0, width), np.float16)  # (capacity, D)
        self._hot: Floats = np.zeros((hot_rows, width), np.float32)  # the unsealed rows once more
        self._norms: Floats = np.zeros(hot_rows, np.float32)  # squared, of the same
        self._alive: NDArray[np.bool_] = np.zeros(0, np.bool_)  # (capacity,) whether a row may be found
        self._selector: Any = None  # the same of the sealed rows, for faiss; None where none of them was removed
        self._rows = 0
        self._removed = 0
        self._segments: tuple[Segment, ...] = ()

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

    def add(self, keys: Floats) -> range:
        """Their new row numbers. ``keys`` (n, D). MemoryKeyError where a number is not finite in half precision."""
        if keys.ndim != 2 or keys.shape[1] != self.width:
            raise MemoryKeyError(f"keys of shape {keys.shape} do not fit an index of width {self.width}")
        with np.errstate(over="ignore"):
            half = keys.astype(np.float16)
        if not np.isfinite(half).all():
            raise MemoryKeyError("a key holds NaN, an infinity or a number above 65504; it is not stored")
        with self._lock:
            start, end = self._rows, self._rows + len(half)
            self._reserve(end)
            self._keys[start:end] = half
            hot = slice(start - self.sealed, end - self.sealed)
            self._hot[hot] = half
            self._norms[hot] = np.square(self._hot[hot]).sum(1)
            self._alive[start:end] = True
            self._rows = end
            return range(start, end)

    def fill(self, keys: NDArray[np.float16], alive: NDArray[np.bool_]) -> None:
        """Rows (N, D) of an index that was written, into an empty one."""
        assert self._rows == 0
        self.add(keys.astype(np.float32))
        with self._lock:
            self._alive[: len(alive)] = alive
            self._removed = int((~alive).sum())

    def _reserve(self, rows: int) -> None:
        if rows > len(self._keys):
            capacity = max(rows, 2 * len(self._keys), 1024)
            self._keys = _grown(self._keys, capacity)
            self._alive = _grown(self._alive, capacity)
        if rows - self.sealed > len(self._hot):
            capacity = max(rows - self.sealed, 2 * len(self._hot))
            self._hot, self._norms = _grown(self._hot, capacity), _grown(self._norms, capacity)

    def alive(self) -> NDArray[np.bool_]:
        """A copy, (N,): whether a row may be found."""
        with self._lock:
            return self._alive[: self._rows].copy()

    def remove(self, rows: range) -> None:
        """From the next search on they are not found, and their keys are zero. Twice does nothing."""
        with self._lock:
            span = slice(rows.start, rows.stop)
            self._removed += int(self._alive[span].sum())
            self._alive[span] = False
            self._keys[span] = 0
            self._select()

    def _select(self) -> None:
        alive = self._alive[: self.sealed]
        self._selector = None if alive.all() else faiss.IDSelectorBitmap(np.packbits(alive, bitorder="little"))

    def keys(self) -> NDArray[np.float16]:
        """A copy, (N, D); rows that were removed are zero."""
        with self._lock:
            return self._keys[: self._rows].copy()

    # ------------------------------------------------------------------------------------------ search

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        """Squared distances (B, K), ascending, and rows (B, K); of ties the older row is first. Where fewer are to be
        had the rest is inf and -1. ``queries`` (B, D), finite."""
        with self._lock:
            parts = [self._among_hot(queries, k)]
            if self._segments:
                options = faiss.SearchParametersIVF(nprobe=self._probes, sel=self._selector)
                wanted = max(k, self._candidates)
                parts += [s.index.search(queries, wanted, params=options)[1] for s in self._segments]
            candidates = np.sort(np.concatenate(parts, 1), 1)  # (B, C'), -1 first
            return self._nearest(queries, candidates, k)

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
        are few. Searches and additions go on meanwhile."""
        with self._building:
            with self._lock:
                end, kept = self._rows, list(self._segments)
                start = self.sealed
                while kept and kept[-1].end - kept[-1].start <= end - start:
                    start = kept.pop().start
                alive = self._alive[start:end].copy()
                keys = self._keys[start:end].astype(np.float32)
            if end == start:
                return
            segment = Segment(start, end, _built(keys[alive], np.flatnonzero(alive) + start, self.width))
            with self._lock:
                self._adopt((*kept, segment))

    def _adopt(self, segments: tuple[Segment, ...]) -> None:
        self._segments = segments
        left = self._rows - self.sealed
        self._hot = np.zeros((max(left, self._hot_rows), self.width), np.float32)
        self._hot[:left] = self._keys[self.sealed : self._rows]
        self._norms = np.zeros(len(self._hot), np.float32)
        self._norms[:left] = np.square(self._hot[:left]).sum(1)
        self._select()

    def segments(self) -> tuple[Segment, ...]:
        """The sealed ones, without what was removed."""
        with self._lock:
            if self._selector is not None:
                for segment in self._segments:
                    segment.index.remove_ids(faiss.IDSelectorNot(self._selector))
            return self._segments

    def restore(self, segments: Sequence[tuple[int, int, bytes]]) -> None:
        """Take over segments that were written for these very rows, as (start, end, bytes) from row 0 on.
        StoreError where they are not what they should be; nothing has changed then."""
        read: list[Segment] = []
        at = 0
        for start, end, data in segments:
            index = _parsed(data)
            if start != at or not start < end <= self._rows or index.d != self.width or index.ntotal > end - start:
                raise StoreError(f"a segment of rows {start} to {end} does not fit {self._rows} rows")
            read.append(Segment(start, end, index))
            at = end
        with self._lock:
            self._adopt(tuple(read))


def _grown(array: Any, capacity: int) -> Any:
    out = np.zeros((capacity, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out


def _built(keys: Floats, rows: Rows, width: int) -> Any:
    lists = max(1, min(int(4 * np.sqrt(len(keys))), len(keys) // _ROWS_OF_A_LIST))
    index = faiss.index_factory(width, f"IVF{lists},SQ8")
    step = max(1, len(keys) // _MOST_TRAINING_ROWS)
    index.train(keys[::step] if len(keys) else np.zeros((1, width), np.float32))
    index.add_with_ids(keys, rows)
    return index


def _parsed(data: bytes) -> Any:
    try:
        index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
    except RuntimeError as e:
        raise StoreError(f"not a faiss index: {str(e).splitlines()[0]}") from e
    if not isinstance(index, faiss.IndexIVF):
        raise StoreError(f"not an inverted-file index but {type(index).__name__}")
    return index
