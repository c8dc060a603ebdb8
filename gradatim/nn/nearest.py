"""Attention over the nearest blocks of many keys, in one softmax with those of a window.

Keys beyond the window are kept as they were before RoPE, and a query looks among them as if all stood at one distance:
the window's length, the farthest that the model sees there (arXiv:2203.08913, arXiv:2402.04617). They lie in blocks of
64 tokens with the mean of their keys. Each query attends, with all heads that share a key head, to the block whose mean
one of those heads likes best, to the oldest block, which models lean on (arXiv:2309.17453), and to what is not a full
block yet: a search looks at a 64th of the keys. What a query attends to depends on no other query. The functions know
no sessions and no batches.

Softmaxes are joined by the logarithms of their sums (arXiv:2205.14135, sec. 3.1), so nothing that was computed of
the window is computed again for what lies beyond it.

Shapes: n queries, m keys in the window, M keys beyond it in B full blocks; H query heads, KH key heads, G = H / KH, E
width of a head; X tiles of queries that
attend to one block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gradatim.errors import ModelError
from gradatim.nn.session import BLOCK_TOKENS, Past

BLOCKS = 1  # that a query chooses, besides the oldest one
_FIRST_LAYERS = 2  # see single tokens rather than meaning: left alone
_ROPE = ("default", "linear", "llama3")  # fixed frequencies, lengths kept
_TILE = 4  # queries of one block that are multiplied at once
_SHUT = -1e5  # the logarithm of a sum that is to have no weight

Attended = tuple[Tensor, Tensor]  # what comes out, (H, n, E), and the logarithm of the sum of the softmax, (H, n)


def memory_layers(layers: int) -> tuple[int, ...]:
    """Which of a model's layers look beyond the window, counted from 0: all but the first two."""
    return tuple(range(min(_FIRST_LAYERS, layers - 1), layers))


# ------------------------------------------------------------------------------------------------ two sources


