"""Critics in the product: a real server with its loop process, which is killed while episodes come in."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from gradatim.app.home import Home
from gradatim.app.launch import Launched, launch
from gradatim.app.learning import once
from gradatim.client import Gradatim
from gradatim.config import load
from gradatim.errors import InUseError
from gradatim.store import open_store
from gradatim.types import Feedback, Reward, Step
from tests.records import step

WITHIN_S = 240.0
SETTINGS = """
[learner]
min_examples = 1000
[critics]
quiet_s = 0.5
implicit = ["retry"]
[[critics.run]]
use = "tests.critics:good"
[[critics.run]]
use = "tests.critics:raises"
[[critics.run]]
use = "gradatim.feedback.checks:length"
options = {most_chars = 0}
"""


def start(folder: Path, model: Path, settings: str = SETTINGS) -> Launched:
    path = folder / "gradatim.toml"
    path.write_text(settings)
    return launch(folder / "data", "--model", str(model), "--config", str(path), within_s=WITHIN_S)


def until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def ask(server: Launched, episode: str, times: int = 2) -> None:
    body = {"model": "agent", "max_tokens": 4, "messages": [{"role": "user", "content": "door?"}]}
    for _ in range(times):
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            json=body,
            headers={"X-Session-Id": episode},
            timeout=60.0,
            trust_env=False,
        )
        answer.raise_for_status()


def kill_loop(server: Launched) -> None:
    if pid := Home(server.data_dir).holder("loop"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(1200)
def test_every_episode_is_judged_once_whatever_is_killed(tmp_path: Path, tiny_model_dir: Path) -> None:
    server = start(tmp_path, tiny_model_dir)
    names = [f"episode-{i}" for i in range(9)]
    try:
        for i, name in enumerate(names):
            ask(server, name)
            if i % 3 == 2:
                time.sleep(0.3 * i)
                kill_loop(server)
            if i == 4:
                server.kill()
                server = start(tmp_path, tiny_model_dir)
        with Gradatim(server.url) as gradatim:
            gradatim.outcome(names[0], True)

        def all_judged() -> bool:
            with open_store(tmp_path / "data" / "gradatim.db") as store:
                return {f.episode_id for _, f in store.read(Feedback, source="critic:length")} == set(names)

        until(all_judged, "not every episode was judged")

        def counts() -> dict[str, Any]:
            status = httpx.get(f"{server.url}/v1/status", timeout=60.0, trust_env=False).json()
            found: dict[str, Any] = status["loop"].get("critics", {})
            return found

        ask(server, "one-more")
        names.append("one-more")
        until(all_judged, "the episode after the last kill was not judged")
        until(lambda: "length" in counts(), "the status does not count what critics said")
        assert counts()["raises"]["unknown"] >= 1 and counts()["good"]["unknown"] == 0
        metrics = httpx.get(f"{server.url}/metrics", timeout=60.0, trust_env=False).text
        assert "gradatim_critics_unknown " in metrics and "gradatim_critics_unknown 0.0" not in metrics
    finally:
        server.kill()
    with open_store(tmp_path / "data" / "gradatim.db") as store:
        rows = [f for _, f in store.read(Feedback) if f.id.startswith("critic-")]
        steps = [(s.episode_id, s.id) for _, s in store.read(Step)]
    newest = {f.id: f for f in rows}
    standing = [f for f in newest.values() if not f.retracted]
    for name in names:
        of = {f.source: f for f in standing if f.episode_id == name}
        assert set(of) == {"critic:good", "critic:raises", "critic:length", "implicit:retry"}
        assert of["critic:good"].value == 1.0 and of["critic:raises"].value is None
        assert of["critic:length"].step_id in {s for e, s in steps if e == name}
    assert len(standing) == 4 * len(names)


def test_one_turn_by_hand_asks_the_critics_first_and_waits_for_nothing(tmp_path: Path, tiny_model_dir: Path) -> None:
    settings = {
        "model": str(tiny_model_dir),
        "data_dir": str(tmp_path / "data"),
        "critics": {"quiet_s": 1e9, "run": [{"use": "tests.critics:good"}]},
    }
    config = load(overrides=settings, env={})
    Home(Path(config.data_dir)).prepare()
    with open_store(tmp_path / "data" / "gradatim.db") as store:
        store.append(step("s1", "e", created_at=time.time()))
    once(config)
    with open_store(tmp_path / "data" / "gradatim.db") as store:
        assert [f.source for _, f in store.read(Feedback)] == ["critic:good"]
        assert [(r.episode_id, r.value) for _, r in store.read(Reward)] == [("e", 1.0)]


def test_a_server_with_a_critic_that_cannot_be_made_does_not_start(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(InUseError, match=r"critics\.run: tests\.critics:nobody"):
        start(tmp_path, tiny_model_dir, "[[critics.run]]\nuse = 'tests.critics:nobody'\n")
