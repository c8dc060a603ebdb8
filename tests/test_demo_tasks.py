"""The demo's tasks: grammar, rendering, the expert, the random floor and the splits, on browser-free pages."""

from __future__ import annotations

import pytest

from gradatim.demo.baselines import random_valid_episode
from gradatim.demo.browser_free import browser_free_env
from gradatim.demo.tasks import DIALOG, TASKS, Action, Element, Page, normalise, parse, render, right_actions, split


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("click 3", Action("click", 3)),
        ("  Click  12 ", Action("click", 12)),
        ("type 1 bob", Action("type", 1, "bob")),
        ('type 2 "red shoes"', Action("type", 2, "red shoes")),
        ("click", None),
        ("click 1 2", None),
        ("type 1", None),
        ("type 1 ", None),
        ("press 1", None),
        ("", None),
    ],
)
def test_parse(text: str, action: Action | None) -> None:
    assert parse(text) == action


def test_normalise_makes_spellings_equal() -> None:
    assert normalise(' TYPE 1  "bob"') == "type 1 bob"
    assert normalise(" nonsense ") == "nonsense"


def test_render_shows_values_history_and_dialog() -> None:
    page = Page("Do it.", (Element("field", "Username", "bob"), Element("field", ""), Element("button", "OK")), "Sure?")
    assert render(page, ["type 1 bob", "click OK"]) == (
        "Task: Do it.\nPage:\nDialog: Sure?\n1 field Username = bob\n2 field\n3 button OK\n"
        "Done so far: type 1 bob; click OK\nNext action?"
    )


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_solves_every_page(task: str) -> None:
    env = browser_free_env(task)
    dialogs = 0
    for seed in range(60):
        observation = env.reset(seed)
        done = False
        while not done:
            result = env.step(env.expert_action())
            assert result.valid
            observation, done = result.observation, result.done
            dialogs += DIALOG in observation
        assert result.success is True
    assert (dialogs > 10) == (task == "login-user-popup")


@pytest.mark.parametrize("task", TASKS)
def test_pages_come_from_the_seed_and_are_many(task: str) -> None:
    env = browser_free_env(task)
    first = [env.reset(seed) for seed in range(300)]
    assert first == [env.reset(seed) for seed in range(300)]
    assert len(set(first)) >= 100


@pytest.mark.parametrize("task", TASKS)
def test_right_actions_are_valid_and_random_ones_rarely_enough(task: str) -> None:
    env = browser_free_env(task)
    for seed in range(30):
        env.reset(seed)
        assert set(env.right_actions()) <= set(env.valid_actions())
    wins = sum(random_valid_episode(env, seed) for seed in range(200))
    assert wins < 150


def test_fields_may_be_filled_in_any_order() -> None:
    env = browser_free_env("login-user")
    env.reset(1)
    user, password = env.right_actions()
    assert env.step(password).success is None
    assert env.right_actions() == [user]
    env.step(user)
    assert env.step("click 3").success is True


@pytest.mark.parametrize("text", ["type 3 bob", "click 9", "nonsense", "click 0"])
def test_an_impossible_action_changes_nothing(text: str) -> None:
    env = browser_free_env("login-user")
    before = env.reset(1)
    result = env.step(text)
    assert (result.observation, result.valid, result.done) == (before, False, False)


def test_steps_run_out() -> None:
    env = browser_free_env("login-user")
    env.reset(1)
    results = [env.step("click 1") for _ in range(5)]
    assert [r.done for r in results] == [False] * 4 + [True]
    assert results[-1].success is False
    with pytest.raises(RuntimeError, match="reset"):
        env.step("click 1")


def test_wrong_text_fails_at_the_button() -> None:
    env = browser_free_env("enter-text")
    env.reset(1)
    env.step("type 1 wrong")
    assert env.step("click 2").success is False


def test_a_dialog_blocks_the_page_until_it_is_cancelled() -> None:
    env = browser_free_env("login-user-popup")
    seed = next(s for s in range(50) if _opens_dialog(s))
    env.reset(seed)
    result = env.step(env.expert_action())
    assert "Done so far: nothing" in result.observation
    assert env.valid_actions() == ["click 1", "click 2"]
    assert env.right_actions() == ["click 2"]
    result = env.step("click 2")
    assert "1 field Username\n" in result.observation
    env.reset(seed)
    env.step(env.expert_action())
    assert env.step("click 1").success is False


def _opens_dialog(seed: int) -> bool:
    env = browser_free_env("login-user-popup")
    env.reset(seed)
    return DIALOG in env.step(env.expert_action()).observation


def test_equal_buttons_are_equally_right() -> None:
    page = Page('Click on the "ok" button.', (Element("button", "ok"), Element("field", ""), Element("button", "ok")))
    assert right_actions(page) == ["click 1", "click 3"]


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_rendered_prompt(task: str) -> None:
    env = browser_free_env(task)
    drawn = split(env, held_out=64, train=40)
    held_out = {env.reset(seed) for seed in drawn.held_out}
    train = {env.reset(seed) for seed in drawn.train}
    assert (len(held_out), len(train)) == (64, 40)
    assert not held_out & train
    assert drawn.distinct_prompts == 104


def test_a_task_with_too_few_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="distinct first pages"):
        split(browser_free_env("enter-text"), held_out=500, train=500, max_seeds=600)


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="one of login-user"):
        browser_free_env("book-flight")
