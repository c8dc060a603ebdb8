"""Which episode a request belongs to: the one its client names, the one it continues, or a new one.

*Prefix chaining*, for clients that name none: a chat request continues an episode when its messages begin with an
earlier request's messages and the answer to it. Each answer's digest over all that came before it (its chain key)
is kept, in memory for the newest and in the store for all; a request looks up the digest of every prefix that ends
in an assistant message. Two episodes that are equal word for word up to the same point cannot be told apart this
way, and the newer one is continued: such clients should send a session id.

Knows nothing of adapters or of what an episode is for.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import uuid
from collections import OrderedDict
from collections.abc import Sequence

from gradatim.errors import StoreError
from gradatim.protocols import Store
from gradatim.server.wire import Call
from gradatim.types import EpisodeId, Message

log = logging.getLogger("gradatim.server")
REMEMBERED = 65536  # chain keys in memory, about 200 bytes each
STORE_LOOKUPS = 4  # newest prefixes of one request that are looked up in the store


class Chain:
    """The running digest of one request's messages, and of each prefix that ends in an assistant message."""

    def __init__(self, messages: Sequence[Message], user: str) -> None:
        self._digest = hashlib.sha256(json.dumps(user).encode())
        self.prefixes: list[str] = []  # oldest first
        for message in messages:
            self._digest.update(_canonical(message["role"], message["content"]))
            if message["role"] == "assistant":
                self.prefixes.append(self._digest.hexdigest())

    def key(self, answer: str) -> str:
        """What a request must begin with to continue after this answer."""
        digest = self._digest.copy()
        digest.update(_canonical("assistant", answer))
        return digest.hexdigest()


def _canonical(role: str, text: str) -> bytes:
    """An answer's outer white space does not count: many clients strip it before they send it back."""
    return json.dumps([role, text.strip() if role == "assistant" else text], ensure_ascii=False).encode()


class Episodes:
    """Finds the episode of each request. For one event loop."""

    def __init__(self, store: Store, remembered: int = REMEMBERED) -> None:
        self._store = store
        self._remembered = remembered
        self._known: OrderedDict[str, EpisodeId | None] = OrderedDict()  # None: looked up, and not in the store

    async def find(self, call: Call, chain: Chain | None, session_id: str) -> EpisodeId:
        """A named session is its own episode id; else one of the session of its user that it goes on from; else what
        the messages continue; else a new one."""
        if session_id or call.session_id:
            return EpisodeId(session_id or call.session_id)
        if call.reads_on:
            whose = json.dumps([call.user, call.reads_on])
            return EpisodeId(f"session-{hashlib.sha256(whose.encode()).hexdigest()[:32]}")
        found = await self._continued(chain.prefixes) if chain else None
        return found or EpisodeId(f"ep-{uuid.uuid4().hex}")

    def remember(self, chain_key: str, episode_id: EpisodeId | None) -> None:
        self._known[chain_key] = episode_id
        self._known.move_to_end(chain_key)
        if len(self._known) > self._remembered:
            self._known.popitem(last=False)

    async def _continued(self, prefixes: Sequence[str]) -> EpisodeId | None:
        for key in reversed(prefixes):
            if known := self._known.get(key):
                return known
        unknown = [key for key in prefixes[-STORE_LOOKUPS:] if key not in self._known]
        if not unknown:
            return None
        try:
            found = await asyncio.to_thread(self._look_up, unknown)
        except StoreError as e:  # an episode is cut in two rather than a request failed
            log.warning("episode lookup failed: %s", e)
            return None
        for key, episode_id in found.items():
            self.remember(key, self._known.get(key) or episode_id)
        return next(filter(None, found.values()), None)

    def _look_up(self, keys: Sequence[str]) -> dict[str, EpisodeId | None]:
        """From the newest key to the first that the store knows."""
        found: dict[str, EpisodeId | None] = {}
        for key in reversed(keys):
            step = self._store.step(chain_key=key)
            found[key] = step.episode_id if step else None
            if step:
                break
        return found
