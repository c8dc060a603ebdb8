"""What an operator asks of the memory: what is in it, whether it is sound, to begin anew, to forget.

Whoever implements ``MemoryAdmin`` does it; this module knows only how to ask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from gradatim.server.body import parse_json
from gradatim.server.problems import ApiError, json_response
from gradatim.server.records import plain
from gradatim.server.wire import invalid
from gradatim.types import MemoryEpoch, MemoryNote

_ACTOR = "person"
_MOST = 1000  # entries in one answer


class MemoryAdmin(Protocol):
    """Methods may block; they are called in a thread."""

    def stats(self) -> Mapping[str, Any]: ...

    def show(self, *, tenant: str | None = None, step_id: str = "", limit: int = 100) -> Sequence[Mapping[str, Any]]:
        """Entries, the newest first."""

    def check(self) -> Mapping[str, Any]:
        """Compares what answers are made with to what is stored; ``ok`` says whether it is the same."""

    def epoch(self, tenant: str | None, *, actor: str, reason: str = "") -> MemoryEpoch: ...

    def undo_epoch(self, tenant: str | None) -> MemoryEpoch | None: ...

    def forget(self, scope: str, value: str, *, actor: str, reason: str = "") -> Mapping[str, Any]:
        """In effect for the next token when it returns. StoreError for a scope that there is not."""

    def compact(self) -> Mapping[str, Any]:
        """Deletes what nothing is answered with any more, and says how much."""

    @property
    def notes(self) -> NoteAdmin: ...


class NoteAdmin(Protocol):
    """Methods may block."""

    def show(self, tenant: str | None = None) -> Sequence[MemoryNote]:
        """Of one tenant, or of all (None)."""

    def pin(self, tenant: str, text: str, *, actor: str) -> MemoryNote:
        """ConflictError where a tenant's notes would be too long."""

    def unpin(self, note_id: str) -> MemoryNote:
        """StoreError where there is none of that id."""


class _Note(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    tenant: str = Field(default="", max_length=256)
    text: str = Field(min_length=1, max_length=4000)


class _Epoch(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    tenant: str | None = Field(default=None, max_length=256)
    reason: str = Field(default="", max_length=2000)


class _Forget(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    scope: str = Field(max_length=32)
    value: str = Field(default="", max_length=256)
    reason: str = Field(default="", max_length=2000)


class MemoryRoutes:
    """``admin`` is None where there is no memory."""

    def __init__(self, admin: MemoryAdmin | None) -> None:
        self._given = admin

    async def stats(self, request: Request) -> Response:
        return json_response(plain(await asyncio.to_thread(self._admin.stats)))

    async def entries(self, request: Request) -> Response:
        tenant = request.query_params.get("tenant")
        limit = request.query_params.get("limit", "100")
        if not (limit.isascii() and limit.isdigit() and int(limit[:6]) <= _MOST):
            raise ApiError(422, f"limit must be a whole number of 0 to {_MOST}", param="limit")
        step_id = request.query_params.get("response_id", "")
        rows = await asyncio.to_thread(self._admin.show, tenant=tenant, step_id=step_id, limit=int(limit))
        return json_response({"object": "list", "data": plain(rows)})

    async def check(self, request: Request) -> Response:
        return json_response(plain(await asyncio.to_thread(self._admin.check)))

    async def epoch(self, request: Request) -> Response:
        asked = await _body(request, _Epoch)
        made = await asyncio.to_thread(self._admin.epoch, asked.tenant, actor=_ACTOR, reason=asked.reason)
        return json_response(plain(made))

    async def undo_epoch(self, request: Request) -> Response:
        asked = await _body(request, _Epoch)
        undone = await asyncio.to_thread(self._admin.undo_epoch, asked.tenant)
        if undone is None:
            raise ApiError(409, "there is no epoch to undo", code="conflict")
        return json_response(plain(undone))

    async def forget(self, request: Request) -> Response:
        asked = await _body(request, _Forget)
        if asked.scope != "all" and not asked.value and asked.scope not in ("tenant", "user"):
            raise ApiError(422, "value is needed: whose or which", param="value")
        done = await asyncio.to_thread(self._admin.forget, asked.scope, asked.value, actor=_ACTOR, reason=asked.reason)
        return json_response(plain(done))

    async def compact(self, request: Request) -> Response:
        return json_response(plain(await asyncio.to_thread(self._admin.compact)))

    async def pins(self, request: Request) -> Response:
        notes = await asyncio.to_thread(self._admin.notes.show, request.query_params.get("tenant"))
        return json_response({"object": "list", "data": plain(notes)})

    async def pin(self, request: Request) -> Response:
        asked = await _body(request, _Note)
        return json_response(
            plain(await asyncio.to_thread(self._admin.notes.pin, asked.tenant, asked.text, actor=_ACTOR))
        )

    async def unpin(self, request: Request) -> Response:
        note_id = request.path_params["id"]
        if all(note.id != note_id for note in await asyncio.to_thread(self._admin.notes.show)):
            raise ApiError(404, f"no note {note_id} is pinned", param="id", code="not_found")
        return json_response(plain(await asyncio.to_thread(self._admin.notes.unpin, note_id)))

    @property
    def _admin(self) -> MemoryAdmin:
        if self._given is None:
            raise ApiError(409, "there is no memory here", code="conflict")
        return self._given


B = TypeVar("B", bound=BaseModel)


async def _body(request: Request, model: type[B]) -> B:
    raw = await request.body()
    try:
        return model.model_validate(parse_json(raw) if raw.strip() else {})
    except ValidationError as e:
        raise invalid(e, 422) from None
