"""Each file of examples/ runs as a user would run it, against a real server, and is short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gradatim.testing.fakes import FakeEngine
from gradatim.types import Feedback, Step
from tests.server_kit import Kit, served

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize(("answer", "says"), [("amber", "solved 1 of 3"), ("It is Teal.", "solved 2 of 3")])
def test_the_agent_groups_its_calls_and_says_how_they_ended(answer: str, says: str) -> None:
    kit = Kit(engine=FakeEngine(answer))
    with served(kit.app()) as url:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "agent.py"), url], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0 and says in done.stdout, done
    steps = [step for _, step in kit.store.read(Step)]
    solved = int(says.split()[1])
    assert len(steps) == solved + 2 * (3 - solved) and len({step.episode_id for step in steps}) == 3
    opinions = [f for _, f in kit.store.read(Feedback)]
    assert [f.kind for f in opinions].count("correction") == 2 * (3 - solved)
    assert sum(f.kind == "outcome" and f.value == 1.0 for f in opinions) == solved
