"""``gradatim.client`` against a real HTTP server: every kind, retries that count once, episodes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from gradatim.client import AsyncGradatim, Gradatim, current_episode
from gradatim.errors import FeedbackError
from gradatim.types import Feedback, Step
from tests.server_kit import Kit, served, with_key

KEY = "s3cret"
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def kit() -> Kit:
    return Kit(config=with_key(KEY))


@pytest.fixture
def url(kit: Kit) -> Iterator[str]:
    with served(kit.app()) as url:
        yield url


@pytest.fixture
def gradatim(url: str) -> Iterator[Gradatim]:
    with Gradatim(url, api_key=KEY, source="human:alice") as gradatim:
        yield gradatim


def agent(gradatim: Gradatim) -> openai.OpenAI:
    return openai.OpenAI(base_url=gradatim.base_url, api_key=KEY, max_retries=0, default_headers=gradatim.headers)


def recorded(kit: Kit) -> list[Feedback]:
    return [feedback for _, feedback in kit.store.read(Feedback)]


class Unlucky(httpx.BaseTransport):
    """Delivers every request, and loses the first answers to each."""

    def __init__(self, lost: int) -> None:
        self._lost, self.sent = lost, 0
        self._inner = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._inner.handle_request(request)
        self.sent += 1
        if self.sent <= self._lost:
            answer.read()
            raise httpx.ReadError("lost on the way", request=request)
        return answer

    def close(self) -> None:
        self._inner.close()


def test_every_kind_arrives_and_is_revised_and_retracted(kit: Kit, gradatim: Gradatim) -> None:
    with agent(gradatim) as llm:
        answer = llm.chat.completions.create(model="agent", messages=HI, n=2)
    episode = kit.store.read(Step)[0][1].episode_id
    first = gradatim.score(answer, 0.5, confidence=0.5, tags=["a"])
    gradatim.score(answer.id, False, comment="too long")
    gradatim.prefer(answer, f"{answer.id}:1")
    gradatim.correct(answer, "better", source="critic:unit-tests")
    gradatim.outcome(episode, None)
    gradatim.outcome(episode, True)
    gradatim.comment(answer.id, "hm")
    rows = recorded(kit)
    assert [r.kind for r in rows] == ["score", "score", "preference", "correction", "outcome", "outcome", "comment"]
    assert [r.value for r in rows] == [0.5, -1.0, None, None, None, 1.0, None]
    assert [r.step_id for r in rows] == [answer.id] * 4 + [None, None, answer.id]
    assert rows[0].source == "human:alice" and rows[0].tags == ("a",) and rows[0].confidence == 0.5
    assert rows[3].source == "critic:unit-tests" and rows[3].correction == "better"
    assert gradatim.score(answer, -0.5, id=first) == first
    assert gradatim.retract(first) == first == gradatim.retract(first)
    assert [(r.value, r.retracted) for r in recorded(kit) if r.id == first] == [
        (0.5, False),
        (-0.5, False),
        (-0.5, True),
    ]


def test_what_the_server_refuses_is_an_error_and_is_not_sent_again(kit: Kit, gradatim: Gradatim) -> None:
    wrongs: list[tuple[Callable[[], str], int]] = [
        (lambda: gradatim.score("chatcmpl-0", 1), 404),
        (lambda: gradatim.outcome("nowhere", True), 404),
        (lambda: gradatim.score("chatcmpl-0", 7), 422),
        (lambda: gradatim.retract("../../status"), 404),
    ]
    for wrong, status in wrongs:
        with pytest.raises(FeedbackError) as refused:
            wrong()
        assert refused.value.status == status and str(status) in str(refused.value)
    with pytest.raises(ValueError, match="JSON"):
        gradatim.score("chatcmpl-0", float("nan"))
    with pytest.raises(TypeError, match="sauce"):
        gradatim.score("chatcmpl-0", 1, sauce="human")
    assert not recorded(kit)


def test_a_lost_answer_is_retried_and_counts_once(kit: Kit, url: str) -> None:
    transport = Unlucky(lost=2)
    with Gradatim(url, api_key=KEY, transport=transport) as gradatim, agent(gradatim) as llm:
        answer = llm.chat.completions.create(model="agent", messages=HI)
        sent = gradatim.score(answer, 1)
        assert transport.sent == 3
    assert [(r.id, r.value) for r in recorded(kit)] == [(sent, 1.0)]


def test_attempts_end_and_an_unreachable_server_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("gradatim.client.time.sleep", pauses.append)
    answers = iter([httpx.Response(503, headers={"Retry-After": "7"}), httpx.Response(502), httpx.Response(503)])
    with Gradatim(url, retries=2, transport=httpx.MockTransport(lambda _: next(answers))) as gradatim:
        with pytest.raises(FeedbackError) as refused:
            gradatim.score("chatcmpl-0", 1)
        assert refused.value.status == 503 and pauses[0] == 7.0 and 0.0 < pauses[1] <= 0.5
    with Gradatim("http://127.0.0.1:1", retries=1) as nobody, pytest.raises(FeedbackError, match="cannot be reached"):
        nobody.score("chatcmpl-0", 1)


def test_an_episode_groups_the_calls_of_its_block(kit: Kit, gradatim: Gradatim) -> None:
    with agent(gradatim) as llm:

        @gradatim.in_episode
        def task() -> str:
            for _ in range(2):
                llm.chat.completions.create(model="agent", messages=HI)
            return current_episode()

        named = [task(), task()]
        with gradatim.episode() as episode:
            llm.chat.completions.create(model="agent", messages=HI)
            other = threading.Thread(target=lambda: named.append(current_episode()))
            other.start()
            other.join()
            episode.score(0.5)
            episode.comment("fine")
            episode.outcome(True)
        llm.chat.completions.create(model="agent", messages=HI)
    assert named[0] != named[1] and named[2] == "" == current_episode()
    found = [step.episode_id for _, step in kit.store.read(Step)]
    assert found[:5] == [named[0]] * 2 + [named[1]] * 2 + [episode.id] and found[5] not in found[:5]
    assert {r.episode_id for r in recorded(kit)} == {episode.id} and len(recorded(kit)) == 3
    with openai.OpenAI(base_url=episode.base_url, api_key=KEY) as plain:
        plain.chat.completions.create(model="agent", messages=HI)
    with openai.OpenAI(base_url=gradatim.base_url, api_key=KEY, default_headers=episode.headers) as plain:
        plain.chat.completions.create(model="agent", messages=HI)
    assert [s.episode_id for _, s in kit.store.read(Step, episode_id=episode.id)] == [episode.id] * 3


async def test_the_same_in_async_code(kit: Kit, url: str) -> None:
    async with AsyncGradatim(url, api_key=KEY) as gradatim:
        llm = openai.AsyncOpenAI(base_url=gradatim.base_url, api_key=KEY, default_headers=gradatim.headers)

        @gradatim.in_episode
        async def task() -> str:
            answer = await llm.chat.completions.create(model="agent", messages=HI)
            await gradatim.score(answer, 1)
            await gradatim.outcome(current_episode(), True)
            return current_episode()

        named = await asyncio.gather(task(), task(), task())
        assert len(set(named)) == 3 and current_episode() == ""
        with pytest.raises(FeedbackError):
            await gradatim.correct("chatcmpl-0", "x")
        await llm.close()
    assert sorted({r.episode_id for r in recorded(kit)}) == sorted(named)
    assert {s.episode_id for _, s in kit.store.read(Step)} == set(named)


async def test_async_retries_too(url: str, kit: Kit) -> None:
    calls: list[str] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request.content.decode())
        if len(calls) == 1:
            raise httpx.ConnectTimeout("slow")
        return httpx.Response(202, json={"id": "x"})

    async with AsyncGradatim(url, transport=httpx.MockTransport(answer)) as gradatim:
        assert await gradatim.score("chatcmpl-0", 1, id="x") == "x"
    assert len(calls) == 2 and calls[0] == calls[1]
