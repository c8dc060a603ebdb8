"""The gate on directions at work: what examples claim under a model, and who leaves the update for it.

``direction`` decides, on functions; this module makes these functions of the model that is trained. It knows no losses:
their gradient comes from the learner.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradatim.learner import direction
from gradatim.learner.batch import Item
from gradatim.learner.run import RefusedError, Run
from gradatim.learner.trainable import Trainable
from gradatim.nn.pack import passes

log = logging.getLogger(__name__)

STEP, STEP_16_BITS = 0.1, 0.4  # of central differences, in the norm of all A and B: a short one drowns in rounding


def admitted(run: Run, new: list[Item], measure: direction.Measure, threshold: float) -> list[Item]:
    """The new examples that may move the weights, made smaller where one contributor has too much of the sum; the
    others leave the run, with a reason. RefusedError where none is left."""
    judged = direction.judge(new, direction.trusted(run.replay), measure, threshold)
    run.figures |= judged.metrics
    run.left_out |= judged.reasons()
    for example_id, reason in judged.reasons().items():
        log.warning("example %s is left out: %s", example_id, reason)
    allowed = [i for i in new if i.example.id not in judged.against]
    if not allowed:
        raise RefusedError(f"all {len(new)} new examples pull against the trusted ones")
    run.new = [i for i in run.new if i.example.id not in judged.against]
    return [i.scaled(judged.scale[i.example.id]) if i.example.id in judged.scale else i for i in allowed]


def measured(model: Trainable, loss_gradient: Callable[[Sequence[Item]], Tensor]) -> direction.Measure:
    """Claims at the weights as they are on the model, trainable; ``loss_gradient`` as in ``direction.Measure``."""
    lora = model.lora

    def claim_gradient(items: Sequence[Item]) -> Tensor:
        def attempt(pass_tokens: int) -> Tensor:
            lora.zero_grad()
            for members in passes([i.answers for i in items], pass_tokens):
                some = [items[m] for m in members]
                scored = model.forward([a for i in some for a in i.answers])
                total = torch.stack([direction.claim(i, [scored.pop(0).logprobs for _ in i.answers]) for i in some])
                torch.autograd.backward(total.sum() / len(items))
            return lora.gradient()

        return model.budget.fit(attempt)

    def claims(items: Sequence[Item]) -> Tensor:
        scored = model.score([a for i in items for a in i.answers])
        return torch.stack([direction.claim(i, [scored.pop(0).logprobs for _ in i.answers]) for i in items]).cpu()

    step = STEP if model.base.dtype == torch.float32 else STEP_16_BITS
    return direction.Measure(lora.flat, step, claim_gradient, claims, loss_gradient)
