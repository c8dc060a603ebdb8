"""A full disk, missing permissions, a wrong file, a wrong record: an error that names the way out, and nothing lost."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from gradatim.errors import RecordError, StoreError
from gradatim.store import SqlStore, open_store
from gradatim.types import AdapterId, Feedback, Step, Update
from tests.records import feedback, step


def _opinion(id: str, comment: str = "") -> Feedback:
    return feedback("score", id=id, value=1.0, comment=comment)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(tmp_path / "store.db") as opened:
        yield opened


# ----------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_fails_the_write_and_loses_nothing_that_was_acknowledged(store: SqlStore) -> None:
    pages = {"max": 2**30}

    @event.listens_for(store.engines.write, "begin")
    def limit(connection: Any) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages['max']}")

    store.append(_opinion("before"))
    pages["max"] = 1  # SQLite takes its present size
    errors = []
    acknowledged = {"before"}
    for i in range(20):
        try:
            store.append(_opinion(f"big{i}", comment="x" * 100_000))
            acknowledged.add(f"big{i}")
        except StoreError as e:
            errors.append(str(e))
    assert errors
    assert "full" in errors[0] and "free some space" in errors[0]
    assert {f.id for _, f in store.read(Feedback)} == acknowledged
    pages["max"] = 2**30  # space is back
    store.append(_opinion("after", comment="x" * 100_000))
    assert {f.id for _, f in store.read(Feedback)} == acknowledged | {"after"}
    assert store.end() == len(acknowledged) + 1


@pytest.fixture
def tiny_disk() -> Iterator[Path]:
    """A file system of 1 MiB. Skips where we may not mount one."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def test_a_disk_that_is_really_full_and_then_is_not(tiny_disk: Path) -> None:
    ballast = tiny_disk / "ballast"
    with open_store(tiny_disk / "store.db") as store:
        acknowledged = set()
        store.append(_opinion("before"))
        acknowledged.add("before")
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(StoreError, match=r"full|I/O"):
            store.append(_opinion("lost", comment="x" * 100_000))
        futures = [store.submit(_opinion(f"many{i}", comment="x" * 50_000)) for i in range(20)]
        assert all(isinstance(future.exception(30), StoreError) for future in futures)
        assert {f.id for _, f in store.read(Feedback)} == acknowledged
        ballast.unlink()
        store.append(_opinion("after", comment="x" * 50_000))
        acknowledged.add("after")
    with open_store(tiny_disk / "store.db") as store:
        assert {f.id for _, f in store.read(Feedback)} == acknowledged


# --------------------------------------------------------------------------------------------- permissions


