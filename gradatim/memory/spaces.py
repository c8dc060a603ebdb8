"""Key spaces: what a key depends on, how a model's state becomes a key, and how a key is kept.

Adapters change hidden states, so a key belongs to the weights that made it; keys of two spaces are not compared
unless a check has said that they may. The mean state over the task's turn has a few dimensions that outweigh all the
others; it is scaled to a root mean square of 1 and each number cut off at 1, which needs no statistics of anybody's
data: what is forgotten leaves no trace in the keys of others.
"""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
from numpy.typing import NDArray

from gradatim.errors import ForeignMemoryError, MemoryKeyError
from gradatim.types import AdapterId, MemorySpace

Floats = NDArray[np.float32]
_RULE = "mean over the last message, rms 1, cut at 1"


def make_space(
    *,
    base_sha256: str,
    tokenizer_sha256: str,
    adapter_id: AdapterId,
    adapter_sha256: str,
    layers: tuple[int, ...],
    now: float,
) -> MemorySpace:
    """The space of keys that these weights make."""
    parts = (base_sha256, tokenizer_sha256, adapter_sha256, ",".join(map(str, layers)), _RULE)
    return MemorySpace(
        id=hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32],
        base_sha256=base_sha256,
        tokenizer_sha256=tokenizer_sha256,
        adapter_id=adapter_id,
        adapter_sha256=adapter_sha256,
        layers=layers,
        created_at=now,
    )


def check_space(space: MemorySpace, base_sha256: str, tokenizer_sha256: str) -> None:
    """ForeignMemoryError where it is of another base model or tokenizer than these; empty ones are not compared."""
    for what, theirs, ours in (
        ("base model", space.base_sha256, base_sha256),
        ("tokenizer", space.tokenizer_sha256, tokenizer_sha256),
    ):
        if ours and theirs != ours:
            raise ForeignMemoryError(
                f"what is remembered was made with another {what}: its digest is {theirs}, that of the one that is "
                f"served is {ours}. Serve the one it was made with, or begin anew: gradatim memory forget all"
            )


def key_of(state: Floats) -> Floats:
    """A unit vector of a mean state (H,). MemoryKeyError where that is no vector of numbers."""
    x = np.asarray(state, dtype=np.float64)
    rms = float(np.sqrt(np.mean(x * x))) if x.ndim == 1 and x.size else float("nan")
    if not np.isfinite(rms) or rms == 0.0:
        raise MemoryKeyError("a key must be a vector of finite numbers that are not all zero")
    x = np.clip(x / rms, -1.0, 1.0)
    x16 = (x / np.linalg.norm(x)).astype("<f2")  # what is kept is what is searched, before and after a restart
    return x16.astype(np.float32)


def to_bytes(key: Floats) -> bytes:
    blob = key.astype("<f2").tobytes()
    return blob + zlib.crc32(blob).to_bytes(4, "little")


def from_bytes(blob: bytes) -> Floats:
    """MemoryKeyError where it is damaged."""
    body, crc = blob[:-4], blob[-4:]
    if len(blob) < 6 or zlib.crc32(body).to_bytes(4, "little") != crc:
        raise MemoryKeyError("a key is damaged: its checksum does not fit")
    key = np.frombuffer(body, dtype="<f2").astype(np.float32)
    if not np.isfinite(key).all():
        raise MemoryKeyError("a key holds what is no number")
    return key
