"""``/v1/chat/completions`` and ``/v1/completions``: from a body to an answer, whole or streamed.

A completed answer is recorded before its last byte is sent, so whoever has read it to the end can give feedback on
it, also after a crash. A client that leaves aborts its generation. Knows nothing of how answers look.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gradatim.server import render, wire
from gradatim.server.body import read_object
from gradatim.server.episodes import Chain
from gradatim.server.generation import Generation, Services
from gradatim.server.problems import ApiError, dumps, json_response, problem

log = logging.getLogger("gradatim.server")
T = TypeVar("T")
_DONE = b"[DONE]"


class Completions:
    """The two routes that generate."""

    def __init__(self, services: Services, max_body_bytes: int) -> None:
        self._services = services
        self._max_body_bytes = max_body_bytes

    async def chat_completions(self, request: Request) -> Any:
        return await self._answer(request, wire.parse_chat)

    async def completions(self, request: Request) -> Any:
        return await self._answer(request, wire.parse_completion)

    async def _answer(
        self, request: Request, parse: Callable[[Mapping[str, Any]], wire.Call]
    ) -> Response | EventStream:
        call = parse(await read_object(request, self._max_body_bytes))
        gen = await self._generation(request, call)
        if call.stream:
            try:
                await unless_gone(gen.start(), request.receive)
            except BaseException:
                await gen.close()
                raise
            return EventStream(gen)
        try:
            await unless_gone(_complete(gen), request.receive)
        finally:
            await gen.close()
        return json_response(render.whole(gen), headers=render.headers(gen))

    async def _generation(self, request: Request, call: wire.Call) -> Generation:
        turn = request.headers.get("x-turn-type", "").strip().lower()
        if turn not in ("", "main", "side"):
            raise ApiError(400, "X-Turn-Type must be main or side", param="X-Turn-Type")
        chain = Chain(call.request.messages, call.user) if call.request.messages else None
        episode_id = await self._services.episodes.find(call, chain, _session(request))
        return Generation(self._services, call, episode_id=episode_id, chain=chain, side=turn == "side")


def _session(request: Request) -> str:
    """The session named by the path, or else by the header; empty where there is none."""
    if "session_id" in request.path_params:
        return wire.session(request.path_params["session_id"], "session_id")
    value = request.headers.get("x-session-id", "")
    return wire.session(value, "X-Session-Id") if value else ""


async def _complete(gen: Generation) -> None:
    await gen.start()
    async for _ in gen.deltas():
        pass
    await gen.finish()


class EventStream:
    """A started generation as server-sent events; an ASGI application."""

    def __init__(self, gen: Generation) -> None:
        self._gen = gen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(self._pump(send), receive)
        finally:
            await self._gen.close()

    async def _pump(self, send: Send) -> None:
        gen = self._gen
        names = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
        }
        raw = [(k.lower().encode(), v.encode("latin-1")) for k, v in (names | render.headers(gen)).items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        await _send(send, render.events(dumps(chunk) for chunk in render.first_chunks(gen)))
        try:
            async for delta in gen.deltas():
                if chunk := render.delta_chunk(gen, delta):
                    await _send(send, render.events((dumps(chunk),)))
            await gen.finish()
            last = render.events([*map(dumps, render.last_chunks(gen)), _DONE])
        except Exception as e:  # noqa: BLE001  the status is already sent: the error can only be an event
            log.error("a stream broke: %s", type(e).__name__)
            await gen.close()
            last = render.events((dumps(problem(e).body()),))
        await _send(send, last, more=False)


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of the work, which is cancelled where the client leaves first: ClientDisconnect."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
    if not task.cancelled():
        return task.result()
    raise ClientDisconnect


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
