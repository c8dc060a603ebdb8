"""Reads a request's body: bounded while it is read, then strictly parsed JSON.

Python's parser accepts more than JSON does (NaN, infinities, lone surrogates, any depth up to a crash); what
passes here can be stored, hashed and sent back. Knows nothing of what the fields mean.
"""

from __future__ import annotations

import asyncio
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from gradatim.server.problems import ApiError

MAX_DEPTH = 64
READ_TIMEOUT_S = 60.0
_DRAIN_LIMITS = 8  # how many times the limit is read and thrown away, so that the client gets to see the answer
_CLOSE = {"Connection": "close"}


async def read_json(request: Request, max_bytes: int) -> Any:
    """The parsed body. ApiError 400, 408, 413 or 415; ClientDisconnect where the client left while sending."""
    return parse_json(await read_bytes(request, max_bytes))


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """The body as it is, or unpacked where it came with gzip; the limit holds before and after."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise ApiError(415, "Content-Encoding must be gzip, or none", code="unsupported_encoding")
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            raw = await _read(request, max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {READ_TIMEOUT_S:.0f} s", headers=_CLOSE) from None
    return _unpacked(raw, max_bytes) if encoding == "gzip" else raw


def _unpacked(raw: bytes, max_bytes: int) -> bytes:
    unpack = zlib.decompressobj(wbits=31)
    try:
        out = unpack.decompress(raw, max_bytes + 1)
    except zlib.error:
        raise ApiError(400, "the body is not gzip, as its Content-Encoding says") from None
    if len(out) > max_bytes:
        raise ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large")
    if not unpack.eof:
        raise ApiError(400, "the body is cut off: its gzip stream does not end")
    return out


async def read_object(request: Request, max_bytes: int, status: int = 400) -> dict[str, Any]:
    """A body that must be a JSON object; ``status`` where it is another kind of JSON."""
    body = await read_json(request, max_bytes)
    if not isinstance(body, dict):
        raise ApiError(status, f"the body must be a JSON object, not {_json_name(body)}")
    return body


async def _read(request: Request, max_bytes: int) -> bytes:
    length = request.headers.get("content-length", "")
    too_large = length.isascii() and length.isdigit() and int(length[:19]) > max_bytes
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if too_large or size > max_bytes:
            too_large = True
            chunks.clear()
            if size > _DRAIN_LIMITS * max_bytes:
                break
        else:
            chunks.append(chunk)
    if too_large:
        raise ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large", headers=_CLOSE)
    return b"".join(chunks)


def parse_json(raw: bytes) -> Any:
    """ApiError 400 for whatever is not JSON that UTF-8 and a database can hold."""
    if not raw.strip():
        raise ApiError(400, "the body is empty; send a JSON object")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_not_a_number, parse_float=_finite)
    except UnicodeDecodeError as e:
        raise ApiError(400, f"the body is not UTF-8 (byte {e.start})") from None
    except RecursionError:
        raise ApiError(400, f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as e:
        raise ApiError(400, f"the body is not valid JSON: {e.msg} (line {e.lineno}, column {e.colno})") from None
    except ValueError as e:
        raise ApiError(400, f"the body is not valid JSON: {e}") from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    if b"\\u" in raw:
        _check_surrogates(value)
    return value


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise ApiError(400, f"the body is nested deeper than {MAX_DEPTH} levels")


def _children(node: Any) -> list[Any]:
    found = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    return [child for child in found if isinstance(child, dict | list)]


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "a string of the body holds half of a surrogate pair") from None


def _json_name(value: Any) -> str:
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "null")
