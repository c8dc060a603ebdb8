"""OpenTelemetry's evaluations as feedback: JSON and protobuf alike, sent twice or half wrong."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse

from gradatim.server import otlp
from gradatim.server.problems import ApiError
from gradatim.testing.fakes import FakeStore
from gradatim.types import Feedback
from tests.server_kit import Kit, chat

LOGS = "/v1/logs"
PROTOBUF = {"content-type": "application/x-protobuf"}
SCORE, LABEL = "gen_ai.evaluation.score.value", "gen_ai.evaluation.score.label"


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
async def client(store: FakeStore) -> AsyncIterator[httpx.AsyncClient]:
    async with Kit(store=store).client() as client:
        yield client


@pytest.fixture
async def answer(client: httpx.AsyncClient) -> dict[str, Any]:
    body: dict[str, Any] = (await client.post("/v1/chat/completions", json=chat())).json()
    return body


def request_of(*events: dict[str, Any], name: str = otlp.EVENT) -> ExportLogsServiceRequest:
    out = ExportLogsServiceRequest()
    scope = out.resource_logs.add().scope_logs.add()
    for i, attributes in enumerate(events):
        of = {"trace_id": b"\1" * 16, "span_id": i.to_bytes(8, "big")}
        record = scope.log_records.add(event_name=name, time_unix_nano=2**63, **of)
        record.body.string_value = "evaluated"
        for key, value in ({"gen_ai.evaluation.name": "relevance"} | attributes).items():
            field = {bool: "bool_value", int: "int_value", float: "double_value", str: "string_value"}[type(value)]
            setattr(record.attributes.add(key=key).value, field, value)
    return out


def as_json(request: ExportLogsServiceRequest) -> dict[str, Any]:
    """As the exporters write it: hex for ids, where protobuf's own JSON has base64."""
    from google.protobuf.json_format import MessageToDict

    body: dict[str, Any] = MessageToDict(request)
    for resource, plain in zip(request.resource_logs, body.get("resourceLogs", ()), strict=True):
        for record, raw in zip(resource.scope_logs[0].log_records, plain["scopeLogs"][0]["logRecords"], strict=True):
            raw |= {"traceId": record.trace_id.hex(), "spanId": record.span_id.hex()}
    return body


def recorded(store: FakeStore) -> list[Feedback]:
    return [feedback for _, feedback in store.read(Feedback)]


@pytest.mark.parametrize("binary", [False, True])
async def test_evaluations_become_feedback(
    store: FakeStore, client: httpx.AsyncClient, answer: dict[str, Any], binary: bool
) -> None:
    on = {"gen_ai.response.id": answer["id"]}
    request = request_of(
        on | {SCORE: 0.25, "gen_ai.evaluation.explanation": "on topic"},
        on | {SCORE: 4.0, LABEL: "Pass", "gradatim.source": "judge:big"},
        on | {SCORE: -1},
        on | {LABEL: "polite"},
        on | {"error.type": "timeout"},
        {"gen_ai.conversation.id": answer["gradatim"]["episode_id"], LABEL: "fail"},
        on | {SCORE: 7.0},
        {"gen_ai.response.id": "chatcmpl-0", SCORE: 1.0},
        {SCORE: 1.0},
        on | {SCORE: 1.0, "gradatim.source": "stranger:x"},
        on,
    )
    request.resource_logs[0].scope_logs[0].log_records.add(event_name="something.else")
    for _ in range(2):  # the second time changes nothing
        if binary:
            raw = gzip.compress(request.SerializeToString())
            response = await client.post(LOGS, content=raw, headers=PROTOBUF | {"content-encoding": "gzip"})
            told = ExportLogsServiceResponse.FromString(response.content).partial_success
            rejected, message = told.rejected_log_records, told.error_message
        else:
            response = await client.post(LOGS, json=as_json(request))
            partial = response.json()["partialSuccess"]
            rejected, message = int(partial["rejectedLogRecords"]), partial["errorMessage"]
        assert response.status_code == 200, response.text
        assert rejected == 5 and "[-1, 1]" in message
    rows = recorded(store)
    assert [(r.kind, r.value, r.comment) for r in rows] == [
        ("score", 0.25, "on topic"),
        ("score", 1.0, "Pass"),
        ("score", -1.0, ""),
        ("comment", None, "polite"),
        ("outcome", None, ""),
        ("score", -1.0, "fail"),
    ]
    assert [r.source for r in rows[:2]] == ["critic:relevance", "judge:big"]
    assert [r.step_id for r in rows] == [answer["id"]] * 5 + [None]
    assert rows[0].tags == ("metric:relevance",)


