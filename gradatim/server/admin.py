"""What an operator asks: adapters and their stages, health, status, metrics, and the models on offer.

Stages are changed by whoever implements ``Admin``; this module knows only how to ask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from time import time
from typing import Any, Protocol

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from gradatim.errors import GradatimError
from gradatim.protocols import Engine, Router, Store
from gradatim.server.body import parse_json
from gradatim.server.health import Writes
from gradatim.server.metrics import Metrics
from gradatim.server.problems import ApiError, json_response
from gradatim.server.records import plain
from gradatim.server.wire import invalid
from gradatim.types import AdapterId, EpisodeId

PROBE_TIMEOUT_S = 2.0
_ACTOR = "person"


class Admin(Protocol):
    """What the server needs of the rest of the system. Methods may block; they are called in a thread."""

    def adapters(self) -> Sequence[Mapping[str, Any]]:
        """The newest adapters and the live one, oldest first, each with at least id, stage, step, parent, created_at,
        update and verdicts."""

    def adapter(self, adapter_id: AdapterId) -> Mapping[str, Any] | None:
        """One of them, however old; None where there is none of that id."""

    def live(self) -> AdapterId | None: ...

    def rollback(self, adapter_id: AdapterId, *, actor: str, reason: str) -> Mapping[str, Any]:
        """Take this live or canary adapter off users; what was live before it answers the next request.
        Says what is live now. UnknownAdapterError, TransitionError."""

    def promote(self, adapter_id: AdapterId, *, actor: str, reason: str) -> Mapping[str, Any]:
        """Make this one live, on a person's word. Says what is live now. UnknownAdapterError, TransitionError."""

    def approve(self, adapter_id: AdapterId, *, actor: str, reason: str) -> Mapping[str, Any]:
        """Make this one, which is or was live, the anchor. Says which is now. UnknownAdapterError, TransitionError."""

    def reject(self, adapter_id: AdapterId, *, actor: str, reason: str) -> Mapping[str, Any]:
        """Take this one off its way up. TransitionError."""

    def status(self) -> Mapping[str, Any]:
        """Whether it learns, from what, and why not when it does not."""


class _Reason(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    reason: str = Field(default="", max_length=2000)


class AdminRoutes:
    """Everything beside generating and feedback."""

    def __init__(
        self,
        *,
        admin: Admin,
        engine: Engine,
        store: Store,
        router: Router,
        metrics: Metrics,
        writes: Writes,
        name: str,
    ) -> None:
        self._admin = admin
        self._engine = engine
        self._store = store
        self._router = router
        self._metrics = metrics
        self._writes = writes
        self._name = name
        self._began_at = time()

    async def list_models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": await self._models()})

    async def get_model(self, request: Request) -> Response:
        wanted = request.path_params["id"]
        if wanted == self._name:
            return json_response(self._routed(await asyncio.to_thread(self._admin.live)))
        row = await self._find(wanted)
        if row is None:
            raise ApiError(404, f"the model {wanted!r} does not exist", param="model", code="model_not_found")
        return json_response(self._pinned(row))

    async def list_adapters(self, request: Request) -> Response:
        rows = await self._rows()
        return json_response({"object": "list", "data": rows, "live": _live(rows)})

    async def get_adapter(self, request: Request) -> Response:
        return json_response(await self._row(request.path_params["id"]))

    async def rollback(self, request: Request) -> Response:
        return await self._act(request, self._admin.rollback)

    async def promote(self, request: Request) -> Response:
        return await self._act(request, self._admin.promote)

    async def approve(self, request: Request) -> Response:
        return await self._act(request, self._admin.approve)

    async def reject(self, request: Request) -> Response:
        return await self._act(request, self._admin.reject)

    async def _act(self, request: Request, action: Callable[..., Mapping[str, Any]]) -> Response:
        row, reason = await self._row(request.path_params["id"]), await _reason(request)
        done = await asyncio.to_thread(action, AdapterId(row["id"]), actor=_ACTOR, reason=reason)
        return json_response(plain(done))

    async def status(self, request: Request) -> Response:
        status = plain(await asyncio.to_thread(self._admin.status))
        server = self._metrics.counters() | {"uptime_s": time() - self._began_at}
        return json_response({**status, "server": server})

    async def healthz(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """200 where a request would be answered now, and recorded."""
        checks = {"engine": await self._check_engine(), "store": await self._check_store()}
        ready = not any(checks.values())
        words = {name: trouble or "ok" for name, trouble in checks.items()}
        return json_response({"status": "ok" if ready else "not ready", **words}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        live = await asyncio.to_thread(self._admin.live)
        if live:
            self._metrics.live_step.set(int(live.rpartition("@")[2] or 0))
        return Response(self._metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def _check_engine(self) -> str:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                adapter_id = (await self._router.route(self._name, EpisodeId("readyz"))).adapter_id
        except TimeoutError:
            return f"no adapter was loaded within {PROBE_TIMEOUT_S:.0f} s"
        except GradatimError as e:
            return f"no adapter is live: {e}"
        frozen = adapter_id.endswith("@0")  # the base needs no adapter in memory
        return "" if frozen or adapter_id in self._engine.loaded() else f"{adapter_id} is not loaded yet"

    async def _check_store(self) -> str:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await asyncio.to_thread(self._store.cursor, "readyz")
        except TimeoutError:
            return f"no answer within {PROBE_TIMEOUT_S:.0f} s"
        except Exception as e:  # noqa: BLE001  whatever it is, the store is not ready
            return type(e).__name__
        return self._writes.trouble()

    async def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = plain(await asyncio.to_thread(self._admin.adapters))
        return rows

    async def _row(self, adapter_id: str) -> dict[str, Any]:
        row = await self._find(adapter_id)
        if row is None:
            raise ApiError(404, f"the adapter {adapter_id!r} does not exist", param="id", code="not_found")
        return row

    async def _find(self, adapter_id: str) -> dict[str, Any] | None:
        row: dict[str, Any] | None = plain(await asyncio.to_thread(self._admin.adapter, AdapterId(adapter_id)))
        return row

    async def _models(self) -> list[dict[str, Any]]:
        """The routed name, then the versions that can be pinned, as far as they are listed."""
        rows = await self._rows()
        return [self._routed(_live(rows)), *map(self._pinned, rows)]

    def _routed(self, live: str | None) -> dict[str, Any]:
        began_at = int(self._began_at)
        return {"id": self._name, "object": "model", "created": began_at, "owned_by": "gradatim", "root": live}

    def _pinned(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": row["id"],
            "object": "model",
            "created": int(row.get("created_at") or self._began_at),
            "owned_by": "gradatim",
            "parent": row.get("parent"),
            "stage": row["stage"],
        }


def _live(rows: Sequence[Mapping[str, Any]]) -> str | None:
    return next((str(row["id"]) for row in reversed(rows) if row["stage"] == "live"), None)


async def _reason(request: Request) -> str:
    """The body's reason; no body at all is allowed."""
    raw = await request.body()
    if not raw.strip():
        return ""
    body = parse_json(raw)
    try:
        return _Reason.model_validate(body).reason
    except ValidationError as e:
        raise invalid(e, 422) from None
