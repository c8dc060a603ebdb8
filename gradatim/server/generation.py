"""One request from its acceptance to its record: the weights that answer, the tokens that come, the steps kept.

Capture never fails a request: a step that cannot be written within ``CAPTURE_BUDGET_S`` is counted as lost, the
answer goes out and says that it was not captured. Knows nothing of HTTP and of the answer's shape.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from time import perf_counter, time
from typing import Any

from gradatim.errors import EngineError, OverloadedError, PromptTooLongError, UnknownAdapterError
from gradatim.protocols import Engine, Memory, OpenReading, Prompter, Recollection, Router, Sessions, Store
from gradatim.scopes import scope_of
from gradatim.server.episodes import Chain, Episodes
from gradatim.server.health import Writes
from gradatim.server.metrics import Metrics
from gradatim.server.problems import ApiError
from gradatim.server.wire import Call
from gradatim.types import Delta, EpisodeId, Message, Request, Route, Shown, Started, Step, StepId

log = logging.getLogger("gradatim.server")
CAPTURE_BUDGET_S = 5.0
_ATTENTION = "attention"  # what the record tells of a session, beside what other memories did


@dataclass(slots=True)
class Choice:
    """What one of the n choices has become so far."""

    deltas: list[Delta] = field(default_factory=list)
    finish_reason: str = ""
    last_at: float = 0.0

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token.id for delta in self.deltas for token in delta.tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What a generation needs of the world."""

    engine: Engine
    store: Store
    router: Router
    episodes: Episodes
    metrics: Metrics
    writes: Writes
    max_queue: int
    blind: bool = False  # whoever rates an answer cannot tell which adapter gave it
    memory: Memory | None = None
    sessions: Sessions | None = None
    prompter: Prompter | None = None
    running: set[str] = field(default_factory=set)  # ids of the generations waiting or running


