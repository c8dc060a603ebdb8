"""Bring a database to the schema of this version, whatever version wrote it last.

The scripts are in ``versions``, part of the package, and need no alembic.ini. The whole upgrade is one transaction
under a lock, so that of two processes that open an old database one upgrades it and the other finds it done; a crash
in the middle leaves it as it was.
"""

from __future__ import annotations

from pathlib import Path

from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from gradatim.errors import StoreError

_LOCK = 0x67726164  # of PostgreSQL's advisory locks; any number that nobody else uses


def scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return ScriptDirectory.from_config(config)


def migrate(engine: Engine, where: str) -> None:
    """StoreError where a newer version has written it."""
    with engine.begin() as connection:  # on SQLite this takes the write lock
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        upgrade(connection, where)


def upgrade(connection: Connection, where: str) -> None:
    """Run the scripts that are missing, inside the caller's transaction."""
    directory = scripts()
    context = MigrationContext.configure(connection)
    heads = context.get_current_heads()
    known = {script.revision for script in directory.walk_revisions()}
    if newer := set(heads) - known:
        raise StoreError(
            f"{where} was written by a newer version of gradatim (schema {', '.join(sorted(newer))}); "
            "install that version, or restore a backup made before the upgrade"
        )
    head = directory.get_current_head()
    if set(heads) == {head}:
        return
    context = MigrationContext.configure(
        connection, opts={"fn": lambda revision, _: directory._upgrade_revs(head or "heads", revision)}
    )
    with Operations.context(context):
        context.run_migrations()
