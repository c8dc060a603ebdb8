"""The gate on directions and on contributors' shares, on functions with a known gradient and on a tiny model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradatim.learner import direction, lineage
from gradatim.learner.batch import Item, fit
from gradatim.learner.direction import LEAST_TRUSTED, MOST_SHARE, TRUSTED, Measure, judge, level_for, trusted
from gradatim.types import Adapter, Example
from tests.test_learner import applied, base_adapter, imitate, learner, pair
from tests.tiny import VOCABULARY

FLIP = "flip"


def item(number: int, **given: object) -> Item:
    fitted = fit(imitate(number, **given), 64, VOCABULARY)
    assert isinstance(fitted, Item)
    return fitted


def linear(gradients: dict[str, Tensor]) -> Measure:
    """Claims and losses that are linear in the weights: each example's gradient is given."""
    flat = torch.zeros(3)

    def gradient(items: Sequence[Item]) -> Tensor:
        return torch.stack([gradients[i.example.id] * i.example.weight for i in items]).mean(0)

    def losses(items: Sequence[Item]) -> Tensor:
        return torch.stack([gradients[i.example.id] @ flat for i in items])

    return Measure(flat, 0.1, gradient, losses, gradient)


def test_cosines_of_linear_losses_are_exact() -> None:
    anchor = [item(n) for n in range(20, 20 + LEAST_TRUSTED)]
    new = [item(n) for n in range(1, 5)]
    angles = (1.0, 0.0, -0.05, -0.6)
    gradients = {i.example.id: torch.tensor([2.0, 0.0, 0.0]) for i in anchor}
    for i, c in zip(new, angles, strict=True):
        gradients[i.example.id] = 3.0 * torch.tensor([c, (1 - c * c) ** 0.5, 0.0])
    measure = linear(gradients)
    judged = judge(new, anchor, measure, 0.1)
    assert list(judged.against) == [new[3].example.id]
    assert judged.against[new[3].example.id] == pytest.approx(-0.6, abs=1e-4)
    assert judged.metrics["gate_cosine"] == pytest.approx(sum(angles) / 4, abs=1e-4)
    assert "-0.60" in judged.reasons()[new[3].example.id]
    assert bool((measure.flat == 0).all())
    assert not judge(new, anchor, measure, 0.0).metrics  # off
    assert not judge(new, anchor[1:], measure, 0.1).against  # too few to go by


def test_a_slope_that_is_not_a_number_is_refused() -> None:
    anchor = [item(n) for n in range(20, 20 + LEAST_TRUSTED)]
    new = [item(1), item(2), item(3)]
    gradients = {i.example.id: torch.ones(3) for i in (*anchor, *new)}
    gradients[new[1].example.id] = torch.full((3,), torch.nan)
    assert list(judge(new, anchor, linear(gradients), 0.1).against) == [new[1].example.id]


def test_trusted_are_verified_good_answers_evenly_over_skills() -> None:
    many = [item(n, verified=True, skill="a") for n in range(30)]
    few = [item(n, verified=True, skill="b") for n in range(40, 43)]
    rest = [item(50, skill="c"), item(51, verified=True, chosen_ids=(), rejected_ids=(3,))]
    found = trusted([*many, *few, *rest])
    assert len(found) == TRUSTED and sum(i.example.skill == "b" for i in found) == 3
    assert not {i.example.id for i in rest} & {i.example.id for i in found}


@given(st.lists(st.floats(0.0, 100.0), min_size=6, max_size=40))
def test_clipped_at_the_level_nobody_has_more_than_the_share(norms: list[float]) -> None:
    level = level_for(norms, MOST_SHARE)
    clipped = [min(n, level) for n in norms]
    assert max(clipped) <= MOST_SHARE * sum(clipped) * (1 + 1e-9) + 1e-12
    higher = [min(n, level * 1.01) for n in norms]
    if 0.0 < level < max(norms):  # and it is the greatest such level
        assert max(higher) > MOST_SHARE * sum(higher)


