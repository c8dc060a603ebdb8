"""Fills the token memory: reads remembered answers once more under the weights that requests come in.

It takes its turn behind the requests. What cannot be read is counted and left out; it knows no feedback.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from gradatim.errors import GradatimError, OverloadedError, UnknownAdapterError
from gradatim.memory.decisions import DecisionMemory
from gradatim.memory.key_space import KeySpace, Turn
from gradatim.protocols import Store
from gradatim.types import AdapterId, MemoryEntry

if TYPE_CHECKING:
    from torch import Tensor

    from gradatim.memory.tokens import TokenMemory

log = logging.getLogger(__name__)
_ANSWERS = 8  # read in one turn, one after the other: requests go first
States = Callable[[Sequence[int], int, AdapterId], "Awaitable[Tensor]"]


class Teller:
    """``states`` gives those of a text from a position on, under some weights: (ids, start, adapter) -> (T, H)."""

    def __init__(self, memory: DecisionMemory, tokens: TokenMemory, store: Store, states: States) -> None:
        self._memory, self._tokens, self._store, self._states = memory, tokens, store, states
        self._unread: set[tuple[str, str]] = set()  # entries and spaces that cannot be read

    async def turn(self) -> bool:
        """Read a few answers. True if there was one to read. An engine that is busy is left alone."""
        lacking = await asyncio.to_thread(self._memory.untold, _ANSWERS, frozenset(self._unread))
        for entry, space in lacking:
            try:
                await self._tell(entry, space)
            except OverloadedError:
                return False
            except UnknownAdapterError:
                self._memory.unwanted(space.id)
                return True
        if self._tokens.worn:
            await asyncio.to_thread(self._tokens.maintain)
        return bool(lacking)

    async def _tell(self, entry: MemoryEntry, space: KeySpace[Turn]) -> None:
        try:
            step = await asyncio.to_thread(self._store.step, id=entry.step_id)
            if step is None:
                raise ValueError("it is not in the store")
            ids = (*step.prompt_ids, *entry.tokens[:-1])
            states = await self._states(ids, len(step.prompt_ids) - 1, space.adapter_id)
            await asyncio.to_thread(self._memory.tell, entry, space, states)
        except (OverloadedError, UnknownAdapterError):
            raise
        except (GradatimError, ValueError) as e:
            self._unread.add((entry.id, space.id))
            self._memory.counts["unreadable"] += 1
            log.warning("%s is not in the token memory: %s", entry.id, e)
