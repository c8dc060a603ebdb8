"""What an operator sees of all that is remembered: what was judged, and what conversations have read.

Implements ``server.memory.MemoryAdmin``. It decides nothing: each part answers for itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradatim.memory.decisions import DecisionMemory
from gradatim.memory.notes import Notes
from gradatim.memory.session_folder import SessionFolder
from gradatim.types import MemoryEpoch

if TYPE_CHECKING:
    from gradatim.memory.sessions import SessionStore

SESSION = "session"  # as a scope: of every tenant that has one of that name


@dataclass(frozen=True, slots=True)
class Remembered:
    """``sessions`` is None where no conversation is kept; ``folder`` is where those of earlier runs lie."""

    judged: DecisionMemory
    sessions: SessionStore | None = None
    folder: SessionFolder | None = None

    def stats(self) -> Mapping[str, Any]:
        return {**self.judged.stats(), **({} if self.sessions is None else self.sessions.stats())}

    def show(self, *, tenant: str | None = None, step_id: str = "", limit: int = 100) -> Sequence[Mapping[str, Any]]:
        return self.judged.show(tenant=tenant, step_id=step_id, limit=limit)

    def check(self) -> Mapping[str, Any]:
        """And of the sessions on disk: what they were read with."""
        found = self.judged.check()
        sessions = [] if self.folder is None else self.folder.unusable(self.judged.made_with)
        return {**found, "ok": found["ok"] and not sessions, "unusable": [*found["unusable"], *sessions]}

    def compact(self) -> Mapping[str, Any]:
        return self.judged.compact()

    @property
    def notes(self) -> Notes:
        return self.judged.notes

    def epoch(self, tenant: str | None, *, actor: str, reason: str = "") -> MemoryEpoch:
        return self.judged.epoch(tenant, actor=actor, reason=reason)

    def undo_epoch(self, tenant: str | None) -> MemoryEpoch | None:
        return self.judged.undo_epoch(tenant)

    def forget(self, scope: str, value: str, *, actor: str, reason: str = "") -> Mapping[str, Any]:
        """Sessions first: they hold what was said itself. StoreError."""
        where = self.sessions or self.folder
        gone = where.forget(scope, value) if where is not None else 0
        sessions = {"sessions": gone if isinstance(gone, int) else len(gone)}
        if scope == SESSION:
            return {"scope": scope, "value": value, "entries": 0, "at": time.time(), **sessions}
        return {**self.judged.forget(scope, value, actor=actor, reason=reason), **sessions}
