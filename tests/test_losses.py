"""Losses against their formulas, written out with math; gradients against finite differences, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
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


# ------------------------------------------------------------------------------------------------- pairs


def dpo_by_hand(margin: float, beta: float) -> float:
    return -math.log(sigmoid(beta * margin))


@given(nats, nats, nats, nats, betas, st.floats(0.0, 0.45))
def test_robust_dpo_is_dpo_on_the_true_labels_in_the_mean(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float, flipped: float
) -> None:
    """Each label is flipped with the assumed chance: the expectation is the loss without noise (Lemma of the paper)."""
    right = losses.robust_dpo(t(chosen), t(rejected), t(ref_chosen), t(ref_rejected), beta, flipped)
    wrong = losses.robust_dpo(t(rejected), t(chosen), t(ref_rejected), t(ref_chosen), beta, flipped)
    margin = (chosen - rejected) - (ref_chosen - ref_rejected)
    mean = (1 - flipped) * float(right) + flipped * float(wrong)
    assert mean == pytest.approx(dpo_by_hand(margin, beta), rel=1e-7, abs=1e-9)
    by_hand = ((1 - flipped) * dpo_by_hand(margin, beta) - flipped * dpo_by_hand(-margin, beta)) / (1 - 2 * flipped)
    assert float(right) == pytest.approx(by_hand, rel=1e-7, abs=1e-9)


@given(nats, nats, betas, st.floats(0.0, 0.45))
def test_the_pull_of_robust_dpo_is_bounded_and_never_ends(
    chosen: float, rejected: float, beta: float, flipped: float
) -> None:
    at = t(chosen).requires_grad_()
    torch.autograd.backward(losses.robust_dpo(at, t(rejected), t(-1.0), t(-1.0), beta, flipped).sum())
    assert at.grad is not None
    scale = beta / (1 - 2 * flipped)
    assert scale * flipped - 1e-9 <= -float(at.grad) <= scale * (1 - flipped) + 1e-9


def test_robust_dpo_refuses_labels_that_are_no_better_than_a_coin() -> None:
    with pytest.raises(ValueError, match=r"0\.5"):
        losses.robust_dpo(t(0.0), t(0.0), t(0.0), t(0.0), 0.1, 0.5)


@given(nats, nats, nats, nats, st.floats(0.05, 2.0))
def test_ipo_wants_a_fixed_margin(
    chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, tau: float
) -> None:
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    found = float(losses.ipo(t(chosen), t(rejected), t(ref_chosen), t(ref_rejected), tau))
    assert found == pytest.approx((margin - 0.5 / tau) ** 2, rel=1e-9, abs=1e-9)
    assert float(losses.ipo(t(0.5 / tau), t(0.0), t(0.0), t(0.0), tau)) == pytest.approx(0.0, abs=1e-12)


def test_the_streaming_baseline_of_kto_follows_the_mismatched_answers() -> None:
    mean, expected = 0.0, 0.0
    for k in range(300):
        ratios = t(0.2 + 0.01 * k, 0.4 + 0.01 * k)
        mean = losses.kto_baseline(mean, ratios, 0.9)
        expected = 0.9 * expected + 0.1 * (0.3 + 0.01 * k)
    assert mean == pytest.approx(expected, rel=1e-12)
    assert mean == pytest.approx(0.3 + 0.01 * 299 - 0.01 * 9.0, rel=1e-3)  # it trails a ramp by decay / (1 - decay)


# ---------------------------------------------------------------------------------------- sampled tokens

rewards = st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=8)


@given(rewards)
def test_advantages_are_against_the_others(given_rewards: list[float]) -> None:
    n = len(given_rewards)
    rloo, dr = losses.rloo(t(*given_rewards)).tolist(), losses.dr_grpo(t(*given_rewards)).tolist()
    by_hand = [r - sum(given_rewards[:i] + given_rewards[i + 1 :]) / (n - 1) if n > 1 else 0.0
               for i, r in enumerate(given_rewards)]  # fmt: skip
    assert rloo == pytest.approx(by_hand, abs=1e-9)
    assert dr == pytest.approx([r - sum(given_rewards) / n for r in given_rewards], abs=1e-9)
    assert sum(rloo) == pytest.approx(0.0, abs=1e-9) == pytest.approx(sum(dr), abs=1e-9)
    assert dr == pytest.approx([a * (n - 1) / n for a in rloo], abs=1e-9)


@given(rewards.filter(lambda r: len(r) > 1), st.floats(-1.0, 1.0))
def test_advantages_do_not_change_with_a_constant_and_scale_with_the_rewards(
    given_rewards: list[float], constant: float
) -> None:
    plain = losses.rloo(t(*given_rewards))
    assert torch.allclose(losses.rloo(t(*given_rewards) + constant), plain, atol=1e-9)
    assert torch.allclose(losses.rloo(t(*given_rewards) * 3.0), plain * 3.0, atol=1e-9)  # no std is divided out


def test_rloo_is_an_unbiased_policy_gradient() -> None:
    """A softmax over three answers with known rewards: the mean over all pairs of draws is the true gradient."""
    logits = t(0.3, -0.2, 0.5).requires_grad_()
    reward = t(1.0, -1.0, 0.2)
    (true,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    p = logits.softmax(0).detach()
    estimate = torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            a = losses.rloo(reward[[i, j]])
            loss = losses.policy_gradient(logits.log_softmax(0)[[i, j]], p.log()[[i, j]], a) / 2
            estimate -= p[i] * p[j] * torch.autograd.grad(loss, logits)[0]
    assert torch.allclose(estimate, true, atol=1e-12)


def test_importance_weights_make_an_engines_draws_ours() -> None:
    """With the weights, and none cut off, the mean over the engine's draws is the mean over ours."""
    engine, ours, value = t(0.5, 0.3, 0.2), t(0.3, 0.3, 0.4), t(1.0, -2.0, 0.5)
    weights = losses.truncated_importance(ours.log(), engine.log(), cap=2.0)
    assert float((engine * weights * value).sum()) == pytest.approx(float((ours * value).sum()))
    cut = losses.truncated_importance(ours.log(), engine.log(), cap=1.5)
    assert cut.tolist() == pytest.approx([0.6, 1.0, 1.5])
    assert not losses.truncated_importance(ours.log().requires_grad_(), engine.log()).requires_grad


