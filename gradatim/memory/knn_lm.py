"""A model's next-token distribution, mixed with what came next in like states before (kNN-LM, arXiv:1911.00172, eq. 3):

    p(y) = lambda * p_kNN(y) + (1 - lambda) * p_LM(y)

with lambda learned per token, no search where the model is sure, and each row of a batch on the store of its own
tenant. The model's own distribution is left as it came: the learner trains on that one. It knows no requests and no
engine: states and logits in, what to add to them out.

Shapes: B rows, D size of the hidden state, V vocabulary, K neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradatim.memory.codec import Floats
from gradatim.memory.knn_gate import FEATURES, TEMPERATURE, Cases, Own, Recalled, features, recalled
from gradatim.memory.segments import Rows
from gradatim.memory.token_store import Neighbours, TokenStore
from gradatim.types import Blend

NEIGHBOURS = 32
SURE = 0.9  # a likeliest token above it is not looked up
LEAST_LAMBDA = 0.005  # below it the model's own row is left as it is
SMALL_STORE = 5_000  # entries
SMALL_STORE_CAP = 0.25  # of lambda, up to there
_LEAST_LOGIT = -1e4  # stands for -inf, which times 0 is no number


@dataclass(frozen=True, slots=True, eq=False)
class Mixed:
    """One decoding step: eq. 3 as nats to add to the logits of a few tokens, which normalised again are the mixture.

    p(y) = (1 - lambda) p_LM(y) (1 + lambda p_kNN(y) / ((1 - lambda) p_LM(y))), of which the first factor is the same
    for all.
    """

    searched: NDArray[np.bool_]  # (B,)
    lambdas: Floats  # (B,) 0 where nothing was mixed in
    tokens: Rows  # (B, K) what the neighbours say, -1 where there is none
    nats: Floats  # (B, K) for those, once for each token; 0 where nothing was mixed in
    rows: Rows  # (B, K) of the row's own store, -1 where there is none: what lent a hand
    weights: Floats  # (B, K) of those, in the memory's part

    def blends(self) -> Mapping[int, Blend]:
        """Of the rows that were mixed."""
        out = {}
        for row in self.lambdas.nonzero()[0].tolist():
            some = self.nats[row] > 0.0
            out[row] = Blend(self.tokens[row, some], self.nats[row, some], math.log1p(-float(self.lambdas[row])))
        return out

    def on(self, logprobs: Tensor) -> Tensor:
        """The log-probabilities (B, V) of the mixture, of the model's own, which are normalised. A row that was not
        mixed keeps its bits; where none was, the very tensor is given back."""
        out = logprobs
        for row, blend in self.blends().items():
            out = out.clone() if out is logprobs else out
            out[row] += blend.kept
            out[row, torch.from_numpy(blend.tokens)] += torch.from_numpy(blend.nats)
        return out


class KnnLm:
    """``gate`` makes lambdas (B,) of features (B, F)."""

    def __init__(
        self,
        gate: Callable[[Floats], Floats],
        *,
        k: int = NEIGHBOURS,
        sure: float = SURE,
        temperature: float = TEMPERATURE,
    ) -> None:
        self.k = k
        self._gate = gate
        self._sure = sure
        self._temperature = temperature

    @torch.no_grad()
    def mix(self, hidden: Tensor, logits: Tensor, stores: Sequence[TokenStore | None]) -> Mixed:
        """hidden (B, D) of the stores' layer and logits (B, V), normalised or not, at the same positions; a store or
        None for each row. Where neighbours say what the model cannot (-inf) nothing is mixed in."""
        count = len(logits)
        out = Mixed(
            np.zeros(count, np.bool_),
            np.zeros(count, np.float32),
            np.full((count, self.k), -1),
            np.zeros((count, self.k), np.float32),
            np.full((count, self.k), -1),
            np.zeros((count, self.k), np.float32),
        )
        seen = self._look(hidden, logits, stores)
        if seen is None:
            return out
        at, said, own = seen.at, seen.said, seen.own
        lambdas = self._gate(seen.features)
        lambdas = np.where(seen.entries < SMALL_STORE, np.minimum(lambdas, SMALL_STORE_CAP), lambdas)
        sayable = (np.isfinite(own.said) | (said.tokens < 0)).all(1)
        lambdas = np.where((said.weights[:, 0] > 0.0) & (lambdas >= LEAST_LAMBDA) & sayable, lambdas, 0.0)
        out.searched[at], out.lambdas[at], out.tokens[at] = said.tokens[:, 0] >= 0, lambdas, said.tokens
        out.nats[at] = _nats(lambdas.astype(np.float64), said, own)
        out.rows[at], out.weights[at] = seen.found.rows, said.weights
        return out

    def _look(self, hidden: Tensor, logits: Tensor, stores: Sequence[TokenStore | None]) -> _Seen | None:
        """All that is known of the rows that are worth a search; None where none is."""
        p = logits.softmax(-1)  # (B, V)
        likeliest = _array(p.amax(-1))  # (B,) of which NaN is never less than anything
        unsure = (likeliest < self._sure).tolist()
        groups = _by_store([store if wanted else None for store, wanted in zip(stores, unsure, strict=True)])
        if not groups:
            return None
        at = np.array([row for _, rows in groups for row in rows])
        found = _joined([store.search(hidden[rows], self.k) for store, rows in groups])
        entries = np.array([len(store) for store, rows in groups for _ in rows])
        said = recalled(found, self._temperature)
        log_top = np.log(likeliest[at])  # (n,)
        total = _array(logits.amax(-1))[at] - log_top  # (n,) the logarithm of the sum
        theirs = _array(logits[torch.from_numpy(at)[:, None], torch.from_numpy(np.maximum(said.tokens, 0))])  # (n, K)
        own = Own(total - _expected(p, logits, at), log_top, theirs - total[:, None])
        return _Seen(at, found, said, own, entries)

    @torch.no_grad()
    def cases(self, hidden: Tensor, logits: Tensor, targets: Tensor, store: TokenStore) -> Cases:
        """What a gate learns from: tokens ``targets`` (N,) of a text, of which the store must not hold this passage.
        Those at which the model is sure are left out."""
        seen = self._look(hidden, logits, [store] * len(targets))
        if seen is None:
            return Cases(torch.zeros(0, FEATURES), torch.zeros(0), torch.zeros(0))
        at, said = torch.from_numpy(seen.at), seen.said
        came = targets.cpu()[at]
        model = logits[at.to(logits.device)].float().cpu().log_softmax(-1).gather(1, came[:, None])[:, 0]
        memory = torch.from_numpy((said.weights * (said.tokens == came.numpy()[:, None])).sum(1)).log()
        return Cases(torch.from_numpy(seen.features), model, memory)


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """n rows of a batch that were searched for."""

    at: Rows  # (n,) which ones
    found: Neighbours
    said: Recalled
    own: Own
    entries: NDArray[Any]  # (n,) of the store that each is on

    @property
    def features(self) -> Floats:
        return features(self.found, self.said, self.own, self.entries)


def _by_store(stores: Sequence[TokenStore | None]) -> list[tuple[TokenStore, list[int]]]:
    """Each store once, with the rows that are on it; an empty one is none."""
    groups: dict[int, tuple[TokenStore, list[int]]] = {}
    for row, store in enumerate(stores):
        if store:
            groups.setdefault(id(store), (store, []))[1].append(row)
    return list(groups.values())


def _joined(parts: Sequence[Neighbours]) -> Neighbours:
    if len(parts) == 1:
        return parts[0]
    return Neighbours(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("distances", "tokens", "rows")))


def _nats(lambdas: NDArray[np.float64], said: Recalled, own: Own) -> NDArray[np.float64]:
    """(n, K) log(1 + lambda p_kNN / ((1 - lambda) p_LM)), of each token once."""
    with np.errstate(divide="ignore", invalid="ignore"):  # rows that nothing is mixed into
        odds = np.log(lambdas) - np.log1p(-lambdas)
        added = np.logaddexp(0.0, odds[:, None] + np.log(said.mass) - own.said)
    return np.where(said.first & (lambdas > 0.0)[:, None], added, 0.0)


def _expected(p: Tensor, logits: Tensor, at: Rows) -> Floats:
    """(n,) sums of p times logits (B, V), where a token that cannot be said (-inf) counts for nothing."""
    out = _array(torch.stack([p[row].dot(logits[row]) for row in at.tolist()]))
    if np.isfinite(out).all():
        return out
    some = torch.from_numpy(at)
    return _array((p[some] * logits[some].clamp_min(_LEAST_LOGIT)).sum(1))


def _array(x: Tensor) -> Floats:
    out: Floats = x.cpu().numpy()
    return out
