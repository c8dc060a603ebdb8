"""Counts of records and stages, kept as they change; stages found by stage.

Written once and never changed: what it makes is what databases in the field have.
"""

import sqlalchemy as sa
from alembic import op

revision = "002_tallies"
down_revision = "001_initial"
branch_labels = None
depends_on = None

_RECORDS = ("steps", "feedback", "rewards", "credits", "examples", "updates", "adapters", "verdicts", "moves")


def upgrade() -> None:
    op.create_index("ix_stages_name_stage", "stages", ["name", "stage", "step"], unique=False)
    op.create_table(
        "tallies",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("what", sa.Text(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", "what"),
    )
    for table in _RECORDS:
        op.execute(f"INSERT INTO tallies (name, what, count) SELECT '', '{table}', count(*) FROM {table}")
    op.execute("INSERT INTO tallies (name, what, count) SELECT name, stage, count(*) FROM stages GROUP BY name, stage")
