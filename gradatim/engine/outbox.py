"""Events on their way from the engine's thread to the event loops that wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gradatim.engine.generation import Event, Generation


class Outbox:
    """Used by the engine's thread alone."""

    def __init__(self) -> None:
        self._events: dict[asyncio.AbstractEventLoop, list[tuple[Generation, Event]]] = {}

    def put(self, generation: Generation, event: Event) -> None:
        self._events.setdefault(generation.loop, []).append((generation, event))

    def deliver(self) -> None:
        """One call into each event loop for everything a step brought."""
        all_events, self._events = self._events, {}
        for loop, events in all_events.items():
            try:
                loop.call_soon_threadsafe(_put_all, events)
            except RuntimeError:  # that loop is closed: its callers are gone
                for generation, _ in events:
                    generation.cancelled = True


def _put_all(events: Sequence[tuple[Generation, Event]]) -> None:
    for generation, event in events:
        generation.events.put_nowait(event)
