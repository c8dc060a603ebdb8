"""Continuous batching (Orca, Yu 2022, OSDI): requests join and leave the running batch at every step.

One thread owns the model. Each step takes one token from every row that decodes and a bounded chunk of the prompts
that are being read, in one forward pass, so that a long prompt does not hold up running streams (chunked prefill,
Agrawal 2023, arXiv:2308.16369). It knows nothing of files, chat templates or the wire.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from threading import Condition, Thread

import torch
from torch import Tensor

from gradatim.engine.attention import Segment
from gradatim.engine.batch import Batch, Row
from gradatim.engine.beyond import Beyond
from gradatim.engine.generation import Generation, StateReader, make_choices
from gradatim.engine.mixing import mixed_in
from gradatim.engine.outbox import Outbox
from gradatim.engine.prefix import PrefixCache
from gradatim.engine.runner import Runner
from gradatim.engine.sampling import draw
from gradatim.engine.sessions import FarRows, is_gone
from gradatim.errors import EngineError, OverloadedError, SessionError
from gradatim.nn.render import Renderer
from gradatim.protocols import TokenMixer
from gradatim.types import Blend, Started

logger = logging.getLogger(__name__)

STEP_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_PROMPT_TOKENS = {"cpu": (64, 512), "cuda": (1024, 8192)}  # read in one step: while others decode, and alone
_IDLE_CAPACITY = 1024  # positions; more than that is given back when nothing runs


class Scheduler:
    """The worker thread, its queue and its batch."""

    def __init__(
        self,
        runner: Runner,
        renderer: Renderer,
        eos_ids: frozenset[int],
        *,
        prefix_cache_tokens: int,
        max_queue: int,
        threads: int,
        ended: Callable[[Generation], None],
        beyond: Beyond | None = None,
    ) -> None:
        self._runner, self._renderer, self._eos_ids = runner, renderer, eos_ids
        self._prefix = PrefixCache(prefix_cache_tokens)
        self._max_queue, self._threads, self._ended = max_queue, threads, ended
        self.token_memory: TokenMixer | None = None
        self._batch = Batch(runner.cache)
        self._far = FarRows(runner.cache, beyond)
        self._open: dict[Generation, int] = {}  # how many of its choices have not ended
        self._wake = Condition()
        self._waiting: deque[Generation] = deque()
        self._commands: deque[Callable[[], None]] = deque()
        self._closed = False
        self._outbox = Outbox()
        self._counts: Counter[str] = Counter()
        self._step_s = 0.0
        self._buckets = [0] * len(STEP_BUCKETS_S)
        self._thread = Thread(target=self._run, name="gradatim-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------ called by other threads

    def submit(self, generation: Generation) -> None:
        """OverloadedError where the queue is full, EngineError where the engine was closed."""
        with self._wake:
            if self._closed:
                raise EngineError("the engine is closed")
            if len(self._waiting) + len(self._open) >= self._max_queue:
                raise OverloadedError(f"{self._max_queue} requests are waiting or running; try again later")
            self._waiting.append(generation)
            self._wake.notify()

    def cancel(self, generation: Generation) -> None:
        with self._wake:
            generation.cancelled = True
            self._wake.notify()

    def call(self, function: Callable[[], None]) -> Future[None]:
        """Run it on the worker thread, between two steps."""
        done: Future[None] = Future()

        def command() -> None:
            try:
                function()
            except Exception as e:  # noqa: BLE001 - it is raised again where the result is asked for
                done.set_exception(e)
            else:
                done.set_result(None)

        with self._wake:
            if self._closed:
                raise EngineError("the engine is closed")
            self._commands.append(command)
            self._wake.notify()
        return done

    def drop_prefixes(self, key: str) -> None:
        """Forget cached prefixes of an adapter before the next step; does not wait."""
        with self._wake:
            self._commands.append(lambda: self._prefix.drop(key))

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def stats(self) -> Mapping[str, float]:
        within = zip(STEP_BUCKETS_S, self._buckets, strict=True)
        steps = {f"steps_within_{1000 * le:.0f}ms": float(n) for le, n in within}
        return {
            "running": float(len(self._open)),
            "waiting": float(len(self._waiting)),
            "rows": float(len(self._batch)),
            "prefix_cache_tokens": float(self._prefix.tokens),
            "step_seconds_sum": self._step_s,
            **{
                name: float(self._counts[name])
                for name in ("steps", "generated_tokens", "prompt_tokens", "prefix_hit_tokens", "aborted", "failed")
            },
            "memory_failed": float(self._counts["memory_failed"]),
            **steps,
        }

    # ---------------------------------------------------------------------------------- the worker thread

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while self._await_work():
            try:
                self._leave_cancelled()
                self._admit()
                self._step()
                if not self._batch and self._runner.cache.capacity > _IDLE_CAPACITY:
                    self._runner.cache.release()
            except Exception:  # the process boundary of the engine: what is running fails, the thread goes on
                logger.exception("an engine step failed; its requests fail with it")
                self._fail(list(self._open), "the engine failed in this step; its log says why")
            self._outbox.deliver()
        self._fail([*self._open, *self._waiting], "the engine was closed")
        self._waiting.clear()
        self._outbox.deliver()

    def _await_work(self) -> bool:
        """Run commands; wait until there is something to do. False once closed."""
        while True:
            with self._wake:
                while not (self._closed or self._commands or self._waiting or self._batch):
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
                if self._closed and not commands:
                    return False
            for command in commands:
                command()
            if self._waiting or self._batch:
                return True

    def _leave_cancelled(self) -> None:
        self._fail([g for g in self._open if is_gone(g.reading)], SessionError("the session was forgotten meanwhile"))
        for generation in [g for g in self._open if g.cancelled]:
            self._counts["aborted"] += 1
            self._end(generation)
        with self._wake:
            gone = [g for g in self._waiting if g.cancelled]
            for generation in gone:
                self._waiting.remove(generation)
        for generation in gone:
            self._ended(generation)

    def _admit(self) -> None:
        while self._waiting and len(self._batch) + self._waiting[0].sampling.n <= self._runner.cache.slots:
            with self._wake:
                generation = self._waiting.popleft()
                self._open[generation] = generation.sampling.n
            self._begin(generation, self._batch.add(make_choices(generation, self._renderer, self._eos_ids)))

    def _begin(self, generation: Generation, first: Row) -> None:
        """Restore what is known of the prompt; at least its last token is read, for its logits."""
        try:
            self._batch.reserve(self._far.held(first))
            self._far.begin(first)
            if not first.read:
                self._restore(generation, first)
        except RuntimeError:
            logger.exception("no memory for a prompt that is known")
            self._fail([generation], "not enough memory for this prompt")
            return
        self._counts["prompt_tokens"] += len(generation.prompt_ids)
        self._outbox.put(generation, Started(prompt_ids=generation.prompt_ids, cached_tokens=first.read))

    def _restore(self, generation: Generation, first: Row) -> None:
        """What the prefix cache has, up to what a memory is to look at, which is read whether it is cached or not."""
        last = len(generation.prompt_ids) - 1
        ids = generation.prompt_ids[: min(last, generation.reread_from, self._far.room(first))]
        self._batch.reserve(self._prefix.match(generation.prefix_key, ids))
        first.length = self._prefix.restore(generation.prefix_key, ids, self._runner.cache, first.slot)
        self._counts["prefix_hit_tokens"] += first.length

    def _step(self) -> None:
        rows, segments = self._plan()
        if not rows:
            return
        started_s = time.perf_counter()
        self._forward(rows, segments)
        self._observe(time.perf_counter() - started_s)

    def _observe(self, seconds: float) -> None:
        self._counts["steps"] += 1
        self._step_s += seconds
        for i, bound in enumerate(STEP_BUCKETS_S):
            self._buckets[i] += seconds <= bound

    def _plan(self) -> tuple[Sequence[Row], Sequence[Segment]]:
        rooms, stuck = self._far.rooms(self._batch.rows)
        self._fail(list(dict.fromkeys(row.generation for row in stuck)), "not enough memory for what leaves the window")
        rows = self._batch.rows[: self._batch.decoding]
        segments = [row.next(row.choice.ids[-1:]) for row in rows]
        reading = [r for r in self._batch.rows[self._batch.decoding :] if r.reads]
        beside, alone = _PROMPT_TOKENS.get(self._runner.device.type, _PROMPT_TOKENS["cpu"])
        share = max(1, (beside if rows else alone) // max(1, len(reading)))
        for row in reading:
            prompt = row.generation.prompt_ids
            end = min(len(prompt), row.read + min(share, rooms[row]))
            segments.append(row.next(prompt[row.read : end], end == len(prompt)))
        return rows + reading, self._far.reach(rows + reading, segments)

    def _forward(self, rows: Sequence[Row], segments: Sequence[Segment]) -> None:
        try:
            self._batch.reserve(max(s.start + len(s.ids) for s in segments))
            logits = self._runner.forward(segments, self._batch.decoding)
        except RuntimeError as e:  # torch's own, out of memory among them
            if len(rows) == 1:
                logger.exception("a forward pass failed")
                self._fail([rows[0].generation], f"the model's forward pass failed ({type(e).__name__})")
                return
            logger.warning("a forward pass of %d rows failed (%s); each is tried alone", len(rows), type(e).__name__)
            self._one_by_one(rows, segments)
            return
        self._advance(rows, segments, logits)

    def _one_by_one(self, rows: Sequence[Row], segments: Sequence[Segment]) -> None:
        """Find the row that breaks the step: a decoding row is its own one-token chunk."""
        for row, segment in zip(rows, segments, strict=True):
            if row.generation not in self._open:
                continue
            alone = replace(segment, slot=row.slot)  # which may be another one by now
            try:
                self._batch.reserve(segment.start + len(segment.ids))
                logits = self._runner.forward([alone], 0)
            except RuntimeError as e:
                logger.exception("a forward pass of one row failed")
                self._fail([row.generation], f"the model's forward pass failed ({type(e).__name__})")
                continue
            self._advance([row], [alone], logits)

    def _advance(self, rows: Sequence[Row], segments: Sequence[Segment], logits: Tensor) -> None:
        """Count what was read, begin the choices of finished prompts, draw a token for each row with logits."""
        self._look(rows, segments)
        drawing: list[Row] = []
        pick: list[int] = []  # which of the logits each one draws from
        ends: list[int] = []  # and which token of the pass they are predicted at
        at, end = 0, -1
        for row, segment in zip(rows, segments, strict=True):
            row.length += len(segment.ids)
            end += len(segment.ids)
            if not segment.wants_logits:
                continue
            for each in self._finish_prompt(row) if row.reads else [row]:
                drawing.append(each)
                pick.append(at)
                ends.append(end)
            at += 1
        if not drawing:
            return
        if len(pick) != at:
            logits = logits[torch.tensor(pick, device=logits.device)]
        self._draw(drawing, ends, logits)

    def _draw(self, drawing: Sequence[Row], ends: Sequence[int], logits: Tensor) -> None:
        """A token for each row, of the model's logits (M, V) and what memories add to them."""
        blends: Mapping[int, Blend] = {}
        states = self._runner.token_states()
        if self.token_memory is not None and states is not None:
            asked = {row.generation for row in drawing if row.generation.recollection is not None}
            blends = mixed_in(self.token_memory, [row.generation for row in drawing], states, ends, logits)
            self._counts["memory_failed"] += sum(generation.memory_failed for generation in asked)
        self._remember(drawing, logits)
        drawn = draw(logits, [row.choice.draws for row in drawing])
        for i, (row, token) in enumerate(zip(drawing, drawn, strict=True)):
            if row.generation not in self._open:
                continue  # another of its choices failed
            if token is None:
                self._fail_not_finite(row.generation)
                continue
            delta = row.choice.take(token, blends[i].own(token.id, token.logprob) if i in blends else None)
            self._counts["generated_tokens"] += 1
            self._outbox.put(row.generation, delta)
            if delta.finish_reason:
                self._finish(row)

    def _look(self, rows: Sequence[Row], segments: Sequence[Segment]) -> None:
        """Show the states of prompts that were read to the requests that have a memory."""
        if not any(row.reads and row.generation.recollection is not None for row in rows):
            return
        states, late, at = self._runner.states(), self._runner.token_states(), 0  # (N, H)
        for row, segment in zip(rows, segments, strict=True):
            end = at + len(segment.ids)
            if row.reads and states is not None:
                row.generation.look(states[at:end], row.read)
            if row.reads and late is not None and isinstance(row.generation.recollection, StateReader):
                row.generation.recollection.read(late[at:end], row.read)
            at = end

    def _remember(self, drawing: Sequence[Row], logits: Tensor) -> None:
        """What memories add to the next tokens of the rows that have one."""
        for i, row in enumerate(drawing):
            if row.generation.recollection is not None:
                row.generation.lean(row.choice, logits[i])
                self._counts["memory_failed"] += row.generation.memory_failed

    def _finish_prompt(self, row: Row) -> list[Row]:
        """The prompt is read: remember it, hand it to the further choices, and let them all decode."""
        generation = row.generation
        generation.situate()
        self._counts["memory_failed"] += generation.memory_failed
        if row.whole:
            self._prefix.insert(generation.prefix_key, generation.prompt_ids, self._runner.cache, row.slot)
        started = self._batch.start(row)
        self._far.start(started)
        return started

    # ------------------------------------------------------------------------------------------- endings

    def _finish(self, row: Row) -> None:
        """One choice is complete."""
        generation = row.generation
        if row.whole:
            fed = (*generation.prompt_ids, *row.choice.ids)[: row.length]
            self._prefix.insert(generation.prefix_key, fed, self._runner.cache, row.slot)
        self._far.finish(row)
        self._batch.remove(row)
        self._open[generation] -= 1
        if not self._open[generation]:
            self._end(generation)

    def _end(self, generation: Generation) -> None:
        for row in self._batch.of(generation):
            self._batch.remove(row)
        with self._wake:
            known = self._open.pop(generation, None) is not None
        if known:
            self._ended(generation)

    def _fail(self, generations: Sequence[Generation], reason: str | SessionError) -> None:
        for generation in generations:
            self._counts["failed"] += 1
            self._outbox.put(generation, EngineError(reason) if isinstance(reason, str) else reason)
            if generation in self._open:
                self._end(generation)
            else:
                self._ended(generation)

    def _fail_not_finite(self, generation: Generation) -> None:
        self._fail(
            [generation], f"{generation.adapter_id} gave numbers that are not finite: roll back to an earlier adapter"
        )
        self._prefix.drop(generation.prefix_key)
        self._batch.scrub()
