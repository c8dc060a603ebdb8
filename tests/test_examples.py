from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradatim.config import RewardConfig
from gradatim.credit import OutcomeCredit
from gradatim.examples import ExampleBuilder, is_withdrawn, state_of
from gradatim.protocols import Store
from gradatim.reward import WeightedReward
from gradatim.store import open_store
from gradatim.types import Case, Example, Message, Step, StepId

from .records import case_of, example, feedback, step


class Letters:
    """One token a letter, and 0 for the end."""

    def completion_ids(self, text: str) -> tuple[int, ...]:
        return (*(ord(c) for c in text), 0)

    def hinted_ids(self, prompt_ids: Sequence[int], messages: Sequence[Message], hint: str) -> tuple[int, ...]:
        return (*prompt_ids, *(ord(c) for c in hint)) if messages else ()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "s.db") as opened:
        yield opened


def built(store: Store, case: Case, retain_every: int = 0, hint_corrections: bool = False) -> list[Example]:
    reward = WeightedReward(RewardConfig()).score(case)
    credit = OutcomeCredit(RewardConfig()).assign(case, reward)
    builder = ExampleBuilder(store, Letters(), retain_every=retain_every, hint_corrections=hint_corrections)
    return list(builder.build(case, reward, credit))


def asked(step_id: str = "s0", **given: Any) -> Step:
    return step(step_id, messages=({"role": "user", "content": "?"},), **given)


def test_a_correction_becomes_a_pair_over_the_captured_tokens(store: Store) -> None:
    (pair,) = built(store, case_of(feedback("correction", step_id="s0", correction="ab")))
    assert (pair.kind, pair.origin) == ("pair", "correction")
    assert pair.chosen_ids == (97, 98, 0)
    assert pair.rejected_ids == (7, 8)
    assert pair.prompt_ids == (1, 2, 3)


def test_a_correction_that_repeats_the_answer_confirms_it(store: Store) -> None:
    (good,) = built(store, case_of(feedback("correction", step_id="s0", correction=" click 2 ")))
    assert good.kind == "imitate"


def test_success_is_imitated_and_failure_avoided(store: Store) -> None:
    (good,) = built(store, case_of(feedback("outcome", value=1.0)))
    assert (good.kind, good.origin, good.verified) == ("imitate", "success", True)
    (bad,) = built(store, case_of(feedback("outcome", value=-1.0)))
    assert (bad.kind, bad.origin, bad.verified) == ("avoid", "failure", False)
    (liked,) = built(store, case_of(feedback("score", value=1.0), feedback("outcome", value=None)))
    assert (liked.kind, liked.verified) == ("imitate", False), "an unknown outcome verifies nothing"


def test_opposite_answers_to_the_same_state_become_a_pair(store: Store) -> None:
    store.append(example("earlier", chosen_ids=(5, 6), state=state_of((1, 2, 3))))
    (pair,) = built(store, case_of(feedback("outcome", value=-1.0)))
    assert (pair.chosen_ids, pair.rejected_ids) == ((5, 6), (7, 8))


def test_side_calls_and_broken_off_answers_teach_nothing(store: Store) -> None:
    steps = (step("s0", trainable=False), step("s1", finish_reason="aborted"))
    assert built(store, case_of(feedback("outcome", value=1.0), steps=steps)) == []


def test_a_preference_takes_the_loser_from_its_own_step(store: Store) -> None:
    store.append(step("other", episode="e2", completion_ids=(9,)))
    (pair,) = built(store, case_of(feedback("preference", step_id="s0", rejected_id=StepId("other"))))
    assert (pair.chosen_ids, pair.rejected_ids, pair.origin) == ((7, 8), (9,), "preference")


def test_retracted_feedback_withdraws_the_example(store: Store) -> None:
    store.append(*built(store, case_of(feedback("outcome", value=1.0))))
    (gone,) = built(store, case_of(position=2))
    assert is_withdrawn(gone)
    store.append(gone)
    assert built(store, case_of(position=3)) == []


def test_feedback_that_changes_nothing_makes_no_second_example(store: Store) -> None:
    case = case_of(feedback("outcome", value=1.0))
    store.append(*built(store, case))
    again = replace(case, position=2, feedback=(*case.feedback, feedback("comment", comment="nice")))
    assert built(store, again) == []


def test_some_states_are_kept_for_the_gate_and_always_the_same(store: Store) -> None:
    steps = tuple(step(f"s{i}", prompt_ids=(i,), completion_ids=(i, 8)) for i in range(40))
    case = case_of(feedback("outcome", value=1.0), steps=steps)
    retained = {e.state for e in built(store, case, retain_every=4) if e.retained}
    assert 3 <= len(retained) <= 20
    assert retained == {e.state for e in built(store, case, retain_every=4) if e.retained}


