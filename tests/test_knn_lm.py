"""Token memory: the mixture against float64, and the gate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from gradatim.memory.knn_gate import TEMPERATURE, Cases, Gate, train_gate
from gradatim.memory.knn_lm import LEAST_LAMBDA, SMALL_STORE_CAP, KnnLm, Mixed
from gradatim.memory.token_store import TokenStore
from tests.token_memory import VOCABULARY, WIDTH, drawn, filled, model_says, open_gate, store_of, words


def reference(store: TokenStore, hidden: Tensor, logprobs: Tensor, lambdas: Tensor, k: int) -> np.ndarray:
    """Equations 2 and 3 of arXiv:1911.00172 written down, float64, over the keys as they are stored."""
    kept: dict[int, np.ndarray] = {}  # by row
    for source, spans in store.index.spans().items():
        rows = [row for start, end in spans for row in range(start, end)]
        kept |= dict(zip(rows, store.index.of(source), strict=True))
    stored = [(kept[row], int(store._tokens[row])) for row in sorted(kept)]
    keys = np.array([key for key, _ in stored], np.float64)
    queries = store.index.codec.seen(store.space.pooling.keys(hidden)).astype(np.float64)
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
    mixed = KnnLm(open_gate().lambdas, k=8).mix(hidden, logprobs, [store] * 6)
    assert mixed.searched.all() and (mixed.lambdas > 0.05).all()
    want = reference(store, hidden, logprobs, torch.from_numpy(mixed.lambdas), 8)
    np.testing.assert_allclose(mixed.on(logprobs).exp().double().numpy(), want, rtol=2e-5, atol=1e-8)
    np.testing.assert_allclose(mixed.weights.sum(1), 1.0, rtol=1e-6)
    assert (mixed.rows[:, 0] >= 0).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(0, 60), st.floats(-4, 6), st.floats(0.1, 8), st.integers(0, 1000), st.integers(1, 9)
)
def test_it_sums_to_one(rows: int, entries: int, bias: float, sharp: float, seed: int, k: int) -> None:
    store = filled(entries, seed)
    logprobs = model_says(rows, seed, sharp)
    mixed = KnnLm(open_gate(bias).lambdas, k=k).mix(drawn(rows, WIDTH, seed=seed), logprobs, [store] * rows)
    torch.testing.assert_close(mixed.on(logprobs).exp().sum(1), torch.ones(rows), rtol=1e-5, atol=1e-5)


def test_added_to_logits_it_is_the_same_mixture_and_tells_the_models_own() -> None:
    hidden, logits = drawn(5, WIDTH, seed=1), 3.0 * drawn(5, VOCABULARY, seed=5) + 7.0
    stores = [filled(seed=0), None, filled(seed=1), store_of(), filled(seed=2)]
    knn, own = KnnLm(open_gate().lambdas, k=8), logits.log_softmax(1)
    mixed, of_normalised = knn.mix(hidden, logits, stores), knn.mix(hidden, own, stores)
    np.testing.assert_allclose(mixed.lambdas, of_normalised.lambdas, rtol=1e-5)
    blends, want = mixed.blends(), of_normalised.on(own)
    assert sorted(blends) == [0, 2, 4]
    for row, blend in blends.items():
        assert (blend.nats > 0).all() and len(set(blend.tokens.tolist())) == len(blend.tokens)
        moved = logits[row].double()
        moved[torch.from_numpy(blend.tokens)] += torch.from_numpy(blend.nats)
        got = torch.log_softmax(moved, 0).float()
        torch.testing.assert_close(got, want[row], rtol=1e-5, atol=1e-5)
        told = [blend.own(token, float(got[token])) for token in range(VOCABULARY)]
        np.testing.assert_allclose(told, own[row].numpy(), atol=1e-5)


def test_what_the_model_cannot_say_is_not_made_possible() -> None:
    hidden, logprobs = drawn(2, WIDTH, seed=1), model_says(2).clone()
    store, never = store_of(), 17
    store.add("a", hidden[:1], torch.tensor([never]))
    store.add("b", hidden[1:], torch.tensor([3]))
    logprobs[:, never] = -torch.inf
    mixed = KnnLm(open_gate(20.0).lambdas, k=1).mix(hidden, logprobs, [store] * 2)
    assert mixed.searched.all() and mixed.lambdas[0] == 0.0 < mixed.lambdas[1]
    assert bool(mixed.on(logprobs)[:, never].isneginf().all())


def test_tenants_of_one_batch_do_not_see_each_other() -> None:
    hidden, logprobs = drawn(6, WIDTH, seed=1), model_says(6)
    a, b = filled(seed=0), filled(seed=1)
    knn = KnnLm(open_gate().lambdas, k=8)
    together = knn.mix(hidden, logprobs, [a, None, b, a, b, None])
    for row, store in enumerate([a, None, b, a, b, None]):
        alone = knn.mix(hidden[row : row + 1], logprobs[row : row + 1], [store])
        mine = alone.on(logprobs[row : row + 1])[0]
        torch.testing.assert_close(together.on(logprobs)[row], mine, rtol=1e-5, atol=1e-6)
        assert together.lambdas[row] == pytest.approx(alone.lambdas[0], rel=1e-5)


def test_without_memory_the_models_bits_come_back() -> None:
    hidden, logprobs = drawn(4, WIDTH, seed=1), model_says(4)
    knn = KnnLm(open_gate().lambdas)
    for stores in ([None] * 4, [store_of()] * 4):
        mixed = knn.mix(hidden, logprobs, stores)
        assert mixed.on(logprobs) is logprobs and not mixed.searched.any() and not mixed.lambdas.any()


def test_a_closed_gate_gives_the_models_bits_back() -> None:
    hidden, logprobs = drawn(4, WIDTH, seed=1), model_says(4)
    mixed = KnnLm(open_gate(-20.0).lambdas).mix(hidden, logprobs, [filled()] * 4)
    assert mixed.searched.all() and mixed.on(logprobs) is logprobs and not mixed.lambdas.any()


def test_rows_beside_a_mixed_one_keep_their_bits_and_the_input_is_not_written_to() -> None:
    hidden, logprobs = drawn(3, WIDTH, seed=1), model_says(3)
    before = logprobs.clone()
    mixed = KnnLm(open_gate().lambdas).mix(hidden, logprobs, [None, filled(), None])
    out = mixed.on(logprobs)
    assert torch.equal(logprobs, before)
    assert torch.equal(out[[0, 2]], before[[0, 2]]) and not torch.equal(out[1], before[1])


def test_nothing_is_looked_up_where_the_model_is_sure_or_broken() -> None:
    logprobs = model_says(3).clone()
    logprobs[0] = torch.log_softmax(torch.eye(VOCABULARY)[4] * 20, 0)
    hidden = drawn(3, WIDTH, seed=1)
    hidden[1, 0] = float("nan")
    mixed = KnnLm(open_gate().lambdas).mix(hidden, logprobs, [filled()] * 3)
    assert mixed.searched.tolist() == [False, False, True]
    assert torch.equal(mixed.on(logprobs)[:2], logprobs[:2])
    broken = torch.full((1, VOCABULARY), float("nan"))
    assert not KnnLm(open_gate().lambdas).mix(hidden[2:], broken, [filled()]).searched.any()


def test_a_small_store_has_a_small_say() -> None:
    mixed = KnnLm(open_gate(20.0).lambdas).mix(drawn(4, WIDTH, seed=1), model_says(4), [filled()] * 4)
    assert mixed.lambdas.tolist() == [SMALL_STORE_CAP] * 4


def test_what_was_said_in_this_very_state_becomes_likely() -> None:
    store, hidden = store_of(), drawn(1, WIDTH, seed=3)
    store.add("correction", hidden, torch.tensor([17]))
    logprobs = model_says(1)
    mixed = KnnLm(open_gate(20.0).lambdas).mix(hidden, logprobs, [store])
    assert math.isclose(
        float(mixed.on(logprobs)[0, 17].exp()), SMALL_STORE_CAP + 0.75 * float(logprobs[0, 17].exp()), rel_tol=1e-5
    )


# -------------------------------------------------------------------------------------------------- gate


def copied_text(seed: int, count: int = 400) -> tuple[Tensor, Tensor]:
    """States that say what comes next, of which some are seen again with a little noise."""
    hidden = drawn(count, WIDTH, seed=seed)
    return hidden, words(count, seed)


def nats(mixed: Mixed, logprobs: Tensor, targets: Tensor) -> float:
    return -float(mixed.on(logprobs).gather(1, targets[:, None]).mean())


def test_a_gate_opens_for_the_right_store_and_closes_for_the_wrong_one() -> None:
    right, wrong = store_of(), store_of()
    hidden, targets = copied_text(0)
    for store, seed in ((right, 0), (wrong, 1)):
        store.add("text", *copied_text(seed))
        for more in range(12):  # above the size that caps lambda
            store.add("more", *copied_text(100 * (seed + 1) + more))
    seen = hidden + 0.2 * drawn(400, WIDTH, seed=50)
    logprobs = model_says(400)
    knn = KnnLm(Gate().lambdas, k=8)
    half = slice(0, 200)
    cases = [knn.cases(seen[half], logprobs[half], targets[half], store) for store in (right, wrong)]
    gate = train_gate(cases, steps=200)
    learned = KnnLm(gate.lambdas, k=8)
    rest = slice(200, 400)
    own = -float(logprobs[rest].gather(1, targets[rest, None]).mean())
    with_right, with_wrong = (learned.mix(seen[rest], logprobs[rest], [s] * 200) for s in (right, wrong))
    assert nats(with_right, logprobs[rest], targets[rest]) < 0.5 * own
    assert nats(with_wrong, logprobs[rest], targets[rest]) < 1.02 * own
    assert float(with_right.lambdas.mean()) > 4 * float(with_wrong.lambdas.mean())


def test_the_gate_sees_what_is_written_down_here() -> None:
    """Token by token, in float64, from what the search gives; of a store that says the same word more than once."""
    store, hidden = filled(20), drawn(4, WIDTH, seed=1)
    logits = (2.0 * drawn(4, VOCABULARY, seed=5)).double()
    asked: list[NDArray[np.float32]] = []

    def gate(x: NDArray[np.float32]) -> NDArray[np.float32]:
        asked.append(x)
        return np.full(len(x), 0.1, np.float32)

    KnnLm(gate, k=24).mix(hidden, logits.float(), [store] * 4)
    found, own = store.search(hidden, 24), logits.log_softmax(1)
    for row in range(4):
        near = [(float(d), t) for d, t in zip(found.distances[row], found.tokens[row].tolist(), strict=True) if t >= 0]
        assert len(near) == 20 and len({t for _, t in near}) < 20
        weights = [math.exp(-d / TEMPERATURE) for d, _ in near]
        mass: dict[int, float] = {}
        for (_, token), weight in zip(near, weights, strict=True):
            mass[token] = mass.get(token, 0.0) + weight / sum(weights)
        best = max(mass, key=lambda token: mass[token])
        want = [
            math.log(near[0][0]),
            math.log(near[7][0]),
            math.log(4.0),  # the 24th is not there
            mass[best],
            math.log(len(mass)),
            -float((own[row].exp() * own[row]).sum()),
            float(own[row].max()),
            weights[0] / sum(weights),
            float(own[row, best]),
            math.log(20),
        ]
        np.testing.assert_allclose(asked[0][row], want, rtol=1e-4, atol=1e-5)


def test_a_gate_gives_the_same_to_arrays_and_tensors() -> None:
    gate, x = open_gate(0.5), drawn(30, 10, seed=1)
    np.testing.assert_allclose(gate.lambdas(x.numpy()), gate(x).numpy(), rtol=1e-5)


def test_training_a_gate_is_deterministic() -> None:
    cases = [Cases(drawn(50, 10, seed=1), drawn(50, seed=2).clamp_max(0), -drawn(50, seed=3).abs())]
    a, b = (train_gate(cases, steps=5) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ValueError, match="at least one"):
        train_gate([])


def test_a_gate_learns_from_tokens_that_no_neighbour_says() -> None:
    never = Cases(drawn(50, 10, seed=1), torch.full((50,), -1.0), torch.full((50,), -torch.inf))
    assert float(train_gate([never], steps=200)(never.features).mean()) < LEAST_LAMBDA
