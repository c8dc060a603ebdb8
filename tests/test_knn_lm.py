"""Token memory: the mixture against float64, what may be stored, what is found after any order of changes, and disk."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradatim.errors import ForeignMemoryError, MemoryKeyError, StoreError
from gradatim.memory.key_space import KeySpace, key_space, late_layer
from gradatim.memory.knn_gate import TEMPERATURE, Cases, Gate, load_gate, save_gate, train_gate
from gradatim.memory.knn_lm import LEAST_LAMBDA, SMALL_STORE_CAP, KnnLm, Mixed
from gradatim.memory.token_file import INDEX_FILE, TRUTH_FILE
from gradatim.memory.token_store import TokenStore

WIDTH, VOCABULARY = 12, 31


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def space(base: str = "a" * 64, layer: int = 3, vocabulary: int = VOCABULARY) -> KeySpace:
    return key_space(base, layer, vocabulary, 3 * drawn(200, WIDTH, seed=7) + 1)


def words(count: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def filled(count: int = 40, seed: int = 0, hot_rows: int = 20_000) -> TokenStore:
    store = TokenStore(space(), hot_rows=hot_rows)
    store.add(f"episode-{seed}", drawn(count, WIDTH, seed=seed), words(count, seed))
    return store


def model_says(rows: int, seed: int = 5, sharp: float = 1.0) -> Tensor:
    return torch.log_softmax(sharp * drawn(rows, VOCABULARY, seed=seed), 1)


def open_gate(bias: float = 0.0) -> Gate:
    gate = Gate().requires_grad_(False)
    gate.outer_bias.fill_(bias)
    return gate


def reference(store: TokenStore, hidden: Tensor, logprobs: Tensor, lambdas: Tensor, k: int) -> np.ndarray:
    """Equations 2 and 3 of arXiv:1911.00172 written down, float64, over the keys as they are stored."""
    stored = [(key, token) for _, keys, tokens in store.entries() for key, token in zip(keys, tokens, strict=True)]
    keys = np.array([key for key, _ in stored], np.float64)
    queries = store.space.keys(hidden).astype(np.float64)
    out: np.ndarray = np.exp(logprobs.double().numpy())
    for row, (query, share) in enumerate(zip(queries, lambdas.double().tolist(), strict=True)):
        distances = np.square(keys - query).sum(1)
        nearest = np.argsort(distances, kind="stable")[:k]
        weights = np.exp(-distances[nearest] / TEMPERATURE)
        weights /= weights.sum()
        out[row] *= 1 - share
        for index, weight in zip(nearest, weights, strict=True):
            out[row, stored[index][1]] += share * weight
    return out


# ------------------------------------------------------------------------------------------- the mixture


@pytest.mark.parametrize("entries", [3, 40])
def test_the_mixture_is_the_papers(entries: int) -> None:
    store, hidden, logprobs = filled(entries), drawn(6, WIDTH, seed=1), model_says(6)
    mixed = KnnLm(open_gate(), k=8).mix(hidden, logprobs, [store] * 6)
    assert bool(mixed.searched.all()) and bool((mixed.lambdas > 0.05).all())
    want = reference(store, hidden, logprobs, mixed.lambdas, 8)
    np.testing.assert_allclose(mixed.logprobs.exp().double().numpy(), want, rtol=2e-5, atol=1e-8)
    torch.testing.assert_close(mixed.weights.sum(1), torch.ones(6))
    assert bool((mixed.rows[:, 0] >= 0).all())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(0, 60), st.floats(-4, 6), st.floats(0.1, 8), st.integers(0, 1000), st.integers(1, 9)
)
def test_it_sums_to_one(rows: int, entries: int, bias: float, sharp: float, seed: int, k: int) -> None:
    store = filled(entries, seed)
    mixed = KnnLm(open_gate(bias), k=k).mix(
        drawn(rows, WIDTH, seed=seed), model_says(rows, seed, sharp), [store] * rows
    )
    torch.testing.assert_close(mixed.logprobs.exp().sum(1), torch.ones(rows), rtol=1e-5, atol=1e-5)


def test_as_nats_on_a_few_tokens_it_is_the_same_mixture() -> None:
    hidden, logprobs = drawn(5, WIDTH, seed=1), model_says(5).clone()
    logprobs[4] = torch.log_softmax(logprobs[4].index_fill(0, torch.arange(10), -torch.inf), 0)
    stores = [filled(seed=0), None, filled(seed=1), TokenStore(space()), filled(seed=2)]
    knn = KnnLm(open_gate(), k=8)
    shifts, mixed = knn.shifts(hidden, logprobs, stores), knn.mix(hidden, logprobs, stores)
    assert [bool(s) for s in shifts] == [True, False, True, False, True]
    for row, shift in enumerate(shifts[:4]):
        moved = logprobs[row].double()
        for token, nats in shift.items():
            assert nats > 0
            moved[token] += nats
        torch.testing.assert_close(torch.log_softmax(moved, 0).float(), mixed.logprobs[row], rtol=1e-5, atol=1e-5)
    assert all(token >= 10 for token in shifts[4])


def test_tenants_of_one_batch_do_not_see_each_other() -> None:
    hidden, logprobs = drawn(6, WIDTH, seed=1), model_says(6)
    a, b = filled(seed=0), filled(seed=1)
    knn = KnnLm(open_gate(), k=8)
    together = knn.mix(hidden, logprobs, [a, None, b, a, b, None])
    for row, store in enumerate([a, None, b, a, b, None]):
        alone = knn.mix(hidden[row : row + 1], logprobs[row : row + 1], [store])
        torch.testing.assert_close(together.logprobs[row], alone.logprobs[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together.lambdas[row], alone.lambdas[0], rtol=1e-5, atol=1e-6)


def test_without_memory_the_models_bits_come_back() -> None:
    hidden, logprobs = drawn(4, WIDTH, seed=1), model_says(4)
    knn = KnnLm(open_gate())
    for stores in ([None] * 4, [TokenStore(space())] * 4):
        mixed = knn.mix(hidden, logprobs, stores)
        assert mixed.logprobs is logprobs and not mixed.searched.any() and not mixed.lambdas.any()


def test_a_closed_gate_gives_the_models_bits_back() -> None:
    hidden, logprobs = drawn(4, WIDTH, seed=1), model_says(4)
    mixed = KnnLm(open_gate(-20.0)).mix(hidden, logprobs, [filled()] * 4)
    assert bool(mixed.searched.all()) and mixed.logprobs is logprobs and not mixed.lambdas.any()


def test_rows_beside_a_mixed_one_keep_their_bits_and_the_input_is_not_written_to() -> None:
    hidden, logprobs = drawn(3, WIDTH, seed=1), model_says(3)
    before = logprobs.clone()
    mixed = KnnLm(open_gate()).mix(hidden, logprobs, [None, filled(), None])
    assert torch.equal(logprobs, before)
    assert torch.equal(mixed.logprobs[[0, 2]], before[[0, 2]]) and not torch.equal(mixed.logprobs[1], before[1])


def test_nothing_is_looked_up_where_the_model_is_sure_or_broken() -> None:
    logprobs = model_says(3).clone()
    logprobs[0] = torch.log_softmax(torch.eye(VOCABULARY)[4] * 20, 0)
    hidden = drawn(3, WIDTH, seed=1)
    hidden[1, 0] = float("nan")
    mixed = KnnLm(open_gate()).mix(hidden, logprobs, [filled()] * 3)
    assert mixed.searched.tolist() == [False, False, True]
    assert torch.equal(mixed.logprobs[:2], logprobs[:2])
    broken = torch.full((1, VOCABULARY), float("nan"))
    assert not KnnLm(open_gate()).mix(hidden[2:], broken, [filled()]).searched.any()


def test_a_small_store_has_a_small_say() -> None:
    mixed = KnnLm(open_gate(20.0)).mix(drawn(4, WIDTH, seed=1), model_says(4), [filled()] * 4)
    torch.testing.assert_close(mixed.lambdas, torch.full((4,), SMALL_STORE_CAP))


def test_what_was_said_in_this_very_state_becomes_likely() -> None:
    store, hidden = TokenStore(space()), drawn(1, WIDTH, seed=3)
    store.add("correction", hidden, torch.tensor([17]))
    logprobs = model_says(1)
    mixed = KnnLm(open_gate(20.0)).mix(hidden, logprobs, [store])
    assert math.isclose(
        float(mixed.logprobs[0, 17].exp()), SMALL_STORE_CAP + 0.75 * float(logprobs[0, 17].exp()), rel_tol=1e-5
    )


# ----------------------------------------------------------------------------------------------- the store

CHANGES = st.lists(
    st.tuples(st.sampled_from(["add", "revise", "forget", "seal"]), st.integers(0, 3), st.integers(0, 9)), max_size=16
)


@settings(max_examples=60, deadline=None)
@given(CHANGES)
def test_any_order_of_changes_equals_a_store_that_never_held_the_rest(changes: list[tuple[str, int, int]]) -> None:
    store, held = TokenStore(space(), hot_rows=10), dict[str, list[tuple[Tensor, Tensor, int]]]()
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
            store.seal()
    fresh = TokenStore(space())
    for _, source, hidden, tokens in sorted(
        ((at, s, h, t) for s, blocks in held.items() for h, t, at in blocks), key=lambda x: x[0]
    ):
        fresh.add(source, hidden, tokens)
    assert store.sources == fresh.sources and len(store) == len(fresh)
    queries, logprobs, knn = drawn(4, WIDTH, seed=500), model_says(4), KnnLm(open_gate(), k=6)
    got, want = (knn.mix(queries, logprobs, [s] * 4).logprobs for s in (store, fresh))
    assert torch.equal(got, want)
    again = knn.mix(queries, logprobs, [store.compacted()] * 4).logprobs
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


def test_rows_name_their_source_until_it_is_forgotten() -> None:
    store = filled(5, seed=0)
    store.add("other", drawn(2, WIDTH, seed=9), words(2, 9))
    assert [store.source_of(r) for r in (0, 4, 5, 6, 7)] == ["episode-0", "episode-0", "other", "other", None]
    store.forget("other")
    assert store.source_of(5) is None


def test_the_layer_is_the_measured_one() -> None:
    assert late_layer(30) == 28 and late_layer(2) == 2 and late_layer(1) == 1


# -------------------------------------------------------------------------------------------------- disk


def same_answers(a: TokenStore, b: TokenStore) -> None:
    queries, logprobs, knn = drawn(5, WIDTH, seed=500), model_says(5), KnnLm(open_gate(), k=6)
    got, want = (knn.mix(queries, logprobs, [s] * 5).logprobs for s in (a, b))
    assert torch.equal(got, want)
    assert a.sources == b.sources and len(a) == len(b)


def busy_store() -> TokenStore:
    """Sealed, hot and removed rows."""
    store = filled(30, hot_rows=20)
    store.seal()
    store.add("two", drawn(9, WIDTH, seed=1), words(9, 1))
    store.add("two", drawn(3, WIDTH, seed=2), words(3, 2))
    store.add("three", drawn(4, WIDTH, seed=3), words(4, 3))
    store.forget("three")
    store.revise("episode-0", drawn(26, WIDTH, seed=4), words(26, 4))
    return store


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    store = busy_store()
    store.save(tmp_path)
    loaded = TokenStore.load(tmp_path, space(), hot_rows=20)
    same_answers(loaded, store)
    loaded.add("after", drawn(2, WIDTH, seed=8), words(2, 8))
    store.add("after", drawn(2, WIDTH, seed=8), words(2, 8))
    same_answers(loaded, store)


def test_an_empty_store_comes_back(tmp_path: Path) -> None:
    TokenStore(space()).save(tmp_path)
    assert len(TokenStore.load(tmp_path, space())) == 0


@pytest.mark.parametrize(
    "other",
    [space(base="b" * 64), space(layer=4), space(vocabulary=VOCABULARY + 1)],
    ids=["base", "layer", "tokenizer"],
)
def test_a_memory_of_another_model_is_refused_with_both_digests(tmp_path: Path, other: KeySpace) -> None:
    filled().save(tmp_path)
    with pytest.raises(ForeignMemoryError) as refused:
        TokenStore.load(tmp_path, other)
    assert space().digest[:12] in str(refused.value) and other.digest[:12] in str(refused.value)


@pytest.mark.parametrize("damage", ["cut", "missing", "flipped", "foreign"])
def test_an_unsound_index_is_built_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store = busy_store()
    store.save(tmp_path)
    path = tmp_path / INDEX_FILE
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-20])
    elif damage == "missing":
        path.unlink()
    elif damage == "flipped":
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 255]) + data[-19:])
    else:
        filled(25, seed=9, hot_rows=20).compacted().save(tmp_path / "other")
        path.write_bytes((tmp_path / "other" / INDEX_FILE).read_bytes())
    same_answers(TokenStore.load(tmp_path, space(), hot_rows=20), store)
    assert "built again" in caplog.text


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
        TokenStore.load(tmp_path, space())


def test_what_was_forgotten_is_not_written(tmp_path: Path) -> None:
    store = TokenStore(space(), hot_rows=4)
    secret = drawn(6, WIDTH, seed=1)
    store.add("person", secret, words(6, 1))
    store.seal()
    store.save(tmp_path)
    key = store.space.keys(secret).astype(np.float16)[2].tobytes()
    assert key in (tmp_path / TRUTH_FILE).read_bytes()
    store.forget("person")
    store.save(tmp_path)
    assert key not in (tmp_path / TRUTH_FILE).read_bytes() and b"person" not in (tmp_path / TRUTH_FILE).read_bytes()


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
    assert len(store) == 42 and len(TokenStore.load(tmp_path, space())) == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == [INDEX_FILE, TRUTH_FILE]


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_knn_lm import drawn, filled, words, WIDTH
store, at, calls = filled(), int(sys.argv[2]), []
replace = os.replace
store.add("more", drawn(7, WIDTH, seed=3), words(7, 3))
def stop(source, target):
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(target)
    replace(source, target)
os.replace = stop
store.save(Path(sys.argv[1]))
"""


