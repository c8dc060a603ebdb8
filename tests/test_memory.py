"""Judged decision memory: search, steering, writing, forgetting, epochs, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradatim.config import MemoryConfig, RewardConfig
from gradatim.credit import OutcomeCredit
from gradatim.errors import ForeignMemoryError, MemoryKeyError, StoreError
from gradatim.memory.contents import Whose
from gradatim.memory.decisions import CURSOR, DecisionMemory
from gradatim.memory.follow import Follower
from gradatim.memory.key_index import KeyIndex
from gradatim.memory.key_space import KeySpace, Turn, from_bytes, key_of, to_bytes, turn_layers
from gradatim.memory.recall import Recall, actions_of
from gradatim.memory.steering import Action, Steering
from gradatim.protocols import Store, Tokenizer
from gradatim.reward import WeightedReward
from gradatim.store import SqlShelf, SqlStore, open_store
from gradatim.testing.records import a_step
from gradatim.types import (
    DRIFT,
    AdapterId,
    Case,
    Decision,
    EpisodeId,
    MemoryEntry,
    MemoryKey,
    MemoryUse,
    Record,
    Step,
    StepId,
    Verdict,
)

WIDTH = 24
BASE = AdapterId("agent@0")
CONFIG = MemoryConfig(decisions=True)
SURE = math.log((1.0 - CONFIG.label_noise) / CONFIG.label_noise)
Floats = NDArray[np.float32]


def state(seed: int) -> Floats:
    return np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)


def entry(name: str, tokens: Sequence[int] = (5, 6), value: float = 1.0, **fields: Any) -> MemoryEntry:
    given: dict[str, Any] = {
        "id": f"{name}{'+' if value > 0 else '-'}",
        "tenant": "",
        "user": "",
        "episode_id": EpisodeId(f"ep-{name}"),
        "step_id": StepId(name),
        "created_at": 1.0,
        "tokens": tuple(tokens),
        "value": value,
        "sources": ("human",),
    }
    return MemoryEntry(**{**given, **fields})


def opened(
    store: SqlStore, config: MemoryConfig = CONFIG, *, base: str = "base", tokenizer: str = "tokens"
) -> DecisionMemory:
    shelf = SqlShelf(store.engines)
    return DecisionMemory(shelf, config, KeySpace(base, tokenizer, (1,), Turn()))


def learn(memory: DecisionMemory, made: MemoryEntry, seed: int, **fields: Any) -> None:
    """As after an answer at that place, and its feedback."""
    recall = memory.recollect(made.user, BASE, "base", made.scope)
    recall.situate(state(seed))
    memory.answered(recall, [made.step_id], steered=False)
    memory.write(made.episode_id, [made], **fields)


def bias(memory: DecisionMemory, seed: int, user: str = "", sha: str = "base", scope: str = "") -> Mapping[int, float]:
    """Of the first token, where the model finds every token as likely as one in ten."""
    recall = memory.recollect(user, BASE, sha, scope)
    recall.situate(state(seed))
    return recall.lean((), 0.0, lambda ids: [math.log(0.1)] * len(ids))


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with open_store(tmp_path / "store.db") as opened_store:
        yield opened_store


# --------------------------------------------------------------------------------------------------- steering


def _sequences(vocabulary: int, length: int) -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = [()]
    for _ in range(length):
        out = [(*s, v) for s in out for v in range(vocabulary)]
    return out


def _of(row: NDArray[np.float64]) -> Callable[[Sequence[int]], Sequence[float]]:
    return lambda ids: [float(row[i]) for i in ids]


@given(
    st.lists(st.tuples(st.tuples(*[st.integers(0, 2)] * 3), st.floats(-4, 4)), max_size=6, unique_by=lambda a: a[0]),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_tokens_drawn_one_by_one_give_the_mixture_over_whole_answers(
    judged: list[tuple[tuple[int, ...], float]], seed: int
) -> None:
    """Against a float64 sum over all sequences, with the model's own log-probabilities for the actions."""
    rng = np.random.default_rng(seed)
    table = {u: np.log(rng.dirichlet([1.0] * 3)) for n in range(3) for u in _sequences(3, n)}

    def logp(s: tuple[int, ...]) -> float:
        return float(sum(table[s[:i]][s[i]] for i in range(len(s))))

    actions = [Action(t, e, tuple(float(table[t[:i]][t[i]]) for i in range(3))) for t, e in judged if abs(e) > 1e-6]
    odds = 0.3
    steering = Steering(actions, odds=odds)
    mass = {a.tokens: math.expm1(a.evidence) for a in actions if a.evidence > 0}
    lost = {a.tokens: math.exp(a.evidence) for a in actions if a.evidence < 0}
    want = {s: math.exp(logp(s)) * lost.get(s, 1.0) + odds * mass.get(s, 0.0) for s in _sequences(3, 3)}
    total = sum(want.values())
    for s in want:
        got = 0.0
        for i in range(3):
            u = s[:i]
            shift = steering.lean(u, logp(u), _of(table[u]))
            weights = [table[u][v] + shift.get(v, 0.0) for v in range(3)]
            got += weights[s[i]] - float(np.logaddexp.reduce(weights))
        assert math.exp(got) == pytest.approx(want[s] / total, abs=1e-9)


