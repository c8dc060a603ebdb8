"""What a memory keeps, on SQLite or PostgreSQL: tables beside the log, whose rows may be replaced and deleted.

Implements ``protocols.Shelf``. It shares the database with the log, so that a row and the cursor of the feedback it
rests on are one transaction. Deleted rows are gone for every query; their bytes leave a SQLite file when its pages are
used again or it is vacuumed. Knows nothing of what is remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, Table, delete, insert, select
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from gradatim.errors import StoreError
from gradatim.store import schema
from gradatim.store.connections import Engines, in_words
from gradatim.store.rows import from_kept, storable, to_kept
from gradatim.types import Kept

K = TypeVar("K", bound=Kept)


class SqlShelf:
    """``engines``: those of the store beside which it lies."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def load(self, kind: type[K], **where: str) -> Sequence[K]:
        table = schema.SHELF[kind]
        query = select(table).order_by(*table.primary_key.columns).where(*_equal(table, where))
        with in_words(f"cannot read {self._engines.where}"), self._engines.read.begin() as connection:
            rows = connection.execute(query).mappings().all()
        return [to_kept(kind, row) for row in rows]

    def change(
        self,
        *,
        put: Sequence[Kept] = (),
        drop: Sequence[tuple[type[Kept], Mapping[str, str]]] = (),
        cursors: Mapping[str, int] | None = None,
    ) -> None:
        rows = [(schema.SHELF[type(kept)], from_kept(kept)) for kept in put]
        with in_words(f"cannot write {self._engines.where}"), self._engines.write.begin() as connection:
            for kind, where in drop:
                table = schema.SHELF[kind]
                connection.execute(delete(table).where(*_equal(table, where)))
            for table, row in rows:
                connection.execute(
                    delete(table).where(*_equal(table, {c.name: row[c.name] for c in table.primary_key}))
                )
                connection.execute(insert(table), row)
            _set_cursors(connection, cursors or {})


def _equal(table: Table, where: Mapping[str, Any]) -> list[Any]:
    if not all(map(storable, where.values())):
        raise StoreError("what is looked for must be text without NUL characters and lone surrogates")
    return [table.c[name] == value for name, value in where.items()]


def _set_cursors(connection: Connection, cursors: Mapping[str, int]) -> None:
    for name, position in cursors.items():
        build = sqlite_insert if connection.dialect.name == "sqlite" else postgresql_insert
        statement = build(schema.cursors).values(name=name, position=position)
        connection.execute(
            statement.on_conflict_do_update(index_elements=["name"], set_={"position": statement.excluded.position})
        )
