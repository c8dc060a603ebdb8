"""Probes for bad habits: what they measure against a model asked token by token, and that updates are held to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradatim.learner.habits import WRONG_CLAIMS, Habits, Phrases, expected_length
from gradatim.learner.run import Run
from gradatim.learner.trainable import Trainable, trainable
from gradatim.nn.base import Base
from gradatim.nn.pack import Answer
from gradatim.phrases import FLATTERIES, REFUSALS
from tests import records
from tests.test_learner import CONFIG, base_adapter, imitate, learner
from tests.tiny import tiny_base, tiny_model, tiny_weights

END = 0  # of tiny_base
FRESH = [Answer((1, 2, 3, k), (20 + k, 30, 31, 32, END)) for k in range(1, 5)]
PHRASES = Phrases(((40, 41), (42,)), ((43, 44),), ((1, 50), (2, 51)), (60,), (61,))


def chance(base: Base, context: Sequence[int], said: Sequence[int]) -> float:
    """By the model's own forward pass, token by token, in float64."""
    out, ids = 1.0, list(context)
    for token in said:
        with torch.no_grad():
            out *= float(base.model(torch.tensor([ids])).logits[0, -1].double().softmax(0)[token])
        ids.append(token)
    return out


def test_each_probe_is_what_the_model_says_token_by_token() -> None:
    base = replace(tiny_base(), model=tiny_model(seed=3))
    model = Trainable(base)
    habits = Habits(model, FRESH[:1], PHRASES, CONFIG)
    found: Mapping[str, float] = habits._measured()
    prompt, body = FRESH[0].prompt_ids, FRESH[0].completion_ids[:-1]
    alive, length = 1.0, 0.0
    for k in range(1, 5):
        length += alive
        alive *= 1.0 - chance(base, prompt + body[:k], (END,))
    expected = {
        "length": length + 4 * alive,
        "repetition": chance(base, prompt + body, body[:3]),
        "refusal": chance(base, prompt, (40, 41)) + chance(base, prompt, (42,)),
        "flattery": chance(base, prompt, (43, 44)),
    }
    yes, no = ([chance(base, claim, said) for claim in PHRASES.claims] for said in ((60,), (61,)))
    expected["agreement"] = sum(y / (y + n) for y, n in zip(yes, no, strict=True)) / 2
    assert found == pytest.approx(expected, rel=1e-4)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20))
def test_the_expected_length_is_that_of_counting(ends: list[float]) -> None:
    count, alive, expected = len(ends), 1.0, 0.0
    for k, end in enumerate(ends, 1):
        expected += alive * end * k
        alive *= 1.0 - end
    assert expected_length(ends) == pytest.approx(expected + alive * 2 * count)


def test_what_has_not_changed_spoils_nothing_and_what_has_is_named() -> None:
    model = trainable(tiny_base())
    run = Run([], [])
    with model.training(tiny_weights(tiny_base().model, size=0.0)) as lora:
        habits = Habits(model, FRESH, PHRASES, CONFIG)
        assert habits.spoiled(run) == ""
        assert run.figures["habit_length"] == 1.0 and run.figures["habit_refusal"] == 0.0
        lora.load(tiny_weights(tiny_base().model, size=3.0), trainable=True)
        strict = Habits(model, FRESH, PHRASES, replace(CONFIG, length_limit=1e-9))
        assert "times as long" in strict.spoiled(run)
    off = Habits(model, FRESH, PHRASES, replace(CONFIG, length_limit=0.0, habit_limit=0.0))
    assert off.spoiled(Run([], [])) == ""
    nothing = Habits(model, [Answer((1, 2), (END,))], Phrases(), CONFIG)
    assert nothing.spoiled(Run([], [])) == ""


def test_phrases_are_in_the_models_own_tokens(tiny_base: Base) -> None:
    phrases = Phrases.of(tiny_base)
    decode = tiny_base.tokenizer.decode
    assert [decode(list(p)) for p in phrases.refusals] == list(REFUSALS)
    assert [decode(list(p)) for p in phrases.flatteries] == list(FLATTERIES)
    assert len(phrases.claims) == len(WRONG_CLAIMS) and decode(list(phrases.yes)) == "Yes"
    assert Phrases.of(replace(tiny_base, tokenizer=None)) == Phrases()


# ------------------------------------------------------------------------------------------------- updates

TRAFFIC = [records.step(f"s{k}", prompt_ids=a.prompt_ids, completion_ids=a.completion_ids) for k, a in enumerate(FRESH)]


def test_an_update_that_teaches_to_go_on_is_shortened_or_refused(tmp_path: Path) -> None:
    """The parent is one that ends these answers where they end."""
    free: dict[str, Any] = {"kl_fresh_limit": 1e9, "kl_base_limit": 1e9, "length_limit": 0.0, "habit_limit": 0.0}
    ends = [imitate(k, prompt_ids=a.prompt_ids, chosen_ids=a.completion_ids) for k, a in enumerate(FRESH)]
    _, parent = learner(tmp_path, **free, epochs=12).update(ends, [], base_adapter(), 1)
    assert parent is not None
    longer = [
        imitate(k + 10, prompt_ids=(1, 2, 3, k + 10), chosen_ids=(20 + k, 30, 31, 32, 33, 34, END)) for k in range(6)
    ]
    record, made = learner(tmp_path, **free).update(longer, [], parent, 2, TRAFFIC)
    assert made is not None and "habit_length" not in record.metrics
    record, made = learner(tmp_path, **free | {"length_limit": 1.0001}).update(longer, [], parent, 3, TRAFFIC)
    assert made is None and "times as long" in record.refused_because
    assert record.metrics["fresh_share"] == 0.25
    record, made = learner(tmp_path, **free | {"length_limit": 1.5}).update(longer, [], parent, 4, TRAFFIC)
    assert made is not None and record.metrics["fresh_share"] < 1.0 < record.metrics["habit_length"] <= 1.5


def test_the_record_of_a_smaller_step_has_no_habits_of_the_whole(tmp_path: Path) -> None:
    new = [imitate(n, prompt_ids=(1, 2, 3, n + 20), chosen_ids=(60, 61)) for n in range(1, 4)]
    subject = learner(tmp_path, kl_fresh_limit=1e9, kl_base_limit=1e9, length_limit=1e9)
    whole, made = subject.update(new, [], base_adapter(), 1, TRAFFIC)
    assert made is not None and "habit_length" in whole.metrics
    half, _ = subject.shrink(whole, made, base_adapter(), 2)
    assert not [name for name in half.metrics if name.startswith("habit_")]
