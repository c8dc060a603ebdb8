"""``kill -9`` of server and loop while a client goes on, rolls back and has things forgotten: nothing that was
acknowledged is lost, and nothing that was forgotten comes back.

``--kills 1000`` makes as many in the slow test (``make kills``).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from gradatim.app.home import Home
from gradatim.app.launch import Launched, launch
from gradatim.app.memory import open_admin
from gradatim.config import Config
from gradatim.memory.decisions import CURSOR
from gradatim.nn.lora import read_adapter
from gradatim.store import SqlStore, audit, open_store
from gradatim.types import Adapter, Feedback, Stage, StepId, Update

READY_WITHIN_S = 240.0  # a few seconds on a machine of its own; on one that others load, the nice loop starves
SETTINGS = """
[learner]
rank = 4
min_examples = 2
max_wait_s = 0.5
max_length = 128
[loop]
settle_s = 0.0
[memory]
decisions = true
tokens = true
harm = 1000000
max_entries = 1000000
"""


@dataclass
class Client:
    """Asks and corrects without a pause, and writes down what was acknowledged."""

    url: str = ""
    responses: list[str] = field(default_factory=list)
    feedback: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)  # episodes
    refused: list[int] = field(default_factory=list)
    rolled_back: int = 0
    ready_s: list[float] = field(default_factory=list)  # from each start to the first answer that it is ready
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            with contextlib.suppress(httpx.TransportError):  # killed in the middle: not acknowledged
                self._episode(turn)
                continue
            time.sleep(0.05)

    def _episode(self, turn: int) -> None:
        with httpx.Client(base_url=self.url, timeout=30.0, trust_env=False) as http:
            asked = {"model": "agent", "max_tokens": 4, "messages": [{"role": "user", "content": f"door {turn}?"}]}
            answer = http.post("/v1/chat/completions", json=asked)
            if not self._accepted(answer):
                return
            response_id = answer.json()["id"]
            self.responses.append(response_id)
            said = {"response_id": response_id, "kind": "correction", "correction": f"open {turn % 3}"}
            sent = http.post("/v1/feedback", json={**said, "source": "human:tester", "id": f"fb-{turn}-{response_id}"})
            if self._accepted(sent):
                self.feedback.append(sent.json()["id"])
            if turn % 5 == 0:
                self._forget(http, answer.json()["gradatim"]["episode_id"])
            if turn % 16 == 0:
                self._roll_back(http)

    def _forget(self, http: httpx.Client, episode_id: str) -> None:
        body = {"scope": "episode", "value": episode_id}
        if self._accepted(http.post("/v1/memory/forget", json=body)):
            self.forgotten.append(episode_id)

    def _roll_back(self, http: httpx.Client) -> None:
        """The live adapter, where there is one; it may be gone by then."""
        live = http.get("/v1/adapters").json()["live"]
        if live and not live.endswith("@0"):
            self.rolled_back += http.post(f"/v1/adapters/{live}/rollback", json={"reason": "test"}).is_success

    def _accepted(self, answer: httpx.Response) -> bool:
        if not answer.is_success:
            self.refused.append(answer.status_code)
        return answer.is_success

    def stop(self) -> None:
        self._stop.set()


@contextlib.contextmanager
def _calling(client: Client) -> Iterator[None]:
    thread = threading.Thread(target=client.run)
    thread.start()
    try:
        yield
    finally:
        client.stop()
        thread.join()


def _start(folder: Path, model: Path) -> Launched:
    settings = folder / "gradatim.toml"
    settings.write_text(SETTINGS)
    return launch(folder / "data", "--model", str(model), "--config", str(settings), within_s=READY_WITHIN_S)


def _kill_loop(data_dir: Path) -> bool:
    pid = Home(data_dir).holder("loop")
    if not pid:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return True


def _wait_for_more(client: Client, server: Launched, answers: int) -> None:
    """Until the server that was just started has acknowledged something: it is really serving again."""
    wanted, deadline = len(client.feedback) + answers, time.monotonic() + READY_WITHIN_S
    while len(client.feedback) < wanted:
        assert server.process.poll() is None, "the server ended by itself"
        assert time.monotonic() < deadline, "the server is up and does not answer"
        time.sleep(0.02)


def _wait_for_turns(server: Launched) -> None:
    home, deadline = Home(server.data_dir), time.monotonic() + READY_WITHIN_S
    while home.said("loop").get("pid") != home.holder("loop") or not home.said("loop").get("turns"):
        assert time.monotonic() < deadline, f"the loop does nothing: {home.said('loop')}"
        time.sleep(0.02)


def _kill_repeatedly(folder: Path, model: Path, kills: int, seed: int) -> tuple[Client, int]:
    """Every other kill hits the server, which takes its loop along; the others hit the loop alone."""
    dice, client = random.Random(seed), Client()
    server, done = _start(folder, model), 0
    client.url = server.url
    try:
        with _calling(client):
            while done < kills:
                _wait_for_more(client, server, answers=2)
                if done % 4 >= 2:  # half of the kills hit a loop that is at work, the others one that is starting
                    _wait_for_turns(server)
                time.sleep(dice.uniform(0.0, 1.0))
                if done % 2:
                    done += _kill_loop(server.data_dir)
                    continue
                server.kill()
                done += 1
                started = time.monotonic()
                server = _start(folder, model)
                client.ready_s.append(time.monotonic() - started)
                client.url = server.url
            _wait_for_more(client, server, answers=1)
    finally:
        server.kill()
    return client, done


def _check(data_dir: Path, client: Client) -> None:
    with open_store(data_dir / "gradatim.db") as store:
        lost = [r for r in client.responses if store.step(id=StepId(r)) is None]
        assert not lost, f"{len(lost)} of {len(client.responses)} completed responses are lost"
        lost = [f for f in client.feedback if not store.read(Feedback, id=f)]
        assert not lost, f"{len(lost)} of {len(client.feedback)} acknowledged opinions are lost"
        assert store.read(Update), "the kills never let the loop come to an update"
        stages = store.stages("agent")
        assert list(stages.values()).count(Stage.LIVE) == 1
        for _, adapter in store.read(Adapter):
            if adapter.step:
                read_adapter(data_dir / adapter.path, adapter.sha256)
        with store.engines.read.begin() as connection:
            assert audit.check(connection).problems == ()
        _check_memory(store, data_dir, client)
    assert all(status in (429, 503) for status in client.refused), client.refused


def _check_memory(store: SqlStore, data_dir: Path, client: Client) -> None:
    """Every correction up to where feedback was followed is remembered, and nothing that was forgotten."""
    memory = open_admin(Config(data_dir=data_dir), store).judged
    assert memory.check()["ok"]
    rows = {row["id"]: row for row in memory.show(limit=1_000_000)}
    assert rows and not {row["episode_id"] for row in rows.values()} & set(client.forgotten)
    for _, said in store.read(Feedback, limit=1_000_000):
        (position, newest), *_ = store.newest(Feedback, id=said.id)
        step = store.step(id=said.step_id)
        if position <= store.cursor(CURSOR) and step is not None and step.episode_id not in client.forgotten:
            assert f"{newest.step_id}+" in rows, "a correction that was followed is not remembered"


@pytest.mark.timeout(1200)
def test_nothing_acknowledged_is_lost_by_six_kills(tmp_path: Path, tiny_model_dir: Path) -> None:
    client, kills = _kill_repeatedly(tmp_path, tiny_model_dir, kills=6, seed=0)
    assert kills == 6
    _check(tmp_path / "data", client)


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_many_kills(
    tmp_path: Path, tiny_model_dir: Path, pytestconfig: pytest.Config
) -> None:
    wanted: int = pytestconfig.getoption("kills")
    client, kills = _kill_repeatedly(tmp_path, tiny_model_dir, kills=wanted, seed=1)
    assert kills == wanted
    _check(tmp_path / "data", client)
    ready = sorted(client.ready_s)
    sys.stdout.write(
        f"\n{kills} kills, {len(client.feedback)} opinions acknowledged, {client.rolled_back} rollbacks; ready again "
        f"within {ready[len(ready) // 2]:.1f} s at the median, {ready[-1]:.1f} s at most\n"
    )


def test_the_loop_dies_with_its_server_and_a_killed_loop_is_started_again(tmp_path: Path, tiny_model_dir: Path) -> None:
    server = _start(tmp_path, tiny_model_dir)
    try:
        first = _loop_pid(server)
        os.kill(first, signal.SIGKILL)
        second = _loop_pid(server, other_than=first)
        status = httpx.get(f"{server.url}/v1/status", trust_env=False).json()
        assert status["loop"]["restarts"] >= 1
        assert os.getpriority(os.PRIO_PROCESS, second) >= 10
    finally:
        server.kill()
    deadline = time.monotonic() + 10.0
    while Path(f"/proc/{second}").exists():
        assert time.monotonic() < deadline, "the loop process outlived its server"
        time.sleep(0.05)


def _loop_pid(server: Launched, other_than: int = 0) -> int:
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        pid = Home(server.data_dir).holder("loop")
        if pid and pid != other_than:
            return pid
        assert time.monotonic() < deadline, "no loop process came up"
        time.sleep(0.05)


def test_a_stopped_server_finishes_the_stream_that_runs(tmp_path: Path, tiny_model_dir: Path) -> None:
    server = _start(tmp_path, tiny_model_dir)
    body = {"model": "agent", "stream": True, "max_tokens": 150, "messages": [{"role": "user", "content": "go on"}]}
    body["logit_bias"] = {"257": -100}  # the end-of-turn token: it must not end early
    try:
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body, timeout=60.0, trust_env=False
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(server.pid, signal.SIGTERM)
            rest = list(lines)
        assert rest[-1] == "data: [DONE]" or "data: [DONE]" in rest[-3:]
        assert server.process.wait(60) == 0
    finally:
        server.kill()