@given(st.lists(st.tuples(nats, nats, st.floats(-2.0, 2.0), st.floats(0.0, 2.0)), min_size=1, max_size=5))
def test_policy_gradient_is_the_clipped_surrogate(tokens: list[tuple[float, float, float, float]]) -> None:
    now, old, advantages, weights = (t(*column) for column in zip(*tokens, strict=True))
    now = old + (now - old) * 0.02
    expected = 0.0
    for lp, before, a, w in zip(now.tolist(), old.tolist(), advantages.tolist(), weights.tolist(), strict=True):
        ratio = math.exp(lp - before)
        expected -= w * min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
    assert float(losses.policy_gradient(now, old, advantages, weights)) == pytest.approx(expected, abs=1e-9)


def test_policy_gradient_stops_where_the_answer_has_moved_enough() -> None:
    old = t(-1.0, -1.0)
    at = t(-0.7, -1.3).requires_grad_()  # ratios 1.35 and 0.74
    torch.autograd.backward(losses.policy_gradient(at, old, t(1.0, -1.0)))
    assert at.grad is not None and at.grad.tolist() == [0.0, 0.0]
    back = t(-0.7, -1.3).requires_grad_()  # moved the wrong way: the whole pull
    torch.autograd.backward(losses.policy_gradient(back, old, t(-1.0, 1.0)))
    assert back.grad is not None and back.grad.tolist() == pytest.approx([math.exp(0.3), -math.exp(-0.3)])


