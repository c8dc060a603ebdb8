"""Builds the memory of a server, or of its store alone, and shows its figures.

What is remembered can be looked at and forgotten whether memory is on or off; requests are given it only where it is
on. A memory that was made with another model is refused, loudly, and serving goes on without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge

from gradatim.app import compose
from gradatim.config import Config
from gradatim.errors import ForeignMemoryError
from gradatim.memory.decisions import CURSOR, DecisionMemory
from gradatim.store import SqlShelf, SqlStore

if TYPE_CHECKING:
    from gradatim.engine.transformers import TransformersEngine
    from gradatim.memory.follow import Follower
    from gradatim.nn.base import Base

log = logging.getLogger(__name__)
_SHOWN = {
    "gradatim_memory_entries": "what is remembered",
    "gradatim_memory_active": "entries of the current epochs",
    "gradatim_memory_bytes": "of keys and entries, in the server process",
    "gradatim_memory_recalls": "requests that looked into the memory",
    "gradatim_memory_steered": "answers that it had a part in",
    "gradatim_memory_helped": "good answers that an entry was for",
    "gradatim_memory_harmed": "bad answers that an entry was for",
    "gradatim_memory_written": "entries written or changed since the start",
    "gradatim_memory_damaged": "keys that could not be read and are made anew",
}


@dataclass(frozen=True, slots=True)
class Remembering:
    """``on`` is None where requests go without memory; ``kept`` is what is on the shelf, on or off."""

    kept: DecisionMemory
    on: DecisionMemory | None = None
    follower: Follower | None = None


def open_kept(config: Config, store: SqlStore) -> DecisionMemory:
    """What is remembered, whatever model it was made with."""
    return DecisionMemory(SqlShelf(store.engines), config.memory, base_sha256="", tokenizer_sha256="", layers=())


def build_memory(config: Config, store: SqlStore, base: Base, engine: TransformersEngine) -> Remembering:
    """StoreError."""
    if not config.memory.decisions:
        return Remembering(open_kept(config, store))
    from gradatim.memory.follow import Follower
    from gradatim.nn.render import Renderer

    renderer = Renderer(base)
    try:
        memory = DecisionMemory(
            SqlShelf(store.engines),
            config.memory,
            base_sha256=base.sha256,
            tokenizer_sha256=renderer.digest(),
            layers=compose.key_layers(config, base),
        )
    except ForeignMemoryError as e:
        log.critical("memory stays off: %s", e)
        return Remembering(open_kept(config, store))
    if not store.cursor(CURSOR) and not memory.stats()["entries"]:
        memory.start_from(store.end())
    reward_model, credit = compose.build_judges(config, store, read_only=True)
    follower = Follower(
        memory,
        store,
        reward_model=reward_model,
        credit=credit,
        tokenizer=renderer,
        place=engine.key,
    )
    return Remembering(memory, memory, follower)


def show_figures(remembering: Remembering, registry: CollectorRegistry) -> None:
    """As metrics; one says whether it is on."""
    memory = remembering.kept

    def reader(name: str) -> Callable[[], float]:
        return lambda: float(memory.stats()[name.removeprefix("gradatim_memory_")])

    Gauge("gradatim_memory_on", "1 where requests are given a memory", registry=registry).set(bool(remembering.on))
    for name, help_text in _SHOWN.items():
        Gauge(name, help_text, registry=registry).set_function(reader(name))
