"""Episodes that ended and that nobody said anything of, for a reward model that can judge them all the same.

They are found along the log of steps, behind a cursor, a bounded number at a time. An episode counts as ended once its
last step is old enough; should it go on later, or somebody speak of it, it is judged again. Knows no rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradatim.protocols import Store
from gradatim.types import Case, Feedback, Step

SILENT = "silent"  # cursor: of the steps up to here, the episodes without feedback are judged
AT_ONCE = 16  # steps that are looked at in one turn: each episode may cost a pass of the model


@dataclass(frozen=True, slots=True)
class Silence:
    """``after_s``: an episode whose last step is as old has ended."""

    store: Store
    after_s: float
    clock: Callable[[], float]

    def look(self, known: int) -> tuple[Sequence[Case], int]:
        """The next of them, and the cursor behind them. ``known``: the position up to which feedback was judged, which
        each of them takes for its own. What was there before the first look is left alone."""
        at = self.store.cursor(SILENT)
        if not at:
            return [], next((position for position, _ in self.store.newest(Step)), 0)
        cases = []
        for position, step in self.store.read(Step, after=at, limit=AT_ONCE):
            if self.clock() - step.created_at < self.after_s:
                break
            at = position
            if self._is_last(position, step) and not self.store.newest(Feedback, episode_id=step.episode_id):
                episode = self.store.episode(step.episode_id)
                assert episode is not None
                cases.append(Case(position=known, episode=episode, feedback=(), touched_at=step.created_at))
        return cases, at

    def _is_last(self, position: int, step: Step) -> bool:
        return self.store.newest(Step, episode_id=step.episode_id)[0][0] == position
