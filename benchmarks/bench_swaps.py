"""A thousand changes of the live adapter under load: no failed request, no answer of two adapters, no stall.

Two adapters are trained on a server with the real model; then an operator puts one or the other live again and again
while 4 clients stream greedy answers without a pause. Each answer names its adapter, and must be token for token what
that adapter gives to the same prompt when it is pinned. Gaps between two chunks of one stream are compared with those
of the same clients before the first change.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import harness

harness.threads()

import httpx
from bench_exact import PROMPTS, ask, teach

from gradatim.app.launch import launch

CLIENTS = 4
Expected = Mapping[tuple[str, str], tuple[int, ...]]  # (adapter, prompt) -> completion ids


@dataclass
class Seen:
    """Gaps are seconds between two chunks of one stream, with the time at which they ended."""

    expected: Expected
    gaps: list[tuple[float, float]] = field(default_factory=list)
    by: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    broken: int = 0
    mixed: int = 0

    def between(self, start: float, end: float) -> list[float]:
        return [gap for at, gap in self.gaps if start <= at <= end]


def call(url: str, number: int, seen: Seen, stop: threading.Event) -> None:
    """One stream after another."""
    with httpx.Client(base_url=url, timeout=120) as http:
        for turn in itertools.count(number):
            if stop.is_set():
                return
            try:
                listen(http, PROMPTS[turn % len(PROMPTS)], seen)
            except (httpx.HTTPError, KeyError, ValueError) as e:
                seen.failed.append(type(e).__name__)


def listen(http: httpx.Client, prompt: str, seen: Seen) -> None:
    body = {
        "model": "agent",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 32,
        "stream": True,
        "return_token_ids": True,
    }
    ids: list[int] = []
    adapter, last, done = "", 0.0, False
    with http.stream("POST", "/v1/chat/completions", json=body, headers={"X-Turn-Type": "side"}) as response:
        if response.status_code // 100 != 2:
            seen.failed.append(str(response.status_code))
            return
        for line in response.iter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                now, chunk = time.monotonic(), json.loads(line[6:])
                if last:
                    seen.gaps.append((now, now - last))
                last = now
                adapter = chunk.get("gradatim", {}).get("adapter", adapter)
                ids += chunk["choices"][0].get("token_ids") or ()
    seen.by[adapter] += 1
    seen.broken += not done
    seen.mixed += tuple(ids) != seen.expected[adapter, prompt]


def swap(http: httpx.Client, adapters: tuple[str, str], swaps: int, pause_s: float) -> int:
    """How many were refused."""
    refused = 0
    for n in range(swaps):
        answer = http.post(f"/v1/adapters/{adapters[n % 2]}/promote", json={})
        refused += answer.status_code // 100 != 2
        time.sleep(pause_s)
    return refused


@dataclass(frozen=True)
class Measured:
    seen: Seen
    idle: list[float]
    busy: list[float]
    swapped_s: float
    refused: int


def measure(url: str, swaps: int, idle_s: float) -> Measured:
    with httpx.Client(base_url=url, timeout=300) as http:
        adapters = ("agent@0", http.get("/v1/adapters").json()["live"])
        seen = Seen({(a, p): ask(http, a, p)[0] for a in adapters for p in PROMPTS})
        stop = threading.Event()
        clients = [threading.Thread(target=call, args=(url, i, seen, stop)) for i in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(idle_s / 4)  # warm
        idle_from = time.monotonic()
        time.sleep(idle_s)
        swaps_from = time.monotonic()
        refused = swap(http, adapters, swaps, pause_s=0.2)
        end = time.monotonic()
        stop.set()
        for client in clients:
            client.join()
    return Measured(seen, seen.between(idle_from, swaps_from), seen.between(swaps_from, end), end - swaps_from, refused)


def on_two_adapters(data_dir: Path, swaps: int, idle_s: float) -> Measured:
    server = launch(data_dir, "--dtype", "float32")
    try:
        with httpx.Client(base_url=server.url, timeout=300) as http:
            teach(http, 2)
    finally:
        server.stop()
    server = launch(data_dir, "--dtype", "float32", "--mode", "observe")  # nothing else moves the live adapter
    try:
        return measure(server.url, swaps, idle_s)
    finally:
        server.stop()


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--swaps", type=int, default=1000)
    args = parser.parse_args()
    swaps, idle_s = (20, 10.0) if args.quick else (args.swaps, 60.0)
    with tempfile.TemporaryDirectory() as folder:
        found = on_two_adapters(Path(folder) / "data", swaps, idle_s)
    spans = {"idle": found.idle, "swapping": found.busy}
    p50, p99, most = ({k: harness.percentile(gaps, q) * 1e3 for k, gaps in spans.items()} for q in (50, 99, 100))
    goals = [
        harness.Goal("changes of the live adapter", swaps - found.refused, f">= {swaps}"),
        harness.Goal("failed requests", len(found.seen.failed), "== 0"),
        harness.Goal("broken streams", found.seen.broken, "== 0"),
        harness.Goal("answers that are not wholly of the adapter they name", found.seen.mixed, "== 0"),
        harness.Goal("p99 time per token while swapping, less that before, ms", p99["swapping"] - p99["idle"], "<= 50"),
        harness.Goal("the same as a ratio", p99["swapping"] / p99["idle"]),
    ]
    details = {
        "swaps a second": swaps / found.swapped_s,
        "answers by adapter": dict(found.seen.by),
        "failed": found.seen.failed[:5],
        "p50 ms": p50,
        "p99 ms": p99,
        "most ms": most,
    }
    harness.report("bench_swaps", goals, details, args)


if __name__ == "__main__":
    main()
