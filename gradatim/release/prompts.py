"""Which recent prompts a candidate is tried on in the shadow of the live adapter: of users, not of its own lessons.

Those from before it came to the shadow in an order that its weights decide, then new ones as they come in. All of it is
a function of the store's records, so that a restart finds the same ones. Knows no model.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from gradatim.config import ShadowConfig
from gradatim.protocols import Store
from gradatim.types import Adapter, Example, Step, StepId, Update

_PAGE = 200
_LOOK_BACK = 4  # recorded answers that are looked at, in prompts that are wanted
_USER_SHARE = 0.05  # of the prompts that one named user may have asked,
_USER_LEAST = 5  # or so many
_TAUGHT = 1000  # examples of an update whose prompts are left out


class Prompts:
    """At most ``config.prompts`` steps, each prompt once; ``after``: the position at which the shadow began."""

    def __init__(self, store: Store, candidate: Adapter, config: ShadowConfig, after: int) -> None:
        self._store, self._candidate, self._most = store, candidate, config.prompts
        self._known = _taught(store, candidate)
        self._asked: Counter[str] = Counter()
        self._seen = after
        self._chosen: list[tuple[StepId, str]] = []
        newest = store.newest(Step, before=max(1, after), limit=_LOOK_BACK * self._most)
        self._add(step for _, step in newest)
        self._chosen.sort(key=lambda one: hashlib.sha256(f"{candidate.sha256}/{one[0]}".encode()).digest())
        self.skills = sorted({skill for _, skill in self._chosen})[: config.skills]

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def are_all(self) -> bool:
        """No more are wanted."""
        return len(self._chosen) >= self._most

    def take(self, start: int, count: int) -> Sequence[tuple[int, Step]]:
        """The prompts at those places, each with its place, as far as there are any and they are still on record."""
        if start + count > len(self._chosen) and not self.are_all:
            self._follow()
        steps = [(n, self._store.step(id=i)) for n, (i, _) in enumerate(self._chosen[start : start + count], start)]
        return [(n, step) for n, step in steps if step is not None]

    def _follow(self) -> None:
        while not self.are_all and (page := self._store.read(Step, after=self._seen, limit=_PAGE)):
            self._seen = page[-1][0]
            self._add(step for _, step in page)

    def _add(self, steps: Iterator[Step]) -> None:
        room = self._most - len(self._chosen)
        self._chosen += islice(((s.id, s.skill) for s in steps if self._is_wanted(s)), max(0, room))

    def _is_wanted(self, step: Step) -> bool:
        ours = step.adapter_id.rpartition("@")[0] == self._candidate.name
        if not ours or step.stage == "pinned" or not step.trainable or not step.prompt_ids:
            return False
        if step.prompt_ids in self._known:
            return False
        if step.user and self._asked[step.user] >= max(_USER_LEAST, _USER_SHARE * self._most):
            return False
        self._asked[step.user] += 1
        self._known.add(step.prompt_ids)
        return True


def _taught(store: Store, candidate: Adapter) -> set[tuple[int, ...]]:
    """Prompts of what the candidate was made of: they would speak for it."""
    out: set[tuple[int, ...]] = set()
    for _, update in store.read(Update, id=candidate.update_id):
        for example_id in update.example_ids[:_TAUGHT]:
            out |= {example.prompt_ids for _, example in store.newest(Example, id=example_id)}
    return out
