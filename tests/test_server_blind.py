"""Raters must not learn which adapter answered: neither from the body, nor from a stream, nor from the headers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from gradatim.config import Config, ReleaseConfig
from gradatim.testing.fakes import fake_sha256

from .server_kit import Kit, chat

BLIND = Config(release=ReleaseConfig(blind=True))


def tells(answer: httpx.Response, adapter: str = "agent@0") -> bool:
    said = answer.text + str(answer.headers)
    return adapter in said or fake_sha256(adapter)[:12] in said


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}])
@pytest.mark.parametrize("blind", [True, False])
async def test_an_answer_tells_its_adapter_only_where_raters_may_know(fields: dict[str, Any], blind: bool) -> None:
    kit = Kit(config=BLIND if blind else Config())
    async with kit.client() as http:
        answers = [
            await http.post("/v1/chat/completions", json=chat(**fields)),
            await http.post("/v1/completions", json={"model": "agent", "prompt": "hi", **fields}),
        ]
    assert all(a.status_code == 200 for a in answers)
    assert [tells(a) for a in answers] == [not blind] * 2


async def test_the_receipt_leads_an_operator_to_the_adapter() -> None:
    async with Kit(config=BLIND).client() as http:
        answer = await http.post("/v1/chat/completions", json=chat())
        receipt = answer.json()["gradatim"]["receipt"]
        explained = await http.get(f"/v1/explain/{receipt}")
    assert explained.status_code == 200
    assert tells(explained)


async def test_a_pinned_answer_names_its_adapter() -> None:
    async with Kit(config=BLIND).client() as http:
        answer = await http.post("/v1/chat/completions", json=chat() | {"model": "agent@0"})
    assert tells(answer)
