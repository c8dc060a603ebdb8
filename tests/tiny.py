"""A random two-layer model, small enough to train in a test."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradatim.nn.base import Base, weights_digest
from gradatim.nn.lora import LoraWeights, fresh_weights

VOCABULARY = 97


def tiny_model(seed: int = 0, heads: int = 4, key_heads: int = 2) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@lru_cache
def tiny_base() -> Base:
    model = tiny_model()
    return Base(
        model=model,
        tokenizer=None,
        sha256=weights_digest(model),
        context_tokens=2048,
        eos_ids=frozenset({0}),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def tiny_weights(model: Any, seed: int = 0, rank: int = 4, size: float = 0.1) -> LoraWeights:
    """As after some training: B is not 0."""
    generator = torch.Generator().manual_seed(seed + 1)
    fresh = fresh_weights(model, rank, 2 * rank, seed)
    modules = {p: (a, size * torch.randn(b.shape, generator=generator)) for p, (a, b) in fresh.modules.items()}
    return LoraWeights(rank, 2.0, modules)
