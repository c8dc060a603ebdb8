"""What one session has read, as attention sees it: the last tokens as they are, all earlier ones without position.

It knows no models and does no attention.

Shapes: L layers, H key heads, n tokens in the window, M tokens in memory, B full blocks of them, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK_TOKENS = 64  # in memory, that a search takes or leaves as a whole
_GROWTH = 2048  # rows: more is never allocated ahead


class Rows:
    """A tensor (H, n, E) that grows at its end and shrinks at its front, without a copy each time."""

    def __init__(self, data: Tensor | None = None) -> None:
        self._data = data  # (H, capacity, E)
        self._start, self._end = 0, 0 if data is None else data.shape[1]

    def __len__(self) -> int:
        return self._end - self._start

    def fork(self) -> Rows:
        """The same rows, without a copy. Of all that share some, one alone may be appended to; what the others hold
        stays as it is."""
        other = Rows(self._data)
        other._start, other._end = self._start, self._end
        return other

    @property
    def bytes_held(self) -> int:
        """With the room that was allocated ahead."""
        return 0 if self._data is None else self._data.numel() * self._data.element_size()

    @property
    def all(self) -> Tensor:
        """A view, (H, n, E)."""
        assert self._data is not None, "nothing was stored"
        return self._data[:, self._start : self._end]

    def append(self, rows: Tensor) -> None:
        """rows (H, n, E)."""
        n = rows.shape[1]
        if self._data is None or self._end + n > self._data.shape[1]:
            kept = len(self)
            room = max(256, kept + n + min(kept + n, _GROWTH))
            grown = rows.new_empty(rows.shape[0], room, rows.shape[2])
            if self._data is not None:
                grown[:, :kept] = self.all
            self._data, self._start, self._end = grown, 0, kept
        self._data[:, self._end : self._end + n] = rows
        self._end += n

    def take(self, count: int) -> Tensor:
        """The first ones, removed: a copy (H, count, E)."""
        out = self.all[:, :count].clone()
        self._start += count
        return out

    def drop(self, count: int) -> None:
        self._start += max(0, count)


class Past:
    """Tokens that left a window, of one layer: their keys before RoPE and values, (H, M, E), and of each full block of
    them, counted from the oldest, the mean of its keys."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.keys, self.values, self.means = Rows(keys), Rows(values), Rows()
        self._summarise()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def blocks(self) -> int:
        return len(self.means)

    @property
    def bytes_held(self) -> int:
        return sum(rows.bytes_held for rows in (self.keys, self.values, self.means))

    def fork(self) -> Past:
        """The same, without a copy: see ``Rows.fork``."""
        other = Past()
        other.keys, other.values, other.means = self.keys.fork(), self.values.fork(), self.means.fork()
        return other

    def append(self, keys: Tensor, values: Tensor) -> None:
        """(H, n, E) each."""
        self.keys.append(keys)
        self.values.append(values)
        self._summarise()

    def drop(self, count: int) -> int:
        """At least so many of the oldest, in whole blocks while there are any: how many went."""
        blocks = min(-(-max(0, count) // BLOCK_TOKENS), self.blocks)
        gone = max(blocks * BLOCK_TOKENS, min(max(0, count), len(self)))
        for rows, of_them in ((self.keys, gone), (self.values, gone), (self.means, blocks)):
            rows.drop(of_them)
        return gone

    def _summarise(self) -> None:
        done = self.blocks * BLOCK_TOKENS
        new = (len(self) - done) // BLOCK_TOKENS
        if new:
            keys = self.keys.all[:, done : done + new * BLOCK_TOKENS]
            keys = keys.view(len(keys), new, BLOCK_TOKENS, -1)
            self.means.append(keys.to(torch.promote_types(keys.dtype, torch.float32)).mean(2))  # (H, new, E)


@dataclass(slots=True)
class LayerRows:
    keys: Rows = field(default_factory=Rows)  # in the window, rotated to their positions
    values: Rows = field(default_factory=Rows)
    past: Past = field(default_factory=Past)


@dataclass(slots=True)
class Session:
    """Belongs to one conversation of one tenant, and to the weights that read it."""

    layers: Sequence[LayerRows]
    position: int = 0  # tokens read so far
    local: int = 0  # of which are in the window
    last: Tensor | None = None  # (D,) the state that predicts the next token, where its owner needs it
    ids: Sequence[int] = ()  # where its owner needs them: the tokens in memory and window, then what is yet to be read

    @property
    def remembered(self) -> int:
        """Tokens that have left the window and are in memory (at most its limit)."""
        return max((len(layer.past) for layer in self.layers), default=0)

    @property
    def bytes_held(self) -> int:
        return sum(r.bytes_held for x in self.layers for r in (x.keys, x.values, x.past))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv:2104.09864, eq. 34) in the layout of transformers' Llama. x (..., n, E), cos and sin (n, E); the
    result is in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    half = x.shape[-1] // 2
    out = wide * cos
    out[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return out
