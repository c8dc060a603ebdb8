"""Why each step got its credit, in words."""

import sqlalchemy as sa
from alembic import op

revision = "009_reasons"
down_revision = "008_reward"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("credits", sa.Column("reasons", sa.Text(), nullable=True))
