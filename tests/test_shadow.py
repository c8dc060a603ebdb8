"""The shadow: which prompts, what is compared, what decides; and that restarts, abstentions and floods do nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradatim.app.answering import Replays
from gradatim.app.compose import build_loop, check_critics
from gradatim.config import Config, CriticConfig, CriticsConfig, EngineConfig, ReleaseConfig, ShadowConfig
from gradatim.errors import AdapterError, ConfigError
from gradatim.feedback.critics import opinion
from gradatim.nn.base import Base
from gradatim.release.comparison import GUARDS, Comparison, guards, is_malformed_call
from gradatim.release.prompts import Prompts
from gradatim.release.shadow import Judge, ShadowGate, as_answered
from gradatim.store import SqlShelf, SqlStore, open_store
from gradatim.testing.fakes import FakeEngine
from gradatim.types import (
    Adapter,
    AdapterId,
    Decision,
    Delta,
    Episode,
    Feedback,
    Move,
    Request,
    Sampling,
    ShadowPair,
    Stage,
    Step,
    StepId,
    Update,
    Verdict,
)

from .records import adapter, example, step

BEGAN = 10_000.0
LIVE, CANDIDATE = adapter(0), adapter(1, parent=0)
SHADOW = ShadowConfig(prompts=300, at_once=50)
CLEAN = (0.0, 0.0, 0.0, 0.0, 0.2)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(tmp_path / "s.db") as opened:
        opened.append(LIVE)
        yield opened


def prompts(store: SqlStore, n: int, label: str = "p", **fields: object) -> None:
    given = {"user": "", **fields}
    store.append(
        *(
            step(f"{label}{i}", f"{label}-e{i}", prompt_ids=(5, len(label), i), created_at=BEGAN - 1, **given)
            for i in range(n)
        )
    )


def begin(store: SqlStore, *taught: str) -> None:
    """The candidate comes to the shadow."""
    made = Update(id="u1", created_at=1.0, applied=True, parent_id=LIVE.id, example_ids=taught)
    known = Verdict(
        adapter_id=CANDIDATE.id, created_at=BEGAN, gate="replay", decision=Decision.PASS, evidence={"cases": 40.0}
    )
    store.append(made, CANDIDATE, known)
    store.move(
        Move(adapter_id=CANDIDATE.id, created_at=BEGAN, before=Stage.CANDIDATE, after=Stage.SHADOW, actor="test")
    )


class Arms:
    """Both adapters' answers, and a critic that says how good they are."""

    def __init__(self, candidate: Callable[[Step], str], live: Callable[[Step], str] = lambda _: "right") -> None:
        self.say = {CANDIDATE.id: candidate, LIVE.id: live}
        self.asked: list[tuple[str, str]] = []

    def __call__(self, of: Adapter, steps: Sequence[Step]) -> Sequence[Step]:
        self.asked += [(of.id, s.id) for s in steps]
        return [as_answered(s, of, text=self.say[of.id](s), logprobs=(-0.1, -0.1)) for s in steps]

    def judge(self, episode: Episode) -> Feedback | None:
        text = episode.steps[-1].text
        return None if text == "what?" else opinion(episode, text == "right")


def gate(
    store: SqlStore, arms: Arms, config: ShadowConfig = SHADOW, now: float = BEGAN, *, judged: bool = True
) -> ShadowGate:
    judge: Judge | None = arms.judge if judged else None
    return ShadowGate(store, SqlShelf(store.engines), Config(shadow=config), arms, judge, clock=lambda: now)


def run(shadow: ShadowGate, most: int = 20) -> Verdict:
    """Turns of the loop until it decides."""
    for _ in range(most):
        verdict = shadow.check(CANDIDATE, LIVE, LIVE)
        if verdict.decision is not Decision.WAIT:
            break
    return verdict


def of_digit(step: Step, wrong: int) -> bool:
    """A tenth of the prompts for every unit of ``wrong``."""
    return step.prompt_ids[2] % 10 < wrong


