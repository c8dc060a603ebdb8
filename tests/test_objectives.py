"""The table from feedback to losses: what is there, what each loss makes of an example, and that all of them learn."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from gradatim.config import LearnerConfig, LossConfig, load
from gradatim.errors import ConfigError
from gradatim.learner.batch import Item, fit
from gradatim.learner.objectives import Objectives, Scores, route
from gradatim.nn.pack import Answer, Scored
from gradatim.types import Example
from tests.test_learner import CONFIG, applied, base_adapter, imitate, learner, pair
from tests.tiny import VOCABULARY

HINT = (1, 2, 3, 50, 51, 4, 1)


def choices(kind: str) -> list[str]:
    """The names that a field's type allows."""
    found = get_type_hints(LossConfig)[kind]
    return [n for part in get_args(found) for n in (get_args(part) or (part,))]


EVERY = [(f.name, name) for f in fields(LossConfig) for name in choices(f.name)]


def hint(number: int = 1, **given: Any) -> Example:
    return pair(number, **({"chosen_ids": (), "origin": "hint", "hint_ids": (*HINT, number)} | given))


def avoid(number: int = 1, **given: Any) -> Example:
    return pair(number, **({"chosen_ids": (), "origin": "failure"} | given))


OF_KIND = {
    "correction": pair(1, hint_ids=HINT),
    "preference": pair(1, origin="preference"),
    "pair": pair(1, origin="success", logprobs=(-2.0, -3.0)),
    "success": imitate(1, origin="success", logprobs=(-2.0, -3.0)),
    "score": imitate(1, origin="score"),
    "failure": avoid(1),
    "hint": hint(1),
}


def item(example: Example) -> Item:
    fitted = fit(example, 64, VOCABULARY)
    assert isinstance(fitted, Item), fitted
    return fitted


def table(kind: str, name: str) -> LossConfig:
    given: dict[str, Any] = {kind: name}
    return LossConfig(**given)


def config(kind: str, name: str, **given: Any) -> LearnerConfig:
    return replace(CONFIG, losses=table(kind, name), **given)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def value(
    objectives: Objectives, example: Example, now: list[Tensor], before: list[Tensor], teacher: Tensor | None = None
) -> float:
    return float(objectives.loss(Scores(item(example), now, before, teacher), lambda _name, _value: None))


def unscored(answers: Any) -> list[Scored]:
    return [Scored(torch.zeros(len(a.completion_ids)), torch.zeros(len(a.completion_ids))) for a in answers]


# ------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize("kind", OF_KIND)
def test_examples_are_told_apart_by_the_feedback_they_came_from(kind: str) -> None:
    assert route(item(OF_KIND[kind])) == kind
    assert set(OF_KIND) == {f.name for f in fields(LossConfig)}


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_loss_that_can_be_configured_is_there(kind: str, name: str) -> None:
    objectives = Objectives(config(kind, name))
    assert objectives.of(item(OF_KIND[kind])) is not None


def test_an_unknown_loss_is_refused_with_the_list_of_what_there_is() -> None:
    with pytest.raises(
        ConfigError, match=r"learner\.losses\.score.*'sft', 'kto', 'apo_zero', 'policy_gradient' or 'dr_grpo'"
    ):
        load(overrides={"learner": {"losses": {"score": "dpo"}}}, env={})
    with pytest.raises(ConfigError, match=r"learner\.losses\.thumb: .*correction, preference, pair, success, score"):
        load(overrides={"learner": {"losses": {"thumb": "kto"}}}, env={})
    with pytest.raises(ConfigError, match=r"learner\.label_noise: .*less than 0\.5"):
        load(overrides={"learner": {"label_noise": 0.5}}, env={})
    assert load(overrides={"learner": {"losses": {"score": "kto"}}}, env={}).learner.losses == LossConfig(score="kto")


# ------------------------------------------------------------------------------------------------ formulas

NOW = [t(-1.0, -2.0), t(-1.5, -0.5, -0.25)]
BEFORE = [t(-1.5, -2.5), t(-1.0, -0.75, -0.5)]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_a_correction_is_dpo_on_the_token_that_went_wrong_beside_its_likelihood() -> None:
    """Chosen (10, 11), rejected (12, 13, 14): they part at the first token."""
    margin = (-1.0 - -1.5) - (-1.5 - -1.0)
    expected = -log_sigmoid(0.1 * margin) + 1.0 * 1.5
    assert value(Objectives(CONFIG), OF_KIND["correction"], NOW, BEFORE) == pytest.approx(expected)


