"""Adam (Kingma 2015, arXiv:1412.6980, alg. 1) for a stream of short updates, on one flat vector of weights.

Two departures, for an update has only a few steps and each is of other examples than the last:

    first moment    begins anew, or most of the way of an update would be the momentum of the one before
    step            its root mean square is at most 1 (Shazeer 2018, arXiv:1804.04235, sec. 6), or the second moment,
                    which remembers gradients of what has been learned since, makes the first steps several times longer

It knows no batches and no files.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BETAS = (0.9, 0.95)
EPS = 1e-8


class FlatAdam:
    """Moves ``flat`` (P,) by its gradient. KeyError or RuntimeError where the state is not one of these weights."""

    def __init__(self, flat: Tensor, state: Mapping[str, Tensor]) -> None:
        self._flat = flat
        self._first = torch.zeros_like(flat)  # (P,)
        self._second = torch.zeros_like(flat)  # (P,)
        self._steps = 0  # of this update
        self._life = 0  # of the adapter
        if state:
            self._second.copy_(state["exp_avg_sq"].reshape_as(flat))
            self._life = int(state["step"])

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step by ``flat.grad`` (P,)."""
        gradient = self._flat.grad
        assert gradient is not None
        self._steps, self._life = self._steps + 1, self._life + 1
        beta1, beta2 = BETAS
        self._first.lerp_(gradient, 1.0 - beta1)
        self._second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        root = (self._second / (1.0 - beta2**self._life)).sqrt_().add_(EPS)
        step = (self._first / (1.0 - beta1**self._steps)).div_(root)
        longest = max(1.0, float(step.square().mean().sqrt()))
        self._flat.data.add_(step, alpha=-lr / longest)

    def state(self) -> dict[str, Tensor]:
        """What the next update goes on from; in bf16, as the third digit does not matter."""
        if not self._life:
            return {}
        return {"step": torch.tensor(self._life), "exp_avg_sq": self._second.to("cpu", torch.bfloat16)}
