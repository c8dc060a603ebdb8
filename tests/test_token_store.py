"""What may be stored, what is found after any order of changes, and what is left on disk after any accident."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradatim.errors import ForeignMemoryError, MemoryKeyError, StoreError
from gradatim.memory.key_space import EachToken, KeySpace, late_layer
from gradatim.memory.knn_lm import KnnLm
from gradatim.memory.token_file import TRUTH_FILE
from gradatim.memory.token_store import TokenStore
from tests.token_memory import VOCABULARY, WIDTH, drawn, filled, model_says, open_gate, space, store_of, words

# ----------------------------------------------------------------------------------------------- the store

CHANGES = st.lists(
    st.tuples(st.sampled_from(["add", "revise", "forget", "seal"]), st.integers(0, 3), st.integers(0, 9)), max_size=16
)


@settings(max_examples=60, deadline=None)
@given(CHANGES)
def test_any_order_of_changes_equals_a_store_that_never_held_the_rest(changes: list[tuple[str, int, int]]) -> None:
    store, held = store_of(10), dict[str, list[tuple[Tensor, Tensor, int]]]()
    for at, (what, name, count) in enumerate(changes):
        source, hidden, tokens = f"s{name}", drawn(count, WIDTH, seed=at), words(count, at)
        if what == "add":
            store.add(source, hidden, tokens)
            held.setdefault(source, []).append((hidden, tokens, at))
        elif what == "revise":
            store.revise(source, hidden, tokens)
            held[source] = [(hidden, tokens, at)]
        elif what == "forget":
            assert store.forget(source) == sum(len(t) for _, t, _ in held.pop(source, []))
        else:
            store.index.seal()
    fresh = store_of()
    for _, source, hidden, tokens in sorted(
        ((at, s, h, t) for s, blocks in held.items() for h, t, at in blocks), key=lambda x: x[0]
    ):
        fresh.add(source, hidden, tokens)
    assert store.sources == fresh.sources and len(store) == len(fresh)
    queries, logprobs, knn = drawn(4, WIDTH, seed=500), model_says(4), KnnLm(open_gate().lambdas, k=6)
    got, want = (knn.mix(queries, logprobs, [s] * 4).on(logprobs) for s in (store, fresh))
    assert torch.equal(got, want)
    again = knn.mix(queries, logprobs, [store.compacted()] * 4).on(logprobs)
    assert torch.equal(again, want)


@pytest.mark.parametrize(
    ("hidden", "tokens", "match"),
    [
        (torch.full((1, WIDTH), float("nan")), [1], "NaN"),
        (torch.full((1, WIDTH), float("inf")), [1], "NaN"),
        (torch.zeros(1, WIDTH), [VOCABULARY], "vocabulary"),
        (torch.zeros(1, WIDTH), [-1], "vocabulary"),
        (torch.zeros(1, WIDTH + 1), [1], "width"),
        (torch.zeros(2, WIDTH), [1], "1 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused_and_revising_with_it_keeps_the_old(
    hidden: Tensor, tokens: list[int], match: str
) -> None:
    store = filled(5, seed=0)
    for change in (store.add, store.revise):
        with pytest.raises(MemoryKeyError, match=match):
            change("episode-0", hidden, torch.tensor(tokens))
    assert len(store) == 5 and store.sources == {"episode-0"}


def test_the_layer_is_the_measured_one() -> None:
    assert late_layer(30) == 28 and late_layer(2) == 2 and late_layer(1) == 1


# -------------------------------------------------------------------------------------------------- disk


def same_answers(a: TokenStore, b: TokenStore) -> None:
    queries, logprobs, knn = drawn(5, WIDTH, seed=500), model_says(5), KnnLm(open_gate().lambdas, k=6)
    got, want = (knn.mix(queries, logprobs, [s] * 5).on(logprobs) for s in (a, b))
    assert torch.equal(got, want)
    assert a.sources == b.sources and len(a) == len(b)


def busy_store() -> TokenStore:
    """Sealed, hot and removed rows."""
    store = filled(30, hot_rows=20)
    store.index.seal()
    store.add("two", drawn(9, WIDTH, seed=1), words(9, 1))
    store.add("two", drawn(3, WIDTH, seed=2), words(3, 2))
    store.add("three", drawn(4, WIDTH, seed=3), words(4, 3))
    store.forget("three")
    store.revise("episode-0", drawn(26, WIDTH, seed=4), words(26, 4))
    return store


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    store = busy_store()
    store.save(tmp_path)
    loaded = TokenStore.load(tmp_path, space(), VOCABULARY, hot_rows=20)
    same_answers(loaded, store)
    loaded.add("after", drawn(2, WIDTH, seed=8), words(2, 8))
    store.add("after", drawn(2, WIDTH, seed=8), words(2, 8))
    same_answers(loaded, store)


def test_an_empty_store_comes_back(tmp_path: Path) -> None:
    store_of().save(tmp_path)
    loaded = TokenStore.load(tmp_path, space(), VOCABULARY)
    assert len(loaded) == 0 and (loaded.search(drawn(1, WIDTH, seed=1), 3).rows == -1).all()


@pytest.mark.parametrize(
    "other",
    [space(base="b" * 64), space(layer=4), space(tokenizer="u" * 64)],
    ids=["base", "layer", "tokenizer"],
)
def test_a_memory_of_another_model_is_refused_with_both_digests(tmp_path: Path, other: KeySpace[EachToken]) -> None:
    filled().save(tmp_path)
    with pytest.raises(ForeignMemoryError) as refused:
        TokenStore.load(tmp_path, other, VOCABULARY)
    assert space().id[:12] in str(refused.value) and other.id[:12] in str(refused.value)


@pytest.mark.parametrize("damage", ["cut", "missing", "flipped", "foreign"])
def test_sealed_keys_that_are_unsound_are_refused(tmp_path: Path, damage: str) -> None:
    busy_store().save(tmp_path)
    (path,) = tmp_path.glob("*.faiss")
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-20])
    elif damage == "missing":
        path.unlink()
    elif damage == "flipped":
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 255]) + data[-19:])
    else:
        other = filled(25, seed=9, hot_rows=20)
        other.index.seal()
        other.save(tmp_path / "other")
        (theirs,) = (tmp_path / "other").glob("*.faiss")
        path.write_bytes(theirs.read_bytes())
    with pytest.raises(StoreError, match="no sound memory"):
        TokenStore.load(tmp_path, space(), VOCABULARY, hot_rows=20)


def test_sealed_keys_are_written_once_until_something_in_them_goes(tmp_path: Path) -> None:
    store = filled(30, hot_rows=20)
    store.add("person", drawn(5, WIDTH, seed=6), words(5, 6))
    store.index.seal()
    store.save(tmp_path)
    (path,) = tmp_path.glob("*.faiss")
    before = path.stat().st_ino
    store.add("later", drawn(4, WIDTH, seed=7), words(4, 7))
    store.save(tmp_path)
    assert [p.stat().st_ino for p in tmp_path.glob("*.faiss")] == [before]
    loaded = TokenStore.load(tmp_path, space(), VOCABULARY, hot_rows=20)
    loaded.save(tmp_path)
    assert [p.stat().st_ino for p in tmp_path.glob("*.faiss")] == [before]
    store.forget("person")
    store.save(tmp_path)
    (left,) = tmp_path.glob("*.faiss")
    assert left != path
    same_answers(TokenStore.load(tmp_path, space(), VOCABULARY, hot_rows=20), store)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "missing", "not ours"])
def test_damaged_data_is_refused(tmp_path: Path, damage: str) -> None:
    filled().save(tmp_path)
    path = tmp_path / TRUTH_FILE
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "cut": data[:-9],
                "flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
                "empty": b"",
                "not ours": json.dumps({}).encode(),
            }[damage]
        )
    with pytest.raises(StoreError, match="no sound memory"):
        TokenStore.load(tmp_path, space(), VOCABULARY)


@pytest.mark.parametrize("sealed", [False, True])
def test_what_was_forgotten_is_not_written(tmp_path: Path, sealed: bool) -> None:
    store = store_of(4)
    secret = drawn(6, WIDTH, seed=1)
    store.add("person", secret, words(6, 1))
    if sealed:
        store.index.seal()
    store.save(tmp_path)
    key = store.index.codec.encode(store.space.pooling.keys(secret))[2].tobytes()
    assert key in all_bytes(tmp_path)
    store.forget("person")
    store.save(tmp_path)
    assert key not in all_bytes(tmp_path) and b"person" not in all_bytes(tmp_path)


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


def test_a_disk_that_refuses_is_named_and_the_old_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled()
    store.save(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store.add("more", drawn(2, WIDTH, seed=3), words(2, 3))
    with pytest.raises(StoreError, match="No space left"):
        store.save(tmp_path)
    monkeypatch.undo()
    assert len(store) == 42 and len(TokenStore.load(tmp_path, space(), VOCABULARY)) == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == [TRUTH_FILE]


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.token_memory import WIDTH, drawn, filled, words
store, at, calls = filled(), int(sys.argv[2]), []
replace = os.replace
store.add("more", drawn(7, WIDTH, seed=3), words(7, 3))
store.index.seal()
def stop(source, target):
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(target)
    replace(source, target)
os.replace = stop
store.save(Path(sys.argv[1]))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("at", "entries"), [(0, 40), (1, 40), (2, 47)])
def test_a_kill_between_writing_and_renaming_leaves_the_old_or_the_new(tmp_path: Path, at: int, entries: int) -> None:
    filled().save(tmp_path)
    here = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path), str(at), here], check=False)
    assert done.returncode == -signal.SIGKILL
    loaded = TokenStore.load(tmp_path, space(), VOCABULARY)
    assert len(loaded) == entries
    loaded.save(tmp_path)
    assert len(TokenStore.load(tmp_path, space(), VOCABULARY)) == entries
