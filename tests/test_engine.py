"""The embedded engine on a tiny random model, against transformers and PEFT as slow references."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from gradatim.config import EngineConfig
from gradatim.engine.attention import Segment
from gradatim.engine.transformers import TransformersEngine
from gradatim.errors import AdapterError, EngineError, OverloadedError, PromptTooLongError, UnknownAdapterError
from gradatim.nn.base import Base
from gradatim.nn.lora import LoraWeights, write_adapter
from gradatim.nn.render import Renderer
from gradatim.testing.engine import ENGINE_CHECKS, Bench, Check, collect
from gradatim.types import Adapter, AdapterId, Delta, Request, Sampling, Started, Token

BASE = AdapterId("agent@0")
PROMPTS = ("Hello", "the quick brown fox", "0123456789" * 4, "once upon a time there was", "a", "x = y + z", "?", "ok")


def ask(text: str, **sampling: Any) -> Request:
    fields: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, **sampling}
    return Request(messages=({"role": "user", "content": text},), sampling=Sampling(**fields))


def tokens(deltas: Sequence[Delta]) -> list[Token]:
    return [token for delta in deltas for token in delta.tokens]


def ids(deltas: Sequence[Delta]) -> list[int]:
    return [token.id for token in tokens(deltas)]


def text(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def events_of(engine: TransformersEngine, request: Request, adapter_id: AdapterId = BASE) -> Any:
    return aclosing(cast("Any", engine.generate(request, adapter_id)))


async def answer(engine: TransformersEngine, request: Request, adapter_id: AdapterId = BASE) -> list[Delta]:
    _, choices = await collect(engine, request, adapter_id)
    return choices[0]


def make_adapter(base: Base, data_dir: Path, step: int, *, rank: int = 4, size: float = 0.15) -> Adapter:
    torch.manual_seed(step)
    modules: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in base.model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            modules[path] = (
                torch.randn(rank, module.in_features) * size,
                torch.randn(module.out_features, rank) * size,
            )
    path = f"adapters/agent-{step}-{rank}-{size}"
    sha256 = write_adapter(data_dir / path, LoraWeights(rank, 2.0, modules), 2.0 * rank, "tiny")
    return Adapter(
        id=AdapterId(f"agent@{step}"),
        name="agent",
        step=step,
        base_sha256=base.sha256,
        parent_id=BASE,
        sha256=sha256,
        path=path,
        created_at=0.0,
    )


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine-data")


@pytest.fixture(scope="session")
def adapters(tiny_base: Base, data_dir: Path) -> list[Adapter]:
    return [make_adapter(tiny_base, data_dir, step, rank=2 * step) for step in (1, 2, 3)]


def build(base: Base, data_dir: Path, *, max_queue: int = 64, **config: Any) -> TransformersEngine:
    fields: dict[str, Any] = {"threads": 1, "max_batch": 8, "adapter_slots": 4, **config}
    return TransformersEngine(base, Renderer(base), EngineConfig(**fields), data_dir, max_queue=max_queue)


@pytest.fixture
def engine(tiny_base: Base, data_dir: Path) -> Iterator[TransformersEngine]:
    engine = build(tiny_base, data_dir)
    yield engine
    engine.close()


@torch.inference_mode()
def greedy(model: Any, prompt_ids: Sequence[int], n: int) -> list[int]:
    batch = torch.tensor([prompt_ids])
    out = model.generate(batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=n)
    return cast("list[int]", out[0, len(prompt_ids) :].tolist())


@torch.inference_mode()
def logprobs(model: Any, prompt_ids: Sequence[int], completion: Sequence[int]) -> list[float]:
    rows = model(torch.tensor([[*prompt_ids, *completion]])).logits[0].float().log_softmax(-1)
    return [float(rows[len(prompt_ids) - 1 + i, token]) for i, token in enumerate(completion)]


# ------------------------------------------------------------------------------------------- conformance


@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda c: c.__name__)
async def test_it_keeps_the_engine_contract(
    check: Check, tiny_base: Base, data_dir: Path, adapters: list[Adapter]
) -> None:
    @asynccontextmanager
    async def open_engine() -> AsyncIterator[Bench]:
        engine = build(tiny_base, data_dir, max_queue=12)
        try:
            yield Bench(engine=engine, adapters=adapters[:2], too_long=Request(prompt=tuple([5] * 256)))
        finally:
            engine.close()

    await check(open_engine)


# --------------------------------------------------------------------------------------- exact numbers


async def test_greedy_tokens_and_logprobs_are_those_of_transformers(
    engine: TransformersEngine, tiny_base: Base
) -> None:
    results = await asyncio.gather(*[collect(engine, ask(p), BASE) for p in PROMPTS])
    for started, (deltas,) in results:
        assert ids(deltas) == greedy(tiny_base.model, started.prompt_ids, 12)
        want = logprobs(tiny_base.model, started.prompt_ids, ids(deltas))
        assert [t.logprob for t in tokens(deltas)] == pytest.approx(want, abs=1e-4)


async def test_a_long_prompt_read_beside_a_running_stream_is_exact(engine: TransformersEngine, tiny_base: Base) -> None:
    running = asyncio.create_task(answer(engine, ask("go", max_tokens=60)))
    long = ask("many words " * 14, max_tokens=20)
    (started, (deltas,)), other = await asyncio.gather(collect(engine, long, BASE), running)
    assert len(started.prompt_ids) > 128
    assert ids(deltas) == greedy(tiny_base.model, started.prompt_ids, 20)
    assert ids(other) == ids(await answer(engine, ask("go", max_tokens=60)))


async def test_a_mixed_batch_gives_what_each_adapter_gives_alone(
    engine: TransformersEngine, adapters: list[Adapter]
) -> None:
    for adapter in adapters:
        await engine.load(adapter)
    names = [BASE, adapters[0].id, adapters[1].id, BASE, adapters[2].id, adapters[0].id, adapters[2].id, BASE]
    alone = [await answer(engine, ask(p), name) for p, name in zip(PROMPTS, names, strict=True)]
    mixed = await asyncio.gather(*[answer(engine, ask(p), n) for p, n in zip(PROMPTS, names, strict=True)])
    assert [ids(d) for d in mixed] == [ids(d) for d in alone]
    assert len({tuple(ids(await answer(engine, ask("Hello"), name))) for name in set(names)}) == 4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's, of transformers
async def test_adapters_compute_what_peft_computes(
    engine: TransformersEngine, adapters: list[Adapter], tiny_model_dir: Path, data_dir: Path
) -> None:
    adapter = adapters[1]
    await engine.load(adapter)
    started, (deltas,) = await collect(engine, ask("the quick brown fox"), adapter.id)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, data_dir / adapter.path).eval()
    want = logprobs(peft, started.prompt_ids, ids(deltas))
    assert [t.logprob for t in tokens(deltas)] == pytest.approx(want, abs=1e-4)
    assert ids(deltas) == greedy(peft, started.prompt_ids, 12)


async def test_rows_without_an_adapter_are_bit_identical_beside_rows_with_one(
    engine: TransformersEngine, adapters: list[Adapter]
) -> None:
    await engine.load(adapters[0])
    runner = engine._runner
    runner.cache.reserve(64, [])
    plain = [Segment(0, 0, [1, 2, 3, 4]), Segment(1, 0, [5, 6, 7, 8])]
    mixed = [plain[0], replace(plain[1], lora_slot=engine._pool.acquire(adapters[0].id))]
    first, second = runner.forward(plain, 0), runner.forward(mixed, 0)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


async def test_a_model_with_a_sliding_window_is_exact(tmp_path: Path, tiny_model_dir: Path, tiny_base: Base) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=8,
        initializer_range=0.2,
        eos_token_id=257,
    )
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    engine = build(replace(tiny_base, model=model), tmp_path)
    try:
        started, (deltas,) = await collect(engine, ask("the quick brown fox jumps"), BASE)
        want = logprobs(model, started.prompt_ids, ids(deltas))
        assert [t.logprob for t in tokens(deltas)] == pytest.approx(want, abs=1e-4)
    finally:
        engine.close()


# -------------------------------------------------------------------------------------- prefix cache


async def test_the_prefix_cache_saves_work_and_changes_nothing(
    tiny_base: Base, data_dir: Path, adapters: list[Adapter]
) -> None:
    cached, plain = build(tiny_base, data_dir), build(tiny_base, data_dir, prefix_cache_tokens=0)
    try:
        for engine in (cached, plain):
            await engine.load(adapters[0])
        hits = 0
        for n in (3, 9, 4, 12, 9, 7):
            for name in (BASE, adapters[0].id):
                request = ask("one two three " * n, max_tokens=6)
                started, (got,) = await collect(cached, request, name)
                reference, (want,) = await collect(plain, request, name)
                assert ids(got) == ids(want)
                assert reference.cached_tokens == 0
                hits += started.cached_tokens
        assert hits > 200
    finally:
        cached.close()
        plain.close()


async def test_the_prefix_cache_never_leaks_between_adapters(
    engine: TransformersEngine, adapters: list[Adapter]
) -> None:
    request = ask("one two three four five six seven")
    await engine.load(adapters[0])
    await answer(engine, request)
    started, _ = await collect(engine, request, adapters[0].id)
    assert started.cached_tokens == 0
    started, _ = await collect(engine, request, adapters[0].id)
    assert started.cached_tokens > 0
    await engine.unload(adapters[0].id)
    await engine.load(adapters[0])
    started, _ = await collect(engine, request, adapters[0].id)
    assert started.cached_tokens == 0, "what an unloaded adapter left must be gone"


async def test_a_conversation_reuses_the_answer_it_got(engine: TransformersEngine, tiny_base: Base) -> None:
    started, (deltas,) = await collect(engine, ask("hello there, how are you?", max_tokens=40), BASE)
    follow = (*started.prompt_ids, *ids(deltas), 10, 11, 12)
    again, (next_deltas,) = await collect(
        engine, Request(prompt=follow, sampling=Sampling(max_tokens=5, temperature=0)), BASE
    )
    assert again.cached_tokens > len(started.prompt_ids)
    assert ids(next_deltas) == greedy(tiny_base.model, follow, 5)


# ------------------------------------------------------------------------------------------- sampling


async def test_the_same_seed_draws_the_same_whatever_runs_beside(engine: TransformersEngine) -> None:
    request = ask("tell me", temperature=1.0, seed=7, n=3, top_p=0.9)
    _, alone = await collect(engine, request, BASE)
    busy = [asyncio.create_task(answer(engine, ask(p, temperature=1.0))) for p in PROMPTS[:4]]
    _, beside = await collect(engine, request, BASE)
    await asyncio.gather(*busy)
    assert [ids(d) for d in alone] == [ids(d) for d in beside]
    assert len({tuple(ids(d)) for d in alone}) == 3, "choices differ from each other"
    _, other = await collect(engine, replace(request, sampling=replace(request.sampling, seed=8)), BASE)
    assert [ids(d) for d in other] != [ids(d) for d in alone]


async def test_logprobs_of_sampled_tokens_are_the_models_own(engine: TransformersEngine, tiny_base: Base) -> None:
    request = ask("tell me", temperature=1.7, seed=1, top_p=0.8, frequency_penalty=1.0, top_logprobs=3)
    started, (deltas,) = await collect(engine, request, BASE)
    want = logprobs(tiny_base.model, started.prompt_ids, ids(deltas))
    assert [t.logprob for t in tokens(deltas)] == pytest.approx(want, abs=1e-4)
    for token in tokens(deltas):
        top = [logprob for _, _, logprob in token.top]
        assert len(top) == 3 and top == sorted(top, reverse=True) and top[0] >= token.logprob - 1e-6


async def test_logit_bias_bans_and_forces(engine: TransformersEngine) -> None:
    free = ids(await answer(engine, ask("Hello")))
    banned = ids(await answer(engine, ask("Hello", logit_bias={free[0]: -1000.0})))
    assert banned[0] != free[0]
    assert ids(await answer(engine, ask("Hello", max_tokens=3, logit_bias={65: 1000.0}))) == [65, 65, 65]


async def test_end_of_turn_is_kept_in_the_ids_and_left_out_of_the_text(engine: TransformersEngine) -> None:
    deltas = await answer(engine, ask("Hello", logit_bias={257: 1000.0}))
    assert (ids(deltas), text(deltas), deltas[-1].finish_reason) == ([257], "", "stop")


async def test_the_context_window_ends_an_answer_with_length(engine: TransformersEngine) -> None:
    prompt = tuple([65] * 250)
    deltas = await answer(
        engine, Request(prompt=prompt, sampling=Sampling(temperature=0, logit_bias={66: 1000.0})), BASE
    )
    assert (len(ids(deltas)), deltas[-1].finish_reason) == (6, "length")


@pytest.mark.parametrize("fields", [{"n": 9}, {"n": 0}, {"max_tokens": 0}, {"logit_bias": {258: 1.0}}])
async def test_sampling_that_cannot_be_done_is_refused(engine: TransformersEngine, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        await answer(engine, ask("Hello", **fields))


# ------------------------------------------------------------------------------- joining and leaving


async def test_nobody_waits_for_another_to_finish(engine: TransformersEngine) -> None:
    order: list[str] = []

    async def run(name: str, max_tokens: int) -> None:
        await answer(engine, ask(name, max_tokens=max_tokens, logit_bias={257: -1000.0}))
        order.append(name)

    long = asyncio.create_task(run("long", 150))
    while not engine.stats()["generated_tokens"]:
        await asyncio.sleep(0.001)
    await asyncio.gather(run("short", 3), long)
    assert order == ["short", "long"]


async def test_more_requests_than_rows_are_all_answered(engine: TransformersEngine, tiny_base: Base) -> None:
    requests = [ask(f"{PROMPTS[i % 8]} {i}", max_tokens=2 + i % 7, n=1 + i % 3) for i in range(24)]
    results = await asyncio.gather(*[collect(engine, r, BASE) for r in requests])
    for request, (started, choices) in zip(requests, results, strict=True):
        want = greedy(tiny_base.model, started.prompt_ids, request.sampling.max_tokens or 0)
        assert [ids(d) for d in choices] == [want] * request.sampling.n
    assert (engine.stats()["rows"], engine.stats()["running"]) == (0, 0)


async def test_closing_the_iterator_frees_the_row(engine: TransformersEngine) -> None:
    async with events_of(engine, ask("go on", max_tokens=200, logit_bias={257: -1000.0})) as events:
        async for event in events:
            if isinstance(event, Delta):
                break
    while engine.stats()["running"]:
        await asyncio.sleep(0.001)
    assert engine.stats()["aborted"] == 1
    assert engine.stats()["generated_tokens"] < 150


async def test_a_full_queue_is_refused_and_recovers(tiny_base: Base, data_dir: Path) -> None:
    engine = build(tiny_base, data_dir, max_batch=1, max_queue=2)
    try:
        results = await asyncio.gather(
            *[answer(engine, ask("Hello", max_tokens=30)) for _ in range(6)], return_exceptions=True
        )
        assert sum(isinstance(r, OverloadedError) for r in results) == 4
        assert sum(isinstance(r, list) for r in results) == 2
        await answer(engine, ask("Hello"))
    finally:
        engine.close()


async def test_a_prompt_longer_than_the_configured_context_is_refused(tiny_base: Base, data_dir: Path) -> None:
    engine = build(tiny_base, data_dir, max_context_tokens=32)
    try:
        with pytest.raises(PromptTooLongError, match="32"):
            await answer(engine, Request(prompt=tuple([65] * 32)))
    finally:
        engine.close()


async def test_closing_the_engine_ends_what_runs(tiny_base: Base, data_dir: Path) -> None:
    engine = build(tiny_base, data_dir)
    with pytest.raises(EngineError, match="closed"):
        async with events_of(engine, ask("go", max_tokens=200, logit_bias={257: -1000.0})) as events:
            async for event in events:
                if isinstance(event, Started):
                    await asyncio.to_thread(engine.close)
    with pytest.raises(EngineError, match="closed"):
        await answer(engine, ask("Hello"))


# ------------------------------------------------------------------------------------------- adapters


async def test_an_adapter_whose_files_changed_is_refused(engine: TransformersEngine, adapters: list[Adapter]) -> None:
    with pytest.raises(AdapterError, match="digest"):
        await engine.load(replace(adapters[0], sha256="0" * 64))
    with pytest.raises(AdapterError, match="base"):
        await engine.load(replace(adapters[0], base_sha256="0" * 64))
    assert engine.loaded() == frozenset()


async def test_an_adapter_for_another_model_is_refused(
    engine: TransformersEngine, tiny_base: Base, data_dir: Path
) -> None:
    weights = LoraWeights(2, 1.0, {"model.layers.0.self_attn.q_proj": (torch.ones(2, 7), torch.ones(9, 2))})
    sha256 = write_adapter(data_dir / "odd", weights, 2.0, "tiny")
    odd = replace(make_adapter(tiny_base, data_dir, 1, rank=2), path="odd", sha256=sha256)
    with pytest.raises(AdapterError, match="another base model"):
        await engine.load(odd)


async def test_the_least_recently_used_idle_adapter_makes_room(
    tiny_base: Base, data_dir: Path, adapters: list[Adapter]
) -> None:
    engine = build(tiny_base, data_dir, adapter_slots=2)
    try:
        await engine.load(adapters[0])
        await engine.load(adapters[1])
        await answer(engine, ask("Hello"), adapters[0].id)
        await engine.load(adapters[2])
        assert engine.loaded() == {adapters[0].id, adapters[2].id}
        with pytest.raises(UnknownAdapterError):
            await answer(engine, ask("Hello"), adapters[1].id)
    finally:
        engine.close()


async def test_no_room_while_every_slot_is_in_use_is_an_error(
    tiny_base: Base, data_dir: Path, adapters: list[Adapter]
) -> None:
    engine = build(tiny_base, data_dir, adapter_slots=1)
    try:
        await engine.load(adapters[0])
        async with events_of(engine, ask("go", max_tokens=200), adapters[0].id) as events:
            async for event in events:
                if isinstance(event, Started):
                    with pytest.raises(AdapterError, match="adapter_slots"):
                        await engine.load(adapters[1])
        await asyncio.sleep(0)
        while engine.stats()["running"]:
            await asyncio.sleep(0.001)
        await engine.load(adapters[1])
        assert engine.loaded() == {adapters[1].id}
    finally:
        engine.close()


async def test_loading_while_others_generate_changes_nothing_for_them(
    engine: TransformersEngine, tiny_base: Base, data_dir: Path, adapters: list[Adapter]
) -> None:
    await engine.load(adapters[0])
    want = ids(await answer(engine, ask("Hello", max_tokens=60), adapters[0].id))
    running = asyncio.create_task(answer(engine, ask("Hello", max_tokens=60), adapters[0].id))
    for step in (4, 5, 6, 7):
        await engine.load(make_adapter(tiny_base, data_dir, step, rank=step))
    assert ids(await running) == want


# --------------------------------------------------------------------------------------------- faults


async def test_numbers_that_are_not_finite_fail_one_request_only(
    engine: TransformersEngine, adapters: list[Adapter]
) -> None:
    await engine.load(adapters[0])
    slot = engine._pool.acquire(adapters[0].id)
    engine._pool.release(adapters[0].id)
    with torch.inference_mode():
        for layer in engine._runner.lora._layers.values():
            assert layer._b is not None
            layer._b[slot] = float("nan")
    sound, broken = await asyncio.gather(
        answer(engine, ask("Hello")), answer(engine, ask("Hello"), adapters[0].id), return_exceptions=True
    )
    assert isinstance(broken, EngineError) and "finite" in str(broken)
    assert isinstance(sound, list) and sound[-1].finish_reason
    after = await asyncio.gather(*[answer(engine, ask(p)) for p in PROMPTS])
    assert all(deltas[-1].finish_reason for deltas in after), "what it left in memory harms nobody"


async def test_a_forward_pass_that_fails_takes_down_only_the_row_that_breaks_it(
    engine: TransformersEngine, tiny_base: Base, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = engine._runner.forward

    def sometimes(segments: Sequence[Segment], decoding: int) -> Tensor:
        if any(s.start + len(s.ids) > 100 for s in segments):
            raise RuntimeError("out of memory")
        return forward(segments, decoding)

    monkeypatch.setattr(engine._runner, "forward", sometimes)
    results = await asyncio.gather(
        collect(engine, ask("Hello"), BASE),
        collect(engine, Request(prompt=tuple([65] * 200)), BASE),
        return_exceptions=True,
    )
    assert isinstance(results[1], EngineError) and "RuntimeError" in str(results[1])
    assert not isinstance(results[0], BaseException)
    started, (deltas,) = results[0]
    assert ids(deltas) == greedy(tiny_base.model, started.prompt_ids, 12)
    assert "Hello" not in caplog.text


async def test_a_model_it_cannot_serve_is_refused_at_the_start(tiny_base: Base, data_dir: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    from gradatim.errors import ModelError

    config = MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match="another engine"):
        build(replace(tiny_base, model=MambaForCausalLM(config).eval()), data_dir)
