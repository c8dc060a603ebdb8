"""What the learner minimises: pure functions of log-probabilities, one loss per example, in nats.

Shapes: B examples, T tokens of an answer, G answers to one prompt. Losses that compare answers take log-probabilities
(..., ) of whole answers, which ``total`` makes of those per token and a weight per token (mask, credit); losses that
judge single tokens take (..., T) and such weights themselves. Weights of examples are the caller's: nothing is
averaged over examples or scaled here. Every loss whose only evidence is that an answer was bad has a bounded gradient;
plain unlikelihood, which has not, is left out on purpose.

It knows no model, no tokens and no examples.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def total(logprobs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Log-probability (...,) of answers from those of their tokens (..., T), each counted ``weights`` (..., T) times: 0
    for what is not the answer's, more or less than 1 where credit falls on single tokens."""
    return (logprobs if weights is None else logprobs * weights).sum(-1)


# ---------------------------------------------------------------------------------------- pairs of answers


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label: Tensor | float = 1.0,
) -> Tensor:
    """Direct Preference Optimization (Rafailov 2023, arXiv:2305.18290, eq. 7), with a soft label (cDPO).

    ``-p log s(beta D) - (1 - p) log s(-beta D)``, where D is the gain of the chosen answer over the reference less
    that of the rejected one and p = ``label`` is the probability that the chosen one is truly the better.
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -label * F.logsigmoid(margin) - (1.0 - label) * F.logsigmoid(-margin)


def robust_dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    flipped: float,
) -> Tensor:
    """Robust DPO (rDPO, Ray Chowdhury 2024, arXiv:2403.00409): ``((1 - e) l(D) - e l(-D)) / (1 - 2 e)`` with DPO's
    loss l, where a share e = ``flipped`` < 1/2 of the labels is wrong.

    Its mean over flipped labels is DPO's loss on the true ones. The price: it has no lower bound, and its gradient,
    between ``beta e / (1 - 2 e)`` and ``beta (1 - e) / (1 - 2 e)``, never vanishes; something else must end the pull.
    ValueError where e is not in [0, 1/2).
    """
    if not 0.0 <= flipped < 0.5:
        raise ValueError(f"a share of {flipped} flipped labels is not in [0, 0.5)")
    said = dpo(chosen, rejected, reference_chosen, reference_rejected, beta)
    opposite = dpo(rejected, chosen, reference_rejected, reference_chosen, beta)
    return ((1.0 - flipped) * said - flipped * opposite) / (1.0 - 2.0 * flipped)


def ipo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    tau: float,
) -> Tensor:
    """Identity Preference Optimization (Azar 2023, arXiv:2310.12036, eq. 17): ``(D - 1 / (2 tau))^2``.

    Content with a margin of 1 / (2 tau), however sure the label; meant for labels that are nearly always right. With
    sums of tokens it is the paper's; its authors, and TRL, use means per token, so that a margin means the same for
    long and short answers.
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return (margin - 1.0 / (2.0 * tau)) ** 2


# ------------------------------------------------------------------------------------------- single answers


def nll(chosen: Tensor, lengths: Tensor, *, per_token: bool = True) -> Tensor:
    """Negative log-likelihood of an answer: the guard of Iterative RPO (Pang 2024, arXiv:2404.19733, eq. 3), which
    keeps DPO from lowering both answers, and the loss of imitation (SFT).

    Per token by default: one example is one decision of an agent, and its weight then means the same whether it was
    said in five tokens or in five hundred. The sum instead weighs an example by its length.
    """
    return -chosen / lengths if per_token else -chosen


def apo_zero_unpaired(answer: Tensor, reference: Tensor, beta: float, *, good: bool) -> Tensor:
    """APO-zero (D'Oosterlinck 2024, arXiv:2408.06266, sec. 4.1) for a single answer that was good or bad.

    ``1 - s(beta r)`` for a good one and ``s(beta r)`` for a bad one, r being its log-ratio to the reference. In
    (0, 1): its gradient vanishes as the answer becomes likelier or unlikelier.
    """
    ratio = beta * (answer - reference)
    return torch.sigmoid(-ratio) if good else torch.sigmoid(ratio)


def kto(
    answer: Tensor, reference: Tensor, beta: float, baseline: Tensor | float, *, good: bool, weight: float = 1.0
) -> Tensor:
    """Kahneman-Tversky Optimization (Ethayarajh 2024, arXiv:2402.01306, eq. 8) for a single answer.

    ``baseline`` is z0 >= 0, an estimate of KL(model || reference) over mismatched answers, without gradient;
    ``weight`` is lambda_D or lambda_U. With z0 = 0 it is ``apo_zero_unpaired``.
    """
    ratio = beta * (answer - reference - baseline)
    return weight * (1.0 - torch.sigmoid(ratio if good else -ratio))


