"""Attention over a window and the nearest of what left it, as it is defined: slow, and in the model's own numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def turned(x: Tensor, positions: Tensor, model: Any) -> Tensor:
    """RoPE in complex numbers. x (T, H, E)."""
    half = x.shape[-1] // 2
    angles = positions.double()[:, None, None] * model.base_model.rotary_emb.inv_freq.double()
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


def reference(
    model: Any,
    ids: Sequence[int],
    starts: Sequence[int],
    window: int,
    top: int,
    layers: Sequence[int],
    form: str = "joint",
    bias: float = 0.0,
    memory_tokens: int = 1 << 30,
) -> Tensor:
    """(T, V), token by token and head by head; ``starts``: for each token, the first one that its window still
    holds."""
    positions = torch.arange(len(ids))
    x = model.base_model.embed_tokens(torch.tensor(ids))
    for index, layer in enumerate(model.base_model.layers):
        attention = layer.self_attn
        y = layer.input_layernorm(x)
        q, k, v = (
            p(y).view(len(ids), -1, attention.head_dim) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        near_q, near_k = turned(q, positions, model), turned(k, positions, model)
        far_q = turned(q, torch.full_like(positions, window), model)
        out = torch.zeros_like(q)
        for t, start in enumerate(starts):
            for head in range(q.shape[1]):
                of = head // attention.num_key_value_groups
                local = near_k[start : t + 1, of] @ near_q[t, head] * attention.scaling
                values = v[start : t + 1, of]
                if index in layers and start:
                    first = max(0, start - memory_tokens)
                    far = k[first:start, of] @ far_q[t, head]
                    best = first + far.topk(min(top, start - first)).indices
                    memory = far[best - first] * attention.scaling
                    if form == "joint":
                        weights = torch.cat([local, memory + bias]).softmax(0)
                        out[t, head] = weights @ torch.cat([values, v[best, of]])
                        continue
                    gate = 1 / (1 + math.exp(-bias))
                    out[t, head] = gate * memory.softmax(0) @ v[best, of] + (1 - gate) * local.softmax(0) @ values
                    continue
                out[t, head] = local.softmax(0) @ values
        x = x + attention.o_proj(out.flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: Tensor = model.get_output_embeddings()(model.base_model.norm(x))
    return logits
