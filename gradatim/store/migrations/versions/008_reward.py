"""The model's own states over judged answers, for the learned reward: a table beside the log, derived from it."""

import sqlalchemy as sa
from alembic import op

revision = "008_reward"
down_revision = "007_scale"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "reward_sketches",
        sa.Column("step_id", sa.Text(), nullable=False),
        sa.Column("space", sa.Text(), nullable=False),
        sa.Column("episode_id", sa.Text(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("step_id", "space"),
    )
    op.create_index("ix_reward_sketches_episode_id", "reward_sketches", ["episode_id"], unique=False)