def kto_baseline(mean: float, mismatched: Tensor, decay: float) -> float:
    """KTO's z0 in a stream (the paper takes it from the batch at hand): an exponential moving average of
    the log-ratios (N,) to the reference of answers that belong to other prompts. Use ``max(0, it)``; starts at 0, which
    is exact while the model is the reference."""
    return decay * mean + (1.0 - decay) * float(mismatched.detach().mean())


def avoid(answer: Tensor, reference: Tensor, beta: float, floor: float) -> Tensor:
    """``apo_zero_unpaired`` for a bad answer, with no gradient at all once it lost ``floor`` nats.

    Nothing is known of what would have been better, so probability that is taken away goes anywhere; a few nats are
    enough for the answer to stop being given.
    """
    return apo_zero_unpaired(torch.maximum(answer, reference - floor), reference, beta, good=False)


# ------------------------------------------------------------------------------------------- sampled tokens


def rloo(rewards: Tensor) -> Tensor:
    """REINFORCE leave-one-out advantages (RLOO, Ahmadian 2024, arXiv:2402.14740) of rewards (..., G) of answers to
    one prompt: each less the mean of the others. They sum to 0. A lone answer has nothing to be compared with: 0."""
    others = max(rewards.shape[-1] - 1, 1)
    return (rewards * (others + 1) - rewards.sum(-1, keepdim=True)) / others if rewards.shape[-1] > 1 else rewards * 0.0


def dr_grpo(rewards: Tensor) -> Tensor:
    """Advantages (..., G) of GRPO done right (Liu 2025, arXiv:2503.20783, sec. 3.2): ``r - mean(r)``. No division by
    the standard deviation, which weighs a prompt by how nearly all of its answers agree. (G - 1) / G of ``rloo``."""
    return rewards - rewards.mean(-1, keepdim=True)


def truncated_importance(old: Tensor, engine: Tensor, cap: float = 2.0) -> Tensor:
    """Weights (..., T) of tokens that an engine drew, for a learner that takes them for draws from ``old``:
    ``min(old / engine, cap)``, without gradient (decoupled PPO, Hilton 2021, arXiv:2110.00641, with the ratio of
    proximal to behaviour policy truncated as in V-trace, Espeholt 2018, arXiv:1802.01561).

    ``old`` are the learner's own log-probabilities under the weights that an update starts from: in 16 bits those of
    the engine, decoded token by token, differ from them by hundredths of a nat even where the weights are the same.
    """
    return (old - engine).exp().clamp(max=cap).detach()


def policy_gradient(
    logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor | None = None, clip: float = 0.2
) -> Tensor:
    """PPO's clipped surrogate (Schulman 2017, arXiv:1707.06347, eq. 7), summed over tokens: (..., T) -> (...,).

    ``- sum_t w_t min(r_t A_t, clip(r_t, 1 - c, 1 + c) A_t)`` with r = model / old. ``weights`` are mask, credit and
    ``truncated_importance`` multiplied. A sum, since a mean over each answer's own length favours short good answers
    and long bad ones (arXiv:2503.20783, sec. 3.1): divide by a constant.
    """
    ratio = (logprobs - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages)
    return -total(gain, weights)


def hindsight(student: Tensor, teacher: Tensor, cap: float = 2.0) -> Tensor:
    """Advantages (..., T) of sampled tokens in hindsight, without gradient: how much likelier the same model finds each
    of them when it is told more, ``log teacher - log student``, clipped to +-``cap`` nats."""
    return (teacher - student).detach().clamp(-cap, cap)


def self_distillation(logprobs: Tensor, teacher: Tensor, weights: Tensor | None = None, cap: float = 2.0) -> Tensor:
    """Hindsight self-distillation (SDPO, arXiv:2601.20802; SDFT, Shenfeld 2026, arXiv:2601.19897) on the student's own
    sampled tokens, summed over them: (..., T) -> (...,).

    ``teacher`` are their log-probabilities under frozen weights with privileged context (a comment, the better answer)
    in the prompt. ``- sum_t w_t A_t log p_t`` with A = ``hindsight``: while the tokens are draws from the student and
    nothing is clipped, its gradient is an unbiased estimate of that of KL(student || teacher). It vanishes where both
    agree, so a single example pulls no further than to the teacher.
    """
    return -total(hindsight(logprobs, teacher, cap) * logprobs, weights)


# ---------------------------------------------------------------------------------------------- divergences


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(model || reference), per token drawn from the model: ``r - 1 - log r``, where
    r = reference / model. Never negative; unbiased (http://joschu.net/blog/kl-approx.html)."""
    log_ratio = reference_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def kl_forward(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate of KL(reference || model), per token drawn from the reference: ``log reference - log model``.

    Single values may be negative; only the mean over many tokens means anything.
    """
    return reference_logprobs - logprobs
