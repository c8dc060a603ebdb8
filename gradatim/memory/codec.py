"""How the keys of an index are kept: whole in half precision, or in four bits a number of somewhat fewer numbers.

Neither is trained on anybody's data, so that a key is kept the same whatever is beside it, and encoding what was
decoded changes nothing. In four bits a key is rotated at random first, which spreads it evenly over all numbers, so
that one step size fits them all, and cut short by a ninth; squared distances stay what they are on average (Johnson and
Lindenstrauss 1984), but for the hundredth that rounding adds to all of them. It knows no search.

Shapes: n keys, B queries, D their width, E numbers that are kept of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Codes: TypeAlias = NDArray[np.uint8]

_LEVELS = 15  # of faiss's four bits: the sixteenth is beyond the range
_RANGE = 2.6  # standard deviations on either side: the least rounding of normal numbers

_FAR = -1e3  # four bits end before it


@dataclass(frozen=True)
class Codec:
    """``halves`` or ``nibbles``."""

    width: int  # D
    dims: int  # E
    kind: int  # of faiss's scalar quantisers
    step: float = 0.0  # between two levels; 0 in half precision

    @property
    def code_bytes(self) -> int:
        return int(self._quantiser.code_size)

    def seen(self, keys: Floats) -> Floats:
        """(n, D) -> (n, E), as they are compared with what is kept."""
        return keys if self._rotation is None else keys @ self._rotation

    def encode(self, keys: Floats) -> Codes:
        """(n, D) -> (n, code_bytes)."""
        return self.pack(self.seen(keys))

    def pack(self, seen: Floats) -> Codes:
        """(n, E) -> (n, code_bytes)."""
        codes: Codes = self._quantiser.compute_codes(np.ascontiguousarray(seen))
        return codes.reshape(len(seen), self.code_bytes)

    def decode(self, codes: Codes) -> Floats:
        """(n, code_bytes) -> (n, E): what is kept."""
        out: Floats = self._quantiser.decode(np.ascontiguousarray(codes))
        return out.reshape(len(codes), self.dims)

    def flat(self) -> Any:
        """An index of such codes one behind the other, empty, with the distances that ``inverted`` computes, bit for
        bit: faiss.IndexScalarQuantizer."""
        index = faiss.IndexScalarQuantizer(self.dims, self.kind, faiss.METRIC_L2)
        self._fix(index.sq)
        index.is_trained = True
        return index

    def inverted(self, lists: int, some: Floats) -> Any:
        """An inverted file of such codes, empty, its lists those of some keys (n, E): faiss.IndexIVFScalarQuantizer."""
        coarse = faiss.IndexFlatL2(self.dims)
        index = faiss.IndexIVFScalarQuantizer(coarse, self.dims, lists, self.kind, faiss.METRIC_L2, False)
        coarse.this.disown()
        index.own_fields = True
        index.train(some)
        self._fix(index.sq)
        return index

    def fits(self, index: Any) -> bool:
        """Whether an inverted file holds codes of this kind."""
        return (
            isinstance(index, faiss.IndexIVFScalarQuantizer)
            and (index.d, index.sq.qtype, index.by_residual) == (self.dims, self.kind, False)
            and np.array_equal(faiss.vector_to_array(index.sq.trained), faiss.vector_to_array(self._quantiser.trained))
        )

    @cached_property
    def far(self) -> Codes:
        """(code_bytes,) of what is near to no key of length 1."""
        code: Codes = self.pack(np.full((1, self.dims), _FAR, np.float32))[0]
        return code

    @cached_property
    def _quantiser(self) -> Any:
        quantiser = faiss.ScalarQuantizer(self.dims, self.kind)
        self._fix(quantiser)
        return quantiser

    def _fix(self, quantiser: Any) -> None:
        """Its range is given, and not what it was trained on."""
        if self.step:
            span = np.array([-self.step * _LEVELS / 2, self.step * _LEVELS], np.float32)  # from, and how far
            faiss.copy_array_to_vector(span, quantiser.trained)

    @cached_property
    def _rotation(self) -> Floats | None:
        """(D, E), orthogonal columns, of a length that keeps squared lengths on average."""
        if not self.step:
            return None
        drawn = np.random.Generator(np.random.PCG64(0)).standard_normal((self.width, self.width))
        q, r = np.linalg.qr(drawn)
        q *= np.sign(np.diag(r))  # the one whose r has a positive diagonal, whoever computes it
        scaled: Floats = (q[:, : self.dims] * np.sqrt(self.width / self.dims)).astype(np.float32)
        return scaled


def flat_codes(index: Any) -> Codes:
    """Those of a ``Codec.flat`` (n, code_bytes), where they lie."""
    n, size = int(index.ntotal), int(index.code_size)
    if not n:
        return np.empty((0, size), np.uint8)
    codes: Codes = faiss.rev_swig_ptr(index.codes.data(), n * size)
    return codes.reshape(n, size)


@lru_cache
def halves(width: int) -> Codec:
    """Two bytes a number, nothing left out."""
    return Codec(width, width, faiss.ScalarQuantizer.QT_fp16)


@lru_cache
def nibbles(width: int) -> Codec:
    """Four bits a number, of eight ninths of the numbers of keys of length 1: 256 bytes of 576 numbers."""
    dims = max(1, width * 8 // 9 // 8) * 8 if width >= 16 else width
    return Codec(width, dims, faiss.ScalarQuantizer.QT_4bit_uniform, 2 * _RANGE / np.sqrt(dims) / _LEVELS)
