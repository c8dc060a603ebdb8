"""Prompts and sessions longer than the engine's window: against the definition in float64, and against the engine that
has no memory where nothing lies beyond the window."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gradatim.config import EngineConfig, MemoryConfig
from gradatim.engine.transformers import TransformersEngine
from gradatim.errors import OverloadedError, PromptTooLongError, SessionError, UnknownSessionError
from gradatim.memory.session_folder import SessionFolder
from gradatim.memory.sessions import SessionStore
from gradatim.nn.base import Base, load_base
from gradatim.nn.lora import LoraWeights, read_adapter
from gradatim.nn.nearest import BLOCKS
from gradatim.nn.render import Renderer
from gradatim.protocols import OpenReading
from gradatim.testing.engine import collect
from gradatim.types import Delta, EpisodeId, Request, Sampling, Started
from tests.far_reference import reference
from tests.test_engine import BASE, events_of, make_adapter

WINDOW, SLIDE, BEYOND = 32, 8, 48
EPISODE = EpisodeId("ep")


def words(count: int, seed: int = 0) -> tuple[int, ...]:
    ids: list[int] = torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(ids)


def asked(ids: Sequence[int], reading: OpenReading | None = None, **sampling: Any) -> Request:
    fields: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, "logit_bias": {257: -100.0}, **sampling}
    return Request(prompt=tuple(ids), sampling=Sampling(**fields), reading=reading)


@contextmanager
def opened(
    base: Base, data: Path, *, tokens: int = BEYOND, bias: float = 0.0, **more: Any
) -> Iterator[TransformersEngine]:
    config = EngineConfig(threads=1, max_batch=4, adapter_slots=2, max_context_tokens=WINDOW)
    fields: dict[str, Any] = {"attention_tokens": tokens, "attention_bytes": 2**24, **more}
    engine = TransformersEngine(base, Renderer(base), config, data, **fields)
    if engine.beyond is not None:
        engine.beyond._bias = bias
    try:
        yield engine
    finally:
        engine.close()


def kept(folder: Path, base: Base, **config: Any) -> SessionStore:
    return SessionStore(
        SessionFolder(folder), MemoryConfig(**config), base_sha256=base.sha256, tokenizer_sha256="t", space="float32"
    )


def read_on(sessions: SessionStore, name: str = "", user: str = "alice", weights: str = "w") -> OpenReading:
    return sessions.open(user, name, weights, episode_id=EPISODE)


def starts(count: int, window: int = WINDOW, slide: int = SLIDE) -> list[int]:
    """For each token, the first one that its window still holds."""
    return [slide * math.ceil(max(0, t - window + 1) / slide) for t in range(count)]


def expected(model: Any, ids: Sequence[int], answer: Sequence[int], **more: Any) -> list[float]:
    """Log-probabilities of the answer's tokens after ``ids``, in float64."""
    fields: dict[str, Any] = {"blocks": BLOCKS, "layers": (1,), "memory_tokens": BEYOND, **more}
    every = (*ids, *answer)
    rows = reference(copy.deepcopy(model).double(), every, starts(len(every)), WINDOW, **fields).log_softmax(-1)
    return [float(rows[len(ids) - 1 + i, token]) for i, token in enumerate(answer)]


def merged(model: Any, weights: LoraWeights) -> Any:
    out = copy.deepcopy(model)
    with torch.no_grad():
        for path, (a, b) in weights.modules.items():
            out.get_submodule(path).weight += weights.scaling * b @ a
    return out


def drawn(deltas: Sequence[Delta]) -> tuple[list[int], list[float]]:
    tokens = [token for delta in deltas for token in delta.tokens]
    return [t.id for t in tokens], [t.logprob for t in tokens]


async def answers(engine: TransformersEngine, request: Request, adapter: Any = BASE) -> tuple[Started, list[Any]]:
    started, choices = await collect(engine, request, adapter)
    return started, [drawn(choice) for choice in choices]


# --------------------------------------------------------------------------------------- the definition


