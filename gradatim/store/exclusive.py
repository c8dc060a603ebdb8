"""One server a database: a lock that PostgreSQL itself keeps for as long as a connection lives.

It goes with its process, however that dies, as the data directory's lock does; what is not noticed is a machine that
is cut off, until PostgreSQL's own keepalives give it up. A pooler between that hands connections on after each
transaction would hand the lock on too: connect to PostgreSQL directly. SQLite needs none: its file lies in the data
directory, which has a lock. Knows no records.
"""

from __future__ import annotations

import os
import socket
import time
import zlib
from contextlib import suppress

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from gradatim.errors import InUseError
from gradatim.store.connections import Engines, in_words

_CLASS = 0x67726164  # of PostgreSQL's advisory locks; any number that nobody else uses
_POLL_S = 0.05

_TAKE = text("SELECT pg_try_advisory_lock(:class, :role)")
_HELD = text(
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid()"
    " AND classid = :class AND objid = :role"
)
_WHO = text(
    "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid)"
    " WHERE locktype = 'advisory' AND granted AND classid = :class AND objid = :role AND datname = current_database()"
)


class Exclusive:
    """The right to be the one ``role`` (server, loop) on a database. Take it, look now and then, let it go."""

    def __init__(self, engines: Engines, role: str) -> None:
        self._engines = engines
        self._role = role
        self._keys = {"class": _CLASS, "role": zlib.crc32(role.encode()) & 0x7FFFFFFF}
        self._connection: Connection | None = None

    @property
    def needed(self) -> bool:
        return self._engines.write.dialect.name == "postgresql"

    def take(self, *, wait_s: float = 1.0) -> None:
        """InUseError when another process has it for longer than ``wait_s``; StoreError."""
        if not self.needed:
            return
        with in_words(f"cannot lock {self._engines.where}"):
            self._connection = self._connect()
            try:
                self._wait(self._connection, time.monotonic() + wait_s)
            except BaseException:
                self.release()
                raise

    def _wait(self, connection: Connection, deadline: float) -> None:
        while not connection.execute(_TAKE, self._keys).scalar_one():
            if time.monotonic() > deadline:
                who = connection.execute(_WHO, self._keys).scalar() or "another process"
                raise InUseError(
                    f"the database {self._engines.where} is in use by another {self._role} ({who}); "
                    "stop that one first, or give this one a database of its own"
                )
            time.sleep(_POLL_S)

    def keep(self) -> None:
        """Take it again where PostgreSQL was restarted and lost it. InUseError where another was faster; StoreError."""
        if not self.needed:
            return
        if self._connection is not None:
            with suppress(SQLAlchemyError):
                if self._connection.execute(_HELD, self._keys).scalar_one():
                    return
        self.release()
        self.take()

    def release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(SQLAlchemyError):
                connection.invalidate()  # closes it: a pooled connection would keep the lock
                connection.close()

    def _connect(self) -> Connection:
        connection = self._engines.write.connect().execution_options(isolation_level="AUTOCOMMIT")
        name = f"gradatim {self._role}, pid {os.getpid()} on {socket.gethostname()}"
        connection.execute(text("SELECT set_config('application_name', :name, false)"), {"name": name[:63]})
        return connection
