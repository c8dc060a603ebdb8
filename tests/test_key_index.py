"""The search index against exhaustive search in float64, in whatever order keys come and go."""

from __future__ import annotations

import threading
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradatim.errors import MemoryKeyError, StoreError
from gradatim.memory import segments
from gradatim.memory.codec import Codec, Floats, halves, nibbles
from gradatim.memory.key_index import KeyIndex

WIDTH = 8


def unit(count: int, seed: int, width: int = WIDTH) -> Floats:
    x = np.random.default_rng(seed).standard_normal((count, width))
    keys: Floats = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return keys


def exhaustive(keys: Floats, alive: np.ndarray, queries: Floats, k: int, codec: Codec) -> tuple[np.ndarray, np.ndarray]:
    """Distances and rows, (B, k), in float64 over what an index keeps of the keys."""
    stored = codec.decode(codec.encode(keys)).astype(np.float64)
    distances = np.square(codec.seen(queries).astype(np.float64)[:, None] - stored[None]).sum(2)
    distances[:, ~alive] = np.inf
    order = np.argsort(distances, 1, kind="stable")[:, :k]
    found = np.take_along_axis(distances, order, 1)
    rows = np.where(np.isinf(found), -1, order)
    short = k - rows.shape[1]
    return np.pad(found, ((0, 0), (0, short)), constant_values=np.inf), np.pad(
        rows, ((0, 0), (0, short)), constant_values=-1
    )


def compacted(index: KeyIndex) -> KeyIndex:
    with index.still():
        return index.compacted(index.held())


class Twin:
    """An index and all that it should hold."""

    def __init__(self, hot_rows: int, codec: Codec | None = None) -> None:
        self.codec = codec or halves(WIDTH)
        self.index = KeyIndex(WIDTH, self.codec, hot_rows=hot_rows, whole_rows=10**6)  # approximates nothing
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
        held = self.index.held()
        self.index = KeyIndex(WIDTH, self.codec, hot_rows=16, whole_rows=10**6)
        self.index.fill(held.segments, held.codes, held.spans)

    def compact(self) -> None:
        self.index, alive = compacted(self.index), self.alive
        self.keys, self.owners = self.keys[alive], [owner for owner in self.owners if owner]

    def check(self, k: int = 5, seed: int = 99) -> None:
        queries, alive = unit(3, seed), self.alive
        distances, rows = self.index.search(queries, k)
        want, order = exhaustive(self.keys, alive, queries, k, self.codec)
        np.testing.assert_allclose(distances, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(rows, order)
        np.testing.assert_array_equal(self.index.alive(), alive)
        assert (len(self.index), self.index.removed) == (int(alive.sum()), int((~alive).sum()))
        assert [self.index.name_of(row) or "" for row in range(len(alive))] == self.owners
        assert self.index.name_of(-1) is self.index.name_of(len(alive)) is None
        for name in set(self.owners) - {""}:
            mine = np.array([owner == name for owner in self.owners])
            np.testing.assert_array_equal(self.index.of(name), self.codec.decode(self.codec.encode(self.keys[mine])))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "replace"]), st.integers(0, 5), st.integers(0, 30)),
        st.tuples(st.just("remove"), st.integers(0, 5), st.just(0)),
        st.tuples(st.sampled_from(["seal", "reload", "compact"]), st.just(0), st.just(0)),
    ),
    max_size=14,
)


@settings(max_examples=100, deadline=None)
@given(STEPS, st.sampled_from([halves(WIDTH), nibbles(np.eye(WIDTH, dtype=np.float32))]))
def test_any_order_of_changes_finds_what_exhaustive_search_finds(
    steps: list[tuple[str, int, int]], codec: Codec
) -> None:
    twin = Twin(16, codec)
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
    rows, fresh = index.rows, compacted(index)
    assert (fresh.rows, fresh.removed, len(fresh)) == (40, 0, 40)
    index.remove("s1")  # meanwhile
    assert fresh.stands_for(index, rows) and "s1" not in fresh and len(fresh) == len(index) == 38
    rows, fresh = index.rows, compacted(index)
    index.replace("s3", unit(2, 99))
    assert not fresh.stands_for(index, rows)


