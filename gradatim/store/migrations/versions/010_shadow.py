"""How candidates and live adapters answered the same prompts: a table beside the log."""

import sqlalchemy as sa
from alembic import op

revision = "010_shadow"
down_revision = "009_reasons"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "shadow_pairs",
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("step_id", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("skill", sa.Text(), nullable=False),
        sa.Column("guards", sa.LargeBinary(), nullable=False),
        sa.Column("live_guards", sa.LargeBinary(), nullable=False),
        sa.Column("reward", sa.Double(), nullable=True),
        sa.Column("live_reward", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("adapter_id", "step_id"),
    )
