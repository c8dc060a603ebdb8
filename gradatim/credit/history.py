"""What was done in earlier long episodes and how they ended: the logged traffic that credit over long horizons uses.

Of each step: the exact state (its prompt), the observation (the last message, as text), the action (the answer), and
the events that it brought about: its words, and what was seen next. Knows nothing of how credit is shared.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from gradatim.protocols import Store
from gradatim.types import Episode, EpisodeId, Reward, Step

_WORDS = 48  # of an answer that become events
_PAGE = 200


@dataclass(frozen=True, slots=True)
class Lived:
    """One episode of S steps. Keys are 32-bit digests; equal things have equal keys."""

    value: float  # its reward, in [-1, 1]
    states: tuple[int, ...]  # (S,) exact prompts
    observations: tuple[int, ...]  # (S,)
    actions: tuple[int, ...]  # (S,)
    given: frozenset[int]  # events before the first step
    events: tuple[frozenset[int], ...]  # (S,) of each step, with what was seen after it


def lived(episode: Episode, value: float) -> Lived:
    seen = [_observation(step) for step in episode.steps]
    done = [_plain(step.text) for step in episode.steps]
    events = []
    for k, action in enumerate(done):
        after = {f"o {seen[k + 1]}"} if k + 1 < len(seen) else set()
        words = {f"w {word}" for word in action.split()[:_WORDS]}
        events.append(frozenset(map(_key, {f"a {action}", f"s {seen[k]} a {action}", *words, *after})))
    return Lived(
        value=value,
        states=tuple(zlib.crc32(repr(step.prompt_ids).encode()) for step in episode.steps),
        observations=tuple(map(_key, seen)),
        actions=tuple(map(_key, done)),
        given=frozenset({_key(f"o {seen[0]}")}) if seen else frozenset(),
        events=tuple(events),
    )


def _key(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _observation(step: Step) -> str:
    if not step.messages:
        return str(zlib.crc32(repr(step.prompt_ids[-64:]).encode()))
    content = step.messages[-1].get("content")
    return _plain(content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=str))


class History:
    """The newest ``most`` judged episodes of at least ``least_steps`` steps, read from the store as it grows."""

    def __init__(self, store: Store, *, least_steps: int, most: int) -> None:
        self._store, self._least_steps, self._most = store, least_steps, most
        self._episodes: dict[EpisodeId, Lived] = {}
        self._cursor = 0
        self.seen = 0  # how many there have ever been

    def past(self, but: EpisodeId) -> Sequence[Lived]:
        """All of them but one, oldest first."""
        self._read_on()
        return [lived for key, lived in self._episodes.items() if key != but]

    def newest(self, n: int, *, but: EpisodeId) -> Sequence[tuple[EpisodeId, float]]:
        """Up to ``n`` of them, and their rewards; the newest first."""
        self._read_on()
        others = ((key, lived.value) for key, lived in reversed(self._episodes.items()) if key != but)
        return list(islice(others, n))

    def episode(self, episode_id: EpisodeId) -> Episode | None:
        return self._store.episode(episode_id)

    def _read_on(self) -> None:
        if self._cursor == 0:
            rows = self._store.newest(Reward, limit=4 * self._most)[::-1]
            self._take(rows)
        while rows := self._store.read(Reward, after=self._cursor, limit=_PAGE):
            self._take(rows)

    def _take(self, rows: Sequence[tuple[int, Reward]]) -> None:
        for position, reward in rows:
            self._cursor = position
            known = self._episodes.pop(reward.episode_id, None)
            episode = self._store.episode(reward.episode_id) if reward.value else None
            if episode is None or reward.value is None or len(episode.steps) < self._least_steps:
                continue
            self.seen += known is None
            self._episodes[reward.episode_id] = lived(episode, reward.value)
            if len(self._episodes) > self._most:
                del self._episodes[next(iter(self._episodes))]
