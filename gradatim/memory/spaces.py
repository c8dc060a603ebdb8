"""The key spaces that requests come in, whose keys may stand in for those that one of them lacks, and the keys of
answers that wait for their judgement.

No locks and no files: its owner has both. Knows nothing of entries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence

from gradatim.memory.key_space import Floats, KeySpace, Turn, to_bytes
from gradatim.types import AdapterId, MemoryKey, MemorySpace, StepId

_RECENT = 4096  # keys of answers that wait for their feedback
_MOST = 4  # that keys are made for: live, canary, holdback and the base


class Spaces:
    """``base``: the space of the base alone."""

    def __init__(self, base: KeySpace[Turn], kept: Sequence[MemorySpace]) -> None:
        self.base = base
        self.untended = True  # some step may lack a key
        self._rows = {row.id: row for row in kept}
        self._wanted: OrderedDict[str, KeySpace[Turn]] = OrderedDict()
        self._bridges: dict[str, str] = {}  # space -> the one whose keys may stand in for those that it lacks
        self._recent: OrderedDict[StepId, tuple[str, Floats]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def expect(self, adapter_id: AdapterId, adapter_sha256: str, now: float) -> KeySpace[Turn]:
        """Requests come in the space of these weights."""
        space = self.base.under(adapter_id, adapter_sha256)
        self._rows.setdefault(space.id, space.kept(now))
        self.untended = self.untended or space.id not in self._wanted
        self._wanted[space.id] = space
        self._wanted.move_to_end(space.id)
        while len(self._wanted) > _MOST:
            self._wanted.popitem(last=False)
        return space

    def wanted(self) -> list[KeySpace[Turn]]:
        """Those that keys are made for, the newest first."""
        return list(reversed(self._wanted.values()))

    def wants(self, space: str) -> bool:
        return space in self._wanted

    def unwanted(self, space: str) -> None:
        """Its weights are gone."""
        self._wanted.pop(space, None)

    def needed(self) -> set[str]:
        """Whose keys answers may be given with."""
        return {*self._wanted, *self._bridges.values()}

    def bridge(self, space: str, to: str | None) -> None:
        """Keys of ``to`` may stand in; None: no longer."""
        self._bridges.pop(space, None)
        if to is not None:
            self._bridges[space] = to

    def stand_in(self, space: str) -> str | None:
        return self._bridges.get(space)

    def rows_of(self, keys: Iterable[MemoryKey]) -> list[MemorySpace]:
        """What a shelf has to hold beside them: a key is never kept without what it was made with."""
        return [self._rows[space] for space in sorted({key.space for key in keys})]

    def drop(self, spaces: Collection[str]) -> None:
        """They are gone from the shelf."""
        for space in spaces:
            self._rows.pop(space, None)

    # ---------------------------------------------------------------------------------------------- waiting

    def wait(self, step_ids: Sequence[StepId], space: str, key: Floats) -> None:
        """Keep the key of an answer until it is judged."""
        for step_id in step_ids:
            self._recent[step_id] = space, key
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)

    def waiting(self, step_ids: Iterable[StepId]) -> list[MemoryKey]:
        """Of those of them that have one."""
        found = {step_id: self._recent[step_id] for step_id in step_ids if step_id in self._recent}
        return [MemoryKey(step_id=step, space=space, key=to_bytes(key)) for step, (space, key) in found.items()]

    def forget_waiting(self) -> None:
        """Whose they are is not known; they can be made anew."""
        self._recent.clear()
