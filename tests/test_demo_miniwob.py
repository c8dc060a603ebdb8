"""The demo on the real pages in Chromium. Slow, and skipped where Chromium is missing."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradatim.demo.miniwob import Browser, ChromiumMissing, find_binaries, miniwob_env
from gradatim.demo.tasks import DIALOG, TASKS, split

pytestmark = [pytest.mark.slow, pytest.mark.chromium]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        find_binaries()
    except ChromiumMissing as error:
        pytest.skip(str(error))
    browser = Browser()
    yield browser
    browser.close()


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_solves_the_real_page(task: str, browser: Browser) -> None:
    env = miniwob_env(task, browser)
    dialogs = 0
    for seed in range(16):
        env.reset(seed)
        done = False
        while not done:
            result = env.step(env.expert_action())
            assert result.valid
            done = result.done
            dialogs += DIALOG in result.observation
        assert result.success is True, (task, seed)
    assert (dialogs > 0) == (task == "login-user-popup")


def test_wrong_and_impossible_actions(browser: Browser) -> None:
    env = miniwob_env("login-user", browser)
    before = env.reset(3)
    assert env.step("type 3 bob").valid is False  # a button
    assert env.step("click 1").observation == before  # only moves the focus
    assert env.step("click 3").success is False
    assert env.reset(3) == before


def test_ok_in_the_dialog_fails(browser: Browser) -> None:
    env = miniwob_env("login-user-popup", browser)
    for seed in range(40):
        env.reset(seed)
        if DIALOG in env.step(env.expert_action()).observation:
            assert env.step("click 1").success is False
            return
    pytest.fail("no dialog in 40 seeds")


def test_sixty_four_held_out_prompts_share_nothing_with_training(browser: Browser) -> None:
    env = miniwob_env("enter-text", browser)
    drawn = split(env, held_out=64, train=40)
    held_out = {env.reset(seed) for seed in drawn.held_out}
    assert len(held_out) == 64
    assert not held_out & {env.reset(seed) for seed in drawn.train}


def test_chromium_dies_with_its_owner_even_when_that_is_killed(browser: Browser) -> None:
    program = (
        "import sys; from gradatim.demo.miniwob import Browser; "
        "b = Browser(); print(b.profile, flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdin is not None
    profile = owner.stdout.readline().strip()
    assert processes_on(profile)
    owner.kill()
    owner.wait()
    owner.stdin.close()
    owner.stdout.close()
    deadline = time.monotonic() + 20
    while (processes_on(profile) or Path(profile).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_on(profile)
    assert not Path(profile).exists()


def processes_on(profile: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if profile.encode() in entry.read_bytes():
                found.append(entry.parent.name)
        except OSError:
            continue
    return found
