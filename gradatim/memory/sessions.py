"""What conversations have read beyond the model's window, kept for the request that goes on from it.

One session a name and tenant, in this process; files let them outlive it. Bounded by number, tokens and bytes; the
least recently used goes first. Keys and values are those of the weights that read them: where others answer, the
session's tokens are read anew, and that is said. It knows no engine, and of requests only who asks.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gradatim.config import MemoryConfig
from gradatim.errors import SessionError, StoreError, UnknownSessionError
from gradatim.memory.key_space import difference, made_with
from gradatim.memory.session_file import read_session, write_session
from gradatim.memory.session_folder import About, SessionFolder
from gradatim.nn.session import Session
from gradatim.types import EpisodeId

log = logging.getLogger(__name__)
_WRITE_EVERY_S = 30.0
Key = tuple[str, str]  # tenant and id


@dataclass(slots=True, eq=False)
class _Held:
    about: About
    weights: str = ""  # that read it
    session: Session | None = None  # None: it lies on disk, or nothing was read yet
    size_bytes: int = 0
    tokens: int = 0
    reading: _Reading | None = None  # the request that has it
    unwritten: bool = False

    @property
    def begun(self) -> bool:
        return bool(self.weights)


class _Reading:
    """Implements ``protocols.OpenReading``. Used by the engine's thread, and by its owner around that."""

    def __init__(
        self, sessions: SessionStore, held: _Held | None, weights: str, before: Session | None, scope: str
    ) -> None:
        self.held, self.weights, self.before, self.scope = held, weights, before, scope
        self.wanted = held is not None
        self.forgotten = self.closed = False
        self.known = self.reread = 0  # tokens that it goes on from, and how many of them are read anew
        self._sessions = sessions
        self._told: dict[str, Any] = {}

    def keep(self, session: Session) -> None:
        self._sessions.keep(self, session)

    def tell(self, kept: int, attended: int, share: float) -> None:
        self._told = {"kept": kept, "attended": attended, "share": share}
        self._sessions.counts["attended"] += attended

    def fail(self) -> None:
        self._sessions.counts["failed"] += 1

    def trace(self) -> Mapping[str, Any]:
        if not self._told:
            return {}
        if self.held is None:
            return self._told
        return {"session": self.held.about.id, "before": self.known, "reread": self.reread, **self._told}

    def close(self) -> None:
        self._sessions.close(self)


