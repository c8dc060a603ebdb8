"""The demo's story from end to end against a scripted server, on browser-free pages; and its report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from gradatim.demo import __main__ as command
from gradatim.demo.miniwob import ChromiumMissing, find_binaries
from gradatim.demo.report import percentile, wilson, write_report
from gradatim.demo.results import Harmful, Results, Rollback, StoryConfig
from gradatim.demo.run import demo
from gradatim.demo.screen import sparkline
from gradatim.demo.story import previous
from gradatim.demo.wire import AdapterInfo
from tests.demo_server import FakeServer, serving

SMALL = StoryConfig(
    name="test",
    held_out=6,
    curve=4,
    rounds=2,
    redesign_rounds=3,
    corrected=3,
    outcomes=2,
    harmful=2,
    retrieval=2,
    concurrency=3,
    settle_s=1.0,
    judge_s=2.0,
    identity=5,
    random_episodes=10,
)


def told(server: FakeServer, out: Path) -> tuple[Results, str]:
    text = io.StringIO()
    with serving(server) as base_url:
        results = demo(
            SMALL,
            base_url=base_url,
            model="agent",
            out=out,
            browser_free=True,
            console=Console(file=text, width=120),
        )
    return results, text.getvalue()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str, Path, FakeServer]:
    server, out = FakeServer(), tmp_path_factory.mktemp("demo")
    results, printed = told(server, out)
    return results, printed, out, server


def rates(results: Results, agent: str, task: str, phase: str) -> list[float]:
    return [e.rate for e in results.evaluations if (e.agent, e.task, e.phase) == (agent, task, phase)]


def test_it_reaches_its_end_without_a_failed_request(story: tuple[Results, str, Path, FakeServer]) -> None:
    results = story[0]
    assert results.complete
    assert results.failures == []
    assert results.requests > 100
    assert [p.name for p in results.phases] == ["split", "baselines", "stream", "test", "redesign", "harm", "rollback"]


def test_the_corrected_task_is_learned_and_the_redesign_too(story: tuple[Results, str, Path, FakeServer]) -> None:
    results = story[0]
    assert rates(results, "frozen", "login-user", "baselines") == [0.0]
    assert rates(results, "live", "login-user", "stream")[0] == 0.0
    assert rates(results, "live", "login-user", "test") == [1.0]
    assert rates(results, "live", "login-user-popup", "after redesign") == [1.0]
    assert rates(results, "live", "login-user", "after redesign") == [1.0]
    assert results.corrected_episodes == 15


def test_corrections_fall(story: tuple[Results, str, Path, FakeServer]) -> None:
    stream = [e.corrections for e in story[0].episodes if e.phase == "stream" and e.task == "login-user"]
    assert sum(stream[:3]) > 0
    assert sum(stream[-3:]) == 0


def test_the_harmful_batch_is_reported_as_stopped(story: tuple[Results, str, Path, FakeServer]) -> None:
    harmful = story[0].harmful
    assert harmful is not None
    assert harmful.corrections > 0
    assert harmful.stopped
    assert {a.stage for a in harmful.adapters} == {"rejected"}


def test_the_rollback_shows_in_the_next_answer(story: tuple[Results, str, Path, FakeServer]) -> None:
    rollback = story[0].rollback
    assert rollback is not None
    assert rollback.acted
    assert rollback.answered_by == rollback.target != rollback.before


def test_the_frozen_model_answers_as_before(story: tuple[Results, str, Path, FakeServer]) -> None:
    identity = story[0].identity
    assert identity is not None
    assert identity.identical
    assert len(identity.before) == 5


def test_nothing_of_an_evaluation_can_be_learned(story: tuple[Results, str, Path, FakeServer]) -> None:
    server = story[3]
    pinned = [a for a in server.asked if "@" in a["model"]]
    routed = [a for a in server.asked if "@" not in a["model"]]
    assert {a["turn"] for a in pinned} == {"side"}
    assert {a["temperature"] for a in pinned} == {0.0}
    assert [a["turn"] for a in routed].count("side") == 1  # the question after the rollback


def test_every_session_is_one_episode(story: tuple[Results, str, Path, FakeServer]) -> None:
    by_session: dict[str, set[str]] = {}
    for asked in story[3].asked:
        by_session.setdefault(asked["session"], set()).add(asked["messages"][-1]["content"].split("\n")[0])
    assert {len(sentences) for sentences in by_session.values()} == {1}


def test_results_and_report_are_written(story: tuple[Results, str, Path, FakeServer]) -> None:
    out = story[2]
    run = json.loads((out / "results.json").read_text())
    assert run["harmful"]["stopped"] is True
    assert run["rollback"]["acted"] is True
    assert run["config"]["temperature"] == 0.7
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / "report.html").read_text()
    for expected in (
        "login-user-popup",
        "Wilson",
        "inverted corrections: stopped",
        "requests failed",
        "<svg",
        "correction",
    ):
        assert expected in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_the_terminal_shows_phases_and_the_curve(story: tuple[Results, str, Path, FakeServer]) -> None:
    printed = story[1]
    for expected in ("(i) Baselines", "(vi) Rollback", "held-out success", "by corrected episodes", "█"):
        assert expected in printed


def test_failed_requests_are_counted_and_the_story_goes_on(tmp_path: Path) -> None:
    server = FakeServer()
    server.fail_every = 97
    results, _ = told(server, tmp_path)
    assert results.failures
    assert sum(e.unknown for e in results.evaluations) + sum(e.success is None for e in results.episodes) > 0


def test_a_server_that_is_not_there_leaves_a_partial_report(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    results = demo(
        SMALL, base_url="http://127.0.0.1:9/v1", model="agent", out=tmp_path, browser_free=True, console=console
    )
    assert not results.complete
    assert "broke off" in (tmp_path / "report.html").read_text()


def test_missing_chromium_is_said_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIWOB_CHROMEDRIVER", str(tmp_path / "none"))
    with pytest.raises(ChromiumMissing, match="chromedriver"):
        find_binaries()
    assert command.main(["--quick", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "apt-get install chromium" in printed
    assert "--browser-free" in printed
    assert not (tmp_path / "out").exists()


def adapter(step: int, stage: str, parent: str | None) -> AdapterInfo:
    return AdapterInfo(f"agent@{step}", stage, step, parent, 0.0)


def test_previous_is_the_parent_or_the_newest_retired() -> None:
    one, two = adapter(1, "retired", "agent@0"), adapter(2, "live", "agent@1")
    assert previous([one, two], "agent@2") == "agent@1"
    assert previous([one, adapter(2, "live", None)], "agent@2") == "agent@1"
    assert previous([], "agent@0") is None


def test_verdicts_of_records() -> None:
    assert not Harmful(3, "agent@1", "agent@2", judged=True).stopped
    assert not Harmful(3, "agent@1", "agent@1", judged=False).stopped
    assert not Rollback(skipped="nothing").acted


def test_interval_and_percentile() -> None:
    low, high = wilson(0, 16)
    assert low == 0.0
    assert high == pytest.approx(0.194, abs=0.001)
    assert wilson(0, 0) == (0.0, 1.0)
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert percentile([5.0], 0.99) == 5.0


def test_sparkline() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"


@pytest.mark.parametrize("config", [StoryConfig.quick(), StoryConfig.full()])
def test_a_report_of_a_run_that_never_began(config: StoryConfig, tmp_path: Path) -> None:
    Results(config, "agent", "none", {"system": "", "examples": [], "max_tokens": 16}, 0.0).write(tmp_path / "r.json")
    assert write_report(tmp_path / "r.json", tmp_path).exists()
