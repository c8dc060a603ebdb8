"""Keys and values of all rows in one tensor, and attention over a ragged batch of them.

One forward pass takes the tokens of every row in one line of N: a token each for the D rows that decode, then the
chunks of the prompts that are being read. Everything but attention sees only N tokens; attention finds here which
row and position each belongs to. It knows nothing of requests, adapters or sampling.

Shapes: L layers, S row slots, H key-value heads, G query heads for each of them, C positions, E head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "gradatim_rows"  # under which transformers' models find ``_attention``
_MIN_CAPACITY = 256


class FarRow(Protocol):
    """The attention of one row that reaches beyond its slot."""

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor | None:
        """(n, G*H, E) of queries (G*H, n, E) over the slot's keys and values (H, m, E), of which the last n are their
        own, and what lies beyond; None where that layer looks no farther than the slot."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one row: one of a row that decodes, or a chunk of a prompt."""

    slot: int
    start: int  # place of the first in the slot
    ids: Sequence[int]
    lora_slot: int = 0
    wants_logits: bool = True  # of its last token
    offset: int = 0  # position of the token at place 0
    far: FarRow | None = None  # where the row reaches beyond its slot


@dataclass(slots=True)
class Plan:
    """Where the tokens of one forward pass belong. The first D segments are rows 0..D-1, decoding."""

    segments: Sequence[Segment]
    decoding: int  # D
    rows: Tensor  # (D,)
    positions: Tensor  # (D,) of the new token of each decoding row
    span: int  # the longest decoding row, its new token included
    far: Mapping[int, FarRow]  # by the number of the segment
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(D, 1, 1, span), added to the scores of decoding rows; None where every row is equally long."""
        if window not in self._masks:
            at = torch.arange(self.span, device=self.positions.device)
            hidden = at > self.positions[:, None]  # (D, span)
            if window is not None:
                hidden = hidden | (at <= self.positions[:, None] - window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self._masks[window] = mask[:, None, None] if bool(hidden.any()) else None
        return self._masks[window]


def make_plan(segments: Sequence[Segment], decoding: int, device: torch.device) -> Plan:
    starts = [s.start for s in segments[:decoding]]
    return Plan(
        segments,
        decoding,
        torch.arange(decoding, device=device),
        torch.tensor(starts, dtype=torch.long, device=device),
        max(starts, default=-1) + 1,
        {i: segment.far for i, segment in enumerate(segments) if segment.far is not None},
    )


class RowCache:
    """Keys and values of up to S rows. Grows by doubling; a row's numbers never move unless it is told to.

    What is hidden by a mask is still multiplied, by zero: so it must be finite, and memory begins as zeros.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        layers, self.slots, heads, width = shape
        self._heads = (layers, heads, width)
        self._dtype, self._device = dtype, device
        self.capacity = 0
        self.data = self._empty(0)  # (L, 2, S, H, C, E)
        self.plan: Plan | None = None  # of the forward pass that is running

    def _empty(self, capacity: int) -> Tensor:
        layers, heads, width = self._heads
        return torch.zeros(layers, 2, self.slots, heads, capacity, width, dtype=self._dtype, device=self._device)

    def reserve(self, positions: int, lengths: Sequence[int]) -> None:
        """Make room for that many positions in a row; ``lengths`` says what rows 0.. hold and must keep."""
        if positions <= self.capacity:
            return
        capacity = max(_MIN_CAPACITY, self.capacity)
        while capacity < positions:
            capacity *= 2
        data = self._empty(capacity)
        for slot, length in enumerate(lengths):
            data[:, :, slot, :, :length] = self.data[:, :, slot, :, :length]
        self.data, self.capacity = data, capacity

    def release(self) -> None:
        """Give the memory back; no row holds anything."""
        self.capacity, self.data = 0, self._empty(0)

    def scrub(self, lengths: Sequence[int]) -> None:
        """Zero everything but what rows 0.. hold: after numbers that were not finite."""
        for slot in range(self.slots):
            self.data[:, :, slot, :, lengths[slot] if slot < len(lengths) else 0 :] = 0

    def copy(self, source: int, target: int, length: int) -> None:
        self.data[:, :, target, :, :length] = self.data[:, :, source, :, :length]

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first positions of two rows."""
        kept = self.data[:, :, a, :, :length].clone()
        self.copy(b, a, length)
        self.data[:, :, b, :, :length] = kept

    def read(self, slot: int, start: int, end: int) -> Tensor:
        """A copy, (L, 2, H, end - start, E)."""
        return self.data[:, :, slot, :, start:end].clone()

    def write(self, slot: int, start: int, block: Tensor) -> None:
        self.data[:, :, slot, :, start : start + block.shape[-2]] = block

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Store the new keys and values (1, H, N, E), attend with queries (1, G*H, N, E); gives (1, N, G*H, E)."""
        plan = self.plan
        assert plan is not None, "attention outside of a forward pass of the engine"
        keys, values = self.data[layer, 0], self.data[layer, 1]  # (S, H, C, E)
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)  # (1, N, G*H, E)
        d = plan.decoding
        if d:
            keys[plan.rows, :, plan.positions] = k[0, :, :d].transpose(0, 1)
            values[plan.rows, :, plan.positions] = v[0, :, :d].transpose(0, 1)
            # the G query heads of one key head become G queries: no key is copied
            grouped = q[0, :, :d].transpose(0, 1).reshape(d, keys.shape[1], -1, q.shape[-1])  # (D, H, G, E)
            mask = plan.mask(window, q.dtype)
            got = F.scaled_dot_product_attention(
                grouped, keys[:d, :, : plan.span], values[:d, :, : plan.span], attn_mask=mask, scale=scale
            )
            out[0, :d] = got.reshape(d, q.shape[1], -1)
            for i in (i for i in plan.far if i < d):  # over again
                end = plan.segments[i].start + 1
                far = plan.far[i].attend(layer, q[0, :, i : i + 1], keys[i, :, :end], values[i, :, :end], scale)
                if far is not None:
                    out[0, i : i + 1] = far
        at = d
        for i, segment in enumerate(plan.segments[d:], d):
            n, end = len(segment.ids), segment.start + len(segment.ids)
            keys[segment.slot, :, segment.start : end] = k[0, :, at : at + n]
            values[segment.slot, :, segment.start : end] = v[0, :, at : at + n]
            mine, of_slot = q[:, :, at : at + n], (keys[segment.slot, :, :end], values[segment.slot, :, :end])
            far = plan.far[i].attend(layer, mine[0], *of_slot, scale) if i in plan.far else None
            if far is None:
                far = _causal(mine, of_slot[0][None], of_slot[1][None], scale, window)[0].transpose(0, 1)
            out[0, at : at + n] = far
            at += n
        return out


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Attention of the last n of m positions. q (1, G*H, n, E), k and v (1, H, m, E)."""
    n, m = q.shape[2], k.shape[2]
    if n == m and (window is None or window >= m):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    behind = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)  # (n, m)
    seen = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    cache: RowCache = module.row_cache  # type: ignore[assignment]
    layer: int = module.layer_idx  # type: ignore[assignment]
    return cache.attend(layer, query, key, value, scaling, sliding_window), None


AttentionInterface.register(NAME, _attention)