def test_the_label_of_a_preference_softens_it_and_its_guard() -> None:
    margin = (-3.0 - -4.0) - (-2.25 - -2.25)
    expected = -0.8 * log_sigmoid(0.1 * margin) - 0.2 * log_sigmoid(-0.1 * margin) + 0.6 * 1.5
    unsure = replace(OF_KIND["preference"], label=0.8)
    assert value(Objectives(CONFIG), unsure, NOW, BEFORE) == pytest.approx(expected)
    coin = [x.clone().requires_grad_() for x in NOW]
    loss = Objectives(CONFIG).loss(Scores(item(replace(unsure, label=0.5)), coin, coin), lambda _n, _v: None)
    torch.autograd.backward(loss)
    assert all(x.grad is None or float(x.grad.abs().max()) == pytest.approx(0.0, abs=1e-12) for x in coin)


def test_a_preference_by_robust_dpo_and_by_ipo() -> None:
    margin = 1.0
    right, wrong = -log_sigmoid(0.1 * margin), -log_sigmoid(-0.1 * margin)
    robust = Objectives(config("preference", "robust_dpo", label_noise=0.2, nll=0.0))
    expected = (0.8 * right - 0.2 * wrong) / 0.6
    assert value(robust, OF_KIND["preference"], NOW, BEFORE) == pytest.approx(expected)
    flipped = 0.9 * 0.2 + 0.1 * 0.8  # said with 0.9, and 0.2 of what is said is wrong
    expected = ((1 - flipped) * right - flipped * wrong) / (1 - 2 * flipped)
    assert value(robust, replace(OF_KIND["preference"], label=0.9), NOW, BEFORE) == pytest.approx(expected)
    ipo = Objectives(config("preference", "ipo", nll=0.0))
    assert value(ipo, OF_KIND["preference"], NOW, BEFORE) == pytest.approx((0.1 * margin - 0.5) ** 2)


def test_sft_of_a_pair_leaves_the_rejected_answer_alone() -> None:
    assert value(Objectives(config("correction", "sft")), OF_KIND["correction"], NOW, BEFORE) == pytest.approx(1.5)


def test_a_pair_by_apo_zero_judges_each_answer_by_itself() -> None:
    expected = (1 - 1 / (1 + math.exp(-0.1 * 1.0))) + 0.5
    assert value(Objectives(config("pair", "apo_zero")), OF_KIND["pair"], NOW, BEFORE) == pytest.approx(expected)


def test_a_lone_bad_answer_is_avoided_as_much_as_configured() -> None:
    before = [t(-1.0, -1.0, -1.0)]
    for now, lost in ((t(-1.0, -1.0, -1.0), 0.0), (t(-2.0, -1.0, -1.0), 1.0), (t(-9.0, -9.0, -9.0), 4.0)):
        expected = CONFIG.avoid / (1 + math.exp(0.1 * lost))
        assert value(Objectives(CONFIG), OF_KIND["failure"], [now], before) == pytest.approx(expected)


def test_kto_judges_against_answers_to_other_prompts() -> None:
    objectives = Objectives(replace(CONFIG, losses=LossConfig(score="kto", failure="kto")))
    good = [imitate(n, origin="score", chosen_ids=(10, n)) for n in range(4)]
    bad = [avoid(n + 4, rejected_ids=(12, n)) for n in range(2)]
    asked: list[Answer] = []
    moved = 0.0

    def score(answers: Any) -> list[Scored]:
        asked[:] = answers
        return [Scored(torch.tensor([-1.0, -1.0 + moved]), torch.zeros(2)) for _ in answers]

    objectives.begin([item(e) for e in (*good, *bad)], score)
    known = {(e.prompt_ids, e.chosen_ids or e.rejected_ids) for e in (*good, *bad)}
    assert len(asked) == 6 and not known & {(a.prompt_ids, a.completion_ids) for a in asked}
    objectives.begin_step(score)
    same = [t(-1.0, -1.0)]
    assert value(objectives, good[0], same, same) == pytest.approx(0.5 * 0.5)  # twice as many good ones: half each
    assert value(objectives, bad[0], same, same) == pytest.approx(0.5)
    moved = 10.0
    objectives.begin_step(score)  # z0 = 0.1 * 10
    assert value(objectives, bad[0], same, same) == pytest.approx(1 - 1 / (1 + math.exp(-0.1 * 1.0)))
    moved = -1000.0
    objectives.begin_step(score)  # never below 0
    assert value(objectives, bad[0], same, same) == pytest.approx(0.5)


def gradient(
    example: Example,
    group: list[Example],
    now: list[Tensor],
    before: list[Tensor],
    loss: Literal["policy_gradient", "dr_grpo"] = "policy_gradient",
) -> float:
    objectives = Objectives(replace(CONFIG, losses=LossConfig(success=loss, failure=loss, pair=loss)))
    objectives.begin([item(e) for e in group], unscored)
    return value(objectives, example, now, before)