async def test_a_batch_of_all_kinds_draws_from_the_definitions_distribution(tiny_base: Base, tmp_path: Path) -> None:
    """Long and short prompts, with and without an adapter, several choices, sampled: each as if it were alone."""
    adapter = make_adapter(tiny_base, tmp_path, 1)
    tuned = merged(tiny_base.model, read_adapter(tmp_path / adapter.path, adapter.sha256))
    sessions = kept(tmp_path / "s", tiny_base)
    long, other, short = words(68, 1), words(61, 2), words(20, 3)
    with opened(tiny_base, tmp_path) as engine:
        await engine.load(adapter)
        readings = [read_on(sessions) for _ in range(3)]
        results = await asyncio.gather(
            answers(engine, asked(long, readings[0], max_tokens=12, temperature=0.8, seed=1)),
            answers(engine, asked(other, readings[1], n=2, temperature=1.0, seed=2, max_tokens=9), adapter.id),
            answers(engine, asked(short, readings[2])),
        )
    told = (tiny_base.model, long), (tuned, other), (tiny_base.model, short)
    for (model, ids), (started, choices) in zip(told, results, strict=True):
        assert started.prompt_ids == ids
        for answer, logprobs in choices:
            assert logprobs == pytest.approx(expected(model, ids, answer), abs=2e-3)
    assert results[1][1][0] != results[1][1][1]
    trace = readings[0].trace()
    assert trace["kept"] == BEYOND and trace["attended"] == 12 and 0.0 < trace["share"] < 1.0
    assert readings[2].trace() == {}  # it needed no more than the window


async def test_of_many_blocks_each_token_attends_to_its_own(tiny_base: Base, tmp_path: Path) -> None:
    ids = words(330, 4)
    with opened(tiny_base, tmp_path, tokens=400) as engine:
        reading = read_on(kept(tmp_path / "s", tiny_base))
        _, [(answer, logprobs)] = await answers(engine, asked(ids, reading))
    assert logprobs == pytest.approx(expected(tiny_base.model, ids, answer, memory_tokens=400), abs=2e-3)
    assert reading.trace()["kept"] == 304


async def test_half_precision_stays_near_the_definition(tiny_model_dir: Path, tmp_path: Path) -> None:
    base, ids = load_base(str(tiny_model_dir), tmp_path, dtype="bfloat16", device="cpu"), words(68, 1)
    with opened(base, tmp_path) as engine:
        reading = read_on(kept(tmp_path / "s", base), "s1")
        _, [(answer, logprobs)] = await answers(engine, asked(ids, reading))
    assert logprobs == pytest.approx(expected(base.model, ids, answer), abs=0.3)


async def test_an_answer_may_outgrow_the_window(tiny_base: Base, tmp_path: Path) -> None:
    ids = words(25)
    with opened(tiny_base, tmp_path) as engine:
        reading = read_on(kept(tmp_path / "s", tiny_base))
        _, [(answer, logprobs)] = await answers(engine, asked(ids, reading, max_tokens=30))
    assert logprobs == pytest.approx(expected(tiny_base.model, ids, answer), abs=2e-3)
    assert reading.trace()["attended"] == 30 - (WINDOW - 25) - 1 and reading.trace()["kept"] == 24


async def test_with_nothing_beyond_the_window_every_bit_is_the_base_models(tiny_base: Base, tmp_path: Path) -> None:
    """Off, on with a prompt that fits, on with a session that fits: the very same numbers."""
    ids = words(20)
    found = []
    with opened(tiny_base, tmp_path, tokens=0) as engine:
        found.append(await answers(engine, asked(ids)))
    for name in ("", "a session"):
        with opened(tiny_base, tmp_path) as engine:
            reading = read_on(kept(tmp_path / "s", tiny_base), name)
            found.append(await answers(engine, asked(ids, reading)))
    assert found[0] == found[1] == found[2]


