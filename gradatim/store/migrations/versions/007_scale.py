"""Updates say in a field of their own what share of the trained change they kept; it was one of the metrics.

The metric of old records is copied into the column; no metric is changed.
"""

import json

import sqlalchemy as sa
from alembic import op

revision = "007_scale"
down_revision = "006_release"
branch_labels = None
depends_on = None

_METRIC = "scale"


def upgrade() -> None:
    op.add_column("updates", sa.Column("scale", sa.Double(), server_default=sa.text("1.0"), nullable=False))
    connection = op.get_bind()
    kept = connection.execute(
        sa.text("SELECT log_position, metrics FROM updates WHERE metrics LIKE :named"), {"named": f'%"{_METRIC}":%'}
    )
    shares = [(position, json.loads(metrics).get(_METRIC)) for position, metrics in kept]
    for position, share in shares:
        if share is not None:
            connection.execute(
                sa.text("UPDATE updates SET scale = :share WHERE log_position = :position"),
                {"share": float(share), "position": position},
            )