def test_segments_stay_few_and_cover_all_sealed_rows() -> None:
    index = KeyIndex(WIDTH, hot_rows=50)
    for seed in range(32):
        index.add(str(seed), unit(50, seed))
        assert index.full
        index.seal()
        parts = index.held().segments
        assert [s.start for s in parts] == [0, *(s.end for s in parts[:-1])]
        assert index.sealed == index.rows and not index.full
        assert len(parts) <= 6  # a binary counter of 32 fillings


@pytest.mark.parametrize("codec", [halves(64), nibbles(np.eye(64, dtype=np.float32))], ids=["halves", "nibbles"])
def test_approximate_search_finds_nearly_all_and_gives_exact_distances(codec: Codec) -> None:
    centres = unit(60, 0, 64)
    keys = centres.repeat(80, 0) + 0.35 * unit(4800, 1, 64)
    queries = centres.repeat(2, 0) + 0.35 * unit(120, 2, 64)
    index = KeyIndex(64, codec, hot_rows=1000)
    for start in range(0, len(keys), 1000):
        index.add("text", keys[start : start + 1000])
        index.seal()
    distances, rows = index.search(queries, 16)
    want, order = exhaustive(keys, np.ones(len(keys), bool), queries, 16, codec)
    recall = np.mean([len(set(a) & set(b)) / 16 for a, b in zip(rows, order, strict=True)])
    assert recall >= 0.95
    kept = codec.decode(codec.encode(keys)).astype(np.float64)
    exact = np.square(codec.seen(queries)[:, None] - kept[rows]).sum(2)
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


@pytest.mark.parametrize("codec", [halves(64), nibbles(np.eye(576, dtype=np.float32))])
def test_a_distance_is_the_same_to_the_bit_sealed_or_not(codec: Codec) -> None:
    """Where a key lies must not decide between near ones."""
    keys, queries = unit(300, 0, codec.width), unit(20, 1, codec.width)
    hot, sealed = (KeyIndex(codec.width, codec, whole_rows=10**6) for _ in range(2))
    for index in (hot, sealed):
        for at in range(0, 300, 30):
            index.add(f"n{at}", keys[at : at + 30])
    sealed.seal()
    for got, want in zip(sealed.search(queries, 50), hot.search(queries, 50), strict=True):
        np.testing.assert_array_equal(got, want)


def test_removed_keys_leave_the_index_and_its_segments() -> None:
    index = KeyIndex(WIDTH, hot_rows=64)
    for seed, (name, count) in enumerate((("a", 10), ("gone", 10), ("b", 44))):
        index.add(name, unit(count, seed))
    index.seal()
    secret = index.of("gone")
    index.add("hot", unit(3, 9))
    index.remove("gone")
    index.remove("hot")
    assert (index._hot_codes()[:3] == index.codec.far).all()
    (segment,) = index.held().segments
    assert (segment.codes[10:20] == index.codec.far).all()
    assert not {key.tobytes() for key in index.codec.decode(segment.codes)} & {key.tobytes() for key in secret}


@pytest.mark.parametrize("damage", ["elsewhere", "other kind", "two names", "beyond"])
def test_parts_that_do_not_fit_are_refused_and_change_nothing(damage: str) -> None:
    twin = Twin(hot_rows=64)
    twin.add("x", unit(64, 0))
    twin.index.seal()
    held = twin.index.held()
    (segment,) = held.segments
    codes, spans = held.codes, dict(held.spans)
    if damage == "elsewhere":
        segment = segments.built(1, twin.codec, segment.codes[1:], np.ones(63, bool))
    elif damage == "other kind":
        codes = np.zeros((0, 3), np.uint8)
    elif damage == "two names":
        spans["y"] = [(3, 5)]
    else:
        spans["y"] = [(64, 66)]
    fresh = KeyIndex(WIDTH, twin.codec, hot_rows=64)
    with pytest.raises(StoreError):
        fresh.fill([segment], codes, spans)
    assert len(fresh) == fresh.rows == fresh.sealed == 0
    fresh.fill(held.segments, held.codes, held.spans)
    twin.index = fresh
    twin.check()


