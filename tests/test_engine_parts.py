"""The engine's parts one by one: stop strings, draws, the prefix cache and the slots."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradatim.engine.adapters import AdapterPool
from gradatim.engine.attention import RowCache
from gradatim.engine.prefix import BLOCK, PrefixCache
from gradatim.engine.sampling import Draws, draw, new_draws
from gradatim.engine.text import StopFilter
from gradatim.errors import AdapterError, UnknownAdapterError
from gradatim.types import AdapterId, Sampling

# ------------------------------------------------------------------------------------------ stop strings

letters = st.text("ab\n", max_size=24)


@given(letters, st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.randoms(use_true_random=False))
def test_any_chunking_stops_at_the_first_stop_string(whole: str, stops: list[str], chance: random.Random) -> None:
    filter = StopFilter(stops)
    out, rest = "", whole
    while rest and not filter.stopped:
        n = chance.randint(1, 4)
        out += filter.push(rest[:n])
        rest = rest[n:]
    out += filter.flush()
    ends = [whole.find(s) + len(s) for s in stops if s in whole]
    if not ends:
        assert (out, filter.stopped) == (whole, False)
        return
    assert filter.stopped
    assert not any(s in out for s in stops)
    assert whole.startswith(out) and any(whole[len(out) :].startswith(s) for s in stops)


def test_text_that_cannot_begin_a_stop_string_is_not_held_back() -> None:
    filter = StopFilter(["END"])
    assert [filter.push(t) for t in ("abc", "E", "x", "EN", "D")] == ["abc", "", "Ex", "", ""]
    assert filter.stopped


# ------------------------------------------------------------------------------------------------ draws


def frequencies(sampling: Sampling, logits: torch.Tensor, n: int = 3000) -> dict[int, float]:
    draws = new_draws(sampling, 0)
    counts = Counter(d.id for _ in range(n) if (d := draw(logits[None], [draws])[0]) is not None)
    return {token: count / n for token, count in counts.items()}


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -30.0])
    got = frequencies(Sampling(temperature=0.5, seed=3), logits)
    want = (logits / 0.5).softmax(-1)
    assert all(got.get(i, 0.0) == pytest.approx(float(p), abs=0.03) for i, p in enumerate(want))


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(frequencies(Sampling(top_p=0.79, seed=3), logits, 400)) == {0, 1}
    assert set(frequencies(Sampling(top_p=0.81, seed=3), logits, 400)) == {0, 1, 2}
    assert set(frequencies(Sampling(top_p=0.0, seed=3), logits, 50)) == {0}


def test_top_p_over_a_flat_distribution_looks_beyond_its_first_tokens() -> None:
    assert len(frequencies(Sampling(top_p=0.9, seed=3), torch.zeros(1000), 2000)) > 600


def test_penalties_are_openais() -> None:
    sampling = Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.3)
    draws = Draws(sampling, random.Random(0), Counter({0: 2}))
    logits = torch.tensor([[1.0, 0.05, -9.0]])  # 1.0 - 2 * 0.3 - 0.5 = -0.1 < 0.05
    drawn = draw(logits, [draws])[0]
    assert drawn is not None and drawn.id == 1
    assert drawn.logprob == pytest.approx(float(logits.log_softmax(-1)[0, 1]))


def test_rows_that_are_not_finite_are_told_apart() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    drawn = draw(logits, [new_draws(Sampling(temperature=t, seed=1), 0) for t in (0.0, 1.0, 1.0)])
    assert [d is None for d in drawn] == [False, True, True]


# ----------------------------------------------------------------------------------------- prefix cache


def row_cache(ids: list[int]) -> RowCache:
    cache = RowCache((1, 2, 1, 1), torch.float32, torch.device("cpu"))
    cache.reserve(max(1, len(ids)), [])
    cache.data[0, 0, 0, 0, : len(ids), 0] = torch.tensor(ids, dtype=torch.float32)
    return cache


sequences = st.lists(st.tuples(st.sampled_from("xy"), st.lists(st.integers(0, 1), max_size=5)), max_size=12)


@given(sequences, st.integers(0, 8))
def test_what_is_restored_is_what_was_stored_under_that_adapter(puts: list[tuple[str, list[int]]], blocks: int) -> None:
    prefix = PrefixCache(blocks * BLOCK)
    for key, marks in puts:
        offset = 0 if key == "x" else 10  # keys and values depend on the adapter
        ids = [mark for mark in marks for _ in range(BLOCK)]
        stored = row_cache([i + offset for i in ids])
        prefix.insert(key, ids, stored, 0)
        assert prefix.tokens <= blocks * BLOCK
        target = row_cache([99] * len(ids))
        found = prefix.restore(key, ids, target, 0)
        assert found == min(len(marks), blocks) * BLOCK
        assert torch.equal(target.data[0, 0, 0, :, :found], stored.data[0, 0, 0, :, :found])


def test_a_dropped_adapter_leaves_nothing_and_the_oldest_goes_first() -> None:
    prefix = PrefixCache(2 * BLOCK)
    ids = {key: [n] * BLOCK for n, key in enumerate("abc")}
    for key in "abc":
        prefix.insert(key, ids[key], row_cache(ids[key]), 0)
    assert [prefix.match(key, ids[key]) for key in "abc"] == [0, BLOCK, BLOCK]
    prefix.drop("b")
    assert (prefix.match("b", ids["b"]), prefix.tokens) == (0, BLOCK)


# ------------------------------------------------------------------------------------------------ slots

A, B = AdapterId("agent@1"), AdapterId("agent@2")


def test_an_unloaded_adapter_leaves_with_its_last_user() -> None:
    gone: list[AdapterId] = []
    pool = AdapterPool(1, gone.append)
    pool.publish(A, pool.reserve())
    pool.acquire(A)
    pool.unload(A)
    assert (pool.loaded(), gone) == (frozenset(), [])
    with pytest.raises(UnknownAdapterError):
        pool.acquire(A)
    with pytest.raises(AdapterError, match="in use"):
        pool.reserve()
    pool.release(A)
    assert gone == [A]
    pool.publish(B, pool.reserve())


def test_loading_again_takes_an_unload_back() -> None:
    pool = AdapterPool(1, lambda _: None)
    pool.publish(A, pool.reserve())
    slot = pool.acquire(A)
    pool.unload(A)
    assert pool.revive(A)
    pool.release(A)
    assert pool.acquire(A) == slot
    assert not pool.revive(B)


def test_the_base_needs_no_slot_and_never_goes() -> None:
    pool = AdapterPool(0, lambda _: None)
    base = AdapterId("any@0")
    assert pool.revive(base) and pool.loaded() == {base}
    assert pool.acquire(base) == 0
    pool.release(base)
    pool.unload(base)
    assert pool.acquire(base) == 0
