"""Many opinions on an episode -> one reward, or an abstention.

A weighted mean with an abstain band: transparent, and not calibrated. It knows nothing of tokens, steps' credit or
training; how sources' reliabilities are learned is not its business either: weights come from the configuration.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from gradatim.config import RewardConfig
from gradatim.opinions import weigh
from gradatim.types import Case, Feedback, Reward


def on_episode(case: Case) -> list[Feedback]:
    """Opinions about the whole episode: its outcome, and scores that name no step."""
    return [f for f in case.feedback if f.kind == "outcome" or (f.kind == "score" and f.step_id is None)]


def on_steps(case: Case) -> list[Feedback]:
    return [f for f in case.feedback if f.kind == "score" and f.step_id is not None]


class WeightedReward:
    """The mean of the opinions on the whole episode; where there are none, of those on its steps."""

    def __init__(self, config: RewardConfig, *, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._clock = clock

    def score(self, case: Case) -> Reward:
        value, confidence, reason = self._judge(case)
        return Reward(
            episode_id=case.episode.id,
            created_at=self._clock(),
            value=value,
            confidence=confidence,
            reason=reason,
            feedback_ids=tuple(f.id for f in case.feedback),
            position=case.position,
        )

    def _judge(self, case: Case) -> tuple[float | None, float, str]:
        mean, total = weigh(on_episode(case), self._config)
        about = "episode"
        if mean is None:
            mean, total = weigh(on_steps(case), self._config)
            about = "steps"
        if mean is None:
            return self._without_opinion(case)
        if total < self._config.min_weight:
            return None, 0.0, f"abstained: evidence {total:.2f} is below {self._config.min_weight:.2f}"
        if abs(mean) < self._config.abstain_band:
            return None, 0.0, f"abstained: opinions disagree (mean {mean:+.2f})"
        return mean, abs(mean) * total / (total + 0.25), f"mean {mean:+.2f} of opinions on the {about}"

    def _without_opinion(self, case: Case) -> tuple[float | None, float, str]:
        if any(f.kind in ("correction", "preference") or (f.comment and f.step_id) for f in case.feedback):
            return 0.0, 0.0, "neutral: corrections, preferences and comments speak for their own steps only"
        if any(f.kind == "outcome" for f in case.feedback):
            return None, 0.0, "abstained: the outcome is unknown"
        return None, 0.0, "abstained: no opinion"
