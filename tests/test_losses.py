"""Losses against their formulas, written out with math."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradatim.nn import losses

nats = st.floats(-60.0, 0.0)
betas = st.floats(0.01, 1.0)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(nats, nats, nats, nats, betas, st.floats(0.5, 1.0))
def test_dpo_is_the_cross_entropy_of_the_margin(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float, label: float
) -> None:
    margin = beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
    expected = -label * math.log(sigmoid(margin)) - (1 - label) * math.log(sigmoid(-margin))
    found = losses.dpo(t(chosen), t(rejected), t(ref_chosen), t(ref_rejected), beta, label)
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_dpo_starts_at_log_2_with_gradient_beta_over_2() -> None:
    chosen = t(-3.0).requires_grad_()
    loss = losses.dpo(chosen, t(-5.0), t(-3.0), t(-5.0), 0.1)
    torch.autograd.backward(loss.sum())
    assert float(loss.detach()) == pytest.approx(math.log(2))
    assert chosen.grad is not None and float(chosen.grad) == pytest.approx(-0.05)


def test_an_uncertain_label_is_content_with_a_finite_margin() -> None:
    """With p = 0.8 the minimum lies where s(beta D) = 0.8."""
    best = math.log(0.8 / 0.2) / 0.1
    at = [float(losses.dpo(t(best + d), t(0.0), t(0.0), t(0.0), 0.1, 0.8)) for d in (-1.0, 0.0, 1.0)]
    assert at[1] < at[0] and at[1] < at[2]


def test_nll_per_token_and_in_sum() -> None:
    assert losses.nll(t(-6.0, -2.0), t(3, 1)).tolist() == [2.0, 2.0]
    assert losses.nll(t(-6.0, -2.0), t(3, 1), per_token=False).tolist() == [6.0, 2.0]


@given(nats, nats, betas)
def test_apo_and_kto_without_baseline_agree(answer: float, reference: float, beta: float) -> None:
    ratio = beta * (answer - reference)
    for good, expected in ((True, 1 - sigmoid(ratio)), (False, sigmoid(ratio))):
        apo = losses.apo_zero_unpaired(t(answer), t(reference), beta, good=good)
        kto = losses.kto(t(answer), t(reference), beta, 0.0, good=good)
        assert float(apo) == pytest.approx(expected, abs=1e-9) == float(kto)


def test_kto_judges_against_its_baseline() -> None:
    good = losses.kto(t(-3.0), t(-4.0), 0.5, 1.0, good=True, weight=2.0)
    assert float(good) == pytest.approx(2.0 * 0.5)
    bad = losses.kto(t(-3.0), t(-4.0), 0.5, 3.0, good=False)
    assert float(bad) == pytest.approx(1 - sigmoid(0.5 * (3.0 - 1.0)))


@given(nats, nats, betas, st.floats(0.5, 10.0))
def test_avoiding_is_bounded_and_stops_at_the_floor(answer: float, reference: float, beta: float, floor: float) -> None:
    at = t(answer).requires_grad_()
    loss = losses.avoid(at, t(reference), beta, floor)
    torch.autograd.backward(loss.sum())
    assert 0.0 <= float(loss.detach()) <= 1.0 and at.grad is not None
    assert 0.0 <= float(at.grad) <= beta / 4 + 1e-9
    if answer < reference - floor - 1e-6:
        assert float(at.grad) == 0.0


def test_kl_estimates_are_right_on_average() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(50).log_softmax(0), torch.randn(50).log_softmax(0)
    exact = float((p.exp() * (p - q)).sum())
    k3 = losses.kl_k3(p, q)
    assert float((p.exp() * k3).sum()) == pytest.approx(exact, rel=1e-4)
    assert float(k3.min()) >= 0.0
    assert float((p.exp() * losses.kl_forward(q, p)).sum()) == pytest.approx(exact, rel=1e-4)
