"""Whatever is sent, the server answers in its own words, and never with a 5xx."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server_kit import Kit, chat

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/feedback", "/feedback", "/api/public/scores", "/v1/logs"]
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
CHAT_FIELDS = """
    model messages temperature top_p n stop seed max_tokens max_completion_tokens logprobs top_logprobs logit_bias
    user metadata stream stream_options tools response_format return_token_ids presence_penalty prompt
"""
chat_fields = st.sampled_from(CHAT_FIELDS.split())
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | json_values, "content": json_values}
    )
    | json_values,
    max_size=3,
)
OPINION_FIELDS = """
    id kind response_id episode_id chosen_id rejected_id value correction comment source confidence tags
    metric_name inference_id dryrun traceId sessionId observationId name dataType resourceLogs
"""
opinion_fields = st.sampled_from(OPINION_FIELDS.split())
kinds = st.sampled_from(["score", "preference", "correction", "outcome", "comment"])


def send(path: str, body: bytes) -> httpx.Response:
    async def post() -> httpx.Response:
        async with Kit().client() as client:
            return await client.post(path, content=body)

    return asyncio.run(post())


def check(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"] and set(error) == {"message", "type", "param", "code"}


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


@FUZZ
@given(st.sampled_from(PATHS), st.binary(max_size=200))
def test_any_bytes(path: str, body: bytes) -> None:
    check(send(path, body))


@FUZZ
@given(st.sampled_from(PATHS), json_values)
def test_any_json(path: str, body: Any) -> None:
    check(send(path, dump(body)))


@FUZZ
@given(st.sampled_from(PATHS[:2]), st.dictionaries(chat_fields, json_values), messages)
def test_any_value_in_any_field_of_a_request(path: str, fields: dict[str, Any], some: list[Any]) -> None:
    check(send(path, dump(chat() | {"prompt": "hi"} | fields)))
    check(send(path, dump(chat() | fields | {"messages": some, "model": "agent"})))


@FUZZ
@given(st.sampled_from(PATHS[2:]), st.dictionaries(opinion_fields, json_values), kinds)
def test_any_value_in_any_field_of_an_opinion(path: str, fields: dict[str, Any], kind: str) -> None:
    check(send(path, dump(fields)))
    check(send(path, dump(fields | {"kind": kind})))


@FUZZ
@given(st.integers(0, 200), st.integers(0, 200), st.binary(max_size=3))
def test_a_valid_body_cut_or_spoilt(start: int, length: int, junk: bytes) -> None:
    body = dump(chat("hello", stop=["a"], logit_bias={"5": 1}, metadata={"skill": "x"}))
    check(send(PATHS[0], body[:start] + junk + body[start + length :]))


def status_of(method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> int:
    """Past any client, which would refuse to send such things."""
    sent: list[Any] = []
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if not left:
            await asyncio.Event().wait()
        return left.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
    asyncio.run(Kit().app()(scope, receive, send))
    status: int = sent[0]["status"]
    return status


@pytest.mark.parametrize("name", ["X-Session-Id", "X-Turn-Type", "Idempotency-Key", "Content-Length", "Authorization"])
@pytest.mark.parametrize("value", [b"", b"\xff\xfe", b"a" * 5000, b"\x00", b"99999999999999999999999", b"-1", b"\xb2"])
def test_any_value_of_a_header(name: str, value: bytes) -> None:
    for path in PATHS:
        assert status_of("POST", path, [(name.lower().encode(), value)], dump(chat())) < 500


@FUZZ
@given(
    st.text(max_size=20),
    st.sampled_from(["/v1/", "/v1/episodes/", "/v1/explain/", "/v1/feedback/", "/v1/models/", "/v1/adapters/", "/"]),
    st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS"]),
)
def test_any_path(path: str, prefix: str, method: str) -> None:
    assert status_of(method, prefix + path, [], b"") < 500


@pytest.mark.parametrize("name", ["sesion", "a" * 1000])
def test_an_unknown_part_of_an_extension_is_named(name: str) -> None:
    response = send("/v1/chat/completions", dump({**chat("hi"), "gradatim": {name: "trip"}}))
    check(response)
    assert response.status_code == 400 and response.json()["error"]["param"].startswith("gradatim.")
