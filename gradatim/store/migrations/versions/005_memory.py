"""Judged decision memory: six tables beside the log; steps say what memory did to them.

Columns are added at the end and no row is rewritten.
"""

import sqlalchemy as sa
from alembic import op

revision = "005_memory"
down_revision = "004_left_out"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("steps", sa.Column("drawn_logprobs", sa.LargeBinary(), nullable=True))
    op.add_column("steps", sa.Column("memory", sa.Text(), nullable=True))
    op.create_table(
        "memory_entries",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("episode_id", sa.Text(), nullable=False),
        sa.Column("step_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("tokens", sa.LargeBinary(), nullable=False),
        sa.Column("logprobs", sa.LargeBinary(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("sources", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    for column in ("tenant", "episode_id", "step_id"):
        op.create_index(f"ix_memory_entries_{column}", "memory_entries", [column], unique=False)
    op.create_table(
        "memory_keys",
        sa.Column("step_id", sa.Text(), nullable=False),
        sa.Column("space", sa.Text(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("step_id", "space"),
    )
    op.create_index("ix_memory_keys_space", "memory_keys", ["space"], unique=False)
    op.create_table(
        "memory_spaces",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("base_sha256", sa.Text(), nullable=False),
        sa.Column("tokenizer_sha256", sa.Text(), nullable=False),
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("adapter_sha256", sa.Text(), nullable=False),
        sa.Column("layers", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "memory_uses",
        sa.Column("answer_id", sa.Text(), nullable=False),
        sa.Column("entry_id", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("answer_id", "entry_id"),
    )
    op.create_index("ix_memory_uses_entry_id", "memory_uses", ["entry_id"], unique=False)
    op.create_table(
        "memory_epochs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("undone_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "memory_tombstones",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
