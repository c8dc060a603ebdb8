"""Exactness of what is served: the frozen base against plain transformers, mixed batches against single requests.

One server in float32. Before and after two adapters have been trained and promoted on it, ``agent@0`` must give
token for token what ``transformers.generate`` gives greedily; and each pinned ``agent@k`` must give the same tokens in
a batch of 8 requests over mixed adapters as it gives alone. Then a rollback must act on the very next request.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness

harness.threads()

import httpx
import torch

from gradatim.app.launch import launch
from gradatim.nn.base import load_base

PROMPTS = (
    "Name three rivers of Europe.",
    "What is the capital of Peru?",
    "Write one sentence about rain.",
    "Count from one to nine.",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
    "Give me a short poem on iron.",
    "List two prime numbers above 50.",
)
TOKENS = 32


def ask(http: httpx.Client, model: str, prompt: str) -> tuple[tuple[int, ...], str]:
    """(completion ids, the adapter that answered)."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "return_token_ids": True,
    }
    answer = http.post("/v1/chat/completions", json=body, headers={"X-Turn-Type": "side"}).raise_for_status().json()
    return tuple(answer["choices"][0]["token_ids"]), answer["gradatim"]["adapter"]


def plain(data_dir: Path) -> list[tuple[int, ...]]:
    """The same by transformers alone, one prompt at a time."""
    base = load_base("smollm2", data_dir, dtype="float32", device="cpu")
    out = []
    for prompt in PROMPTS:
        ids = base.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            made = base.model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        out.append(tuple(made[0, ids["input_ids"].shape[1] :].tolist()))
    return out


def teach(http: httpx.Client, adapters: int) -> None:
    """Correct until that many adapters went live."""
    for number in range(1000):
        live = http.get("/v1/adapters").json()["live"]
        if int(live.partition("@")[2]) >= adapters:
            return
        body = {
            "model": "agent",
            "messages": [{"role": "user", "content": f"Colour of box {number}?"}],
            "max_tokens": 6,
        }
        answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
        episode = answer["gradatim"]["episode_id"]
        for feedback in (
            {"response_id": answer["id"], "kind": "correction", "correction": "Teal, always teal", "source": "human:b"},
            {"episode_id": episode, "kind": "outcome", "value": True, "source": "critic:b"},
        ):
            http.post("/v1/feedback", json=feedback).raise_for_status()
        time.sleep(1.0)
    raise SystemExit("no adapter went live: see the server's log")


def same(found: list[tuple[int, ...]], expected: list[tuple[int, ...]]) -> float:
    return sum(f == e for f, e in zip(found, expected, strict=True)) / len(expected)


def main() -> None:
    args = harness.options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        server = launch(data_dir, "--dtype", "float32")
        try:
            with httpx.Client(base_url=server.url, timeout=300) as http:
                expected = plain(data_dir)
                before = [ask(http, "agent@0", p)[0] for p in PROMPTS]
                teach(http, 1 if args.quick else 2)
                after = [ask(http, "agent@0", p)[0] for p in PROMPTS]
                live = http.get("/v1/adapters").json()["live"]
                models = [f"agent@{i % (int(live.partition('@')[2]) + 1)}" for i in range(len(PROMPTS))]
                alone = [ask(http, m, p) for m, p in zip(models, PROMPTS, strict=True)]
                with ThreadPoolExecutor(len(PROMPTS)) as pool:
                    mixed = list(pool.map(lambda mp: ask(http, *mp), zip(models, PROMPTS, strict=True)))
                http.post("/v1/adapters/agent@0/rollback", json={}).raise_for_status()
                answered = ask(http, "agent", PROMPTS[0])[1]
        finally:
            server.stop()
    goals = [
        harness.Goal("agent@0 equal to transformers, before any update", same(before, expected), "== 1"),
        harness.Goal("agent@0 equal to transformers, after promotions", same(after, expected), "== 1"),
        harness.Goal(
            "pinned adapters: batch of 8 mixed equal to alone",
            same([t for t, _ in mixed], [t for t, _ in alone]),
            "== 1",
        ),
        harness.Goal("adapters change the answers (share that differ)", 1.0 - same([t for t, _ in alone], expected)),
        harness.Goal("the next request after a rollback is on agent@0", float(answered == "agent@0"), "== 1"),
    ]
    harness.report("bench_exact", goals, {"models": models, "live": live}, args)


if __name__ == "__main__":
    main()
