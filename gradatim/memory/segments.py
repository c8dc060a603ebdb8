"""Sealed parts of a key index: rows that no longer grow, their codes one behind the other, and, where they are many, a
rough copy of them in a faiss inverted file.

A search looks through the rough copy, four bits for each pair of the directions in which these rows vary most, many
rows in one instruction (arXiv:1704.07355), and compares what it finds there by the codes themselves. The directions,
the lists and the rough codes are made of the rows of the segment, and of no other's. A row that is erased leaves its
place behind, with codes that are near to nothing.

Shapes: n rows of a segment, E numbers that are kept of a key, P <= E of its rough copy, B queries.
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
from gradatim.memory.codec import Codec, Codes, Floats, flat_codes

Rows: TypeAlias = NDArray[np.int64]

WHOLE_ROWS = 2_048  # a segment of so many is compared whole
_ROUGH_DIMS = 80  # P
_LISTS_OF_ROOT = 2  # times the square root of n, as far as there are rows to train them on
_ROWS_OF_A_LIST = 39  # faiss asks for as many training points
_MOST_TRAINING_ROWS = 100_000
_SCANNED_ROWS = 4_000  # of the rough copy, about, that a search looks at
_CANDIDATES = 128  # that it compares by their codes
_LEAST_PROBES = 8  # lists that it looks at, however long they are
_AT_ONCE = 20_000  # rows that are decoded
_NEAR_LISTS = 4  # in which an erased row is looked for first


class Segment:
    """Rows [start, end). ``index`` is what is searched, with rows numbered from 0: ``Codec.flat``, or faiss.IndexRefine
    of a rough copy and that."""

    def __init__(self, start: int, end: int, codec: Codec, index: Any) -> None:
        self.start, self.end = start, end
        self.index = index
        self._codec = codec
        refined = isinstance(index, faiss.IndexRefine)
        self._flat = faiss.downcast_index(index.refine_index) if refined else index
        self._rough = _Rough(index) if refined else None
        self._version = 0  # how often something was erased
        self._file = (-1, "")  # the version that was written last, and the digest of its file
        if not codec.fits(self._flat):
            raise StoreError("a segment holds keys of another kind")
        if self._flat.ntotal != end - start or (self._rough and not self._rough.is_of(end - start)):
            raise StoreError(f"a segment holds rows that are not between {start} and {end}")

    def __len__(self) -> int:
        """Rows that lie in it, with those that were erased."""
        return self.end - self.start

    @property
    def size_bytes(self) -> int:
        return len(self) * self._codec.code_bytes + (self._rough.size_bytes if self._rough else 0)

    @property
    def codes(self) -> Codes:
        """(n, code_bytes), where they lie."""
        return flat_codes(self._flat)

    def search(self, queries: Floats, count: int) -> tuple[Floats, Rows]:
        """Squared distances (B, count), ascending, and rows (B, count), -1 where there are fewer; of queries (B, E)."""
        options = {} if self._rough is None else {"params": self._rough.options(count)}
        distances, rows = self.index.search(queries, count, **options)
        return distances, np.where(rows < 0, rows, rows + self.start)

    def of(self, rows: Rows) -> Floats:
        """Keys (n, E) of its rows."""
        return self._codec.decode(self.codes[rows - self.start])

    def erase(self, rows: Rows) -> None:
        """Their keys, at once."""
        if not len(rows):
            return
        self._version += 1
        if self._rough is not None:
            self._rough.erase(rows - self.start, self.of(rows))
        self.codes[rows - self.start] = self._codec.far

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
        segment = cls(start, end, codec, index)
        segment._file = 0, sha256
        return segment


class _Rough:
    """The rough copy in a faiss.IndexRefine: PCA, then an inverted file of product codes, of some of n rows."""

    def __init__(self, index: Any) -> None:
        before = faiss.downcast_index(index.base_index)
        self._index = index  # that owns all of it
        self._axes = faiss.downcast_VectorTransform(before.chain.at(0))
        self._file = faiss.downcast_index(before.index)  # faiss.IndexIVFPQFastScan
        self._lists = faiss.downcast_InvertedLists(self._file.invlists)
        self._probes = max(_LEAST_PROBES, round(_SCANNED_ROWS * self._file.nlist / max(1, self._file.ntotal)))
        self._options: dict[int, Any] = {}

    def is_of(self, n: int) -> bool:
        """Whether all of its rows are below n."""
        return all(
            ids.min() >= 0 and ids.max() < n for which in range(self._file.nlist) if len(ids := self._ids(which))
        )

    @property
    def size_bytes(self) -> int:
        file, per_block = self._file, int(self._lists.n_per_block)
        blocks = sum(-(-len(self._ids(which)) // per_block) for which in range(file.nlist))
        return blocks * int(self._lists.block_size) + 8 * int(file.ntotal) + 4 * int(file.nlist * file.d)

    def options(self, count: int) -> Any:
        """For a search of so many."""
        if count not in self._options:
            lists = faiss.SearchParametersIVF(nprobe=min(self._probes, self._file.nlist))
            self._options[count] = faiss.IndexRefineSearchParameters(
                k_factor=max(1.0, _CANDIDATES / count),
                base_index_params=faiss.SearchParametersPreTransform(index_params=lists),
            )
        return self._options[count]

    def erase(self, places: Rows, keys: Floats) -> None:
        """``keys`` (n, E) are as they were kept: they tell the list."""
        near = self._file.quantizer.search(self._axes.apply(keys), min(_NEAR_LISTS, self._file.nlist))[1]
        far = self._far()
        for place, lists in zip(places.tolist(), near.tolist(), strict=True):
            for which, at in self._found(place, lists):
                size, blocks = int(self._lists.block_size), at // int(self._lists.n_per_block) + 1
                codes = faiss.rev_swig_ptr(self._lists.get_codes(which), blocks * size).reshape(blocks, size)
                self._lists.packer.pack_1(far, at, codes)

    def _found(self, place: int, lists: list[int]) -> Iterator[tuple[int, int]]:
        """(list, place in it), once; nowhere where it had been removed before the copy was made."""
        for which in (*lists, *(i for i in range(self._file.nlist) if i not in lists)):
            at = np.flatnonzero(self._ids(which) == place)
            if len(at):
                yield which, int(at[0])
                return

    def _ids(self, which: int) -> Rows:
        size = self._lists.list_size(which)
        ids: Rows = faiss.rev_swig_ptr(self._lists.get_ids(which), size) if size else np.empty(0, np.int64)
        return ids

    def _far(self) -> Codes:
        """(code_size,) the rough code of what is as far from everything as one can be: two to a byte, the first low."""
        product = self._file.pq
        centres = faiss.vector_to_array(product.centroids).reshape(product.M, product.ksub, product.dsub)
        longest = np.square(centres).sum(2).argmax(1).astype(np.uint8)  # (M,)
        longest = np.append(longest, np.zeros(len(longest) % 2, np.uint8))
        code: Codes = longest[0::2] | longest[1::2] << 4
        return code


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def built(start: int, codec: Codec, codes: Codes, alive: NDArray[np.bool_], *, whole_rows: int = WHOLE_ROWS) -> Segment:
    """A segment of rows from ``start`` on: their codes (n, code_bytes), and which of them (n,) may be found. Takes
    seconds for 10^5."""
    flat = codec.flat()
    flat.add_sa_codes(np.ascontiguousarray(codes))
    index = flat
    some = alive.nonzero()[0]
    if len(some) > whole_rows and codec.dims > 1:
        index = faiss.IndexRefine(_rough_copy(codec, codes, some), flat)
    return Segment(start, start + len(codes), codec, index)


def _rough_copy(codec: Codec, codes: Codes, some: Rows) -> Any:
    """Of those rows, under their places."""
    sample = codec.decode(codes[some[:: -(-len(some) // _MOST_TRAINING_ROWS)]])
    dims = min(_ROUGH_DIMS, codec.dims) // 2 * 2
    axes = faiss.PCAMatrix(codec.dims, dims)
    axes.train(sample)
    lists = max(1, min(int(_LISTS_OF_ROOT * np.sqrt(len(some))), len(sample) // _ROWS_OF_A_LIST))
    file = faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(dims), dims, lists, dims // 2, 4, faiss.METRIC_L2)
    file.by_residual = False
    file.train(axes.apply(sample))
    del sample
    for at in range(0, len(some), _AT_ONCE):
        rows = some[at : at + _AT_ONCE]
        file.add_with_ids(axes.apply(codec.decode(codes[rows])), rows)
    copy = faiss.IndexPreTransform(axes, file)
    copy.ntotal = len(codes)  # as faiss.IndexRefine wants it; what lies in no list is not found
    return copy
