"""What the learner minimises: pure functions of log-probabilities, one loss per example, in nats.

All shapes are (B,), B examples; a log-probability is summed over the answer's tokens unless it says otherwise.
Weights are the caller's: losses are neither averaged nor scaled here. Every loss whose only evidence is that an
answer was bad is bounded, and so is its gradient; plain unlikelihood, which is neither, is left out on purpose.

It knows no model, no tokens and no examples.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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


def avoid(answer: Tensor, reference: Tensor, beta: float, floor: float) -> Tensor:
    """``apo_zero_unpaired`` for a bad answer, with no gradient at all once it lost ``floor`` nats.

    Nothing is known of what would have been better, so probability that is taken away goes anywhere; a few nats are
    enough for the answer to stop being given.
    """
    return apo_zero_unpaired(torch.maximum(answer, reference - floor), reference, beta, good=False)


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
