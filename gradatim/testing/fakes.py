"""Fakes of the seams, for tests of whatever stands on them: an engine that recites, a router, a store in memory.

They keep the contracts of ``protocols`` (the store passes ``gradatim.testing.store``) and can be told to be slow or
to break. They know no model, no database and no wire.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Self, TypeVar

from gradatim.errors import ConflictError, PromptTooLongError, StoreError, TransitionError, UnknownAdapterError
from gradatim.types import (
    ON_THE_WAY,
    TRANSITIONS,
    Adapter,
    AdapterId,
    Case,
    Delta,
    Episode,
    EpisodeId,
    Feedback,
    Move,
    Record,
    Request,
    Route,
    Stage,
    Started,
    Step,
    StepId,
    Token,
    Verdict,
)

R = TypeVar("R", bound=Record)
_WORD = re.compile(r"\s*\S+\s*")
# what a store can compare, of the kinds that have it
_COLUMNS = frozenset({"id", "episode_id", "step_id", "adapter_id", "chain_key", "parent_id", "name"})
_COLUMNS |= {"source", "gate", "state", "skill", "user"}


def fake_tokens(text: str) -> tuple[Token, ...]:
    """One token a word, white space included; equal words have equal ids."""
    return tuple(
        Token(id=fake_id(word), text=word, logprob=-0.25, top=((fake_id(word), word, -0.25), (7, "other", -1.75)))
        for word in _WORD.findall(text)
    )


def fake_id(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "big")


class FakeEngine:
    """Recites ``answer``, a word at a time, for any request; choice i > 0 adds its number as a last word.

    ``delay_s`` goes before every word. ``refuse`` is raised before the first event, ``break_after`` words raise
    ``broken_by``. A prompt of more than ``context`` words is too long. ``aborted`` counts generations closed early.
    """

    def __init__(
        self,
        answer: str | Callable[[Request], str] = "The quick brown fox",
        *,
        adapters: Iterable[str] = ("agent@0",),
        delay_s: float = 0.0,
        refuse: Exception | None = None,
        break_after: int | None = None,
        broken_by: Exception | None = None,
        context: int = 4096,
    ) -> None:
        self.answer = answer
        self.delay_s = delay_s
        self.refuse = refuse
        self.break_after = break_after
        self.broken_by = broken_by or RuntimeError("the fake engine was told to break")
        self.context = context
        self.aborted = 0
        self.drawn = 0  # words given out so far, over all requests
        self.requests: list[tuple[Request, AdapterId]] = []
        self._loaded = {AdapterId(adapter) for adapter in adapters}

    async def generate(self, request: Request, adapter_id: AdapterId) -> AsyncIterator[Started | Delta]:
        self.requests.append((request, adapter_id))
        prompt_ids = self.prompt_ids(request)
        self._admit(prompt_ids, adapter_id)
        done = False
        try:
            yield Started(prompt_ids=prompt_ids, cached_tokens=len(prompt_ids) // 2)
            for count, delta in enumerate(self._deltas(request)):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if count == self.break_after:
                    raise self.broken_by
                self.drawn += 1
                yield delta
            done = True
        finally:
            self.aborted += not done

    def _admit(self, prompt_ids: tuple[int, ...], adapter_id: AdapterId) -> None:
        if self.refuse is not None:
            raise self.refuse
        if adapter_id not in self._loaded:
            raise UnknownAdapterError(f"{adapter_id} is not loaded")
        if len(prompt_ids) >= self.context:
            raise PromptTooLongError(f"the prompt has {len(prompt_ids)} tokens, the context window {self.context}")

    def _deltas(self, request: Request) -> list[Delta]:
        """The choices' words in turn, as a batch would bring them; each choice ends with a delta of its own."""
        text = self.answer if isinstance(self.answer, str) else self.answer(request)
        sampling = request.sampling
        queues = [_deltas(text if i == 0 else f"{text} {i}", i, request) for i in range(sampling.n)]
        longest = max(map(len, queues))
        return [queue[at] for at in range(longest) for queue in queues if at < len(queue)]

    def prompt_ids(self, request: Request) -> tuple[int, ...]:
        if isinstance(request.prompt, tuple):
            return request.prompt
        text = request.prompt or "".join(f"{m['role']}: {m['content']}\n" for m in request.messages or ())
        return tuple(token.id for token in fake_tokens(text))

    async def load(self, adapter: Adapter) -> None:
        self._loaded.add(adapter.id)

    async def unload(self, adapter_id: AdapterId) -> None:
        self._loaded.discard(adapter_id)

    def loaded(self) -> frozenset[AdapterId]:
        return frozenset(self._loaded)

    def stats(self) -> Mapping[str, float]:
        return {"running": 0.0, "generations": float(len(self.requests))}


