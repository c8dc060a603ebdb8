"""Judged answers shown in the prompt: where a request is much like earlier ones, what was right there.

The request's own prompt is read first, for its key: the same mean state that decision memory goes by. It finds the
situations of the same tenant that are near; of each, the newest answer that was judged good, or given as a correction,
and that nobody spoke against since. Nearness, worth and age say which are shown, in a budget of tokens. They stand as
turns of the conversation just before the last message: every chat template can say that, and all that is the same from
request to request stays in front of them, in the prefix cache.

What consolidation retired is still what was right there, so nothing older takes its place; but the weights know it, as
they were found to without examples in the prompt. It is not shown, and neither is what is farther: nearer than that,
there is nothing that they lack.

An engine that tells no states has no keys, and nothing is retrieved. Knows nothing of HTTP, and moves no weights.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gradatim.config import MemoryConfig
from gradatim.memory.decisions import DecisionMemory
from gradatim.memory.recall import Near, Neighbourhood, Recall
from gradatim.protocols import Engine, Recollection, Store
from gradatim.types import AdapterId, MemoryEntry, Message, Request, Sampling, Shown, Started, StepId

_TEXTS = 4096  # of situations, kept in memory
_OVERHEAD = 8  # tokens that a chat template puts around two turns, about


@dataclass(frozen=True, slots=True)
class Found:
    """One situation and the answer that was right there."""

    asked: str
    entry: MemoryEntry
    cosine: float
    score: float


class Texts(Protocol):
    """Between texts and tokens."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def text_ids(self, text: str) -> tuple[int, ...]: ...

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]: ...


class _Placing:
    """A recollection that only keeps where it was asked; implements ``protocols.Recollection``."""

    def __init__(self) -> None:
        self.key: NDArray[np.float32] | None = None

    def situate(self, key: NDArray[np.float32]) -> None:
        self.key = key

    def lean(
        self, drawn: Sequence[int], path_logprob: float, logprobs: Callable[[Sequence[int]], Sequence[float]]
    ) -> Mapping[int, float]:
        return {}

    def trace(self, tokens: Sequence[int]) -> Mapping[str, Any]:
        return {}


