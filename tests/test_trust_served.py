"""Held-out judges and the shadow in the product: a real server and its loop process, over HTTP."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from gradatim.app.home import Home
from gradatim.app.launch import launch
from gradatim.cli import app
from gradatim.store import SqlShelf, open_store
from gradatim.types import Move, ShadowPair, Stage, Step, Verdict

from .records import feedback, step
from .test_drift_served import WITHIN_S, until

GAMED = """
[learner]
min_examples = 100000
[loop]
settle_s = 0.0
[reward]
held_out = ["critic:kept"]
[drift]
alarm = 1e3
season_s = 0
"""
SHADOWED = """
[learner]
rank = 4
min_examples = 2
max_wait_s = 0.5
max_length = 128
[loop]
settle_s = 0.0
[shadow]
prompts = 12
least = 4
undecided = "pairs"
max_tokens = 8
[shadow.critic]
use = "tests.critics:good"
"""


@dataclass(frozen=True)
class Served:
    url: str
    data: Path
    settings: Path

    def ask(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=60.0, trust_env=False)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = httpx.post(self.url + path, json=body, timeout=60.0, trust_env=False)
        answer.raise_for_status()
        return answer.json()

    def command(self, *words: str) -> str:
        return CliRunner().invoke(app, [*words, "--data-dir", str(self.data), "--config", str(self.settings)]).output


@contextlib.contextmanager
def serving(tmp_path: Path, model: Path, text: str) -> Iterator[Served]:
    settings = tmp_path / "gradatim.toml"
    settings.write_text(text)
    server = launch(tmp_path / "data", "--model", str(model), "--config", str(settings), within_s=WITHIN_S)
    try:
        yield Served(server.url, tmp_path / "data", settings)
    finally:
        server.kill()


def please_users(data: Path, episodes: int) -> None:
    """In the second half users are pleased by nearly everything; a judge that nobody learns from is not."""
    dice, now = random.Random(0), time.time()
    with open_store(Home(data).store) as store:
        for i in range(episodes):
            sound, name = dice.random() < 0.5, f"e{i}"
            pleased = sound or (i > episodes // 2 and dice.random() < 0.8)
            at = now - episodes + i
            store.append(
                step(f"s{i}", name, created_at=at),
                feedback("outcome", name, created_at=at, value=1.0 if sound else -1.0, source="critic:kept"),
                feedback("outcome", name, created_at=at, value=1.0 if pleased else -1.0),
            )


@pytest.mark.timeout(900)
def test_a_reward_that_rises_without_its_judges_is_told_everywhere(tmp_path: Path, tiny_model_dir: Path) -> None:
    Home(tmp_path / "data").prepare()
    please_users(tmp_path / "data", 800)
    with serving(tmp_path, tiny_model_dir, GAMED) as at:
        until(lambda: at.ask("/v1/status").json()["gamed"], "the status does not tell it")
        gamed = at.ask("/v1/status").json()["gamed"]
        assert gamed["adapter"] == "agent@0" and "held-out judges" in gamed["reason"]
        assert "gradatim_proxy_" in at.ask("/metrics").text
        assert "gamed" in at.command("doctor")
    with open_store(Home(at.data).store) as store:
        (found,) = [v for _, v in store.read(Verdict, gate="proxy")]
    assert found.evidence["reward_after"] > found.evidence["reward_before"] + 0.1


@pytest.mark.timeout(900)
def test_a_candidate_goes_through_the_shadow_beside_the_traffic(tmp_path: Path, tiny_model_dir: Path) -> None:
    with serving(tmp_path, tiny_model_dir, SHADOWED) as at:
        for i in range(30):
            asked = {"model": "agent", "max_tokens": 4, "messages": [{"role": "user", "content": f"door {i}?"}]}
            answer = at.post("/v1/chat/completions", asked)
            if i % 10 < 3:
                said = {"response_id": answer["id"], "kind": "correction", "correction": "open", "source": "human:a"}
                at.post("/v1/feedback", said)

        def judged() -> list[Verdict]:
            with open_store(Home(at.data).store) as store:
                told = [v for _, v in store.read(Verdict, gate="shadow")]
            return [v for v in told if v.decision.value != "wait"]

        until(judged, "the shadow decided nothing")
        assert at.ask("/v1/status").json()["loop"].get("error") in (None, "")
    with open_store(Home(at.data).store) as store:
        first = judged()[0]
        ways = [(m.before, m.after) for _, m in store.read(Move, adapter_id=first.adapter_id)]
        assert (Stage.CANDIDATE, Stage.SHADOW) in ways
        pairs = SqlShelf(store.engines).load(ShadowPair, adapter_id=first.adapter_id)
        assert len(pairs) == first.evidence["pairs"] > 0
        assert all(p.reward is not None and p.live_reward is not None for p in pairs)
        assert not [s for _, s in store.read(Step) if s.stage == "shadow"], "users and the learner see none of it"
