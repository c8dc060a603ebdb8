"""Evaluations that OpenTelemetry exporters send, as opinions: the ``gen_ai.evaluation.result`` events of OTLP's logs.

An exporter posts log records of every kind, as JSON or as protobuf. Both are brought into one shape here; records of
other kinds are none of our business and are accepted and dropped, as OTLP wants it. Knows nothing of what was issued.

Formats: opentelemetry-proto ``collector/logs/v1`` and ``logs/v1``; attributes: OpenTelemetry's GenAI conventions.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradatim.server.opinions import SOURCE, Opinion, check_size
from gradatim.server.problems import ApiError
from gradatim.server.wire import ID

EVENT = "gen_ai.evaluation.result"
MAX_EVALUATIONS = 1000  # in one request
_GOOD = frozenset({"pass", "passed", "correct", "good", "true", "yes"})
_BAD = frozenset({"fail", "failed", "incorrect", "bad", "false", "no"})
_NAME = re.compile(r"[^\x00-\x1f]{1,100}")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One event: where it came from, and its attributes."""

    attributes: Mapping[str, Any]
    trace_id: str
    span_id: str


def to_opinion(evaluation: Evaluation) -> Opinion:
    """ApiError 422 for one that cannot be an opinion. Its id is made of what it is about and which span said so, so
    that an export that is sent again does nothing."""
    of = evaluation.attributes
    name = of.get("gen_ai.evaluation.name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _bad("gen_ai.evaluation.name")
    response_id, episode_id = of.get("gen_ai.response.id"), of.get("gen_ai.conversation.id")
    target = response_id or episode_id
    if not isinstance(target, str) or not ID.fullmatch(target):
        raise _bad("gen_ai.response.id")
    source = of.get("gradatim.source", f"critic:{name}")
    if not isinstance(source, str) or not re.fullmatch(SOURCE, source):
        raise _bad("gradatim.source")
    said = "\0".join((target, name, evaluation.trace_id, evaluation.span_id))
    value, unknown = _value(of)
    opinion = Opinion(
        id=f"otel-{hashlib.sha256(said.encode()).hexdigest()[:32]}",
        kind="outcome" if unknown else "score" if value is not None else "comment",
        value=value,
        response_id=target if response_id else "",
        episode_id="" if response_id else target,
        comment=_comment(of),
        source=source,
        tags=(f"metric:{name}",),
    )
    if opinion.kind == "comment" and not opinion.comment.strip():
        raise _bad("gen_ai.evaluation.score.value")
    return check_size(opinion)


def _value(of: Mapping[str, Any]) -> tuple[float | None, bool]:
    """(in [-1, 1] or None, whether the evaluation itself failed, which says nothing of the answer). A label that says
    pass or fail goes before a number, whose scale nobody states."""
    if of.get("error.type"):
        return None, True
    label, value = of.get("gen_ai.evaluation.score.label"), of.get("gen_ai.evaluation.score.value")
    if isinstance(label, str) and label.lower() in _GOOD | _BAD:
        return (1.0 if label.lower() in _GOOD else -1.0), False
    if value is None:
        return None, False
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1:
        raise _bad("gen_ai.evaluation.score.value", "must be in [-1, 1], or come with the label pass or fail")
    return float(value), False


def _comment(of: Mapping[str, Any]) -> str:
    parts = (of.get(f"gen_ai.evaluation.{name}") for name in ("score.label", "explanation"))
    return ": ".join(p for p in parts if isinstance(p, str) and p)


def _bad(name: str, message: str = "is missing or malformed") -> ApiError:
    return ApiError(422, f"{name} {message}", param=name)


# ------------------------------------------------------------------------------------------------- as JSON


def from_json(body: Mapping[str, Any]) -> list[Evaluation]:
    """Of an ExportLogsServiceRequest. ApiError 400 for another shape, 413 for too many."""
    try:
        return _few([e for record in _records(body) if (e := _evaluation(record)) is not None])
    except (TypeError, AttributeError, KeyError, ValueError):
        raise ApiError(400, "the body is not an OTLP ExportLogsServiceRequest", param="resourceLogs") from None


def _records(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for resource in body["resourceLogs"]:
        for scope in resource.get("scopeLogs", ()):
            yield from scope.get("logRecords", ())


def _evaluation(record: Mapping[str, Any]) -> Evaluation | None:
    attributes = {a["key"]: _plain(a.get("value", {})) for a in record.get("attributes", ())}
    if EVENT not in (record.get("eventName"), attributes.get("event.name")):
        return None
    return Evaluation(attributes, str(record.get("traceId", "")), str(record.get("spanId", "")))


def _plain(value: Mapping[str, Any]) -> Any:
    """An AnyValue; 64-bit integers are strings in protobuf's JSON."""
    if "intValue" in value:
        return int(value["intValue"])
    return next((value[k] for k in ("stringValue", "doubleValue", "boolValue") if k in value), None)


def _few(found: list[Evaluation]) -> list[Evaluation]:
    if len(found) > MAX_EVALUATIONS:
        raise ApiError(413, f"more than {MAX_EVALUATIONS} evaluations in one request; send them in parts")
    return found


# --------------------------------------------------------------------------------------------- as protobuf

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


def from_protobuf(raw: bytes) -> list[Evaluation]:
    """The same of its binary form, read without a schema: only these few fields are looked at."""
    try:
        records = [
            record
            for resource in _all(raw, 1)  # ExportLogsServiceRequest.resource_logs
            for scope in _all(resource, 2)  # ResourceLogs.scope_logs
            for record in _all(scope, 2)  # ScopeLogs.log_records
        ]
        return _few([e for record in records if (e := _evaluation_of(record)) is not None])
    except (IndexError, ValueError, struct.error):
        raise ApiError(400, "the body is not an OTLP ExportLogsServiceRequest in protobuf") from None


def _evaluation_of(record: bytes) -> Evaluation | None:
    fields = list(_fields(record))
    attributes = dict(_attribute(value) for number, value in fields if number == 6 and isinstance(value, bytes))
    last = dict(fields)
    name = _utf8(last.get(12, b""))  # event_name; older exporters have it as an attribute
    if EVENT not in (name, attributes.get("event.name")):
        return None
    trace_id, span_id = (value.hex() if isinstance(value := last.get(n, b""), bytes) else "" for n in (9, 10))
    return Evaluation(attributes, trace_id, span_id)


def _attribute(raw: bytes) -> tuple[str, Any]:
    """A KeyValue: 1 key, 2 AnyValue, which is one of 1 string, 2 bool, 3 int64, 4 double."""
    pair = dict(_fields(raw))
    key, value = _utf8(pair.get(1, b"")), pair.get(2, b"")
    match next(iter(_fields(value)), None) if isinstance(value, bytes) else None:
        case 1, bytes(text):
            return key, text.decode()
        case 2, int(number):
            return key, bool(number)
        case 3, int(number):
            return key, number - (number >> 63 << 64)
        case 4, float(number):
            return key, number
    return key, None


def _utf8(value: bytes | int | float) -> str:
    return value.decode() if isinstance(value, bytes) else ""


def _all(raw: bytes, number: int) -> Iterator[bytes]:
    return (value for n, value in _fields(raw) if n == number and isinstance(value, bytes))


def _fields(raw: bytes) -> Iterator[tuple[int, bytes | int | float]]:
    """(field number, value) of one message. ValueError or IndexError where it is cut or malformed."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind, value = key & 7, b""
        if kind == _VARINT:
            number, at = _varint(raw, at)
            yield key >> 3, number
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(kind, -1)
        if kind == _BYTES:
            size, at = _varint(raw, at)
        if size < 0 or at + size > len(raw):
            raise ValueError("malformed")
        value, at = raw[at : at + size], at + size
        yield key >> 3, struct.unpack("<d", value)[0] if kind == _FIXED64 else value


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), at
    raise ValueError("malformed")


# ------------------------------------------------------------------------------------------------ answers


def partial_json(rejected: int, message: str) -> dict[str, Any]:
    """ExportLogsServiceResponse: empty where all was accepted."""
    return {"partialSuccess": {"rejectedLogRecords": str(rejected), "errorMessage": message}} if rejected else {}


def partial_protobuf(rejected: int, message: str) -> bytes:
    if not rejected:
        return b""
    text = message.encode()[:1000]
    inner = b"\x08" + _as_varint(rejected) + b"\x12" + _as_varint(len(text)) + text
    return b"\x0a" + _as_varint(len(inner)) + inner


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def first_problem(problems: Sequence[ApiError]) -> str:
    return problems[0].message if problems else ""
