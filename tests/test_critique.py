"""Critics and implicit signals on finished episodes: written once, whatever fails and whenever it is killed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradatim.app.compose import check_critics
from gradatim.config import Config, CriticConfig, CriticsConfig, RewardConfig, load
from gradatim.errors import ConfigError, StoreError
from gradatim.feedback.critique import STEPS, Critique
from gradatim.feedback.worker import Bench
from gradatim.reward import WeightedReward
from gradatim.store import SqlStore, open_store
from gradatim.types import Feedback, Step
from tests.records import feedback, step

SOURCES = Config().reward.weights


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(tmp_path / "g.db") as store:
        yield store


def critic(name: str, /, **more: Any) -> CriticConfig:
    return CriticConfig(use=f"tests.critics:{name}", **more)


def critique(store: SqlStore, *critics: CriticConfig, now: float = 1000.0, **more: Any) -> Critique:
    return Critique(store, CriticsConfig(run=critics, **more), sources=SOURCES, clock=lambda: now)


def opinions(store: SqlStore, prefix: str = "") -> list[Feedback]:
    return [f for _, f in store.read(Feedback) if f.source.startswith(prefix or "critic:") and "alice" not in f.source]


def standing(store: SqlStore) -> list[Feedback]:
    newest = {f.id: f for f in opinions(store)}
    return [f for f in newest.values() if not f.retracted]


def test_a_quiet_episode_is_judged_once(store: SqlStore) -> None:
    store.append(step("s1", "e"), step("s2", "e"), step("t1", "young", created_at=990.0))
    judge = critique(store, critic("good"), critic("last", name="tail"), critic("silent"))
    assert judge.turn() and not judge.turn()
    first, second = opinions(store)
    assert (first.kind, first.value, first.source, first.episode_id) == ("outcome", 1.0, "critic:good", "e")
    assert (first.step_id, first.created_at) == (None, 1000.0)
    assert (second.source, second.step_id, second.value, second.comment) == ("critic:tail", "s2", -0.5, "the last one")
    assert "mine" in second.tags and first.id != second.id
    assert judge.status() == {n: {"judged": 1, "unknown": 0} for n in ("good", "tail", "silent")}
    judge.close()
    later = critique(store, critic("good"), now=2000.0)  # a new process: the young one is old enough now
    assert later.turn() and not later.turn()
    assert [f.episode_id for f in opinions(store)] == ["e", "e", "young"]
    later.close()


def test_an_outcome_ends_an_episode_at_once_and_flush_ends_all(store: SqlStore) -> None:
    store.append(step("s1", "a", created_at=999.0), step("s2", "b", created_at=999.0))
    judge = critique(store, critic("last"))
    assert not judge.turn()
    store.append(feedback("score", "a", "s1", value=1.0))
    assert not judge.turn()
    store.append(feedback("outcome", "b", value=1.0))
    assert judge.turn() and [f.step_id for f in opinions(store)] == ["s2"]
    assert judge.turn(flush=True) and [f.step_id for f in opinions(store)] == ["s2", "s1"]
    assert not judge.turn(flush=True) and len(opinions(store)) == 2
    judge.close()


def test_an_episode_that_goes_on_is_judged_again_and_the_old_opinion_goes(store: SqlStore, tmp_path: Path) -> None:
    store.append(step("s1", "e"))
    seen = tmp_path / "seen"
    judge = critique(store, critic("last"), critic("counting", options={"path": str(seen)}))
    assert judge.turn()
    assert [(f.source, f.value) for f in standing(store)] == [("critic:last", -0.5), ("critic:counting", -1.0)]
    store.append(step("s2", "e"))
    assert judge.turn()
    assert [(f.source, f.value, f.step_id) for f in standing(store)] == [
        ("critic:counting", 1.0, None),
        ("critic:last", -0.5, "s2"),
    ]
    assert [f.id for f in opinions(store) if f.retracted] == [opinions(store)[0].id]
    assert seen.read_text() == "e 1\ne 2\n"
    judge.close()


def test_a_persons_retraction_stands_until_the_episode_goes_on(store: SqlStore) -> None:
    store.append(step("s1", "e"))
    judge = critique(store, critic("good"), implicit=("abandoned",))
    assert judge.turn()
    store.append(replace(opinions(store)[0], retracted=True), feedback("outcome", "e", value=1.0))
    assert not judge.turn() and not standing(store)
    store.append(step("s2", "e"))
    assert judge.turn() and len(standing(store)) == 1
    judge.close()


def test_a_flood_of_outcomes_asks_no_critic_twice(store: SqlStore, tmp_path: Path) -> None:
    seen = [tmp_path / "said", tmp_path / "silent"]
    store.append(step("s1", "e"), *(feedback("outcome", "e", value=1.0) for _ in range(150)))
    judge = critique(
        store,
        critic("counting", options={"path": str(seen[0])}),
        critic("counting_silence", options={"path": str(seen[1])}),
    )
    assert judge.turn() and not judge.turn()
    store.append(*(feedback("outcome", "e", value=-1.0) for _ in range(150)))
    assert not judge.turn()
    assert [path.read_text() for path in seen] == ["e 1\n", "e 1\n"] and len(opinions(store)) == 1
    judge.close()


def test_side_calls_and_other_skills_are_not_judged(store: SqlStore) -> None:
    store.append(step("s1", "a", trainable=False), step("s2", "b", skill="math"), step("s3", "c", skill="code"))
    store.append(step("s4", "d", finish_reason="aborted"))
    judge = critique(store, critic("good", skills=("code",)))
    assert judge.turn() and [f.episode_id for f in opinions(store)] == ["c"]
    judge.close()


def test_whatever_goes_wrong_is_unknown_and_counted_and_the_others_still_judge(
    store: SqlStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.append(step("s1", "e"))
    reasons = {
        "raises": "ValueError",
        "refuses": "the judge is away",
        "hangs": "no answer within 0.5 s",
        "dies": "ended with 7",
        "eats": "MemoryError",
        "wrong_value": "[-1, 1]",
        "wrong_type": "gave a str",
        "wrong_target": "another episode",
        "wrong_source": "reward.weights",
    }
    critics = [critic(name, timeout_s=0.5 if name == "hangs" else 60.0) for name in reasons]
    judge = critique(store, *critics, critic("good"))
    assert judge.turn() and not judge.turn()
    found = {f.source.partition(":")[2]: f for f in opinions(store)}
    for name, reason in reasons.items():
        assert (found[name].kind, found[name].value, found[name].step_id) == ("outcome", None, None)
        assert reason in found[name].comment and "unknown" in found[name].tags, (name, found[name].comment)
    assert found["good"].value == 1.0
    counts = judge.status()
    assert all(counts[name] == {"judged": 0, "unknown": 1} for name in reasons)
    assert counts["good"] == {"judged": 1, "unknown": 0}
    assert "a user's text" not in caplog.text
    judge.close()
    bad_mark = WeightedReward(RewardConfig()).score(store.cases()[0])
    assert bad_mark.value == 1.0, "what is unknown does not count against an episode"


def test_a_new_version_takes_the_place_of_the_old_one(store: SqlStore) -> None:
    store.append(step("s1", "e"))
    first = critique(store, critic("good"))
    assert first.turn()
    first.close()
    store.append(feedback("outcome", "e", value=1.0))
    second = critique(store, critic("good", version="2"))
    assert second.turn()
    old, new, gone = opinions(store)
    assert old.id == gone.id != new.id and gone.retracted and "version:2" in new.tags
    second.close()


class Killed(BaseException):
    """As if the process had been killed there."""


class Fragile:
    """A store whose n-th write kills the process, before or after it is durable."""

    def __init__(self, store: SqlStore, at: int, after: bool) -> None:
        self._store, self._left, self._after = store, at, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def append(self, *records: Any, cursors: Any = None) -> int:
        self._left -= 1
        if self._left == 0 and not self._after:
            raise Killed
        position = self._store.append(*records, cursors=cursors)
        if self._left == 0:
            raise Killed
        return position


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_kill_at_any_write_loses_and_doubles_nothing(store: SqlStore, at: int, after: bool) -> None:
    talk = [{"role": "user", "content": "please do it now"}]
    for name in ("a", "b", "c"):
        store.append(step(f"{name}1", name, messages=talk), step(f"{name}2", name, messages=talk))
    store.append(feedback("outcome", "b", value=1.0))
    config = CriticsConfig(run=(critic("good"), critic("last")), implicit=("retry",))
    killed = Critique(Fragile(store, at, after), config, sources=SOURCES, clock=lambda: 1000.0)
    try:
        killed.turn()
    except Killed:
        pass
    finally:
        killed.close()
    again = Critique(store, config, sources=SOURCES, clock=lambda: 1000.0)
    again.turn()
    assert not again.turn()
    again.close()
    ours = [f for _, f in store.read(Feedback) if f.source != "human:alice"]
    assert len(ours) == len({f.id for f in ours}) == 9
    assert sorted((f.episode_id, f.source, f.step_id or "") for f in ours) == sorted(
        row
        for n in ("a", "b", "c")
        for row in ((n, "critic:good", ""), (n, "critic:last", f"{n}2"), (n, "implicit:retry", f"{n}1"))
    )
    assert not store.read(Step, after=store.cursor(STEPS))


def test_a_failed_write_is_the_stores_error(store: SqlStore) -> None:
    store.append(step("s1", "e"))
    judge = critique(store, critic("good"))
    store.close()
    with pytest.raises(StoreError):
        judge.turn()
    judge.close()


@pytest.mark.parametrize(
    ("use", "options", "says"),
    [
        ("tests.nowhere:good", None, "ModuleNotFoundError"),
        ("tests.critics:nobody", None, "AttributeError"),
        ("tests.critics:not_a_critic", None, "not a function"),
        ("tests.critics:counting", {"pfad": "x"}, "TypeError"),
        ("gradatim.feedback.checks:json_schema", {"schema": "/nowhere.json"}, "cannot be read"),
    ],
)
def test_a_critic_that_cannot_be_made_is_refused_at_the_start(use: str, options: Any, says: str) -> None:
    with Bench([CriticConfig(use=use, options=options)]) as bench, pytest.raises(ConfigError, match=says):
        bench.check()


def test_the_records_may_not_lie_where_a_sandbox_can_read(tmp_path: Path) -> None:
    config = Config(critics=CriticsConfig(run=(critic("good"),)))
    with pytest.raises(ConfigError, match="choose another --data-dir"):
        check_critics(replace(config, data_dir=Path(sys.prefix) / "data"))
    check_critics(replace(config, data_dir=tmp_path))
    twice = CriticsConfig(run=(critic("good"), critic("last", name="good")))
    with pytest.raises(ConfigError, match="two critics are called good"):
        check_critics(replace(config, data_dir=tmp_path, critics=twice))
    check_critics(Config(data_dir=Path(sys.prefix) / "data"))


def test_the_configuration_names_critics(tmp_path: Path) -> None:
    path = tmp_path / "g.toml"
    path.write_text(
        "[critics]\nquiet_s = 5\nimplicit = ['thanks']\n[[critics.run]]\nuse = 'a.b:c'\noptions = {x = 1}\n"
        "[[critics.run]]\nuse = 'a:d'\nname = 'tests'\n"
    )
    found = load(path, env={}).critics
    assert [(c.called, c.options, c.version) for c in found.run] == [("c", {"x": 1}, "1"), ("tests", None, "1")]
    assert found.quiet_s == 5 and found.implicit == ("thanks",)
    for wrong in ("use = 'a.b'", "use = 'a:b'\nnam = 'x'", "use = 'a:b'\ntimeout_s = 0"):
        path.write_text(f"[[critics.run]]\n{wrong}\n")
        with pytest.raises(ConfigError):
            load(path, env={})
    path.write_text("[critics]\nimplicit = ['mood']\n")
    with pytest.raises(ConfigError):
        load(path, env={})
    assert Config().critics == CriticsConfig(run=(), implicit=())


def test_implicit_signals_are_taken_back_when_the_episode_shows_otherwise(store: SqlStore) -> None:
    talk = ({"role": "user", "content": "please do it now"},)
    judge = critique(store, implicit=("abandoned", "retry"))
    store.append(step("s1", "e", messages=talk))
    assert not judge.turn()
    store.append(step("s2", "e", messages=talk))
    assert judge.turn() and [f.source for f in opinions(store, "implicit:")] == ["implicit:retry"]
    assert not judge.turn()
    judge.close()
    rows = [f for _, f in store.read(Feedback)]
    only = WeightedReward(RewardConfig()).score(store.cases()[0])
    assert rows[0].confidence == 0.2 and only.value is None, "by itself it is no reward"


def test_many_signals_share_what_confidence_there_is(store: SqlStore) -> None:
    talk = ({"role": "user", "content": "please do it now"},)
    judge = critique(store, implicit=("retry",))
    store.append(*(step(f"s{i}", "e", messages=talk) for i in range(3)))
    assert judge.turn() and [f.confidence for f in opinions(store, "implicit:")] == [0.2, 0.2]
    store.append(*(step(f"t{i}", "e", messages=talk) for i in range(6)))
    assert judge.turn() and not judge.turn()
    newest = {f.id: f.confidence for f in opinions(store, "implicit:")}
    assert list(newest.values()) == [0.1] * 8
    assert WeightedReward(RewardConfig()).score(store.cases()[0]).value is None, "however many, they are no reward"
    judge.close()


def test_steps_are_read_once(store: SqlStore) -> None:
    store.append(*(step(f"s{i}", f"e{i % 50}") for i in range(200)))
    judge = critique(store, critic("good"))
    assert judge.turn() and len(opinions(store)) == 50
    assert store.read(Step, after=store.cursor(STEPS)) == []
    judge.close()
