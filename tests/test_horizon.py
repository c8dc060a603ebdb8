"""Credit over long horizons: a slip at step 3 that shows at step 53, and when each method has no answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradatim.config import CreditConfig, RewardConfig
from gradatim.credit import HorizonCredit, OutcomeCredit, decompose
from gradatim.credit.anchors import contrast
from gradatim.credit.decompose import share_rest
from gradatim.credit.history import Lived, lived
from gradatim.protocols import Store
from gradatim.store import open_store
from gradatim.types import Case, Episode, EpisodeId, Feedback, Reward, Step

from .records import feedback, step

STEPS, SLIP, SEEN = 60, 2, 52


def an_episode(name: str, rng: random.Random, *, wordy: bool = False, prompts: bool = False) -> tuple[Episode, float]:
    """``wordy``: no answer reads like another. ``prompts``: prompts hold the whole history, as those of agents do."""
    steps: list[Step] = []
    red = rng.random() < 0.5
    history: tuple[int, ...] = (1,)
    for k in range(STEPS):
        seen = f"hall {k} lamp {rng.randint(1, 3)}"
        said = rng.choice(["go on", "look round", "wait"])
        if k == SLIP:
            seen, said = "two keys lie here", "take the red key" if red else "take the blue key"
        if k == SEEN:
            seen = "the door opens" if red else "the door stays locked"
        if wordy:
            said = f"{said} {rng.randint(0, 10**9)}"
        history = (*history, k, hash(said) % 1000) if prompts else (k, rng.randint(0, 10**9))
        message = {"role": "user", "content": seen}
        steps.append(step(f"{name}-{k}", name, prompt_ids=history, completion_ids=(k,), text=said, messages=(message,)))
    return Episode(id=EpisodeId(name), steps=tuple(steps)), 1.0 if red else -1.0


def lives(n: int, seed: int = 0, *, wordy: bool = False) -> list[Lived]:
    rng = random.Random(seed)
    return [lived(*an_episode(f"e{i}", rng, wordy=wordy)) for i in range(n)]


def on_slip(shares: Sequence[float]) -> float:
    return abs(shares[SLIP]) / sum(map(abs, shares))


def test_the_same_observation_answered_otherwise_finds_the_slip() -> None:
    *past, this = lives(60)
    answer = contrast(this, this.observations, [(e, e.observations) for e in past])
    assert answer is not None and answer.sure > 0.99
    assert on_slip(answer.shares) > 0.99
    assert answer.shares[SLIP] == pytest.approx(this.value, abs=0.05)
    assert "answered so ended well" in answer.why[SLIP]


def test_a_scorer_of_prefixes_finds_it_where_no_answer_reads_like_another() -> None:
    *past, this = lives(120, wordy=True)
    assert contrast(this, this.observations, [(e, e.observations) for e in past]) is None
    scorer = decompose.fit(past)
    assert scorer is not None and scorer.fit > 0.8
    assert on_slip(scorer.credit(this)) > 0.8


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=20), st.floats(-1, 1))
@settings(max_examples=200, deadline=None)
def test_decomposed_credit_sums_to_the_reward(raw: list[float], total: float) -> None:
    credit = share_rest(np.array(raw), total)
    assert credit.sum() == pytest.approx(total, abs=1e-9)
    assert (np.abs(credit) <= 1.0).all()


def test_the_scorers_credit_sums_to_the_reward() -> None:
    *past, this = lives(60)
    scorer = decompose.fit(past)
    assert scorer is not None
    assert sum(scorer.credit(this)) == pytest.approx(this.value)
    flipped = replace(this, value=-0.5 * this.value)
    assert sum(scorer.credit(flipped)) == pytest.approx(flipped.value)


def test_without_a_cause_little_credit_is_taken_from_the_outcome() -> None:
    """Rewards drawn by a coin: what contrasts are sure of by chance is little, and the scorer abstains."""
    rng = random.Random(1)
    sure, scored = [], 0
    for seed in range(12):
        *past, this = [replace(e, value=rng.choice([-1.0, 1.0])) for e in lives(30, seed)]
        answer = contrast(this, this.observations, [(e, e.observations) for e in past])
        sure.append(answer.sure if answer else 0.0)
        scorer = decompose.fit(past)
        scored += scorer is not None and scorer.fit >= CreditConfig().least_fit
    assert sum(sure) / len(sure) < 0.2
    assert scored <= 1


def test_too_few_episodes_give_next_to_no_credit() -> None:
    *past, this = lives(6)
    answer = contrast(this, this.observations, [(e, e.observations) for e in past])
    assert answer is None or answer.sure < 0.1
    assert decompose.fit(past) is None


# ----------------------------------------------------------------------------------------------- through the store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "s.db") as opened:
        yield opened


def a_case(episode: Episode, value: float, *more: Feedback) -> tuple[Case, Reward]:
    case = Case(position=1, episode=episode, feedback=(feedback("outcome", value=value), *more), touched_at=1.0)
    return case, Reward(episode_id=episode.id, created_at=1.0, value=value, confidence=0.9)


def logged(store: Store, n: int, **how: bool) -> random.Random:
    rng = random.Random(5)
    for i in range(n):
        episode, value = an_episode(f"e{i}", rng, **how)
        store.append(*episode.steps, Reward(episode_id=episode.id, created_at=1.0, value=value, confidence=0.9))
    return rng


def horizon(store: Store, **changes: object) -> HorizonCredit:
    return HorizonCredit(store, replace(CreditConfig(), **changes), RewardConfig())  # type: ignore[arg-type]


def test_the_first_method_with_an_answer_is_used_and_named(store: Store) -> None:
    rng = logged(store, 40)
    case, reward = a_case(*an_episode("new", rng))
    credit = horizon(store).assign(case, reward)
    assert set(credit.methods) == {"anchor"}
    assert credit.advantages[SLIP] == pytest.approx(reward.value, abs=0.05)
    assert sum(map(abs, credit.advantages)) == pytest.approx(abs(credit.advantages[SLIP]), abs=0.02)
    assert len(credit.reasons) == STEPS and "answered so ended well" in credit.reasons[SLIP]
    credit = horizon(store, order=("decomposition",)).assign(case, reward)
    assert set(credit.methods) == {"decomposition"}
    assert sum(credit.advantages) == pytest.approx(reward.value)
    plain = OutcomeCredit(RewardConfig()).assign(case, reward)
    assert horizon(store, order=()).assign(case, reward).advantages == plain.advantages


def test_what_was_said_of_a_step_outranks_what_is_inferred(store: Store) -> None:
    rng = logged(store, 40)
    episode, value = an_episode("new", rng)
    said = feedback("correction", "new", f"new-{SLIP + 1}", correction="go on")
    credit = horizon(store).assign(*a_case(episode, value, said))
    assert credit.methods[SLIP + 1] == "correction" and credit.advantages[SLIP + 1] == -1.0
    assert credit.methods[SLIP] == "anchor"


def test_short_episodes_and_little_traffic_keep_the_outcome_rule(store: Store) -> None:
    rng = logged(store, 3)
    case, reward = a_case(*an_episode("new", rng))
    plain = OutcomeCredit(RewardConfig()).assign(case, reward)
    assert horizon(store).assign(case, reward).methods == plain.methods
    short = replace(case, episode=replace(case.episode, steps=case.episode.steps[:5]))
    assert set(horizon(store).assign(short, reward).methods) == {"outcome"}


def test_forks_of_one_prompt_come_first(store: Store) -> None:
    rng = random.Random(0)
    for i in range(30):
        episode, value = an_episode(f"e{i}", rng)
        steps = tuple(replace(s, prompt_ids=(k,)) for k, s in enumerate(episode.steps))
        store.append(*steps, Reward(episode_id=episode.id, created_at=1.0, value=value, confidence=0.9))
    episode, value = an_episode("new", rng)
    steps = tuple(replace(s, prompt_ids=(k,)) for k, s in enumerate(episode.steps))
    credit = horizon(store).assign(*a_case(replace(episode, steps=steps), value))
    assert set(credit.methods) == {"fork"}
    assert credit.advantages[SLIP] == pytest.approx(value, abs=0.07)


def test_a_retracted_or_revised_reward_changes_the_history(store: Store) -> None:
    rng = logged(store, 40)
    case, reward = a_case(*an_episode("new", rng))
    credit = horizon(store)
    assert set(credit.assign(case, reward).methods) == {"anchor"}
    for i in range(40):
        store.append(Reward(episode_id=EpisodeId(f"e{i}"), created_at=2.0, value=None, confidence=0.0))
    assert "anchor" not in credit.assign(case, reward).methods
