"""Attention over a window and the nearest blocks of what left it, as defined: slow, and in the model's own numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradatim.nn.session import BLOCK_TOKENS


def turned(x: Tensor, positions: Tensor, model: Any) -> Tensor:
    """RoPE in complex numbers. x (T, H, E)."""
    half = x.shape[-1] // 2
    angles = positions.double()[:, None, None] * model.base_model.rotary_emb.inv_freq.double()
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


def attended(queries: Tensor, keys: Tensor, count: int) -> list[int]:
    """Which of keys (M, E) the queries (G, E) of one token attend to that share them."""
    blocks = len(keys) // BLOCK_TOKENS
    seen = set(range(blocks))
    if blocks > count + 1:
        likes = [
            max(float(q @ keys[b * BLOCK_TOKENS :][:BLOCK_TOKENS].mean(0)) for q in queries) for b in range(blocks)
        ]
        seen = {0, *sorted(range(1, blocks), key=lambda b: -likes[b])[:count]}
    return [i for i in range(len(keys)) if i // BLOCK_TOKENS in seen or i >= blocks * BLOCK_TOKENS]


def reference(
    model: Any,
    ids: Sequence[int],
    starts: Sequence[int],
    window: int,
    blocks: int,
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
                    if memory_tokens >= BLOCK_TOKENS:  # they go in blocks where there are any
                        first = BLOCK_TOKENS * math.ceil(first / BLOCK_TOKENS)
                    share = slice(of * attention.num_key_value_groups, (of + 1) * attention.num_key_value_groups)
                    best = first + torch.tensor(attended(far_q[t, share], k[first:start, of], blocks))
                    memory = k[best, of] @ far_q[t, head] * attention.scaling
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
