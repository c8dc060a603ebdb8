"""Greedy answers of one adapter to a suite's cases, by an engine of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gradatim.protocols import Engine
from gradatim.release.suite import SuiteCase
from gradatim.types import Adapter, AdapterId, Delta, Request, Sampling

_AT_ONCE = 8


class Answers:
    """A ``release.suite.Answerer``; not to be called from a running event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, adapter: Adapter, cases: Sequence[SuiteCase]) -> Sequence[str]:
        return asyncio.run(self._all(adapter, cases))

    async def _all(self, adapter: Adapter, cases: Sequence[SuiteCase]) -> Sequence[str]:
        await self._engine.load(adapter)
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(case: SuiteCase) -> str:
            async with room:
                return await self._text(case, adapter.id)

        try:
            return await asyncio.gather(*map(one, cases))
        finally:
            await self._engine.unload(adapter.id)

    async def _text(self, case: SuiteCase, adapter_id: AdapterId) -> str:
        request = Request(messages=case.messages, sampling=Sampling(max_tokens=case.max_tokens, temperature=0.0))
        events = self._engine.generate(request, adapter_id)
        return "".join([event.text async for event in events if isinstance(event, Delta)])
