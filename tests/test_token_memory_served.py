"""Token memory in the served product: good answers make their tokens likelier, by the paper's mixture."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gradatim.app import compose
from gradatim.memory.codec import nibbles
from gradatim.memory.key_space import late_layer
from gradatim.memory.knn_gate import TEMPERATURE
from gradatim.memory.knn_lm import LEAST_LAMBDA, SMALL_STORE_CAP
from gradatim.memory.public_space import public_space
from gradatim.nn.base import Base
from gradatim.nn.states import states_and_logprobs
from gradatim.types import Blend, Step
from tests.test_memory_served import SETTLE_S, Product, product, settings, text

K = 4
LAYER = late_layer(2)


async def settled(served: Product, tokens: int) -> None:
    end = time.monotonic() + 20 * SETTLE_S
    while served.remembering.kept.stats()["tokens"] != tokens:
        assert time.monotonic() < end, served.remembering.kept.stats()
        await asyncio.sleep(0.01)


def step_of(served: Product, answer: Mapping[str, Any]) -> Step:
    step = served.store.step(id=answer["id"])
    assert step is not None
    return step


def said(answer: Mapping[str, Any], index: int = 0) -> list[float]:
    return [t["logprob"] for t in answer["choices"][index]["logprobs"]["content"]]


def model_says(base: Base, step: Step, tokens: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """At each of the tokens: the state (T, H) and the log-probabilities (T, V) of the plain model."""
    ids, start = [*step.prompt_ids, *tokens], len(step.prompt_ids) - 1
    hidden, logprobs = states_and_logprobs(base.model, ids[:-1], LAYER)
    return hidden[start:].numpy(), logprobs[start:].double().numpy()


def reference(base: Base, data: Path, good: Step, step: Step) -> tuple[list[float], list[float], NDArray[np.float64]]:
    """Log-probabilities of the tokens of ``step`` under the model, and with the tokens of ``good`` mixed in: equations
    2 and 3 of arXiv:1911.00172 and the gate, written down in float64. And the second ones of all tokens, (T, V)."""
    pooling = public_space(base, LAYER, data / "memory").pooling

    def keys(states: NDArray[np.float32]) -> NDArray[np.float64]:
        x = (states.astype(np.float64) - pooling.mean) / pooling.scale
        return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))

    states, _ = model_says(base, good, good.completion_ids)
    codec = nibbles(pooling.axes)
    stored = codec.decode(codec.encode(keys(states).astype(np.float32))).astype(np.float64)
    states, own = model_says(base, step, step.completion_ids)
    mixed = own.copy()
    for t, query in enumerate(keys(states)):
        distances = np.square(stored - codec.seen(query[None].astype(np.float32))).sum(1)
        nearest = np.argsort(distances, kind="stable")[:K]
        weights = np.exp(-distances[nearest] / TEMPERATURE)
        memory = np.zeros(own.shape[1])
        np.add.at(memory, np.array(good.completion_ids)[nearest], weights / weights.sum())
        share = min(0.95 * memory.max() * math.exp(-max(distances[nearest[0]], 1e-4) / TEMPERATURE), SMALL_STORE_CAP)
        if share >= LEAST_LAMBDA:
            mixed[t] = np.log(share * memory + (1 - share) * np.exp(own[t]))
    at = np.arange(len(step.completion_ids)), list(step.completion_ids)
    return own[at].tolist(), mixed[at].tolist(), mixed


async def test_the_served_distribution_is_the_papers_and_the_models_own_is_recorded(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    config = settings(tiny_model_dir, tmp_path, tokens=True, sure=1.0, neighbours=K)
    async with product(tiny_base, config) as served:
        first = await served.ask(user="alice", logprobs=True)
        good = step_of(served, first)
        assert said(first) == list(good.logprobs) and good.memory == {}
        note = await served.say(response_id=first["id"], kind="score", value=1)
        await settled(served, len(good.completion_ids))
        sampling: dict[str, Any] = {"temperature": 1.0, "seed": 5, "logprobs": True, "top_logprobs": 3}
        second = await served.ask(user="alice", **sampling)
        step = step_of(served, second)
        own, mixed, rows = reference(tiny_base, tmp_path, good, step)
        assert list(step.logprobs) == pytest.approx(own, abs=2e-3)
        assert said(second) == pytest.approx(mixed, abs=2e-3)
        assert list(step.drawn_logprobs) == said(second)
        assert said(second) != list(step.logprobs)
        for shown, row in zip(second["choices"][0]["logprobs"]["content"], rows, strict=True):
            assert [t["logprob"] for t in shown["top_logprobs"]] == pytest.approx(np.sort(row)[:-4:-1], abs=2e-3)
        use = second["gradatim"]["memory"]["tokens"]
        assert step.memory["tokens"] == use and 0 < use["lambda"] <= SMALL_STORE_CAP and use["mixed"] >= 1
        figures = (await served.http.get("/metrics")).text
        assert f"gradatim_memory_tokens {len(good.completion_ids)}.0" in figures
        assert served.remembering.kept.stats()["retrieved"] > 0

        again = await served.ask(user="alice", logprobs=True)  # the same greedy answer, and surer of it
        assert text(again) == text(first) and sum(said(again)) > sum(said(first))
        pinned = await served.ask(user="alice", model="agent@0", logprobs=True)
        assert "memory" not in pinned["gradatim"]
        assert said(pinned) == pytest.approx(said(first), abs=1e-4)
        await served.http.delete(f"/v1/feedback/{note}")
        await settled(served, 0)
        gone = await served.ask(user="alice", logprobs=True)
        assert said(gone) == pytest.approx(said(first), abs=1e-4) and "memory" not in gone["gradatim"]


async def test_streams_choices_stops_and_the_tenants_of_a_batch_hold(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    async with product(tiny_base, settings(tiny_model_dir, tmp_path, tokens=True, sure=1.0)) as served:
        greedy: dict[str, Any] = {"temperature": 0, "logprobs": True}
        plain = await served.ask(user="bob", **greedy)
        asked = await served.ask(user="alice", **greedy)
        await served.say(response_id=asked["id"], kind="correction", correction="left")
        await settled(served, 5)  # "left" and the end of the turn
        drawn: dict[str, Any] = {"temperature": 0.7, "seed": 11, "logprobs": True}
        whole = await served.ask(user="alice", **drawn)
        stream = await served.ask(user="alice", stream=True, **drawn)
        chunks = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
        deltas = [c["choices"][0] for c in chunks if c["choices"]]
        assert "".join(d["delta"].get("content") or "" for d in deltas) == text(whole)
        streamed = [t["logprob"] for d in deltas if d.get("logprobs") for t in d["logprobs"]["content"]]
        assert streamed == pytest.approx(said(whole), abs=1e-4)

        many = await served.ask(user="alice", n=4, **{**drawn, "temperature": 0.2})
        alone = await served.ask(user="alice", **{**drawn, "temperature": 0.2})
        assert many["choices"][0]["message"] == alone["choices"][0]["message"]
        stopped = await served.ask(user="alice", stop=[text(whole)[1]], **drawn)
        assert text(stopped) == text(whole)[: text(whole).index(text(whole)[1])]

        batch = await asyncio.gather(*(served.ask(user=u, **greedy) for u in ("alice", "bob", "carol", "alice")))
        assert [text(batch[i]) for i in (1, 2)] == [text(plain)] * 2
        for i in (1, 2):
            assert said(batch[i]) == pytest.approx(said(plain), abs=1e-4)
            assert "memory" not in batch[i]["gradatim"]
        first = {u: await served.ask(user=u, max_tokens=1, **greedy, logit_bias={"75": 100}) for u in ("alice", "bob")}
        assert {text(a) for a in first.values()} == {"l"}
        assert said(first["alice"])[0] == pytest.approx(
            math.log(SMALL_STORE_CAP + (1 - SMALL_STORE_CAP) * math.exp(said(first["bob"])[0])), abs=1e-3
        )
        forgotten = await served.http.post("/v1/memory/forget", json={"scope": "user", "value": "alice"})
        assert forgotten.json()["entries"] == 2
        assert served.remembering.kept.stats()["tokens"] == 0
        assert said(await served.ask(user="alice", **greedy)) == pytest.approx(said(plain), abs=1e-4)


async def test_with_an_empty_memory_every_bit_is_that_of_no_memory(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    seen = []
    for name, on in (("on", True), ("off", False)):
        async with product(tiny_base, settings(tiny_model_dir, tmp_path / name, tokens=on)) as served:
            asked = [await served.ask(f"{n} boats", logprobs=True, temperature=n / 2, seed=n) for n in range(3)]
            seen.append([(text(a), said(a)) for a in asked])
    assert seen[0] == seen[1]


async def test_it_is_filled_again_after_a_restart_and_follows_epochs_and_bad_judgements(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    config = settings(tiny_model_dir, tmp_path, tokens=True, sure=1.0)
    async with product(tiny_base, config) as served:
        asked = await served.ask(logprobs=True)
        count = len(step_of(served, asked).completion_ids)
        note = await served.say(response_id=asked["id"], kind="score", value=1)
        await settled(served, count)
        taught = await served.ask(logprobs=True)
    async with product(tiny_base, config) as served:
        await settled(served, count)  # before any request
        assert said(await served.ask(logprobs=True)) == pytest.approx(said(taught), abs=1e-4)
        await served.http.post("/v1/memory/epoch", json={"reason": "the signs were turned"})
        assert served.remembering.kept.stats()["tokens"] == 0
        await served.http.post("/v1/memory/undo-epoch", json={})
        await settled(served, count)
        await served.say(response_id=asked["id"], kind="score", value=-1, id=note)  # revised
        await settled(served, 0)
        assert said(await served.ask(logprobs=True)) == pytest.approx(said(asked), abs=1e-4)
        assert served.engine.stats()["memory_failed"] == 0


async def test_both_memories_at_once(tiny_model_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    config = settings(tiny_model_dir, tmp_path, tokens=True, decisions=True, sure=1.0)
    async with product(tiny_base, config) as served:
        asked = await served.ask(logprobs=True)
        await served.say(response_id=asked["id"], kind="correction", correction="left")
        await settled(served, 5)
        taught = await served.ask(logprobs=True)
        step = step_of(served, taught)
        assert text(taught) == "left"
        assert sum(step.logprobs) < sum(said(taught)) < sum(step.drawn_logprobs)  # model, + tokens, + decisions
        assert step.memory["for"] and step.memory["tokens"]["mixed"] >= 1


class Broken:
    def mix(self, *_: Any) -> Mapping[int, Blend]:
        raise RuntimeError("a test")


async def test_a_token_memory_that_breaks_costs_nothing_but_itself(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with product(tiny_base, settings(tiny_model_dir, tmp_path, tokens=True)) as served:
        plain = await served.ask(model="agent@0")
        served.engine.attach(Broken())
        assert text(await served.ask()) == text(plain)
        assert served.engine.stats()["memory_failed"] == 1
        assert "goes on without it" in caplog.text


def test_the_token_layer_is_a_late_one(tiny_model_dir: Path, tiny_base: Base) -> None:
    assert compose.token_layer(settings(tiny_model_dir, tiny_model_dir, tokens=True), tiny_base) == LAYER
    assert compose.token_layer(settings(tiny_model_dir, tiny_model_dir), tiny_base) is None