class SessionStore:
    """Implements ``protocols.Sessions``. ``space`` says what else than the adapter its keys depend on: the width of
    numbers, the window. Safe to use from any thread."""

    def __init__(
        self,
        folder: SessionFolder,
        config: MemoryConfig,
        *,
        base_sha256: str,
        tokenizer_sha256: str,
        space: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._folder, self._config, self._clock, self._space = folder, config, clock, space
        self._base, self._tokenizer = base_sha256, tokenizer_sha256
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # taken before the other
        self._held: dict[Key, _Held] = {}
        self._load()

    # ------------------------------------------------------------------------------------------ requests

    def open(
        self,
        user: str,
        session_id: str,
        adapter_sha256: str,
        *,
        episode_id: EpisodeId,
        scope: str = "",
        must_exist: bool = False,
    ) -> _Reading:
        """See ``protocols.Sessions``."""
        weights = f"{adapter_sha256} {self._space}"
        if not session_id:
            return _Reading(self, None, weights, None, scope)
        key = (user if self._config.tenants == "user" else "", session_id)
        with self._lock:
            held = self._held.get(key)
            if must_exist and (held is None or not held.begun):
                raise UnknownSessionError(
                    f"there is no session {session_id!r} to go on from: it never was, or it was evicted or forgotten"
                )
            if held is None:
                about = About(tenant=key[0], id=key[1], base_sha256=self._base, tokenizer_sha256=self._tokenizer)
                held = self._held[key] = _Held(replace(about, scope=scope))
            if held.reading is not None:
                raise SessionError(f"another request has session {session_id!r}: wait for its answer")
            reading = held.reading = _Reading(self, held, weights, None, held.about.scope)
            held.about.users.add(user)
            held.about.episodes.add(episode_id)
        try:
            reading.before = self._before(reading, held)
        except UnknownSessionError:
            self.close(reading)
            if must_exist:
                raise
            return self.open(user, session_id, adapter_sha256, episode_id=episode_id, scope=scope)
        return reading

    def _before(self, reading: _Reading, held: _Held) -> Session | None:
        """What the request goes on from: of other weights, the tokens alone."""
        if not held.begun:
            return None
        if held.session is None:
            held.session = self._read(held)
        reading.known = len(held.session.ids)
        if held.weights == reading.weights:
            return held.session
        reading.reread = reading.known
        self.counts["reread"] += 1
        log.warning(
            "session %r was read by other weights (%s) than answer now (%s): its last %d tokens are read anew",
            held.about.id,
            held.weights[:12],
            reading.weights[:12],
            reading.reread,
        )
        return Session([], ids=held.session.ids)

    def _read(self, held: _Held) -> Session:
        """From disk. A file that is not sound is left aside: UnknownSessionError."""
        try:
            return read_session(self._folder.path(held.about.tenant, held.about.id), held.weights)
        except StoreError as e:
            log.error("session %r is lost: %s", held.about.id, e)
            self.counts["damaged"] += 1
            with self._lock:
                held.weights, held.size_bytes, held.tokens = "", 0, 0
            raise UnknownSessionError(f"session {held.about.id!r} could not be read from disk: begin anew") from e

    def keep(self, reading: _Reading, session: Session) -> None:
        """See ``protocols.Reading``."""
        with self._lock:
            held = reading.held
            if held is None or reading.closed or reading.forgotten:
                return
            held.session, held.weights, held.unwritten = session, reading.weights, True
            held.size_bytes, held.tokens = session.bytes_held, session.local + session.remembered
            held.about = replace(held.about, used_at=self._clock())
            self._evict()

    def close(self, reading: _Reading) -> None:
        """See ``protocols.OpenReading``."""
        with self._lock:
            held = reading.held
            if held is None or reading.closed:
                return
            reading.closed = True
            if held.reading is reading:
                held.reading = None
            if not held.begun and self._held.get(_key(held)) is held:
                del self._held[_key(held)]
            self._evict()

    def _evict(self) -> None:
        """Within the bounds, but for what requests have."""
        idle = sorted((h for h in self._held.values() if h.reading is None), key=lambda h: h.about.used_at)
        sizes = Counter(tenant for tenant, _ in self._held)
        total = sum(held.size_bytes for held in self._held.values())
        for held in idle:
            over = sizes[held.about.tenant] > self._config.attention_sessions
            if over or total > self._config.attention_bytes:
                del self._held[_key(held)]
                sizes[held.about.tenant] -= 1
                total -= held.size_bytes
                self.counts["evicted"] += 1
                self._remove(held)

    def _remove(self, held: _Held) -> None:
        try:
            self._folder.remove(self._folder.path(*_key(held)))
        except StoreError as e:  # it is found at the next start, and goes then
            log.error("%s", e)

    # ---------------------------------------------------------------------------------------- forgetting

    def forget(self, scope: str, value: str) -> int:
        """Sessions of a tenant, a user or an episode, of that name, or all: gone by the next token, for good; a request
        that has one ends. How many. StoreError where a file cannot be removed."""
        with self._lock:
            gone = {key for key, held in self._held.items() if held.about.concerns(scope, value)}
            for held in [self._held.pop(key) for key in gone]:
                if held.reading is not None:
                    held.reading.forgotten = True
        with self._writing:
            return len(gone | self._folder.forget(scope, value))

    # ---------------------------------------------------------------------------------------------- disk

    async def watch(self) -> None:
        """Write what is new to disk now and then."""
        while True:
            await asyncio.sleep(_WRITE_EVERY_S)
            await asyncio.to_thread(self.write)

    def write(self) -> None:
        """All that is new, now. A disk that refuses is counted: serving goes on."""
        with self._writing:
            for key, held in list(self._held.items()):
                if held.unwritten:
                    self._write(key, held)

    def _write(self, key: Key, held: _Held) -> None:
        with self._lock:
            session, weights, header, held.unwritten = held.session, held.weights, held.about.header(), False
        if session is None:
            return
        try:
            write_session(session, self._folder.path(*key), weights, header)
        except StoreError as e:
            held.unwritten = True
            self.counts["unwritten"] += 1
            log.error("%s", e)
        with self._lock:
            if self._held.get(key) is not held:  # it went while it was written
                self._remove(held)

    def _load(self) -> None:
        self._folder.tidy()
        for path, about, weights in self._folder.all():
            theirs = made_with(about.base_sha256, about.tokenizer_sha256)
            if said := difference(str(path), theirs, made_with(self._base, self._tokenizer)):
                self.counts["foreign"] += 1
                log.critical("%s: it is left aside", said)
                continue
            size = path.stat().st_size
            self._held[about.tenant, about.id] = _Held(about, weights, size_bytes=size)
        with self._lock:
            self._evict()

    # ------------------------------------------------------------------------------------------- looking

    def stats(self) -> dict[str, float]:
        with self._lock:
            begun = [held for held in self._held.values() if held.begun]
        return {
            "sessions": len(begun),
            "session_tokens": sum(held.tokens for held in begun),
            "session_bytes": sum(held.size_bytes for held in begun),
            **{f"session_{name}": self.counts[name] for name in _COUNTED},
        }


_COUNTED = ("attended", "reread", "evicted", "failed", "unwritten", "damaged")


def _key(held: _Held) -> Key:
    return held.about.tenant, held.about.id
