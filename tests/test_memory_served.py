"""Decision memory in the served product: feedback over HTTP changes the next answer, and nothing else does."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from gradatim.app import compose
from gradatim.app.memory import Remembering, build_memory, show_figures
from gradatim.app.offline import ask as offline
from gradatim.config import Config, EngineConfig, MemoryConfig
from gradatim.engine import scheduler
from gradatim.engine.transformers import TransformersEngine
from gradatim.nn.base import Base
from gradatim.release.traffic import Traffic
from gradatim.server import Metrics, build_app
from gradatim.store import SqlStore
from gradatim.types import AdapterId, Delta, Request, Sampling, Started, Step, Token
from tests.server_kit import BASE as URL
from tests.server_kit import FakeAdmin

AGENT = AdapterId("agent@0")
SETTLE_S = 1.0  # feedback acts within this of its 202


def settings(model: Path, data: Path, **memory: Any) -> Config:
    engine = EngineConfig(dtype="float32", device="cpu", threads=1, max_batch=4)
    return Config(model=str(model), data_dir=data, engine=engine, memory=MemoryConfig(**memory), mode="observe")


class Product:
    """What ``gradatim serve`` puts together, in this process and without a port."""

    def __init__(self, http: httpx.AsyncClient, engine: TransformersEngine, store: SqlStore, kept: Remembering) -> None:
        self.http, self.engine, self.store, self.remembering = http, engine, store, kept

    async def ask(self, text: str = "where to?", user: str = "", **fields: Any) -> Any:
        body = {"model": "agent", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 6}
        answer = await self.http.post("/v1/chat/completions", json={**body, "user": user, **fields})
        assert answer.status_code == 200, answer.text
        return answer if fields.get("stream") else answer.json()

    async def say(self, **feedback: Any) -> str:
        """Acknowledged; the memory has it at once."""
        before = self.remembering.kept.stats()["written"], self.remembering.kept.stats()["entries"]
        answer = await self.http.post("/v1/feedback", json={"source": "critic:test", **feedback})
        assert answer.status_code == 202, answer.text
        began = time.monotonic()
        while (self.remembering.kept.stats()["written"], self.remembering.kept.stats()["entries"]) == before:
            if time.monotonic() - began > 20 * SETTLE_S:  # this machine may be busy with something else
                break
            await asyncio.sleep(0.01)
        return str(answer.json()["id"])


@asynccontextmanager
async def product(base: Base, config: Config) -> AsyncIterator[Product]:
    with compose.build_store(config) as store:
        compose.register_base(store, config, base.sha256)
        with closing(compose.build_engine(config, base)) as engine:
            kept = build_memory(config, store, base, engine)
            traffic, metrics = Traffic(store, engine, config), Metrics()
            await traffic.refresh()
            show_figures(kept, metrics.registry)
            app = build_app(
                engine=engine,
                store=store,
                router=traffic,
                config=config,
                admin=FakeAdmin(),
                metrics=metrics,
                memory=kept.on,
                memory_admin=kept.admin,
                sessions=kept.sessions,
                prompter=kept.prompter,
            )
            follow = asyncio.create_task(kept.follower.watch()) if kept.follower else None
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url=URL, timeout=60) as http:
                yield Product(http, engine, store, kept)
            if follow is not None:
                follow.cancel()
                await asyncio.gather(follow, return_exceptions=True)
            kept.close()


def text(answer: Mapping[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


async def test_a_correction_acts_at_once_whole_streamed_and_batched_and_for_its_tenant_alone(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    config = settings(tiny_model_dir, tmp_path, decisions=True)
    async with product(tiny_base, config) as served:
        frozen = await served.ask(user="alice")
        assert "memory" not in frozen["gradatim"]
        await served.say(response_id=frozen["id"], kind="correction", correction="left", source="human:a")

        taught = await served.ask(user="alice")
        assert text(taught) == "left" != text(frozen)
        assert taught["gradatim"]["memory"]["weight"] > 0.5
        assert text(await served.ask(user="bob")) == text(await served.ask()) == text(frozen)

        stream = await served.ask(user="alice", stream=True)
        chunks = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == "left"
        batch = await asyncio.gather(*(served.ask(user=u) for u in ("alice", "bob", "alice", "carol")))
        assert [text(answer) for answer in batch] == ["left", text(frozen), "left", text(frozen)]
        assert text(await served.ask(user="alice", model="agent@0")) == text(frozen)  # pinned weights answer alone
        many = await served.ask(user="alice", n=3, temperature=0.3, seed=1)
        assert [c["message"]["content"] for c in many["choices"]].count("left") >= 2

        story = (await served.http.get(f"/v1/explain/{taught['id']}")).json()
        assert story["memory"]["of_it"]["for"] == [f"{frozen['id']}+"]
        made = (await served.http.get(f"/v1/explain/{frozen['id']}")).json()["memory"]["from_it"]
        assert sorted(row["value"] for row in made) == [-1.0, 1.0]
        figures = (await served.http.get("/metrics")).text
        assert "gradatim_memory_entries 2.0" in figures
        assert "gradatim_memory_on 1.0" in figures

        await served.say(response_id=taught["id"], kind="correction", correction="left", source="human:a")
        told = {row["value"]: row for row in served.remembering.kept.show(step_id=frozen["id"])}
        assert (told[1.0]["helped"], told[1.0]["harmed"]) == (1, 0)  # what confirms its answer speaks for it
        body = {"scope": "user", "value": "alice"}
        assert (await served.http.post("/v1/memory/forget", json=body)).json()["entries"] == 3
        assert text(await served.ask(user="alice")) == text(frozen)


async def test_judgements_rule_answers_out_and_in_and_follow_revision_and_retraction(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    async with product(tiny_base, settings(tiny_model_dir, tmp_path, decisions=True)) as served:
        first = await served.ask(max_tokens=2)
        said = await served.say(response_id=first["id"], kind="score", value=-1)
        second = served.store.step(id=(await served.ask(max_tokens=2))["id"])
        judged = served.store.step(id=first["id"])
        assert second is not None and judged is not None
        if second.completion_ids == judged.completion_ids:  # it was very sure of it
            assert sum(second.drawn_logprobs) < sum(second.logprobs)
        else:
            assert second.memory["against"] == [f"{first['id']}-"]
        await served.say(response_id=first["id"], kind="score", value=1, id=said)  # revised
        third = served.store.step(id=(await served.ask(max_tokens=2))["id"])
        assert third is not None and third.completion_ids == judged.completion_ids
        assert sum(third.drawn_logprobs) > sum(third.logprobs) and third.memory["for"]
        await served.http.delete(f"/v1/feedback/{said}")
        end = time.monotonic() + 20 * SETTLE_S
        while served.remembering.kept.stats()["entries"] and time.monotonic() < end:
            await asyncio.sleep(0.01)
        assert served.remembering.kept.stats()["entries"] == 0
        await served.http.post(
            "/v1/feedback",
            json={"response_id": first["id"], "kind": "score", "value": 0.05, "source": "critic:test"},  # abstained
        )
        await asyncio.sleep(0.3)
        assert served.remembering.kept.stats()["entries"] == 0


async def test_the_models_own_logprobs_are_recorded_beside_those_that_were_drawn_from(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    async with product(tiny_base, settings(tiny_model_dir, tmp_path, decisions=True)) as served:
        frozen = await served.ask()
        await served.say(response_id=frozen["id"], kind="correction", correction="left")
        taught = await served.ask(logprobs=True)
        step = served.store.step(id=taught["id"])
        plain = served.store.step(id=frozen["id"])
        assert step is not None and plain is not None
        assert plain.drawn_logprobs == () and plain.memory == {}
        assert [t["logprob"] for t in taught["choices"][0]["logprobs"]["content"]] == list(step.logprobs)
        assert sum(step.drawn_logprobs) > sum(step.logprobs) + 3.0
        weight = step.memory["weight"]
        own = sum(step.logprobs)
        wanted = np.log(1 - weight) + np.logaddexp(own, np.log(weight / (1 - weight)))
        lost = np.log(1 - (1 - weight) * np.exp(sum(plain.logprobs)) * (1 - np.exp(-np.log(199.0))))
        assert sum(step.drawn_logprobs) == pytest.approx(float(wanted - lost), abs=0.02)


async def test_a_restart_loses_nothing_and_the_store_alone_can_be_asked(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    config = settings(tiny_model_dir, tmp_path, decisions=True)
    async with product(tiny_base, config) as served:
        frozen = await served.ask()
        waiting = await served.ask("and then?")  # judged after the restart: its key has to be made again
        await served.say(response_id=frozen["id"], kind="correction", correction="left")
    async with product(tiny_base, config) as served:
        assert text(await served.ask()) == "left"
        await served.say(response_id=waiting["id"], kind="correction", correction="up")
        end = time.monotonic() + 20 * SETTLE_S
        while served.remembering.kept.stats()["keys"] < 2 and time.monotonic() < end:
            await asyncio.sleep(0.01)
        assert text(await served.ask("and then?")) == "up"
        assert (await served.http.get("/v1/memory/check")).json()["ok"]
    kept = await asyncio.to_thread(offline, config, "GET", "/v1/memory", None)
    assert kept.json()["entries"] == 4
    begun = await asyncio.to_thread(offline, config, "POST", "/v1/memory/epoch", {"reason": "the signs were turned"})
    assert begun.json()["number"] == 1
    async with product(tiny_base, config) as served:
        assert text(await served.ask()) == text(frozen)
        assert (await served.http.post("/v1/memory/undo-epoch", json={})).json()["undone_at"]
        assert text(await served.ask()) == "left"
        assert (await served.http.post("/v1/memory/undo-epoch", json={})).status_code == 409
        assert (await served.http.post("/v1/memory/forget", json={"scope": "planet", "value": "x"})).status_code >= 400


async def test_a_memory_of_another_model_is_refused_and_serving_goes_on(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    config = settings(tiny_model_dir, tmp_path, decisions=True)
    async with product(tiny_base, config) as served:
        frozen = await served.ask()
        await served.say(response_id=frozen["id"], kind="correction", correction="left")
        other = build_memory(config, served.store, replace(tiny_base, sha256="another"), served.engine)
        assert other.on is None and other.follower is None
        assert other.kept.stats()["entries"] == 2


# ------------------------------------------------------------------------------------------- the engine's part


class Recorder:
    """A recollection that does as it is told."""

    def __init__(self, bias: Mapping[int, float] | None = None, broken: str = "") -> None:
        self.keys: list[NDArray[np.float32]] = []
        self._bias, self._broken = bias or {}, broken

    def situate(self, key: NDArray[np.float32]) -> None:
        if self._broken == "situate":
            raise RuntimeError("a test")
        self.keys.append(key)

    def lean(
        self, drawn: Sequence[int], path_logprob: float, logprobs: Callable[[Sequence[int]], Sequence[float]]
    ) -> Mapping[int, float]:
        if self._broken == "lean":
            raise RuntimeError("a test")
        return self._bias

    def trace(self, tokens: Sequence[int]) -> Mapping[str, Any]:
        return {}


@pytest.fixture(scope="module")
def engines(tiny_model_dir: Path, tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One that looks into layer 1, and one that does not."""
    data = tmp_path_factory.mktemp("engines")
    built = [
        compose.build_engine(settings(tiny_model_dir, data, decisions=decisions), tiny_base) for decisions in (1, 0)
    ]
    yield built
    for engine in built:
        engine.close()


