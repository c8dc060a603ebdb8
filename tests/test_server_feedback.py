"""The feedback routes: every kind, durable before its answer, idempotent, revised, retracted, and in others' shapes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from gradatim.testing.fakes import FakeStore
from gradatim.types import Feedback
from tests.server_kit import Kit, chat

CHAT = "/v1/chat/completions"
FEEDBACK = "/v1/feedback"


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
async def client(store: FakeStore) -> AsyncIterator[httpx.AsyncClient]:
    async with Kit(store=store).client() as client:
        yield client


@pytest.fixture
async def answer(client: httpx.AsyncClient) -> dict[str, Any]:
    body: dict[str, Any] = (await client.post(CHAT, json=chat(n=2))).json()
    return body


def recorded(store: FakeStore) -> list[Feedback]:
    return [feedback for _, feedback in store.read(Feedback)]


async def test_every_kind_is_recorded_with_its_target(
    store: FakeStore, client: httpx.AsyncClient, answer: dict[str, Any]
) -> None:
    step, episode = answer["id"], answer["gradatim"]["episode_id"]
    bodies: list[dict[str, Any]] = [
        {"kind": "score", "response_id": step, "value": 0.5, "source": "human:alice", "confidence": 0.5, "tags": ["a"]},
        {"kind": "score", "response_id": f"{step}:1", "value": False, "comment": "no", "source": "judge:m"},
        {"kind": "score", "episode_id": episode, "value": -1},
        {"kind": "preference", "chosen_id": f"{step}:1", "rejected_id": step},
        {"kind": "correction", "response_id": step, "correction": "better", "source": "critic:unit-tests"},
        {"kind": "outcome", "episode_id": episode, "value": True, "source": "critic"},
        {"kind": "outcome", "response_id": step, "value": False, "source": "implicit:click"},
        {"kind": "outcome", "episode_id": episode, "value": None},
        {"kind": "comment", "response_id": step, "comment": "hm"},
    ]
    for body in bodies:
        response = await client.post(FEEDBACK, json=body)
        assert response.status_code == 202, response.text
        assert response.json() == {"id": recorded(store)[-1].id}
    rows = recorded(store)
    assert {row.episode_id for row in rows} == {episode}
    assert [row.kind for row in rows] == [body["kind"] for body in bodies]
    assert [row.value for row in rows] == [0.5, -1.0, -1.0, None, None, 1.0, -1.0, None, None]
    assert rows[0].target == (episode, step, "") and rows[2].target == (episode, "", "")
    assert rows[3].target == (episode, f"{step}:1", step)
    assert (rows[0].source, rows[0].confidence, rows[0].tags) == ("human:alice", 0.5, ("a",))
    assert (rows[4].correction, rows[1].comment) == ("better", "no")
    assert 'gradatim_feedback_total{kind="score"} 3.0' in (await client.get("/metrics")).text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"kind": "score", "response_id": "R"}, "value"),
        ({"kind": "score", "response_id": "R", "value": 1.5}, "value"),
        ({"kind": "score", "response_id": "R", "value": "1"}, "value"),
        ({"kind": "score", "value": 1}, "response_id"),
        ({"kind": "score", "response_id": "R", "episode_id": "E", "value": 1}, "response_id"),
        ({"kind": "score", "response_id": "R", "value": 1, "correction": "x"}, "correction"),
        ({"kind": "score", "response_id": "R", "value": 1, "valeu": 1}, "valeu"),
        ({"kind": "score", "response_id": "R", "value": 1, "source": "martian"}, "source"),
        ({"kind": "score", "response_id": "R", "value": 1, "source": "human:"}, "source"),
        ({"kind": "score", "response_id": "R", "value": 1, "source": "human:a\nb"}, "source"),
        ({"kind": "score", "response_id": "R", "value": 1, "confidence": 0}, "confidence"),
        ({"kind": "score", "response_id": "R", "value": 1, "confidence": 2}, "confidence"),
        ({"kind": "score", "response_id": "R", "value": 1, "tags": "a"}, "tags"),
        ({"kind": "score", "response_id": "R", "value": 1, "id": "a b"}, "id"),
        ({"kind": "score", "response_id": "R", "value": 1, "id": 5}, "id"),
        ({"kind": "score", "response_id": 5, "value": 1}, "response_id"),
        ({"kind": "verdict", "response_id": "R"}, "kind"),
        ({"response_id": "R", "value": 1}, "kind"),
        ({"kind": "outcome", "response_id": "R", "value": 1}, "value"),
        ({"kind": "outcome", "response_id": "R", "value": 0.5}, "value"),
        ({"kind": "outcome", "response_id": "R"}, "value"),
        ({"kind": "correction", "response_id": "R"}, "correction"),
        ({"kind": "correction", "response_id": "R", "correction": "  "}, "correction"),
        ({"kind": "correction", "response_id": "R", "correction": "x" * 65537}, "correction"),
        ({"kind": "correction", "correction": "x"}, "response_id"),
        ({"kind": "correction", "episode_id": "E", "correction": "x"}, "response_id"),
        ({"kind": "comment", "response_id": "R", "comment": ""}, "comment"),
        ({"kind": "preference", "chosen_id": "R"}, "rejected_id"),
        ({"kind": "preference", "chosen_id": "R", "rejected_id": "R"}, "rejected_id"),
        ({"kind": "preference", "chosen_id": "R", "rejected_id": "R:1", "response_id": "R"}, "response_id"),
        ({"kind": "preference", "chosen_id": "R", "rejected_id": "R:1", "value": 1}, "value"),
    ],
)
async def test_a_bad_body_is_422_and_names_the_field(
    store: FakeStore, client: httpx.AsyncClient, answer: dict[str, Any], body: dict[str, Any], param: str
) -> None:
    real = {"R": answer["id"], "R:1": answer["id"] + ":1", "E": answer["gradatim"]["episode_id"]}
    body = {key: real.get(value, value) if isinstance(value, str) else value for key, value in body.items()}
    response = await client.post(FEEDBACK, json=body)
    assert response.status_code == 422, response.text
    assert response.json()["error"]["param"] == param
    assert recorded(store) == []


@pytest.mark.parametrize(("raw", "status"), [(b"{", 400), (b'{"value": NaN}', 400), (b"[]", 422), (b"null", 422)])
async def test_what_is_no_object_is_refused(client: httpx.AsyncClient, raw: bytes, status: int) -> None:
    assert (await client.post(FEEDBACK, content=raw)).status_code == status


async def test_an_id_never_issued_is_404(client: httpx.AsyncClient, answer: dict[str, Any]) -> None:
    for body in (
        {"kind": "score", "response_id": "chatcmpl-0", "value": 1},
        {"kind": "score", "response_id": answer["id"] + ":2", "value": 1},
        {"kind": "score", "episode_id": "nobody", "value": 1},
        {"kind": "preference", "chosen_id": answer["id"], "rejected_id": "chatcmpl-0"},
    ):
        response = await client.post(FEEDBACK, json=body)
        assert response.status_code == 404 and response.json()["error"]["message"]
    assert (await client.get(FEEDBACK + "/nothing")).status_code == 404
    assert (await client.delete(FEEDBACK + "/nothing")).status_code == 404


async def test_a_preference_is_between_answers_to_one_prompt(client: httpx.AsyncClient, answer: dict[str, Any]) -> None:
    same = (await client.post(CHAT, json=chat())).json()["id"]
    other = (await client.post(CHAT, json=chat("another prompt"))).json()["id"]
    body = {"kind": "preference", "chosen_id": answer["id"]}
    assert (await client.post(FEEDBACK, json=body | {"rejected_id": same})).status_code == 202
    refused = await client.post(FEEDBACK, json=body | {"rejected_id": other})
    assert refused.status_code == 422 and "same prompt" in refused.json()["error"]["message"]


async def test_the_same_id_is_recorded_once_revised_and_never_retargeted(
    store: FakeStore, client: httpx.AsyncClient, answer: dict[str, Any]
) -> None:
    body = {"id": "mine-1", "kind": "score", "response_id": answer["id"], "value": 1}
    for _ in range(3):
        assert (await client.post(FEEDBACK, json=body)).json() == {"id": "mine-1"}
    assert len(recorded(store)) == 1
    assert (await client.post(FEEDBACK, json=body | {"value": -1})).status_code == 202
    assert [row.value for row in recorded(store)] == [1.0, -1.0]
    assert (await client.get(FEEDBACK + "/mine-1")).json()["value"] == -1.0
    conflict = await client.post(FEEDBACK, json=body | {"response_id": answer["id"] + ":1"})
    assert conflict.status_code == 409 and conflict.json()["error"]["type"] == "conflict_error"


async def test_the_idempotency_key_is_an_id(
    store: FakeStore, client: httpx.AsyncClient, answer: dict[str, Any]
) -> None:
    body = {"kind": "score", "response_id": answer["id"], "value": 1}
    for _ in range(2):
        response = await client.post(FEEDBACK, json=body, headers={"Idempotency-Key": "k-1"})
        assert response.json() == {"id": "k-1"}
    assert len(recorded(store)) == 1
    differing = await client.post(FEEDBACK, json=body | {"id": "k-2"}, headers={"Idempotency-Key": "k-1"})
    assert differing.status_code == 422
    assert (await client.post(FEEDBACK, json=body, headers={"Idempotency-Key": "a b"})).status_code == 422


async def test_ids_of_the_configured_critics_cannot_be_taken(
    store: FakeStore, client: httpx.AsyncClient, answer: dict[str, Any]
) -> None:
    body = {"kind": "score", "response_id": answer["id"], "value": 1}
    assert (await client.post(FEEDBACK, json=body | {"id": "critic-0"})).status_code == 422
    assert (await client.post(FEEDBACK, json=body, headers={"Idempotency-Key": "critic-0"})).status_code == 422
    assert not recorded(store)


async def test_feedback_is_retracted_by_a_newer_revision(
    store: FakeStore, client: httpx.AsyncClient, answer: dict[str, Any]
) -> None:
    body = {"id": "f", "kind": "score", "response_id": answer["id"], "value": 1}
    await client.post(FEEDBACK, json=body)
    for _ in range(2):
        assert (await client.delete(FEEDBACK + "/f")).json() == {"id": "f", "retracted": True}
    assert [row.retracted for row in recorded(store)] == [False, True]
    assert store.cases()[0].feedback == ()
    assert (await client.get(FEEDBACK + "/f")).json()["retracted"] is True


async def test_a_full_disk_acknowledges_nothing(
    store: FakeStore, client: httpx.AsyncClient, answer: dict[str, Any]
) -> None:
    body = {"id": "f", "kind": "score", "response_id": answer["id"], "value": 1}
    store.broken = OSError(28, "No space left on device")
    response = await client.post(FEEDBACK, json=body)
    assert response.status_code == 503 and "retry-after" in response.headers
    store.broken = None
    assert recorded(store) == []
    assert (await client.post(FEEDBACK, json=body)).status_code == 202


@pytest.mark.parametrize("path", ["/feedback", FEEDBACK])
async def test_tensorzeros_bodies_are_understood(
    store: FakeStore, client: httpx.AsyncClient, answer: dict[str, Any], path: str
) -> None:
    step, episode = {"inference_id": answer["id"]}, {"episode_id": answer["gradatim"]["episode_id"]}
    for body in (
        {"metric_name": "exact_match", "value": True, "tags": {"x": "y"}} | step,
        {"metric_name": "task_success", "value": False} | episode,
        {"metric_name": "rating", "value": 0.25} | episode,
        {"metric_name": "comment", "value": "nice"} | step,
        {"metric_name": "demonstration", "value": "better"} | step,
        {
            "metric_name": "demonstration",
            "value": [{"type": "text", "text": "much "}, {"type": "text", "text": "better"}],
        }
        | step,
    ):
        response = await client.post(path, json=body)
        assert response.status_code in (200, 202), response.text
        assert set(response.json()) == ({"feedback_id"} if path == "/feedback" else {"id"})
    rows = recorded(store)
    assert [row.kind for row in rows] == ["score", "outcome", "score", "comment", "correction", "correction"]
    assert [row.value for row in rows] == [1.0, -1.0, 0.25, None, None, None]
    assert rows[5].correction == "much better"
    assert rows[0].source == "critic:exact_match" and rows[0].tags == ("metric:exact_match",)
    for bad in (
        {"metric_name": "rating", "value": 7} | step,
        {"metric_name": "rating", "value": "seven"} | step,
        {"metric_name": "rating", "value": 1},
        {"metric_name": "rating", "value": 1} | step | episode,
        {"metric_name": "rating", "value": 1, "dryrun": True} | step,
        {"metric_name": "demonstration", "value": "better"} | episode,
        {"metric_name": "a\nb", "value": True} | step,
        {"metric_name": "demonstration", "value": [{"type": "image"}]} | step,
        {"metric_name": "comment", "value": " "} | step,
    ):
        assert (await client.post(path, json=bad)).status_code == 422, bad
    assert len(recorded(store)) == 6


@pytest.mark.parametrize("path", ["/api/public/scores", FEEDBACK])
async def test_langfuses_scores_are_understood(
    store: FakeStore, client: httpx.AsyncClient, answer: dict[str, Any], path: str
) -> None:
    step, episode = answer["id"], answer["gradatim"]["episode_id"]
    for body in (
        {"traceId": step, "name": "helpful", "value": 0.5, "comment": "ok", "id": "s1", "environment": "prod"},
        {"traceId": episode, "observationId": step, "name": "ok", "value": 0, "dataType": "BOOLEAN"},
        {"traceId": episode, "name": "done", "value": 1},
        {"traceId": episode, "name": "tone", "value": "polite", "dataType": "CATEGORICAL"},
        {"sessionId": episode, "name": "done", "value": -1},
    ):
        response = await client.post(path, json=body)
        assert response.status_code in (200, 202), response.text
    rows = recorded(store)
    assert [row.kind for row in rows] == ["score", "score", "score", "comment", "score"]
    assert [row.value for row in rows] == [0.5, -1.0, 1.0, None, -1.0]
    assert [row.step_id for row in rows] == [step, step, None, None, None]
    assert rows[0].id == "s1" and rows[0].comment == "ok" and rows[3].comment == "tone: polite"
    for bad in (
        {"traceId": step, "name": "x", "value": 5},
        {"traceId": step, "name": "x", "value": 0.5, "dataType": "BOOLEAN"},
        {"traceId": step, "value": 0.5},
        {"traceId": 7, "name": "x", "value": 0.5},
    ):
        assert (await client.post(path, json=bad)).status_code == 422, bad