def test_a_bad_answer_is_avoided_where_it_parts_from_others() -> None:
    """(1, 2) failed; nearly every answer begins with 1, so it is 2 after 1 that loses."""
    steering = Steering([Action((1, 2), -3.0, (math.log(0.99), math.log(0.5)))], odds=0.3)
    first = steering.lean((), 0.0, lambda ids: [math.log(0.99)] * len(ids))
    second = steering.lean((1,), math.log(0.99), lambda ids: [math.log(0.5)] * len(ids))
    assert first[1] == pytest.approx(math.log(1 - 0.5 * (1 - math.exp(-3.0))))
    assert second[2] == pytest.approx(-3.0)
    assert steering.lean((7,), 0.0, lambda ids: [0.0] * len(ids)) == {}


# ------------------------------------------------------------------------------------------------------- keys


def test_a_key_survives_its_bytes_and_damage_is_seen() -> None:
    key = key_of(state(1))
    assert np.array_equal(from_bytes(to_bytes(key)), key)
    assert float(key @ key) == pytest.approx(1.0, abs=2e-3)
    blob = bytearray(to_bytes(key))
    blob[3] ^= 1
    for damaged in (bytes(blob), b"", to_bytes(key)[:-2]):
        with pytest.raises(MemoryKeyError):
            from_bytes(damaged)


@pytest.mark.parametrize("bad", [np.full(WIDTH, np.nan), np.zeros(WIDTH), np.full((2, 2), 1.0), np.array([np.inf, 1])])
def test_what_is_no_vector_of_numbers_is_no_key(bad: Floats) -> None:
    with pytest.raises(MemoryKeyError):
        key_of(bad)


def test_of_several_layers_each_says_as_much_however_large_its_states_are() -> None:
    key = key_of(np.concatenate([state(1), 1000.0 * state(2)]), 2)
    assert np.allclose(key * math.sqrt(2.0), np.concatenate([key_of(state(1)), key_of(state(2))]), atol=1e-3)
    for bad in (np.concatenate([state(1), np.zeros(WIDTH)]), np.ones(WIDTH + 1)):
        with pytest.raises(MemoryKeyError):
            key_of(bad, 2)
    assert turn_layers(30) == (10, 28) and turn_layers(2) == (0, 2) and turn_layers(1) == (0, 1)


# ----------------------------------------------------------------------------------------- writing, forgetting

_CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("judge"), st.integers(0, 5), st.integers(0, 2), st.sampled_from([-0.8, -0.3, 0.4, 0.9])),
        st.tuples(st.just("retract"), st.integers(0, 5), st.just(0), st.just(0.0)),
        st.tuples(st.just("forget"), st.integers(0, 5), st.just(0), st.just(0.0)),
        st.tuples(st.just("reopen"), st.just(0), st.just(0), st.just(0.0)),
    ),
    max_size=14,
)


@given(_CHANGES)
@settings(max_examples=25, deadline=None)
def test_added_revised_retracted_and_forgotten_in_any_order_is_as_if_written_once(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, int, int, float]]
) -> None:
    """The evidence equals that of a naive float64 sum over what is left; a restart changes nothing."""
    left: dict[int, tuple[int, float]] = {}
    buried: set[int] = set()
    with open_store(tmp_path_factory.mktemp("memory") / "store.db") as store:
        memory = opened(store)
        for what, n, token, value in changes:
            episode = EpisodeId(f"ep-s{n}")
            if what == "judge":
                learn(memory, entry(f"s{n}", (token,), value), n)
                if n not in buried:
                    left[n] = token, value
            elif what == "retract":
                memory.write(episode, [])
                left.pop(n, None)
            elif what == "forget":
                memory.forget("episode", episode, actor="test")
                buried.add(n)
                left.pop(n, None)
            else:
                memory = opened(store)
        for now in (memory, opened(store)):
            assert now.stats()["entries"] == len(left)
            query = key_of(state(3))
            wide = replace(CONFIG, width=5.0)  # all of them count
            found = now.near(Whose(""), now.recollect("", BASE, "base").space, query, -1.0).near
            got = {a.tokens[0]: a.evidence for a in actions_of(found, wide)}
            sure = SURE
            want = dict.fromkeys(range(3), 0.0)
            for n, (token, value) in left.items():
                cosine = float(key_of(state(n)).astype(np.float64) @ query.astype(np.float64))
                want[token] += sure * value * math.exp((min(cosine, 1.0) - 1.0) / 5.0)
            for token, evidence in want.items():
                assert got.get(token, 0.0) == pytest.approx(evidence, abs=0.03)
            assert now.check()["ok"]


