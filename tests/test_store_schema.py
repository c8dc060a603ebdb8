"""The schema, its migrations and its codecs; what a query costs."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, event, inspect, text

import gradatim
from gradatim.errors import StoreError
from gradatim.scopes import scope_of
from gradatim.store import SqlStore, open_store
from gradatim.store.migrations import scripts
from gradatim.store.rows import from_kept, to_row
from gradatim.store.schema import FLOATS, JSON, JSON_TUPLE, TABLES, TOKENS, metadata
from gradatim.store.shelf import SqlShelf
from gradatim.testing.records import a_move, an_adapter
from gradatim.types import RECORDS, AdapterId, Example, Feedback, MemoryEntry, Move, Stage, Step, Update
from tests.records import example, feedback, step
from tests.test_store import create_database, postgresql_socket

__all__ = ["postgresql_socket"]  # a fixture

# ------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_every_field_of_a_record_has_a_column(kind: type[Any]) -> None:
    columns = [column.name for column in TABLES[kind].columns]
    assert sorted(columns) == sorted(["log_position", *(field.name for field in fields(kind))])


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_tokens_come_back(ids: list[int]) -> None:
    blob = TOKENS.encode(tuple(ids))
    assert TOKENS.decode(blob) == tuple(ids)
    assert blob == b"".join(struct.pack("<i", i) for i in ids)


@given(st.lists(st.floats(allow_nan=False)))
def test_logprobs_come_back_bit_for_bit(values: list[float]) -> None:
    assert FLOATS.decode(FLOATS.encode(tuple(values))) == tuple(values)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    max_leaves=10,
)


@given(_json)
def test_json_comes_back_and_is_text_for_both_databases(value: Any) -> None:
    kept = JSON.encode(value)
    assert isinstance(kept, str)
    assert "\0" not in kept
    kept.encode()  # UTF-8
    assert JSON.decode(kept) == value
    assert JSON_TUPLE.decode(JSON_TUPLE.encode((value,))) == (value,)
    assert json.loads(kept) == value


# ---------------------------------------------------------------------------------------------- migrations


def _check_migrated_equals_declared(migrated: Engine) -> None:
    with migrated.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def _ddl(path: Path) -> set[str]:
    """What SQLite was told, with the spaces evened out; alembic compares no conditions of partial indexes."""
    connection = sqlite3.connect(path)
    statements = {row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    connection.close()
    return {" ".join(s.split()) for s in statements if "alembic_version" not in s}


def test_migrating_an_empty_database_gives_the_declared_schema(tmp_path: Path) -> None:
    with open_store(tmp_path / "migrated.db") as store:
        _check_migrated_equals_declared(store.engines.read)
    declared = create_engine(f"sqlite:///{tmp_path / 'declared.db'}")
    metadata.create_all(declared)
    declared.dispose()
    assert _ddl(tmp_path / "migrated.db") == _ddl(tmp_path / "declared.db")


@pytest.mark.postgresql
def test_migrating_an_empty_postgresql_gives_the_declared_schema(postgresql_socket: Path) -> None:
    with open_store(create_database(postgresql_socket, "migrated")) as store:
        _check_migrated_equals_declared(store.engines.read)
        declared = create_engine(
            create_database(postgresql_socket, "declared").replace("postgresql:", "postgresql+psycopg:")
        )
        metadata.create_all(declared)
        try:
            for table in metadata.tables:
                assert str(inspect(declared).get_columns(table)) == str(inspect(store.engines.read).get_columns(table))
                assert inspect(declared).get_indexes(table) == inspect(store.engines.read).get_indexes(table)
        finally:
            declared.dispose()


def test_an_old_database_is_brought_up_to_date_with_its_contents(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        opts = {"fn": lambda revision, _: scripts()._upgrade_revs("001_initial", revision)}
        context = MigrationContext.configure(connection, opts=opts)
        with Operations.context(context):
            context.run_migrations()
        for step_number, stage in enumerate(("retired", "live", "candidate")):
            connection.execute(
                text("INSERT INTO stages VALUES (:id, 'agent', :step, :stage)"),
                {"id": f"agent@{step_number}", "step": step_number, "stage": stage},
            )
        connection.execute(text("INSERT INTO moves VALUES (1, 'agent@0', 1.0, NULL, 'live', 'store', '\"\"')"))
        connection.execute(text("UPDATE log_end SET log_position = 1"))
    engine.dispose()
    with open_store(path) as store:
        _check_migrated_equals_declared(store.engines.read)
        assert store.append(feedback("score")) == 2
        store.move(
            Move(adapter_id=AdapterId("agent@2"), created_at=2.0, before=Stage.CANDIDATE, after=Stage.LIVE, actor="x"),
            Move(adapter_id=AdapterId("agent@1"), created_at=2.0, before=Stage.LIVE, after=Stage.RETIRED, actor="x"),
        )
        assert store.counts() | {"feedback": 1, "moves": 3} == store.counts()
        assert {s: n for s, n in store.stage_counts("agent").items() if n} == {Stage.RETIRED: 2, Stage.LIVE: 1}


def test_the_tallies_are_what_counting_gives(tmp_path: Path) -> None:
    """Also where one of many submits of a transaction is refused."""
    with open_store(tmp_path / "store.db") as store:
        for number in range(4):
            store.append(an_adapter(number))
            if number:
                store.move(a_move(f"agent@{number}", Stage.CANDIDATE, Stage.REJECTED))
        futures = [store.submit(step(f"s{i % 5}", text=f"{i // 10}"), feedback("score")) for i in range(40)]
        refused = [future.exception() for future in futures]
        assert any(refused) and not all(refused)
        with store.engines.read.connect() as connection:
            for name, count in store.counts().items():
                assert connection.execute(text(f"SELECT count(*) FROM {name}")).scalar_one() == count, name
        assert {s: n for s, n in store.stage_counts("agent").items() if n} == {Stage.LIVE: 1, Stage.REJECTED: 3}


def test_examples_of_an_older_database_read_as_what_they_were(tmp_path: Path) -> None:
    """001 knew no hints, no labels and no log-probabilities of examples."""
    path = tmp_path / "store.db"
    old = create_engine(f"sqlite:///{path}")
    with old.begin() as connection:
        opts = {"fn": lambda revision, _: scripts()._upgrade_revs("001_initial", revision)}
        context = MigrationContext.configure(connection, opts=opts)
        with Operations.context(context):
            context.run_migrations()
        kept = to_row(example("x", chosen_ids=(7, 8), weight=0.5))
        row = {k: v for k, v in kept.items() if k not in ("label", "logprobs", "hint_ids")} | {"log_position": 1}
        names = ", ".join(f'"{name}"' for name in row)
        values = ", ".join(f":{name}" for name in row)
        connection.execute(text(f"INSERT INTO examples ({names}) VALUES ({values})"), row)
        connection.execute(text("UPDATE log_end SET log_position = 1"))
    old.dispose()
    with open_store(path) as store:
        assert store.read(Example) == [(1, example("x", chosen_ids=(7, 8), weight=0.5))]
        hinted = example("y", chosen_ids=(), rejected_ids=(7,), hint_ids=(1, 9, 2), label=0.75, logprobs=(-0.1,))
        store.append(hinted)
        assert [e for _, e in store.read(Example, id="y")] == [hinted]


def test_what_was_remembered_before_scopes_gets_that_of_its_step(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    old = create_engine(f"sqlite:///{path}")
    asked = step("s1", messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}))
    made = MemoryEntry(
        id="s1+",
        tenant="",
        user="",
        episode_id=asked.episode_id,
        step_id=asked.id,
        created_at=1.0,
        tokens=(5,),
        value=1.0,
    )
    with old.begin() as connection:
        opts = {"fn": lambda revision, _: scripts()._upgrade_revs("011_memory_notes", revision)}
        context = MigrationContext.configure(connection, opts=opts)
        with Operations.context(context):
            context.run_migrations()
        for table, row in (("steps", to_row(asked) | {"log_position": 1}), ("memory_entries", from_kept(made))):
            columns = {k: v for k, v in row.items() if k != "scope"}
            names, values = ", ".join(f'"{n}"' for n in columns), ", ".join(f":{n}" for n in columns)
            connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"), columns)
        connection.execute(text("UPDATE log_end SET log_position = 1"))
    old.dispose()
    with open_store(path) as store:
        assert store.step(id=asked.id) == asked and asked.scope is None
        assert SqlShelf(store.engines).load(MemoryEntry) == [replace(made, scope=scope_of(asked.messages))]


def test_what_updates_kept_of_their_change_was_a_metric_once(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    old = create_engine(f"sqlite:///{path}")
    found: Mapping[str, Mapping[str, float]] = {"whole": {"kl": 0.1}, "half": {"scale": 0.5}, "odd": {"lr_scale": 2.0}}
    with old.begin() as connection:
        opts = {"fn": lambda revision, _: scripts()._upgrade_revs("004_left_out", revision)}
        context = MigrationContext.configure(connection, opts=opts)
        with Operations.context(context):
            context.run_migrations()
        for position, (name, metrics) in enumerate(found.items(), 1):
            kept = to_row(
                Update(id=name, created_at=1.0, applied=True, parent_id=AdapterId("agent@0"), metrics=metrics)
            )
            row = {k: v for k, v in kept.items() if k != "scale"} | {"log_position": position}
            names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
            connection.execute(text(f"INSERT INTO updates ({names}) VALUES ({values})"), row)
        connection.execute(text("UPDATE log_end SET log_position = 3"))
    old.dispose()
    with open_store(path) as store:
        records = [update for _, update in store.read(Update)]
        assert {u.id: u.metrics for u in records} == found
        assert {u.id: u.scale for u in records} == {"whole": 1.0, "half": 0.5, "odd": 1.0}


def test_there_is_one_line_of_migrations() -> None:
    assert len(scripts().get_heads()) == 1
    assert scripts().get_bases() == ["001_initial"]


def test_a_database_of_a_newer_version_does_not_open(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with open_store(path) as store:
        store.append(feedback("score"))
        with store.engines.write.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '999_future'"))
    with pytest.raises(StoreError, match=r"newer version of gradatim \(schema 999_future\); install that version"):
        open_store(path)


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE verdicts (mine TEXT)")  # somebody else's: in the way of a late statement
    connection.close()
    with pytest.raises(StoreError, match="verdicts already exists"):
        open_store(path)
    assert _ddl(path) == {"CREATE TABLE verdicts (mine TEXT)"}


def test_migrations_need_nothing_but_the_installed_package(tmp_path: Path) -> None:
    package = tmp_path / "site" / "gradatim"
    shutil.copytree(Path(gradatim.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import gradatim, gradatim.store as s\n"
        f"assert gradatim.__file__.startswith({str(package)!r}), gradatim.__file__\n"
        "s.open_store('new.db').close()"
    )
    env = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "new.db").exists()


def test_opening_a_new_store_from_many_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: open_store(tmp_path / "store.db"), range(8)))
    for i, store in enumerate(stores):
        store.append(feedback("score", id=f"f{i}"))
    assert len(stores[0].read(Feedback)) == 8
    for store in stores:
        store.close()


def test_sqlite_is_durable(tmp_path: Path) -> None:
    with open_store(tmp_path / "store.db") as store, store.engines.write.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


# ------------------------------------------------------------------------------------ what a query may cost


def _plans(store: SqlStore, call: Any) -> list[str]:
    """EXPLAIN QUERY PLAN of each statement that a call sends to SQLite."""
    sent: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        sent.append((statement, parameters))

    event.listen(store.engines.read, "before_cursor_execute", note)
    call()
    event.remove(store.engines.read, "before_cursor_execute", note)
    plans = []
    with store.engines.read.connect() as connection:
        for statement, parameters in sent:
            if statement.startswith("SELECT"):
                rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
                plans += [row.detail for row in rows]
    return plans


def test_no_read_scans_a_table(tmp_path: Path) -> None:
    with open_store(tmp_path / "store.db") as store:
        store.append(step("s0"), feedback("score", id="f"))
        reads = [
            lambda: store.cases(after=0),
            lambda: store.step(id="s0"),  # type: ignore[arg-type]
            lambda: store.step(chain_key="x"),
            lambda: store.episode("e"),  # type: ignore[arg-type]
            lambda: store.stages("agent"),
            lambda: store.stages("agent", Stage.LIVE, Stage.CANDIDATE),
            lambda: store.newest(Step, before=5),
            lambda: store.counts(),
            lambda: store.stage_counts("agent"),
            lambda: store.cursor("loop"),
            lambda: store.read(Step, after=5),
            *(
                lambda k=kind, c=c, read=read: read(k, **{c: "x"})
                for kind in RECORDS
                for c in TABLES[kind].info["by"]
                for read in (store.read, store.newest)
            ),
        ]
        for read in reads:
            plans = _plans(store, read)
            assert plans
            assert not [plan for plan in plans if plan.startswith("SCAN")], plans


def test_cases_cost_a_fixed_number_of_statements(tmp_path: Path) -> None:
    with open_store(tmp_path / "store.db") as store:
        for i in range(60):
            store.submit(step(f"s{i}", f"e{i}"), feedback("score", f"e{i}"))
        store.append()
        sent: list[str] = []
        event.listen(store.engines.read, "before_cursor_execute", lambda *args: sent.append(args[2]))
        assert len(store.cases(limit=60)) == 60
        assert len([s for s in sent if s.startswith("SELECT")]) == 3


def test_the_generation_rises_with_every_change_of_stage_and_with_nothing_else(tmp_path: Path) -> None:
    with open_store(tmp_path / "store.db") as store:
        assert store.generation() == 0
        store.append(an_adapter(0))
        first = store.generation()
        assert first > 0
        store.append(feedback("score"))
        assert store.generation() == first
        store.append(an_adapter(1))
        assert store.generation() > first
        assert store.counts() == {
            **dict.fromkeys((table.name for table in TABLES.values()), 0),
            "feedback": 1,
            "adapters": 2,
            "moves": 2,
        }
