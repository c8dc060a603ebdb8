"""How the keys of an index are kept: whole in half precision, or in four bits a number of somewhat fewer numbers.

Neither is trained on anybody's data, so that a key is kept the same whatever is beside it, and encoding what was
decoded changes nothing. For four bits a key is told along given axes, those along which public text varies most; the
others are left out. Then it is rotated at random, which spreads it evenly over all numbers, so that one step size fits
them all. Squared distances stay what they are but for what is left out and the hundredth that rounding adds to all of
them. It knows no search.

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


@dataclass(frozen=True, eq=False)
class Codec:
    """``halves`` or ``nibbles``."""

    width: int  # D
    dims: int  # E
    kind: int  # of faiss's scalar quantisers
    step: float = 0.0  # between two levels; 0 in half precision
    rotation: Floats | None = None  # (D, E) orthogonal columns of length 1; None: keys are kept as they are

    @property
    def code_bytes(self) -> int:
        return int(self._quantiser.code_size)

    def seen(self, keys: Floats) -> Floats:
        """(n, D) -> (n, E), as they are compared with what is kept."""
        return keys if self.rotation is None else keys @ self.rotation

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
        """An index of such codes one behind the other, empty: faiss.IndexScalarQuantizer."""
        index = faiss.IndexScalarQuantizer(self.dims, self.kind, faiss.METRIC_L2)
        self._fix(index.sq)
        index.is_trained = True
        return index

    def fits(self, index: Any) -> bool:
        """Whether an index holds codes of this kind as ``flat`` does."""
        return (
            isinstance(index, faiss.IndexScalarQuantizer)
            and (index.d, index.sq.qtype) == (self.dims, self.kind)
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


def nibbles(axes: Floats) -> Codec:
    """Four bits a number, of keys of length 1 along ``axes`` (D, E), orthogonal columns of length 1."""
    width, dims = axes.shape
    rotation = (axes @ _spread(dims)).astype(np.float32)
    step = 2 * _RANGE / np.sqrt(dims) / _LEVELS
    return Codec(width, dims, faiss.ScalarQuantizer.QT_4bit_uniform, step, rotation)


@lru_cache
def _spread(dims: int) -> NDArray[np.float64]:
    """(E, E), orthogonal, drawn at random, the same everywhere: codes on disk were made with it."""
    q, r = np.linalg.qr(np.random.Generator(np.random.PCG64(0)).standard_normal((dims, dims)))
    return np.asarray(q * np.sign(np.diag(r)))  # the one whose r has a positive diagonal, whoever computes it