def test_what_was_judged_well_is_likelier_and_what_was_not_less_likely(store: SqlStore) -> None:
    memory = opened(store)
    assert bias(memory, 1) == {}
    learn(memory, entry("good", (5,), 1.0), 1)
    learn(memory, entry("bad", (7,), -1.0), 1)
    got = bias(memory, 1)
    assert got[5] > 1.0
    assert got[7] == pytest.approx(-SURE, abs=0.05)
    far = bias(memory, 2)
    assert abs(far.get(5, 0.0)) < got[5] / 3
    assert abs(far.get(7, 0.0)) < -got[7] / 3


def test_tenants_are_apart(store: SqlStore) -> None:
    memory = opened(store)
    learn(memory, entry("a", tenant="alice", user="alice"), 1)
    assert bias(memory, 1, "alice")
    assert bias(memory, 1, "bob") == bias(memory, 1, "") == {}
    shared = opened(store, replace(CONFIG, tenants="one"))
    assert shared.tenant("alice") == shared.tenant("bob") == ""


@pytest.mark.parametrize(
    ("scope", "value"),
    [("user", "u"), ("tenant", "t"), ("episode", "ep-x"), ("source", "human:u"), ("entry", "x+"), ("all", "")],
)
def test_forgetting_acts_by_the_next_token_and_for_good(store: SqlStore, scope: str, value: str) -> None:
    memory = opened(store)
    made = entry("x", user="u", tenant="t", sources=("human:u",))
    other = entry("y", user="v", tenant="t2", sources=("human:v",))
    learn(memory, other, 2)
    memory._spaces.wait([made.step_id], memory.recollect("", BASE, "base").space.id, key_of(state(1)))
    memory.write(made.episode_id, [made])
    recall = Recall(memory, CONFIG, Whose("t"), memory.recollect("", BASE, "base").space)
    recall.situate(state(1))
    uniform = lambda ids: [math.log(0.1)] * len(ids)  # noqa: E731
    assert recall.lean((), 0.0, uniform)
    done = memory.forget(scope, value, actor="test")
    assert done["entries"] == (2 if scope == "all" else 1)
    assert recall.lean((), 0.0, uniform) == {}  # in the middle of an answer
    for again in (memory, opened(store)):
        again.write(made.episode_id, [made])  # its feedback is revised later
        assert again.stats()["entries"] == (0 if scope == "all" else 1)
        assert again.check()["ok"]
    assert not [k for k in SqlShelf(store.engines).load(MemoryKey) if k.step_id == "x"]
    with pytest.raises(StoreError, match="cannot be forgotten"):
        memory.forget("everybody", "", actor="test")


def test_an_epoch_begins_anew_and_can_be_undone(store: SqlStore) -> None:
    memory = opened(store)
    learn(memory, entry("old", (5,)), 1)
    memory.epoch(None, actor="test", reason="drift")
    assert bias(memory, 1) == {}
    learn(memory, entry("new", (6,)), 1)
    assert set(bias(memory, 1)) == {6}
    learn(memory, entry("old", (5,), 0.9), 1)  # revised, but still of the old epoch
    assert set(bias(opened(store), 1)) == {6}
    undone = memory.undo_epoch(None)
    assert undone is not None and undone.number == 1
    for again in (memory, opened(store)):
        assert set(bias(again, 1)) == {5, 6}
    assert memory.undo_epoch(None) is None
    memory.epoch("alice", actor="test")
    assert set(bias(memory, 1)) == {5, 6}  # of another tenant


