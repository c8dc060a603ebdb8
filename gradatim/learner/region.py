"""How far an update may go, measured on what users ask now: the newest answers to them, less the bad ones.

Forgetting is foretold by the divergence from the old policy on the inputs at hand (RL's Razor, Shenfeld 2025,
arXiv:2509.04259), so there are two budgets, both in nats a token:

    of an update   KL(live || candidate) ~ mean(log live - log candidate). A change that is over it is shortened
    of a life      KL(candidate || frozen) ~ mean(log candidate - log frozen). Over it an update is refused

The second counts for answers that nobody found good only: what an adapter was rightly taught and the frozen model did
not know, a name say, lies as far from that one as it can be.

The answers were drawn from the live adapter, or from one that was live shortly before it, and the candidate is a small
step from it, so each mean is over nearly the right distribution; over some dozens of tokens it is good to a tenth of a
nat or so. The same answers tell whether bad habits spread (``habits``). It knows no losses and no store.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set

import torch
from torch import Tensor

from gradatim.config import LearnerConfig
from gradatim.learner.batch import cut
from gradatim.learner.habits import Habits, Phrases
from gradatim.learner.run import Run
from gradatim.learner.trainable import Trainable
from gradatim.nn.lora import Lora
from gradatim.nn.pack import Answer
from gradatim.types import Step, StepId

LEAST_ANSWERS = 4  # fewer say nothing about what users ask
SHARES = (1.0, 0.5, 0.25)  # of an update's change that are tried: less of it is not worth a verdict


class Region:
    """Made while the parent is on the model; ``hold`` afterwards. With too few answers it holds nothing."""

    def __init__(
        self, model: Trainable, traffic: Sequence[Step], good: Set[StepId], config: LearnerConfig, phrases: Phrases
    ) -> None:
        self._model = model
        self._config = config
        usable = [step for step in traffic if _usable(step, model.vocabulary, config)]
        if len(usable) < LEAST_ANSWERS:
            usable = []
        cuts = [cut(step.prompt_ids, len(step.completion_ids), config.max_length) for step in usable]
        self._answers = [Answer(prompt, step.completion_ids) for prompt, step in zip(cuts, usable, strict=True)]
        self._live = self._logprobs()  # (T,) of all tokens of all answers
        unjudged = [step.id not in good for step in usable]
        lengths = [len(step.completion_ids) for step in usable]
        self._unjudged = torch.tensor(unjudged).repeat_interleave(torch.tensor(lengths)) if usable else torch.empty(0)
        self._lives = sum(unjudged) >= LEAST_ANSWERS  # whether there are enough to hold it to the budget of a life
        self._habits = Habits(model, self._answers, phrases, config)

    def _logprobs(self) -> Tensor:
        return torch.cat([s.logprobs for s in self._model.score(self._answers)]) if self._answers else torch.empty(0)

    def hold(self, run: Run, lora: Lora, start: Tensor) -> str:
        """Shorten the change from ``start`` (P,) to ``lora.flat`` until it is within both budgets and spoils no habit;
        the reason for a refusal where no share of it is, else empty."""
        if not self._answers:
            return ""
        end = lora.flat.detach().clone()
        with lora.disabled():
            frozen = self._logprobs()
        why = ""
        for share in SHARES:
            lora.flat.data.copy_(torch.lerp(start, end, share))
            now = self._logprobs()
            drift, life = float((self._live - now).mean()), float((now - frozen).mean())
            run.figures |= {"kl_fresh": drift, "kl_base": life, "fresh_share": share}
            strange = float((now - frozen)[self._unjudged].mean()) if self._lives else -math.inf
            why = self._over_budget(drift, strange) or self._habits.spoiled(run)
            if not why:
                break
        return why

    def _over_budget(self, drift: float, life: float) -> str:
        if not drift <= self._config.kl_fresh_limit:
            return f"a quarter of the change still moves fresh answers by {drift:.2f} nats a token"
        if not life <= self._config.kl_base_limit:
            return (
                f"the adapter would be {life:.2f} nats a token from the frozen model on fresh answers that nobody "
                f"found good, and its budget is {self._config.kl_base_limit} (learner.kl_base_limit): go back to an "
                f"earlier one, or raise it"
            )
        return ""


def _usable(step: Step, vocabulary: int, config: LearnerConfig) -> bool:
    ids = (*step.prompt_ids, *step.completion_ids)
    answered = bool(step.prompt_ids) and 0 < len(step.completion_ids) < config.max_length
    return answered and all(0 <= i < vocabulary for i in ids)