def _deltas(text: str, index: int, request: Request) -> list[Delta]:
    sampling = request.sampling
    stops = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
    tokens = fake_tokens(text[: min(stops)] if stops else text)
    limit = sampling.max_tokens or len(tokens)
    if not sampling.top_logprobs:
        tokens = tuple(replace(token, top=()) for token in tokens)
    out = [Delta(index=index, text=token.text, tokens=(token,)) for token in tokens[:limit]]
    return [*out, Delta(index=index, finish_reason="length" if len(tokens) > limit else "stop")]


class FakeRouter:
    """``NAME`` is ``live``; ``NAME@STEP`` of ``known`` is pinned; all else is unknown."""

    def __init__(self, live: str = "agent@0", known: Iterable[str] = ("agent@0",)) -> None:
        self.live = AdapterId(live)
        self.known = {AdapterId(adapter) for adapter in known} | {self.live}

    async def route(self, model: str, episode_id: EpisodeId) -> Route:
        if model == self.live.partition("@")[0]:
            return Route(adapter_id=self.live, adapter_sha256=fake_sha256(self.live), stage="live")
        if model in self.known:
            return Route(adapter_id=AdapterId(model), adapter_sha256=fake_sha256(model), stage="pinned")
        raise UnknownAdapterError(f"the model {model!r} does not exist")


def fake_sha256(adapter_id: str) -> str:
    return hashlib.sha256(adapter_id.encode()).hexdigest()


