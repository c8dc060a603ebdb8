"""Continuous batching (Orca, Yu 2022, OSDI): requests join and leave the running batch at every step.

One thread owns the model. Each step takes one token from every row that decodes and a bounded chunk of the prompts
that are being read, in one forward pass, so that a long prompt does not hold up running streams (chunked prefill,
Agrawal 2023, arXiv:2308.16369). It knows nothing of files, chat templates or the wire.

Row slots: 0..D-1 decode, D..R-1 read their prompt or wait for the one that reads it for them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition, Thread

import torch
from torch import Tensor

from gradatim.engine.attention import Segment
from gradatim.engine.generation import Choice, Event, Generation, StateReader, make_choices
from gradatim.engine.mixing import mixed_in
from gradatim.engine.prefix import PrefixCache
from gradatim.engine.runner import Runner
from gradatim.engine.sampling import draw
from gradatim.errors import EngineError, OverloadedError
from gradatim.nn.render import Renderer
from gradatim.protocols import TokenMixer
from gradatim.types import Started

logger = logging.getLogger(__name__)

STEP_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_PROMPT_TOKENS = {"cpu": (64, 512), "cuda": (1024, 8192)}  # read in one step: while others decode, and alone
_IDLE_CAPACITY = 1024  # positions; more than that is given back when nothing runs


@dataclass(slots=True, eq=False)
class Row:
    """One sequence with keys and values in a slot."""

    choice: Choice
    slot: int
    length: int = 0  # tokens whose keys and values are in the slot
    siblings: Sequence[Row] = ()  # of the row that reads the prompt: the further choices, which copy it
    reads: bool = False  # its own prompt

    @property
    def generation(self) -> Generation:
        return self.choice.generation


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
    ) -> None:
        self._runner, self._renderer, self._eos_ids = runner, renderer, eos_ids
        self._prefix = PrefixCache(prefix_cache_tokens)
        self._max_queue, self._threads, self._ended = max_queue, threads, ended
        self.token_memory: TokenMixer | None = None
        self._rows: list[Row] = []  # by slot
        self._decoding = 0  # D
        self._open: dict[Generation, int] = {}  # how many of its choices have not ended
        self._wake = Condition()
        self._waiting: deque[Generation] = deque()
        self._commands: deque[Callable[[], None]] = deque()
        self._closed = False
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[Generation, Event]]] = {}
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
            "rows": float(len(self._rows)),
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
                if not self._rows and self._runner.cache.capacity > _IDLE_CAPACITY:
                    self._runner.cache.release()
            except Exception:  # the process boundary of the engine: what is running fails, the thread goes on
                logger.exception("an engine step failed; its requests fail with it")
                self._fail(list(self._open), "the engine failed in this step; its log says why")
            self._deliver()
        self._fail([*self._open, *self._waiting], "the engine was closed")
        self._waiting.clear()
        self._deliver()

    def _await_work(self) -> bool:
        """Run commands; wait until there is something to do. False once closed."""
        while True:
            with self._wake:
                while not (self._closed or self._commands or self._waiting or self._rows):
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
                if self._closed and not commands:
                    return False
            for command in commands:
                command()
            if self._waiting or self._rows:
                return True

    def _leave_cancelled(self) -> None:
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
        while self._waiting and len(self._rows) + self._waiting[0].sampling.n <= self._runner.cache.slots:
            with self._wake:
                generation = self._waiting.popleft()
                self._open[generation] = generation.sampling.n
            choices = make_choices(generation, self._renderer, self._eos_ids)
            rows = [Row(choice, len(self._rows) + i) for i, choice in enumerate(choices)]
            self._rows.extend(rows)
            first = rows[0]
            first.reads, first.siblings = True, rows[1:]
            self._begin(generation, first)

    def _begin(self, generation: Generation, first: Row) -> None:
        """Restore what is cached of the prompt; at least its last token is read, for its logits."""
        ids = generation.prompt_ids[: self._reread_from(generation)]
        known = self._prefix.match(generation.prefix_key, ids)
        try:
            self._reserve(known)
            first.length = self._prefix.restore(generation.prefix_key, ids, self._runner.cache, first.slot)
        except RuntimeError:
            logger.exception("no memory for a cached prompt")
            self._fail([generation], "not enough memory for this prompt")
            return
        self._counts["prefix_hit_tokens"] += first.length
        self._counts["prompt_tokens"] += len(generation.prompt_ids)
        self._send(generation, Started(prompt_ids=generation.prompt_ids, cached_tokens=first.length))

    def _reread_from(self, generation: Generation) -> int:
        """What a memory is to look at is read, whether it is cached or not."""
        last = len(generation.prompt_ids) - 1
        return last if generation.recollection is None else min(last, generation.turn[0])

    def _reserve(self, positions: int) -> None:
        self._runner.cache.reserve(positions, [row.length for row in self._rows])

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

    def _plan(self) -> tuple[list[Row], list[Segment]]:
        rows = self._rows[: self._decoding]
        segments = [Segment(r.slot, r.length, r.choice.ids[-1:], r.generation.lora_slot) for r in rows]
        reading = [r for r in self._rows[self._decoding :] if r.reads]
        beside, alone = _PROMPT_TOKENS.get(self._runner.device.type, _PROMPT_TOKENS["cpu"])
        share = max(1, (beside if rows else alone) // max(1, len(reading)))
        for row in reading:
            prompt = row.generation.prompt_ids
            end = min(len(prompt), row.length + share)
            ids = prompt[row.length : end]
            segments.append(Segment(row.slot, row.length, ids, row.generation.lora_slot, end == len(prompt)))
        return rows + reading, segments

    def _forward(self, rows: Sequence[Row], segments: Sequence[Segment]) -> None:
        try:
            self._reserve(max(s.start + len(s.ids) for s in segments))
            logits = self._runner.forward(segments, self._decoding)
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
            alone = Segment(row.slot, segment.start, segment.ids, segment.lora_slot, segment.wants_logits)
            try:
                self._reserve(segment.start + len(segment.ids))
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

    def _draw(self, drawing: Sequence[Row], ends: Sequence[int], own: Tensor) -> None:
        """A token for each row; ``own`` (M, V) are the model's logits."""
        logits, changed = own, frozenset[int]()
        states = self._runner.token_states()
        if self.token_memory is not None and states is not None:
            asked = {row.generation for row in drawing if row.generation.recollection is not None}
            logits, changed = mixed_in(self.token_memory, [row.generation for row in drawing], states, ends, own)
            self._counts["memory_failed"] += sum(generation.memory_failed for generation in asked)
        self._remember(drawing, logits)
        drawn = draw(logits, [row.choice.draws for row in drawing])
        for i, (row, token) in enumerate(zip(drawing, drawn, strict=True)):
            if row.generation not in self._open:
                continue  # another of its choices failed
            if token is None:
                self._fail_not_finite(row.generation)
                continue
            delta = row.choice.take(token, float(own[i, token.id] - own[i].logsumexp(-1)) if i in changed else None)
            self._counts["generated_tokens"] += 1
            self._send(row.generation, delta)
            if delta.finish_reason:
                self._finish(row)

    def _look(self, rows: Sequence[Row], segments: Sequence[Segment]) -> None:
        """Show the states of prompts that were read to the requests that have a memory."""
        if not any(row.reads and row.generation.recollection is not None for row in rows):
            return
        states, late, at = self._runner.states(), self._runner.token_states(), 0  # (N, H)
        for row, segment in zip(rows, segments, strict=True):
            if row.reads:
                row.generation.look(states[at : at + len(segment.ids)], segment.start)
                if late is not None and isinstance(row.generation.recollection, StateReader):
                    row.generation.recollection.read(late[at : at + len(segment.ids)], segment.start)
            at += len(segment.ids)

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
        self._prefix.insert(generation.prefix_key, generation.prompt_ids, self._runner.cache, row.slot)
        started = [row, *row.siblings]
        for other in row.siblings:
            self._runner.cache.copy(row.slot, other.slot, row.length)
            other.length = row.length
        row.reads, row.siblings = False, ()
        for each in started:
            self._swap(each.slot, self._decoding)
            self._decoding += 1
        return started

    # --------------------------------------------------------------------------------------------- slots

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        first, second = self._rows[a], self._rows[b]
        self._runner.cache.swap(a, b, max(first.length, second.length))
        self._rows[a], self._rows[b] = second, first
        first.slot, second.slot = b, a

    def _remove(self, row: Row) -> None:
        """Free its slot, with the last rows taking the places that become empty."""
        row.length = 0
        if row.slot < self._decoding:
            self._move_last_into(row, self._decoding - 1)
            self._decoding -= 1
        self._move_last_into(row, len(self._rows) - 1)
        self._rows.pop()

    def _move_last_into(self, hole: Row, last: int) -> None:
        """Exchange a row that holds nothing with another, copying one way only."""
        if hole.slot == last:
            return
        other = self._rows[last]
        self._runner.cache.copy(last, hole.slot, other.length)
        self._rows[hole.slot], self._rows[last] = other, hole
        hole.slot, other.slot = last, hole.slot

    # ------------------------------------------------------------------------------------------- endings

    def _finish(self, row: Row) -> None:
        """One choice is complete."""
        generation = row.generation
        fed = (*generation.prompt_ids, *row.choice.ids)[: row.length]
        self._prefix.insert(generation.prefix_key, fed, self._runner.cache, row.slot)
        self._remove(row)
        self._open[generation] -= 1
        if not self._open[generation]:
            self._end(generation)

    def _end(self, generation: Generation) -> None:
        for row in [r for r in self._rows if r.generation is generation]:
            self._remove(row)
        with self._wake:
            known = self._open.pop(generation, None) is not None
        if known:
            self._ended(generation)

    def _fail(self, generations: Sequence[Generation], reason: str) -> None:
        for generation in generations:
            self._counts["failed"] += 1
            self._send(generation, EngineError(reason))
            if generation in self._open:
                self._end(generation)
            else:
                self._ended(generation)

    def _fail_not_finite(self, generation: Generation) -> None:
        self._fail(
            [generation], f"{generation.adapter_id} gave numbers that are not finite: roll back to an earlier adapter"
        )
        self._prefix.drop(generation.prefix_key)
        self._runner.cache.scrub([row.length for row in self._rows])

    def _send(self, generation: Generation, event: Event) -> None:
        self._outbox.setdefault(generation.loop, []).append((generation, event))

    def _deliver(self) -> None:
        """One call into each event loop for everything a step brought."""
        outbox, self._outbox = self._outbox, {}
        for loop, events in outbox.items():
            try:
                loop.call_soon_threadsafe(_put_all, events)
            except RuntimeError:  # that loop is closed: its callers are gone
                for generation, _ in events:
                    generation.cancelled = True


def _put_all(events: Sequence[tuple[Generation, Event]]) -> None:
    for generation, event in events:
        generation.events.put_nowait(event)
