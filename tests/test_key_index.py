"""The search index against exhaustive search in float64, in whatever order keys come and go."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradatim.errors import MemoryKeyError, StoreError
from gradatim.memory.key_index import KeyIndex
from gradatim.memory.segments import Floats

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
        self.owners: list[str] = []  # of each row; empty for one that was removed

    @property
    def alive(self) -> np.ndarray:
        return np.array([bool(owner) for owner in self.owners], bool)

    def _append(self, name: str, rows: range, keys: Floats) -> None:
        assert rows == range(len(self.keys), len(self.keys) + len(keys))
        self.keys = np.concatenate([self.keys, keys])
        self.owners += [name] * len(keys)

    def _clear(self, name: str, gone: list[range]) -> None:
        assert sorted(i for rows in gone for i in rows) == [i for i, o in enumerate(self.owners) if o == name]
        self.owners = ["" if owner == name else owner for owner in self.owners]

    def add(self, name: str, keys: Floats) -> None:
        self._append(name, self.index.add(name, keys), keys)

    def replace(self, name: str, keys: Floats) -> None:
        rows, gone = self.index.replace(name, keys)
        self._clear(name, gone)
        self._append(name, rows, keys)

    def remove(self, name: str) -> None:
        self._clear(name, self.index.remove(name))

    def reload(self) -> None:
        reloaded = KeyIndex(WIDTH, hot_rows=16, probes=1000, candidates=1000)
        reloaded.fill(self.index.keys(), self.index.spans())
        reloaded.restore([(s.start, s.end, s.to_bytes()) for s in self.index.segments()])
        self.index = reloaded

    def compact(self) -> None:
        self.index, alive = self.index.compacted(), self.alive
        self.keys, self.owners = self.keys[alive], [owner for owner in self.owners if owner]

    def check(self, k: int = 5, seed: int = 99) -> None:
        queries, alive = unit(3, seed), self.alive
        distances, rows = self.index.search(queries, k)
        want, order = exhaustive(self.keys, alive, queries, k)
        np.testing.assert_allclose(distances, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(rows, order)
        np.testing.assert_array_equal(self.index.alive(), alive)
        assert (len(self.index), self.index.removed) == (int(alive.sum()), int((~alive).sum()))
        assert [self.index.name_of(row) or "" for row in range(len(alive))] == self.owners
        assert self.index.name_of(-1) is self.index.name_of(len(alive)) is None
        for name in set(self.owners) - {""}:
            mine = np.array([owner == name for owner in self.owners])
            np.testing.assert_array_equal(self.index.of(name), self.keys[mine].astype(np.float16).astype(np.float32))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "replace"]), st.integers(0, 5), st.integers(0, 30)),
        st.tuples(st.just("remove"), st.integers(0, 5), st.just(0)),
        st.tuples(st.sampled_from(["seal", "reload", "compact"]), st.just(0), st.just(0)),
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_any_order_of_changes_finds_what_exhaustive_search_finds(steps: list[tuple[str, int, int]]) -> None:
    twin = Twin(hot_rows=16)
    for at, (what, name, count) in enumerate(steps):
        if what in ("add", "replace"):
            getattr(twin, what)(f"n{name}", unit(count, at))
        elif what == "remove":
            twin.remove(f"n{name}")
        elif what == "seal":
            twin.index.seal()
        else:
            getattr(twin, what)()
        twin.check()


def test_the_nearest_names_and_their_cosines_are_those_of_a_float64_scan() -> None:
    index, keys = KeyIndex(WIDTH), unit(200, 0)
    for n, key in enumerate(keys):
        index.add(f"s{n}", key[None])
    index.remove("s7")
    query = keys[7]
    cosines = {f"s{n}": float(key.astype(np.float64) @ query) for n, key in enumerate(keys) if n != 7}
    want = sorted(cosines, key=lambda name: -cosines[name])[:20]
    found = index.near(query, 20)
    assert [name for name, _ in found] == want
    assert [cosine for _, cosine in found] == pytest.approx([cosines[name] for name in want], abs=2e-3)
    assert index.near(query, 20, floor=cosines[want[4]] - 2e-3)[-1][0] in want[4:6]
    assert KeyIndex(WIDTH).near(query, 3) == []


def test_a_compacted_one_stands_for_the_old_unless_that_was_added_to() -> None:
    index = KeyIndex(WIDTH)
    for n in range(40):
        index.add(f"s{n}", unit(2, n))
    for n in range(0, 40, 2):
        index.remove(f"s{n}")
    rows, fresh = index.rows, index.compacted()
    assert (fresh.rows, fresh.removed, len(fresh)) == (40, 0, 40)
    index.remove("s1")  # meanwhile
    assert fresh.stands_for(index, rows) and "s1" not in fresh and len(fresh) == len(index) == 38
    rows, fresh = index.rows, index.compacted()
    index.replace("s3", unit(2, 99))
    assert not fresh.stands_for(index, rows)


def test_segments_stay_few_and_cover_all_sealed_rows() -> None:
    index = KeyIndex(WIDTH, hot_rows=50)
    for seed in range(32):
        index.add(str(seed), unit(50, seed))
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
        index.add("text", keys[start : start + 1000])
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
        index.add("x", keys)
    index.add("x", unit(1, 1))
    with pytest.raises(MemoryKeyError, match="NaN"):
        index.replace("x", keys)
    assert len(index) == index.rows == 1


def test_keys_of_another_width_are_refused() -> None:
    with pytest.raises(MemoryKeyError, match="width 8"):
        KeyIndex(WIDTH).add("x", unit(2, 0, 9))


def test_removed_keys_leave_the_index_and_its_segments() -> None:
    index = KeyIndex(WIDTH, hot_rows=64)
    for name, count in (("a", 10), ("gone", 10), ("b", 44)):
        index.add(name, unit(count, 0))
    index.seal()
    whole = index.segments()[0].index.ntotal
    index.add("hot", unit(3, 1))
    index.remove("gone")
    index.remove("hot")
    assert not index.keys()[10:20].any() and not index._hot[:3].any()
    assert index.segments()[0].index.ntotal == whole - 10


@pytest.mark.parametrize("damage", ["cut", "foreign", "elsewhere", "too many"])
def test_segments_that_do_not_fit_are_refused_and_change_nothing(damage: str) -> None:
    twin = Twin(hot_rows=64)
    twin.add("x", unit(64, 0))
    twin.index.seal()
    (segment,) = twin.index.segments()
    start, end, data = segment.start, segment.end, segment.to_bytes()
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "foreign":
        other = KeyIndex(9, hot_rows=64)
        other.add("x", unit(64, 0, 9))
        other.seal()
        data = other.segments()[0].to_bytes()
    elif damage == "elsewhere":
        start = 1
    else:
        end = 63
    fresh = KeyIndex(WIDTH, hot_rows=64, candidates=1000)
    fresh.fill(twin.index.keys(), twin.index.spans())
    with pytest.raises(StoreError):
        fresh.restore([(start, end, data)])
    twin.index = fresh
    twin.check()


def test_searching_goes_on_while_a_segment_is_built() -> None:
    twin = Twin(hot_rows=3000)
    for n in range(300):
        twin.add(f"s{n}", unit(10, 1000 + n))
    builder = threading.Thread(target=twin.index.seal)
    builder.start()
    for seed in range(20):
        twin.add(f"later {seed}", unit(3, 100 + seed))
        twin.remove(f"s{7 * seed}")
        twin.check(seed=seed)
    builder.join()
    assert twin.index.sealed >= 3000
    twin.check()
