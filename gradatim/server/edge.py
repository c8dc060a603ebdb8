"""The outermost layer of every request: who may call, what it counted, and an answer whatever breaks.

Written against ASGI directly, since it runs on every request. Knows no route but the two that need no key.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import traceback
from time import perf_counter
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradatim.server.metrics import Metrics
from gradatim.server.problems import ApiError, problem

log = logging.getLogger("gradatim.server")
OPEN = frozenset({"/healthz", "/readyz"})


class Edge:
    """ASGI middleware: authentication, request metrics, and the last resort for an unexpected error."""

    def __init__(self, app: ASGIApp, *, api_key: str, metrics: Metrics) -> None:
        self._app = app
        self._key = api_key.encode()
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at, status = perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._admit(scope)
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            status = status or 499  # nobody is left to read an answer
        except Exception as e:  # noqa: BLE001  the boundary of the process: logged, counted, answered
            if not isinstance(e, ApiError):
                self._log(scope, e)
            if not status:
                await problem(e).response()(scope, receive, watched)
        finally:
            self._metrics.request(_route(scope), status, perf_counter() - started_at)

    def _admit(self, scope: Scope) -> None:
        if scope["path"] in OPEN:
            return
        headers = Headers(scope=scope)
        if self._key:
            if not _holds(headers.get("authorization", ""), self._key):
                raise ApiError(
                    401,
                    "wrong or missing API key; send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        elif "origin" in headers and urlsplit(headers["origin"]).netloc != headers.get("host", ""):
            raise ApiError(403, "a web page of another origin may not call a server without an API key")

    def _log(self, scope: Scope, exc: Exception) -> None:
        """Where it broke, without the exception's own message: that may hold a user's text."""
        where = "".join(traceback.format_tb(exc.__traceback__))
        log.error("%s in %s %s\n%s", type(exc).__name__, scope["method"], _route(scope), where)


def _holds(authorization: str, key: bytes) -> bool:
    """Bearer KEY, or Basic with the key as password (as some feedback clients send it); in constant time."""
    scheme, _, credentials = authorization.partition(" ")
    given = credentials.strip().encode()
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(given, key)


def _route(scope: Scope) -> str:
    """The name of the function that answers: bounded, unlike paths."""
    name: str = getattr(scope.get("endpoint"), "__name__", "none")
    return name
