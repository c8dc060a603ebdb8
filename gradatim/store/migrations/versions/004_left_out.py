"""Updates name the examples that they left out, each with its reason.

A column is added at the end and no row is rewritten.
"""

import sqlalchemy as sa
from alembic import op

revision = "004_left_out"
down_revision = "003_hints"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("updates", sa.Column("left_out", sa.Text(), server_default=sa.text("'{}'"), nullable=False))
