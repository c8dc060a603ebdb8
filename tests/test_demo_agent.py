"""The demo's agent, operator, feedback and baselines against a scripted server."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from gradatim.demo.agent import EXAMPLES, REASKS, EpisodeRecord, StepRecord, messages, run_episode
from gradatim.demo.baselines import RetrievalAgent
from gradatim.demo.browser_free import browser_free_env
from gradatim.demo.operator import ScriptedOperator
from gradatim.demo.wire import Traffic, Wire
from tests.demo_server import FakeServer, serving


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def base_url(server: FakeServer) -> Iterator[str]:
    with serving(server) as url:
        yield url


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def wire(base_url: str) -> Iterator[Wire]:
    wire = Wire(base_url)
    yield wire
    wire.close()


def episode(client: openai.OpenAI, task: str = "login-user", seed: int = 1, **more: object) -> EpisodeRecord:
    env = browser_free_env(task)
    settings: dict[str, object] = {"model": "agent", "temperature": 0.7, "session_id": "s-1"} | more
    return run_episode(client, env, seed, **settings)  # type: ignore[arg-type]


def test_prompt_is_fixed_up_to_the_page() -> None:
    prompt = messages("PAGE")
    assert prompt[-1] == {"role": "user", "content": "PAGE"}
    assert prompt[:-1] == messages("OTHER")[:-1]
    assert len(prompt) == 2 + 2 * len(EXAMPLES)


def test_requests_carry_session_and_skill(client: openai.OpenAI, server: FakeServer) -> None:
    record = episode(client)
    asked = server.asked[0]
    assert (asked["session"], asked["turn"], asked["metadata"]) == ("s-1", None, {"skill": "login-user"})
    assert asked["max_tokens"] <= 16
    assert asked["stop"] == "\n"
    assert record.episode_id == "s-1"
    assert record.steps[0].response_id == "chatcmpl-0"
    assert record.steps[0].adapter == "agent@0"


def test_side_calls_are_marked(client: openai.OpenAI, server: FakeServer) -> None:
    episode(client, side=True)
    assert {a["turn"] for a in server.asked} == {"side"}


def test_greedy_on_an_unchanged_page_ends_the_attempt(client: openai.OpenAI, server: FakeServer) -> None:
    record = episode(client, temperature=0.0)  # the frozen model clicks into a field, which changes nothing
    assert (record.success, len(record.steps)) == (False, 1)


def test_operator_corrects_and_its_action_is_executed(client: openai.OpenAI, wire: Wire, server: FakeServer) -> None:
    record = episode(client, feedback=wire, operator=ScriptedOperator())
    assert record.success is True
    assert record.corrections == 3
    assert [f["kind"] for f in server.feedback] == ["correction"] * 3 + ["outcome"]
    first, outcome = server.feedback[0], server.feedback[-1]
    assert first["response_id"] == record.steps[0].response_id
    assert first["correction"] == record.steps[0].executed
    assert first["source"] == "human:operator"
    assert outcome == {"episode_id": "s-1", "kind": "outcome", "value": True, "source": "critic:miniwob"}


def test_taught_agent_needs_no_correction(client: openai.OpenAI, wire: Wire, server: FakeServer) -> None:
    episode(client, feedback=wire, operator=ScriptedOperator())
    record = episode(client, seed=2, feedback=wire, operator=ScriptedOperator())
    assert (record.success, record.corrections, record.steps[0].adapter) == (True, 0, "agent@1")


def test_inverted_operator_replaces_right_by_wrong(client: openai.OpenAI, wire: Wire, server: FakeServer) -> None:
    server.taught[0] = frozenset({"login-user"})
    record = episode(client, feedback=wire, operator=ScriptedOperator(inverted=True), outcome=False)
    assert record.corrections == len(record.steps) > 0
    assert {f["kind"] for f in server.feedback} == {"correction"}
    assert {a["stage"] for a in server.adapters} == {"rejected"}


def test_inverted_operator_leaves_wrong_actions_alone(client: openai.OpenAI, wire: Wire) -> None:
    assert episode(client, feedback=wire, operator=ScriptedOperator(inverted=True)).corrections == 0


def test_a_failed_request_is_unknown_and_counted(client: openai.OpenAI, server: FakeServer) -> None:
    server.fail_every = 2
    traffic = Traffic()
    record = episode(client, traffic=traffic)
    assert record.success is None
    assert "scripted failure" in record.failed_request
    assert (traffic.requests, len(traffic.failures)) == (2, 1)


def test_failed_feedback_is_counted_and_raised(wire: Wire) -> None:
    with pytest.raises(httpx.HTTPStatusError):
        wire.correction("never-issued", "click 1")
    assert len(wire.traffic.failures) == 1


def test_adapters_and_status_are_read(client: openai.OpenAI, wire: Wire) -> None:
    episode(client, feedback=wire, operator=ScriptedOperator())
    adapters, live = wire.adapters()
    assert live == "agent@1" == wire.status().live
    assert [(a.id, a.stage, a.parent, dict(a.made_of)) for a in adapters] == [
        ("agent@1", "live", "agent@0", {"correction": 3})
    ]
    assert wire.status().feedback_to_live_s == (1.0, 2.5)


def step(observation: str, answer: str, executed: str, valid: bool = True) -> StepRecord:
    return StepRecord(observation, answer, executed, valid, "r", "agent@0", 0.1)


def test_retrieval_takes_corrections_and_successes_and_shows_the_nearest() -> None:
    agent = RetrievalAgent(k=2)
    assert agent.prompt("x") == messages("x", EXAMPLES[:2])
    failed = EpisodeRecord("t", 1, False, (step("alpha one", "bad", "good"), step("beta two", "bad", "bad")), "e")
    won = EpisodeRecord("t", 2, True, (step("gamma three", "fine", "fine"), step("delta", "junk", "junk", False)), "e")
    agent.learn([failed, won])
    assert len(agent) == 2
    assert agent.retrieve("alpha three one")[-1] == ("alpha one", "good")
    assert agent.prompt("gamma")[-2] == {"role": "assistant", "content": "fine"}


def test_it_asks_again_rather_than_repeat_what_did_not_help(client: openai.OpenAI, server: FakeServer) -> None:
    record = episode(client)  # it knows nothing but "click 1", which changes nothing
    assert record.success is False
    assert len(server.asked) == 1 + REASKS * (len(record.steps) - 1)
    server.asked.clear()
    episode(client, failed=record.last_move)
    assert len(server.asked) == REASKS * len(record.steps)
