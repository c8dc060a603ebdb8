"""Any sequence of opinions, revisions and retractions over the wire ends in what a dictionary of them would hold."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradatim.testing.fakes import FakeStore
from gradatim.types import Feedback
from tests.server_kit import Kit, chat

IDS = st.sampled_from(["a", "b", "c"])
TARGETS = st.sampled_from(["first", "second", "episode", "nowhere"])
SAID = st.one_of(
    st.fixed_dictionaries({"kind": st.just("score"), "value": st.sampled_from([-1, -0.5, 0, 1, True, False])}),
    st.fixed_dictionaries({"kind": st.just("outcome"), "value": st.sampled_from([True, False, None])}),
    st.fixed_dictionaries({"kind": st.just("comment"), "comment": st.sampled_from(["hm", "fine"])}),
)
MOVES = st.lists(st.one_of(st.tuples(IDS, TARGETS, SAID), st.tuples(IDS)), max_size=12)


def value_of(said: dict[str, Any]) -> float | None:
    value = said.get("value")
    return None if value is None else (1.0 if value else -1.0) if isinstance(value, bool) else float(value)


async def play(moves: list[Any]) -> None:
    store = FakeStore()
    async with Kit(store=store).client() as client:
        answers = [(await client.post("/v1/chat/completions", json=chat(text))).json() for text in ("one", "two")]
        targets = {
            "first": {"response_id": answers[0]["id"]},
            "second": {"response_id": answers[1]["id"]},
            "episode": {"episode_id": answers[0]["gradatim"]["episode_id"]},
            "nowhere": {"response_id": "chatcmpl-0"},
        }
        expected: dict[str, tuple[str, tuple[Any, ...], bool]] = {}
        for move in moves:
            if len(move) == 1:
                status = (await client.delete(f"/v1/feedback/{move[0]}")).status_code
                assert status == (200 if move[0] in expected else 404)
                if move[0] in expected:
                    expected[move[0]] = (*expected[move[0]][:2], True)
                continue
            feedback_id, target, said = move
            before = len(store.read(Feedback))
            status = await post(client, {"id": feedback_id, **targets[target], **said})
            content = (said["kind"], value_of(said), said.get("comment", ""))
            if target == "nowhere":
                assert status == 404
            elif feedback_id in expected and expected[feedback_id][0] != target:
                assert status == 409
            else:
                assert status == 202
                changed = expected.get(feedback_id) != (target, content, False)
                assert len(store.read(Feedback)) == before + changed, "what was said already is not written again"
                expected[feedback_id] = (target, content, False)
                continue
            assert len(store.read(Feedback)) == before, "what is refused is not written"
    newest = {f.id: (f.kind, f.value, f.comment, f.retracted) for _, f in store.read(Feedback)}
    assert newest == {i: (*content, retracted) for i, (_, content, retracted) in expected.items()}
    standing = {f.id for case in store.cases() for f in case.feedback}
    assert standing == {i for i, (_, _, retracted) in expected.items() if not retracted}


async def post(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    return (await client.post("/v1/feedback", json=body)).status_code


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(MOVES)
def test_any_sequence_of_opinions_revisions_and_retractions(moves: list[Any]) -> None:
    asyncio.run(play(moves))