class FakeStore:
    """A store in memory. ``broken`` makes every write fail; ``slow_s`` delays when a write is durable."""

    def __init__(self) -> None:
        self.broken: Exception | None = None
        self.slow_s = 0.0
        self._lock = threading.RLock()
        self._log: list[Record] = []  # position i + 1
        self._cursors: dict[str, int] = {}
        self._stages: dict[AdapterId, Stage] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    # --------------------------------------------------------------------------------------------- writing

    def submit(self, *records: Record, cursors: Mapping[str, int] | None = None) -> Future[int]:
        future: Future[int] = Future()
        try:
            position = self.append(*records, cursors=cursors)
        except StoreError as e:
            future.set_exception(e)
            return future
        if self.slow_s:
            threading.Timer(self.slow_s, future.set_result, (position,)).start()
        else:
            future.set_result(position)
        return future

    def append(self, *records: Record, cursors: Mapping[str, int] | None = None) -> int:
        with self._transaction():
            position = max([self._write(record) for record in records], default=len(self._log))
            self._cursors.update(cursors or {})
            return position

    def move(self, *moves: Move, verdicts: Sequence[Verdict] = (), cursors: Mapping[str, int] | None = None) -> None:
        with self._transaction():
            before = {adapter.name for adapter in self._live()}
            self._log += verdicts
            for move in sorted(moves, key=lambda move: move.after in (Stage.LIVE, *ON_THE_WAY)):
                self._change(move)
            if before - {adapter.name for adapter in self._live()}:
                raise TransitionError("nothing would be live")
            self._cursors.update(cursors or {})

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            if self.broken is not None:
                raise StoreError(f"not written: {self.broken}") from self.broken
            length, cursors, stages = len(self._log), dict(self._cursors), dict(self._stages)
            try:
                yield
            except BaseException:
                del self._log[length:]
                self._cursors, self._stages = cursors, stages
                raise

    def _write(self, record: Record) -> int:
        if isinstance(record, Move):
            raise StoreError("a stage is changed by move(), not by appending a Move")
        if isinstance(record, Feedback | Step | Adapter) and (position := self._known(record)):
            return position
        self._log.append(record)
        if isinstance(record, Adapter):
            after = Stage.CANDIDATE if record.step else Stage.LIVE
            self._refuse_second(record.id, after)
            self._stages[record.id] = after
            self._log.append(
                Move(adapter_id=record.id, created_at=record.created_at, before=None, after=after, actor="store")
            )
        return len(self._log)

    def _known(self, record: Feedback | Step | Adapter) -> int:
        """The position of an equal record; 0 where it must be written. ConflictError."""
        found = self._find(type(record), {"id": record.id})
        if not found:
            parent = record.parent_id if isinstance(record, Adapter) else None
            if parent is not None and parent not in self._stages:
                raise StoreError(f"{record.id} cannot be registered before its parent")
            return 0
        position, newest = found[-1]
        if isinstance(record, Feedback):
            assert isinstance(newest, Feedback)
            if newest.target != record.target:
                raise ConflictError(f"feedback {record.id} was already given for another target")
            return position if replace(record, created_at=newest.created_at) == newest else 0
        if newest != record:
            raise ConflictError(f"{record.id} was already stored with other contents")
        return position

    def _live(self) -> list[Adapter]:
        adapters = [record for record in self._log if isinstance(record, Adapter)]
        return [adapter for adapter in adapters if self._stages.get(adapter.id) is Stage.LIVE]

    def _change(self, move: Move) -> None:
        stage = self._stages.get(move.adapter_id)
        if stage is None or move.before is not stage or move.after not in TRANSITIONS[stage]:
            raise TransitionError(f"{move.adapter_id} may not move from {stage} to {move.after}")
        self._refuse_second(move.adapter_id, move.after)
        self._stages[move.adapter_id] = move.after
        self._log.append(move)

    def _refuse_second(self, adapter_id: AdapterId, after: Stage) -> None:
        taken = (Stage.LIVE,) if after is Stage.LIVE else ON_THE_WAY if after in ON_THE_WAY else ()
        name = adapter_id.rpartition("@")[0]
        for other, stage in self.stages(name).items():
            if stage in taken and other != adapter_id:
                raise TransitionError(f"{adapter_id} cannot become {after}: {other} is {stage}")

    # --------------------------------------------------------------------------------------------- reading

    def read(self, kind: type[R], *, after: int = 0, limit: int = 1000, **where: str) -> Sequence[tuple[int, R]]:
        with self._lock:
            return self._find(kind, self._comparable(kind, where), after)[: max(0, limit)]

    def newest(self, kind: type[R], *, before: int = 0, limit: int = 1, **where: str) -> Sequence[tuple[int, R]]:
        with self._lock:
            found = self._find(kind, self._comparable(kind, where))
            return [row for row in reversed(found) if before <= 0 or row[0] < before][: max(0, limit)]

    def _comparable(self, kind: type[R], where: Mapping[str, str]) -> Mapping[str, str]:
        known = {field.name for field in fields(kind)} & _COLUMNS
        if unknown := where.keys() - known:
            raise StoreError(f"{kind.__name__} has no index on {', '.join(sorted(unknown))}")
        return where

    def _find(self, kind: type[R], where: Mapping[str, str], after: int = 0) -> list[tuple[int, R]]:
        after = max(0, after)
        return [
            (position, record)
            for position, record in enumerate(self._log[after:], after + 1)
            if isinstance(record, kind) and all(getattr(record, name) == value for name, value in where.items())
        ]

    def episode(self, episode_id: EpisodeId) -> Episode | None:
        steps = tuple(step for _, step in self.read(Step, episode_id=episode_id))
        return Episode(id=episode_id, steps=steps) if steps else None

    def step(self, *, id: StepId | None = None, chain_key: str | None = None) -> Step | None:
        if not (id or chain_key):
            return None
        with self._lock:
            found = self._find(Step, {"id": id} if id else {"chain_key": chain_key or ""})
        return found[-1][1] if found else None

    def cases(self, *, after: int = 0, limit: int = 100) -> Sequence[Case]:
        with self._lock:
            newest = {feedback.episode_id: at for at, feedback in self._find(Feedback, {})}
            heads = sorted((at, episode_id) for episode_id, at in newest.items() if at > after)
            return [self._case(at, episode_id) for at, episode_id in heads[:limit]]

    def _case(self, position: int, episode_id: EpisodeId) -> Case:
        feedback = [record for _, record in self._find(Feedback, {"episode_id": episode_id})]
        opinions = {opinion.id: opinion for opinion in feedback}.values()
        return Case(
            position=position,
            episode=self.episode(episode_id) or Episode(id=episode_id, steps=()),
            feedback=tuple(opinion for opinion in opinions if not opinion.retracted),
            touched_at=feedback[-1].created_at,
        )

    def cursor(self, name: str) -> int:
        return self._cursors.get(name, 0)

    def stages(self, name: str, *among: Stage) -> Mapping[AdapterId, Stage]:
        with self._lock:
            own = {adapter: stage for adapter, stage in self._stages.items() if adapter.rpartition("@")[0] == name}
        return {adapter: stage for adapter, stage in own.items() if not among or stage in among}
