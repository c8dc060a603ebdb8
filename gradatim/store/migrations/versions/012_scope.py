"""Records and what is remembered of them say under which system part a request was answered.

What is remembered gets it from its step's messages, in which pinned notes stand too. Steps of the log are left alone:
None says that one is older.
"""

import json

import sqlalchemy as sa
from alembic import op

from gradatim.scopes import scope_of

revision = "012_scope"
down_revision = "011_memory_notes"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("steps", sa.Column("scope", sa.Text(), nullable=True))
    op.add_column("memory_entries", sa.Column("scope", sa.Text(), server_default=sa.text("''"), nullable=False))
    connection = op.get_bind()
    rows = connection.execute(
        sa.text("SELECT m.id, s.messages FROM memory_entries m JOIN steps s ON s.id = m.step_id")
    ).all()
    for entry_id, messages in rows:
        connection.execute(
            sa.text("UPDATE memory_entries SET scope = :scope WHERE id = :id"),
            {"scope": scope_of(json.loads(messages)), "id": entry_id},
        )
