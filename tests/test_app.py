"""The composition root: the data directory, the processes, and the diagnosis."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradatim.app import compose, diagnosis, learning, report, serving, states
from gradatim.app.administration import Administration
from gradatim.app.home import Home
from gradatim.app.supervisor import Supervisor
from gradatim.config import Config, ServerConfig
from gradatim.errors import (
    AdapterError,
    ConfigError,
    InUseError,
    LearnerError,
    StoreError,
    UnknownAdapterError,
)
from gradatim.release.traffic import Traffic
from gradatim.store import SqlStore, open_store
from gradatim.testing.fakes import FakeEngine
from gradatim.types import Adapter, AdapterId, Move, Stage

SHA = "a" * 64


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "data")
    home.prepare()
    return home


@pytest.fixture
def config(home: Home) -> Config:
    return Config(data_dir=home.path)


# ------------------------------------------------------------------------------------------ the data directory


def test_a_second_process_is_refused_and_told_whose_it_is(home: Home) -> None:
    with home.lock("server"):
        assert home.holder("server") == os.getpid()
        with pytest.raises(InUseError, match=rf"pid {os.getpid()}.*--data-dir"), home.lock("server", wait_s=0.0):
            pass
        with home.lock("loop"):  # another role is free
            pass
    assert home.holder("server") is None


def test_the_lock_of_a_killed_process_is_free(home: Home) -> None:
    code = "import sys, time; from pathlib import Path; from gradatim.app.home import Home\n"
    code += "with Home(Path(sys.argv[1])).lock('server'): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(home.path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert home.holder("server") == child.pid
        child.kill()
        child.wait()
    with home.lock("server", wait_s=0.0):
        pass


def test_a_data_directory_that_cannot_be_written_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written.*--data-dir"):
        Home(tmp_path / "file" / "data").prepare()


def test_what_a_dead_server_said_of_itself_is_not_believed(home: Home) -> None:
    home.say("server", {"url": "http://127.0.0.1:1"})
    assert home.server_url() is None
    with home.lock("server"):
        assert home.server_url() == "http://127.0.0.1:1"
        (home.path / "server.json").write_text('{"pid": 1, "url": "http://elsewhere"}')
        assert home.server_url() is None


# ------------------------------------------------------------------------------------------------- serving


@pytest.mark.parametrize(("host", "key", "allowed"), [
    ("127.0.0.1", "", True), ("localhost", "", True), ("::1", "", True),
    ("0.0.0.0", "", False), ("example.org", "", False), ("0.0.0.0", "secret", True),
])  # fmt: skip
def test_only_loopback_is_served_without_a_key(host: str, key: str, allowed: bool) -> None:
    config = Config(server=ServerConfig(host=host, api_key=key))
    if allowed:
        serving.check_exposure(config)
    else:
        with pytest.raises(ConfigError, match="GRADATIM_API_KEY"):
            serving.check_exposure(config)


def test_a_port_in_use_is_refused_with_the_way_out() -> None:
    with serving.take_port("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(InUseError, match="--port"):
            serving.take_port("127.0.0.1", taken.getsockname()[1])


def test_the_base_is_registered_once_and_never_exchanged(config: Config, home: Home) -> None:
    with open_store(home.store) as store:
        for _ in range(2):
            compose.register_base(store, config, SHA)
        assert store.stages("agent") == {"agent@0": Stage.LIVE}
        with pytest.raises(ConfigError, match=f"{SHA}.*{'b' * 64}.*--data-dir"):
            compose.register_base(store, config, "b" * 64)
        compose.register_base(store, replace(config, name="other"), SHA)
        assert store.stages("other") == {"other@0": Stage.LIVE}


def _adapter(step: int) -> Adapter:
    return Adapter(
        id=AdapterId(f"agent@{step}"),
        name="agent",
        step=step,
        base_sha256=SHA,
        parent_id=AdapterId(f"agent@{step - 1}"),
        sha256=str(step) * 64,
        path=f"adapters/agent@{step}",
        created_at=float(step),
    )


def _put_live(store: SqlStore, step: int) -> None:
    store.append(_adapter(step))
    old, new = AdapterId(f"agent@{step - 1}"), AdapterId(f"agent@{step}")
    store.move(
        Move(adapter_id=old, created_at=1.0, before=Stage.LIVE, after=Stage.RETIRED, actor="loop"),
        Move(adapter_id=new, created_at=1.0, before=Stage.CANDIDATE, after=Stage.LIVE, actor="loop"),
    )


@pytest.fixture
def store(config: Config, home: Home) -> Any:
    with open_store(home.store) as store:
        compose.register_base(store, config, SHA)
        yield store


async def test_a_live_adapter_with_damaged_files_falls_back_to_its_parent(config: Config, store: SqlStore) -> None:
    _put_live(store, 1)
    _put_live(store, 2)

    class Engine(FakeEngine):
        async def load(self, adapter: Adapter) -> None:
            if adapter.step == 2:
                raise AdapterError("agent@2 is truncated")
            await super().load(adapter)

    traffic = Traffic(store, Engine(), config)
    await serving.first_refresh(traffic, store, "agent")
    assert traffic.live == "agent@1"
    assert store.stages("agent")["agent@2"] is Stage.ROLLED_BACK  # type: ignore[index]


def test_rollback_takes_a_live_adapter_off_and_turns_the_server_before_it_returns(
    config: Config, store: SqlStore
) -> None:
    _put_live(store, 1)
    turned: list[Any] = []
    admin = Administration(config, store, loop=dict, turn_to=lambda: turned.append(dict(store.stages("agent"))))
    assert admin.rollback(AdapterId("agent@1"), actor="person", reason="no") == {"live": "agent@0"}
    assert turned == [{"agent@0": Stage.LIVE, "agent@1": Stage.ROLLED_BACK}]
    assert admin.promote(AdapterId("agent@1"), actor="person", reason="") == {"live": "agent@1"}
    assert [m["after"] for m in admin.adapters()[1]["moves"]] == ["candidate", "live", "rolled_back", "live"]
    assert admin.rollback(AdapterId("agent@0"), actor="person", reason="to an earlier one") == {"live": "agent@0"}
    with pytest.raises(UnknownAdapterError, match="agent@9"):
        admin.rollback(AdapterId("agent@9"), actor="person", reason="")


# ---------------------------------------------------------------------------------------------- supervision


def _supervisor(tmp_path: Path, code: str) -> Supervisor:
    command = (sys.executable, "-c", code)
    return Supervisor(command, env=os.environ, stdin=b"told", log_path=tmp_path / "loop.log", first_pause_s=0.01)


async def _until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_child_that_dies_is_started_again_and_counted(tmp_path: Path) -> None:
    supervisor = _supervisor(tmp_path, "import sys; print(sys.stdin.read()); sys.exit(3)")
    task = asyncio.create_task(supervisor.run())
    await _until(lambda: supervisor.restarts >= 2)
    assert supervisor.last_exit == 3
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert supervisor.status()["state"] == "stopped"
    assert (tmp_path / "loop.log").read_text().count("told") >= 2


async def test_stopping_ends_the_child(tmp_path: Path) -> None:
    supervisor = _supervisor(tmp_path, "import time; time.sleep(60)")
    task = asyncio.create_task(supervisor.run())
    await _until(lambda: supervisor.alive)
    pid = supervisor.status()["pid"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not Path(f"/proc/{pid}").exists()


async def test_a_child_that_cannot_be_started_never_raises(tmp_path: Path) -> None:
    supervisor = Supervisor(
        ("/nonexistent/program",), env={}, stdin=b"", log_path=tmp_path / "loop.log", first_pause_s=0.01
    )
    task = asyncio.create_task(supervisor.run())
    await _until(lambda: supervisor.restarts >= 2)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_the_loop_process_is_told_everything_but_the_key(config: Config) -> None:
    told = learning.handover(replace(config, server=ServerConfig(api_key="secret-key")), 1)
    assert b"secret-key" not in told
    assert str(config.data_dir).encode() in told
    assert not any("secret" in part or "key" in part for part in serving.LOOP_COMMAND)


def test_a_failing_turn_is_shown_and_tried_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([True, LearnerError("out of memory"), False])

    class Over(BaseException):
        pass

    def turn() -> bool:
        outcome = next(outcomes, None)
        if outcome is None:
            raise Over
        if isinstance(outcome, Exception):
            raise outcome
        return bool(outcome)

    said: list[str] = []
    monkeypatch.setattr(time, "sleep", lambda _: said.append(home.said("loop")["state"]))
    with pytest.raises(Over):
        learning.turn_for_ever(turn, home, poll_s=0.0)
    assert said[:2] == ["working", "failing"]


# ----------------------------------------------------------------------------------------------- diagnosis


def _facts(config: Config, **changes: Any) -> diagnosis.Facts:
    learned: dict[str, Any] = {
        "live": "agent@3",
        "adapters": 4,
        "records": {"feedback": 9},
        "waiting_feedback": 0,
        "waiting_examples": 0,
        "judged_recently": 9,
        "abstained_recently": 0,
        "abstained_because": {},
        "updates_recently": 3,
        "applied_recently": 3,
        "last_update": {"at": time.time()},
        "refused_recently": [],
    }
    learned |= changes.pop("learning", {})
    healthy = diagnosis.Facts(
        config=config,
        has_store=True,
        free_bytes=2**40,
        server_pid=1,
        server_url="http://127.0.0.1:8080",
        answers=True,
        loop={"state": "running", "does": "idle", "restarts": 0, "pid": 2},
        learning=learned,
        chromium=True,
    )
    return replace(healthy, **changes)


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, None, "It is learning: agent@3 is live"),
        (
            {"learning": {"live": "agent@0", "records": {"feedback": 0}}},
            "wait",
            "not learning: no feedback has come yet",
        ),
        (
            {"learning": {"live": "agent@0", "abstained_recently": 9, "abstained_because": {"opinions disagree": 9}}},
            "wait",
            "all abstained: 9 times opinions disagree",
        ),
        (
            {"learning": {"live": "agent@0", "waiting_examples": 2, "last_update": None}},
            "wait",
            "2 examples wait for an update, which wants 12",
        ),
        ({"loop": {"state": "waiting", "last_exit": -9, "restarts": 4}}, "bad", "died with -9"),
        ({"loop": {"state": "running", "does": "failing", "error": "boom", "restarts": 0}}, "bad", "boom"),
        ({"free_bytes": 1000}, "bad", "is full"),
        ({"answers": False, "loop": None}, "bad", "does not answer"),
        (
            {"learning": {"proof_awaited": {"at": 1.0, "adapter": "agent@7", "reason": "4 updates in a row"}}},
            "wait",
            "agent@7 was held back: 4 updates in a row",
        ),
        ({"trouble": "store: a write failed 3 s ago"}, "bad", "is not ready: store: a write failed"),
        ({"server_pid": None, "server_url": None, "answers": False, "loop": None}, "wait", "no server runs"),
        (
            {
                "learning": {
                    "applied_recently": 0,
                    "refused_recently": [
                        {"at": time.time() + 1, "what": f"agent@{i}", "by": "gate replay", "reason": "3 of 9 lost"}
                        for i in (6, 5, 4)
                    ],
                }
            },
            "bad",
            "",
        ),
    ],
)
def test_the_diagnosis_names_what_stands_in_the_way(
    config: Config, changes: dict[str, Any], level: str | None, words: str
) -> None:
    facts = _facts(config, **changes)
    found = diagnosis.findings(facts)
    assert words in diagnosis.summary(facts, found)
    assert level is None or level in {f.level for f in found}
    assert level == "bad" or not [f for f in found if f.level == "bad"]


def test_a_long_list_of_adapters_ends_with_the_newest_and_has_the_live_one(store: SqlStore) -> None:
    for number in range(1, 30):
        _put_live(store, number)
    store.move(
        Move(adapter_id=AdapterId("agent@29"), created_at=1.0, before=Stage.LIVE, after=Stage.ROLLED_BACK, actor="me"),
        Move(adapter_id=AdapterId("agent@2"), created_at=1.0, before=Stage.RETIRED, after=Stage.LIVE, actor="me"),
    )
    assert [row["step"] for row in report.adapters(store, "agent", limit=3)] == [2, 27, 28, 29]
    assert [row["step"] for row in report.adapters(store, "agent")] == list(range(30))
    one = report.adapter(store, "agent", AdapterId("agent@2"))
    assert one is not None and one["stage"] == "live" and len(one["moves"]) == 4
    assert report.adapter(store, "other", AdapterId("agent@2")) is None


# --------------------------------------------------------------------------------- what only one process may do


async def test_a_server_whose_database_was_taken_by_another_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([None, StoreError("away"), None, InUseError("taken")])

    class Alone:
        needed = True

        def keep(self) -> None:
            if (outcome := next(outcomes)) is not None:
                raise outcome

    with pytest.raises(InUseError, match="taken"):
        await serving.stay_alone(Alone(), every_s=0.0)  # type: ignore[arg-type]
    assert next(outcomes, "all used") == "all used"


# -------------------------------------------------------------------------------------- states of the optimiser


def _with_state(config: Config, step: int, name: str = "agent") -> Path:
    folder = config.data_dir / "adapters" / f"{name}@{step}"
    folder.mkdir(parents=True)
    for file in (*states.FILES, "adapter_model.safetensors"):
        (folder / file).write_text("x")
    return folder


def _kept(config: Config) -> list[int]:
    found = (config.data_dir / "adapters").glob(f"agent@*/{states.FILES[0]}")
    return sorted(int(path.parent.name.partition("@")[2]) for path in found)


def test_optimiser_states_are_kept_for_what_an_update_may_start_from(config: Config, store: SqlStore) -> None:
    """Twelve went live, one is on trial and one was rejected; another name's folders are left alone."""
    tidy = states.OptimiserStates(store, config)
    other = _with_state(config, 1, name="other")
    for step in range(1, 13):
        _with_state(config, step)
        _put_live(store, step)
    _with_state(config, 13)
    store.append(_adapter(13))
    store.move(
        Move(adapter_id=AdapterId("agent@13"), created_at=1.0, before=Stage.CANDIDATE, after=Stage.REJECTED, actor="l")
    )
    _with_state(config, 14)
    store.append(replace(_adapter(14), parent_id=AdapterId("agent@12")))
    assert len(tidy()) == 5
    assert _kept(config) == [*range(5, 13), 14]
    assert tidy() == []
    store.move(
        Move(adapter_id=AdapterId("agent@12"), created_at=1.0, before=Stage.LIVE, after=Stage.ROLLED_BACK, actor="me"),
        Move(adapter_id=AdapterId("agent@2"), created_at=1.0, before=Stage.RETIRED, after=Stage.LIVE, actor="me"),
    )
    assert [folder.name for folder in tidy()] == ["agent@5"]  # 2 is among the last eight that were live now
    assert _kept(config) == [*range(6, 13), 14]
    assert all((other / file).exists() for file in states.FILES)
    assert (config.data_dir / "adapters" / "agent@1" / "adapter_model.safetensors").exists()
    assert states.OptimiserStates(store, config)() == []  # another process finds nothing to do


def test_tidying_follows_a_turn_that_did_something() -> None:
    done: list[str] = []
    outcomes = iter([True, False, True])
    turn = learning.tidily(lambda: next(outcomes), lambda: done.append("tidied"))
    assert [turn(), turn(), turn()] == [True, False, True] and done == ["tidied", "tidied"]


def test_the_files_of_a_state_have_one_name() -> None:
    from gradatim.nn import lora

    assert states.FILES == (lora.STATE_FILE, lora.STATE_DIGEST_FILE)
