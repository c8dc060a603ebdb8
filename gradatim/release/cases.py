"""Which known good answers a candidate is compared on: verified ones, newest first, an equal share for each skill.

Kept in memory are ids alone, a bounded number of them for each of a bounded number of skills; the log is followed in
its order, and read from its beginning only at the start. Knows nothing of verdicts and of scores.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field

from gradatim.protocols import Store
from gradatim.types import Example, StepId

ENOUGH = 12  # cases of a skill; with fewer retained ones, answers that were trained on fill up
SPARE = 64  # of those, kept beside them: the examples of an update are not its own witnesses
_PAGE = 200  # examples read at once


@dataclass(slots=True)
class _Skill:
    """Ids of its newest cases, the newest last."""

    retained: OrderedDict[StepId, str] = field(default_factory=OrderedDict)
    trained: OrderedDict[StepId, str] = field(default_factory=OrderedDict)


class Cases:
    """Cases of at most ``most`` examples and as many skills; those that were seen last, where there are more."""

    def __init__(self, store: Store, most: int) -> None:
        self._store = store
        self._most = max(1, most)
        self._seen = 0  # store position
        self._skills: OrderedDict[str, _Skill] = OrderedDict()  # the one with the newest case last
        self._skill_of: dict[StepId, str] = {}

    def __len__(self) -> int:
        """Of how many examples it keeps the ids."""
        return len(self._skill_of)

    def choose(self, exclude: Set[str] = frozenset()) -> Sequence[Example]:
        """Retained ones, filled up to ``ENOUGH`` with ones that were trained on: the live adapter knows those by heart,
        so that any change looks like a loss. None whose id is in ``exclude``."""
        self._follow()
        share = max(1, self._most // max(1, len(self._skills)))
        ids = [i for _, skill in sorted(self._skills.items()) for i in _chosen(skill, share, exclude)]
        return [example for i in ids for _, example in self._store.newest(Example, id=i)]

    def _follow(self) -> None:
        while page := self._store.read(Example, after=self._seen, limit=_PAGE):
            self._seen = page[-1][0]
            for _, example in page:
                self._drop(example.step_id)
                if example.verified and example.chosen_ids:
                    self._keep(example)

    def _keep(self, example: Example) -> None:
        skill = self._skills.setdefault(example.skill, _Skill())
        self._skills.move_to_end(example.skill)
        place, most = (skill.retained, self._most) if example.retained else (skill.trained, ENOUGH + SPARE)
        place[example.step_id] = example.id
        self._skill_of[example.step_id] = example.skill
        if len(place) > most:
            self._drop(next(iter(place)))
        if len(self._skills) > self._most:
            _, oldest = self._skills.popitem(last=False)
            for step_id in (*oldest.retained, *oldest.trained):
                del self._skill_of[step_id]

    def _drop(self, step_id: StepId) -> None:
        name = self._skill_of.pop(step_id, None)
        if name is None:
            return
        skill = self._skills[name]
        skill.retained.pop(step_id, None)
        skill.trained.pop(step_id, None)
        if not skill.retained and not skill.trained:
            del self._skills[name]


def _chosen(skill: _Skill, share: int, exclude: Set[str]) -> Iterator[str]:
    """Newest first."""
    kept = [i for i in reversed(skill.retained.values()) if i not in exclude][:share]
    fill = [i for i in reversed(skill.trained.values()) if i not in exclude]
    yield from kept
    yield from fill[: max(0, min(share, ENOUGH) - len(kept))]