async def test_a_later_export_of_the_same_span_revises(
    store: FakeStore, client: httpx.AsyncClient, answer: dict[str, Any]
) -> None:
    for value in (1.0, -1.0):
        body = as_json(request_of({"gen_ai.response.id": answer["id"], SCORE: value}))
        response = await client.post(LOGS, json=body)
        assert response.status_code == 200 and response.json() == {}
    assert [r.value for r in recorded(store)] == [1.0, -1.0] and len({r.id for r in recorded(store)}) == 1


async def test_what_is_no_export_is_refused_and_nothing_is_written(
    store: FakeStore, client: httpx.AsyncClient, answer: dict[str, Any]
) -> None:
    wrong: list[Any] = [
        [],
        {},
        {"resourceLogs": 1},
        {"resourceLogs": [{"scopeLogs": [{"logRecords": [{"attributes": 1}]}]}]},
    ]
    for body in wrong:
        assert (await client.post(LOGS, json=body)).status_code == 400, body
    whole = request_of({"gen_ai.response.id": answer["id"], SCORE: 1.0}).SerializeToString()
    assert (await client.post(LOGS, content=whole[:-5], headers=PROTOBUF)).status_code == 400
    many = request_of(*[{"gen_ai.response.id": answer["id"], SCORE: 1.0}] * (otlp.MAX_EVALUATIONS + 1))
    assert (await client.post(LOGS, content=many.SerializeToString(), headers=PROTOBUF)).status_code == 413
    assert not recorded(store)


async def test_a_full_disk_acknowledges_nothing(
    store: FakeStore, client: httpx.AsyncClient, answer: dict[str, Any]
) -> None:
    store.broken = OSError("disk full")
    body = as_json(request_of({"gen_ai.response.id": answer["id"], SCORE: 1.0}))
    assert (await client.post(LOGS, json=body)).status_code == 503


async def test_packed_bodies_are_unpacked_within_the_limit(client: httpx.AsyncClient) -> None:
    packed = {"content-encoding": "gzip"}
    feedback = "/v1/feedback"
    assert (await client.post(feedback, content=gzip.compress(b"{}"), headers=packed)).status_code == 422
    assert (await client.post(feedback, content=gzip.compress(b" " * 9 * 2**20), headers=packed)).status_code == 413
    assert (await client.post(feedback, content=gzip.compress(b"{}" * 99)[:-9], headers=packed)).status_code == 400
    assert (await client.post(feedback, content=b"{}", headers=packed)).status_code == 400
    assert (await client.post(feedback, content=b"{}", headers={"content-encoding": "br"})).status_code == 415


values = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=8)
keys = st.sampled_from([SCORE, LABEL, "gen_ai.response.id", "error.type", "event.name", "other"]) | st.text(max_size=8)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.dictionaries(keys, values, max_size=5), max_size=4))
def test_the_bytes_say_what_the_reference_says(events: list[dict[str, Any]]) -> None:
    request = request_of(*events)
    found = otlp.from_protobuf(request.SerializeToString())
    assert [f.attributes for f in found] == [{"gen_ai.evaluation.name": "relevance"} | e for e in events]
    assert [(f.trace_id, f.span_id) for f in found] == [("01" * 16, f"{i:016x}") for i in range(len(events))]


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=80), st.integers(0, 200), st.integers(0, 20))
def test_any_bytes_are_read_or_refused(junk: bytes, start: int, cut: int) -> None:
    whole = request_of({SCORE: 1.0, LABEL: "x"}, {"a": 3}).SerializeToString()
    for raw in (junk, whole[:start] + junk[:4] + whole[start + cut :]):
        try:
            otlp.from_protobuf(raw)
        except ApiError as e:
            assert e.status == 400