def a_request(text: str = "which way is it to the harbour?", **fields: Any) -> Request:
    return Request(messages=({"role": "user", "content": text},), sampling=Sampling(max_tokens=5, seed=3), **fields)


async def run(engine: TransformersEngine, request: Request) -> tuple[list[int], list[float]]:
    tokens = [t async for e in engine.generate(request, AGENT) if isinstance(e, Delta) for t in e.tokens]
    return [t.id for t in tokens], [t.logprob for t in tokens]


async def test_without_a_memory_every_bit_is_the_same(engines: Any) -> None:
    on, off = engines
    for request in (a_request(), replace(a_request(), sampling=Sampling(max_tokens=9, temperature=0))):
        assert await run(on, request) == await run(off, request)
        empty = replace(request, recollection=Recorder())
        ids, logprobs = await run(on, empty)
        want_ids, want_logprobs = await run(off, request)
        assert ids == want_ids
        assert logprobs == pytest.approx(want_logprobs, abs=1e-4)  # what a memory looks at is not taken from the cache


async def test_the_key_is_the_mean_state_over_the_last_message_also_in_chunks_and_batches(
    engines: Any, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    engine = engines[0]
    monkeypatch.setitem(scheduler._PROMPT_TOKENS, "cpu", (7, 11))
    texts = ["the tide is out", "the tide is out and the boats lie on their sides in the mud", "no"]
    recorders = [Recorder() for _ in texts]
    await asyncio.gather(*(run(engine, a_request(t, recollection=r)) for t, r in zip(texts, recorders, strict=True)))
    for t, recorder in zip(texts, recorders, strict=True):
        ids = engine._renderer.prompt_ids([{"role": "user", "content": t}])
        a, b = engine._renderer.turn(ids, [{"role": "user", "content": t}])
        assert engine._renderer.decode(ids[a:b]) == t
        last: list[torch.Tensor] = []  # before the final norm, which transformers tells no states of
        hook = tiny_base.model.model.norm.register_forward_pre_hook(lambda _, given: last.append(given[0]))  # noqa: B023
        with torch.no_grad():
            out = tiny_base.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        hook.remove()
        want = torch.cat([out.hidden_states[0], last[0]], -1)[0, a:b].mean(0).numpy()
        assert len(recorder.keys) == 1
        assert np.allclose(recorder.keys[0], want, atol=1e-4)
        step = Step(
            id="s",  # type: ignore[arg-type]
            episode_id="e",  # type: ignore[arg-type]
            created_at=0.0,
            adapter_id=AGENT,
            adapter_sha256="",
            stage="live",
            messages=({"role": "user", "content": t},),
            prompt_ids=ids,
            completion_ids=(),
            logprobs=(),
            text="",
            finish_reason="stop",
        )
        assert np.allclose(await engine.key(step, AGENT), want, atol=1e-4)


@pytest.mark.parametrize("broken", ["situate", "lean"])
async def test_a_broken_memory_costs_the_request_nothing_but_its_memory(
    engines: Any, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    on, off = engines
    before = on.stats()["memory_failed"]
    ids, _ = await run(on, a_request(recollection=Recorder(broken=broken)))
    assert ids == (await run(off, a_request()))[0]
    assert on.stats()["memory_failed"] == before + 1
    assert "goes on without it" in caplog.text


class Fading(Recorder):
    """Is for one token at first, and breaks when a second one is to be drawn."""

    def lean(
        self, drawn: Sequence[int], path_logprob: float, logprobs: Callable[[Sequence[int]], Sequence[float]]
    ) -> Mapping[int, float]:
        if drawn:
            raise RuntimeError("a test")
        return self._bias


async def test_a_memory_that_breaks_between_two_choices_leaves_none_of_them_its_last_word(engines: Any) -> None:
    on, _ = engines
    request = replace(a_request(), sampling=Sampling(max_tokens=4, temperature=0, n=2))
    biased = replace(request, recollection=Fading({65: 40.0}))
    choices: dict[int, list[Token]] = {0: [], 1: []}
    async for event in on.generate(biased, AGENT):
        if isinstance(event, Delta):
            choices[event.index] += event.tokens
    first, second = choices.values()
    assert [t.id for t in first] == [t.id for t in second] and first[0].id == 65
    assert {t.id for t in first[1:]} != {65}
    for tokens in (first, second):
        assert tokens[0].drawn_logprob == pytest.approx(0.0, abs=1e-3)
        assert all(t.drawn_logprob is None for t in tokens[1:])


async def test_a_bias_moves_what_is_drawn_and_not_what_the_model_says(engines: Any) -> None:
    on, off = engines
    request = replace(a_request(), sampling=Sampling(max_tokens=1, temperature=0))
    own = [t async for e in off.generate(request, AGENT) if isinstance(e, Delta) for t in e.tokens].pop()
    other = (own.id + 1) % 250
    biased = replace(request, recollection=Recorder({other: 40.0}))
    events = [e async for e in on.generate(biased, AGENT)]
    assert isinstance(events[0], Started)
    token = next(t for e in events if isinstance(e, Delta) for t in e.tokens)
    assert token.id == other
    assert token.logprob < own.logprob
    assert token.drawn_logprob == pytest.approx(0.0, abs=1e-3)
    assert own.drawn_logprob is None
