"""Steps keep the coin that was tossed for their episode: the share of each adapter that could have answered.

A column is added at the end and no row is rewritten.
"""

import sqlalchemy as sa
from alembic import op

revision = "006_coin"
down_revision = "005_memory"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("steps", sa.Column("coin", sa.Text(), server_default=sa.text("'{}'"), nullable=False))