def test_one_that_answers_alike_moves_on_by_the_critics_word(store: SqlStore) -> None:
    prompts(store, 300)
    begin(store)
    verdict = run(
        gate(
            store,
            Arms(lambda s: "right" if of_digit(s, 8) else "wrong", lambda s: "right" if of_digit(s, 8) else "wrong"),
        )
    )
    assert verdict.decision is Decision.PASS
    assert verdict.reason.startswith("the shadow decided, by the critic")
    assert verdict.evidence["reward.gain"] == 0.0 and verdict.evidence["pairs"] >= SHADOW.least


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("wrong", "reward"),
        ("", "broken"),
        ("I'm sorry, no", "refused"),
        ('<tool_call>{"name": </tool_call>', "tool calls"),
    ],
)
def test_a_worse_one_is_out_and_without_a_critic_by_its_looks(store: SqlStore, answer: str, said: str) -> None:
    prompts(store, 300)
    begin(store)
    arms = Arms(lambda s: answer if of_digit(s, 3) else "right")
    verdict = run(gate(store, arms, judged=said == "reward"))
    assert verdict.decision is Decision.FAIL
    assert verdict.reason.startswith(f"{said}: worse than the live adapter")


def test_without_a_critic_only_looks_are_compared_and_the_verdict_says_so(store: SqlStore) -> None:
    prompts(store, 300)
    begin(store)
    verdict = run(gate(store, Arms(lambda _: "wrong"), judged=False))
    assert verdict.decision is Decision.PASS and "what answers look like" in verdict.reason
    assert "reward.gain" not in verdict.evidence


def test_harm_to_one_skill_is_not_paid_for_by_another(store: SqlStore) -> None:
    prompts(store, 60, "rare", skill="rare")
    prompts(store, 240, "common", skill="common")
    begin(store)
    arms = Arms(
        lambda s: "wrong" if s.skill == "rare" else "right",
        lambda s: "right" if s.skill == "rare" or of_digit(s, 5) else "wrong",
    )
    assert run(gate(store, arms)).reason.startswith("reward: worse")


@pytest.mark.parametrize(("undecided", "decision"), [("reject", Decision.FAIL), ("pairs", Decision.PASS)])
def test_what_is_undecided_moves_on_only_where_pairs_may_decide(
    store: SqlStore, undecided: Literal["reject", "pairs"], decision: Decision
) -> None:
    prompts(store, 50)
    begin(store)
    config = replace(SHADOW, prompts=50, undecided=undecided)
    verdict = run(gate(store, Arms(lambda _: "right"), config))
    assert verdict.decision is decision
    assert ("40 offline pairs decided" in verdict.reason) == (decision is Decision.PASS)


def test_too_few_prompts_wait_for_new_ones_until_time_is_up(store: SqlStore) -> None:
    prompts(store, 50)
    begin(store)
    arms = Arms(lambda _: "right")
    shadow = gate(store, arms)
    assert run(shadow).decision is Decision.WAIT
    prompts(store, 250, "later")
    assert run(shadow).decision is Decision.PASS
    assert len(arms.asked) == len(set(arms.asked))
    late = gate(store, arms, replace(SHADOW, least=10_000), now=BEGAN + SHADOW.horizon_s + 1)
    assert "undecided" in run(late).reason


def test_a_restart_at_any_turn_changes_nothing_and_asks_nothing_twice(tmp_path: Path) -> None:
    rng = random.Random(3)
    wrong = {i for i in range(300) if rng.random() < 0.1}
    told: list[Verdict] = []
    for always_new in (False, True):
        with open_store(tmp_path / f"{always_new}.db") as store:
            store.append(LIVE)
            prompts(store, 300)
            begin(store)
            arms = Arms(lambda s: "wrong" if s.prompt_ids[2] in wrong else "right")
            config = replace(SHADOW, at_once=7)
            shadow = gate(store, arms, config)
            for _ in range(60):
                shadow = gate(store, arms, config) if always_new else shadow
                verdict = shadow.check(CANDIDATE, LIVE, LIVE)
                if verdict.decision is not Decision.WAIT:
                    break
            told.append(verdict)
            assert len(arms.asked) == len(set(arms.asked))
    assert told[0] == told[1] and told[0].decision is not Decision.WAIT


def test_a_candidate_of_another_parent_or_with_damaged_files_is_out(store: SqlStore) -> None:
    prompts(store, 10)
    begin(store)
    assert "no longer live" in gate(store, Arms(str)).check(CANDIDATE, adapter(3, parent=0), LIVE).reason

    broken = [LIVE.id, CANDIDATE.id]

    def damaged(of: Adapter, steps: Sequence[Step]) -> Sequence[Step]:
        if of.id in broken:
            raise AdapterError(f"{of.id}: digest mismatch")
        return [as_answered(s, of) for s in steps]

    shadow = ShadowGate(store, SqlShelf(store.engines), Config(shadow=SHADOW), damaged, clock=lambda: BEGAN)
    assert shadow.check(CANDIDATE, LIVE, LIVE).decision is Decision.FAIL
    broken.pop()
    with pytest.raises(AdapterError, match="agent@0"):  # the live one's files are no fault of the candidate
        shadow.check(CANDIDATE, LIVE, LIVE)