def test_an_entry_that_harms_is_dropped_and_revised_judgements_are_counted_once(store: SqlStore) -> None:
    memory = opened(store)
    learn(memory, entry("x", (5,)), 1)
    for n in range(5):
        answer = StepId(f"answer-{n}")
        for value in (-1.0, 1.0, -1.0):  # revised twice
            use = MemoryUse(answer_id=answer, entry_id="x+", value=value)
            if memory.stats()["entries"]:
                memory.write(EpisodeId(f"other-{n}"), [], [use], [answer])
        helped, harmed = memory.stats()["helped"], memory.stats()["harmed"]
        assert (helped, harmed) == ((0, n + 1) if n < 2 else (0, 0))
    assert memory.stats()["entries"] == 0
    learn(memory, entry("x", (5,)), 1)
    assert memory.stats()["entries"] == 0


def test_what_it_did_far_away_counts_less(store: SqlStore) -> None:
    memory = opened(store)
    learn(memory, entry("x", (5,)), 1)
    for n in range(29):
        use = MemoryUse(answer_id=StepId(f"answer-{n}"), entry_id="x+", value=-0.1)
        memory.write(EpisodeId(f"other-{n}"), [], [use], [use.answer_id])
    assert (memory.stats()["entries"], memory.stats()["harmed"]) == (1, 29)
    use = MemoryUse(answer_id=StepId("near"), entry_id="x+", value=-0.2)
    memory.write(EpisodeId("near"), [], [use], [use.answer_id])
    assert memory.stats()["entries"] == 0


def test_a_tenant_is_kept_within_its_bound(store: SqlStore) -> None:
    memory = opened(store, replace(CONFIG, max_entries=4))
    for n in range(7):
        learn(memory, entry(f"s{n}", created_at=float(n)), n)
        if n == 0:
            use = MemoryUse(answer_id=StepId("a"), entry_id="s0+", value=1.0)
            memory.write(EpisodeId("other"), [], [use], [StepId("a")])
    assert sorted(row["response_id"] for row in memory.show()) == ["s0", "s4", "s5", "s6"]


def test_another_model_or_tokenizer_is_refused_with_both_digests(store: SqlStore) -> None:
    learn(opened(store), entry("x"), 1)
    with pytest.raises(ForeignMemoryError, match=r"base.*other"):
        opened(store, base="other")
    with pytest.raises(ForeignMemoryError, match=r"tokens.*other"):
        opened(store, tokenizer="other")
    unknown = opened(store, base="", tokenizer="")  # without a model: to look at it, and to forget it
    assert unknown.forget("all", "", actor="test")["entries"] == 1
    assert opened(store, base="other").stats()["entries"] == 0


def test_a_damaged_key_is_counted_and_can_be_made_anew(store: SqlStore) -> None:
    memory = opened(store)
    learn(memory, entry("x"), 1)
    space = memory.recollect("", BASE, "base").space.id
    SqlShelf(store.engines).change(put=[MemoryKey(step_id=StepId("x"), space=space, key=b"\x00" * 52)])
    again = opened(store)
    assert again.stats()["damaged"] == 1
    assert not again.check()["ok"]
    assert bias(again, 1) == {}
    assert [(step, lacking.id, lacking.adapter_id) for step, lacking in again.unkeyed(9)] == [("x", space, BASE)]
    again.put_key(StepId("x"), space, key_of(state(1)))
    assert bias(again, 1) == bias(opened(store), 1) != {}
    assert again.check()["ok"]


