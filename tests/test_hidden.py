"""The model's own states as a source: who may vote on what, when it keeps silent, and what a restart changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gradatim.app import compose
from gradatim.config import Config, RewardConfig
from gradatim.learner.encoder import LONGEST, StateEncoder
from gradatim.learner.trainable import trainable
from gradatim.nn.states import lower_states, states
from gradatim.reward import FITTED, AuditedReward, Hidden, hidden
from gradatim.reward.calibrate import is_held_out
from gradatim.reward.evidence import Judged, Opinion
from gradatim.stats import logistic
from gradatim.store import SqlShelf, SqlStore, open_store
from gradatim.types import Case, Episode, EpisodeId, Feedback, Sketch, Step

from .records import case_of, feedback, step
from .tiny import VOCABULARY, tiny_base, tiny_weights

CONFIG = RewardConfig(min_labels=60, risk=0.2, hidden=True)
SIZE = 12


class Signs:
    """An encoder whose vectors tell the truth of an episode, with noise: number i is good where i % 2."""

    space = "signs"

    def __init__(self, noise: float = 1.0) -> None:
        self.noise = noise
        self.calls: Counter[str] = Counter()

    def encode(self, step: Step) -> NDArray[np.float32] | None:
        self.calls[step.id] += 1
        i = int(step.episode_id[1:])
        out = self.noise * np.random.default_rng(i).normal(size=SIZE)
        out[3] += 1.0 if i % 2 else -1.0
        return out.astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(tmp_path / "s.db") as opened:
        yield opened


def fill(store: SqlStore, numbers: range, *, audited: bool) -> None:
    """Each has a click that is right in two of three."""
    for i in numbers:
        name, sign = f"e{i}", 1.0 if i % 2 else -1.0
        click = feedback("score", name, value=sign if i % 3 else -sign, source="implicit:click")
        store.append(step(f"s{i}", name), click)
        if audited:
            store.append(feedback("outcome", name, value=sign, source="human:audit-kim"))


def judged(store: SqlStore, encoder: Any) -> tuple[AuditedReward, Hidden]:
    source = Hidden(SqlShelf(store.engines), encoder)
    model = AuditedReward(store, CONFIG, clock=lambda: 1.0, hidden=source)
    after = 0
    while cases := store.cases(after=after):
        for case in cases:
            model.score(case)
        after = cases[-1].position
    return model, source


def votes(source: Hidden, rows: Sequence[Judged]) -> dict[str, float]:
    return {r.episode_id: o.value for r in source.heard(rows) for o in r.opinions if o.rater == hidden.SOURCE}


def row(i: int, label: int | None = None) -> Judged:
    return Judged(EpisodeId(f"e{i}"), (), 3.0, label)


def case_for(i: int, *opinions: Feedback, position: int = 1) -> Case:
    steps = (step(f"s{i}", f"e{i}"),)
    return replace(case_of(*opinions, position=position), episode=Episode(id=EpisodeId(f"e{i}"), steps=steps))


def taught(store: SqlStore, n: int, encoder: Any) -> tuple[Hidden, list[Judged]]:
    source = Hidden(SqlShelf(store.engines), encoder)
    for i in range(n):
        source.note(case_for(i))
    return source, [row(i, i % 2) for i in range(n)]


# ------------------------------------------------------------------------------------------- who votes on what


def test_it_learns_and_votes_on_episodes_without_a_label(store: SqlStore) -> None:
    source, rows = taught(store, 400, Signs())
    source.fit([*rows[:300], *(replace(r, label=None) for r in rows[300:])], upto=10)
    said = votes(source, rows[300:])
    right = [(value > 0) == bool(int(e[1:]) % 2) for e, value in said.items()]
    assert len(said) > 50
    assert np.mean(right) > 0.75  # the noise leaves 84 % to whoever knows the direction


def test_no_label_has_a_part_in_the_vote_on_its_own_episode(store: SqlStore) -> None:
    """Pure noise: a head that had seen the label would remember it."""
    source, rows = taught(store, 240, Signs(noise=1e3))
    source.fit(rows, upto=10)
    before = votes(source, rows)
    for i in (4, 5, 17, 60):
        turned = [replace(r, label=1 - (r.label or 0)) if r.episode_id == f"e{i}" else r for r in rows]
        source.fit(turned, upto=10)
        assert votes(source, [rows[i]]) == {k: v for k, v in before.items() if k == f"e{i}"}
    right = [(value > 0) == bool(int(e[1:]) % 2) for e, value in before.items()]
    assert 0.3 < np.mean(right) < 0.7


def test_a_vote_does_not_change_when_the_label_comes(store: SqlStore) -> None:
    source, rows = taught(store, 200, Signs())
    source.fit(rows, upto=10)
    unlabelled = [replace(r, label=None) for r in rows]
    assert votes(source, unlabelled) == votes(source, rows)


def test_held_out_labels_teach_it_nothing(store: SqlStore) -> None:
    source, rows = taught(store, 200, Signs())
    source.fit(rows, upto=10)
    before = votes(source, rows)
    source.fit([replace(r, label=1 - (r.label or 0)) if is_held_out(r.episode_id) else r for r in rows], upto=10)
    assert votes(source, rows) == before


def test_about_a_third_of_the_heads_votes_on_each_episode() -> None:
    seen = np.stack([hidden.bag(EpisodeId(f"e{i}")) for i in range(500)])
    assert np.mean(seen == 0) == pytest.approx(np.exp(-1), abs=0.02)
    assert seen.mean() == pytest.approx(1.0, abs=0.05)
    assert (hidden.bag(EpisodeId("e7")) == seen[7]).all()


def test_heads_without_a_bag_are_a_ridge_regression_on_whitened_directions() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 6)), (rng.random(120) < 0.5).astype(np.float64)
    heads = hidden.fit(x, y, np.ones((120, hidden.HEADS), dtype=np.int64), np.zeros((0, 6)))
    z = np.clip((x - x.mean(0)) / x.std(0), -8, 8)
    values, main = np.linalg.eigh(z.T @ z / len(z))
    white = np.concatenate([np.ones((120, 1)), z @ main / np.sqrt(values)], axis=1)
    ridge = np.array([0.1, *[4.0] * 6])
    slow = logistic.sigmoid(white @ logistic.fit(white, y, centre=np.zeros(7), strength=ridge))
    good, _ = heads.say(x, np.zeros((120, hidden.HEADS), dtype=np.int64))
    assert good == pytest.approx(slow, abs=1e-6)


def test_the_ensembles_spread_keeps_it_silent() -> None:
    heads = hidden.Heads(np.zeros(1), np.ones(1), np.ones((1, 1)), np.array([[0.0, 1.0], [0.0, -1.0]] * 12))
    x = np.array([[2.0]])
    good, agreed = heads.say(x, np.zeros((1, 24), dtype=np.int64))
    assert (good[0], agreed[0]) == (0.5, 0.0)
    only_one = np.array([[0] + [1] * 23])
    assert heads.say(x, only_one)[1][0] == 0.0


# ------------------------------------------------------------------------------------- in the calibrated model


def test_with_few_labels_it_says_nothing(store: SqlStore) -> None:
    fill(store, range(30), audited=True)
    model, source = judged(store, Signs())
    assert not source.speaks
    assert all(o.rater != hidden.SOURCE for r in model.rows() for o in r.opinions)
    source.fit([row(i, 1) for i in range(30)] * 4, upto=10_000)  # many labels, all of one kind
    assert not source.speaks


def test_it_is_one_more_source_whose_reliability_is_learned(store: SqlStore) -> None:
    fill(store, range(260), audited=True)
    fill(store, range(260, 300), audited=False)
    model, source = judged(store, Signs(noise=0.5))
    assert source.speaks and model.describe()["hidden_speaks"]
    found = {r["source"]: r for r in model.describe()["sources"]}
    assert found[hidden.SOURCE]["right"] > 0.85 > found["implicit:click"]["right"]
    said = feedback("score", "e261", value=-1.0, source="implicit:click")  # wrongly
    reward = model.score(case_for(261, said, position=10_000))
    assert reward.value is not None and reward.value > 0.0
    assert "by 2 sources" in reward.reason


def test_it_is_no_reward_by_the_weighted_rule(store: SqlStore) -> None:
    source, rows = taught(store, 200, Signs(noise=0.1))
    source.fit(rows, upto=10)
    model = AuditedReward(store, CONFIG, clock=lambda: 1.0, hidden=source)
    assert votes(source, [row(3)])
    assert model.score(case_for(3, feedback("outcome", "e3", value=None))).value is None
    correction = feedback("correction", "e3", step_id="s3", correction="x")
    assert model.score(case_for(3, correction)).value == 0.0


def test_a_correction_alone_stays_neutral_beside_it(store: SqlStore) -> None:
    fill(store, range(240), audited=True)
    model, _ = judged(store, Signs(noise=0.1))
    assert model.is_calibrated
    correction = feedback("correction", "e3", step_id="s3", correction="x")
    assert model.score(case_for(3, correction, position=10_000)).value == 0.0


# ---------------------------------------------------------------------------------------- kills, costs, bad input


def test_a_restart_gives_the_same(store: SqlStore) -> None:
    fill(store, range(200), audited=True)
    fill(store, range(200, 230), audited=False)
    first, _ = judged(store, Signs())
    assert store.cursor(FITTED) > 0
    shelf = SqlShelf(store.engines)
    again = AuditedReward(store, CONFIG, clock=lambda: 1.0, hidden=Hidden(shelf, Signs()))
    reader = AuditedReward(store, CONFIG, clock=lambda: 1.0, read_only=True, hidden=Hidden(shelf, None))
    for case in store.cases(after=0, limit=1000)[-40:]:
        told = first.score(case)
        assert again.score(case) == told
        assert reader.score(case) == told


def test_sketches_made_after_a_fit_have_no_part_in_it(store: SqlStore) -> None:
    source, rows = taught(store, 100, Signs())
    source.note(case_for(100, position=50))
    source.fit([*rows, row(100, 0)], upto=10)
    before = votes(source, rows)
    source.fit([*rows, row(100, 1)], upto=10)
    assert votes(source, rows) == before


def test_each_answer_is_read_once(store: SqlStore) -> None:
    fill(store, range(40), audited=True)
    encoder = Signs()
    judged(store, encoder)
    judged(store, encoder)  # another process finds them on the shelf
    assert set(encoder.calls.values()) == {1} and len(encoder.calls) == 40


def test_where_it_is_not_learned_from_no_answer_is_read(store: SqlStore) -> None:
    encoder = Signs()
    source = Hidden(SqlShelf(store.engines), encoder)
    model = AuditedReward(store, replace(CONFIG, model="weighted"), hidden=source)
    model.score(case_for(1, feedback("score", "e1", value=1.0)))
    assert not encoder.calls


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_a_state_that_is_no_number_is_refused(store: SqlStore, bad: float, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Signs):
        def encode(self, step: Step) -> NDArray[np.float32] | None:
            out = np.zeros(SIZE, dtype=np.float32)
            out[5] = bad
            self.calls[step.id] += 1
            return out

    encoder = Broken()
    source = Hidden(SqlShelf(store.engines), encoder)
    source.note(case_for(1))
    source.note(case_for(1))
    assert source.refused == 1 and encoder.calls["s1"] == 1
    assert SqlShelf(store.engines).load(Sketch) == []
    assert "no vector of numbers" in caplog.text


# ------------------------------------------------------------------------------------------- the model's own states


def answer(prompt: Sequence[int], completion: Sequence[int]) -> Step:
    return step("s", prompt_ids=tuple(prompt), completion_ids=tuple(completion))


def test_lower_states_are_those_of_the_whole_pass() -> None:
    model = tiny_base().model
    ids = [5, 9, 11, 60, 3]
    for layer in (1, 2):
        assert np.array_equal(lower_states(model, ids, layer).numpy(), states(model, ids, layer).numpy())
    assert not any(layer._forward_hooks for layer in model.base_model.layers)


def test_a_sketch_is_of_the_base_and_of_the_answer_alone() -> None:
    base = tiny_base()
    encoder = StateEncoder(base)
    clean = states(base.model, [5, 9, 11, 60, 3], 1)[-2:].mean(0).numpy()
    shared = trainable(base)
    shared.lora.load(tiny_weights(base.model))  # as a gate leaves it
    try:
        found = encoder.encode(answer([5, 9, 11], [60, 3]))
    finally:
        shared.lora.load(None)
    assert found is not None and np.allclose(found, clean, atol=1e-6)
    assert encoder.space == StateEncoder(base).space
    assert encoder.encode(answer([5], ())) is None
    assert encoder.encode(answer([5], [VOCABULARY])) is None


def test_no_pass_is_longer_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def counted(model: Any, ids: Sequence[int], layer: int) -> Any:
        lengths.append(len(ids))
        return lower_states(model, ids, layer)

    monkeypatch.setattr("gradatim.learner.encoder.lower_states", counted)
    StateEncoder(tiny_base()).encode(answer([7] * 1500, [8] * 600))
    assert lengths == [LONGEST]


def test_an_opinion_of_another_is_left_as_it_is(store: SqlStore) -> None:
    source, rows = taught(store, 200, Signs(noise=0.1))
    source.fit(rows, upto=10)
    other = Opinion("judge:j", "judge", 1.0, 1.0)
    (heard,) = source.heard([replace(row(2), opinions=(other,))])
    assert other in heard.opinions and len(heard.opinions) == 2
    assert heard.opinions == tuple(sorted(heard.opinions, key=lambda o: o.rater))


def test_the_loop_reads_answers_and_the_server_does_not(store: SqlStore, tmp_path: Path) -> None:
    config = Config(data_dir=tmp_path, reward=CONFIG)
    answered = step("s1", "e1", prompt_ids=(5, 9, 11), completion_ids=(60, 3))
    case = replace(
        case_for(1, feedback("score", "e1", value=1.0)), episode=Episode(id=EpisodeId("e1"), steps=(answered,))
    )
    for base, made in ((None, 0), (tiny_base(), 1)):
        judge, _ = compose.build_judges(config, store, base, read_only=base is None)
        judge.score(case)
        assert len(SqlShelf(store.engines).load(Sketch)) == made
    off, _ = compose.build_judges(replace(config, reward=replace(CONFIG, hidden=False)), store, tiny_base())
    assert "hidden_speaks" not in off.describe()


def test_sketches_of_episodes_that_nobody_looks_at_any_more_are_given_up(store: SqlStore) -> None:
    encoder = Signs()
    source = Hidden(SqlShelf(store.engines), encoder)
    for i in range(6):
        source.note(replace(case_of(steps=(step(f"s{i}", f"e{i}"),)), position=i + 1))
    kept = [Judged(EpisodeId("e1"), (), 1.0, 1), Judged(EpisodeId("e4"), (), 1.0)]
    source.prune(kept, 5)
    assert {s.episode_id for s in SqlShelf(store.engines).load(Sketch)} == {"e1", "e4", "e5"}  # the last one is newer
    source.note(replace(case_of(steps=(step("s0", "e0"),)), position=9))
    source.note(replace(case_of(steps=(step("s1", "e1"),)), position=10))
    assert (encoder.calls["s0"], encoder.calls["s1"]) == (2, 1)
    Hidden(SqlShelf(store.engines), None).prune([], 99)
    assert len(SqlShelf(store.engines).load(Sketch)) == 4, "who only reads gives nothing up"