class Retrieval:
    """Implements ``protocols.Prompter``'s ``show``."""

    def __init__(
        self,
        memory: DecisionMemory,
        engine: Engine,
        store: Store,
        texts: Texts,
        config: MemoryConfig,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._memory, self._engine, self._store, self._texts = memory, engine, store, texts
        self._config, self._clock = config, clock
        self._asked: OrderedDict[StepId, str] = OrderedDict()

    async def show(
        self, messages: Sequence[Message], recollection: Recollection, adapter_id: AdapterId
    ) -> Shown | None:
        """None where nothing is near. Raises what ``Engine.generate`` does."""
        if not isinstance(recollection, Recall) or not _is_asked(messages):
            return None
        if not self._memory.holds(recollection.whose):  # nothing to find, so nothing is read twice
            return None
        if recollection.key is None:
            prompt_ids, key = await self._place(messages, adapter_id)
            if key is None:
                return None
            recollection.place(key)
            assert recollection.key is not None
        else:
            prompt_ids = await asyncio.to_thread(self._texts.prompt_ids, messages)
        around = self._memory.near(
            recollection.whose, recollection.space, recollection.key, self._config.retrieval_cosine
        )
        found = await asyncio.to_thread(self._choose, around)
        if not found:
            return None
        self._memory.counts["shown"] += 1
        now = self._clock()
        return Shown(
            messages=(*messages[:-1], *_turns(found, self._texts), messages[-1]),
            prompt_ids=prompt_ids,
            entries=tuple(one.entry for one in found),
            told=tuple(
                {
                    "entry": one.entry.id,
                    "cosine": round(one.cosine, 4),
                    "age_s": round(now - one.entry.created_at, 1),
                    "asked": one.asked,
                    "answer": self._texts.decode(one.entry.tokens),
                }
                for one in found
            ),
        )

    async def _place(
        self, messages: Sequence[Message], adapter_id: AdapterId
    ) -> tuple[tuple[int, ...], NDArray[np.float32] | None]:
        """The tokens of the prompt as it is, and its key."""
        placing, prompt_ids = _Placing(), tuple[int, ...]()
        sampling = Sampling(max_tokens=1, temperature=0.0)
        request = Request(messages=tuple(messages), sampling=sampling, recollection=placing)
        async for event in self._engine.generate(request, adapter_id):
            if isinstance(event, Started):
                prompt_ids = event.prompt_ids
        return prompt_ids, placing.key

    def _choose(self, around: Neighbourhood) -> list[Found]:
        asked = {entry.step_id: self._asked_in(entry.step_id) for entry, _ in (*around.near, *around.known)}
        found = choose(around.near, asked, self._config, self._clock(), known=around.known)
        return within(found, self._config, self._tokens)

    def _tokens(self, found: Found) -> int:
        return len(self._texts.text_ids(found.asked)) + len(found.entry.tokens) + _OVERHEAD

    def _asked_in(self, step_id: StepId) -> str:
        """The last message of that step; empty where it cannot be shown. Kept: steps never change."""
        if step_id not in self._asked:
            step = self._store.step(id=step_id)
            self._asked[step_id] = _text(step.messages[-1]) if step is not None and _is_asked(step.messages) else ""
            while len(self._asked) > _TEXTS:
                self._asked.popitem(last=False)
        return self._asked[step_id]


def choose(
    near: Near, asked: Mapping[StepId, str], config: MemoryConfig, now: float, *, known: Near = ()
) -> list[Found]:
    """One answer of each situation at most, the best first: exp((cosine - 1) / width) value 2^(-age / half-life). What
    is ``known`` to the weights does not age, and ends the list."""
    retired = {entry.id for entry, _ in known}
    situations: dict[str, list[tuple[MemoryEntry, float]]] = {}
    for entry, cosine in (*near, *known):
        if text := asked.get(entry.step_id, ""):
            situations.setdefault(text, []).append((entry, cosine))
    out: list[Found] = []
    for text, judged in situations.items():
        right = _right(judged)
        if right is not None:
            entry, cosine = right
            halves = 0.0 if entry.id in retired else max(now - entry.created_at, 0.0) / config.half_life_s
            score = math.exp((min(cosine, 1.0) - 1.0) / config.width) * entry.value * 0.5**halves
            out.append(Found(text, entry, cosine, score))
    out.sort(key=lambda one: (-one.score, one.entry.id not in retired, one.entry.id))
    return list(takewhile(lambda one: one.entry.id not in retired, out))


def _right(judged: Near) -> tuple[MemoryEntry, float] | None:
    """The newest answer of one situation that is good by the newest word on it."""
    newest: dict[tuple[int, ...], tuple[MemoryEntry, float]] = {}  # by answer
    for entry, cosine in sorted(judged, key=lambda pair: _age(pair[0])):
        newest[entry.tokens] = entry, cosine
    good = [pair for pair in newest.values() if pair[0].value > 0.0]
    return max(good, key=lambda pair: _age(pair[0]), default=None)


def _age(entry: MemoryEntry) -> tuple[int, float, str]:
    """Rises with when it was judged."""
    return entry.position, entry.created_at, entry.id


def within(found: Sequence[Found], config: MemoryConfig, tokens: Callable[[Found], int]) -> list[Found]:
    """The best that fit, in number and in tokens; what is too long is passed over for what is not."""
    out: list[Found] = []
    left = config.retrieval_tokens
    for one in found:
        if len(out) == config.retrieved:
            break
        if (cost := tokens(one)) <= left:
            out.append(one)
            left -= cost
    return out


def _turns(found: Sequence[Found], texts: Texts) -> list[Message]:
    """The nearest one last, next to what is asked now."""
    out: list[Message] = []
    for one in reversed(found):
        out.append({"role": "user", "content": one.asked})
        out.append({"role": "assistant", "content": texts.decode(one.entry.tokens)})
    return out


def _is_asked(messages: Sequence[Message]) -> bool:
    """The last message is a user's, and text: before a tool's result no turn can stand."""
    return bool(messages) and messages[-1].get("role") == "user" and bool(_text(messages[-1]))


def _text(message: Message) -> str:
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""
