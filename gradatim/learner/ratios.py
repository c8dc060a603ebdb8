"""How much likelier the live adapter makes the answers of an episode than the frozen base does.

Both are scored by the learner's own passes, so that no difference of numerics between serving and training is taken for
something learned. Knows nothing of credit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from gradatim.errors import GradatimError
from gradatim.protocols import Scorer, Store
from gradatim.types import Adapter, AdapterId, Episode, Example, Stage, Step

log = logging.getLogger(__name__)


class StepRatios:
    """``protocols.LogRatios`` by any ``protocols.Scorer``; ``name`` is the adapters' name."""

    def __init__(self, store: Store, scorer: Scorer, name: str) -> None:
        self._store, self._scorer, self._name = store, scorer, name

    def version(self) -> str:
        live = self._live()
        return live.sha256 if live else ""

    def of(self, episode: Episode | None) -> Sequence[float] | None:
        """(S,); 0 for a step without an answer."""
        live = self._live()
        if live is None or episode is None or episode.steps[0].created_at <= live.created_at:
            return None
        asked = [step for step in episode.steps if step.completion_ids]
        try:
            ratios = dict(zip((s.id for s in asked), self._read(live, asked), strict=True))
        except GradatimError as e:
            log.info("no log-ratios for episode %s: %s", episode.id, e)
            return None
        return [ratios.get(step.id, 0.0) for step in episode.steps]

    def _read(self, live: Adapter, steps: Sequence[Step]) -> list[float]:
        examples = [_example(step) for step in steps]
        base = self._adapter(AdapterId(f"{self._name}@0"))
        both = zip(steps, self._scorer.score(live, examples), self._scorer.score(base, examples), strict=True)
        return [len(step.completion_ids) * (pi.logprob - ref.logprob) for step, pi, ref in both]

    def _live(self) -> Adapter | None:
        """None where the frozen base itself is live."""
        found = [self._adapter(i) for i in self._store.stages(self._name, Stage.LIVE)]
        return next((adapter for adapter in found if adapter.step), None)

    def _adapter(self, adapter_id: AdapterId) -> Adapter:
        return self._store.newest(Adapter, id=adapter_id)[0][1]


def _example(step: Step) -> Example:
    return Example(
        id=f"ratio:{step.id}",
        created_at=step.created_at,
        episode_id=step.episode_id,
        step_id=step.id,
        prompt_ids=step.prompt_ids,
        chosen_ids=step.completion_ids,
        origin="ratio",
    )
