from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradatim.config import RewardConfig
from gradatim.credit import OutcomeCredit
from gradatim.reward import WeightedReward
from gradatim.types import Case, Credit, Feedback, FeedbackKind, Reward, StepId

from .records import case_of, feedback, step


def judged(case: Case, config: RewardConfig | None = None) -> Reward:
    return WeightedReward(config or RewardConfig(), clock=lambda: 1.0).score(case)


def credited(case: Case) -> Credit:
    config = RewardConfig()
    return OutcomeCredit(config, clock=lambda: 1.0).assign(case, judged(case))


def test_an_outcome_decides() -> None:
    assert judged(case_of(feedback("outcome", value=1.0))).value == 1.0
    assert judged(case_of(feedback("outcome", value=-1.0))).value == -1.0


def test_an_unknown_outcome_is_not_rounded_to_anything() -> None:
    reward = judged(case_of(feedback("outcome", value=None)))
    assert reward.value is None
    assert "unknown" in reward.reason


def test_opinions_that_cancel_abstain() -> None:
    reward = judged(case_of(feedback("score", value=1.0), feedback("score", value=-1.0, source="human:bob")))
    assert reward.value is None
    assert "disagree" in reward.reason


def test_a_weak_source_alone_is_too_little_evidence() -> None:
    config = RewardConfig(min_weight=0.5)
    assert judged(case_of(feedback("score", value=1.0, source="implicit:click")), config).value is None


def test_sources_weigh_by_their_family() -> None:
    reward = judged(case_of(feedback("outcome", value=1.0), feedback("score", value=-1.0, source="implicit:x")))
    assert reward.value == pytest.approx((1.0 - 0.25) / 1.25)


def test_no_feedback_left_abstains() -> None:
    assert judged(case_of()).value is None


def test_a_correction_alone_says_nothing_of_the_episode() -> None:
    assert judged(case_of(feedback("correction", step_id="s0", correction="click 1"))).value == 0.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["score", "outcome"]),
            st.none() | st.floats(-1, 1),
            st.sampled_from(["human:a", "critic:x", "implicit:y", "nobody:z"]),
            st.none() | st.floats(0.01, 1.0),
        ),
        max_size=6,
    )
)
def test_a_reward_is_in_range_or_abstained(
    opinions: list[tuple[FeedbackKind, float | None, str, float | None]],
) -> None:
    reward = judged(case_of(*(feedback(k, value=v, source=s, confidence=c) for k, v, s, c in opinions)))
    assert 0.0 <= reward.confidence <= 1.0
    assert reward.value is None or -1.0 <= reward.value <= 1.0
    assert reward.value is not None or reward.reason.startswith("abstained")


def three_steps(*given_feedback: Feedback) -> Case:
    return case_of(
        *given_feedback, steps=tuple(step(f"s{i}", prompt_ids=(i,), completion_ids=(i, 8)) for i in range(3))
    )


def test_success_is_shared_in_full() -> None:
    assert credited(three_steps(feedback("outcome", value=1.0))).advantages == (1.0, 1.0, 1.0)


def test_failure_is_divided_over_the_steps() -> None:
    assert credited(three_steps(feedback("outcome", value=-1.0))).advantages == pytest.approx((-1 / 3,) * 3)


def test_a_corrected_step_takes_the_blame_and_the_others_the_success() -> None:
    credit = credited(three_steps(feedback("outcome", value=1.0), feedback("correction", step_id="s1", correction="x")))
    assert credit.advantages == (1.0, -1.0, 1.0)
    assert credit.methods == ("outcome", "correction", "outcome")


def test_a_failure_that_corrections_explain_blames_no_other_step() -> None:
    credit = credited(
        three_steps(feedback("outcome", value=-1.0), feedback("correction", step_id="s1", correction="x"))
    )
    assert credit.advantages == (0.0, -1.0, 0.0)


def test_a_correction_that_says_what_the_answer_said_confirms_it() -> None:
    case = three_steps(feedback("outcome", value=-1.0), feedback("correction", step_id="s1", correction="x"))
    steps = tuple(replace(s, text=" x\n") if s.id == "s1" else s for s in case.episode.steps)
    credit = credited(replace(case, episode=replace(case.episode, steps=steps)))
    assert credit.advantages == pytest.approx((-1 / 3, 1.0, -1 / 3))
    assert credit.methods == ("outcome", "correction", "outcome") and "confirmed" in credit.reasons[1]


def test_a_score_of_a_step_outranks_the_outcome() -> None:
    credit = credited(three_steps(feedback("outcome", value=1.0), feedback("score", step_id="s2", value=-1.0)))
    assert credit.advantages == (1.0, 1.0, -1.0)
    assert credit.step_ids == (StepId("s0"), StepId("s1"), StepId("s2"))


def test_a_step_after_which_the_same_state_came_back_is_blamed_in_a_success() -> None:
    steps = tuple(step(f"s{i}", prompt_ids=(state,), completion_ids=(i, 8)) for i, state in enumerate((1, 1, 2)))
    credit = credited(case_of(feedback("outcome", value=1.0), steps=steps))
    assert credit.advantages == (-1.0, 1.0, 1.0)
    assert credit.methods == ("came back", "outcome", "outcome")


def test_a_step_that_repeats_the_one_before_gets_no_credit() -> None:
    steps = (step("s0", prompt_ids=(1,)), step("s1", prompt_ids=(2,)), step("s2", prompt_ids=(3,), completion_ids=(9,)))
    success = feedback("outcome", value=1.0)
    credit = credited(case_of(success, steps=steps))
    assert credit.advantages == (1.0, 0.0, 1.0)
    assert credit.methods == ("outcome", "repeated", "outcome")
    corrected = credited(case_of(success, feedback("correction", step_id="s0", correction="x"), steps=steps))
    assert corrected.advantages == (-1.0, 1.0, 1.0)  # the first one was never carried out
