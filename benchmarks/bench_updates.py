"""Serving while learning: 4 clients call without a pause while updates are made, gated and promoted.

The same load is measured idle (no feedback) and with a stream of corrections that keeps the learner busy, in one run
on one server with the real model. Failed responses and broken streams are counted over the whole run; a stream is
broken when it does not end with a finish reason and [DONE].
"""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import harness
import httpx

from gradatim.app.launch import launch

CONFIG = """
[learner]
epochs = 1
min_examples = 4
max_examples = 4
"""
PLACES = ("Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Accra", "Minsk", "Riga", "Sofia", "Tunis", "Delhi", "Perth")


@dataclass
class Load:
    """What the clients saw. Gaps are seconds between two chunks of one stream, with the time at which they ended."""

    gaps: list[tuple[float, float]] = field(default_factory=list)
    responses: int = 0
    failed: list[str] = field(default_factory=list)
    broken: int = 0

    def between(self, spans: list[tuple[float, float]]) -> list[float]:
        return [gap for at, gap in self.gaps if any(start <= at <= end for start, end in spans)]


def client(url: str, number: int, load: Load, stop: threading.Event) -> None:
    """Stream one completion after another."""
    with httpx.Client(base_url=url, timeout=120) as http:
        for turn in itertools.count():
            if stop.is_set():
                return
            place = PLACES[(number + turn) % len(PLACES)]
            body = {
                "model": "agent",
                "messages": [{"role": "user", "content": f"Say something about {place} and its people."}],
                "max_tokens": 48,
                "stream": True,
            }
            try:
                stream(http, body, load)
            except httpx.HTTPError as e:
                load.failed.append(type(e).__name__)


def stream(http: httpx.Client, body: dict[str, object], load: Load) -> None:
    finished = done = False
    last: float | None = None
    with http.stream("POST", "/v1/chat/completions", json=body, headers={"X-Turn-Type": "side"}) as response:
        load.responses += 1
        if response.status_code // 100 != 2:
            load.failed.append(str(response.status_code))
            return
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True
                break
            now = time.monotonic()
            choice = json.loads(line[6:])["choices"][0]
            if choice["delta"].get("content"):
                if last is not None:
                    load.gaps.append((now, now - last))
                last = now
            finished = finished or choice["finish_reason"] is not None
    load.broken += not (finished and done)


def correct(http: httpx.Client, number: int) -> None:
    """One episode of one step, its correction and its outcome."""
    place = PLACES[number % len(PLACES)]
    body = {
        "model": "agent",
        "messages": [{"role": "user", "content": f"Which city is meant by number {number} {place}?"}],
        "max_tokens": 8,
    }
    answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    feedback = {"response_id": answer["id"], "kind": "correction", "correction": place, "source": "human:bench"}
    http.post("/v1/feedback", json=feedback).raise_for_status()
    outcome = {"episode_id": answer["gradatim"]["episode_id"], "kind": "outcome", "value": True, "source": "critic:b"}
    http.post("/v1/feedback", json=outcome).raise_for_status()


def measure(url: str, updates: int, idle_s: float) -> tuple[Load, list[float], list[float], dict[str, object]]:
    load, stop = Load(), threading.Event()
    clients = [threading.Thread(target=client, args=(url, i, load, stop)) for i in range(4)]
    for thread in clients:
        thread.start()
    with httpx.Client(base_url=url, timeout=120) as http:
        time.sleep(idle_s / 4)  # warm
        started = time.monotonic()
        time.sleep(idle_s)
        idle = [(started, time.monotonic())]
        busy = learn(http, updates)
        status = http.get("/v1/status").json()
    stop.set()
    for thread in clients:
        thread.join()
    return load, load.between(idle), load.between(busy), status


def learn(http: httpx.Client, updates: int) -> list[tuple[float, float]]:
    """Feed corrections until that many updates were decided; the spans in which the learner was at work."""
    spans: list[tuple[float, float]] = []
    number = 0
    before = time.monotonic()
    while True:
        status = http.get("/v1/status").json()
        now = time.monotonic()
        if status["learning"]:
            spans.append((before, now))
        before = now
        if status["updates_applied"] + status["updates_refused"] >= updates:
            return spans
        if status["waiting_examples"] < 6 and status["waiting_feedback"] < 6:
            correct(http, number)
            number += 1
        time.sleep(0.1)


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--updates", type=int, default=20)
    args = parser.parse_args()
    updates, idle_s = (2, 10.0) if args.quick else (args.updates, 60.0)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "gradatim.toml"
        config.write_text(CONFIG)
        server = launch(Path(folder) / "data", "--config", str(config))
        try:
            load, idle, busy, status = measure(server.url, updates, idle_s)
        finally:
            server.stop()
    waits = status["feedback_to_live_s"]
    assert isinstance(waits, list)
    p99_idle, p99_busy = harness.percentile(idle, 99), harness.percentile(busy, 99)
    goals = [
        harness.Goal("responses other than 2xx", len(load.failed), "== 0"),
        harness.Goal("broken streams", load.broken, "== 0"),
        harness.Goal("p99 time per token while learning, ratio to idle", p99_busy / p99_idle, "<= 2.5"),
        harness.Goal("feedback to live, p50 s", harness.percentile(waits, 50)),
        harness.Goal("feedback to live, p95 s", harness.percentile(waits, 95)),
    ]
    details = {
        "responses": load.responses,
        "failed": load.failed[:5],
        "updates": status["updates_applied"],
        "refused": status["updates_refused"],
        "idle_s": {q: harness.percentile(idle, q) for q in (50, 99)},
        "busy_s": {q: harness.percentile(busy, q) for q in (50, 99)},
        "live": status["live"],
    }
    harness.report("bench_updates", goals, details, args)


if __name__ == "__main__":
    main()
