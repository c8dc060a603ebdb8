"""Every error as the wire shows it: ``{"error": {"message", "type", "param", "code"}}``, OpenAI's shape.

Knows which status belongs to which error of the package; knows nothing of routes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from gradatim.errors import (
    AdapterError,
    ConflictError,
    EngineError,
    GradatimError,
    InvalidRequestError,
    ModelError,
    OverloadedError,
    PromptTooLongError,
    SessionError,
    StoreError,
    TransitionError,
    UnknownAdapterError,
    UnknownSessionError,
)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error"}
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_RETRY = {"Retry-After": "1"}  # seconds


class ApiError(Exception):
    """An error with everything that its answer needs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def problem(exc: Exception) -> ApiError:
    """What a client is told of an exception. Unexpected ones may hold a user's text: only their type is sent."""
    match exc:
        case ApiError():
            return exc
        case PromptTooLongError():
            return ApiError(400, str(exc), param="messages", code="context_length_exceeded")
        case InvalidRequestError():
            return ApiError(400, str(exc))
        case UnknownAdapterError():
            return ApiError(404, str(exc) or "no such model", param="model", code="model_not_found")
        case OverloadedError():
            return ApiError(429, str(exc) or "too many requests, try again", code="overloaded", headers=_RETRY)
        case ConflictError() | TransitionError() | SessionError():
            return _conflict(exc)
        case ModelError() | StoreError():
            return ApiError(503, str(exc), code="unavailable", headers=_RETRY)
        case EngineError():
            return ApiError(500, f"generation failed: {exc}", code="engine_error")
        case AdapterError() | GradatimError():
            return ApiError(500, str(exc), code="internal_error")
    return ApiError(500, f"internal error ({type(exc).__name__}); the server's log says where", code="internal_error")


def _conflict(exc: Exception) -> ApiError:
    if isinstance(exc, UnknownSessionError):
        return ApiError(404, str(exc), param="gradatim.session", code="session_not_found")
    return ApiError(409, str(exc), param="gradatim.session" if isinstance(exc, SessionError) else None, code="conflict")


def dumps(value: Any) -> bytes:
    """Compact JSON; a NaN in it is an error, never invalid JSON."""
    return _ENCODER.encode(value).encode()


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, "application/json")
