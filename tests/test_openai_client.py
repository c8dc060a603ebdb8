"""The plain ``openai`` client against a real HTTP server: what a user of the product has, and nothing else."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gradatim.config import Config, ServerConfig
from gradatim.errors import OverloadedError, PromptTooLongError
from gradatim.store import open_store
from gradatim.testing.fakes import FakeEngine
from gradatim.types import Feedback, Step
from tests.server_kit import Kit, chat, served, until, with_key

KEY = "s3cret"
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def kit() -> Kit:
    return Kit(config=with_key(KEY))


@pytest.fixture
def url(kit: Kit) -> Iterator[str]:
    with served(kit.app()) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def steps(kit: Kit) -> list[Step]:
    return [step for _, step in kit.store.read(Step)]


def test_a_chat_answer(kit: Kit, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="agent", messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, seed=1, max_completion_tokens=50
    )
    assert [choice.message.content for choice in answer.choices] == ["The quick brown fox", "The quick brown fox 1"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["The ", "quick ", "brown ", "fox"]
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert (answer.model_extra or {})["gradatim"]["adapter"] == "agent@0"
    assert answer._request_id == answer.id == steps(kit)[0].id
    old = client.completions.create(model="agent", prompt="hi", logprobs=1)
    assert old.choices[0].text == "The quick brown fox"


def test_a_stream_arrives_token_by_token(kit: Kit, client: openai.OpenAI) -> None:
    kit.engine.delay_s = 0.05
    seen_when = []
    with client.chat.completions.create(
        model="agent", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = []
        for chunk in stream:
            chunks.append(chunk)
            seen_when.append(len(steps(kit)))
    assert seen_when[0] == 0, "the stream did not begin before the answer was complete"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "The quick brown fox"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4
    assert steps(kit)[0].id == chunks[0].id


def test_the_clients_own_stream_helper_puts_the_answer_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="agent", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "The quick brown fox"
    assert final.choices[0].finish_reason == "stop"


def test_models_and_sessions_by_base_url(kit: Kit, url: str, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["agent", "agent@0", "agent@1"]
    assert client.models.retrieve("agent@1").id == "agent@1"
    with openai.OpenAI(base_url=f"{url}/sessions/task-1/v1", api_key=KEY) as session:
        session.chat.completions.create(model="agent", messages=MESSAGES)
        session.chat.completions.create(model="agent", messages=MESSAGES)
    client.chat.completions.create(model="agent", messages=MESSAGES, metadata={"session_id": "task-1"})
    client.chat.completions.create(model="agent", messages=MESSAGES, extra_headers={"X-Session-Id": "task-1"})
    assert [step.episode_id for step in steps(kit)] == ["task-1"] * 4


def test_a_conversation_in_the_clients_own_words_is_one_episode(kit: Kit, client: openai.OpenAI) -> None:
    messages = list(MESSAGES)
    for _ in range(3):
        answer = client.chat.completions.create(model="agent", messages=messages).choices[0].message
        messages += [answer.model_dump(), {"role": "user", "content": "and then?"}]
    assert len({step.episode_id for step in steps(kit)}) == 1


def test_errors_are_the_clients_own(kit: Kit, url: str, client: openai.OpenAI) -> None:
    create: Any = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        create(model="agent", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
    assert bad.value.param == "tools"
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-9", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    kit.engine.refuse = PromptTooLongError("the prompt has 9000 tokens, the context window 8192")
    with pytest.raises(openai.BadRequestError) as long:
        create(model="agent", messages=MESSAGES, stream=True)
    assert long.value.code == "context_length_exceeded"
    kit.engine.refuse = RuntimeError("broken")
    with pytest.raises(openai.InternalServerError):
        create(model="agent", messages=MESSAGES)
    assert steps(kit) == []


def test_the_client_retries_what_is_overloaded(kit: Kit, url: str) -> None:
    kit.engine.refuse = OverloadedError("full")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=1)
    with client, pytest.raises(openai.RateLimitError) as busy:
        client.chat.completions.create(model="agent", messages=MESSAGES)
    assert busy.value.response.headers["retry-after"] == "1"
    assert len(kit.engine.requests) == 2


def test_an_error_in_mid_stream_is_raised_by_the_client(kit: Kit, client: openai.OpenAI) -> None:
    kit.engine.break_after = 2
    with pytest.raises(openai.APIError):
        for _ in client.chat.completions.create(model="agent", messages=MESSAGES, stream=True):
            pass
    (step,) = steps(kit)
    assert (step.finish_reason, step.trainable) == ("aborted", False)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_generation(kit: Kit, url: str, stream: bool) -> None:
    kit.engine.answer, kit.engine.delay_s = "word " * 1000, 0.02
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(chat(stream=stream)).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        if stream:
            assert b"200 OK" in connection.recv(100)
        until(lambda: kit.engine.drawn > 2)
    until(lambda: steps(kit))
    (step,) = steps(kit)
    assert (step.finish_reason, step.trainable) == ("aborted", False)
    assert 0 < len(step.completion_ids) < 100 and step.text.startswith("word ")
    assert kit.engine.aborted == 1
    status = httpx.get(f"{url}/v1/status", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert status["server"]["queue_depth"] == 0 and status["server"]["aborted"] == 1


async def test_two_streams_run_side_by_side(kit: Kit, url: str) -> None:
    kit.engine.delay_s = 0.05
    order: list[str] = []

    async def read(client: openai.AsyncOpenAI, name: str) -> str:
        text = ""
        stream = await client.chat.completions.create(model="agent", messages=MESSAGES, stream=True)
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            order.append(name)
        return text

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        texts = await asyncio.gather(read(client, "a"), read(client, "b"))
    assert set(texts) == {"The quick brown fox"}
    assert "ab" * 2 in "".join(order) or "ba" * 2 in "".join(order), "one waited for the other"


def test_fifty_megabytes_are_refused_and_the_connection_survives_it(url: str) -> None:
    with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        response = client.post(f"{url}/v1/chat/completions", content=b" " * (50 * 2**20))
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
        chunked = (b" " * 2**20 for _ in range(50))
        assert client.post(f"{url}/v1/chat/completions", content=chunked).status_code == 413
        assert client.get(f"{url}/healthz").status_code == 200


def test_feedback_and_chains_survive_a_restart_on_the_real_store(tmp_path: Path) -> None:
    with open_store(tmp_path / "g.db") as store:
        first = Kit(store=store)
        with served(first.app()) as url:
            answer = httpx.post(f"{url}/v1/chat/completions", json=chat()).json()
    with open_store(tmp_path / "g.db") as store, served(Kit(store=store).app()) as url:
        body = {"id": "f", "kind": "score", "response_id": answer["id"], "value": 1}
        for _ in range(2):
            assert httpx.post(f"{url}/v1/feedback", json=body).status_code == 202
        assert len(store.read(Feedback)) == 1
        elsewhere = body | {"response_id": "chatcmpl-0"}
        assert httpx.post(f"{url}/v1/feedback", json=elsewhere).status_code == 404
        more = [*MESSAGES, answer["choices"][0]["message"], {"role": "user", "content": "more"}]
        again = httpx.post(f"{url}/v1/chat/completions", json=chat() | {"messages": more}).json()
        assert again["gradatim"]["episode_id"] == answer["gradatim"]["episode_id"]
        body = {"kind": "score", "response_id": again["id"], "value": 1, "id": "f"}
        assert httpx.post(f"{url}/v1/feedback", json=body).status_code == 409
        listed = httpx.get(f"{url}/v1/episodes").json()["data"]
        assert [(row["steps"], row["feedback"]) for row in listed] == [(2, 1)]
        assert httpx.get(f"{url}/v1/explain/{answer['id']}").json()["summary"].startswith("feedback recorded")
        assert httpx.delete(f"{url}/v1/feedback/f").status_code == 200
        assert httpx.get(f"{url}/v1/episodes/{listed[0]['id']}").json()["feedback"][0]["retracted"] is True


def test_a_small_limit_holds_for_a_body_that_lies_about_its_length(tmp_path: Path) -> None:
    kit = Kit(engine=FakeEngine(), config=Config(server=ServerConfig(max_body_bytes=100)))
    with served(kit.app()) as url:
        assert httpx.post(f"{url}/v1/feedback", content=(b"x" * 60 for _ in range(3))).status_code == 413