async def test_shut_out_memory_leaves_the_window_alone(tiny_base: Base, tmp_path: Path) -> None:
    ids = words(70)
    found = []
    for tokens in (1, BEYOND):
        with opened(tiny_base, tmp_path, tokens=max(tokens, BEYOND), bias=-math.inf) as engine:
            reading = read_on(kept(tmp_path / "s", tiny_base))
            found.append((await answers(engine, asked(ids, reading)))[1])
            assert reading.trace()["share"] == 0.0 and reading.trace()["attended"] == 0
    assert found[0] == found[1]
    [(answer, logprobs)] = found[0]
    assert logprobs == pytest.approx(expected(tiny_base.model, ids, answer, layers=()), abs=2e-3)


# --------------------------------------------------------------------------------------------- sessions


async def test_a_session_goes_on_where_it_stood_also_after_a_restart(tiny_base: Base, tmp_path: Path) -> None:
    parts = words(45, 1), words(14, 2), words(5, 3)
    found = []
    for restarts in (False, True):
        folder = tmp_path / str(restarts)
        sessions, said, turns = kept(folder, tiny_base), list[int](), []
        with opened(tiny_base, tmp_path) as engine:
            for part in parts:
                if restarts:
                    sessions.write()
                    sessions = kept(folder, tiny_base)
                reading = read_on(sessions, "s1")
                started, [(answer, logprobs)] = await answers(engine, asked(part, reading))
                reading.close()
                dropped = len(said) + len(part) - len(started.prompt_ids)
                assert started.prompt_ids == tuple([*said, *part][dropped:]) and dropped >= 0
                said += part
                assert logprobs == pytest.approx(expected(tiny_base.model, said, answer), abs=2e-3)
                said += answer
                turns.append((answer, logprobs, reading.trace()))
        assert turns[1][2]["before"] == 45 + 6 and turns[2][2]["kept"] == 48
        found.append(turns)
    assert found[0] == found[1]


async def test_within_the_window_a_session_is_one_long_prompt(tiny_base: Base, tmp_path: Path) -> None:
    sessions, first, second = kept(tmp_path / "s", tiny_base), words(8, 1), words(7, 2)
    with opened(tiny_base, tmp_path) as engine:
        reading = read_on(sessions, "s1")
        _, [(answer, _)] = await answers(engine, asked(first, reading, max_tokens=4))
        reading.close()
        reading = read_on(sessions, "s1")
        started, [(went_on, logprobs)] = await answers(engine, asked(second, reading))
        assert started.cached_tokens == len(first) + 3  # the last token that was drawn is read now
        _, [(plain, wanted)] = await answers(engine, asked((*first, *answer, *second)))
    assert went_on == plain and logprobs == pytest.approx(wanted, abs=1e-4)
    assert reading.trace()["kept"] == reading.trace()["attended"] == 0