def test_many_keys_are_sealed_and_gone_ones_give_back_their_room(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradatim.memory.contents.KeyIndex", partial(KeyIndex, hot_rows=64))
    monkeypatch.setattr("gradatim.memory.key_index._WORTH_COMPACTING", 8)
    memory = opened(store)
    for n in range(70):
        learn(memory, entry(f"s{n}", (n,)), n)
    before = bias(memory, 5), bias(memory, 69)
    memory.maintain()
    ((at, index),) = memory._all.indexes.items()
    assert index.sealed == 70
    assert (bias(memory, 5), bias(memory, 69)) == before
    for n in range(40):
        memory.forget("episode", f"ep-s{n}", actor="test")
    assert 5 not in bias(memory, 5)
    left = bias(memory, 69)
    memory.maintain()
    assert memory._all.indexes[at] is not index and memory._all.indexes[at].rows == 30
    assert bias(memory, 69) == left and memory.check()["ok"]


def test_a_write_that_fails_changes_nothing(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = opened(store)
    learn(memory, entry("x"), 1, cursor=7)
    assert store.cursor(CURSOR) == 7

    def full(self: SqlShelf, **_: Any) -> None:
        raise StoreError("disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(SqlShelf, "change", full)
        for change in (
            lambda: memory.write(EpisodeId("ep-x"), [], cursor=9),
            lambda: memory.epoch(None, actor="test"),
            lambda: memory.forget("all", "", actor="test"),
        ):
            with pytest.raises(StoreError):
                change()
    assert store.cursor(CURSOR) == 7
    assert bias(memory, 1) == bias(opened(store), 1) != {}


def test_keys_of_other_weights_stand_in_where_they_are_allowed_to(store: SqlStore) -> None:
    memory = opened(store)
    for n in range(4):
        learn(memory, entry(f"s{n}", (n,)), n)
    assert bias(memory, 1, sha="another") == {}
    old, new = (memory.recollect("", BASE, sha).space.id for sha in ("base", "another"))
    assert memory.fullest(but=new) == old
    assert len(memory.unkeyed(9)) == 4
    assert memory.finds_itself(StepId("s1"), key_of(state(1) + 0.01), old)
    assert memory.finds_itself(StepId("s1"), key_of(state(2)), old) is False
    memory.bridge(new, old)
    assert 1 in bias(memory, 1, sha="another")
    memory.bridge(new, None)
    memory.put_key(StepId("s1"), new, key_of(state(1)))
    assert set(bias(memory, 1, sha="another")) == {1}


# ---------------------------------------------------------------------------------------------------- following


async def test_a_new_world_begins_an_epoch_once_which_can_be_undone(store: SqlStore) -> None:
    learn(opened(store), entry("s", (5,)), 1)

    def follower(memory: DecisionMemory) -> Follower:
        async def place(step: Step, adapter_id: AdapterId) -> Floats:
            return state(1)

        rule, credit = WeightedReward(RewardConfig()), OutcomeCredit(RewardConfig())
        return Follower(memory, store, reward_model=rule, credit=credit, tokenizer=cast(Tokenizer, None), place=place)

    found = Verdict(
        adapter_id=BASE,
        created_at=1.0,
        gate=DRIFT,
        decision=Decision.PASS,
        evidence={"world": 1.0, "adapt": 0.0},
        reason="the world changed",
    )
    memory = opened(store)
    following = follower(memory)
    store.append(found)
    following.take()
    assert bias(memory, 1)  # it is only told
    store.append(replace(found, evidence={"world": 1.0, "adapt": 1.0}))
    following.take()
    assert not bias(memory, 1)
    again = opened(store)
    follower(again).take()
    assert [(e.number, e.actor, e.reason) for e in again._all.epochs.values()] == [(1, DRIFT, "the world changed")]
    assert again.undo_epoch(None) is not None and bias(again, 1)


class Steps:
    """A store that has every step and no new feedback."""

    def cases(self, *, after: int = 0, limit: int = 100) -> Sequence[Case]:
        return ()

    def cursor(self, name: str) -> int:
        return 0

    def read(self, kind: type[Record], *, after: int = 0, limit: int = 1000, **where: str) -> Sequence[Any]:
        return ()

    def step(self, *, id: StepId | None = None, chain_key: str | None = None) -> Step | None:
        return a_step(str(id))


@pytest.mark.parametrize(("moved", "stands_in"), [(0.02, True), (5.0, False)])
async def test_after_a_promotion_old_keys_stand_in_where_steps_find_themselves_and_new_ones_are_made(
    store: SqlStore, moved: float, stands_in: bool
) -> None:
    memory = opened(store)
    for n in range(12):
        learn(memory, entry(f"s{n:02d}", (n,)), n)

    async def place(step: Step, adapter_id: AdapterId) -> Floats:
        assert adapter_id == "agent@1"
        n = int(step.id[1:])
        return (state(n) + moved * state(1000 + n)).astype(np.float32)

    follower = Follower(
        memory,
        cast(Store, Steps()),
        reward_model=WeightedReward(RewardConfig()),
        credit=OutcomeCredit(RewardConfig()),
        tokenizer=cast(Tokenizer, None),  # nothing is corrected
        place=place,
    )
    memory._spaces._wanted.clear()
    new = memory.recollect("", AdapterId("agent@1"), "another").space
    assert await follower.turn()  # keys of 8 of them
    assert len(memory.unkeyed(99)) == 4
    lacking = memory.unkeyed(99)[0][0]
    found = memory.near(Whose(""), new, key_of(state(int(lacking[1:]))), 0.9).near
    assert [e.step_id for e, _ in found] == ([lacking] if stands_in else [])
    while await follower.turn():
        pass
    assert memory.unkeyed(99) == []
    keys = [k for k in SqlShelf(store.engines).load(MemoryKey) if k.space == new.id]
    assert len(keys) == 12
    assert memory._spaces._bridges == {}
    assert opened(store).stats()["keys"] == 24
