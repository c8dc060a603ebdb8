"""Elastic weight consolidation as published (Kirkpatrick 2017, PNAS 114, eq. 3), of all parameters of a model.

    L(theta) = L_B(theta) + sum_i lambda/2 F_i (theta_i - theta*_A,i)^2

One quadratic term for every earlier task; a sum of quadratics is one, so two vectors hold them all. For LoRA adapters,
where this is degenerate, see ``fisher``. It knows no tasks and no losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn


def diagonal_fisher(model: nn.Module, inputs: Iterable[Tensor], draw: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """E[(d log p(y|x) / d theta)^2] per parameter tensor, y drawn from the model itself.

    ``draw`` gives the log-probability (a scalar) of one label that it draws from the model's output for one input.
    One backward pass an input: squares of single gradients are needed, not the square of their sum.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    count = 0
    for x in inputs:
        gradients = torch.autograd.grad(draw(model(x)), parameters)
        for sum_of_squares, g in zip(total, gradients, strict=True):
            sum_of_squares.addcmul_(g, g)
        count += 1
    if not count:
        raise ValueError("the Fisher information of no input is asked for")
    return [t / count for t in total]


class Consolidation:
    """What is kept of earlier tasks: sum_A F_A and sum_A F_A theta*_A."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._fisher = [torch.zeros_like(p) for p in self._parameters]
        self._weighted = [torch.zeros_like(p) for p in self._parameters]
        self._constant = 0.0

    @torch.no_grad()
    def remember(self, fisher: Sequence[Tensor]) -> None:
        """The task just learned ends at the parameters as they are now."""
        for p, f, total, weighted in zip(self._parameters, fisher, self._fisher, self._weighted, strict=True):
            total.add_(f)
            weighted.addcmul_(f, p)
            self._constant += float((f * p.square()).sum())

    def penalty(self, strength: float) -> Tensor:
        """``lambda/2 sum_A sum_i F_A,i (theta_i - theta*_A,i)^2``, a scalar, differentiable."""
        terms = [
            (f * p.square() - 2.0 * w * p).sum()
            for p, f, w in zip(self._parameters, self._fisher, self._weighted, strict=True)
        ]
        return 0.5 * strength * (torch.stack(terms).sum() + self._constant)

    @torch.no_grad()
    def step(self, strength: float, lr: float) -> None:
        """What the penalty alone does to the parameters in a gradient step of ``lr``, implicitly: its proximal
        operator (Parikh 2014, Foundations and Trends in Optimization 1(3), sec. 6.1.1), in place. The explicit step
        diverges where ``lr lambda F_i > 2``; this one never does."""
        for p, f, w in zip(self._parameters, self._fisher, self._weighted, strict=True):
            p.addcmul_(w, torch.tensor(lr * strength)).div_(1.0 + lr * strength * f)
