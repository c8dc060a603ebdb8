"""How far an update may go on fresh answers: the line search on its size, and the budget of an adapter's life."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from gradatim.types import Step
from tests import records
from tests.test_learner import applied, base_adapter, imitate, learner

TRAFFIC = [records.step(f"s{k}", prompt_ids=(1, 2, 3, 4, k), completion_ids=(20 + k, 30)) for k in range(1, 6)]
NEW = [imitate(n, prompt_ids=(1, 2, 3, 4, n), chosen_ids=(40, 41)) for n in range(1, 4)]


def figures(folder: Path, traffic: list[Step] = TRAFFIC, **settings: Any) -> dict[str, float]:
    made = learner(folder, **({"kl_fresh_limit": 1e9, "kl_base_limit": 1e9} | settings)).update(
        NEW, [], base_adapter(), 1, traffic
    )
    return dict(applied(made)[0].metrics)


def test_a_change_within_both_budgets_is_left_whole(tmp_path: Path) -> None:
    free, measured = figures(tmp_path / "free", []), figures(tmp_path / "measured")
    assert "kl_fresh" not in free
    assert measured["fresh_share"] == 1.0
    assert measured["delta_norm"] == pytest.approx(free["delta_norm"])
    assert measured["kl_fresh"] > 0.2  # other answers to the same prompts were taught
    assert measured["kl_base"] == pytest.approx(-measured["kl_fresh"], abs=1e-4)  # the parent is the frozen model


def test_the_record_of_a_smaller_step_does_not_say_how_far_the_whole_went(tmp_path: Path) -> None:
    subject = learner(tmp_path, kl_fresh_limit=1e9, kl_base_limit=1e9)
    update, made = applied(subject.update(NEW, [], base_adapter(), 1, TRAFFIC))
    half, _ = subject.shrink(update, made, base_adapter(), 2)
    assert half.scale == 0.5 and not {"kl_fresh", "kl_base"} & half.metrics.keys()


def test_a_change_that_goes_too_far_on_fresh_answers_is_shortened(tmp_path: Path) -> None:
    whole = figures(tmp_path / "whole")
    held = figures(tmp_path / "held", kl_fresh_limit=0.6 * whole["kl_fresh"])
    assert held["fresh_share"] in (0.5, 0.25)
    assert held["kl_fresh"] <= 0.6 * whole["kl_fresh"]
    assert held["delta_norm"] < whole["delta_norm"]


def test_where_no_share_of_it_is_near_enough_it_is_refused(tmp_path: Path) -> None:
    subject = learner(tmp_path, kl_fresh_limit=1e-6)
    update, adapter = subject.update(NEW, [], base_adapter(), 1, TRAFFIC)
    assert adapter is None and "fresh answers" in update.refused_because
    assert update.metrics["fresh_share"] == 0.25
    assert not list((tmp_path / "adapters").glob("*"))


def test_an_adapter_has_a_budget_for_its_life(tmp_path: Path) -> None:
    """Told to say what it said, it goes ever further from the frozen model."""
    subject = learner(tmp_path, kl_fresh_limit=1e9, kl_base_limit=0.5)
    said = [records.step(f"s{n}", prompt_ids=e.prompt_ids, completion_ids=e.chosen_ids) for n, e in enumerate(2 * NEW)]
    parent, lives, refused = base_adapter(), [], ""
    for number in range(1, 8):
        update, made = subject.update(NEW, [], parent, number, said)
        lives.append(update.metrics["kl_base"])
        if made is None:
            refused = update.refused_because
            break
        parent = made
    assert "learner.kl_base_limit" in refused
    assert all(life <= 0.5 for life in lives[:-1]) and lives[-1] > 0.5


def test_what_was_found_good_does_not_count_against_its_life(tmp_path: Path) -> None:
    said = [records.step(f"s{n}", prompt_ids=e.prompt_ids, completion_ids=e.chosen_ids) for n, e in enumerate(2 * NEW)]
    limits = {"kl_fresh_limit": 1e9, "kl_base_limit": -1e9}
    for n, (good, refused) in enumerate((((), True), (said[:2], True), (said[:3], False), (said, False))):
        subject = learner(tmp_path / str(n), **limits)
        update, made = subject.update(NEW, [], base_adapter(), 1, said, {step.id for step in good})
        assert (made is None) == refused
        assert ("nobody found good" in update.refused_because) == refused
        assert "kl_base" in update.metrics


def test_what_cannot_be_scored_is_passed_over(tmp_path: Path) -> None:
    broken = [
        records.step("empty", completion_ids=()),
        records.step("no prompt", prompt_ids=()),
        records.step("foreign", prompt_ids=(1, 10**6)),
        records.step("long", completion_ids=(7,) * 64),
    ]
    assert "kl_fresh" not in figures(tmp_path / "none", broken)
    cut = [records.step(f"cut{k}", prompt_ids=(5,) * 100, completion_ids=(7, k)) for k in range(4)]
    assert math.isfinite(figures(tmp_path / "cut", [*broken, *cut])["kl_fresh"])
    assert "kl_fresh" not in figures(tmp_path / "few", [*broken, *cut[1:]])