def within(q: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Attended:
    """Of the window: q (H, n, E) are the last n of the tokens that keys and values (KH, m, E) are of."""
    heads, n, width = q.shape
    groups, wide = heads // len(keys), torch.promote_types(q.dtype, torch.float32)
    mask = None if n == 1 else _causal(n, keys.shape[1], groups, wide, q.device)
    out, total = _softmax(q.reshape(len(keys), -1, width), keys, values, mask, scaling)
    return out.reshape(heads, n, width), total.reshape(heads, n)


def beyond(q: Tensor, pasts: Sequence[Past], scaling: float, count: int = BLOCKS) -> Attended:
    """Of what left it, in one or more stretches, none of them empty: q (H, n, E) are turned to the distance W."""
    heads, n, width = q.shape
    keys = pasts[0].keys.all
    own = q.to(keys.dtype).reshape(len(keys), -1, n, width)  # (KH, G, n, E)
    if sum(past.blocks for past in pasts) <= count + 1:
        found = [_all(own, past, 0, len(past), scaling) for past in pasts]
    else:
        found = [_all(own, next(past for past in pasts if past.blocks), 0, BLOCK_TOKENS, scaling)]
        for wanted in best_blocks(own, pasts, count).unbind(-1):
            found += _one_each(own, pasts, wanted, scaling)
        rest = ((past, past.blocks * BLOCK_TOKENS) for past in pasts)
        found += [_all(own, past, start, len(past), scaling) for past, start in rest if start < len(past)]
    out, total = found[0] if len(found) == 1 else _joined(found)
    return out.reshape(heads, n, width), total.reshape(heads, n)


def joint(near: Attended, far: Attended, bias: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """One softmax over both, with ``bias`` (scalar or (H, 1)) added to the scores beyond the window: what comes out
    (n, H, E), and how much of the weight (H, n) lay beyond."""
    share = torch.sigmoid(far[1] + bias - near[1])
    return mixed(near[0], far[0], share), share


def mixed(near: Tensor, far: Tensor, share: Tensor) -> Tensor:
    """(n, H, E) of both (H, n, E), the far one's share (H, n) of it."""
    return torch.lerp(near, far, share[..., None].to(near.dtype)).transpose(0, 1)


# ---------------------------------------------------------------------------------------------------- search


@torch.no_grad()
def best_blocks(q: Tensor, pasts: Sequence[Past], count: int) -> Tensor:
    """(KH, n, count) which blocks, counted through all stretches, the queries (KH, G, n, E) like best besides the
    oldest; there must be as many."""
    means = torch.cat([past.means.all for past in pasts if past.blocks], 1).to(q.dtype)  # (KH, B, E)
    likes = q.flatten(1, 2) @ means.transpose(1, 2)  # (KH, G * n, B)
    likes = likes.view(*q.shape[:3], -1).amax(1)  # (KH, n, B)
    likes[..., 0] = -math.inf
    return likes.topk(count, -1).indices


def _one_each(q: Tensor, pasts: Sequence[Past], wanted: Tensor, scaling: float) -> list[Attended]:
    """q (KH, G, n, E), each over the one block (KH, n) that it wants, wherever that lies."""
    if len(pasts) == 1:
        return [_dispatched(q, pasts[0], wanted, scaling)]
    found, first = [], 0
    for past in pasts:
        at = wanted - first
        here = (at >= 0) & (at < past.blocks)
        first += past.blocks
        if bool(here.any()):
            out, total = _dispatched(q, past, at.clamp(0, past.blocks - 1), scaling)
            found.append((out, total.masked_fill(here[:, None].logical_not(), _SHUT)))
    return found


def _dispatched(q: Tensor, past: Past, at: Tensor, scaling: float) -> Attended:
    """q (KH, G, n, E), each over its block (KH, n). Queries of one block are put together in tiles, so that a block is
    copied once a tile and not once a query."""
    heads, groups, n, width = q.shape
    tile, blocks = min(_TILE, n), past.blocks
    key = (at + torch.arange(heads, device=q.device)[:, None] * blocks).flatten()  # (KH * n,)
    counts = torch.bincount(key, minlength=heads * blocks)
    tiles = (counts + tile - 1) // tile  # of each block, (KH * B,)
    order = key.argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=q.device) - (counts.cumsum(0) - counts)[key[order]]
    place += (tiles.cumsum(0) - tiles)[key] * tile  # of each query among all places in tiles
    which = torch.arange(heads * blocks, device=q.device).repeat_interleave(tiles)  # (X,)
    placed = q.new_zeros(len(which) * tile, groups, width)
    placed[place] = q.transpose(1, 2).reshape(-1, groups, width)
    of_heads = torch.split(which % blocks, tiles.view(heads, -1).sum(1).tolist())
    keys, values = _gathered(past.keys.all, of_heads), _gathered(past.values.all, of_heads)  # (X, tokens, E)
    out, total = _softmax(placed.view(len(which), tile * groups, width), keys, values, None, scaling)
    out, total = out.reshape(-1, groups, width)[place], total.reshape(-1, groups)[place]
    return out.view(heads, n, groups, width).transpose(1, 2), total.view(heads, n, groups).transpose(1, 2)


def _gathered(rows: Tensor, at: Sequence[Tensor]) -> Tensor:
    """Of each head's rows, (KH, M, E), some of its blocks, X of all heads: (X, tokens, E)."""
    full = rows.shape[1] // BLOCK_TOKENS
    blocks = rows[:, : full * BLOCK_TOKENS].view(len(rows), full, -1)  # (KH, B, tokens * E)
    sizes = [len(of_head) for of_head in at]
    out = rows.new_empty(sum(sizes), blocks.shape[2])
    for of_head, which, into in zip(blocks, at, torch.split(out, sizes), strict=True):
        torch.index_select(of_head, 0, which, out=into)
    return out.view(len(out), BLOCK_TOKENS, -1)


# --------------------------------------------------------------------------------------------------- softmax


def _all(q: Tensor, past: Past, start: int, end: int, scaling: float) -> Attended:
    """q (KH, G, n, E) over all of a stretch from ``start`` to ``end``."""
    out, total = _softmax(q.flatten(1, 2), past.keys.all[:, start:end], past.values.all[:, start:end], None, scaling)
    return out.view(q.shape), total.view(q.shape[:3])


def _softmax(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Attended:
    """q (X, r, E) over keys and values (X, k, E), with a mask added to the scores, (r, k) or (X, r, k), in fp32 at
    least: (X, r, E) and (X, r). The kernel that torch's own attention runs on a CPU gives both; its sums know no
    gradient."""
    if q.device.type == "cpu" and not (torch.is_grad_enabled() and (q.requires_grad or keys.requires_grad)):
        added = mask if mask is None or mask.dim() == 2 else mask[None]
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], keys[None], values[None], attn_mask=added, scale=scaling
        )
        return out[0], total[0]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = keys.clone(), values.clone()  # what they are of may grow before a gradient is asked for
    scores = q.to(wide) @ keys.transpose(1, 2).to(wide) * scaling
    scores = scores if mask is None else scores + mask
    total = scores.logsumexp(-1)
    return (scores - total[..., None]).exp().to(values.dtype) @ values, total


def _joined(found: Sequence[Attended]) -> Attended:
    """One softmax over several."""
    out, total = found[0]
    for part, of_part in found[1:]:
        out = torch.lerp(out, part, torch.sigmoid(of_part - total)[..., None].to(out.dtype))
        total = torch.logaddexp(total, of_part)
    return out, total


@lru_cache(maxsize=4)
def _causal(n: int, m: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(G * n, m): the last n of m tokens see what came before and themselves. To be read only."""
    with torch.inference_mode(False):
        seen = torch.ones(n, m, dtype=torch.bool, device=device).tril_(m - n)
        mask = torch.zeros(n, m, dtype=dtype, device=device).masked_fill_(seen.logical_not(), -math.inf)
        return mask.repeat(groups, 1)


# ----------------------------------------------------------------------------------------------------- model


def check_rope(model: Any) -> None:
    """ModelError where a model's positions are not RoPE of fixed frequencies over whole heads."""
    kind = type(model).__name__
    rotary: Any = getattr(model.base_model, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) not in _ROPE:
        raise ModelError(f"kNN attention does not support {kind}: its positions are not RoPE of fixed frequencies")
    if getattr(model.config, "sliding_window", None) is not None:
        raise ModelError(f"kNN attention does not support {kind}: it has a sliding window of its own")
    width = model.base_model.layers[0].self_attn.head_dim
    if 2 * len(rotary.inv_freq) != width:
        raise ModelError(f"kNN attention does not support {kind}: only a part of each head is rotated")
