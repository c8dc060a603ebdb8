"""Answers of one adapter, by an engine of this process: greedy ones to a suite's cases, and recorded requests anew."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from gradatim.errors import EngineError
from gradatim.protocols import Engine
from gradatim.release.shadow import as_answered
from gradatim.release.suite import SuiteCase
from gradatim.types import Adapter, AdapterId, Delta, Request, Sampling, Step, Token

In = TypeVar("In")
Out = TypeVar("Out")

_AT_ONCE = 8


class Answers:
    """A ``release.suite.Answerer``; not to be called from a running event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, adapter: Adapter, cases: Sequence[SuiteCase]) -> Sequence[str]:
        return asyncio.run(_all(self._engine, adapter, cases, lambda case: self._text(case, adapter.id)))

    async def _text(self, case: SuiteCase, adapter_id: AdapterId) -> str:
        request = Request(messages=case.messages, sampling=Sampling(max_tokens=case.max_tokens, temperature=0.0))
        events = self._engine.generate(request, adapter_id)
        return "".join([event.text async for event in events if isinstance(event, Delta)])


class Replays:
    """A ``release.shadow.Replayer``: recorded requests answered once more from their very tokens, without memory, with
    the sampling that was asked for. Where no seed was given one is made of the step's id, so that both adapters draw
    with the same luck. ``max_tokens`` bounds every answer. Not to be called from a running event loop."""

    def __init__(self, engine: Engine, max_tokens: int) -> None:
        self._engine, self._max_tokens = engine, max_tokens

    def __call__(self, adapter: Adapter, steps: Sequence[Step]) -> Sequence[Step | None]:
        return asyncio.run(_all(self._engine, adapter, steps, lambda step: self._anew(step, adapter)))

    async def _anew(self, step: Step, adapter: Adapter) -> Step | None:
        request = Request(prompt=step.prompt_ids, sampling=self._sampling(step))
        text, tokens, finish = "", list[Token](), "aborted"
        try:
            async for event in self._engine.generate(request, adapter.id):
                if isinstance(event, Delta):
                    text, finish = text + event.text, event.finish_reason or finish
                    tokens += event.tokens
        except EngineError:  # too long a prompt, say
            return None
        ids, logprobs = tuple(t.id for t in tokens), tuple(t.logprob for t in tokens)
        return as_answered(step, adapter, text=text, completion_ids=ids, logprobs=logprobs, finish_reason=finish)

    def _sampling(self, step: Step) -> Sampling:
        asked = step.sampling
        seed = asked.get("seed")
        return Sampling(
            max_tokens=min(self._max_tokens, asked.get("max_tokens") or self._max_tokens),
            temperature=asked.get("temperature", 1.0),
            top_p=asked.get("top_p", 1.0),
            stop=tuple(asked.get("stop") or ()),
            seed=zlib.crc32(step.id.encode()) if seed is None else seed,
            presence_penalty=asked.get("presence_penalty", 0.0),
            frequency_penalty=asked.get("frequency_penalty", 0.0),
            logit_bias={int(token): bias for token, bias in (asked.get("logit_bias") or {}).items()},
        )


async def _all(
    engine: Engine, adapter: Adapter, asked: Iterable[In], answer: Callable[[In], Awaitable[Out]]
) -> Sequence[Out]:
    """The answers to all that is asked, a few at a time, in order."""
    await engine.load(adapter)
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(case: In) -> Out:
        async with room:
            return await answer(case)

    try:
        return await asyncio.gather(*map(one, asked))
    finally:
        await engine.unload(adapter.id)
