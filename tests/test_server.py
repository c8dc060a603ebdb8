"""The generating routes, over ASGI: shapes, streams, errors, episodes and what is captured."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from gradatim.config import Config, ServerConfig
from gradatim.errors import EngineError, ModelError, OverloadedError, PromptTooLongError
from gradatim.server import generation
from gradatim.testing.fakes import FakeEngine, FakeRouter, FakeStore, fake_id, fake_sha256
from gradatim.types import Request, Step
from tests.server_kit import Kit, chat, with_key

CHAT = "/v1/chat/completions"
LEGACY = "/v1/completions"


@pytest.fixture
async def kit() -> Kit:
    return Kit()


@pytest.fixture
async def client(kit: Kit) -> AsyncIterator[httpx.AsyncClient]:
    async with kit.client() as client:
        yield client


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def steps(kit: Kit) -> list[Step]:
    return [step for _, step in kit.store.read(Step)]


def message_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


# ---------------------------------------------------------------------------------------------- answers


async def test_a_chat_answer_names_its_weights_and_its_episode(kit: Kit, client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=chat("hello there"))
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion" and body["model"] == "agent"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "The quick brown fox", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert body["gradatim"] == {
        "episode_id": response.headers["x-gradatim-episode"],
        "adapter": "agent@0",
        "adapter_sha256": fake_sha256("agent@0"),
        "stage": "live",
        "captured": True,
    }
    assert response.headers["x-gradatim-adapter"] == "agent@0"
    assert response.headers["x-request-id"] == body["id"]


async def test_the_step_holds_exactly_what_went_in_and_came_out(kit: Kit, client: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    messages = [{"role": "developer", "content": "be kind", "name": "x"}, {"role": "user", "content": parts}]
    extra = {"user": "alice", "metadata": {"skill": "login"}, "logit_bias": {"5": -1}, "stop": ["zz"], "seed": 3}
    body = {"model": "agent@0", "messages": messages, "temperature": 0, "max_tokens": 9, **extra, "unknown": {"x": 1}}
    response = await client.post(CHAT, json=body)
    (step,) = steps(kit)
    assert step.id == response.json()["id"]
    assert list(step.messages) == messages
    request, adapter = kit.engine.requests[0]
    assert request.messages == (
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello there"},
    )
    assert (adapter, step.stage, step.user, step.skill) == ("agent@0", "pinned", "alice", "login")
    assert step.prompt_ids == kit.engine.prompt_ids(request)
    assert step.completion_ids == tuple(fake_id(word) for word in ("The ", "quick ", "brown ", "fox"))
    assert step.logprobs == (-0.25,) * 4
    assert (step.text, step.finish_reason, step.trainable) == ("The quick brown fox", "stop", True)
    assert step.sampling["temperature"] == 0 and step.sampling["logit_bias"] == {"5": -1.0}
    json.dumps(dict(step.sampling))


async def test_n_choices_are_n_steps_of_one_episode(kit: Kit, client: httpx.AsyncClient) -> None:
    body = (await client.post(CHAT, json=chat(n=3))).json()
    assert [c["message"]["content"] for c in body["choices"]] == [
        "The quick brown fox",
        "The quick brown fox 1",
        "The quick brown fox 2",
    ]
    assert [step.id for step in steps(kit)] == [body["id"], f"{body['id']}:1", f"{body['id']}:2"]
    assert len({step.episode_id for step in steps(kit)}) == 1
    assert body["usage"]["completion_tokens"] == 14


async def test_logprobs_of_chat_and_of_the_old_route(client: httpx.AsyncClient) -> None:
    body = (await client.post(CHAT, json=chat(logprobs=True, top_logprobs=2, max_tokens=1))).json()
    first = {"token": "The ", "logprob": -0.25, "bytes": list(b"The ")}
    other = {"token": "other", "logprob": -1.75, "bytes": list(b"other")}
    (content,) = body["choices"][0]["logprobs"]["content"]
    assert content == first | {"top_logprobs": [first, other]}
    assert body["choices"][0]["finish_reason"] == "length"
    without = (await client.post(CHAT, json=chat(logprobs=True, max_tokens=1))).json()
    assert without["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    old = (await client.post(LEGACY, json={"model": "agent", "prompt": "a b", "logprobs": 1, "max_tokens": 2})).json()
    assert old["object"] == "text_completion" and old["id"].startswith("cmpl-")
    assert old["choices"][0]["text"] == "The quick "
    assert old["choices"][0]["logprobs"] == {
        "tokens": ["The ", "quick "],
        "token_logprobs": [-0.25, -0.25],
        "top_logprobs": [{"The ": -0.25, "other": -1.75}, {"quick ": -0.25, "other": -1.75}],
        "text_offset": [0, 4],
    }


async def test_token_ids_come_back_where_asked(client: httpx.AsyncClient) -> None:
    body = (await client.post(CHAT, json=chat("a b", return_token_ids=True, max_tokens=2))).json()
    assert body["prompt_token_ids"] == [fake_id(word) for word in ("user: ", "a ", "b\n")]
    assert body["choices"][0]["token_ids"] == [fake_id("The "), fake_id("quick ")]
    asked = {"model": "agent", "prompt": [5, 6], "return_token_ids": True}
    old = (await client.post(LEGACY, json=asked)).json()
    assert old["choices"][0]["prompt_token_ids"] == [5, 6]
    plain = (await client.post(CHAT, json=chat())).json()
    assert "prompt_token_ids" not in plain and "token_ids" not in plain["choices"][0]


async def test_stop_seed_and_both_names_of_the_token_limit_reach_the_engine(
    kit: Kit, client: httpx.AsyncClient
) -> None:
    body = (await client.post(CHAT, json=chat(stop="brown", seed=5, max_tokens=50, max_completion_tokens=40))).json()
    assert body["choices"][0]["message"]["content"] == "The quick "
    sampling = kit.engine.requests[0][0].sampling
    assert (sampling.stop, sampling.seed, sampling.max_tokens) == (("brown",), 5, 40)


# ---------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("path", [CHAT, LEGACY])
async def test_a_stream_has_openais_form(kit: Kit, client: httpx.AsyncClient, path: str) -> None:
    body: dict[str, Any] = chat() if path == CHAT else {"model": "agent", "prompt": "hi"}
    response = await client.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    *content, finish, usage = chunks
    assert [c["choices"][0]["finish_reason"] for c in content] == [None] * len(content)
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4
    assert content[0]["gradatim"] == {k: v for k, v in finish["gradatim"].items() if k != "captured"}
    assert finish["gradatim"]["captured"] and usage["gradatim"]["captured"]
    if path == CHAT:
        assert content[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        texts = [c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]]
        assert finish["choices"][0]["delta"] == {}
    else:
        texts = [c["choices"][0]["text"] for c in chunks[:-1]]
    assert "".join(texts) == "The quick brown fox" and len(content) == 5
    assert steps(kit)[0].id == chunks[0]["id"]


async def test_a_stream_of_n_choices_with_logprobs_and_ids(kit: Kit, client: httpx.AsyncClient) -> None:
    body = chat(stream=True, n=2, logprobs=True, return_token_ids=True)
    *chunks, done = events(await client.post(CHAT, json=body))
    assert done == "[DONE]" and all(c["choices"] for c in chunks)
    assert chunks[0]["prompt_token_ids"]
    for index, step in enumerate(steps(kit)):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert [i for c in own for i in c.get("token_ids", [])] == list(step.completion_ids)
        logprobs = [e["logprob"] for c in own if c["logprobs"] for e in c["logprobs"]["content"]]
        assert logprobs == list(step.logprobs)
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["stop"]


async def test_the_step_is_stored_before_the_finish_chunk_is_sent() -> None:
    kit = Kit()
    stored_at: list[int] = []
    app = kit.app()

    async def send(message: Any) -> None:
        if b'"finish_reason":"stop"' in message.get("body", b""):
            stored_at.append(len(steps(kit)))

    body = json.dumps(chat(stream=True)).encode()
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}
    sent = False

    async def receive() -> Any:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    await app(scope, receive, send)
    assert stored_at == [1]


async def test_an_engine_that_breaks_in_mid_stream_ends_it_with_an_error_event(caplog: Any) -> None:
    engine = FakeEngine(break_after=2, broken_by=RuntimeError("secret words of a user"))
    kit = Kit(engine=engine)
    async with kit.client() as client:
        response = await client.post(CHAT, json=chat(stream=True))
    chunks = events(response)
    assert "[DONE]" not in chunks
    assert chunks[-1]["error"]["type"] == "server_error"
    assert "secret" not in response.text and "secret" not in caplog.text
    (step,) = steps(kit)
    assert (step.finish_reason, step.trainable, step.text) == ("aborted", False, "The quick ")


# ----------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (PromptTooLongError("too long"), 400, "context_length_exceeded"),
        (OverloadedError("full"), 429, "overloaded"),
        (EngineError("broke"), 500, "engine_error"),
        (ModelError("no weights"), 503, "unavailable"),
        (ZeroDivisionError("secret"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_each_failure_of_the_engine_has_its_status(
    refusal: Exception, status: int, code: str, stream: bool
) -> None:
    kit = Kit(engine=FakeEngine(refuse=refusal))
    async with kit.client() as client:
        response = await client.post(CHAT, json=chat(stream=stream))
        assert response.status_code == status
        assert message_of(response)["code"] == code and "secret" not in response.text
        assert ("retry-after" in response.headers) == (status in (429, 503))
    assert steps(kit) == []
    assert kit.engine.aborted == 0


async def test_an_unknown_model_or_version_is_404(client: httpx.AsyncClient) -> None:
    for model in ("other", "agent@9"):
        response = await client.post(CHAT, json=chat() | {"model": model})
        assert response.status_code == 404
        assert message_of(response)["code"] == "model_not_found" and message_of(response)["param"] == "model"


async def test_an_adapter_retired_between_routing_and_generating_is_routed_again() -> None:
    class Moving(FakeRouter):
        async def route(self, model: str, episode_id: Any) -> Any:
            route = await super().route(model, episode_id)
            self.live = type(self.live)("agent@1")  # a promotion happens just now
            return route

    kit = Kit(engine=FakeEngine(adapters=["agent@1"]), router=Moving())
    async with kit.client() as client:
        assert (await client.post(CHAT, json=chat())).headers["x-gradatim-adapter"] == "agent@1"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": "9"}, "max_completion_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"user": 5}, "user"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {"skill": ""}}, "metadata.skill"),
        ({"metadata": {"session_id": "../../etc"}}, "metadata.session_id"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)
async def test_a_wrong_field_is_400_and_named(client: httpx.AsyncClient, change: dict[str, Any], param: str) -> None:
    response = await client.post(CHAT, json=chat() | change)
    assert response.status_code == 400
    error = message_of(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_nulls_and_empty_extras_ask_for_nothing(client: httpx.AsyncClient) -> None:
    nulls = dict.fromkeys(("temperature", "n", "stop", "seed", "tools", "tool_choice", "metadata", "stream", "user"))
    fields = {"tools": [], "response_format": {"type": "text"}, "tool_choice": "none", "modalities": ["text"]}
    assert (await client.post(CHAT, json=chat() | nulls | fields)).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": ["a", "b"]},
        {"prompt": [-1]},
        {"prompt": [True]},
        {"prompt": 5},
        {"echo": True},
        {"suffix": "x"},
        {"best_of": 3},
        {"logprobs": True},
    ],
)
async def test_the_old_route_refuses_what_it_cannot_do(client: httpx.AsyncClient, change: dict[str, Any]) -> None:
    response = await client.post(LEGACY, json={"model": "agent", "prompt": "hi"} | change)
    assert response.status_code == 400 and message_of(response)["param"] == next(iter(change))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"model": "agent", "temperature": NaN}',
        b'{"model": "agent", "temperature": 1e999}',
        b'{"model": "agent", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"x":' * 100 + b"1" + b"}" * 100,
        b'{"n": ' + b"9" * 10_000 + b"}",
    ],
)
async def test_what_is_not_json_is_400(client: httpx.AsyncClient, raw: bytes) -> None:
    response = await client.post(CHAT, content=raw)
    assert response.status_code == 400
    message_of(response)


async def test_other_paths_and_methods_have_openais_shape_too(client: httpx.AsyncClient) -> None:
    for method, path, status in [
        ("GET", "/nowhere", 404),
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("DELETE", "/v1/users/alice", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/sessions/a/b/v1/models", 404),
    ]:
        response = await client.request(method, path)
        assert response.status_code == status, path
        message_of(response)


async def test_a_body_that_is_too_large_is_refused_while_it_is_read() -> None:
    kit = Kit(config=Config(server=ServerConfig(max_body_bytes=1000)))
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 500
            yield b" " * 500

    async with kit.client() as client:
        response = await client.post(CHAT, content=endless())  # no Content-Length
        assert response.status_code == 413 and message_of(response)["code"] == "body_too_large"
        assert sent < 20_000
        assert (await client.post(CHAT, content=b"x" * 1001)).status_code == 413
        assert (await client.post(CHAT, json=chat())).status_code == 200


async def test_a_full_queue_is_429() -> None:
    kit = Kit(engine=FakeEngine(delay_s=0.05), config=Config(server=ServerConfig(max_queue=2)))
    async with kit.client() as client:
        answers = await asyncio.gather(*(client.post(CHAT, json=chat()) for _ in range(5)))
        assert sorted(a.status_code for a in answers) == [200, 200, 429, 429, 429]
        assert (await client.post(CHAT, json=chat())).status_code == 200


# ------------------------------------------------------------------------------------------------ access


async def test_a_key_is_asked_for_everywhere_but_at_the_health_routes(caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    kit = Kit(config=with_key("s3cret"))
    async with kit.client() as client:
        for path in ("/v1/models", "/metrics", "/nowhere", "/v1/episodes"):
            response = await client.get(path)
            assert response.status_code == 401 and message_of(response)["type"] == "authentication_error"
        for wrong in ("Bearer wrong", "Bearer", "s3cret", "Basic !!", "Bearer s3cret-and-more", "Digest s3cret"):
            assert (await client.get("/v1/models", headers={"Authorization": wrong})).status_code == 401
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        assert (await client.get("/v1/models", headers={"Authorization": "Bearer s3cret"})).status_code == 200
        assert (await client.get("/v1/models", auth=("public", "s3cret"))).status_code == 200
    assert "s3cret" not in caplog.text


async def test_a_web_page_of_another_origin_cannot_teach_a_server_without_a_key(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/feedback", content=b"{}", headers={"Origin": "https://evil.example"})
    assert response.status_code == 403
    same = await client.get("/v1/models", headers={"Origin": "http://gradatim.test"})
    assert same.status_code == 200


# ---------------------------------------------------------------------------------------------- episodes


async def test_a_session_is_an_episode_by_header_path_or_metadata(kit: Kit, client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=chat("a"), headers={"X-Session-Id": "task-7"})
    await client.post("/sessions/task-7" + CHAT, json=chat("b"))
    await client.post(CHAT, json=chat("c", metadata={"session_id": "task-7"}))
    await client.post(CHAT, json=chat("d", metadata={"session_id": "x"}), headers={"X-Session-Id": "task-8"})
    assert [step.episode_id for step in steps(kit)] == ["task-7", "task-7", "task-7", "task-8"]
    for bad in ("a b", "x" * 129, "é", "-a", "a/b"):
        response = await client.post(CHAT, json=chat(), headers={b"X-Session-Id": bad.encode("latin-1")})
        assert response.status_code == 400
    assert (await client.post("/sessions/a%20b" + CHAT, json=chat())).status_code == 400


async def test_requests_without_a_session_are_episodes_of_their_own(kit: Kit, client: httpx.AsyncClient) -> None:
    for _ in range(3):
        await client.post(CHAT, json=chat("the same"))
    assert len({step.episode_id for step in steps(kit)}) == 3


def continued(messages: list[Any], answer: str, text: str = "go on") -> list[Any]:
    reply = {"role": "assistant", "content": answer, "refusal": None, "tool_calls": None}
    return [*messages, reply, {"role": "user", "content": text}]


async def test_a_request_that_extends_an_earlier_one_continues_its_episode(kit: Kit, client: httpx.AsyncClient) -> None:
    first = chat("start")
    await client.post(CHAT, json=first)
    second = first | {"messages": continued(first["messages"], "The quick brown fox")}
    await client.post(CHAT, json=second)
    third = second | {"messages": continued(second["messages"], "  The quick brown fox\n"), "stream": True}
    await client.post(CHAT, json=third)
    assert len({step.episode_id for step in steps(kit)}) == 1
    for other in (
        first | {"messages": continued(first["messages"], "Another answer")},
        first | {"messages": continued([{"role": "user", "content": "else"}], "The quick brown fox")},
        second | {"user": "somebody else"},
    ):
        response = await client.post(CHAT, json=other)
        assert response.json()["gradatim"]["episode_id"] != steps(kit)[0].episode_id


async def test_any_choice_of_n_may_be_continued(kit: Kit, client: httpx.AsyncClient) -> None:
    first = chat("start", n=2)
    episode = (await client.post(CHAT, json=first)).json()["gradatim"]["episode_id"]
    body = chat() | {"messages": continued(first["messages"], "The quick brown fox 1")}
    assert (await client.post(CHAT, json=body)).json()["gradatim"]["episode_id"] == episode


async def test_an_episode_is_continued_after_a_restart(kit: Kit, client: httpx.AsyncClient) -> None:
    first = chat("start")
    episode = (await client.post(CHAT, json=first)).json()["gradatim"]["episode_id"]
    body = first | {"messages": continued(first["messages"], "The quick brown fox")}
    async with Kit(store=kit.store).client() as restarted:
        assert (await restarted.post(CHAT, json=body)).json()["gradatim"]["episode_id"] == episode


async def test_an_example_in_the_prompt_is_looked_up_once_and_continues_nothing() -> None:
    """Few-shot prompts hold assistant messages that were never answers of ours."""
    kit = Kit()
    looked_up: list[Any] = []

    class Watched(FakeStore):
        def step(self, **key: Any) -> Step | None:
            looked_up.append(key)
            return super().step(**key)

    kit.store = Watched()
    shots = continued(continued([{"role": "user", "content": "q"}], "a1"), "a2")
    async with kit.client() as client:
        for _ in range(3):
            await client.post(CHAT, json=chat() | {"messages": shots})
    assert len(looked_up) == 2
    assert len({step.episode_id for step in steps(kit)}) == 3


async def test_a_name_outside_latin_1_still_fits_a_header() -> None:
    name = "\N{SNOWMAN}@0"
    kit = Kit(engine=FakeEngine(adapters=[name]), router=FakeRouter(name))
    async with kit.client() as client:
        for stream in (False, True):
            response = await client.post(CHAT, json=chat(stream=stream) | {"model": name[0]})
            assert response.status_code == 200 and response.headers["x-gradatim-adapter"].endswith("@0")


async def test_a_side_call_is_recorded_and_not_trained_on(kit: Kit, client: httpx.AsyncClient) -> None:
    assert (await client.post(CHAT, json=chat(), headers={"X-Turn-Type": "side"})).status_code == 200
    assert (await client.post(CHAT, json=chat(), headers={"X-Turn-Type": "main"})).status_code == 200
    assert [step.trainable for step in steps(kit)] == [False, True]
    assert (await client.post(CHAT, json=chat(), headers={"X-Turn-Type": "sdie"})).status_code == 400


# ----------------------------------------------------------------------------------------------- capture


@pytest.mark.parametrize("stream", [False, True])
async def test_a_store_that_fails_costs_the_record_and_not_the_answer(stream: bool) -> None:
    store = FakeStore()
    store.broken = OSError(28, "No space left on device")
    async with Kit(store=store).client() as client:
        response = await client.post(CHAT, json=chat(stream=stream))
        assert response.status_code == 200
        body = events(response)[-2] if stream else response.json()
        assert body["gradatim"]["captured"] is False
        assert "gradatim_capture_lost_total 1.0" in (await client.get("/metrics")).text


async def test_a_store_that_hangs_holds_an_answer_up_no_longer_than_the_budget(monkeypatch: Any) -> None:
    monkeypatch.setattr(generation, "CAPTURE_BUDGET_S", 0.05)
    store = FakeStore()
    store.slow_s = 0.3
    async with Kit(store=store).client() as client:
        response = await client.post(CHAT, json=chat())
        assert response.json()["gradatim"]["captured"] is False
    await asyncio.sleep(0.4)  # the late write must trouble nobody


async def test_many_at_once_do_not_mix(kit: Kit) -> None:
    def echo(request: Request) -> str:
        return "echo " + str((request.messages or ())[-1]["content"])

    kit.engine.answer = echo
    kit.engine.delay_s = 0.001
    async with kit.client() as client:
        answers = await asyncio.gather(*(client.post(CHAT, json=chat(f"n{i}", stream=i % 2 == 0)) for i in range(30)))
    for i, answer in enumerate(answers):
        chunks = events(answer)[:-1] if i % 2 == 0 else []
        streamed = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        assert (streamed or answer.json()["choices"][0]["message"]["content"]) == f"echo n{i}"
    assert {step.text for step in steps(kit)} == {f"echo n{i}" for i in range(30)}
