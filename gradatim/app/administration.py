"""What an operator may see and do: the Admin that a server is given. With a server it acts on its traffic at once.

Knows the store and the moves; knows nothing of HTTP, and decides nothing itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradatim.app import report
from gradatim.config import Config
from gradatim.errors import GradatimError
from gradatim.release.traffic import approve, promote, reject, rollback
from gradatim.store import SqlStore
from gradatim.types import AdapterId, Move, Stage

log = logging.getLogger(__name__)


class Administration:
    """``loop`` tells how the loop process is; ``turn_to`` returns once the server follows the stages as they are."""

    def __init__(
        self, config: Config, store: SqlStore, *, loop: Callable[[], Mapping[str, Any]], turn_to: Callable[[], None]
    ) -> None:
        self._config, self._store, self._loop, self._turn_to = config, store, loop, turn_to
        self._latencies = report.Latencies(store)

    def adapters(self) -> Sequence[Mapping[str, Any]]:
        self._follow()
        return report.adapters(self._store, self._config.name)

    def adapter(self, adapter_id: AdapterId) -> Mapping[str, Any] | None:
        self._follow()
        return report.adapter(self._store, self._config.name, adapter_id)

    def live(self) -> AdapterId | None:
        self._follow()
        return report.live_id(self._store, self._config.name)

    def status(self) -> Mapping[str, Any]:
        self._follow()
        told = report.learning(self._store, self._config)
        loop = dict(self._loop())
        return {
            "name": self._config.name,
            "model": self._config.model,
            **told,
            "drift": {"told": told["drift"], **loop.pop("drift", {})},
            "feedback_to_live_s": self._latencies.newest(),
            "loop": loop,
        }

    def rollback(self, adapter_id: AdapterId, *, actor: str, reason: str) -> Mapping[str, Any]:
        """Of a live or canary adapter: take it off users; after a live one, its newest ancestor that was live answers.
        Of an earlier one: take the live one off, and go back to this."""
        name = self._config.name
        stage = self._store.stages(name, Stage.LIVE, Stage.CANARY).get(adapter_id)
        if stage is Stage.CANARY:
            self._end_canary(adapter_id, actor, reason or "rolled back")
        else:
            to = None if stage is Stage.LIVE else adapter_id
            rollback(self._store, name, to, actor=actor, reason=reason)
        return self._now()

    def promote(self, adapter_id: AdapterId, *, actor: str, reason: str) -> Mapping[str, Any]:
        promote(self._store, self._config.name, adapter_id, actor=actor, reason=reason)
        return self._now()

    def approve(self, adapter_id: AdapterId, *, actor: str, reason: str) -> Mapping[str, Any]:
        return {"anchor": approve(self._store, self._config.name, adapter_id, actor=actor, reason=reason)}

    def reject(self, adapter_id: AdapterId, *, actor: str, reason: str) -> Mapping[str, Any]:
        reject(self._store, self._config.name, adapter_id, actor=actor, reason=reason)
        return {"rejected": adapter_id}

    def _end_canary(self, adapter_id: AdapterId, actor: str, reason: str) -> None:
        before, after = Stage.CANARY, Stage.ROLLED_BACK
        self._store.move(
            Move(adapter_id=adapter_id, created_at=time.time(), before=before, after=after, actor=actor, reason=reason)
        )

    def _follow(self) -> None:
        """What is reported live is what the next request gets, also in the moment after the loop promoted it."""
        try:
            self._turn_to()
        except GradatimError as e:  # counted and retried by the watch; the old one goes on answering
            log.warning("the stages could not be followed: %s", e)

    def _now(self) -> Mapping[str, Any]:
        """Durable first, then routed: when this returns, the next request goes to the adapter it names."""
        self._turn_to()
        return {"live": report.live_id(self._store, self._config.name)}
