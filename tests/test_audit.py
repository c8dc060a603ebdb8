"""The chain over the decisions: whatever is done to it or to the records behind its back is found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from gradatim.errors import TransitionError
from gradatim.release.traffic import promote, rollback
from gradatim.store import SqlStore, open_store
from gradatim.store.audit import Audit, check, entries, link
from gradatim.types import AdapterId, Decision, Stage, Verdict

from .records import adapter, feedback, step
from .test_traffic import said


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(tmp_path / "s.db") as opened:
        opened.append(adapter(0), step(), feedback("score", value=1.0))
        for number in (1, 2):
            opened.append(adapter(number, parent=number - 1))
            promote(opened, "agent", AdapterId(f"agent@{number}"), actor="person")
        opened.append(said("agent@2", "watch", 0.05))
        rollback(opened, "agent", actor="person", reason="worse")
        yield opened


def checked(store: SqlStore, head: str = "") -> Audit:
    with store.engines.read.begin() as connection:
        return check(connection, head)


def tamper(store: SqlStore, statement: str) -> None:
    with store.engines.write.begin() as connection:
        assert connection.execute(text(statement)).rowcount >= 1


def test_an_untouched_chain_holds_every_decision(store: SqlStore) -> None:
    found = checked(store)
    assert found.problems == ()
    assert found.decisions == 3 + 3 + 4 + 1 + 2  # adapters, their moves in, promotions, a verdict, the rollback
    with store.engines.read.begin() as connection:
        rows = list(entries(connection))
    head = ""
    for _, content, hashed in rows:
        head = link(head, content)
        assert head == hashed
    assert found.head == head
    assert {json.loads(content)[0] for _, content, _ in rows} == {"Adapter", "Move", "Verdict"}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE moves SET actor = 'loop' WHERE actor = 'person'",
        "UPDATE moves SET created_at = created_at + 1 WHERE log_position = (SELECT MAX(log_position) FROM moves)",
        "UPDATE verdicts SET evidence = '{}'",
        "UPDATE adapters SET sha256 = 'x' WHERE step = 1",
        "DELETE FROM verdicts",
        "DELETE FROM audit WHERE log_position = (SELECT MIN(log_position) + 4 FROM audit)",
        "DELETE FROM audit WHERE log_position = (SELECT MAX(log_position) FROM audit)",
        "UPDATE audit SET payload = replace(payload, 'person', 'nobody')",
        "UPDATE audit SET hash = 'x' WHERE log_position = (SELECT MAX(log_position) FROM audit)",
        "UPDATE audit SET payload = '?' WHERE log_position = (SELECT MAX(log_position) FROM audit)",
        'INSERT INTO moves SELECT 9000, adapter_id, created_at, "before", after, actor, reason FROM moves LIMIT 1',
    ],
)
def test_whatever_is_changed_is_found(store: SqlStore, statement: str) -> None:
    tamper(store, statement)
    assert checked(store).problems


def test_a_chain_that_lost_its_end_is_found_by_the_head_that_was_kept(store: SqlStore) -> None:
    before = checked(store).head
    store.append(said("agent@1", "watch", 0.5))
    after = checked(store).head
    assert checked(store, before).problems == ()
    tamper(store, "DELETE FROM verdicts WHERE log_position = (SELECT MAX(log_position) FROM verdicts)")
    tamper(store, "DELETE FROM audit WHERE log_position = (SELECT MAX(log_position) FROM audit)")
    assert checked(store, before).problems == ()
    assert "cut off" in checked(store, after).problems[0]


def test_what_was_refused_leaves_no_link(store: SqlStore) -> None:
    before = checked(store)
    with pytest.raises(TransitionError):
        promote(store, "agent", AdapterId("agent@1"), actor="person")
    late = Verdict(adapter_id=AdapterId("agent@1"), created_at=1.0, gate="x", decision=Decision.PASS)
    store.append(late)
    assert checked(store).problems == ()
    assert checked(store).decisions == before.decisions + 1
    assert store.stages("agent", Stage.LIVE) == {AdapterId("agent@1"): Stage.LIVE}
