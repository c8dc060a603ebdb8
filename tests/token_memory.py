"""Small token memories for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from gradatim.memory.key_space import EachToken, KeySpace, standardised_by
from gradatim.memory.knn_gate import Gate
from gradatim.memory.token_store import TokenStore

WIDTH, VOCABULARY = 12, 31


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def space(base: str = "a" * 64, tokenizer: str = "t" * 64, layer: int = 3) -> KeySpace[EachToken]:
    return KeySpace(base, tokenizer, (layer,), standardised_by(3 * drawn(200, WIDTH, seed=7).numpy() + 1))


def store_of(hot_rows: int = 20_000) -> TokenStore:
    return TokenStore(space(), VOCABULARY, hot_rows=hot_rows)


def words(count: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def filled(count: int = 40, seed: int = 0, hot_rows: int = 20_000) -> TokenStore:
    store = store_of(hot_rows)
    store.add(f"episode-{seed}", drawn(count, WIDTH, seed=seed), words(count, seed))
    return store


def model_says(rows: int, seed: int = 5, sharp: float = 1.0) -> Tensor:
    return torch.log_softmax(sharp * drawn(rows, VOCABULARY, seed=seed), 1)


def open_gate(bias: float = 0.0) -> Gate:
    gate = Gate().requires_grad_(False)
    gate.outer_bias.fill_(bias)
    return gate
