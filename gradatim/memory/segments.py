"""Sealed parts of a key index: rows that no longer grow, in a faiss index that is trained on them.

It knows no keys beside those it is given, and of deletion only that some rows are not to be found.

Shapes: n rows of a segment, D width of a key, B queries, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from gradatim.errors import StoreError

Floats: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.int64]

_ROWS_OF_A_LIST = 39  # faiss asks for as many training points
_MOST_TRAINING_ROWS = 60_000


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, end) in an IVF,SQ8 index under their own numbers."""

    start: int
    end: int
    index: Any  # faiss.IndexIVF

    def search(self, queries: Floats, count: int, probes: int, selector: Any) -> Rows:
        """Candidates (B, count), -1 where there are fewer."""
        options = faiss.SearchParametersIVF(nprobe=probes, sel=selector)
        rows: Rows = self.index.search(queries, count, params=options)[1]
        return rows

    def keep(self, selector: Any) -> None:
        """Take all other rows out of it."""
        self.index.remove_ids(faiss.IDSelectorNot(selector))

    def to_bytes(self) -> bytes:
        return bytes(faiss.serialize_index(self.index).tobytes())


def selector_of(alive: NDArray[np.bool_]) -> Any:
    """Of rows 0, 1, ...: those that may be found. None where all may."""
    return None if alive.all() else faiss.IDSelectorBitmap(np.packbits(alive, bitorder="little"))


def built(start: int, end: int, keys: Floats, rows: Rows) -> Segment:
    """A segment of what is left of its rows: keys (n, D) and their numbers (n,). Takes seconds for 10^5."""
    lists = max(1, min(int(4 * np.sqrt(len(keys))), len(keys) // _ROWS_OF_A_LIST))
    index = faiss.index_factory(keys.shape[1], f"IVF{lists},SQ8")
    step = max(1, len(keys) // _MOST_TRAINING_ROWS)
    index.train(keys[::step] if len(keys) else np.zeros((1, keys.shape[1]), np.float32))
    index.add_with_ids(keys, rows)
    return Segment(start, end, index)


def parsed(start: int, end: int, data: bytes) -> Segment:
    """What ``to_bytes`` gave. StoreError where it is not that."""
    try:
        index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
    except RuntimeError as e:
        raise StoreError(f"not a faiss index: {str(e).splitlines()[0]}") from e
    if not isinstance(index, faiss.IndexIVF):
        raise StoreError(f"not an inverted-file index but {type(index).__name__}")
    return Segment(start, end, index)