# ------------------------------------------------------------------------------------------------ prompts


def test_prompts_are_users_own_each_once_and_none_that_was_taught(store: SqlStore) -> None:
    store.append(
        step("a", prompt_ids=(1,)),
        step("again", prompt_ids=(1,)),
        step("pinned", prompt_ids=(2,), stage="pinned"),
        step("side", prompt_ids=(3,), trainable=False),
        step("other", prompt_ids=(4,), adapter_id=AdapterId("somebody@0")),
        step("taught", prompt_ids=(5,)),
        example("x", prompt_ids=(5,)),
    )
    begin(store, "x")
    chosen = Prompts(store, CANDIDATE, replace(SHADOW, prompts=5), store.end())
    assert [s.id for _, s in chosen.take(0, 5)] == ["again"]


def test_one_user_cannot_flood_the_prompts(store: SqlStore) -> None:
    prompts(store, 100, "mallory", user="mallory")
    prompts(store, 40, "u")
    begin(store)
    chosen = [s.id for _, s in Prompts(store, CANDIDATE, replace(SHADOW, prompts=40), store.end()).take(0, 40)]
    assert sum(i.startswith("mallory") for i in chosen) <= 5


# ------------------------------------------------------------------------------------------ the comparison


def pair(gain: float, **fields: Any) -> ShadowPair:
    lives = 0.0 if gain > 0 else 1.0 if gain < 0 else 0.5
    given: dict[str, Any] = {"guards": CLEAN, "live_guards": CLEAN, "reward": lives + gain, "live_reward": lives}
    return ShadowPair(adapter_id=CANDIDATE.id, step_id=StepId("s"), number=0, skill="s", **(given | fields))


def decided(pairs: Sequence[ShadowPair], config: ShadowConfig = SHADOW) -> str:
    comparison = Comparison(config, ["s"], judged=True)
    for one in pairs:
        comparison.take(one)
    return "harm" if comparison.harm else "proven" if comparison.proven else "open"


def stream(effect: float, n: int, seed: int, changed: float = 0.2) -> list[ShadowPair]:
    rng = random.Random(seed)
    draws = (rng.random() for _ in range(n))
    return [pair(1.0 if u < (changed + effect) / 2 else -1.0 if u < changed else 0.0) for u in draws]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([-0.2, -0.15, 0.15, 0.2]))
def test_swapping_the_adapters_swaps_the_decision(seed: int, effect: float) -> None:
    plain = stream(effect, 400, seed)
    swapped = [replace(p, reward=p.live_reward, live_reward=p.reward) for p in plain]
    assert {decided(plain), decided(swapped)} == {"harm", "proven"}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(-0.1, 0.1),
    st.lists(
        st.tuples(st.integers(0, 250), st.sampled_from([None, 0.0, 1.0]), st.sampled_from([None, 0.0, 1.0])),
        min_size=1,
        max_size=40,
    ),
)
def test_adding_abstentions_never_moves_a_candidate_on(
    seed: int, effect: float, added: list[tuple[int, float | None, float | None]]
) -> None:
    pairs = stream(effect, 250, seed)
    more = list(pairs)
    for at, ours, lives in added:
        if ours is None or lives is None:
            more.insert(at, pair(0.0, reward=ours, live_reward=lives))
    if decided(more) == "proven":
        assert decided(pairs) == "proven"


def test_one_that_makes_itself_unjudgeable_where_it_fails_gains_nothing() -> None:
    honest = stream(-0.15, 300, 1)
    hidden = [replace(p, reward=None) if p.reward == 0.0 and p.live_reward == 1.0 else p for p in honest]
    assert decided(honest) == decided(hidden) == "harm"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_cannot_be_compared_is_harm(value: float) -> None:
    comparison = Comparison(SHADOW, (), judged=False)
    comparison.take(pair(0.0, guards=(value, *CLEAN[1:])))
    assert "cannot be compared" in comparison.harm