def test_a_segment_is_read_as_it_was_written_and_nothing_else_is(tmp_path: Path) -> None:
    codec = nibbles(np.eye(32, dtype=np.float32))
    index = KeyIndex(32, codec)
    index.add("x", unit(300, 0, 32))
    index.seal()
    (segment,) = index.held().segments
    path = tmp_path / "segment"
    digest = segment.write(path)
    again = segments.Segment.read(0, 300, codec, path, digest)
    assert segment.file_sha256 == again.file_sha256 == digest
    np.testing.assert_array_equal(segment.codes, again.codes)
    for other in (halves(32), nibbles(np.eye(40, dtype=np.float32))):
        with pytest.raises(StoreError, match="another kind"):
            segments.Segment.read(0, 300, other, path, digest)
    with pytest.raises(StoreError, match="between 0 and 200"):
        segments.Segment.read(0, 200, codec, path, digest)
    again.erase(np.arange(7, 8))
    assert again.file_sha256 == ""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="not those that were written"):
        segments.Segment.read(0, 300, codec, path, digest)
    path.write_bytes(b"not one")
    with pytest.raises(StoreError, match="no sound memory"):
        segments.Segment.read(0, 300, codec, path, segments.sha256_of(path))
    with pytest.raises(OSError, match="No such file"):
        segment.write(tmp_path / "nowhere" / "segment")


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


ROUGH = 4000  # rows of a segment that has a rough copy


def rough(codec: Codec, seed: int = 0) -> tuple[KeyIndex, Floats]:
    keys = unit(40, seed, codec.width).repeat(ROUGH // 40, 0) + 0.3 * unit(ROUGH, seed + 1, codec.width)
    index = KeyIndex(codec.width, codec)
    for at in range(0, ROUGH, 50):
        index.add(f"n{at}", keys[at : at + 50])
    index.seal()
    return index, keys


@pytest.mark.parametrize(
    "codec", [halves(64), nibbles(np.eye(96, dtype=np.float32)), nibbles(np.eye(9, dtype=np.float32))]
)
def test_what_is_erased_from_a_rough_copy_is_in_no_code(codec: Codec, tmp_path: Path) -> None:
    """Wherever faiss packs it: the rough code of an erased row is that of what is far from everything."""
    index, keys = rough(codec)
    (segment,) = index.held().segments
    lists = segment._rough
    assert lists is not None
    index.remove("n500")
    codes: dict[int, bytes] = {}
    inverted = lists._lists
    for which in range(lists._file.nlist):
        ids, size = lists._ids(which), inverted.block_size
        packed = faiss.rev_swig_ptr(inverted.get_codes(which), -(-len(ids) // 32) * size).reshape(-1, size)
        codes |= {row: inverted.packer.unpack_1(packed, at).tobytes() for at, row in enumerate(ids.tolist())}
    assert len(codes) == ROUGH
    gone = {codes[row] for row in range(500, 550)}
    assert gone == {lists._far().tobytes()}
    assert not gone & {code for row, code in codes.items() if not 500 <= row < 550}
    _, rows = index.search(keys[500:550], 16)
    assert not ((rows >= 500) & (rows < 550)).any()
    digest = segment.write(tmp_path / "segment")
    again = segments.Segment.read(0, ROUGH, codec, tmp_path / "segment", digest)
    for ours, theirs in zip(
        segment.search(codec.seen(keys[:9]), 7), again.search(codec.seen(keys[:9]), 7), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(StoreError, match="between 0 and 3000"):
        segments.Segment.read(0, 3000, codec, tmp_path / "segment", digest)


def test_a_compacted_rough_copy_holds_what_is_left_and_finds_it() -> None:
    index, keys = rough(nibbles(np.eye(96, dtype=np.float32)))
    for at in range(0, 1600, 50):
        index.remove(f"n{at}")
    fresh = compacted(index)
    assert fresh.rows == len(fresh) == ROUGH - 1600
    distances, rows = fresh.search(keys[1600::100], 1)
    assert rows[:, 0].tolist() == list(range(0, ROUGH - 1600, 100))
    np.testing.assert_allclose(distances, index.search(keys[1600::100], 1)[0])


def test_rows_removed_before_they_are_sealed_are_in_no_rough_copy() -> None:
    index = KeyIndex(32, nibbles(np.eye(32, dtype=np.float32)))
    for at in range(0, ROUGH, 50):
        index.add(f"n{at}", unit(50, at, 32))
    for at in range(0, 500, 50):
        index.remove(f"n{at}")
    index.seal()
    (segment,) = index.held().segments
    assert segment._rough is not None and segment._rough._file.ntotal == ROUGH - 500
    segment.erase(np.arange(400, 450))  # nothing is left of them to erase
    assert index.search(unit(50, 500, 32), 1)[1][:, 0].tolist() == list(range(500, 550))
