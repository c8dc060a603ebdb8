"""Steps keep the coin of their episode, the share of each adapter that could have answered; and a chain of hashes over
the decisions begins.

A column is added at the end, and no row is rewritten or chained after the fact: the first link is the next decision.
"""

import sqlalchemy as sa
from alembic import op

revision = "006_release"
down_revision = "005_memory"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("steps", sa.Column("coin", sa.Text(), server_default=sa.text("'{}'"), nullable=False))
    op.create_table(
        "audit",
        sa.Column("log_position", sa.BigInteger(), autoincrement=False, primary_key=True),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
    )
