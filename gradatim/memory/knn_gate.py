"""How much to trust the neighbours at each token: lambda of a kNN-LM (arXiv:1911.00172, eq. 3), learned.

One lambda for all tokens makes most of them worse, and a store of other text makes nearly all of them worse. The gate
sees how near the neighbours are, whether they agree, and how sure the model is itself (as the adaptive retrieval of
arXiv:2109.04212 does); it is trained on stores that fit the text and on stores that do not. It knows no stores and no
models.

Shapes: B tokens, K neighbours, V vocabulary, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True, slots=True)
class Recalled:
    """What the neighbours say."""

    tokens: Tensor  # (B, K) long, -1 where there are fewer
    weights: Tensor  # (B, K) softmax of -distance/T; 0 where there are fewer, so that a row sums to 1 or to 0


def recalled(found: Neighbours, temperature: float = TEMPERATURE) -> Recalled:
    """Eq. 2 of arXiv:1911.00172, before equal tokens are summed."""
    distances = torch.from_numpy(found.distances)
    weights = torch.softmax(-distances / temperature, 1).nan_to_num(0.0)  # a row of nothing but inf
    return Recalled(torch.from_numpy(found.tokens), weights)


def features(found: Neighbours, said: Recalled, logprobs: Tensor, entries: Tensor) -> Tensor:
    """(B, F) for the gate. logprobs (B, V) of the model, entries (B,) how many the searched store holds."""
    distances = torch.from_numpy(found.distances).clamp(1e-4, _FARTHEST).log()  # (B, K)
    last = distances.shape[1] - 1
    tokens, weights = said.tokens, said.weights
    same = (tokens[:, :, None] == tokens[:, None]).float()  # (B, K, K)
    mass = (same * weights[:, None]).sum(2)  # (B, K) of the token that stands at k
    best = mass.argmax(1, keepdim=True)  # (B, 1)
    earlier = torch.tril(same, -1).sum(2)  # (B, K) neighbours before it with the same token
    distinct = ((earlier == 0) & (tokens >= 0)).sum(1)
    top = tokens.gather(1, best).clamp_min(0)  # (B, 1)
    columns = [
        distances[:, 0],
        distances[:, min(7, last)],
        distances[:, last],
        mass.gather(1, best)[:, 0],
        distinct.float().clamp_min(1).log(),
        -(logprobs.exp() * logprobs.clamp_min(-100)).sum(1),  # entropy
        logprobs.amax(1),
        weights[:, 0],
        logprobs.gather(1, top)[:, 0].clamp_min(_LEAST_LOGPROB),  # what the model thinks of their word
        entries.float().clamp_min(1).log(),
    ]
    return torch.stack([c.float() for c in columns], 1)


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


def near_gate(x: Tensor) -> Tensor:
    """For models that no gate was trained for: (B, F) -> (B,), exp(-d/T) of the nearest neighbour times the share of
    the likeliest token. Nothing in it was fitted: it opens where the text stood nearly so before and the neighbours
    agree, and is closed at the distances of unlike text, right store or wrong."""
    nearest, agreed = x[:, 0].exp(), x[:, 3]
    return _CAP * agreed * torch.exp(-nearest / TEMPERATURE)


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
