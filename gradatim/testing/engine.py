"""The conformance suite of ``protocols.Engine``: whatever passes it can stand under the server.

    from gradatim.testing.engine import Bench, check_engine

    async def test_my_engine():
        await check_engine(lambda: open_my_engine())  # an async context manager that gives a Bench

A ``Bench`` is a fresh engine with two adapters that it can load and has not, and a prompt that is longer than its
context. To see each check on its own, parametrise a test with ``ENGINE_CHECKS``. Numbers are not checked here: which
tokens are right is known to the engine's own tests alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, replace
from typing import Any, cast

from gradatim.errors import PromptTooLongError, UnknownAdapterError
from gradatim.protocols import Engine
from gradatim.types import Adapter, AdapterId, Delta, Request, Sampling, Started

_WAIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a check works on."""

    engine: Engine
    adapters: Sequence[Adapter]  # two, step 1 and later, not loaded
    too_long: Request


OpenEngine = Callable[[], AbstractAsyncContextManager[Bench]]
Check = Callable[[OpenEngine], Awaitable[None]]

_BASE = AdapterId("agent@0")
_ASK = Request(messages=({"role": "user", "content": "Hello there"},), sampling=Sampling(max_tokens=6, temperature=0))


async def check_engine(open_engine: OpenEngine) -> None:
    """Run every check. AssertionError, or whatever the engine raised, with the check's name as a note."""
    for check in ENGINE_CHECKS:
        try:
            await asyncio.wait_for(check(open_engine), _WAIT_S)
        except BaseException as e:
            e.add_note(f"in {getattr(check, '__name__', check)} of gradatim.testing.engine")
            raise


async def collect(engine: Engine, request: Request, adapter_id: AdapterId) -> tuple[Started, list[list[Delta]]]:
    """A whole generation: its start, and the deltas of each choice."""
    events = [event async for event in engine.generate(request, adapter_id)]
    started = events[0]
    assert isinstance(started, Started), "the first event is Started"
    choices: list[list[Delta]] = [[] for _ in range(request.sampling.n)]
    for event in events[1:]:
        assert isinstance(event, Delta), "Started comes once"
        choices[event.index].append(event)
    return started, choices


def _ids(deltas: Sequence[Delta]) -> list[int]:
    return [token.id for delta in deltas for token in delta.tokens]


async def check_started_then_deltas_then_one_end_for_each_choice(open_engine: OpenEngine) -> None:
    async with open_engine() as bench:
        await _load_base(bench)
        request = replace(_ASK, sampling=replace(_ASK.sampling, n=2))
        started, choices = await collect(bench.engine, request, _BASE)
        assert started.prompt_ids and 0 <= started.cached_tokens <= len(started.prompt_ids)
        for deltas in choices:
            assert [d.finish_reason is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]
            assert deltas[-1].finish_reason in ("stop", "length")
            assert all(token.logprob <= 0 for delta in deltas for token in delta.tokens)


async def check_max_tokens_ends_with_length(open_engine: OpenEngine) -> None:
    async with open_engine() as bench:
        await _load_base(bench)
        request = replace(_ASK, sampling=replace(_ASK.sampling, max_tokens=1))
        _, (deltas,) = await collect(bench.engine, request, _BASE)
        assert len(_ids(deltas)) <= 1


async def check_a_stop_string_never_shows(open_engine: OpenEngine) -> None:
    async with open_engine() as bench:
        await _load_base(bench)
        _, (deltas,) = await collect(bench.engine, _ASK, _BASE)
        text = "".join(d.text for d in deltas)
        if len(text) < 3:
            return
        stop = text[1:3]
        request = replace(_ASK, sampling=replace(_ASK.sampling, stop=(stop,)))
        _, (stopped,) = await collect(bench.engine, request, _BASE)
        assert "".join(d.text for d in stopped) == text[: text.index(stop)]
        assert stopped[-1].finish_reason == "stop"


