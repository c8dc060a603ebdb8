"""How much to trust the neighbours at each token: lambda of a kNN-LM (arXiv:1911.00172, eq. 3), learned.

One lambda for all tokens makes most of them worse, and a store of other text makes nearly all of them worse. The gate
sees how near the neighbours are, whether they agree, and how sure the model is itself (as the adaptive retrieval of
arXiv:2109.04212 does); it is trained on stores that fit the text and on stores that do not. It knows no stores and no
models.

Shapes: B tokens, K neighbours, V vocabulary, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradatim.memory.codec import Floats
from gradatim.memory.token_store import Neighbours

FEATURES = 10
TEMPERATURE = 0.095  # of squared distances between vectors of length 1
_HIDDEN = 16
_CAP = 0.95  # lambda is below it: the model is never silenced
_START = -2.0  # the bias of the last layer: lambda begins at 0.11
_FARTHEST = 4.0  # squared distance of opposite vectors
_LEAST_LOGPROB = -15.0
HURT_NATS = 0.1  # a token that loses more is hurt,
_HURT_EDGE = 0.03  # which sets in over so many nats,
_HURT_WEIGHT = 0.15  # and costs as much as so many nats


@dataclass(frozen=True, slots=True, eq=False)
class Recalled:
    """What the neighbours say."""

    tokens: NDArray[np.int64]  # (B, K), -1 where there are fewer
    weights: Floats  # (B, K) softmax of -distance/T; 0 where there are fewer, so that a row sums to 1 or to 0
    mass: Floats  # (B, K) what all neighbours weigh that say this one's token: p_kNN of it
    first: NDArray[np.bool_]  # (B, K) whether no nearer one says the same; False where there are fewer


@dataclass(frozen=True, slots=True, eq=False)
class Own:
    """What the model says itself."""

    entropy: Floats  # (B,) nats
    likeliest: Floats  # (B,) log-probability of its likeliest token
    said: Floats  # (B, K) of the neighbours' tokens; of token 0 where there are fewer


def recalled(found: Neighbours, temperature: float = TEMPERATURE) -> Recalled:
    """Eq. 2 of arXiv:1911.00172."""
    nearest = found.distances[:, :1]  # they ascend
    weights = np.exp((np.where(np.isfinite(nearest), nearest, 0.0) - found.distances) / temperature)
    total = weights.sum(1, keepdims=True)
    weights = (weights / np.where(total > 0.0, total, 1.0)).astype(np.float32)
    tokens = found.tokens
    same = tokens[:, :, None] == tokens[:, None]  # (B, K, K)
    mass = np.where(same, weights[:, None], np.float32(0.0)).sum(2)
    return Recalled(tokens, weights, mass, (tokens >= 0) & ~(same & _before(tokens.shape[1])).any(2))


@lru_cache
def _before(k: int) -> NDArray[np.bool_]:
    """(K, K): whether the second is nearer than the first."""
    return np.tri(k, k, -1, np.bool_)


def features(found: Neighbours, said: Recalled, own: Own, entries: NDArray[Any]) -> Floats:
    """(B, F) for the gate. entries (B,): how many the searched store holds."""
    last, rows = found.distances.shape[1] - 1, np.arange(len(entries))
    best = said.mass.argmax(1)  # (B,) their likeliest token
    columns = [
        *np.log(np.clip(found.distances[:, (0, min(7, last), last)], 1e-4, _FARTHEST)).T,
        said.mass[rows, best],
        np.log(np.maximum(said.first.sum(1), 1)),  # how many different ones
        own.entropy,
        own.likeliest,
        said.weights[:, 0],
        np.maximum(own.said[rows, best], _LEAST_LOGPROB),
        np.log(np.maximum(entries, 1)),
    ]
    return np.stack(columns, 1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Cases:
    """Tokens to train a gate on, as they were seen with one store."""

    features: Tensor  # (N, F)
    model: Tensor  # (N,) log-probability of the token that came, under the model
    memory: Tensor  # (N,) the same under the neighbours; -inf where none of them says it

    def mixed(self, lambdas: Tensor) -> Tensor:
        """(N,) log-probability of the token that came, eq. 3."""
        return torch.logaddexp(torch.log1p(-lambdas) + self.model, lambdas.log() + self.memory)


class Gate(nn.Module):
    """F features -> lambda in (0, cap)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mean = nn.Buffer(torch.zeros(FEATURES))
        self.scale = nn.Buffer(torch.ones(FEATURES))
        self.inner = nn.Parameter(torch.randn(_HIDDEN, FEATURES, generator=generator) / math.sqrt(FEATURES))
        self.inner_bias = nn.Parameter(torch.zeros(_HIDDEN))
        self.outer = nn.Parameter(torch.randn(_HIDDEN, generator=generator) / math.sqrt(_HIDDEN))
        self.outer_bias = nn.Parameter(torch.tensor(_START))

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) -> (B,)."""
        x = (x - self.mean) / self.scale
        return _CAP * torch.sigmoid(torch.tanh(x @ self.inner.t() + self.inner_bias) @ self.outer + self.outer_bias)

    @cached_property
    def lambdas(self) -> Callable[[Floats], Floats]:
        """The same of arrays, as it was trained when this was asked for first, without gradients: in a fifth of the
        time for the few rows of a decoding step."""
        weights = (self.mean, self.scale, self.inner.t(), self.inner_bias, self.outer, self.outer_bias)
        mean, scale, inner, inner_bias, outer, outer_bias = (w.detach().cpu().numpy() for w in weights)

        def lambdas(x: Floats) -> Floats:
            raw = np.tanh((x - mean) / scale @ inner + inner_bias) @ outer + outer_bias
            out: Floats = _CAP / (1.0 + np.exp(-raw))
            return out

        return lambdas


def near_gate(x: Floats) -> Floats:
    """For models that no gate was trained for: (B, F) -> (B,), exp(-d/T) of the nearest neighbour times the share of
    the likeliest token. Nothing in it was fitted: it opens where the text stood nearly so before and the neighbours
    agree, and is closed at the distances of unlike text, right store or wrong."""
    out: Floats = _CAP * x[:, 3] * np.exp(-np.exp(x[:, 0]) / TEMPERATURE)
    return out


def train_gate(cases: Sequence[Cases], *, steps: int = 600, seed: int = 0) -> Gate:
    """Fitted to the likelihood of the tokens that came, less a price for each that is hurt, each set of cases weighing
    the same: give sets whose store fits their text and sets whose store does not. Likelihood alone buys much of a few
    tokens with a little of many. Full batches of Adam; deterministic."""
    if not cases or not all(len(c.model) for c in cases):
        raise ValueError("a gate needs at least one case of each set")
    gate = Gate(seed)
    x = torch.cat([c.features for c in cases])
    gate.mean.copy_(x.mean(0))
    gate.scale.copy_(x.std(0).clamp_min(1e-3))
    optimiser = torch.optim.Adam(gate.parameters(), lr=0.02, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = torch.stack([_loss(c, gate(c.features)) for c in cases]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return gate.requires_grad_(False).eval()


def _loss(cases: Cases, lambdas: Tensor) -> Tensor:
    mixed = cases.mixed(lambdas)  # (N,)
    hurt = torch.sigmoid((cases.model - mixed - HURT_NATS) / _HURT_EDGE)
    return (_HURT_WEIGHT * hurt - mixed).mean()