def test_error_rates_by_simulation() -> None:
    """At the edge of the margin at most alpha pass; of those that changed nothing at most alpha_worse are out."""
    runs = 80
    edge = [decided(stream(-SHADOW.margin, 300, seed, changed=0.1)) for seed in range(runs)]
    same = [decided(stream(0.0, 300, 1000 + seed, changed=0.05)) for seed in range(runs)]
    bad = [decided(stream(-0.2, 300, 2000 + seed)) for seed in range(runs)]
    assert edge.count("proven") <= 5  # 2.5 % of 80, and chance
    assert same.count("harm") <= 8 and same.count("proven") > same.count("harm")
    assert bad.count("proven") == 0 and bad.count("harm") >= 0.9 * runs


def test_how_answers_look() -> None:
    told = guards(step(text="As an AI, no", finish_reason="length", completion_ids=(1,) * 8), 8.0, unsound=True)
    assert dict(zip(GUARDS, told, strict=True)) == {
        "broken": 0.0,
        "cut short": 1.0,
        "refused": 1.0,
        "tool calls": 1.0,
        "length": 0.5,
    }
    nan = step(text="fine", logprobs=(float("nan"), -0.1))
    assert guards(nan, 8.0, unsound=False)[0] == 1.0
    texts = [
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        "none",
        '<tool_call>{"name": 3}</tool_call>',
        "<tool_call>[1]",
    ]
    assert [is_malformed_call(step(text=t)) for t in texts] == [False, False, True, True]


# ------------------------------------------------------------------------------------ answers of an engine


def test_requests_are_answered_anew_as_they_were_asked() -> None:
    engine = FakeEngine("one two three", context=5)
    steps = [
        step("a", sampling={"temperature": 0.5, "max_tokens": 99, "seed": 7, "stop": ["x"], "logit_bias": {"3": -1.0}}),
        step("b", sampling={"max_tokens": None}),
        step("long", prompt_ids=tuple(range(50))),
    ]
    answered = Replays(engine, max_tokens=8)(LIVE, steps)
    assert [s and s.text for s in answered] == ["one two three", "one two three", None]
    first, second = (request.sampling for request, _ in engine.requests[:2])
    assert (first.temperature, first.max_tokens, first.seed, first.stop) == (0.5, 8, 7, ("x",))
    assert second.seed is not None and second.temperature == 1.0
    assert answered[0] is not None and answered[0].adapter_id == LIVE.id and answered[0].prompt_ids == (1, 2, 3)


def test_a_greedy_answer_of_a_real_engine_comes_again(tiny_base: Base, tmp_path: Path) -> None:
    from gradatim.engine.transformers import TransformersEngine
    from gradatim.nn.render import Renderer

    engine = TransformersEngine(tiny_base, Renderer(tiny_base), EngineConfig(threads=1), tmp_path)
    try:
        greedy = Sampling(max_tokens=6, temperature=0.0)

        async def answer() -> tuple[int, ...]:
            events = engine.generate(Request(prompt=(5, 6, 7), sampling=greedy), LIVE.id)
            return tuple([t.id async for e in events if isinstance(e, Delta) for t in e.tokens])

        ids = asyncio.run(answer())
        asked = step(prompt_ids=(5, 6, 7), sampling={"temperature": 0.0, "max_tokens": 6})
        frozen = adapter(0, base_sha256=tiny_base.sha256)
        again = Replays(engine, max_tokens=16)(frozen, [asked])[0]
        assert again is not None and again.completion_ids == ids
    finally:
        engine.close()


def test_a_critic_that_teaches_may_not_judge_the_shadow() -> None:
    critic = CriticConfig(use="tests.critics:says_good")
    with pytest.raises(ConfigError, match="gives feedback to learn from"):
        check_critics(Config(critics=CriticsConfig(run=(critic,)), shadow=ShadowConfig(critic=critic)))


@pytest.mark.parametrize(
    ("given", "way"),
    [
        ({}, "candidate live"),
        ({"mode": "propose"}, "candidate shadow live"),
        ({"shadow": ShadowConfig(prompts=9)}, "candidate shadow live"),
        ({"release": ReleaseConfig(canary=True), "shadow": ShadowConfig(prompts=9)}, "candidate shadow canary live"),
    ],
)
def test_the_way_up_is_what_is_configured(store: SqlStore, tiny_base: Base, given: dict[str, Any], way: str) -> None:
    with open_store(store.engines.where) as own:
        loop = build_loop(Config(data_dir=Path(store.engines.where).parent, **given), own, tiny_base)
    assert [*map(str, loop.path), str(list(loop.path.values())[-1])] == way.split()
    assert set(loop.path) <= set(loop.gates)
