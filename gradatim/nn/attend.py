"""Attention over a trie with its backward pass written out: every token attends to its ancestors and itself.

Softmax and its derivative are those of FlashAttention (arXiv:2205.14135, sec. 3.1 and appendix B.2), on the blocks
of the trie instead of tiles: probabilities are computed again in the backward pass, so nothing of size (N, N) is
kept. Scores and probabilities are in fp32 whatever the weights are; products with them are in the dtype of the values.

It knows no layers and no models. Query heads that share a key head lie beside each other: KH key heads, G queries of
each, so that no key is ever repeated.

Shapes: N packed tokens, Q of them queries, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradatim.nn.trie import BLOCK_TOKENS, Block

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """Queries [start, end) of a block and the keys they see: all of ``before``, and of ``own`` what the mask leaves
    open."""

    start: int
    end: int
    before: Ranges
    own: tuple[int, int]
    mask: Tensor  # (G * queries, own) additive, fp32

    @property
    def keys(self) -> Ranges:
        return _merged((*self.before, self.own))


@dataclass(frozen=True, slots=True)
class Plan:
    """Who attends to whom."""

    parts: tuple[_Part, ...]
    queries: int
    groups: int

    def narrow(self, rows: Tensor) -> Plan:
        """The same for some of the queries only, rows (Q,) ascending."""
        parts, done = [], 0
        for part in self.parts:
            mine = rows[(rows >= part.start) & (rows < part.end)] - part.start
            if len(mine):
                mask = part.mask.view(part.end - part.start, self.groups, -1)[mine].flatten(0, 1)
                parts.append(_Part(done, done + len(mine), part.before, part.own, mask))
                done += len(mine)
        return Plan(tuple(parts), done, self.groups)


def plan(blocks: Sequence[Block], groups: int, device: torch.device, dtype: torch.dtype) -> Plan:
    """Of a packed trie."""
    parts: list[_Part] = []
    for block in blocks:
        before = tuple((blocks[i].start, blocks[i].end) for i in block.before)
        if block.mask is not None:
            own = block.mask[:, -(block.end - block.start) :]
            parts.append(_part(block.start, block.end, before, (block.start, block.end), own, groups))
            continue
        for start in range(block.start, block.end, BLOCK_TOKENS):  # a long run, causal: cut along its diagonal
            end = min(start + BLOCK_TOKENS, block.end)
            own = torch.full((end - start, end - start), float("-inf")).triu_(1)
            seen = (*before, (block.start, start)) if start > block.start else before
            parts.append(_part(start, end, seen, (start, end), own, groups))
    moved = (_Part(p.start, p.end, p.before, p.own, p.mask.to(device, dtype)) for p in parts)
    return Plan(tuple(moved), blocks[-1].end, groups)


def _part(start: int, end: int, before: Ranges, own: tuple[int, int], mask: Tensor, groups: int) -> _Part:
    return _Part(start, end, _merged(before), own, mask.repeat_interleave(groups, 0))


def _merged(ranges: Ranges) -> Ranges:
    """Without seams between neighbours: one slice costs less than two and a copy."""
    out: list[tuple[int, int]] = []
    for start, end in ranges:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return tuple(out)


def attend(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (KH, Q * G, D), already scaled, and k (KH, N, D), both fp32; v (KH, N, D) -> (Q, KH * G * D) as v."""
    heads, _, size = v.shape
    out = v.new_empty(plan.queries, heads, plan.groups, size)
    for part in plan.parts:
        p = _probabilities(plan, part, q, k)
        mixed = torch.bmm(p.to(v.dtype), _gather(v, part.keys))  # (KH, queries * G, D)
        out[part.start : part.end] = mixed.view(heads, -1, plan.groups, size).transpose(0, 1)
    return out.flatten(1)


def attend_backward(
    plan: Plan, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in fp32, from that of the result, (Q, KH * G * D)."""
    heads, _, size = v.shape
    split = (plan.queries, heads, plan.groups, size)
    wide = q.dtype
    delta = (grad.view(split).to(wide) * out.view(split)).sum(-1)  # (Q, KH, G): sum over keys of p dp
    delta = delta.transpose(0, 1).reshape(heads, -1, 1)
    grad = grad.view(split).transpose(0, 1).reshape(heads, -1, size)
    q_low, k_low = q.to(v.dtype), k.to(v.dtype)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(k)
    for part in plan.parts:
        mine = slice(part.start * plan.groups, part.end * plan.groups)
        p = _probabilities(plan, part, q, k)  # (KH, queries * G, keys)
        g = grad[:, mine]
        _scatter(dv, torch.bmm(p.to(v.dtype).transpose(1, 2), g), part.keys)
        dp = torch.bmm(g, _gather(v, part.keys).transpose(1, 2)).to(wide)
        ds = dp.sub_(delta[:, mine]).mul_(p).to(v.dtype)
        dq[:, mine] = torch.bmm(ds, _gather(k_low, part.keys))
        _scatter(dk, torch.bmm(ds.transpose(1, 2), q_low[:, mine]), part.keys)
    return dq, dk, dv


def _probabilities(plan: Plan, part: _Part, q: Tensor, k: Tensor) -> Tensor:
    mine = q[:, part.start * plan.groups : part.end * plan.groups]
    scores = torch.bmm(mine, _gather(k, part.keys).transpose(1, 2))
    scores[:, :, -part.mask.shape[1] :] += part.mask
    return scores.softmax(-1)


def _gather(x: Tensor, ranges: Ranges) -> Tensor:
    """(KH, N, D) -> those of its tokens."""
    pieces = [x[:, start:end] for start, end in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _scatter(into: Tensor, piece: Tensor, ranges: Ranges) -> None:
    done = 0
    for start, end in ranges:
        into[:, start:end] += piece[:, done : done + end - start]
        done += end - start