def test_a_loud_contributor_is_turned_down_and_the_others_are_not() -> None:
    new = [item(n, user=f"user-{n}") for n in range(1, 8)]
    gradients = {i.example.id: torch.eye(3)[n % 3] for n, i in enumerate(new)}
    gradients[new[0].example.id] = torch.tensor([50.0, 0.0, 0.0])
    judged = judge(new, [], linear(gradients), 0.1)
    assert judged.scale == {new[0].example.id: pytest.approx(1.5 / 50.0)}  # L = 0.2 (6 + L)
    assert judged.metrics["contributors_clipped"] == 1.0
    assert not judge(new[:5], [], linear(gradients), 0.1).scale  # of five, nobody could be above
    nameless = [replace(i, example=replace(i.example, user="")) for i in new]
    assert not judge(nameless, [], linear(gradients), 0.1).scale


# ------------------------------------------------------------------------------------- on a tiny model


def lesson(number: int, **given: object) -> Example:
    """One rule with many prompts: after token 50 comes (10, 11), and not (12, 13)."""
    rng = random.Random(number)
    prompt = (51, 52, 53, 54, 55, *(rng.randrange(60, 90) for _ in range(2)), 50)
    made = pair(number, prompt_ids=prompt, chosen_ids=(10, 11), rejected_ids=(12, 13), verified=True)
    return replace(made, **given)  # type: ignore[arg-type]


def flipped(example: Example) -> Example:
    return replace(example, id=f"{FLIP}-{example.id}", chosen_ids=example.rejected_ids, rejected_ids=example.chosen_ids)


def taught(folder: Path) -> tuple[Adapter, list[Example]]:
    known = [lesson(n) for n in range(100, 108)]
    _, parent = applied(learner(folder, epochs=1, lr=3e-3).update(known, [], base_adapter(), 1))
    return parent, known


def test_flipped_labels_are_caught_and_honest_ones_are_not(tmp_path: Path) -> None:
    """Error rates over a simulation: 6 batches of 16 in which two of five labels are inverted."""
    parent, known = taught(tmp_path)
    subject = learner(tmp_path, epochs=1, lr=1e-4, gate_cosine=0.2)
    caught = missed = wronged = 0
    for batch in range(6):
        examples = [lesson(1000 + 16 * batch + n) for n in range(16)]
        mixed = [flipped(e) if n % 5 < 2 else e for n, e in enumerate(examples)]
        update, _ = applied(subject.update(mixed, known, parent, 2 + batch))
        refused = [e.id for e in mixed if e.id not in update.example_ids]
        caught += sum(i.startswith(FLIP) for i in refused)
        missed += sum(i.startswith(FLIP) for i in update.example_ids)
        wronged += sum(not i.startswith(FLIP) for i in refused)
        assert set(update.left_out) == set(refused)
        assert update.metrics["gate_refused"] == len(refused)
    assert caught >= 0.9 * (caught + missed)
    assert wronged <= 0.05 * (96 - caught - missed)


def test_a_batch_of_nothing_but_flipped_labels_is_refused(tmp_path: Path) -> None:
    parent, known = taught(tmp_path)
    bad = [flipped(lesson(n)) for n in range(10)]
    update, adapter = learner(tmp_path, gate_cosine=0.2).update(bad, known, parent, 2)
    assert adapter is None and not update.applied and "pull against the trusted ones" in update.refused_because
    off, made = learner(tmp_path).update(bad, known, parent, 2)
    assert made is not None and off.applied and "gate_cosine" not in off.metrics


def test_a_skill_that_nobody_taught_yet_is_let_in(tmp_path: Path) -> None:
    parent, known = taught(tmp_path)
    other = [
        replace(lesson(n), id=f"other-{n}", prompt_ids=(3, 4, 5, n), chosen_ids=(20, 21), rejected_ids=(30, 31))
        for n in range(8)
    ]
    update, _ = applied(learner(tmp_path, gate_cosine=0.2).update(other, known, parent, 2))
    assert len(update.example_ids) >= 7


def test_slopes_are_those_of_the_models_own_gradients(tmp_path: Path) -> None:
    """Central differences against g . u by backward passes, example by example."""
    parent, known = taught(tmp_path)
    subject = learner(tmp_path)
    examples = [lesson(n) for n in range(6)]
    weights, _ = lineage.start(subject._base, subject._config, tmp_path, parent)
    run = subject._admit(examples, known)
    with subject._trainable.training(weights):
        subject._refer(run, run.new)
        measure = subject._measure(run)
        u = measure.claim_gradient(run.replay)
        u = u / u.norm()
        exact = [float(measure.claim_gradient([i]) @ u) for i in run.new]
        estimated = direction._slopes(run.new, u, measure).tolist()
    assert estimated == pytest.approx(exact, rel=0.05, abs=0.02)
