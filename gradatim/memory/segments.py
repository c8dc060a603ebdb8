"""Sealed parts of a key index: rows that no longer grow, in a faiss inverted file that holds their codes.

Its lists are found by k-means on the rows themselves; the codes in them are as they came. A row that is erased leaves
its place behind, with a code that is near to nothing.

Shapes: n rows of a segment, E numbers that are kept of a key, B queries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

from gradatim.errors import StoreError
from gradatim.memory.codec import Codec, Codes, Floats

Rows: TypeAlias = NDArray[np.int64]

_ROWS_OF_A_LIST = 39  # faiss asks for as many training points
_LISTS_OF_ROOT = 4  # times the square root of n, as far as there are rows to train them on
_MOST_TRAINING_ROWS = 100_000
_LEAST_PROBES = 8  # lists that a search looks at, however long they are
_AT_ONCE = 20_000  # rows that are decoded


class Segment:
    """Rows [start, end), or some of them, in an inverted file under their own numbers."""

    def __init__(self, start: int, end: int, codec: Codec, index: Any) -> None:
        self.start, self.end = start, end
        self.index = index  # faiss.IndexIVFScalarQuantizer
        self._codec = codec
        self._version = 0  # how often something was erased
        self._file = (-1, "")  # the version that was written last, and the digest of its file
        sizes = [index.invlists.list_size(i) for i in range(index.nlist)]
        self._ends = np.cumsum(sizes)  # of the lists, one behind the other
        self._place = np.full(end - start, -1, np.int32)  # of each row there
        for which, size in enumerate(sizes):
            ids = faiss.rev_swig_ptr(index.invlists.get_ids(which), size) if size else np.empty(0, np.int64)
            if size and not (start <= ids.min() and ids.max() < end):
                raise StoreError(f"a segment holds rows that are not between {start} and {end}")
            self._place[ids - start] = self._ends[which] - size + np.arange(size)

    def __len__(self) -> int:
        """Rows that lie in it, with those that were erased."""
        return int(self.index.ntotal)

    @property
    def size_bytes(self) -> int:
        rows = len(self) * (self._codec.code_bytes + 8) + self._place.nbytes
        return rows + int(self.index.nlist) * (4 * self._codec.dims + self._ends.itemsize)

    def search(self, queries: Floats, count: int, scanned_rows: int) -> tuple[Floats, Rows]:
        """Squared distances (B, count), ascending, and rows (B, count), -1 where there are fewer; of queries (B, E)."""
        lists = int(self.index.nlist)
        probes = max(_LEAST_PROBES, round(scanned_rows * lists / max(1, len(self))))
        options = faiss.SearchParametersIVF(nprobe=min(probes, lists))
        found: tuple[Floats, Rows] = self.index.search(queries, count, params=options)
        return found

    def of(self, rows: Rows) -> Floats:
        """Keys (n, E) of rows that lie in it."""
        return self._codec.decode(np.stack([self._code(which, at).copy() for _, which, at in self._placed(rows)]))

    def erase(self, rows: Rows) -> None:
        """Their keys, at once; of those that lie in it."""
        far = self._codec.far
        for row, which, at in self._placed(rows):
            self.index.invlists.update_entry(which, at, row, faiss.swig_ptr(far))
            self._version += 1

    def _placed(self, rows: Rows) -> Iterator[tuple[int, int, int]]:
        """(row, list, place in it)."""
        places = self._place[rows - self.start]
        lists = np.searchsorted(self._ends, places, side="right")
        for row, which, place in zip(rows.tolist(), lists.tolist(), places.tolist(), strict=True):
            if place >= 0:
                yield row, which, place - (int(self._ends[which - 1]) if which else 0)

    def _code(self, which: int, at: int) -> Codes:
        size, width = self.index.invlists.list_size(which), self._codec.code_bytes
        codes: Codes = faiss.rev_swig_ptr(self.index.invlists.get_codes(which), size * width)
        return codes[at * width : (at + 1) * width]

    def held(self) -> tuple[Rows, Codes]:
        """Copies: the rows that lie in it, ascending (n,), and their codes (n, code_bytes)."""
        lists, width = self.index.invlists, self._codec.code_bytes
        rows, codes = np.empty(len(self), np.int64), np.empty((len(self), width), np.uint8)
        at = 0
        for which in range(self.index.nlist):
            if size := lists.list_size(which):
                rows[at : at + size] = faiss.rev_swig_ptr(lists.get_ids(which), size)
                codes[at : at + size] = faiss.rev_swig_ptr(lists.get_codes(which), size * width).reshape(size, width)
                at += size
        order = np.argsort(rows)
        return rows[order], codes[order]

    @property
    def file_sha256(self) -> str:
        """Of the file that it was written to as it is; empty where there is none."""
        version, digest = self._file
        return digest if version == self._version else ""

    def write(self, path: Path) -> str:
        """The digest of the file. OSError where the disk refuses."""
        version = self._version
        try:
            faiss.write_index(self.index, str(path))
        except RuntimeError as e:
            raise OSError(None, str(e).splitlines()[0]) from e
        self._file = version, sha256_of(path)
        return self._file[1]

    @classmethod
    def read(cls, start: int, end: int, codec: Codec, path: Path, sha256: str) -> Segment:
        """What ``write`` wrote, with that digest. StoreError where it is not that."""
        try:
            if sha256_of(path) != sha256:
                raise StoreError(f"{path} is no sound memory: its bytes are not those that were written")
            index = faiss.read_index(str(path))
        except (OSError, RuntimeError) as e:
            raise StoreError(f"{path} is no sound memory: {str(e).splitlines()[0]}") from e
        if not codec.fits(index):
            raise StoreError(f"{path} holds keys of another kind")
        segment = cls(start, end, codec, index)
        segment._file = 0, sha256
        return segment


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def built(start: int, end: int, codec: Codec, codes: Codes, rows: Rows) -> Segment:
    """A segment of what is left of its rows: their codes (n, code_bytes) and numbers (n,). Takes seconds for 10^5."""
    n = len(rows)
    lists = max(1, min(int(_LISTS_OF_ROOT * np.sqrt(n)), min(n, _MOST_TRAINING_ROWS) // _ROWS_OF_A_LIST))
    some = codes[:: max(1, -(-n // _MOST_TRAINING_ROWS))]
    index = codec.inverted(lists, codec.decode(some) if n else np.zeros((1, codec.dims), np.float32))
    of = np.concatenate([np.empty(0, np.int64), *(_lists_of(index, codec, part) for part in _parts(codes))])  # (n,)
    order = np.argsort(of, kind="stable")
    for which, members in enumerate(np.split(order, np.searchsorted(of[order], np.arange(1, lists)))):
        if len(members):  # each list is made in one piece, so that none of it is room to grow
            ids, mine = np.ascontiguousarray(rows[members]), np.ascontiguousarray(codes[members])
            index.invlists.add_entries(which, len(members), faiss.swig_ptr(ids), faiss.swig_ptr(mine))
    index.ntotal = n
    return Segment(start, end, codec, index)


def _parts(codes: Codes) -> list[Codes]:
    return [codes[i : i + _AT_ONCE] for i in range(0, len(codes), _AT_ONCE)]


def _lists_of(index: Any, codec: Codec, codes: Codes) -> Rows:
    """(n,) the list whose centre is nearest."""
    found: Rows = index.quantizer.search(codec.decode(codes), 1)[1][:, 0]
    return found
