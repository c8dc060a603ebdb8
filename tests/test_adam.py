from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradatim.learner.adam import BETAS, FlatAdam

SIZE = 200


def weights() -> Tensor:
    flat = torch.ones(SIZE, dtype=torch.float64)
    flat.grad = torch.zeros_like(flat)
    return flat


def walk(flat: Tensor, optimizer: FlatAdam, gradients: Tensor, lr: float = 1e-2) -> None:
    for gradient in gradients:
        assert flat.grad is not None
        flat.grad.copy_(gradient)
        optimizer.step(lr)


def gradients(steps: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(steps, SIZE, dtype=torch.float64, generator=generator)  # (steps, P)


def test_a_first_update_is_plain_adam() -> None:
    """Against torch's, on gradients whose steps stay below the limit on their length."""
    flat, reference = weights(), torch.ones(SIZE, dtype=torch.float64, requires_grad=True)
    torchs = torch.optim.Adam([reference], lr=1e-2, betas=BETAS)
    steps = gradients(8)
    walk(flat, FlatAdam(flat, {}), steps)
    for gradient in steps:
        reference.grad = gradient.clone()
        torchs.step()
    assert torch.allclose(flat, reference.detach(), rtol=1e-9)


def test_an_update_has_nothing_of_the_last_ones_momentum() -> None:
    """After an update all in one direction, a step by the opposite gradient goes all of its own way."""
    flat = weights()
    first = FlatAdam(flat, {})
    walk(flat, first, torch.ones(10, SIZE, dtype=torch.float64))
    before = flat.clone()
    walk(flat, FlatAdam(flat, first.state()), -torch.ones(1, SIZE, dtype=torch.float64))
    assert torch.allclose(flat - before, torch.full_like(flat, 1e-2), rtol=1e-2)


def test_a_step_after_small_gradients_is_no_longer_than_any_other() -> None:
    flat = weights()
    first = FlatAdam(flat, {})
    walk(flat, first, gradients(40, scale=1e-4))
    before = flat.clone()
    walk(flat, FlatAdam(flat, first.state()), gradients(1, seed=1))
    assert float((flat - before).square().mean().sqrt()) == pytest.approx(1e-2, rel=1e-6)


def test_a_state_of_other_weights_is_refused() -> None:
    with pytest.raises(RuntimeError):
        FlatAdam(weights(), {"step": torch.tensor(3), "exp_avg_sq": torch.ones(SIZE + 1)})
    with pytest.raises(KeyError):
        FlatAdam(weights(), {"step": torch.tensor(3)})
