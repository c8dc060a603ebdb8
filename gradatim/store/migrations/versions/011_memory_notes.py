"""Notes that an operator pins to a tenant, and the ledger of entries that the weights made needless."""

import sqlalchemy as sa
from alembic import op

revision = "011_memory_notes"
down_revision = "010_shadow"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "memory_notes",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_memory_notes_tenant", "memory_notes", ["tenant"], unique=False)
    op.create_table(
        "memory_retirements",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("entry_id", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("adapter_sha256", sa.Text(), nullable=False),
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("chance", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("undone_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    for column in ("entry_id", "adapter_sha256"):
        op.create_index(f"ix_memory_retirements_{column}", "memory_retirements", [column], unique=False)
