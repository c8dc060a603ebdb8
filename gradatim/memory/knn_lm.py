"""A model's next-token distribution, mixed with what came next in like states before (kNN-LM, arXiv:1911.00172, eq. 3):

    p(y) = lambda * p_kNN(y) + (1 - lambda) * p_LM(y)

with lambda learned per token, no search where the model is sure, and each row of a batch on the store of its own
tenant. The model's own distribution is left as it came: the learner trains on that one. It knows no requests and no
engine: states and log-probabilities in, log-probabilities out.

Shapes: B rows, D size of the hidden state, V vocabulary, K neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradatim.memory.knn_gate import TEMPERATURE, Cases, Recalled, features, recalled
from gradatim.memory.token_store import Neighbours, TokenStore

NEIGHBOURS = 32
SURE = 0.9  # a likeliest token above it is not looked up
LEAST_LAMBDA = 0.005  # below it the model's own row is given, bit for bit
SMALL_STORE = 5_000  # entries
SMALL_STORE_CAP = 0.25  # of lambda, up to there


@dataclass(frozen=True, slots=True)
class Mixed:
    """One decoding step. A row that was not mixed has the very bits of the model's row."""

    logprobs: Tensor  # (B, V)
    lambdas: Tensor  # (B,) 0 where nothing was mixed in
    searched: Tensor  # (B,) bool
    rows: Tensor  # (B, K) of the row's own store, -1 where there is none: what lent a hand
    weights: Tensor  # (B, K) of those, in the memory's part


class KnnLm:
    """``gate`` makes lambdas (B,) of features (B, F)."""

    def __init__(
        self,
        gate: Callable[[Tensor], Tensor],
        *,
        k: int = NEIGHBOURS,
        sure: float = SURE,
        temperature: float = TEMPERATURE,
    ) -> None:
        self.k = k
        self._gate = gate
        self._log_sure = math.log(sure)
        self._temperature = temperature

    @torch.no_grad()
    def mix(self, hidden: Tensor, logprobs: Tensor, stores: Sequence[TokenStore | None]) -> Mixed:
        """hidden (B, D) of the stores' layer and logprobs (B, V) at the same positions; a store or None for each row.

        Log-probabilities are natural and normalised; ``logprobs`` is not written to, and is what is given back where
        no row was mixed.
        """
        count = len(logprobs)
        lambdas, rows = torch.zeros(count), torch.full((count, self.k), -1)
        weights = torch.zeros(count, self.k)
        searched = self._worth_it(hidden, logprobs, stores)
        out = logprobs
        for wanted, found, said, mine in self._asked(hidden, logprobs, stores, searched):
            lambdas[wanted], rows[wanted], weights[wanted] = mine, torch.from_numpy(found.rows), said.weights
            open_ = mine > 0
            if bool(open_.any()):
                out = out.clone() if out is logprobs else out
                at = wanted[open_]
                out[at] = _mixture(logprobs[at], mine[open_], Recalled(said.tokens[open_], said.weights[open_]))
        return Mixed(out, lambdas, searched, rows, weights)

    @torch.no_grad()
    def shifts(
        self, hidden: Tensor, logprobs: Tensor, stores: Sequence[TokenStore | None]
    ) -> list[Mapping[int, float]]:
        """The same mixture as nats to add to the log-probabilities of a few tokens of each row: normalised again, they
        are ``mix``. Tokens that the model cannot say (-inf) stay so.

        From eq. 3, p(y) = (1 - lambda) p_LM(y) (1 + lambda p_kNN(y) / ((1 - lambda) p_LM(y))), of which the first
        factor is the same for all.
        """
        out: list[Mapping[int, float]] = [{} for _ in stores]
        searched = self._worth_it(hidden, logprobs, stores)
        for wanted, _, said, mine in self._asked(hidden, logprobs, stores, searched):
            own = logprobs[wanted].gather(1, said.tokens.clamp_min(0).to(logprobs.device)).double().cpu()
            odds = (mine.double().log() - torch.log1p(-mine.double()))[:, None] + _mass(said).double().log()
            added = torch.log1p((odds - own).exp())  # (B, K)
            usable = (said.tokens >= 0) & own.isfinite() & (mine > 0)[:, None]
            for row, tokens, nats, use in zip(wanted.tolist(), said.tokens, added, usable, strict=True):
                out[row] = dict(zip(tokens[use].tolist(), nats[use].tolist(), strict=True))
        return out

    def _asked(
        self, hidden: Tensor, logprobs: Tensor, stores: Sequence[TokenStore | None], searched: Tensor
    ) -> Iterator[tuple[Tensor, Neighbours, Recalled, Tensor]]:
        """Per store: the rows (n,) that are on it, what was found, what that says, and lambdas (n,)."""
        for store, wanted in _by_store(stores, searched):
            found = store.search(hidden[wanted], self.k)
            said = recalled(found, self._temperature)
            yield wanted, found, said, self._lambdas(found, said, logprobs[wanted].float().cpu(), len(store))

    def _worth_it(self, hidden: Tensor, logprobs: Tensor, stores: Sequence[TokenStore | None]) -> Tensor:
        unsure = (logprobs.amax(1) < self._log_sure) & hidden.isfinite().all(1)  # NaN is never less
        has = torch.tensor([bool(s) for s in stores], dtype=torch.bool)
        return unsure.cpu() & has

    def _lambdas(self, found: Neighbours, said: Recalled, logprobs: Tensor, entries: int) -> Tensor:
        seen = features(found, said, logprobs, torch.full((len(logprobs),), entries))
        lambdas = self._gate(seen)
        if entries < SMALL_STORE:
            lambdas = lambdas.clamp_max(SMALL_STORE_CAP)
        some = said.weights.sum(1) > 0
        return torch.where(some & (lambdas >= LEAST_LAMBDA), lambdas, 0.0)

    @torch.no_grad()
    def cases(self, hidden: Tensor, logprobs: Tensor, targets: Tensor, store: TokenStore) -> Cases:
        """What a gate learns from: tokens ``targets`` (N,) of a text, of which the store must not hold this passage.
        Those at which the model is sure are left out."""
        wanted = self._worth_it(hidden, logprobs, [store] * len(targets)).nonzero()[:, 0]
        found = store.search(hidden[wanted], self.k)
        said = recalled(found, self._temperature)
        own, targets = logprobs[wanted].float().cpu(), targets[wanted].cpu()[:, None]
        memory = (said.weights * (said.tokens == targets)).sum(1).log()
        seen = features(found, said, own, torch.full((len(wanted),), len(store)))
        return Cases(seen, own.gather(1, targets)[:, 0], memory)


