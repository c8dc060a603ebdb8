"""What the README tells people to type exists, and its promises on length hold."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from gradatim.testing.fakes import FakeEngine
from gradatim.types import Feedback
from tests.server_kit import Kit, served
from tests.test_docs import commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_the_first_command_comes_within_sixty_words() -> None:
    assert len(README.split("```", 1)[0].split()) <= 60


@pytest.mark.parametrize("line", SHELL)
def test_its_commands_exist(line: str) -> None:
    for part in line.split("&&"):
        words = shlex.split(part, comments=True)
        if words[:1] == ["make"]:
            target = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert target.returncode == 0, target.stderr
        elif words[:1] == ["gradatim"]:
            assert words[1] in list(commands()) or " ".join(words[1:3]) in list(commands())
        else:
            assert words[0] in ("pip", "python3", "sudo")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_its_program_runs_against_a_server(code: str) -> None:
    kit = Kit(engine=FakeEngine("click 2"))
    with served(kit.app()) as url:
        exec(compile(code.replace("http://127.0.0.1:8080", url), "README", "exec"), {})
    assert [f.correction for _, f in kit.store.read(Feedback)] == ["click 3"]


def goals(name: str) -> dict[str, float]:
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return {goal["goal"]: goal["value"] for goal in result["goals"]}


def test_its_figures_are_those_of_the_last_full_runs() -> None:
    ratio = goals("bench_updates")["p99 time per token while learning, ratio to idle"]
    assert f"p99 time per token {ratio:.1f} times" in README
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert f"{ratio:.3g}" in page