def test_self_distillation_pulls_sampled_tokens_to_the_teacher_and_no_further() -> None:
    student = t(-1.0, -1.0, -3.0, -0.5).requires_grad_()
    teacher = t(-1.0, -0.4, -0.1, -5.5)
    torch.autograd.backward(losses.self_distillation(student, teacher))
    assert student.grad is not None
    assert student.grad.tolist() == pytest.approx([0.0, -0.6, -2.0, 2.0])  # clipped to 2 nats
    masked = student.detach().requires_grad_()
    torch.autograd.backward(losses.self_distillation(masked, teacher, t(0.0, 1.0, 0.0, 1.0)))
    assert masked.grad is not None and masked.grad.tolist() == pytest.approx([0.0, -0.6, 0.0, 2.0])


def test_self_distillation_is_the_gradient_of_the_reverse_kl() -> None:
    """Over all tokens that the student may draw, weighted by their chance, as long as nothing is clipped."""
    torch.manual_seed(0)
    logits = torch.randn(20, dtype=torch.float64).requires_grad_()
    teacher = (logits.detach() + 0.3 * torch.randn(20, dtype=torch.float64)).log_softmax(0)
    student = logits.log_softmax(0)
    (true,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits, retain_graph=True)
    loss = losses.self_distillation(student, teacher, student.detach().exp())
    assert torch.allclose(torch.autograd.grad(loss, logits)[0], true, atol=1e-12)


def test_credit_falls_on_tokens_and_padding_counts_nothing() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -0.25, -0.125]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    assert losses.total(logprobs, mask).tolist() == [-2.0, -0.875]
    assert losses.total(logprobs).tolist() == [-12.0, -0.875]
    alone = losses.self_distillation(logprobs[0, :2], logprobs[0, :2] + 0.5, mask[0, :2])
    assert float(losses.self_distillation(logprobs, logprobs + 0.5, mask)[0]) == pytest.approx(float(alone))


# -------------------------------------------------------------------------------------------- gradients

Pairwise = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
PAIRWISE: dict[str, Pairwise] = {
    "dpo": lambda a, b, c, d: losses.dpo(a, b, c, d, 0.3),
    "cdpo": lambda a, b, c, d: losses.dpo(a, b, c, d, 0.3, 0.8),
    "robust_dpo": lambda a, b, c, d: losses.robust_dpo(a, b, c, d, 0.3, 0.2),
    "ipo": lambda a, b, c, d: losses.ipo(a, b, c, d, 0.1),
    "apo_zero": lambda a, b, c, d: (
        losses.apo_zero_unpaired(a, c, 0.3, good=True) + losses.apo_zero_unpaired(b, d, 0.3, good=False)
    ),
    "kto": lambda a, b, c, d: losses.kto(a, c, 0.3, 0.5, good=True) + losses.kto(b, d, 0.3, 0.5, good=False),
}


@pytest.mark.parametrize("name", PAIRWISE)
@settings(deadline=None)
@given(seed=st.integers(0, 2**20))
def test_gradients_are_those_of_finite_differences(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 3, generator=generator, dtype=torch.float64).unbind()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return PAIRWISE[name](a, b, ref_chosen, ref_rejected)

    assert torch.autograd.gradcheck(loss, (chosen.clone().requires_grad_(), rejected.clone().requires_grad_()))


@settings(deadline=None)
@given(st.integers(0, 2**20))
def test_the_policy_gradient_is_that_of_finite_differences(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    now, moved, advantages, weights = torch.randn(4, 3, generator=generator, dtype=torch.float64).unbind()
    old = now - 0.05 * moved.clamp(-2.0, 2.0)  # inside the clip: at its edge there is a kink

    def loss(x: Tensor) -> Tensor:
        return losses.policy_gradient(x, old, advantages, weights.abs())

    assert torch.autograd.gradcheck(loss, (now.clone().requires_grad_(),))


@given(nats, nats, betas, st.floats(0.0, 2.0))
def test_unpaired_losses_lie_between_0_and_1_and_their_pull_below_beta_over_4(
    answer: float, reference: float, beta: float, baseline: float
) -> None:
    for good in (True, False):
        at = t(answer).requires_grad_()
        loss = losses.kto(at, t(reference), beta, baseline, good=good)
        torch.autograd.backward(loss.sum())
        assert 0.0 <= float(loss.detach()) <= 1.0
        assert at.grad is not None and abs(float(at.grad)) <= beta / 4 + 1e-9
