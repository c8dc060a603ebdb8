"""The output head: log-probabilities of answer tokens from the hidden states that predict them, and from no others.

It knows no layers and no attention.

Shapes: R rows that predict, M predictions (a row may have several), T tokens of one answer, H hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradatim.nn.trie import Answer, Pack

HEAD_ROWS = 128  # rows of the vocabulary projection in memory at once


@dataclass(frozen=True, slots=True)
class Scored:
    """Per token of one answer: its log-probability, and whether it is the most likely token there."""

    logprobs: Tensor  # (T,) fp32, nats, differentiable
    greedy: Tensor  # (T,) bool

    @property
    def total(self) -> Tensor:
        return self.logprobs.sum()


@dataclass(frozen=True, slots=True)
class Rows:
    """Which packed rows predict, and what."""

    needed: Tensor  # (R,) packed rows, ascending
    rows: Tensor  # (M,) index into ``needed``, ascending
    targets: Tensor  # (M,) token ids
    back: Tensor  # (M,) from that order to the answers'
    lengths: tuple[int, ...]  # T of each answer


def rows_of(packed: Pack, answers: Sequence[Answer], device: torch.device) -> Rows:
    """Of answers that were packed."""
    flat = torch.tensor([r for rows in packed.rows for r in rows], device=device)  # (M,)
    targets = torch.tensor([t for a in answers for t in a.completion_ids], device=device)  # (M,)
    needed, rows = torch.unique(flat, return_inverse=True)
    order = rows.argsort(stable=True)
    lengths = tuple(len(a.completion_ids) for a in answers)
    return Rows(needed, rows[order], targets[order], order.argsort(), lengths)


def predict(hidden: Tensor, weight: Tensor, wanted: Rows) -> list[Scored]:
    """Of normed hidden states (R, H) at the needed rows and the head's weight (V, H), one Scored per answer."""
    logprobs, top = _Head.apply(hidden, weight, wanted.rows, wanted.targets)  # type: ignore[no-untyped-call]
    greedy = top[wanted.rows] == wanted.targets
    parts = (x[wanted.back].split(wanted.lengths) for x in (logprobs, greedy))
    return [Scored(p, g) for p, g in zip(*parts, strict=True)]


def draw(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Log-probabilities (R,) of one token drawn at each of the rows (R, H), differentiable. ``generator`` is on the
    CPU."""
    with torch.no_grad():
        chances = [(h @ weight.t()).float().softmax(1).cpu() for h in torch.split(hidden, HEAD_ROWS)]
        labels = torch.cat([p.multinomial(1, generator=generator)[:, 0] for p in chances]).to(hidden.device)  # (R,)
    rows = torch.arange(len(hidden), device=hidden.device)
    logprobs: Tensor = _Head.apply(hidden, weight, rows, labels)[0]  # type: ignore[no-untyped-call]
    return logprobs


class _Head(torch.autograd.Function):
    """log softmax(h W^T)[target], with nothing of size (R, V) kept for the backward pass.

    d logp(t) / d h = W[t] - sum_v p_v W_v, and the sum is a (R, H) matrix that the forward pass can make while it
    has the probabilities in hand. W is frozen.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (R, H), weight (V, H), rows (M,) sorted, targets (M,) -> log-probabilities (M,), top tokens (R,)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(rows), dtype=wide, device=hidden.device)
        top = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        expected = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        bounds = torch.searchsorted(rows, torch.arange(0, len(hidden) + HEAD_ROWS, HEAD_ROWS, device=rows.device))
        for chunk, start in enumerate(range(0, len(hidden), HEAD_ROWS)):
            end = start + HEAD_ROWS
            logits = (hidden[start:end] @ weight.t()).to(wide)  # (rows, V)
            highest, top[start:end] = logits.max(1)
            mine = slice(int(bounds[chunk]), int(bounds[chunk + 1]))
            picked = logits[rows[mine] - start, targets[mine]]
            total = logits.sub_(highest[:, None]).exp_().sum(1)
            logprobs[mine] = picked - (highest + total.log())[rows[mine] - start]
            if expected is not None:
                expected[start:end] = (logits.to(weight.dtype) @ weight) / total[:, None]
        ctx.save_for_backward(weight, rows, targets, expected)
        ctx.mark_non_differentiable(top)
        return logprobs, top

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _top: Tensor) -> tuple[Tensor, None, None, None]:
        weight, rows, targets, expected = ctx.saved_tensors
        total = torch.zeros(len(expected), dtype=grad.dtype, device=grad.device).index_add_(0, rows, grad)  # (R,)
        out = expected.to(grad.dtype) * -total[:, None]
        out.index_add_(0, rows, weight[targets].to(grad.dtype) * grad[:, None])
        return out.to(expected.dtype), None, None, None