def test_a_failure_is_never_kept_for_the_gate(store: Store) -> None:
    assert not any(e.retained for e in built(store, case_of(feedback("outcome", value=-1.0)), retain_every=1))


def test_what_led_on_is_chosen_over_what_only_came_back_to_the_same_state(store: Store) -> None:
    steps = (
        step("s0", prompt_ids=(1,), completion_ids=(5,)),
        step("s1", prompt_ids=(1,), completion_ids=(6,)),
        step("s2", prompt_ids=(2,), completion_ids=(7,)),
    )
    first, second, third = built(store, case_of(feedback("outcome", value=1.0), steps=steps))
    assert (first.chosen_ids, first.rejected_ids) == ((6,), (5,))
    assert (second.chosen_ids, second.rejected_ids) == ((6,), ())
    assert third.kind == "imitate"


HINTED = (1, 2, 3, ord("n"), ord("o"))


def test_a_comment_on_a_step_becomes_a_hint_to_its_own_answer(store: Store) -> None:
    said = feedback("comment", step_id="s0", comment="no", confidence=0.5)
    (hint,) = built(store, case_of(said, steps=(asked(),)))
    assert (hint.kind, hint.origin, hint.hint_ids) == ("hint", "hint", HINTED)
    assert (hint.chosen_ids, hint.rejected_ids, hint.logprobs) == ((), (7, 8), (-0.5, -0.25))
    assert (hint.weight, hint.instructive, hint.retained) == (0.5, True, False)


def test_the_words_beside_a_bad_score_are_a_hint_and_the_newest_count(store: Store) -> None:
    first = feedback("comment", step_id="s0", comment="yes", created_at=1.0)
    score = feedback("score", step_id="s0", value=-1.0, comment="no", created_at=2.0)
    (hint,) = built(store, case_of(score, first, steps=(asked(),)))
    assert (hint.kind, hint.hint_ids) == ("hint", HINTED)


def test_what_is_known_better_outranks_a_hint(store: Store) -> None:
    said = feedback("comment", step_id="s0", comment="no")
    correction = feedback("correction", step_id="s0", correction="ab")
    (pair,) = built(store, case_of(said, correction, steps=(asked(),)))
    assert (pair.kind, pair.origin, pair.hint_ids) == ("pair", "correction", ())
    (good,) = built(store, case_of(said, feedback("outcome", value=1.0), steps=(asked(),)))
    assert (good.kind, good.origin) == ("imitate", "success")
    store.append(example("earlier", chosen_ids=(5, 6), state=state_of((1, 2, 3))))
    (paired,) = built(store, case_of(said, feedback("outcome", value=-1.0), steps=(asked(),)))
    assert (paired.kind, paired.origin, paired.chosen_ids) == ("pair", "failure", (5, 6))


def test_a_comment_without_a_place_in_the_prompt_or_on_an_episode_leaves_what_else_is_known(store: Store) -> None:
    said = feedback("comment", step_id="s0", comment="no")
    (bad,) = built(store, case_of(said, feedback("outcome", value=-1.0)))  # no messages: a plain prompt
    assert bad.kind == "avoid"
    assert built(store, case_of(said)) == []
    assert built(store, case_of(feedback("comment", comment="no"), steps=(asked(),))) == []


def test_a_new_comment_revises_the_hint(store: Store) -> None:
    said = feedback("comment", step_id="s0", comment="no")
    store.append(*built(store, case_of(said, steps=(asked(),))))
    assert built(store, case_of(said, steps=(asked(),), position=2)) == []
    (again,) = built(store, case_of(replace(said, comment="oh"), steps=(asked(),), position=2))
    assert again.hint_ids == (1, 2, 3, ord("o"), ord("h"))


def test_a_correction_is_a_hint_too_where_its_loss_asks_for_one(store: Store) -> None:
    case = case_of(feedback("correction", step_id="s0", correction="ab"), steps=(asked(),))
    (pair,) = built(store, case, hint_corrections=True)
    assert (pair.kind, pair.chosen_ids) == ("pair", (97, 98, 0))
    assert "".join(map(chr, pair.hint_ids[3:])).endswith("ab")


def test_the_confidence_of_a_preference_is_its_label(store: Store) -> None:
    store.append(step("other", episode="e2", completion_ids=(9,)))
    for confidence, label in ((None, 1.0), (1.0, 1.0), (0.5, 0.75)):
        said = feedback("preference", step_id="s0", rejected_id=StepId("other"), confidence=confidence)
        (pair,) = built(store, case_of(said))
        assert (pair.label, pair.weight) == (label, 1.0)
