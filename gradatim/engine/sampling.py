"""Drawing the next token of each row from its logits, and its log-probability under the model itself.

It knows nothing of text, stop strings or where the logits come from. Shapes: M rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradatim.types import Sampling

_GREEDY_BELOW = 1e-4  # a lower temperature overflows before it differs from the maximum
_NUCLEUS = 256  # tokens looked at first for top_p, before the whole vocabulary is sorted


@dataclass(slots=True)
class Draws:
    """The randomness and the history of one choice. The same seed and index draw the same, whatever else runs."""

    sampling: Sampling
    random: random.Random
    counts: Counter[int] = field(default_factory=Counter)  # tokens drawn so far
    memory: Mapping[int, float] = field(default_factory=dict)  # nats that a memory adds to next tokens, for one draw

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature < _GREEDY_BELOW

    @property
    def shifted(self) -> bool:
        s = self.sampling
        penalised = bool(self.counts) and bool(s.presence_penalty or s.frequency_penalty)
        return bool(s.logit_bias) or penalised or bool(self.memory)


@dataclass(frozen=True, slots=True)
class Drawn:
    id: int
    logprob: float  # nats, before temperature, top_p, penalties and bias
    top: tuple[tuple[int, float], ...] = ()
    shift: float | None = None  # nats by which a memory moved the log-probability; None: it had no part in it


def new_draws(sampling: Sampling, index: int) -> Draws:
    seed = None if sampling.seed is None else f"{sampling.seed}:{index}"
    return Draws(sampling, random.Random(seed))


def draw(logits: Tensor, draws: Sequence[Draws]) -> list[Drawn | None]:
    """One token for each row of logits (M, V), fp32; None where the logits are not finite numbers. What memories added
    is used up."""
    total = logits.logsumexp(-1)  # (M,)
    sound = total.isfinite().tolist()
    ids = logits.argmax(-1)  # (M,)
    if not all(d.greedy and not d.shifted for d in draws):
        for row, d in enumerate(draws):
            if sound[row] and not (d.greedy and not d.shifted):
                ids[row] = _draw_row(_shift(logits[row], d), d)
    logprobs = (logits.gather(-1, ids[:, None])[:, 0] - total).tolist()
    out: list[Drawn | None] = []
    for row, (d, token_id, logprob) in enumerate(zip(draws, ids.tolist(), logprobs, strict=True)):
        if not sound[row]:
            out.append(None)
            continue
        d.counts[token_id] += 1
        top = _top(logits[row] - total[row], d.sampling.top_logprobs)
        out.append(Drawn(token_id, logprob, top, _memory_shift(logits[row], total[row], d, token_id)))
        d.memory = {}
    return out


def _shift(logits: Tensor, d: Draws) -> Tensor:
    """OpenAI's penalties and bias: l_j - frequency * count_j - presence * [count_j > 0] + bias_j. (V,)"""
    if not d.shifted:
        return logits
    logits = logits.clone()
    s = d.sampling
    if d.counts and (s.presence_penalty or s.frequency_penalty):
        seen = torch.tensor(list(d.counts), device=logits.device)
        count = torch.tensor(list(d.counts.values()), dtype=logits.dtype, device=logits.device)
        logits[seen] -= s.frequency_penalty * count + s.presence_penalty
    for token_id, bias in (*s.logit_bias.items(), *d.memory.items()):
        logits[token_id] += bias
    return logits


def _memory_shift(logits: Tensor, total: Tensor, d: Draws, token_id: int) -> float | None:
    """log q(token) - log p(token) with q(v) = p(v) e^m(v) / sum_u p(u) e^m(u), for the few v that have an m."""
    if not d.memory:
        return None
    at = torch.tensor(list(d.memory), device=logits.device)
    moved = torch.tensor(list(d.memory.values()), dtype=torch.float64, device=logits.device)
    p = (logits[at] - total).double().exp()
    mass = 1.0 + float((p * moved.expm1()).sum())
    return d.memory.get(token_id, 0.0) - math.log(max(mass, 1e-12))


def _draw_row(logits: Tensor, d: Draws) -> int:
    if d.greedy:
        return int(logits.argmax())
    u = d.random.random()
    p = ((logits - logits.max()).double() / d.sampling.temperature).softmax(-1)  # (V,)
    if d.sampling.top_p >= 1.0:
        return _inverse(p, u)
    kept, order = _nucleus(p, d.sampling.top_p)
    return int(order[_inverse(kept, u)])


def _inverse(p: Tensor, u: float) -> int:
    """The first index at which the running sum of p exceeds a share u of its total: a token of p = 0 never does."""
    running = p.cumsum(-1)
    at = int(torch.searchsorted(running, running[-1] * u, right=True))
    return min(at, len(p) - 1)


def _nucleus(p: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The most likely tokens that together reach top_p (Holtzman 2020, arXiv:1904.09751), with their ids."""
    k = min(_NUCLEUS, len(p))
    kept, order = p.topk(k)
    if float(kept.sum()) < top_p and k < len(p):
        kept, order = p.sort(descending=True)
    n = int((kept.cumsum(-1) - kept < top_p).sum())  # tokens before which less than top_p was reached
    return kept[: max(n, 1)], order[: max(n, 1)]


def _top(logprobs: Tensor, k: int) -> tuple[tuple[int, float], ...]:
    if not k:
        return ()
    values, ids = logprobs.topk(min(k, len(logprobs)))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))