async def test_other_weights_read_a_session_anew(
    tiny_base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = make_adapter(tiny_base, tmp_path, 2)
    tuned = merged(tiny_base.model, read_adapter(tmp_path / adapter.path, adapter.sha256))
    sessions, first, second = kept(tmp_path / "s", tiny_base), words(50, 1), words(9, 2)
    with opened(tiny_base, tmp_path) as engine:
        await engine.load(adapter)
        reading = read_on(sessions, "s1")
        _, [(answer, _)] = await answers(engine, asked(first, reading))
        reading.close()
        reading = read_on(sessions, "s1", weights="promoted")
        _, [(said, logprobs)] = await answers(engine, asked(second, reading), adapter.id)
    assert logprobs == pytest.approx(expected(tuned, (*first, *answer, *second), said), abs=2e-3)
    assert reading.trace()["reread"] == 56 and "read anew" in caplog.text
    assert sessions.stats()["session_reread"] == 1


async def test_the_prefix_cache_gives_and_takes_whole_prompts_only(tiny_base: Base, tmp_path: Path) -> None:
    ids = words(70)
    with opened(tiny_base, tmp_path) as engine:
        await answers(engine, asked(ids[:24]))
        reading = read_on(kept(tmp_path / "s", tiny_base))
        started, [(answer, logprobs)] = await answers(engine, asked(ids, reading))
        assert started.cached_tokens == 16
        assert logprobs == pytest.approx(expected(tiny_base.model, ids, answer), abs=2e-3)
        held = engine.stats()["prefix_cache_tokens"]
        assert held == 16  # nothing of the long one
        started, [(answer, logprobs)] = await answers(engine, asked(ids[40:60]))
        assert started.cached_tokens == 0
        assert logprobs == pytest.approx(expected(tiny_base.model, ids[40:60], answer), abs=2e-3)


async def test_a_request_that_does_not_end_leaves_its_session_as_it_was(tiny_base: Base, tmp_path: Path) -> None:
    sessions, part = kept(tmp_path / "s", tiny_base), words(9, 2)
    with opened(tiny_base, tmp_path) as engine:
        reading = read_on(sessions, "s1")
        await answers(engine, asked(words(40, 1), reading))
        reading.close()
        before = sessions.stats()
        left = read_on(sessions, "s1")
        with pytest.raises(SessionError, match="another request"):
            read_on(sessions, "s1")
        async with events_of(engine, asked(part, left, max_tokens=40)) as events:
            await anext(events)
            await anext(events)
        left.close()
        assert sessions.stats() == before
        again = read_on(sessions, "s1")
        started, [(answer, logprobs)] = await answers(engine, asked(part, again))
        assert logprobs == pytest.approx(expected(tiny_base.model, started.prompt_ids, answer), abs=2e-3)


async def test_what_is_forgotten_ends_the_answer_that_is_made_of_it(tiny_base: Base, tmp_path: Path) -> None:
    sessions = kept(tmp_path / "s", tiny_base)
    with opened(tiny_base, tmp_path, tokens=4000) as engine:
        reading = read_on(sessions, "s1")
        with pytest.raises(SessionError, match="forgotten"):
            async with events_of(engine, asked(words(40), reading, max_tokens=2000)) as events:
                await anext(events)
                await anext(events)
                assert sessions.forget("user", "bob") == 0 and sessions.forget("user", "alice") == 1
                async for _ in events:
                    pass
        reading.close()
        assert sessions.stats()["sessions"] == 0
        with pytest.raises(UnknownSessionError):
            sessions.open("alice", "s1", "w", episode_id=EPISODE, must_exist=True)
        assert engine.stats()["running"] == 0
        _, [(answer, logprobs)] = await answers(engine, asked(words(9)))
        assert logprobs == pytest.approx(expected(tiny_base.model, words(9), answer), abs=2e-3)


async def test_what_is_too_long_even_so_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    sessions = kept(tmp_path / "s", tiny_base)
    with opened(tiny_base, tmp_path) as engine:
        with pytest.raises(PromptTooLongError, match="48 beyond it"):
            await answers(engine, asked(words(WINDOW + BEYOND), read_on(sessions)))
        with pytest.raises(PromptTooLongError, match="context window of 32 must hold"):
            await answers(engine, asked(words(WINDOW)))
    assert engine.beyond is not None
    one = engine.beyond.token_bytes
    with opened(tiny_base, tmp_path, attention_bytes=100 * one) as engine:
        with pytest.raises(PromptTooLongError, match="attention_bytes"):
            await answers(engine, asked(words(70), read_on(sessions), n=4, max_tokens=60))
        many = asked(words(20), read_on(sessions), n=4, max_tokens=60)  # it goes without, as far as the window
        assert [len(answer) for answer, _ in (await answers(engine, many))[1]] == 4 * [WINDOW - 20]
        held = engine.beyond.reserve(70, 0, 20, 1) if engine.beyond else 0
        held += engine.beyond.reserve(70, 0, 20, 1) if engine.beyond else 0
        with pytest.raises(OverloadedError):
            await answers(engine, asked(words(70), read_on(sessions)))
        assert engine.beyond is not None
        engine.beyond.give_back(held)
        await answers(engine, asked(words(70), read_on(sessions)))
        assert engine.beyond._taken_bytes == 0
