"""Builds the memory of a server, or of its store alone, and shows its figures.

What is remembered can be looked at and forgotten whether memory is on or off; requests are given it only where it is
on. A memory that was made with another model is refused, loudly, and serving goes on without it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Gauge

from gradatim.app import compose
from gradatim.app.remembered import Remembered
from gradatim.config import Config
from gradatim.errors import ConfigError, ForeignMemoryError
from gradatim.memory.decisions import CURSOR, DecisionMemory
from gradatim.memory.key_space import KeySpace, Turn, sentence
from gradatim.memory.notes import noted
from gradatim.memory.session_folder import SessionFolder
from gradatim.memory.token_folders import TokenFolders
from gradatim.store import SqlShelf, SqlStore
from gradatim.types import Adapter, AdapterId, Message, Request, Shown, Stage, Step

if TYPE_CHECKING:
    from gradatim.engine.transformers import TransformersEngine
    from gradatim.memory.follow import Follower
    from gradatim.memory.retrieval import Retrieval
    from gradatim.memory.sessions import SessionStore
    from gradatim.memory.tokens import TokenMemory
    from gradatim.nn.base import Base
    from gradatim.nn.render import Renderer
    from gradatim.nn.sentences import SentenceEncoder
    from gradatim.protocols import Recollection

log = logging.getLogger(__name__)
_SHOWN = {
    "gradatim_memory_entries": "what is remembered",
    "gradatim_memory_active": "entries of the current epochs",
    "gradatim_memory_bytes": "of keys and entries, in the server process",
    "gradatim_memory_recalls": "requests that looked into the memory",
    "gradatim_memory_steered": "answers that it had a part in",
    "gradatim_memory_shown": "requests that earlier answers were shown in the prompt of",
    "gradatim_memory_notes": "pinned notes",
    "gradatim_memory_retired": "entries that some weights know by themselves",
    "gradatim_memory_helped": "good answers that an entry was for",
    "gradatim_memory_harmed": "bad answers that an entry was for",
    "gradatim_memory_written": "entries written or changed since the start",
    "gradatim_memory_tokens": "entries of the token memory",
    "gradatim_memory_token_bytes": "of the token memory, in the server process",
    "gradatim_memory_retrieved": "share of the tokens drawn since the start that the token memory had a part in",
    "gradatim_memory_lambda": "its mean part in those",
    "gradatim_memory_damaged": "keys that could not be read and are made anew",
    "gradatim_memory_sessions": "conversations that can be gone on from",
    "gradatim_memory_session_tokens": "that those in the server process hold, in the window and beyond it",
    "gradatim_memory_session_bytes": "of sessions",
    "gradatim_memory_session_attended": "tokens drawn while something lay beyond the window",
    "gradatim_memory_session_reread": "sessions whose tokens were read anew because other weights answered",
    "gradatim_memory_session_evicted": "sessions that went to stay within the bounds",
    "gradatim_memory_session_failed": "answers that their session could not keep, or sessions lost on disk",
}


class MemoryPrompter:
    """Implements ``protocols.Prompter``: notes of ``kept``, what ``retrieval`` finds, and where ``placer`` puts a
    request, where there are such."""

    def __init__(
        self, kept: DecisionMemory, retrieval: Retrieval | None = None, placer: TextPlacer | None = None
    ) -> None:
        self._kept, self._retrieval, self._placer = kept, retrieval, placer

    def noted(self, messages: Sequence[Message], user: str) -> Sequence[Message]:
        return noted(messages, self._kept.notes.of(self._kept.tenant(user)))

    async def place(self, request: Request, recollection: Recollection) -> None:
        if self._placer is not None:
            recollection.situate(await self._placer.of(request.messages, request.prompt))

    async def show(
        self, messages: Sequence[Message], recollection: Recollection, adapter_id: AdapterId
    ) -> Shown | None:
        if self._retrieval is None:
            return None
        return await self._retrieval.show(messages, recollection, adapter_id)


class TextPlacer:
    """Where a sentence encoder puts what is asked, whatever the model makes of it."""

    def __init__(self, encoder: SentenceEncoder, renderer: Renderer) -> None:
        self._encoder, self._renderer = encoder, renderer

    async def of(self, messages: Sequence[Message] | None, prompt: str | Sequence[int] | None) -> NDArray[np.float32]:
        """(D,) of the last message, or of the prompt where there is none."""
        from gradatim.nn.sentences import asked_in

        text = prompt if isinstance(prompt, str) else self._renderer.decode(prompt or ())
        return await asyncio.to_thread(self._encoder.vector, asked_in(messages, text))

    async def step(self, step: Step, _: AdapterId) -> NDArray[np.float32]:
        """The same of one that was answered: by what the request had, its messages or else its prompt."""
        return await self.of(step.messages, None if step.messages else step.prompt_ids)


@dataclass(frozen=True, slots=True)
class Remembering:
    """``on`` is None where requests go without memory; ``kept`` is what is on the shelf, on or off."""

    kept: DecisionMemory
    on: DecisionMemory | None = None
    follower: Follower | None = None
    tokens: TokenMemory | None = None
    prompter: MemoryPrompter | None = None
    sessions: SessionStore | None = None
    folder: SessionFolder | None = None  # of sessions, on or off

    @property
    def admin(self) -> Remembered:
        """What an operator asks."""
        return Remembered(self.kept, self.sessions, self.folder)

    def close(self) -> None:
        """Write to disk what saves work at the next start."""
        if self.sessions is not None:
            self.sessions.write()
        if self.tokens is not None:
            self.tokens.write()


def open_kept(config: Config, store: SqlStore, space: KeySpace[Turn]) -> DecisionMemory:
    """What is remembered, whatever model it was made with; ``space`` is that of the one that is served."""
    return DecisionMemory(SqlShelf(store.engines), config.memory, space, folders=token_folders(config), looked_at=True)


def open_admin(config: Config, store: SqlStore) -> Remembered:
    """The same, with the sessions that lie on disk."""
    made_of = next((adapter.base_sha256 for _, adapter in store.read(Adapter, limit=1)), "")
    return Remembered(open_kept(config, store, KeySpace(made_of, "", (), Turn())), None, session_folder(config))


def session_folder(config: Config) -> SessionFolder:
    return SessionFolder(Path(config.data_dir) / "memory" / "sessions")


def token_folders(config: Config) -> TokenFolders:
    return TokenFolders(Path(config.data_dir) / "memory" / "tokens")


def build_memory(config: Config, store: SqlStore, base: Base, engine: TransformersEngine) -> Remembering:
    """StoreError; ConfigError where no session would fit."""
    judged = _judged_memory(config, store, base, engine)
    return replace(judged, sessions=_sessions(config, base, engine), folder=session_folder(config))


def _sessions(config: Config, base: Base, engine: TransformersEngine) -> SessionStore | None:
    """None where it is off."""
    if engine.beyond is None:
        return None
    from gradatim.memory.sessions import SessionStore
    from gradatim.nn.render import Renderer

    beyond, settings = engine.beyond, config.memory
    if beyond.session_bytes > settings.attention_bytes:
        raise ConfigError(
            f"memory.attention_bytes = {settings.attention_bytes} holds no session: one of {beyond.window} tokens in "
            f"the window (engine.max_context_tokens) and {settings.attention_tokens} beyond it "
            f"(memory.attention_tokens) takes {beyond.session_bytes}"
        )
    return SessionStore(
        session_folder(config),
        settings,
        base_sha256=base.sha256,
        tokenizer_sha256=Renderer(base).digest(),
        space=f"{base.dtype} {beyond.window}",
    )


def _judged_memory(config: Config, store: SqlStore, base: Base, engine: TransformersEngine) -> Remembering:
    from gradatim.nn.render import Renderer
    from gradatim.nn.sentences import SentenceEncoder

    renderer = Renderer(base)
    layers = compose.key_layers(config, base)
    space = KeySpace(base.sha256, renderer.digest(), layers, Turn(max(1, len(layers))))
    if not (config.memory.decisions or config.memory.tokens or config.memory.retrieval):
        return _off(open_kept(config, store, space))
    placer = None
    if config.memory.encoder and (config.memory.decisions or config.memory.retrieval):
        encoder = SentenceEncoder(config.memory.encoder)
        space, placer = replace(space, pooling=sentence(encoder.sha256)), TextPlacer(encoder, renderer)
    from gradatim.memory.follow import Follower
    from gradatim.memory.retrieval import Retrieval
    from gradatim.memory.tell import Teller

    tokens = _token_memory(config, base, space.tokenizer_sha256)
    try:
        memory = DecisionMemory(
            SqlShelf(store.engines), config.memory, space, tokens=tokens, folders=token_folders(config)
        )
    except ForeignMemoryError as e:
        log.critical("memory stays off: %s", e)
        return _off(open_kept(config, store, space))
    if not store.cursor(CURSOR) and not memory.stats()["entries"]:
        memory.start_from(store.end())
    for adapter_id in store.stages(config.name, Stage.LIVE):
        for _, adapter in store.newest(Adapter, id=adapter_id):
            memory.expect(adapter_id, adapter.sha256)
    if tokens is not None:
        engine.attach(tokens)
    reward_model, credit = compose.build_judges(config, store, read_only=True)
    follower = Follower(
        memory,
        store,
        reward_model=reward_model,
        credit=credit,
        tokenizer=renderer,
        place=engine.key if placer is None else placer.step,
        teller=None if tokens is None else Teller(memory, tokens, store, engine.states),
        rewards=config.reward,
    )
    retrieval = Retrieval(memory, engine, store, renderer, config.memory) if config.memory.retrieval else None
    return Remembering(memory, memory, follower, tokens, MemoryPrompter(memory, retrieval, placer))


def _off(kept: DecisionMemory) -> Remembering:
    """Pinned notes are told all the same."""
    return Remembering(kept, prompter=MemoryPrompter(kept))


def _token_memory(config: Config, base: Base, tokenizer_sha256: str) -> TokenMemory | None:
    """None where it is off."""
    from gradatim.memory.knn_gate import TEMPERATURE, near_gate
    from gradatim.memory.knn_lm import NEIGHBOURS, KnnLm
    from gradatim.memory.public_space import public_space
    from gradatim.memory.shipped import shipped
    from gradatim.memory.tokens import TokenMemory

    layer, settings = compose.token_layer(config, base), config.memory
    if layer is None:
        return None
    found = shipped(base.sha256, tokenizer_sha256, layer)
    space = found[0] if found else public_space(base, layer, Path(config.data_dir) / "memory")
    trained_with = (settings.neighbours, settings.temperature) == (NEIGHBOURS, TEMPERATURE)
    gate = found[1].lambdas if found and trained_with else near_gate
    knn = KnnLm(gate, k=settings.neighbours, sure=settings.sure, temperature=settings.temperature)
    vocabulary = base.model.config.get_text_config().vocab_size
    return TokenMemory(space, knn, vocabulary=vocabulary, max_tokens=settings.max_tokens, folders=token_folders(config))


def show_figures(remembering: Remembering, registry: CollectorRegistry) -> None:
    """As metrics; one says whether it is on."""
    memory = remembering.admin

    def reader(name: str) -> Callable[[], float]:
        return lambda: float(memory.stats().get(name.removeprefix("gradatim_memory_"), 0.0))

    Gauge("gradatim_memory_on", "1 where requests are given a memory", registry=registry).set(bool(remembering.on))
    for name, help_text in _SHOWN.items():
        Gauge(name, help_text, registry=registry).set_function(reader(name))
