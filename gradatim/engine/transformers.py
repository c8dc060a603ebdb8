"""The embedded engine: any transformers causal LM in this process, one worker thread, many adapters.

Implements ``protocols.Engine``. It knows nothing of HTTP, stages or the store.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import torch

from gradatim.config import EngineConfig
from gradatim.engine.adapters import BASE_SLOT, AdapterPool
from gradatim.engine.beyond import Beyond
from gradatim.engine.generation import Generation, KeyReader, StateReader
from gradatim.engine.runner import Runner
from gradatim.engine.scheduler import Scheduler
from gradatim.errors import AdapterError, EngineError, InvalidRequestError, OverloadedError, PromptTooLongError
from gradatim.nn.base import Base
from gradatim.nn.lora import read_adapter
from gradatim.nn.render import Renderer
from gradatim.protocols import Reading, TokenMixer
from gradatim.types import Adapter, AdapterId, Delta, Message, Request, Sampling, Started, Step

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_BASE_PREFIX = ""  # all names share what the base made


class TransformersEngine:
    """Continuous batching over a base model and its adapters.

    ``data_dir`` is what adapters' paths are relative to; ``max_queue`` bounds the requests waiting or running;
    ``key_layers`` are those whose input is the key of a memory (none: it cannot be asked), ``token_layer`` the one
    whose input is that of a token memory. ``attention_tokens`` (0: none) of each row are attended to beyond the
    window, within ``attention_bytes`` of all rows that run.
    ModelError where the embedded engine does not support the architecture.
    """

    def __init__(
        self,
        base: Base,
        renderer: Renderer,
        config: EngineConfig,
        data_dir: Path,
        *,
        max_queue: int = 256,
        key_layers: Sequence[int] = (),
        token_layer: int | None = None,
        attention_tokens: int = 0,
        attention_bytes: int = 0,
    ) -> None:
        self._base, self._renderer, self._config, self._data_dir = base, renderer, config, data_dir
        self._context_tokens = min(base.context_tokens, config.max_context_tokens or base.context_tokens)
        self._places = bool(key_layers)
        self._runner = Runner(base, config.max_batch, config.adapter_slots, key_layers, token_layer)
        self.beyond = (
            Beyond(
                self._runner.model,
                window=self._context_tokens,
                max_tokens=attention_tokens,
                max_bytes=attention_bytes,
            )
            if attention_tokens
            else None
        )
        self._pool = AdapterPool(config.adapter_slots, freed=self._forget)
        self._loading = Lock()
        self._scheduler = Scheduler(
            self._runner,
            renderer,
            base.eos_ids,
            prefix_cache_tokens=config.prefix_cache_tokens,
            max_queue=max_queue,
            threads=config.threads or max(1, (os.cpu_count() or 2) - 1),
            ended=self._ended,
            beyond=self.beyond,
        )

    async def generate(self, request: Request, adapter_id: AdapterId) -> AsyncIterator[Started | Delta]:
        """See ``protocols.Engine``. Besides, ValueError where the request cannot be rendered or sampled, and
        EngineError where the generation broke on its way."""
        generation = await self._submit(request, adapter_id, request.messages)
        async for event in self._events(generation):
            yield event

    async def key(self, step: Step, adapter_id: AdapterId) -> NDArray[np.float32]:
        """Where a memory would place a step that was answered before, under that adapter: its prompt is read again,
        in its turn among the others. Errors as of ``generate``."""
        reader = KeyReader()
        sampling = Sampling(max_tokens=1, temperature=0.0)
        request = Request(prompt=step.prompt_ids, sampling=sampling, recollection=reader)
        async for _ in self._events(await self._submit(request, adapter_id, step.messages)):
            pass
        if reader.key is None:
            raise EngineError("the prompt was read without its key: the log says why")
        return reader.key

    async def states(self, ids: Sequence[int], start: int, adapter_id: AdapterId) -> Tensor:
        """(len(ids) - start, H): what goes into the token layer where the tokens after positions ``start``, ... are
        predicted, under that adapter. Read in its turn among the requests. Errors as of ``generate``."""
        reader = StateReader(start=start)
        sampling = Sampling(max_tokens=1, temperature=0.0)
        request = Request(prompt=tuple(ids), sampling=sampling, recollection=reader)
        async for _ in self._events(await self._submit(request, adapter_id, None)):
            pass
        states = torch.cat(reader.states) if reader.states else torch.empty(0)
        if len(states) != len(ids) - start:
            raise EngineError("the tokens were read without their states: the log says why")
        return states

    def attach(self, memory: TokenMixer) -> None:
        """Let it be asked from the next draw on."""
        self._scheduler.token_memory = memory

    async def _events(self, generation: Generation) -> AsyncIterator[Started | Delta]:
        running = generation.sampling.n
        try:
            while running:
                event = await generation.events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Delta) and event.finish_reason:
                    running -= 1
                yield event
        finally:
            if running:
                self._scheduler.cancel(generation)

    async def load(self, adapter: Adapter) -> None:
        await asyncio.to_thread(self._load, adapter)

    async def unload(self, adapter_id: AdapterId) -> None:
        self._pool.unload(adapter_id)

    def loaded(self) -> frozenset[AdapterId]:
        return self._pool.loaded()

    def stats(self) -> Mapping[str, float]:
        """Gauges and counters for /metrics; ``steps_within_*`` are cumulative counts of steps by duration."""
        return {"adapters": float(len(self._pool.loaded())), **self._scheduler.stats()}

    def close(self) -> None:
        """End the worker thread; what runs fails with EngineError."""
        self._scheduler.close()

    async def _submit(self, request: Request, adapter_id: AdapterId, messages: Sequence[Message] | None) -> Generation:
        slot = self._pool.acquire(adapter_id)
        submitted, reserved = False, 0
        try:
            self._check(request.sampling)
            prompt_ids, known = await asyncio.to_thread(self._prompt_ids, request)
            reading, limit, reserved = self._bounds(request, len(prompt_ids), known)
            generation = Generation(
                prompt_ids,
                request.sampling,
                limit,
                adapter_id,
                slot,
                _BASE_PREFIX if slot == BASE_SLOT else adapter_id,
                asyncio.get_running_loop(),
                recollection=request.recollection,
                reading=reading,
                reserved=reserved,
            )
            if isinstance(request.recollection, StateReader):
                generation.reread_from = request.recollection.start
            elif request.recollection is not None and self._places:
                new = prompt_ids[known:]
                turn = await asyncio.to_thread(self._renderer.turn, new, None if known else messages)
                generation.turn = known + turn[0], known + turn[1]
                generation.reread_from = generation.turn[0]
            self._scheduler.submit(generation)
            submitted = True
        finally:
            if not submitted:
                self._pool.release(adapter_id)
                self._give_back(reserved)
        return generation

    def _ended(self, generation: Generation) -> None:
        self._pool.release(generation.adapter_id)
        self._give_back(generation.reserved)

    def _give_back(self, reserved: int) -> None:
        if self.beyond is not None:
            self.beyond.give_back(reserved)

    def _bounds(self, request: Request, prompt_tokens: int, known: int) -> tuple[Reading | None, int, int]:
        """What the request goes on from (None where it needs no more than the window), the tokens that each choice may
        have, and the bytes that are reserved for what leaves the window."""
        reading, sampling = request.reading, request.sampling
        wanted = reading is not None and reading.wanted
        fits = prompt_tokens + (sampling.max_tokens or 1) <= self._context_tokens
        if reading is not None and self.beyond is not None and (wanted or not fits):
            try:
                return reading, *self._far_bounds(self.beyond, reading, prompt_tokens, known, sampling)
            except (PromptTooLongError, OverloadedError):
                if wanted or prompt_tokens >= self._context_tokens:
                    raise  # else its answer ends with the window, as it would without memory
        return None, self._limit(prompt_tokens, sampling), 0

    def _far_bounds(
        self, beyond: Beyond, reading: Reading, prompt_tokens: int, known: int, sampling: Sampling
    ) -> tuple[int, int]:
        before = reading.before
        local, read = (0, 0) if before is None else (before.local, before.local + before.remembered)
        limit = beyond.limit(prompt_tokens - known, known, sampling.max_tokens)
        return limit, beyond.reserve(prompt_tokens - read, local, limit, sampling.n)

    def _check(self, sampling: Sampling) -> None:
        if not 1 <= sampling.n <= self._config.max_batch:
            raise InvalidRequestError(f"n = {sampling.n} is not in 1..{self._config.max_batch} (engine.max_batch)")
        vocabulary = self._base.model.config.get_text_config().vocab_size
        if any(not 0 <= i < vocabulary for i in sampling.logit_bias):
            raise InvalidRequestError(f"logit_bias names a token that is not in 0..{vocabulary - 1}")
        if sampling.max_tokens is not None and sampling.max_tokens < 1:
            raise InvalidRequestError("max_tokens must be at least 1")

    def _prompt_ids(self, request: Request) -> tuple[tuple[int, ...], int]:
        """All tokens that the answer comes after, and how many of them the session knows."""
        known = () if request.reading is None or request.reading.before is None else request.reading.before.ids
        if not known:
            return self._own_ids(request), 0
        if request.messages is not None:
            own = self._renderer.following_ids(request.messages, known[-1])
        else:
            own = self._renderer.more_ids(request.prompt) if isinstance(request.prompt, str) else self._own_ids(request)
        return (*known, *own), len(known)

    def _own_ids(self, request: Request) -> tuple[int, ...]:
        if request.messages is not None:
            return self._renderer.prompt_ids(request.messages)
        if isinstance(request.prompt, str):
            return self._renderer.text_ids(request.prompt)
        vocabulary = self._base.model.config.get_text_config().vocab_size
        ids = tuple(request.prompt or ())
        if not ids or any(not 0 <= i < vocabulary for i in ids):
            raise InvalidRequestError(f"a prompt of tokens needs at least one, each in 0..{vocabulary - 1}")
        return ids

    def _limit(self, prompt_tokens: int, sampling: Sampling) -> int:
        room = self._context_tokens - prompt_tokens
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {prompt_tokens} tokens, and the context window of {self._context_tokens} must hold "
                "the answer too: shorten the prompt"
            )
        return min(room, sampling.max_tokens or room)

    def _load(self, adapter: Adapter) -> None:
        if adapter.base_sha256 != self._base.sha256:
            raise AdapterError(
                f"{adapter.id} was made for base {adapter.base_sha256[:12]}, and this is {self._base.sha256[:12]}: "
                "serve the model it was trained on"
            )
        with self._loading:
            if self._pool.revive(adapter.id):
                return
            weights = read_adapter(self._data_dir / adapter.path, adapter.sha256)
            self._runner.lora.check(weights.modules)
            slot = self._pool.reserve()
            filled = False
            try:
                self._scheduler.call(lambda: self._runner.lora.put(slot, weights)).result()
                filled = True
            except RuntimeError as e:
                raise e if isinstance(e, EngineError) else AdapterError(f"no memory for {adapter.id}: {e}") from e
            finally:
                if not filled:
                    self._pool.give_back(slot)
            self._pool.publish(adapter.id, slot)

    def _forget(self, adapter_id: AdapterId) -> None:
        self._scheduler.drop_prefixes(adapter_id)