@pytest.mark.parametrize(("at", "entries"), [(0, 40), (1, 47)])
def test_a_kill_between_writing_and_renaming_leaves_the_old_or_the_new(tmp_path: Path, at: int, entries: int) -> None:
    filled().save(tmp_path)
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path), str(at), here], check=False)
    assert done.returncode == -signal.SIGKILL
    loaded = TokenStore.load(tmp_path, space())
    assert len(loaded) == entries
    loaded.save(tmp_path)
    assert len(TokenStore.load(tmp_path, space())) == entries


# -------------------------------------------------------------------------------------------------- gate


def copied_text(seed: int, count: int = 400) -> tuple[Tensor, Tensor]:
    """States that say what comes next, of which some are seen again with a little noise."""
    hidden = drawn(count, WIDTH, seed=seed)
    return hidden, words(count, seed)


def nats(mixed: Mixed, targets: Tensor) -> float:
    return -float(mixed.logprobs.gather(1, targets[:, None]).mean())


def test_a_gate_opens_for_the_right_store_and_closes_for_the_wrong_one(tmp_path: Path) -> None:
    right, wrong = TokenStore(space()), TokenStore(space())
    hidden, targets = copied_text(0)
    for store, seed in ((right, 0), (wrong, 1)):
        store.add("text", *copied_text(seed))
        for more in range(12):  # above the size that caps lambda
            store.add("more", *copied_text(100 * (seed + 1) + more))
    seen = hidden + 0.2 * drawn(400, WIDTH, seed=50)
    logprobs = model_says(400)
    knn = KnnLm(Gate(), k=8)
    half = slice(0, 200)
    cases = [knn.cases(seen[half], logprobs[half], targets[half], store) for store in (right, wrong)]
    gate = train_gate(cases, steps=200)
    learned = KnnLm(gate, k=8)
    rest = slice(200, 400)
    own = -float(logprobs[rest].gather(1, targets[rest, None]).mean())
    with_right, with_wrong = (learned.mix(seen[rest], logprobs[rest], [s] * 200) for s in (right, wrong))
    assert nats(with_right, targets[rest]) < 0.5 * own
    assert nats(with_wrong, targets[rest]) < 1.02 * own
    assert float(with_right.lambdas.mean()) > 4 * float(with_wrong.lambdas.mean())

    save_gate(gate, tmp_path / "gate", space().digest)
    again = KnnLm(load_gate(tmp_path / "gate", space().digest), k=8)
    assert torch.equal(again.mix(seen[rest], logprobs[rest], [right] * 200).logprobs, with_right.logprobs)


def test_training_a_gate_is_deterministic() -> None:
    cases = [Cases(drawn(50, 10, seed=1), drawn(50, seed=2).clamp_max(0), -drawn(50, seed=3).abs())]
    a, b = (train_gate(cases, steps=5) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ValueError, match="at least one"):
        train_gate([])


def test_a_gate_learns_from_tokens_that_no_neighbour_says() -> None:
    never = Cases(drawn(50, 10, seed=1), torch.full((50,), -1.0), torch.full((50,), -torch.inf))
    assert float(train_gate([never], steps=200)(never.features).mean()) < LEAST_LAMBDA


def test_a_gate_of_another_space_or_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gate"
    save_gate(Gate(), path, "a" * 64)
    with pytest.raises(ForeignMemoryError, match=r"aaaaaaaaaaaa.*bbbbbbbbbbbb"):
        load_gate(path, "b" * 64)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StoreError, match="no sound gate"):
        load_gate(path, "a" * 64)
    with pytest.raises(StoreError, match="no sound gate"):
        load_gate(tmp_path / "absent", "a" * 64)
