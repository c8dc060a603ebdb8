"""The command line as people and machines use it, without a server, on a data directory with some history."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gradatim.app import compose
from gradatim.app.home import Home
from gradatim.cli import app
from gradatim.config import Config
from gradatim.store import open_store
from gradatim.types import AdapterId, Credit, EpisodeId, Move, Reward, Stage, StepId, Update, Verdict
from tests import records

ROOT = Path(__file__).parent.parent


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """One corrected episode, an update made from it, agent@1 live."""
    home = Home(tmp_path / "data")
    home.prepare()
    with open_store(home.store) as store:
        compose.register_base(store, Config(data_dir=home.path), "base")
        store.append(records.step("r1", "ep-1", text="[red]click 2[/red]"))
        store.append(records.feedback("correction", "ep-1", "r1", id="fb-1", correction="click 3"))
        episode_id, step_id = EpisodeId("ep-1"), StepId("r1")
        store.append(
            Reward(episode_id=episode_id, created_at=2.0, value=0.0, confidence=0.0, reason="neutral"),
            Credit(
                episode_id=episode_id, created_at=2.0, step_ids=(step_id,), advantages=(-1.0,), methods=("correction",)
            ),
            records.example(
                "r1#2", episode_id=episode_id, step_id=step_id, origin="correction", feedback_ids=("fb-1",)
            ),
        )
        update = Update(
            id="u1",
            created_at=3.0,
            applied=True,
            parent_id=AdapterId("agent@0"),
            adapter_id=AdapterId("agent@1"),
            example_ids=("r1#2",),
            kinds={"correction": 1},
        )
        store.append(update, replace(records.adapter(1, 0), update_id="u1"))
        passed = Verdict(adapter_id=AdapterId("agent@1"), created_at=4.0, gate="static", decision="pass", reason="fine")  # type: ignore[arg-type]
        store.move(
            Move(adapter_id=AdapterId("agent@0"), created_at=5.0, before=Stage.LIVE, after=Stage.RETIRED, actor="loop"),
            Move(
                adapter_id=AdapterId("agent@1"), created_at=5.0, before=Stage.CANDIDATE, after=Stage.LIVE, actor="loop"
            ),
            verdicts=[passed],
        )
    return home.path


def run(*words: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "200", **(env or {})})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def ask(*words: str) -> Any:
    code, output = run(*words, "--json")
    assert code == 0, output
    return json.loads(output)


def test_status_says_what_is_live_and_how_fast_feedback_got_there(data_dir: Path) -> None:
    status = ask("status", "-d", str(data_dir))
    assert status["live"] == "agent@1"
    assert status["feedback_to_live_s"] == [4.0]
    assert (status["updates_applied"], status["waiting_examples"]) == (1, 1)
    assert "agent@1" in run("status", "-d", str(data_dir))[1]


def test_episodes_are_listed_and_shown_in_full(data_dir: Path) -> None:
    assert [e["id"] for e in ask("episodes", "-d", str(data_dir))] == ["ep-1"]
    code, text = run("episodes", "ep-1", "-d", str(data_dir))
    assert code == 0
    assert "[red]click 2[/red]" in text  # a model's answer is never markup
    assert "click 3" in text


def test_explain_tells_the_whole_way(data_dir: Path) -> None:
    found = ask("explain", "r1", "-d", str(data_dir))
    assert "agent@1" in found["summary"]
    assert run("explain", "r1", "-d", str(data_dir))[0] == 0


def test_adapters_are_listed_shown_rolled_back_and_promoted(data_dir: Path) -> None:
    where = ("-d", str(data_dir))
    assert [(a["id"], a["stage"]) for a in ask("adapters", "list", *where)] == [
        ("agent@0", "retired"),
        ("agent@1", "live"),
    ]
    assert run("adapters", *where)[0] == 0
    assert "fine" in run("adapters", "show", "agent@1", *where)[1]
    assert ask("adapters", "rollback", *where) == {"live": "agent@0"}
    assert ask("adapters", "promote", "agent@1", *where) == {"live": "agent@1"}
    assert ask("adapters", "rollback", "agent@0", *where) == {"live": "agent@0"}
    code, text = run("adapters", "rollback", *where)
    assert code == 1
    assert "nothing to roll back to" in text


def test_feedback_is_sent_and_listed_without_a_server(data_dir: Path) -> None:
    sent = ask("feedback", "send", "r1", "--score", "0.5", "-d", str(data_dir))
    listed = ask("feedback", "list", "-d", str(data_dir))
    assert [f["id"] for f in listed] == [sent["id"], "fb-1"]
    assert "0.5" in run("feedback", "-d", str(data_dir))[1]
    assert ask("feedback", "send", "r1", "--outcome", "unknown", "-d", str(data_dir))["id"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("feedback", "send", "r1"), 2, "give exactly one of"),
        (("feedback", "send", "r1", "--score", "1", "--comment", "x"), 2, "give exactly one of"),
        (("feedback", "send", "r1", "--score", "3"), 2, "--score"),
        (("feedback", "send", "r1", "--outcome", "maybe"), 2, "true, false, unknown"),
        (("feedback", "send", "nobody", "--score", "1"), 1, "no response of that id"),
        (("episodes", "nobody"), 1, "no episode of that id"),
        (("explain", "nobody"), 1, "no response of that id"),
        (("adapters", "show", "agent@9"), 1, "does not exist"),
        (("learn",), 2, "--once"),
        (("nonsense",), 2, "No such command"),
    ],
)
def test_mistakes_are_told_with_the_right_exit_code(
    data_dir: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    where = () if words == ("nonsense",) else ("-d", str(data_dir))
    got, text = run(*words, *where)
    assert got == code, text
    assert says in text


def test_a_missing_data_directory_is_told_with_the_way_out(tmp_path: Path) -> None:
    code, text = run("status", "-d", str(tmp_path / "nowhere"))
    assert code == 1
    assert "gradatim serve" in text
    code, text = run("status", "-d", str(tmp_path))
    assert code == 1
    assert "holds no records yet" in text


def test_doctor_says_whether_it_learns(data_dir: Path, tmp_path: Path) -> None:
    found = ask("doctor", "-d", str(data_dir))
    assert found["summary"].startswith("It is learning: agent@1 is live")
    assert {f["about"] for f in found["findings"]} >= {"disk", "server", "feedback", "rewards", "examples"}
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no records yet" in ask("doctor", "-d", str(empty))["summary"]


def test_config_says_where_each_value_came_from(tmp_path: Path) -> None:
    file = tmp_path / "gradatim.toml"
    file.write_text('caution = "high"\n[learner]\nrank = 4\n')
    code, output = run("config", "-c", str(file), "-d", "/somewhere", "--json", env={"GRADATIM_API_KEY": "very-secret"})
    values = json.loads(output)
    assert code == 0
    assert values["learner.rank"] == {"value": 4, "from": str(file)}
    assert values["learner.lr"]["from"] == "caution = high"
    assert values["learner.beta"]["from"] == "default"
    assert values["data_dir"]["from"] == "--data-dir"
    assert values["server.api_key"] == {"value": "***", "from": "GRADATIM_API_KEY"}
    assert "very-secret" not in run("config", env={"GRADATIM_API_KEY": "very-secret"})[1]


def test_a_bad_setting_is_named(tmp_path: Path) -> None:
    file = tmp_path / "gradatim.toml"
    file.write_text("[learner]\nrnk = 4\n")
    code, text = run("config", "-c", str(file))
    assert code == 1
    assert "learner.rnk" in text


def test_learning_by_hand_makes_one_update_and_says_what_became_of_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    home = Home(tmp_path / "data")
    home.prepare()
    with open_store(home.store) as store:
        for i in range(3):
            store.append(records.step(f"r{i}", f"ep-{i}", prompt_ids=(1, 2, 3 + i)))
            store.append(records.feedback("correction", f"ep-{i}", f"r{i}", correction=f"click {i}"))
    words = ("learn", "--once", "-d", str(home.path), "-m", str(tiny_model_dir), "--json")
    code, output = run(*words)
    made = json.loads(output)
    assert made["update"]["n_examples"] == 3
    assert [v["gate"] for v in made["verdicts"]] == ["static", "replay"]
    assert (code, made["stage"]) in ((0, "live"), (1, "rejected"))
    code, output = run(*words)
    assert (code, json.loads(output)["update"]) == (3, None)


def test_learning_by_hand_is_refused_while_a_loop_runs(data_dir: Path) -> None:
    with Home(data_dir).lock("loop"):
        code, text = run("learn", "--once", "-d", str(data_dir))
    assert code == 1
    assert "in use by the loop" in text


@pytest.mark.parametrize(
    "words", [("--host", "0.0.0.0"), ("--dtype", "float8"), ("--model", "/nonexistent/model"), ("--config", "/nowhere")]
)
def test_serve_refuses_before_anything_listens(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gradatim", "serve", "-d", str(tmp_path / "data"), "--port", "0", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") < 20, "one sentence, not a traceback"
    assert "gradatim:" in done.stderr
    assert "Traceback" not in done.stderr


def _help_pages() -> list[tuple[str, ...]]:
    names = ("serve", "learn", "demo", "status", "doctor", "episodes", "explain", "config")
    groups = ("feedback", "feedback list", "feedback send", "adapters", "adapters list", "adapters show")
    return [tuple(n.split()) for n in (*names, *groups, "adapters rollback", "adapters promote")]


@pytest.mark.parametrize("words", _help_pages())
def test_every_help_page_shows_an_example(words: tuple[str, ...]) -> None:
    code, text = run(*words, "--help")
    assert code == 0
    assert f"Example: gradatim {words[0]}" in text


def test_the_records_may_lie_in_another_database(data_dir: Path, tmp_path: Path) -> None:
    env = {"GRADATIM_DATABASE": f"sqlite:///{data_dir}/gradatim.db"}
    (tmp_path / "elsewhere").mkdir()
    code, output = run("adapters", "list", "-d", str(tmp_path / "elsewhere"), "--json", env=env)
    assert code == 0
    assert "agent@1" in output


def test_a_databases_password_is_not_shown() -> None:
    _, output = run("config", "--json", env={"GRADATIM_DATABASE": "postgresql://me:very-secret@db.example/agents"})
    assert json.loads(output)["database"] == {
        "value": "postgresql://***@db.example/agents",
        "from": "GRADATIM_DATABASE",
    }
