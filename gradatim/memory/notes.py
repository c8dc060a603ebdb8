"""Pinned notes: plain text that every request of a tenant is told, at the end of its system part.

There it is the same for each of a tenant's requests, so the prefix cache keeps it. It stays in the prompt that is
recorded and learned from: a note is a fact of its tenant, and weights that all tenants share are not to learn it by
heart. Deleted notes are gone from the next request on. Knows nothing of models and HTTP.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from gradatim.errors import ConflictError, StoreError
from gradatim.protocols import Shelf
from gradatim.scopes import ROLES
from gradatim.types import MemoryNote, Message, Tombstone

MOST_CHARS = 4000  # of all notes of a tenant


class Notes:
    """``by_user``: each user is a tenant of its own. Safe to use from any thread."""

    def __init__(self, shelf: Shelf, *, by_user: bool, clock: Callable[[], float] = time.time) -> None:
        self._shelf, self._by_user, self._clock = shelf, by_user, clock
        self._writing = threading.RLock()
        self._notes = {note.id: note for note in shelf.load(MemoryNote)}

    def of(self, tenant: str) -> Sequence[MemoryNote]:
        """The oldest first."""
        own = [note for note in list(self._notes.values()) if note.tenant == tenant]
        return sorted(own, key=lambda note: (note.created_at, note.id))

    def show(self, tenant: str | None = None) -> Sequence[MemoryNote]:
        """Of one tenant, or of all (None)."""
        tenants = {note.tenant for note in list(self._notes.values())} if tenant is None else {tenant}
        return [note for each in sorted(tenants) for note in self.of(each)]

    def pin(self, tenant: str, text: str, *, actor: str) -> MemoryNote:
        """Told from the next request on. ConflictError where a tenant's notes would be too long; StoreError."""
        with self._writing:
            told = text.strip()
            if not told:
                raise ConflictError("a note needs a text")
            if sum(len(note.text) for note in self.of(tenant)) + len(told) > MOST_CHARS:
                raise ConflictError(f"all notes of a tenant may have {MOST_CHARS} characters together; unpin one first")
            note = MemoryNote(
                id=f"n-{uuid.uuid4().hex[:12]}", tenant=tenant, text=told, created_at=self._clock(), actor=actor
            )
            self._shelf.change(put=[note])
            self._notes[note.id] = note
            return note

    def unpin(self, note_id: str) -> MemoryNote:
        """Gone for good. StoreError where there is none of that id."""
        with self._writing:
            if note_id not in self._notes:
                raise StoreError(f"no note {note_id} is pinned: see `gradatim memory pins`")
            self._shelf.change(drop=[(MemoryNote, {"id": note_id})])
            return self._notes.pop(note_id)

    def covered(self, tombstone: Tombstone) -> list[MemoryNote]:
        """Those that go with what is forgotten."""
        scope = "tenant" if tombstone.scope == "user" and self._by_user else tombstone.scope
        if scope == "all":
            return list(self._notes.values())
        return list(self.of(tombstone.value)) if scope == "tenant" else []

    def take(self, notes: Sequence[MemoryNote]) -> None:
        """They are gone from the shelf."""
        for note in notes:
            self._notes.pop(note.id, None)


def noted(messages: Sequence[Message], notes: Sequence[MemoryNote]) -> tuple[Message, ...]:
    """The messages with the notes at the end of the system part, which is made where there is none."""
    if not notes:
        return tuple(messages)
    text = "\n\n".join(note.text for note in notes)
    if not messages or messages[0].get("role") not in ROLES:
        return ({"role": "system", "content": text}, *messages)
    return ({**messages[0], "content": _joined(messages[0].get("content"), text)}, *messages[1:])


def _joined(content: Any, text: str) -> Any:
    """Content is a string, or a list of parts."""
    if isinstance(content, list | tuple):
        return [*content, {"type": "text", "text": f"\n\n{text}"}]
    return f"{content}\n\n{text}" if content else text
