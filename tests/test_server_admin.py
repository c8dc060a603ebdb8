"""What an operator asks: episodes, explanations, adapters, health, status, metrics, models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradatim.server.records import backwards, newest, plain
from gradatim.testing.fakes import FakeEngine, FakeRouter, FakeStore
from gradatim.types import (
    Adapter,
    AdapterId,
    Credit,
    Decision,
    EpisodeId,
    Example,
    Feedback,
    Reward,
    Step,
    StepId,
    Update,
    Verdict,
)
from tests.server_kit import Kit, chat

CHAT = "/v1/chat/completions"


@pytest.fixture
def kit() -> Kit:
    return Kit()


@pytest.fixture
async def client(kit: Kit) -> AsyncIterator[httpx.AsyncClient]:
    async with kit.client() as client:
        yield client


async def test_adapters_are_listed_rolled_back_and_promoted(kit: Kit, client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/adapters")).json()
    assert [row["id"] for row in listed["data"]] == ["agent@0", "agent@1"] and listed["live"] == "agent@1"
    assert (await client.get("/v1/adapters/agent@1")).json()["stage"] == "live"
    assert (await client.post("/v1/adapters/agent@1/rollback", json={"reason": "worse"})).json() == {"live": "agent@0"}
    assert (await client.post("/v1/adapters/agent@1/promote")).json() == {"live": "agent@1"}
    assert kit.admin.calls == [("rollback", "agent@1", "person", "worse"), ("promote", "agent@1", "person", "")]
    assert (await client.post("/v1/adapters/agent@1/approve", json={"reason": "ok"})).json() == {"anchor": "agent@1"}
    assert kit.admin.calls.pop() == ("approve", "agent@1", "person", "ok")
    assert (await client.post("/v1/adapters/agent@1/reject")).status_code == 409
    assert (await client.post("/v1/adapters/agent@0/rollback")).status_code == 409
    for path in ("agent@9", "agent@9/rollback", "agent@9/promote"):
        method = "POST" if "/" in path else "GET"
        assert (await client.request(method, f"/v1/adapters/{path}")).status_code == 404
    wrong: list[Any] = [{"raeson": "x"}, {"reason": 5}, []]
    for body in wrong:
        assert (await client.post("/v1/adapters/agent@1/rollback", json=body)).status_code == 422
    assert (await client.post("/v1/adapters/agent@1/rollback", content=b"{")).status_code == 400


async def test_models_are_the_routed_name_and_every_version(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["agent", "agent@0", "agent@1"]
    assert (await client.get("/v1/models/agent@1")).json()["object"] == "model"
    missing = await client.get("/v1/models/org/other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


async def test_status_has_the_loops_words_and_the_servers_counters(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=chat())
    status = (await client.get("/v1/status")).json()
    assert status["learning"] is True and status["ratio"] is None
    assert status["server"]["responses"] == 1 and status["server"]["completion_tokens"] == 4
    assert status["server"]["queue_depth"] == 0 and status["server"]["errors"] == 0


async def test_metrics_are_prometheus_and_name_no_client_text(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=chat("words of a user", user="alice", stream=True))
    await client.get("/some/secret/path")
    text = (await client.get("/metrics")).text
    for line in (
        'gradatim_requests_total{route="chat_completions",status="200"} 1.0',
        'gradatim_requests_total{route="none",status="404"} 1.0',
        'gradatim_tokens_total{kind="completion"} 4.0',
        "gradatim_ttft_seconds_count 1.0",
        "gradatim_time_per_token_seconds_count 3.0",
        "gradatim_queue_depth 0.0",
        "gradatim_live_adapter_step 1.0",
        "gradatim_capture_lost_total 0.0",
        "gradatim_engine_generations 1.0",
    ):
        assert line in text
    assert "alice" not in text and "secret" not in text and "words" not in text


async def test_ready_means_an_adapter_is_loaded_and_the_store_answers() -> None:
    class Dead(FakeStore):
        def cursor(self, name: str) -> int:
            raise OSError("gone")

    for kit, status in (
        (Kit(), 200),
        (Kit(router=FakeRouter("agent@1")), 503),
        (Kit(router=FakeRouter("agent@1"), engine=FakeEngine(adapters=["agent@1"])), 200),
        (Kit(router=FakeRouter("other@0")), 503),
        (Kit(store=Dead()), 503),
    ):
        async with kit.client() as client:
            assert (await client.get("/readyz")).status_code == status
            assert (await client.get("/healthz")).json() == {"status": "ok"}


async def test_episodes_are_paged_newest_first_each_once(kit: Kit, client: httpx.AsyncClient) -> None:
    for session in ("a", "b", "c", "a", "d", "b", "e"):
        await client.post(CHAT, json=chat(), headers={"X-Session-Id": session})
    seen, query = [], "limit=2"
    while query:
        page = (await client.get(f"/v1/episodes?{query}")).json()
        seen += [row["id"] for row in page["data"]]
        query = f"limit=2&after={page['next_after']}" if page["has_more"] else ""
    assert seen == ["e", "b", "d", "a", "c"]
    (first, *_) = (await client.get("/v1/episodes")).json()["data"]
    assert (first["steps"], first["feedback"], first["reward"]) == (1, 0, None)
    for bad in ("limit=x", "limit=-1", "limit=1000", "after=1e9"):
        assert (await client.get(f"/v1/episodes?{bad}")).status_code == 422
    assert (await Kit().client().get("/v1/episodes")).json()["data"] == []


async def test_an_episode_shows_its_steps_and_the_newest_of_each_opinion(kit: Kit, client: httpx.AsyncClient) -> None:
    step = (await client.post(CHAT, json=chat(), headers={"X-Session-Id": "a"})).json()["id"]
    for value in (1, -1):
        body = {"id": "f", "kind": "score", "response_id": step, "value": value}
        await client.post("/v1/feedback", json=body)
    episode = (await client.get("/v1/episodes/a")).json()
    assert [s["id"] for s in episode["steps"]] == [step]
    assert [f["value"] for f in episode["feedback"]] == [-1.0]
    assert (await client.get("/v1/episodes/z")).status_code == 404


def _learned(step: Step, applied: bool) -> list[Any]:
    """Everything that the loop would have recorded about one corrected step."""
    example = Example(
        id="x1",
        created_at=3.0,
        episode_id=step.episode_id,
        step_id=step.id,
        prompt_ids=step.prompt_ids,
        chosen_ids=(1,),
        origin="correction",
    )
    update = Update(
        id="u1",
        created_at=4.0,
        applied=applied,
        parent_id=AdapterId("agent@0"),
        adapter_id=AdapterId("agent@1") if applied else None,
        example_ids=("x1",),
        metrics={"loss": float("nan")},
        refused_because="" if applied else "kl",
    )
    return [
        Reward(episode_id=step.episode_id, created_at=2.0, value=1.0, confidence=1.0, reason="corrected"),
        Credit(
            episode_id=step.episode_id, created_at=2.5, step_ids=(step.id,), advantages=(1.0,), methods=("correction",)
        ),
        example,
        replace(update, id="u0", example_ids=("other",)),
        update,
    ]


def _adapter(step: int) -> Adapter:
    return Adapter(
        id=AdapterId(f"agent@{step}"),
        name="agent",
        step=step,
        base_sha256="b",
        parent_id=AdapterId("agent@0") if step else None,
        sha256=f"{step}",
        path="",
        created_at=1.0,
    )


async def test_an_answer_is_explained_from_feedback_to_the_gate(kit: Kit, client: httpx.AsyncClient) -> None:
    async def story() -> Any:
        return (await client.get(f"/v1/explain/{step_id}")).json()

    step_id = (await client.post(CHAT, json=chat())).json()["id"]
    assert (await story())["summary"] == "recorded; no feedback yet"
    body = {"kind": "correction", "response_id": step_id, "correction": "better"}
    await client.post("/v1/feedback", json=body)
    assert (await story())["summary"] == "feedback recorded; not judged yet"
    step = kit.store.step(id=StepId(step_id))
    assert step is not None
    kit.store.append(*_learned(step, applied=True))
    kit.store.append(_adapter(0), _adapter(1))
    verdict = Verdict(
        adapter_id=AdapterId("agent@1"), created_at=5.0, gate="replay", decision=Decision.PASS, reason="kept all"
    )
    kit.store.append(verdict)
    told = await story()
    assert told["summary"] == "trained into agent@1"
    assert told["step"]["prompt_ids"] == list(step.prompt_ids)
    assert [f["correction"] for f in told["feedback"]] == ["better"]
    assert told["reward"]["reason"] == "corrected" and told["credit"]["method"] == "correction"
    assert [(u["id"], u["trained_on"], u["metrics"]) for u in told["updates"]] == [("u1", ["x1"], {"loss": None})]
    assert told["adapters"][0]["verdicts"][0]["reason"] == "kept all"
    assert [move["after"] for move in told["adapters"][0]["moves"]] == ["candidate"]
    assert (await client.get("/v1/explain/chatcmpl-0")).status_code == 404


async def test_a_refused_update_is_explained_with_its_reason(kit: Kit, client: httpx.AsyncClient) -> None:
    step_id = (await client.post(CHAT, json=chat())).json()["id"]
    step = kit.store.step(id=StepId(step_id))
    assert step is not None
    kit.store.append(*_learned(step, applied=False))
    told = (await client.get(f"/v1/explain/{step_id}")).json()
    assert told["summary"] == "the update was refused: kl" and told["adapters"] == []


async def test_an_example_that_was_left_out_is_explained_with_its_reason(kit: Kit, client: httpx.AsyncClient) -> None:
    step_id = (await client.post(CHAT, json=chat())).json()["id"]
    step = kit.store.step(id=StepId(step_id))
    assert step is not None
    reward, credit, example, update, *_ = _learned(step, applied=True)
    kit.store.append(
        reward, credit, example, replace(update, example_ids=("other",), left_out={"x1": "its weight is nan"})
    )
    told = (await client.get(f"/v1/explain/{step_id}")).json()
    assert told["summary"] == "left out of an update: its weight is nan"
    assert told["updates"][0]["left_out"] == {"x1": "its weight is nan"} and not told["updates"][0]["trained_on"]


# ------------------------------------------------------------------------------------- reading backwards


def _feedback(id: str) -> Feedback:
    return Feedback(id=id, created_at=1.0, kind="comment", source="human", episode_id=EpisodeId("e"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), max_size=40), st.integers(0, 600))
def test_reading_backwards_is_reading_forwards_reversed(kinds: list[bool], others: int) -> None:
    """Records of a kind stand anywhere between others; windows that hold none do not end the walk."""
    store = FakeStore()
    store.append(_reward(), *(_feedback(f"o{i}") for i in range(others)))
    for i, other in enumerate(kinds):
        store.append(_feedback(f"{i}") if other else _reward())
    forwards = list(store.read(Reward, limit=10_000))
    assert list(backwards(store, Reward, 0, 10_000)) == forwards[::-1]
    assert list(backwards(store, Reward, forwards[-1][0], 10_000)) == forwards[:-1][::-1]
    assert list(backwards(store, Reward, 0, 3)) == forwards[::-1][:3]


def _reward() -> Reward:
    return Reward(episode_id=EpisodeId("e"), created_at=1.0, value=None, confidence=0.0)


def test_the_newest_is_found_past_the_first_page() -> None:
    store = FakeStore()
    store.append(*(_reward() for _ in range(600)))
    store.append(replace(_reward(), value=0.5))
    found = newest(store, Reward, episode_id="e")
    assert found is not None and found.value == 0.5
    assert newest(store, Reward, episode_id="z") is None


def test_an_empty_log_has_no_end() -> None:
    assert list(backwards(FakeStore(), Step, 0, 10)) == []


def test_records_become_plain_json() -> None:
    assert plain({"a": (1, float("inf")), "b": Decision.PASS, 3: None}) == {"a": [1, None], "b": "pass", "3": None}


# ------------------------------------------------------------------------------- a store that cannot be written to


async def test_a_failed_write_is_told_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr("gradatim.server.health.time", SimpleNamespace(monotonic=lambda: now_s))
    kit = Kit(store=FakeStore())
    assert isinstance(kit.store, FakeStore)
    async with kit.client() as client:
        step_id = (await client.post(CHAT, json=chat())).json()["id"]
        assert (await client.get("/readyz")).status_code == 200
        opinion = {"kind": "score", "response_id": step_id, "value": 1}
        for call in (client.post(CHAT, json=chat()), client.post("/v1/feedback", json=opinion)):
            kit.store.broken = OSError("No space left on device: /srv/secret")
            await call
            kit.store.broken = None
            told = await client.get("/readyz")
            assert told.status_code == 503 and told.json()["engine"] == "ok"
            assert told.json()["store"].startswith("a write failed 0 s ago (StoreError)") and "secret" not in told.text
            now_s += 59.0
            assert (await client.get("/readyz")).status_code == 503
            now_s += 2.0
            assert (await client.get("/readyz")).json()["store"] == "ok"


async def test_what_the_client_did_wrong_is_no_trouble_of_the_store(client: httpx.AsyncClient) -> None:
    first, second = [(await client.post(CHAT, json=chat())).json()["id"] for _ in range(2)]
    for step_id, status in ((first, 202), (second, 409)):
        body = {"id": "f", "kind": "score", "response_id": step_id, "value": 1}
        assert (await client.post("/v1/feedback", json=body)).status_code == status
    assert (await client.get("/readyz")).status_code == 200