class Generation:
    """One accepted request. ``start``, then ``deltas`` to their end, then ``finish``; ``close`` in any case."""

    route: Route
    prompt_ids: tuple[int, ...] = ()
    cached_tokens: int = 0
    captured: bool = False
    memory: Mapping[str, Any] = {}

    def __init__(
        self, services: Services, call: Call, *, episode_id: EpisodeId, chain: Chain | None, side: bool
    ) -> None:
        self.id = f"{'chatcmpl' if call.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.call = call
        self.episode_id = episode_id
        self.created_at = time()
        self.choices = [Choice() for _ in range(call.request.sampling.n)]
        self._services = services
        self._chain = chain
        self._trainable = not side
        self._events: AsyncIterator[Started | Delta] | None = None
        self._recollection: Recollection | None = None
        self._reading: OpenReading | None = None
        self._messages: tuple[Message, ...] = call.messages  # with what is pinned
        self._scope = scope_of(call.messages)
        self._shown: Shown | None = None
        self._began_at = perf_counter()
        self._started = False
        self._finished = False

    @property
    def is_blind(self) -> bool:
        """Its answer must not say which adapter gave it. A pinned one was asked for by name."""
        return self._services.blind and self.route.stage != "pinned"

    async def start(self) -> None:
        """Choose the weights and wait until the engine accepts. Raises what Engine.generate and Router.route do."""
        services = self._services
        if len(services.running) >= services.max_queue:
            raise OverloadedError(f"{services.max_queue} requests are waiting or running; try again in a second")
        services.running.add(self.id)
        services.metrics.queue.set(len(services.running))
        try:
            started = await self._open()
        except UnknownAdapterError:
            started = await self._open()  # it was retired between routing and generating; what is live now answers
        self.prompt_ids, self.cached_tokens, self._started = started.prompt_ids, started.cached_tokens, True

    async def _open(self) -> Started:
        self.route = await self._services.router.route(self.call.model, self.episode_id)
        await self._read_on()
        self._recollection = self._recollect()
        request = self._noted()
        await self._place(request)
        if self._recollection is not None or self._reading is not None:
            request = replace(request, recollection=self._recollection, reading=self._reading)
        self._shown = await self._show()
        if self._shown is not None:
            try:
                return await self._begin(replace(request, messages=self._shown.messages))
            except PromptTooLongError:
                self._shown = None  # there is room for what was asked alone
        return await self._begin(request)

    async def _begin(self, request: Request) -> Started:
        self._events = self._services.engine.generate(request, self.route.adapter_id)
        event = await anext(self._events, None)
        if not isinstance(event, Started):
            raise EngineError("the engine did not begin with its prompt")
        return event

    async def _read_on(self) -> None:
        """Open what the request goes on from. SessionError, or ApiError where there is no such thing here."""
        self._stop_reading()
        sessions, call = self._services.sessions, self.call
        if sessions is not None:
            digest, episode_id = self.route.adapter_sha256, self.episode_id
            opening = asyncio.ensure_future(
                asyncio.to_thread(
                    sessions.open,
                    call.user,
                    call.reads_on,
                    digest,
                    episode_id=episode_id,
                    scope=self._scope,
                    must_exist=call.must_exist,
                )
            )
            try:
                self._reading = await asyncio.shield(opening)
                self._scope = self._reading.scope
            except asyncio.CancelledError:
                opening.add_done_callback(_close_opened)  # the client left: nobody else would
                raise
        elif call.reads_on:
            message = "gradatim.session is for servers with memory.attention, and this one has it off"
            raise ApiError(400, message, param="gradatim.session", code="unsupported_parameter")

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.close()

    def _noted(self) -> Request:
        """The request with what is pinned; pinned weights answer without it, and a session was told when it began."""
        request, prompter, self._messages = self.call.request, self._services.prompter, self.call.messages
        goes_on = self._reading is not None and self._reading.before is not None
        if prompter is None or request.messages is None or self.route.stage == "pinned" or goes_on:
            return request
        try:
            noted = tuple(prompter.noted(request.messages, self.call.user))
        except Exception:  # noqa: BLE001  the boundary to the memory: an answer without it is better than none
            self._without_memory()
            return request
        if noted == request.messages:
            return request
        self._messages = noted
        return replace(request, messages=noted)

    async def _place(self, request: Request) -> None:
        prompter = self._services.prompter
        if prompter is None or self._recollection is None:
            return
        try:
            await prompter.place(request, self._recollection)
        except Exception:  # noqa: BLE001  as above
            self._without_memory()

    async def _show(self) -> Shown | None:
        """What is shown once is not for a session, which would read on from it."""
        prompter = self._services.prompter
        if prompter is None or self._recollection is None or not self._messages or self.call.reads_on:
            return None
        try:
            return await prompter.show(self._messages, self._recollection, self.route.adapter_id)
        except PromptTooLongError:
            return None  # to read it a second time, that is
        except (OverloadedError, UnknownAdapterError):
            raise
        except Exception:  # noqa: BLE001  as above
            self._without_memory()
            return None

    def _recollect(self) -> Recollection | None:
        """None where there is no memory, and for pinned weights: they answer by themselves."""
        memory, route = self._services.memory, self.route
        if memory is None or route.stage == "pinned":
            return None
        try:
            return memory.recollect(self.call.user, route.adapter_id, route.adapter_sha256, self._scope)
        except Exception:  # noqa: BLE001  the boundary to the memory: an answer without it is better than none
            self._without_memory()
            return None

    def _without_memory(self) -> None:
        self._services.metrics.memory_failed.inc()
        log.exception("the memory failed; the answer goes on without it")
        self._recollection = None

    def _trace(self, choice: Choice) -> Mapping[str, Any]:
        """What memory did to it."""
        try:
            traced = {} if self._recollection is None else self._recollection.trace(choice.token_ids)
            return self._with_shown(traced, choice.token_ids)
        except Exception:  # noqa: BLE001  as above
            self._without_memory()
            return {}

    def _far(self) -> Mapping[str, Any]:
        """What lay beyond the window."""
        return {} if self._reading is None else self._reading.trace()

    def _with_shown(self, traced: Mapping[str, Any], answer: list[int]) -> Mapping[str, Any]:
        """With what was in its prompt, and which of that it repeats. The prompt that was read stands there too: that of
        the step is the one that is learned from."""
        if self._shown is None:
            return traced
        repeated = [entry.id for entry in self._shown.entries if list(entry.tokens) == answer]
        spoke_for = list(dict.fromkeys((*traced.get("for", ()), *repeated)))
        shown = {"retrieved": list(self._shown.told), "read_ids": list(self.prompt_ids), "for": spoke_for}
        return {**traced, **shown}

    async def deltas(self) -> AsyncIterator[Delta]:
        """The engine's deltas, kept as they pass. EngineError where it ends before every choice has."""
        assert self._events is not None, "start first"
        async for event in self._events:
            if isinstance(event, Delta):
                self._keep(event)
                yield event
        if not all(choice.finish_reason for choice in self.choices):
            raise EngineError("the engine stopped before the answer was complete")

    def _keep(self, delta: Delta) -> None:
        choice = self.choices[delta.index]
        choice.deltas.append(delta)
        choice.finish_reason = delta.finish_reason or ""
        if delta.tokens:
            now, metrics = perf_counter(), self._services.metrics
            if choice.last_at:
                metrics.per_token.observe((now - choice.last_at) / len(delta.tokens))
            elif delta.index == 0:
                metrics.ttft.observe(now - self._began_at)
            choice.last_at = now

    async def finish(self) -> None:
        """Record every choice, and wait until that is durable. ``captured`` says whether it is."""
        self._finished = True
        self._count("ok")
        self._stop_reading()
        await self._record()

    async def close(self) -> None:
        """Abort what still runs, and record what came until then. May be called at any time, and twice."""
        self._services.running.discard(self.id)
        self._services.metrics.queue.set(len(self._services.running))
        events, self._events = self._events, None
        if events is not None and (aclose := getattr(events, "aclose", None)):
            await aclose()
        self._stop_reading()
        if self._started and not self._finished:
            self._finished = True
            self._count("aborted")
            await self._record()

    @property
    def completion_tokens(self) -> int:
        return sum(len(delta.tokens) for choice in self.choices for delta in choice.deltas)

    def _count(self, outcome: str) -> None:
        metrics = self._services.metrics
        metrics.responses.labels(outcome).inc()
        metrics.tokens(prompt=len(self.prompt_ids), cached=self.cached_tokens, completion=self.completion_tokens)

    async def _record(self) -> None:
        steps = self._steps()
        self.memory = steps[0].memory
        self.captured = await self._capture(steps)
        if self._recollection is not None and self._services.memory is not None:
            steered = any(step.memory.keys() - {_ATTENTION} for step in steps)
            try:
                self._services.memory.answered(self._recollection, [step.id for step in steps], steered=steered)
            except Exception:  # noqa: BLE001  as above
                self._without_memory()

    def _steps(self) -> list[Step]:
        begun = [(i, choice) for i, choice in enumerate(self.choices) if i == 0 or choice.deltas]
        return [self._step(i, choice) for i, choice in begun]

    def _step(self, index: int, choice: Choice) -> Step:
        text = choice.text
        tokens = [token for delta in choice.deltas for token in delta.tokens]
        memory, far = self._trace(choice), self._far()
        drawn = tuple(t.logprob if t.drawn_logprob is None else t.drawn_logprob for t in tokens)
        complete = bool(choice.finish_reason)
        return Step(
            id=StepId(self.id if index == 0 else f"{self.id}:{index}"),
            episode_id=self.episode_id,
            created_at=self.created_at,
            adapter_id=self.route.adapter_id,
            adapter_sha256=self.route.adapter_sha256,
            stage=self.route.stage,
            propensity=self.route.propensity,
            messages=self._messages,
            prompt_ids=self.prompt_ids if self._shown is None else self._shown.prompt_ids,
            completion_ids=tuple(choice.token_ids),
            logprobs=tuple(t.logprob if t.model_logprob is None else t.model_logprob for t in tokens),
            text=text,
            finish_reason=choice.finish_reason or "aborted",
            sampling=_plain_sampling(self.call),
            user=self.call.user,
            skill=self.call.skill,
            trainable=self._trainable and complete and not (far.get("attended") or far.get("before")),
            chain_key=self._chain.key(text) if self._chain and complete else "",
            latency_s=perf_counter() - self._began_at,
            coin=self.route.coin,
            drawn_logprobs=drawn if memory else (),
            memory={**memory, _ATTENTION: far} if far else memory,
            scope=self._scope,
        )

    async def _capture(self, steps: list[Step]) -> bool:
        services = self._services
        for step in steps:
            if step.chain_key:
                services.episodes.remember(step.chain_key, step.episode_id)
        try:
            future = asyncio.wrap_future(_submitted(services.store.submit(*steps)))
            await asyncio.wait((future,), timeout=CAPTURE_BUDGET_S)
            if not future.done():
                raise TimeoutError(f"not durable within {CAPTURE_BUDGET_S:.0f} s")
            future.result()
        except Exception as e:  # noqa: BLE001  the boundary to the store: counted, and the answer says so
            services.metrics.lost.inc(len(steps))
            services.writes.failed(e)
            log.error("%d steps were not recorded: %s", len(steps), type(e).__name__)
            return False
        return True


def _close_opened(opening: asyncio.Future[OpenReading]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _submitted(future: Future[int]) -> Future[int]:
    """The same future, whose error is looked at even where nobody waits for it any more."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def _plain_sampling(call: Call) -> dict[str, Any]:
    s = call.request.sampling
    return {
        "max_tokens": s.max_tokens,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "n": s.n,
        "stop": list(s.stop),
        "seed": s.seed,
        "presence_penalty": s.presence_penalty,
        "frequency_penalty": s.frequency_penalty,
        "logit_bias": {str(token): bias for token, bias in s.logit_bias.items()},
    }