async def check_an_unknown_adapter_is_refused_first(open_engine: OpenEngine) -> None:
    async with open_engine() as bench:
        await _refused(UnknownAdapterError, bench.engine, _ASK, AdapterId("nobody@7"))
        await _refused(UnknownAdapterError, bench.engine, _ASK, bench.adapters[0].id)


async def check_a_prompt_that_is_too_long_is_refused_first(open_engine: OpenEngine) -> None:
    async with open_engine() as bench:
        await _load_base(bench)
        await _refused(PromptTooLongError, bench.engine, bench.too_long, _BASE)


async def check_loading_and_unloading(open_engine: OpenEngine) -> None:
    async with open_engine() as bench:
        first, second = bench.adapters
        await bench.engine.load(first)
        await bench.engine.load(first)
        await bench.engine.load(second)
        assert {first.id, second.id} <= bench.engine.loaded()
        await bench.engine.unload(first.id)
        await bench.engine.unload(first.id)
        assert first.id not in bench.engine.loaded() and second.id in bench.engine.loaded()
        await _refused(UnknownAdapterError, bench.engine, _ASK, first.id)
        await collect(bench.engine, _ASK, second.id)
        await bench.engine.load(first)
        await collect(bench.engine, _ASK, first.id)


async def check_an_unload_lets_running_generations_end(open_engine: OpenEngine) -> None:
    async with open_engine() as bench:
        adapter = bench.adapters[0]
        await bench.engine.load(adapter)
        _, (alone,) = await collect(bench.engine, _ASK, adapter.id)
        deltas: list[Delta] = []
        async with aclosing(_stream(bench.engine, _ASK, adapter.id)) as events:
            async for event in events:
                if isinstance(event, Started):
                    await bench.engine.unload(adapter.id)
                    assert adapter.id not in bench.engine.loaded()
                else:
                    deltas.append(event)
        assert _ids(deltas) == _ids(alone)


async def check_closing_the_iterator_aborts(open_engine: OpenEngine) -> None:
    async with open_engine() as bench:
        await _load_base(bench)
        for _ in range(40):  # more than any queue of a test's engine could hold, were they not given up
            async with aclosing(_stream(bench.engine, _ASK, _BASE)) as events:
                async for _ in events:
                    break
        await collect(bench.engine, _ASK, _BASE)


async def check_requests_run_beside_each_other(open_engine: OpenEngine) -> None:
    async with open_engine() as bench:
        await _load_base(bench)
        for adapter in bench.adapters:
            await bench.engine.load(adapter)
        names = [_BASE, *(a.id for a in bench.adapters)] * 2
        alone = [await collect(bench.engine, _ASK, name) for name in names]
        together = await asyncio.gather(*[collect(bench.engine, _ASK, name) for name in names])
        assert [_ids(c[0]) for _, c in together] == [_ids(c[0]) for _, c in alone]


async def _load_base(bench: Bench) -> None:
    frozen = replace(bench.adapters[0], id=_BASE, step=0, parent_id=None, sha256=bench.adapters[0].base_sha256, path="")
    await bench.engine.load(frozen)


def _stream(engine: Engine, request: Request, adapter_id: AdapterId) -> Any:
    """The events as something that can be closed: engines give async generators."""
    return cast("Any", engine.generate(request, adapter_id))


async def _refused(error: type[Exception], engine: Engine, request: Request, adapter_id: AdapterId) -> None:
    try:
        async with aclosing(_stream(engine, request, adapter_id)) as events:
            async for event in events:
                raise AssertionError(f"{error.__name__} must come before the first event, which was {event}")
    except error:
        return
    raise AssertionError(f"{error.__name__} was not raised")


ENGINE_CHECKS: Sequence[Check] = (
    check_started_then_deltas_then_one_end_for_each_choice,
    check_max_tokens_ends_with_length,
    check_a_stop_string_never_shows,
    check_an_unknown_adapter_is_refused_first,
    check_a_prompt_that_is_too_long_is_refused_first,
    check_loading_and_unloading,
    check_an_unload_lets_running_generations_end,
    check_closing_the_iterator_aborts,
    check_requests_run_beside_each_other,
)
