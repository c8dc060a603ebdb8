"""Episodes that nobody said anything of: which are judged, by what, and that the stated risk is kept on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gradatim.app import compose
from gradatim.app.offline import audit_queue
from gradatim.config import Config, RewardConfig
from gradatim.errors import ConfigError
from gradatim.loop import Loop
from gradatim.reward import AuditedReward, Hidden
from gradatim.silence import AT_ONCE, SILENT
from gradatim.store import SqlShelf, SqlStore, open_store
from gradatim.types import EpisodeId, Example, Reward

from .records import adapter, feedback, step
from .test_flow import loop_on
from .test_hidden import Signs

CONFIG = RewardConfig(min_labels=60, risk=0.2, hidden=True, silence_s=30.0)
AUDITED, QUIET = 400, 200


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(tmp_path / "s.db") as opened:
        opened.append(adapter(0))
        yield opened


def loop_for(store: SqlStore, noise: float = 0.4, now: float = 100.0) -> Loop:
    loop, _ = loop_on(store)
    hidden = Hidden(SqlShelf(store.engines), Signs(noise))
    model = AuditedReward(store, CONFIG, clock=lambda: now, hidden=hidden)
    return replace(loop, reward_model=model, rewards=CONFIG, clock=lambda: now)


def audit(store: SqlStore, numbers: range) -> None:
    """Nobody but the auditor spoke: number i is good where i % 2, as ``Signs`` has it."""
    for i in numbers:
        label = feedback("outcome", f"e{i}", value=1.0 if i % 2 else -1.0, source="human:audit-kim")
        store.append(step(f"s{i}", f"e{i}"), label)


def be_quiet(store: SqlStore, numbers: range, at: float = 1.0) -> None:
    for i in numbers:
        store.append(step(f"s{i}", f"e{i}", created_at=at))


def judge(loop: Loop) -> None:
    for _ in range(2 + QUIET // AT_ONCE + 1):
        loop.judge()


def rewards(store: SqlStore, numbers: range) -> dict[int, Reward]:
    found = ((i, store.newest(Reward, episode_id=EpisodeId(f"e{i}"))) for i in numbers)
    return {i: rows[0][1] for i, rows in found if rows}


def test_what_nobody_spoke_of_is_judged_by_the_models_states_within_the_risk(store: SqlStore) -> None:
    loop = loop_for(store)
    audit(store, range(AUDITED))
    judge(loop)
    quiet = range(AUDITED, AUDITED + QUIET)
    be_quiet(store, quiet)
    judge(loop)
    found = rewards(store, quiet)
    wrong = [i for i, r in found.items() if r.value is not None and (r.value > 0) != bool(i % 2)]
    assert len(found) > QUIET / 3
    assert len(wrong) <= CONFIG.risk * len(found)
    assert all(r.value is not None and r.feedback_ids == () for r in found.values())
    taught = {e.episode_id for _, e in store.read(Example)}
    assert taught & {EpisodeId(f"e{i}") for i in found}


def test_states_that_tell_nothing_judge_nothing(store: SqlStore) -> None:
    loop = loop_for(store, noise=1e3)
    audit(store, range(AUDITED))
    judge(loop)
    quiet = range(AUDITED, AUDITED + QUIET)
    be_quiet(store, quiet)
    judge(loop)
    assert len(rewards(store, quiet)) <= 0.02 * QUIET
    assert store.cursor(SILENT) > 0


def test_without_labels_nothing_is_judged_nor_recorded(store: SqlStore) -> None:
    loop = loop_for(store)
    be_quiet(store, range(1))
    judge(loop)
    be_quiet(store, range(1, 20))
    judge(loop)
    assert not store.read(Reward)
    assert store.cursor(SILENT) == store.newest(type(step()))[0][0]


def test_what_was_there_before_it_was_switched_on_is_left_alone(store: SqlStore) -> None:
    audit(store, range(AUDITED))
    quiet = range(AUDITED, AUDITED + 40)
    be_quiet(store, quiet)
    judge(loop_for(store))
    assert not rewards(store, quiet)


def test_an_episode_that_goes_on_or_is_young_is_not_judged_yet(store: SqlStore) -> None:
    audit(store, range(AUDITED))
    judge(loop_for(store))
    store.append(step("a0", f"e{AUDITED + 1}"))
    store.append(step("a1", f"e{AUDITED + 1}", created_at=99.0))
    judge(loop_for(store, noise=0.01, now=100.0))
    assert not rewards(store, range(AUDITED + 1, AUDITED + 2))
    judge(loop_for(store, noise=0.01, now=200.0))
    assert rewards(store, range(AUDITED + 1, AUDITED + 2))


def test_who_speaks_later_is_heard(store: SqlStore) -> None:
    audit(store, range(AUDITED))
    loop = loop_for(store, noise=0.01)
    judge(loop)
    i = AUDITED + 1
    be_quiet(store, range(i, i + 1))
    judge(loop)
    before = rewards(store, range(i, i + 1))[i]
    store.append(feedback("outcome", f"e{i}", value=-1.0, source="human:audit-kim"))
    judge(loop)
    after = rewards(store, range(i, i + 1))[i]
    assert before.value is not None and before.value > 0.0
    assert after.value == -1.0
    assert after.position > before.position


def test_it_takes_the_models_states(store: SqlStore) -> None:
    with pytest.raises(ConfigError, match=r"reward\.hidden"):
        compose.build_judges(Config(reward=RewardConfig(silence_s=60.0)), store)


def test_whoever_audits_is_shown_some_that_nobody_spoke_of(tmp_path: Path) -> None:
    config = Config(data_dir=tmp_path, reward=CONFIG)
    with compose.build_store(config) as store:
        store.append(adapter(0))
        be_quiet(store, range(6))
        for i in range(6, 12):
            store.append(step(f"s{i}", f"e{i}"), feedback("score", f"e{i}", value=1.0))
    found = audit_queue(config, 6)
    assert sum("nobody spoke of" in row["why"] for row in found) == 3
    assert {row["episode"] for row in audit_queue(config, 20)} == {f"e{i}" for i in range(12)}
