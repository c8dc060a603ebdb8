"""One reward for an episode -> one advantage per step.

Evidence about a step comes first: a correction, which confirms the answer where it says the same, then scores of that
step. A step without its own evidence shares the episode's outcome: in full when it was good, 1/S of it when it was bad
(one slip among S steps spoils an episode), and nothing of a failure that corrections already explain. A step after
which the very same state came back led nowhere: in an episode that ended well it was the one thing not to do there, for
what was done there last did lead on. A step that says again what the step before it said gets no credit for a success:
once may have been enough, and nobody knows.
Knows nothing of tokens beyond whether two prompts are equal; assigns nothing over time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import pairwise

from gradatim.config import RewardConfig
from gradatim.opinions import is_confirmed, newest, weigh
from gradatim.types import Case, Credit, Reward, Step, StepId


class OutcomeCredit:
    """Step evidence first, the episode's outcome for the rest."""

    def __init__(self, config: RewardConfig, *, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._clock = clock

    def assign(self, case: Case, reward: Reward) -> Credit:
        steps = case.episode.steps
        left_by = {step.prompt_ids: step.id for step in steps}  # the last answer to each state
        verdicts = {step.id: _verdict(step, case) for step in steps}
        repeats = {b.id for a, b in pairwise(steps) if a.completion_ids == b.completion_ids and verdicts[a.id] >= 0.0}
        shares = [
            self._share(
                step,
                case,
                reward.value,
                verdicts,
                led_on=left_by[step.prompt_ids] == step.id,
                repeats=step.id in repeats,
            )
            for step in steps
        ]
        return Credit(
            episode_id=case.episode.id,
            created_at=self._clock(),
            step_ids=tuple(step.id for step in case.episode.steps),
            advantages=tuple(a for a, _, _ in shares),
            methods=tuple(m for _, m, _ in shares),
            reasons=tuple(why for _, _, why in shares),
            position=case.position,
        )

    def _share(
        self,
        step: Step,
        case: Case,
        value: float | None,
        verdicts: Mapping[StepId, float],
        *,
        led_on: bool,
        repeats: bool,
    ) -> tuple[float, str, str]:
        """Its credit, the method, and why."""
        own = [f for f in case.feedback if f.step_id == step.id]
        if verdict := verdicts[step.id]:
            said = "it was corrected" if verdict < 0.0 else "it was confirmed: the correction says the same"
            return verdict, "correction", said
        mean, _ = weigh((f for f in own if f.kind == "score"), self._config)
        if mean is not None:
            clear = abs(mean) >= self._config.abstain_band
            return (mean if clear else 0.0), "score", f"scores of it: {mean:+.2f}{'' if clear else ', no opinion'}"
        if value is None:
            return 0.0, "outcome", "the reward abstained"
        if value >= 0.0 and not led_on:
            return -value, "came back", "the same prompt came back after it"
        if value >= 0.0:
            good = (0.0, "repeated", "it said again what the step before it said")
            return good if repeats else (value, "outcome", f"the episode's reward {value:+.2f}")
        if min(verdicts.values()) < 0.0:
            return 0.0, "outcome", f"corrections explain the episode's reward {value:+.2f}"
        steps = len(case.episode.steps)
        return value / steps, "outcome", f"the episode's reward {value:+.2f}, shared by {steps} steps"


def _verdict(step: Step, case: Case) -> float:
    """Of its newest correction: -1, or 1 where that says what the answer said; 0 where there is none."""
    said = newest(case.feedback, "correction", step)
    return 0.0 if said is None else 1.0 if is_confirmed(step, said) else -1.0
