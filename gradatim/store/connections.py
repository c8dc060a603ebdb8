"""Engines for SQLite and PostgreSQL, and their errors in words. Knows no records and no tables.

SQLite: write-ahead log with ``synchronous=FULL``, so that a commit has been synced when it returns; readers never wait
for writers. One connection writes per process, and takes the write lock when it begins, not at its first write: a
transaction that reads first and then writes could not be retried.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from gradatim.errors import StoreError

_WAL_BYTES = 64 * 2**20  # the write-ahead log is cut back to this after a checkpoint

# what the databases say -> what to do about it
_WAYS_OUT = (
    (r"disk is full|No space left|DiskFull", "free some space and send it again; what was acknowledged before is safe"),
    (r"readonly|read-only|unable to open|[Pp]ermission", "check the permissions of the file and of its folder"),
    (r"locked|busy", "another process holds the database; send it again when that has ended"),
    (r"not a database|malformed", "the file is damaged or is not ours; restore a backup or choose another file"),
    (r"disk I/O error", "check the disk and the system's log; it was not acknowledged, so send it again"),
    (r"connect|server closed|terminating|refused", "check that PostgreSQL is running and that the URL is right"),
)


@dataclass(frozen=True, slots=True)
class Engines:
    """Where to write, one connection at a time, and where to read, from any thread, one snapshot a transaction."""

    write: Engine
    read: Engine
    where: str  # for messages: no password in it

    def dispose(self) -> None:
        self.read.dispose()
        self.write.dispose()


def explain(error: SQLAlchemyError) -> str:
    """The database's own words, without SQL and parameters (they hold users' text), and the way out."""
    cause = getattr(error, "orig", None) or error
    words = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    for pattern, way_out in _WAYS_OUT:
        if re.search(pattern, words) or re.search(pattern, type(cause).__name__):
            return f"{words}; {way_out}"
    return words


@contextmanager
def in_words(doing: str) -> Iterator[None]:
    """Database errors become StoreError."""
    try:
        yield
    except PoolTimeoutError as e:
        raise StoreError(f"{doing}: too many reads at once; send it again") from e
    except SQLAlchemyError as e:
        raise StoreError(f"{doing}: {explain(e)}") from e


def connect(url_or_path: str | Path, *, busy_timeout_s: float, pool_size: int) -> Engines:
    """Nothing is opened yet, except that a SQLite file's folder is made. StoreError for a URL we cannot serve."""
    if isinstance(url_or_path, Path) or "://" not in url_or_path:
        return _sqlite(URL.create("sqlite", database=str(url_or_path)), busy_timeout_s, pool_size)
    try:
        url = make_url(url_or_path)
    except ArgumentError as e:
        raise StoreError(
            "the store's URL cannot be read; write sqlite:///PATH or postgresql://USER@HOST/DATABASE"
        ) from e
    if url.get_backend_name() == "sqlite":
        return _sqlite(url, busy_timeout_s, pool_size)
    if url.get_backend_name() == "postgresql":
        return _postgresql(url, busy_timeout_s, pool_size)
    raise StoreError(f"the store knows sqlite:// and postgresql://, not {url.drivername}://")


# ------------------------------------------------------------------------------------------------- SQLite


def _sqlite(url: URL, busy_timeout_s: float, pool_size: int) -> Engines:
    if not url.database or url.database == ":memory:" or "mode=memory" in url.database:
        raise StoreError("a store in memory would lose what it acknowledged; give the path of a file")
    path = Path(url.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StoreError(f"cannot make the folder {path.parent}: {e.strerror}") from e
    url = url.set(drivername="sqlite+pysqlite")
    options: dict[str, Any] = {"connect_args": {"timeout": busy_timeout_s}, "hide_parameters": True}
    write = create_engine(url, pool_size=1, max_overflow=0, **options)
    read = create_engine(url, pool_size=pool_size, max_overflow=2 * pool_size, **options)

    @event.listens_for(write, "connect")
    def for_writing(connection: sqlite3.Connection, _: Any) -> None:
        _prepare(connection, path, busy_timeout_s)

    @event.listens_for(read, "connect")
    def for_reading(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA query_only = ON")

    # sqlite3 would begin transactions where it sees fit; we begin them ourselves
    @event.listens_for(write, "begin")
    def begin_write(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    @event.listens_for(read, "begin")
    def begin_read(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return Engines(write=write, read=read, where=str(path))


def _prepare(connection: sqlite3.Connection, path: Path, busy_timeout_s: float) -> None:
    connection.isolation_level = None
    if _write_ahead(connection, time.monotonic() + busy_timeout_s) != "wal":
        raise StoreError(
            f"the file system of {path} cannot share memory between processes; put the file on a local disk"
        )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")


def _write_ahead(connection: sqlite3.Connection, deadline: float) -> str:
    """SQLite does not always wait its busy timeout for this change of mode: two first openings at once need ours."""
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as e:
            if "locked" not in str(e) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


# --------------------------------------------------------------------------------------------- PostgreSQL


def _postgresql(url: URL, busy_timeout_s: float, pool_size: int) -> Engines:
    try:
        import psycopg  # noqa: F401  (optional: only this kind of URL needs it)
    except ImportError as e:
        raise StoreError("PostgreSQL needs its driver: pip install 'gradatim[postgresql]'") from e
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=pool_size,
        max_overflow=2 * pool_size,
        isolation_level="READ COMMITTED",  # after waiting for the lock, a writer must see what the others wrote
        pool_pre_ping=True,  # a restarted server costs one ping, not one failed request
        hide_parameters=True,
        connect_args={"connect_timeout": max(2, round(busy_timeout_s))},
    )

    @event.listens_for(engine, "connect")
    def durable(connection: Any, _: Any) -> None:
        """An acknowledgement means durable, even where the server's default is to lose the last commits."""
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT set_config('synchronous_commit', 'on', false)"
                " WHERE current_setting('synchronous_commit') = 'off'"
            )
            cursor.execute(f"SET lock_timeout = '{round(busy_timeout_s * 1000)}ms'")
        connection.commit()

    snapshot = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return Engines(write=engine, read=snapshot, where=url.render_as_string(hide_password=True))


def is_fault(error: DBAPIError) -> bool:
    """Whether the connection, the disk or the server is at fault, and not the one row that was being written."""
    return type(error).__name__ in ("OperationalError", "InternalError", "DatabaseError")