def _by_store(stores: Sequence[TokenStore | None], searched: Tensor) -> list[tuple[TokenStore, Tensor]]:
    """Each store once, with the rows (n,) that are on it."""
    groups: dict[int, tuple[TokenStore, list[int]]] = {}
    for row, (store, wanted) in enumerate(zip(stores, searched.tolist(), strict=True)):
        if wanted and store is not None:
            groups.setdefault(id(store), (store, []))[1].append(row)
    return [(store, torch.tensor(rows)) for store, rows in groups.values()]


def _mixture(logprobs: Tensor, lambdas: Tensor, said: Recalled) -> Tensor:
    """Eq. 3 on (B, V) rows; lambdas (B,) in (0, 1). Tokens that no neighbour says only lose log(1 - lambda)."""
    lambdas = lambdas.to(logprobs.device, logprobs.dtype)
    tokens, weights = said.tokens.to(logprobs.device), said.weights.to(logprobs.device, logprobs.dtype)
    mass = _mass(Recalled(tokens, weights))
    kept = torch.log1p(-lambdas)[:, None]
    out = logprobs + kept
    at = tokens.clamp_min(0)
    both = torch.logaddexp(out.gather(1, at), lambdas.log()[:, None] + mass.log())
    absent = tokens < 0  # stands for token 0, which must keep its value
    out.scatter_(1, torch.where(absent, tokens[:, :1], at), torch.where(absent, both[:, :1], both))
    return out


def _mass(said: Recalled) -> Tensor:
    """(B, K) what all neighbours with the token of neighbour k weigh: the same for equal tokens."""
    same = said.tokens[:, :, None] == said.tokens[:, None]  # (B, K, K)
    return (same * said.weights[:, None]).sum(2)
