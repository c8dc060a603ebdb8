"""The search index against exhaustive search in float64, in whatever order keys come and go."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradatim.errors import MemoryKeyError, StoreError
from gradatim.memory.key_index import Floats, KeyIndex

WIDTH = 8


def unit(count: int, seed: int, width: int = WIDTH) -> Floats:
    x = np.random.default_rng(seed).standard_normal((count, width))
    keys: Floats = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return keys


def exhaustive(keys: Floats, alive: np.ndarray, queries: Floats, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and rows, (B, k), in float64 over the half-precision keys that an index keeps."""
    stored = keys.astype(np.float16).astype(np.float64)
    distances = np.square(queries.astype(np.float64)[:, None] - stored[None]).sum(2)
    distances[:, ~alive] = np.inf
    order = np.argsort(distances, 1, kind="stable")[:, :k]
    found = np.take_along_axis(distances, order, 1)
    rows = np.where(np.isinf(found), -1, order)
    short = k - rows.shape[1]
    return np.pad(found, ((0, 0), (0, short)), constant_values=np.inf), np.pad(
        rows, ((0, 0), (0, short)), constant_values=-1
    )


class Twin:
    """An index and all that it should hold."""

    def __init__(self, hot_rows: int, probes: int = 1000) -> None:
        self.index = KeyIndex(WIDTH, hot_rows=hot_rows, probes=probes, candidates=1000)  # approximates nothing
        self.keys: Floats = np.zeros((0, WIDTH), np.float32)
        self.alive = np.zeros(0, bool)

    def add(self, keys: Floats) -> None:
        rows = self.index.add(keys)
        assert rows == range(len(self.keys), len(self.keys) + len(keys))
        self.keys = np.concatenate([self.keys, keys])
        self.alive = np.concatenate([self.alive, np.ones(len(keys), bool)])

    def remove(self, rows: range) -> None:
        self.index.remove(rows)
        self.alive[rows.start : rows.stop] = False

    def check(self, k: int = 5, seed: int = 99) -> None:
        queries = unit(3, seed)
        distances, rows = self.index.search(queries, k)
        want, order = exhaustive(self.keys, self.alive, queries, k)
        np.testing.assert_allclose(distances, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(rows, order)
        np.testing.assert_array_equal(self.index.alive(), self.alive)
        assert self.index.removed == int((~self.alive).sum())


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 30)),
        st.tuples(st.just("remove"), st.integers(0, 100)),
        st.tuples(st.just("seal"), st.just(0)),
        st.tuples(st.just("reload"), st.just(0)),
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_any_order_of_adding_removing_sealing_and_reloading_finds_what_exhaustive_search_finds(
    steps: list[tuple[str, int]],
) -> None:
    twin = Twin(hot_rows=16)
    for at, (what, number) in enumerate(steps):
        if what == "add":
            twin.add(unit(number, at))
        elif what == "remove" and len(twin.keys):
            start = number % len(twin.keys)
            twin.remove(range(start, min(start + 7, len(twin.keys))))
        elif what == "seal":
            twin.index.seal()
        elif what == "reload":
            reloaded = KeyIndex(WIDTH, hot_rows=16, probes=1000, candidates=1000)
            reloaded.fill(twin.index.keys(), twin.index.alive())
            reloaded.restore([(s.start, s.end, s.to_bytes()) for s in twin.index.segments()])
            twin.index = reloaded
        twin.check()


def test_segments_stay_few_and_cover_all_sealed_rows() -> None:
    index = KeyIndex(WIDTH, hot_rows=50)
    for seed in range(32):
        index.add(unit(50, seed))
        assert index.full
        index.seal()
        segments = index.segments()
        assert [s.start for s in segments] == [0, *(s.end for s in segments[:-1])]
        assert index.sealed == index.rows and not index.full
        assert len(segments) <= 6  # a binary counter of 32 fillings


def test_approximate_search_finds_nearly_all_and_gives_exact_distances() -> None:
    centres = unit(60, 0, 64)
    keys = centres.repeat(80, 0) + 0.35 * unit(4800, 1, 64)
    queries = centres.repeat(2, 0) + 0.35 * unit(120, 2, 64)
    index = KeyIndex(64, hot_rows=1000)
    for start in range(0, len(keys), 1000):
        index.add(keys[start : start + 1000])
        index.seal()
    distances, rows = index.search(queries, 16)
    want, order = exhaustive(keys, np.ones(len(keys), bool), queries, 16)
    recall = np.mean([len(set(a) & set(b)) / 16 for a, b in zip(rows, order, strict=True)])
    assert recall >= 0.95
    exact = np.square(queries[:, None].astype(np.float64) - keys.astype(np.float16)[rows].astype(np.float64)).sum(2)
    np.testing.assert_allclose(distances, exact, rtol=1e-4)
    np.testing.assert_allclose(distances[rows == order], want[rows == order], rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
def test_keys_that_are_no_numbers_are_refused_whole(bad: float) -> None:
    index = KeyIndex(WIDTH)
    keys = unit(3, 0)
    keys[1, 2] = bad
    with pytest.raises(MemoryKeyError, match="NaN"):
        index.add(keys)
    assert index.rows == 0


def test_keys_of_another_width_are_refused() -> None:
    with pytest.raises(MemoryKeyError, match="width 8"):
        KeyIndex(WIDTH).add(unit(2, 0, 9))


def test_removed_keys_leave_the_index_and_its_segments() -> None:
    index = KeyIndex(WIDTH, hot_rows=64)
    index.add(unit(64, 0))
    index.seal()
    whole = index.segments()[0].index.ntotal
    index.remove(range(10, 20))
    assert not index.keys()[10:20].any()
    assert index.segments()[0].index.ntotal == whole - 10


@pytest.mark.parametrize("damage", ["cut", "foreign", "elsewhere", "too many"])
def test_segments_that_do_not_fit_are_refused_and_change_nothing(damage: str) -> None:
    twin = Twin(hot_rows=64)
    twin.add(unit(64, 0))
    twin.index.seal()
    (segment,) = twin.index.segments()
    start, end, data = segment.start, segment.end, segment.to_bytes()
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "foreign":
        other = KeyIndex(9, hot_rows=64)
        other.add(unit(64, 0, 9))
        other.seal()
        data = other.segments()[0].to_bytes()
    elif damage == "elsewhere":
        start = 1
    else:
        end = 63
    fresh = KeyIndex(WIDTH, hot_rows=64, candidates=1000)
    fresh.fill(twin.index.keys(), twin.index.alive())
    with pytest.raises(StoreError):
        fresh.restore([(start, end, data)])
    twin.index = fresh
    twin.check()


def test_searching_goes_on_while_a_segment_is_built() -> None:
    twin = Twin(hot_rows=3000)
    twin.add(unit(3000, 0))
    builder = threading.Thread(target=twin.index.seal)
    builder.start()
    for seed in range(20):
        twin.add(unit(3, 100 + seed))
        twin.remove(range(seed * 7, seed * 7 + 2))
        twin.check(seed=seed)
    builder.join()
    assert twin.index.sealed >= 3000
    twin.check()
