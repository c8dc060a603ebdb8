"""Key spaces: what a key depends on, how a model's states become keys, and how a key is kept.

Adapters change hidden states, so a key belongs to the weights that made it; keys of two spaces are not compared unless
a check has said that they may. Both memories name their spaces alike. What they pool differs, since they ask for other
things: a whole situation is the mean over its turn, scaled by nothing but itself; the place of one token in a text is
that token's state, of which a few dimensions that do not hold what comes next outweigh all others, so that it takes
the statistics of public text. Neither uses anybody's data: what is forgotten leaves no trace in the keys of others.

Shapes: n states, D size of the hidden state.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradatim.errors import ForeignMemoryError, MemoryKeyError
from gradatim.types import AdapterId, MemorySpace

Floats = NDArray[np.float32]
MOST_AXES = 512  # of token keys, however wide the states are: 256 bytes a token in four bits
_LEAST_AXES = 16  # narrower keys keep all of theirs


class Pooling(Protocol):
    """How states become keys."""

    @property
    def rule(self) -> str:
        """Names all that it depends on."""

    def keys(self, states: Any) -> Floats:
        """(n, D) of length 1, of states (n, D)."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The mean state over the task's turn, which the engine takes, of one layer or several, one behind the other. A
    few of its dimensions outweigh all the others: that of each layer is scaled to a root mean square of 1, and each
    number cut off at 1."""

    layers: int = 1
    rule: str = "mean over the last message, rms 1, cut at 1"

    def keys(self, states: Any) -> Floats:
        """MemoryKeyError where one is not finite, or zero."""
        return np.stack([key_of(state, self.layers) for state in states])


@dataclass(frozen=True, slots=True)
class Sentence(Turn):
    """What a sentence encoder makes of the task's turn, in place of the model's own states; ``rule`` names it."""

    def keys(self, states: Any) -> Floats:
        """MemoryKeyError where one is not finite, or zero."""
        x = np.asarray(states, dtype=np.float64)
        length = np.linalg.norm(x, axis=1, keepdims=True)
        if not np.isfinite(length).all() or not length.all():
            raise MemoryKeyError("a key must be a vector of finite numbers that are not all zero")
        keys: Floats = (x / length).astype("<f2").astype(np.float32)  # what is kept is what is searched
        return keys


def sentence(encoder_sha256: str) -> Sentence:
    return Sentence(rule=f"sentence encoder {encoder_sha256}")


@dataclass(frozen=True, slots=True, eq=False)
class EachToken:
    """The state of each token, standardised per dimension by that of public text. ``axes`` are for those who keep
    fewer numbers of a key than it has."""

    mean: Floats  # (D,)
    scale: Floats  # (D,)
    axes: Floats  # (D, E) orthogonal columns of length 1, along which the keys of public text vary most

    @property
    def width(self) -> int:
        return len(self.mean)

    @property
    def rule(self) -> str:
        statistics = hashlib.sha256(self.mean.tobytes() + self.scale.tobytes() + self.axes.tobytes()).hexdigest()
        return f"each token, standardised by {statistics}"

    def keys(self, states: Any) -> Floats:
        """NaN where a state is not finite."""
        x = (np.asarray(states, dtype=np.float32) - self.mean) / self.scale
        length = np.sqrt(np.square(x).sum(1, keepdims=True))
        with np.errstate(invalid="ignore"):
            keys: Floats = x / np.maximum(length, np.float32(1e-6))
        return keys


def standardised_by(states: Any) -> EachToken:
    """By states (n, D) of public text: a tenant's own would leave a trace that no deletion removes. ValueError where
    they are too few to tell the axes."""
    x = np.asarray(states, dtype=np.float64)
    mean, scale = x.mean(0).astype(np.float32), np.maximum(x.std(0, ddof=1), 1e-6).astype(np.float32)
    width = x.shape[1]
    dims = width if width <= _LEAST_AXES else min(width * 8 // 9 // 8 * 8, MOST_AXES)
    if len(x) < dims:
        raise ValueError(f"{len(x)} states are too few to find {dims} axes")
    keys = EachToken(mean, scale, np.zeros((width, 0), np.float32)).keys(x)
    axes = np.linalg.svd(keys, full_matrices=False)[2][:dims].T  # (D, E)
    return EachToken(mean, scale, np.ascontiguousarray(axes, np.float16).astype(np.float32))  # as it is written


BASE = AdapterId("")  # no adapter
P = TypeVar("P", bound=Pooling, covariant=True)


@dataclass(frozen=True, slots=True, eq=False)
class KeySpace(Generic[P]):
    """Which weights make the keys, of the states of which layers, and how. A digest that is not known is empty."""

    base_sha256: str
    tokenizer_sha256: str
    layers: tuple[int, ...]  # the input of layer i is the output of the first i
    pooling: P
    adapter_sha256: str = ""  # of the weights: that of the base where no adapter is on it, or where this is left out
    adapter_id: AdapterId = BASE  # what they are called; says nothing of the keys
    id: str = field(init=False)  # digest of all else

    def __post_init__(self) -> None:
        weights = self.adapter_sha256 or self.base_sha256
        parts = (self.base_sha256, self.tokenizer_sha256, weights, ",".join(map(str, self.layers)), self.pooling.rule)
        object.__setattr__(self, "id", hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32])

    def key(self, state: Any) -> Floats:
        """(D,) of one state (D,)."""
        key: Floats = self.pooling.keys(state[None])[0]
        return key

    def under(self, adapter_id: AdapterId, adapter_sha256: str) -> KeySpace[P]:
        """The space of the same base under these weights."""
        return replace(self, adapter_id=adapter_id, adapter_sha256=adapter_sha256)

    def kept(self, now: float) -> MemorySpace:
        """As a row of a shelf."""
        return MemorySpace(
            id=self.id,
            base_sha256=self.base_sha256,
            tokenizer_sha256=self.tokenizer_sha256,
            adapter_id=self.adapter_id,
            adapter_sha256=self.adapter_sha256 or self.base_sha256,
            layers=self.layers,
            created_at=now,
        )

    def __str__(self) -> str:
        weights = (self.adapter_sha256 or self.base_sha256)[:12]
        said = f"base {self.base_sha256[:12]}, tokenizer {self.tokenizer_sha256[:12]}, weights {weights}"
        return f"{self.id[:12]} ({said}, layer {', '.join(map(str, self.layers))})"

    @property
    def made_with(self) -> Mapping[str, str]:
        """What may not change under a memory, by its name."""
        return made_with(self.base_sha256, self.tokenizer_sha256, self.layers)


def made_with(base_sha256: str, tokenizer_sha256: str, layers: tuple[int, ...] = ()) -> Mapping[str, str]:
    """The same of something else."""
    told = {"base model": base_sha256, "tokenizer": tokenizer_sha256}
    return {**told, "layer": ",".join(map(str, layers))} if layers else told


def difference(what: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """In what it was made otherwise, naming both; empty where in nothing. What is not known here, or not said there, is
    not compared."""
    for name, here in ours.items():
        there = theirs.get(name, here)
        if here and there != here:
            return f"{what} was made with another {name}: {there}, and the one that is served is {here}"
    return ""


def check_space(space: MemorySpace, ours: KeySpace[Pooling]) -> None:
    """ForeignMemoryError where what was kept is of another base model or tokenizer; keys of other layers are made
    anew."""
    theirs = made_with(space.base_sha256, space.tokenizer_sha256)
    if said := difference("what is remembered", theirs, ours.made_with):
        raise ForeignMemoryError(f"{said}. Serve the one it was made with, or begin anew: gradatim memory forget all")


def late_layer(layers: int) -> int:
    """The layer whose output makes the best keys of tokens: 28 of SmolLM2's 30."""
    return max(1, round(0.93 * layers))


def turn_layers(layers: int) -> tuple[int, ...]:
    """Those whose outputs make the best keys of situations: an early one for the words and a late one for what they
    ask for, 10 and 28 of SmolLM2's 30."""
    return tuple(sorted({layers // 3, late_layer(layers)}))


def key_of(state: Any, layers: int = 1) -> Floats:
    """``Turn``'s key of the states of so many layers (D,). MemoryKeyError where that is no vector of numbers."""
    x = np.asarray(state, dtype=np.float64)
    if x.ndim != 1 or not x.size or x.size % layers:
        raise MemoryKeyError(f"states of shape {x.shape} are no key of {layers} layers")
    x = x.reshape(layers, -1)
    rms = np.sqrt(np.mean(x * x, 1, keepdims=True))
    if not np.isfinite(rms).all() or not rms.all():
        raise MemoryKeyError("a key must be a vector of finite numbers that are not all zero")
    x = np.clip(x / rms, -1.0, 1.0)
    x /= np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt(layers)
    key: Floats = x.reshape(-1).astype("<f2").astype(np.float32)  # what is kept is what is searched
    return key


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
