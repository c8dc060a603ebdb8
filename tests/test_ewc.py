"""Plain EWC against its formula and against a Fisher information that can be written down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradatim.nn.ewc import Consolidation, diagonal_fisher


def draw(logits: Tensor) -> Tensor:
    logprobs = logits.log_softmax(-1)
    return logprobs[torch.multinomial(logprobs.exp(), 1)[0]]


def test_the_fisher_of_a_linear_softmax_is_p_times_1_minus_p_times_x_squared() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    x = torch.randn(3)
    weight, bias = diagonal_fisher(model, [x] * 4000, draw)
    p = model(x).detach().softmax(-1)
    torch.testing.assert_close(bias, p * (1 - p), rtol=0.1, atol=0.01)
    torch.testing.assert_close(weight, (p * (1 - p))[:, None] * x.square(), rtol=0.1, atol=0.02)


def test_the_penalty_is_the_sum_over_tasks() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    past = Consolidation(model.parameters())
    tasks = []
    for _ in range(3):
        fisher = [torch.rand_like(p) for p in model.parameters()]
        tasks.append((fisher, [p.detach().clone() for p in model.parameters()]))
        past.remember(fisher)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
    expected = sum(
        0.5 * 7.0 * float((f * (p.detach() - old).square()).sum())
        for fisher, kept in tasks
        for f, old, p in zip(fisher, kept, model.parameters(), strict=True)
    )
    penalty = past.penalty(7.0)
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    penalty.backward()  # type: ignore[no-untyped-call]
    slow = sum(7.0 * fisher[0] * (model.weight.detach() - kept[0]) for fisher, kept in tasks)
    assert isinstance(slow, Tensor) and model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, slow, rtol=1e-4, atol=1e-4)


def test_the_implicit_step_is_the_proximal_operator_and_small_ones_are_gradient_steps() -> None:
    """Its end q minimises penalty(q) + |q - p|^2 / (2 lr): there q - p = -lr times the penalty's gradient at q."""
    torch.manual_seed(0)
    for lr in (1e-4, 0.5, 1e4):
        model = nn.Linear(3, 2)
        past = Consolidation(model.parameters())
        for _ in range(2):
            past.remember([torch.rand_like(p) for p in model.parameters()])
            with torch.no_grad():
                model.weight.add_(torch.randn_like(model.weight))
        before = model.weight.detach().clone()
        past.step(2.0, lr)
        past.penalty(2.0).backward()  # type: ignore[no-untyped-call]
        assert model.weight.grad is not None
        moved = (model.weight.detach() - before) / lr
        torch.testing.assert_close(moved, -model.weight.grad, rtol=2e-2, atol=2e-3)


def test_no_input_no_fisher() -> None:
    with pytest.raises(ValueError, match="no input"):
        diagonal_fisher(nn.Linear(1, 2), [], draw)
