"""Examples learn from comments: the prompt with the hint, the engine's log-probabilities, the label's certainty.

Columns are added at the end and no row is rewritten, whatever the size of the log.
"""

import sqlalchemy as sa
from alembic import op

revision = "003_hints"
down_revision = "002_tallies"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("examples", sa.Column("label", sa.Double(), server_default=sa.text("1.0"), nullable=False))
    op.add_column("examples", sa.Column("logprobs", sa.LargeBinary(), nullable=True))
    op.add_column("examples", sa.Column("hint_ids", sa.LargeBinary(), nullable=True))