_OPEN_AS_NOBODY = """
import os, sys, tempfile
from gradatim.errors import RecordError, StoreError
from gradatim.store import open_store
with tempfile.TemporaryDirectory() as folder:
    open_store(folder + "/warm-up.db").close()  # imports all there is to import: nobody may not read it afterwards
if os.geteuid() == 0:  # root may write everywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    open_store(sys.argv[1]).close()
except StoreError as e:
    print(e)
"""


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_store_that_may_not_be_written_does_not_open(what: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "store.db"
        if what == "file":
            open_store(path).close()
            path.chmod(0o444)
        folder.chmod(0o555)
        try:
            done = subprocess.run(
                [sys.executable, "-c", _OPEN_AS_NOBODY, str(path)], capture_output=True, text=True, check=False
            )
        finally:
            folder.chmod(0o755)
    assert f"cannot open {path}" in done.stdout, done
    assert "check the permissions" in done.stdout


def test_a_file_that_becomes_read_only_fails_the_write_and_not_the_reads(store: SqlStore) -> None:
    store.append(_opinion("before"))
    readonly = {"on": True}

    @event.listens_for(store.engines.write, "begin")
    def forbid(connection: Any) -> None:
        connection.exec_driver_sql(f"PRAGMA query_only = {int(readonly['on'])}")

    with pytest.raises(StoreError, match="check the permissions"):
        store.append(_opinion("refused"))
    assert [f.id for _, f in store.read(Feedback)] == ["before"]
    readonly["on"] = False
    store.append(_opinion("after"))
    assert [f.id for _, f in store.read(Feedback)] == ["before", "after"]


def test_a_database_locked_by_another_process_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with open_store(path, busy_timeout_s=0.2) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked; another process"):
            store.append(_opinion("refused"))
        assert list(store.read(Feedback)) == []  # readers do not wait for writers
        other.execute("ROLLBACK")
        other.close()
        store.append(_opinion("after"))


# --------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite://", "memory"),
        (":memory:", "memory"),
        ("mysql://localhost/x", "not mysql"),
        ("postgresql://user:secret@/x?host=/nowhere", "PostgreSQL is running"),
        ("://", "cannot be read"),
    ],
)
def test_a_url_that_cannot_be_served(url: str, says: str) -> None:
    with pytest.raises(StoreError, match=says) as failure:
        open_store(url)
    assert "secret" not in str(failure.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes\n" * 100)
    with pytest.raises(StoreError, match="choose another file"):
        open_store(path)
    assert path.read_text().startswith("these are my notes")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot make the folder"):
        open_store(tmp_path / "file" / "store.db")


@pytest.mark.parametrize(
    "record",
    [
        replace(step(), prompt_ids=(2**31,)),
        replace(step(), user="a\0b"),
        replace(step(), user="\ud800"),
        replace(step(), messages=({"role": object()},)),
        replace(step(), logprobs=("a",)),  # type: ignore[arg-type]
        replace(feedback("score"), value=float("nan")),
        replace(feedback("score"), created_at=None),  # type: ignore[arg-type]
        replace(feedback("score"), id=7),  # type: ignore[arg-type]
        "no record",
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_record_that_cannot_be_kept_is_refused_alone(store: SqlStore, record: Any) -> None:
    good = store.submit(_opinion("good"))
    bad = store.submit(record)
    also_good = store.submit(_opinion("also good"))
    assert isinstance(bad.exception(10), StoreError)
    assert (good.result(10), also_good.result(10)) == (1, 2)


def test_errors_and_logs_hold_no_text_of_users(store: SqlStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    @event.listens_for(store.engines.write, "begin")
    def forbid(connection: Any) -> None:
        connection.exec_driver_sql("PRAGMA query_only = 1")

    with pytest.raises(StoreError) as failure:
        store.append(_opinion("x", comment="my password is hunter2"))
    assert "hunter2" not in f"{failure.value!r} {failure.value.__cause__!r} {caplog.text}"


def test_a_damaged_row_is_an_error_and_not_a_wrong_record(store: SqlStore) -> None:
    store.append(step())
    with store.engines.write.begin() as connection:
        connection.exec_driver_sql("UPDATE steps SET logprobs = x'00'")
        connection.exec_driver_sql("UPDATE steps SET messages = 'no json'")
    with pytest.raises(StoreError, match="the Step at position 1 is damaged"):
        store.read(Step)


# ---------------------------------------------------------------------------------------------- the writer


def test_a_submit_after_close_fails_and_does_not_hang(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store.db")
    waiting = [store.submit(_opinion(f"f{i}")) for i in range(50)]
    store.close()
    assert all(future.result(0) for future in waiting), "what was submitted before must be written"
    with pytest.raises(StoreError, match="closed"):
        store.append(_opinion("late"))
    store.close()  # twice is no error


def test_a_submit_cannot_be_taken_back(store: SqlStore) -> None:
    future = store.submit(_opinion("f"))
    assert not future.cancel()
    assert future.result(10) == 1


def test_a_callback_that_would_wait_for_itself_is_told_so(store: SqlStore) -> None:
    outcome: Future[str] = Future()

    def append_again(_: Future[int]) -> None:
        try:
            store.append(_opinion("again"))
        except StoreError as e:
            outcome.set_result(str(e))

    with store.engines.write.connect():  # the writer has to wait until the callback is in place
        future = store.submit(_opinion("f"))
        future.add_done_callback(append_again)
    assert "use submit()" in outcome.result(10)


def test_too_many_waiting_writes_are_refused(tmp_path: Path) -> None:
    with open_store(tmp_path / "store.db", max_queue=3, max_batch=1) as store:
        with store.engines.write.connect():  # the one connection for writing: the writer waits for it
            futures = [store.submit(_opinion(f"f{i}")) for i in range(10)]
            refused = [f for f in futures if f.done()]
        assert 6 <= len(refused) <= 7  # the writer may have taken one already
        assert all("too slow or stuck" in str(f.exception()) for f in refused)
        assert all(f.result(10) for f in futures if f not in refused)


def test_many_writers_share_one_transaction(store: SqlStore) -> None:
    commits: list[Any] = []
    event.listen(store.engines.write, "commit", commits.append)
    with store.engines.write.connect():  # let them queue up
        futures = [store.submit(_opinion(f"f{i}")) for i in range(100)]
    assert [f.result(10) for f in futures] == list(range(1, 101))
    assert len(commits) <= 2


def test_a_mistake_in_the_writer_is_told_to_whoever_waits(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("gradatim.store.writer.Transaction.apply", broken)
        with pytest.raises(StoreError, match="ZeroDivisionError"):
            store.append(_opinion("f"))
    assert store.append(_opinion("g")) == 1


def test_infinite_metrics_are_kept(store: SqlStore) -> None:
    update = Update(
        id="u", created_at=1.0, applied=False, parent_id=AdapterId("agent@0"), metrics={"loss": float("inf")}
    )
    store.append(update)
    assert store.read(Update) == [(1, update)]


def test_what_no_database_can_keep_is_told_from_a_database_that_fails(tmp_path: Path) -> None:
    with open_store(tmp_path / "store.db") as store:
        for record in (feedback("score", value=float("nan")), feedback("score", source="a\0b"), "no record"):
            with pytest.raises(RecordError):
                store.append(record)  # type: ignore[arg-type]
        store.append(feedback("score"))
