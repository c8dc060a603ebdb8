"""Long prompts and sessions in the served product: over HTTP, with everything else that a request may ask for."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradatim.app import compose
from gradatim.app.memory import build_memory
from gradatim.app.offline import ask as offline
from gradatim.config import Config
from gradatim.errors import ConfigError
from gradatim.nn.base import Base
from gradatim.types import Step
from tests.far_reference import reference
from tests.test_far_attention import starts
from tests.test_memory_served import Product, product, settings, text

WINDOW = 128  # of which 32 tokens leave together
LONG = "the parcel of gate seven is red. " * 6  # 198 tokens, one a byte
GREEDY: dict[str, Any] = {"temperature": 0, "logprobs": True}


def far(model: Path, data: Path, **memory: Any) -> Config:
    config = settings(model, data, **{"attention": True, "attention_tokens": 512, **memory})
    return replace(config, engine=replace(config.engine, max_context_tokens=WINDOW))


def in_session(name: str, **more: Any) -> dict[str, Any]:
    return {"gradatim": {"session": name, **more}}


def said(answer: Any, index: int = 0) -> list[float]:
    return [t["logprob"] for t in answer["choices"][index]["logprobs"]["content"]]


async def refused(served: Product, text: str = "hi", **fields: Any) -> tuple[int, dict[str, Any]]:
    body = {"model": "agent", "messages": [{"role": "user", "content": text}], "max_tokens": 4, **fields}
    answer = await served.http.post("/v1/chat/completions", json=body)
    return answer.status_code, answer.json()["error"]


def step_of(served: Product, answer: Any) -> Step:
    step = served.store.step(id=answer["id"])
    assert step is not None
    return step


def expected(base: Base, step: Step) -> list[float]:
    ids = [*step.prompt_ids, *step.completion_ids]
    model = copy.deepcopy(base.model).double()
    rows = reference(model, ids, starts(len(ids), WINDOW, 32), WINDOW, 32, (1,), memory_tokens=512)
    at = len(step.prompt_ids) - 1
    return [float(row[i]) for row, i in zip(rows[at:].log_softmax(-1), step.completion_ids, strict=False)]


async def test_a_long_prompt_is_answered_and_the_answer_says_how(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    async with product(tiny_base, settings(tiny_model_dir, tmp_path / "off")) as served:
        assert (await refused(served, LONG * 2))[1]["code"] == "context_length_exceeded"
        status, error = await refused(served, **in_session("s"))
        assert status == 400 and error["param"] == "gradatim.session" and "memory.attention" in error["message"]
    async with product(tiny_base, far(tiny_model_dir, tmp_path)) as served:
        short = await served.ask(**GREEDY)
        assert "memory" not in short["gradatim"]
        answer, other = await asyncio.gather(served.ask(LONG, **GREEDY), served.ask(**GREEDY))
        step = step_of(served, answer)
        assert list(step.logprobs) == said(answer) == pytest.approx(expected(tiny_base, step), abs=2e-3)
        assert said(other) == pytest.approx(said(short), abs=1e-4)
        told = answer["gradatim"]["memory"]["attention"]
        assert told == step.memory["attention"] and told["attended"] == len(step.completion_ids)
        assert told["kept"] == 96 and 0.0 < told["share"] < 1.0 and "session" not in told
        assert not step.trainable and step_of(served, short).trainable

        many = await served.ask(LONG, n=3, temperature=1.0, seed=4, logprobs=True)
        for i, of in enumerate((many["id"], f"{many['id']}:1", f"{many['id']}:2")):
            one = served.store.step(id=of)
            assert one is not None and said(many, i) == pytest.approx(expected(tiny_base, one), abs=2e-3)
        stream = await served.ask(LONG, stream=True, **GREEDY)
        chunks = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == text(answer)
        assert chunks[-1]["gradatim"]["memory"]["attention"]["kept"] == 96
        story = (await served.http.get(f"/v1/explain/{answer['id']}")).json()
        assert story["memory"]["of_it"]["attention"]["kept"] == 96
        status, error = await refused(served, "x" * 700)
        assert status == 400 and error["code"] == "context_length_exceeded" and "attention_tokens" in error["message"]


async def test_sessions_go_on_by_tenant_and_go_when_they_are_forgotten(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    config = far(tiny_model_dir, tmp_path, tokens=True)
    async with product(tiny_base, config) as served:
        status, error = await refused(served, user="alice", **in_session("s1", resume=True))
        assert (status, error["code"]) == (404, "session_not_found")
        assert (await refused(served, gradatim={"resume": True}))[0] == 400
        assert (await refused(served, **in_session("no spaces")))[0] == 400
        first = await served.ask(LONG, user="alice", **in_session("s1"), **GREEDY)
        second = await served.ask("go on", user="alice", **in_session("s1", resume=True), **GREEDY)
        whole, before = step_of(served, second), step_of(served, first)
        known = (*before.prompt_ids, *before.completion_ids)
        assert whole.prompt_ids[: len(known)] == known
        assert served.engine._renderer.decode(whole.prompt_ids[len(known) :]).endswith("user\ngo on\nassistant\n")
        assert said(second) == pytest.approx(expected(tiny_base, whole), abs=2e-3)
        assert second["gradatim"]["memory"]["attention"]["before"] == len(known)
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == len(known) - 1
        assert second["gradatim"]["episode_id"] == first["gradatim"]["episode_id"]
        assert not whole.trainable

        status, _ = await refused(served, user="bob", **in_session("s1", resume=True))
        assert status == 404  # of another tenant: it cannot be told from one that there is not
        bobs = await served.ask("go on", user="bob", **in_session("s1"), **GREEDY)
        assert bobs["gradatim"]["memory"]["attention"]["before"] == 0
        assert bobs["gradatim"]["episode_id"] != first["gradatim"]["episode_id"]
        plain = await served.ask("go on", user="carol", **GREEDY)
        assert said(bobs) == said(plain)
        sampled = await served.ask("and", user="bob", n=2, temperature=1.0, seed=3, logprobs=True, **in_session("s1"))
        assert sampled["gradatim"]["memory"]["attention"]["before"] == len(step_of(served, bobs).prompt_ids) + 6
        figures = (await served.http.get("/metrics")).text
        assert "gradatim_memory_sessions 2.0" in figures and "gradatim_memory_session_attended 12.0" in figures

        body = {"scope": "user", "value": "alice"}
        assert (await served.http.post("/v1/memory/forget", json=body)).json()["sessions"] == 1
        assert (await refused(served, user="alice", **in_session("s1", resume=True)))[0] == 404
        await served.ask("on", user="bob", **in_session("s2"))
    async with product(tiny_base, config) as served:  # after a restart
        again = await served.ask("and then", user="bob", **in_session("s1", resume=True), **GREEDY)
        assert said(again) == pytest.approx(expected(tiny_base, step_of(served, again)), abs=2e-3)
        body = {"scope": "session", "value": "s2"}
        assert (await served.http.post("/v1/memory/forget", json=body)).json()["sessions"] == 1
        assert (await refused(served, user="bob", **in_session("s2", resume=True)))[0] == 404
    off = replace(config, memory=replace(config.memory, attention=False))
    forgotten = await asyncio.to_thread(offline, off, "POST", "/v1/memory/forget", {"scope": "all"})
    assert forgotten.json()["sessions"] == 1 and not list((tmp_path / "memory" / "sessions").glob("*/*"))


async def test_a_session_that_is_in_use_is_refused(tiny_model_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    async with product(tiny_base, far(tiny_model_dir, tmp_path)) as served:
        slow = asyncio.create_task(served.ask("count", max_tokens=400, logit_bias={"257": -100}, **in_session("s")))
        while not served.engine.stats()["running"]:
            await asyncio.sleep(0.01)
        status, error = await refused(served, **in_session("s"))
        assert status == 409 and "another request" in error["message"]
        done = await slow
        assert done["usage"]["completion_tokens"] == 400
        assert (await served.ask("again", **in_session("s")))["gradatim"]["memory"]["attention"]["before"] > 400


def test_a_bound_that_holds_no_session_is_refused(tiny_model_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    config = far(tiny_model_dir, tmp_path, attention_bytes=100_000)
    with compose.build_store(config) as store:
        engine = compose.build_engine(config, tiny_base)
        try:
            with pytest.raises(ConfigError, match="attention_bytes = 100000 holds no session"):
                build_memory(config, store, tiny_base, engine)
        finally:
            engine.close()


async def test_what_no_memory_asks_for_is_not_read_again(tiny_model_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    """Only decision memory asks where a request stands: without it the prefix cache gives all that it has."""
    cached = []
    for name, memory in {"none": {}, "tokens": {"tokens": True}, "decisions": {"decisions": True}}.items():
        async with product(tiny_base, settings(tiny_model_dir, tmp_path / name, **memory)) as served:
            await served.ask("the same words again " * 4)
            again = await served.ask("the same words again " * 4)
            cached.append(again["usage"]["prompt_tokens_details"]["cached_tokens"])
            assert served.engine.stats()["memory_failed"] == 0
    assert cached[0] == cached[1] > 80 and cached[2] < 16


async def test_a_client_that_leaves_while_its_session_is_opened_leaves_it_free(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    async with product(tiny_base, far(tiny_model_dir, tmp_path)) as served:
        sessions = served.remembering.sessions
        assert sessions is not None
        await served.ask("one", **in_session("s"))
        began, go_on, read = threading.Event(), threading.Event(), sessions._before

        def slowly(*args: Any) -> Any:
            began.set()
            assert go_on.wait(30)
            return read(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sessions, "_before", slowly)
            left = asyncio.create_task(served.ask("two", **in_session("s")))
            await asyncio.to_thread(began.wait, 30)
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
            go_on.set()
        while any(held.reading is not None for held in sessions._held.values()):
            await asyncio.sleep(0.01)
        again = await served.ask("three", **in_session("s", resume=True))
        assert again["gradatim"]["memory"]["attention"]["before"] < 40  # nothing of the second one


async def test_other_memories_act_inside_of_sessions_and_do_not_learn_from_their_later_turns(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    async with product(tiny_base, far(tiny_model_dir, tmp_path, decisions=True, tokens=True)) as served:
        first = await served.ask(user="alice", **in_session("s1"))
        await served.say(response_id=first["id"], kind="correction", correction="left", source="human:a")
        taught = await served.ask(user="alice", **in_session("s2"))
        assert text(taught) == "left" and taught["gradatim"]["memory"]["weight"] > 0.5
        assert taught["gradatim"]["memory"]["attention"]["before"] == 0
        laters = []
        for _ in range(3):  # beyond the window too
            later = await served.ask("where to? " * 5, user="alice", **in_session("s2"))
            body = {"response_id": later["id"], "kind": "correction", "correction": "no", "source": "critic:test"}
            assert (await served.http.post("/v1/feedback", json=body)).status_code == 202
            laters.append(later["id"])
        assert later["gradatim"]["memory"]["attention"]["attended"] > 0
        done = await served.ask(user="alice", **in_session("s3"))
        await served.say(response_id=done["id"], kind="score", value=-1)
        while not served.remembering.kept.show(step_id=done["id"]):
            await asyncio.sleep(0.01)  # what came before it was looked at, too
        assert not any(served.remembering.kept.show(step_id=later) for later in laters)
        assert served.engine.stats()["memory_failed"] == 0


async def test_completions_go_on_from_plain_text(tiny_model_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    async with product(tiny_base, far(tiny_model_dir, tmp_path)) as served:
        body = {"model": "agent", "max_tokens": 5, "temperature": 0, "return_token_ids": True, **in_session("s")}
        prompts: list[str | list[int]] = ["once upon a time", " there was", [65, 66]]
        known: list[int] = []
        for prompt in prompts:
            answer = (await served.http.post("/v1/completions", json={**body, "prompt": prompt})).json()
            choice = answer["choices"][0]
            new = [65, 66] if isinstance(prompt, list) else served.engine._renderer.more_ids(prompt)
            assert choice["prompt_token_ids"] == [*known, *new]
            known = [*choice["prompt_token_ids"], *choice["token_ids"]]
