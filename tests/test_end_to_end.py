"""The closed loop on the real model, over the wire: corrections go in, an adapter that learned them comes out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from gradatim.app.launch import launched
from gradatim.nn.base import Base

CONFIG = """
[learner]
epochs = 8
min_examples = 6
batch = 3
"""
TEACHES = "teal lantern"
GIVE_UP_S = 240.0


def ask(http: httpx.Client, question: str, model: str = "agent") -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 12, "temperature": 0}
    answer: dict[str, Any] = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    return answer


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def teach(http: httpx.Client, number: int) -> str:
    """One episode: a question, its correction, its outcome. The response id."""
    answer = ask(http, f"What is the password of door {number}?")
    for feedback in (
        {"response_id": answer["id"], "kind": "correction", "correction": TEACHES, "source": "human:test"},
        {
            "episode_id": answer["gradatim"]["episode_id"],
            "kind": "outcome",
            "value": True,
            "source": "critic:test",
        },
    ):
        assert http.post("/v1/feedback", json=feedback).status_code == 202
    return str(answer["id"])


def wait_for_live(http: httpx.Client, other_than: str) -> str:
    deadline = time.monotonic() + GIVE_UP_S
    while time.monotonic() < deadline:
        live = str(http.get("/v1/adapters").json()["live"])
        if live != other_than:
            return live
        time.sleep(0.5)
    raise AssertionError(f"nothing went live within {GIVE_UP_S:g} s: {http.get('/v1/status').text}")


@pytest.mark.timeout(600)
def test_corrections_become_a_live_adapter_that_can_be_undone(
    tmp_path: Path, smollm2_data_dir: Path, smollm2_base: Base
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "models").symlink_to(smollm2_data_dir / "models")
    config = tmp_path / "gradatim.toml"
    config.write_text(CONFIG)
    with (
        launched(data, ("--config", str(config), "--dtype", "float32")) as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        frozen = text(ask(http, "What is the password of door 99?"))
        assert TEACHES not in frozen
        taught = [teach(http, number) for number in range(6)]

        live = wait_for_live(http, "agent@0")
        learned = ask(http, "What is the password of door 99?")
        assert learned["gradatim"]["adapter"] == live
        assert TEACHES in text(learned)

        story = http.get(f"/v1/explain/{taught[0]}").json()
        assert "correction" in str(story)
        assert live in str(story)

        http.post("/v1/adapters/agent@0/rollback", json={"reason": "a test"}).raise_for_status()
        undone = ask(http, "What is the password of door 99?")
        assert undone["gradatim"]["adapter"] == "agent@0"
        assert text(undone) == frozen
        assert TEACHES in text(ask(http, "What is the password of door 99?", model=live))
