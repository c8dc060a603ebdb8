"""What one session has read, as attention sees it: the last tokens as they are, all earlier ones without position.

It knows no models and does no attention.

Shapes: L layers, H key heads, n tokens in the window, M tokens in memory, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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


@dataclass(slots=True)
class LayerRows:
    keys: Rows = field(default_factory=Rows)  # in the window, rotated to their positions
    values: Rows = field(default_factory=Rows)
    memory_keys: Rows = field(default_factory=Rows)  # before RoPE; in fp32 at least
    memory_values: Rows = field(default_factory=Rows)


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
        return max((len(layer.memory_keys) for layer in self.layers), default=0)

    @property
    def bytes_held(self) -> int:
        return sum(r.bytes_held for x in self.layers for r in (x.keys, x.values, x.memory_keys, x.memory_values))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv:2104.09864, eq. 34) in the layout of transformers' Llama. x (..., n, E), cos and sin (n, E); the
    result is in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = wide.chunk(2, -1)
    return wide * cos + torch.cat((-b, a), -1) * sin
