"""Attention over the nearest of many keys, in one softmax with those of a window (arXiv:2203.08913, arXiv:2402.04617).

Keys beyond the window are kept as they were before RoPE, and a query looks among them as if all stood at one distance:
the window's length, the farthest that the model sees there. The functions know no sessions and no batches.

Shapes: n queries, m keys in the window, M keys beyond it; H query heads, KH key heads, E width of a head; K found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import faiss
import torch
from torch import Tensor

from gradatim.errors import ModelError

TOP = 32  # keys that a head attends to beyond the window
_FIRST_LAYERS = 2  # see single tokens rather than meaning: left alone
_ROPE = ("default", "linear", "llama3")  # fixed frequencies, lengths kept


def memory_layers(layers: int) -> tuple[int, ...]:
    """Which of a model's layers look beyond the window, counted from 0: all but the first two."""
    return tuple(range(min(_FIRST_LAYERS, layers - 1), layers))


def recall(q: Tensor, parts: Sequence[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Dot products (H, n, K) of q (H, n, E) with its best keys, and their values (H, n, K, E). The keys and values
    (KH, M, E) come in one or more parts; K is the smaller of ``count`` and how many there are."""
    found = [_recall_part(q, keys, values, count) for keys, values in parts]
    if len(found) == 1:
        return found[0]
    scores, values = torch.cat([s for s, _ in found], -1), torch.cat([v for _, v in found], -2)
    best = scores.topk(min(count, scores.shape[-1]), -1)
    return best.values, values.gather(-2, best.indices[..., None].expand(*best.indices.shape, values.shape[-1]))


def _recall_part(q: Tensor, keys: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    heads, n, width = q.shape
    grouped = q.reshape(len(keys), -1, width)  # (KH, H / KH * n, E)
    count = min(count, keys.shape[1])
    best = torch.stack([_best(x, y, count) for x, y in zip(grouped, keys, strict=True)])  # (KH, H / KH * n, K)
    at = torch.arange(len(keys), device=q.device)[:, None, None]
    scores = torch.einsum("hqe,hqke->hqk", grouped, keys[at, best])
    return scores.reshape(heads, n, count), values[at, best].reshape(heads, n, count, width)


def _best(queries: Tensor, keys: Tensor, count: int) -> Tensor:
    """(q, K) which of keys (M, E) have the greatest dot products with queries (q, E)."""
    with torch.no_grad():
        if queries.device.type == "cpu" and queries.dtype == torch.float32:  # one pass, no matrix (q, M)
            found = faiss.knn(
                queries.contiguous().numpy(), keys.contiguous().numpy(), count, faiss.METRIC_INNER_PRODUCT
            )
            return torch.from_numpy(found[1])
        return (queries @ keys.t()).topk(count, -1).indices


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """(n, H, E) of weights (H, n, K) and values (H, n, K, E)."""
    return torch.einsum("hnk,hnke->nhe", weights.to(values.dtype), values)


def joint(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scaling: float, found: Tensor, recalled: Tensor
) -> tuple[Tensor, Tensor]:
    """One softmax over the scores found beyond the window (H, n, K) and those in it: what comes out (n, H, E), and how
    much of the weight (H, n) lay beyond.

    q (H, n, E), keys and values (KH, m, E) are of the window; ``seen`` (n, m) bool says which keys each query may
    attend to (None: all up to its own, the queries being the last n). ``recalled`` (H, n, K, E) are the values found.
    """
    heads, n, width = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    local = q.reshape(len(keys), -1, width).to(wide) @ keys.transpose(1, 2).to(wide) * scaling
    local = local.reshape(heads, n, -1)  # (H, n, m)
    if seen is None:
        seen = torch.ones_like(local[0], dtype=torch.bool).tril_(local.shape[-1] - n)
    local = local.masked_fill(~seen, -math.inf)
    weights = torch.cat([found.to(wide), local], -1).softmax(-1)
    count = found.shape[-1]
    beyond, weights = weights[..., :count].sum(-1), weights.to(values.dtype)
    near = (weights[..., count:].reshape(len(keys), -1, keys.shape[1]) @ values).reshape(heads, n, width)
    return weighted(weights[..., :count], recalled) + near.transpose(0, 1), beyond


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