def test_a_sampled_answer_is_compared_with_others_to_its_state_then_with_its_skill() -> None:
    same = [t(-1.0, -1.0)]
    one = [imitate(1, origin="success", chosen_ids=(5, 6), state="a", skill="x")]
    per_token = 2 / 2  # tokens of it / mean length
    assert gradient(one[0], one, same, same) == pytest.approx(-1.0 * per_token)  # nothing to compare with
    skill = [*one, *(avoid(n, rejected_ids=(5, 7), state=f"b{n}", skill="x") for n in (2, 3))]
    assert gradient(one[0], skill, same, same) == pytest.approx(-2.0)
    state = [*skill, imitate(4, origin="success", chosen_ids=(5, 6), state="a", skill="x")]
    assert gradient(one[0], state, same, same) == pytest.approx(0.0)  # both answers to its state were good
    both = replace(one[0], rejected_ids=(8, 9))
    assert gradient(both, [both], [*same, *same], [*same, *same]) == pytest.approx(-2.0)
    failed = replace(both, origin="failure")
    assert gradient(failed, [failed], [*same, *same], [*same, *same]) == pytest.approx(2.0)


def test_dr_grpo_counts_an_answer_among_those_it_is_compared_with() -> None:
    same = [t(-1.0, -1.0)]
    group = [imitate(1, origin="success", chosen_ids=(5, 6), state="a", skill="x")]
    group += [avoid(n, rejected_ids=(5, 7), state="a", skill="x") for n in (2, 3)]
    assert gradient(group[0], group, same, same, "dr_grpo") == pytest.approx(-(1.0 - -1.0 / 3.0))
    assert gradient(group[0], group, same, same) == pytest.approx(-(1.0 - -1.0))


def test_engine_logprobs_weigh_tokens_and_are_left_out_where_they_do_not_fit() -> None:
    old = [t(-1.0, -1.0)]
    one = imitate(1, origin="success", chosen_ids=(5, 6), logprobs=(-1.0 + math.log(2.0), -9.0))
    assert gradient(one, [one], old, old) == pytest.approx(-(0.5 + 2.0) / 2)
    other = replace(one, logprobs=(-1.0,))
    assert gradient(other, [other], old, old) == pytest.approx(-1.0)


def test_no_length_is_favoured_by_the_policy_gradient() -> None:
    short = imitate(1, origin="success", chosen_ids=(5,), skill="x")
    long = imitate(2, origin="success", chosen_ids=(5, 6, 7), skill="y")
    of_short = gradient(short, [short, long], [t(-1.0)], [t(-1.0)])
    of_long = gradient(long, [short, long], [t(-1.0, -1.0, -1.0)], [t(-1.0, -1.0, -1.0)])
    assert [of_short, of_long] == pytest.approx([-0.5, -1.5])  # by the token, not by the answer


def test_a_hint_pulls_each_token_towards_what_the_hinted_parent_says() -> None:
    now = t(-1.0, -2.0, -0.5).requires_grad_()
    loss = Objectives(replace(CONFIG, hint=1.0)).loss(
        Scores(item(OF_KIND["hint"]), [now], [now.detach()], t(-1.5, -0.5, -9.0)), lambda _n, _v: None
    )
    torch.autograd.backward(loss)
    assert now.grad is not None
    assert now.grad.tolist() == pytest.approx([0.5 / 3, -1.5 / 3, 2.0 / 3])
    halved = Objectives(replace(CONFIG, hint=0.5)).loss(
        Scores(item(OF_KIND["hint"]), [now], [now.detach()], t(-1.5, -0.5, -9.0)), lambda _n, _v: None
    )
    assert float(halved.detach()) == pytest.approx(0.5 * float(loss.detach()))


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_loss_trains(kind: str, name: str, tmp_path: Path) -> None:
    """Two examples of the kind: the chosen answer, or the better of both, becomes likelier; a bad one unlikelier."""
    first = OF_KIND[kind]
    other = replace(first, id="other", skill="other", prompt_ids=(9, 8, 7), chosen_ids=first.chosen_ids and (20, 21))
    if kind == "hint" or name == "self_distillation":
        other = replace(other, hint_ids=(9, 50, 8, 7))
    subject = learner(tmp_path, losses=table(kind, name), beta=0.5, lr=1e-3, avoid=1.0)
    update, _ = applied(subject.update([first, other], [], base_adapter(), 1))
    m = update.metrics
    there = [w for w in ("chosen", "rejected") if f"{w}_logprob_after" in m]
    gain = {w: m[f"{w}_logprob_after"] - m[f"{w}_logprob_before"] for w in there}
    assert all(math.isfinite(v) for v in m.values())
    if name == "self_distillation":
        assert m["loss_self_distillation"] != 0.0 and m["hint_nats"] > 0.2
    elif kind == "failure":
        assert gain["rejected"] < 0.0
    elif "rejected" in gain and name != "sft":
        assert gain["chosen"] > gain["rejected"]
    else:
        assert gain["chosen"] > 0.0
