"""The first schema.

Written once and never changed: what it makes is what databases in the field have.
"""

import sqlalchemy as sa
from alembic import op

revision = "001_initial"
down_revision = None
branch_labels = None
depends_on = None

_POSITION = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("log_position", _POSITION, autoincrement=False, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("base_sha256", sa.Text(), nullable=False),
        sa.Column("parent_id", sa.Text(), nullable=True),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("update_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("log_position"),
    )
    op.create_index("ix_adapters_name", "adapters", ["name", "log_position"], unique=False)
    op.create_index("ix_adapters_parent_id", "adapters", ["parent_id", "log_position"], unique=False)
    op.create_index("ux_adapters_id", "adapters", ["id"], unique=True)
    op.create_table(
        "credits",
        sa.Column("log_position", _POSITION, autoincrement=False, nullable=False),
        sa.Column("episode_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("step_ids", sa.Text(), nullable=False),
        sa.Column("advantages", sa.LargeBinary(), nullable=False),
        sa.Column("methods", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("log_position"),
    )
    op.create_index("ix_credits_episode_id", "credits", ["episode_id", "log_position"], unique=False)
    op.create_table(
        "cursors",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "examples",
        sa.Column("log_position", _POSITION, autoincrement=False, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("episode_id", sa.Text(), nullable=False),
        sa.Column("step_id", sa.Text(), nullable=False),
        sa.Column("prompt_ids", sa.LargeBinary(), nullable=False),
        sa.Column("chosen_ids", sa.LargeBinary(), nullable=False),
        sa.Column("rejected_ids", sa.LargeBinary(), nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("skill", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("retained", sa.Boolean(), nullable=False),
        sa.Column("verified", sa.Boolean(), nullable=False),
        sa.Column("feedback_ids", sa.Text(), nullable=False),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("log_position"),
    )
    op.create_index("ix_examples_episode_id", "examples", ["episode_id", "log_position"], unique=False)
    op.create_index("ix_examples_id", "examples", ["id", "log_position"], unique=False)
    op.create_index("ix_examples_skill", "examples", ["skill", "log_position"], unique=False)
    op.create_index("ix_examples_state", "examples", ["state", "log_position"], unique=False)
    op.create_index("ix_examples_step_id", "examples", ["step_id", "log_position"], unique=False)
    op.create_index("ix_examples_user", "examples", ["user", "log_position"], unique=False)
    op.create_table(
        "feedback",
        sa.Column("log_position", _POSITION, autoincrement=False, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("episode_id", sa.Text(), nullable=False),
        sa.Column("step_id", sa.Text(), nullable=True),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("rejected_id", sa.Text(), nullable=True),
        sa.Column("correction", sa.Text(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("confidence", sa.Double(), nullable=True),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("retracted", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("log_position"),
    )
    op.create_index("ix_feedback_episode_id", "feedback", ["episode_id", "log_position"], unique=False)
    op.create_index("ix_feedback_id", "feedback", ["id", "log_position"], unique=False)
    op.create_index("ix_feedback_source", "feedback", ["source", "log_position"], unique=False)
    op.create_table(
        "log_end",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("log_position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "moves",
        sa.Column("log_position", _POSITION, autoincrement=False, nullable=False),
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("before", sa.Text(), nullable=True),
        sa.Column("after", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("log_position"),
    )
    op.create_index("ix_moves_adapter_id", "moves", ["adapter_id", "log_position"], unique=False)
    op.create_table(
        "rewards",
        sa.Column("log_position", _POSITION, autoincrement=False, nullable=False),
        sa.Column("episode_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("confidence", sa.Double(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("feedback_ids", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("log_position"),
    )
    op.create_index("ix_rewards_episode_id", "rewards", ["episode_id", "log_position"], unique=False)
    op.create_table(
        "stages",
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id"),
    )
    op.create_index("ix_stages_name", "stages", ["name", "step"], unique=False)
    op.create_index(
        "ux_stages_live",
        "stages",
        ["name"],
        unique=True,
        sqlite_where=sa.text("stage = 'live'"),
        postgresql_where=sa.text("stage = 'live'"),
    )
    op.create_index(
        "ux_stages_on_the_way",
        "stages",
        ["name"],
        unique=True,
        sqlite_where=sa.text("stage IN ('candidate', 'shadow', 'canary')"),
        postgresql_where=sa.text("stage IN ('candidate', 'shadow', 'canary')"),
    )
    op.create_table(
        "steps",
        sa.Column("log_position", _POSITION, autoincrement=False, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("episode_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("adapter_sha256", sa.Text(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("propensity", sa.Double(), nullable=False),
        sa.Column("messages", sa.Text(), nullable=False),
        sa.Column("prompt_ids", sa.LargeBinary(), nullable=False),
        sa.Column("completion_ids", sa.LargeBinary(), nullable=False),
        sa.Column("logprobs", sa.LargeBinary(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("finish_reason", sa.Text(), nullable=False),
        sa.Column("sampling", sa.Text(), nullable=False),
        sa.Column("user", sa.Text(), nullable=False),
        sa.Column("skill", sa.Text(), nullable=False),
        sa.Column("trainable", sa.Boolean(), nullable=False),
        sa.Column("chain_key", sa.Text(), nullable=False),
        sa.Column("latency_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("log_position"),
    )
    op.create_index("ix_steps_adapter_id", "steps", ["adapter_id", "log_position"], unique=False)
    op.create_index("ix_steps_chain_key", "steps", ["chain_key", "log_position"], unique=False)
    op.create_index("ix_steps_episode_id", "steps", ["episode_id", "log_position"], unique=False)
    op.create_index("ix_steps_user", "steps", ["user", "log_position"], unique=False)
    op.create_index("ux_steps_id", "steps", ["id"], unique=True)
    op.create_table(
        "updates",
        sa.Column("log_position", _POSITION, autoincrement=False, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("applied", sa.Boolean(), nullable=False),
        sa.Column("parent_id", sa.Text(), nullable=False),
        sa.Column("adapter_id", sa.Text(), nullable=True),
        sa.Column("example_ids", sa.Text(), nullable=False),
        sa.Column("replay_ids", sa.Text(), nullable=False),
        sa.Column("kinds", sa.Text(), nullable=False),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.Column("refused_because", sa.Text(), nullable=False),
        sa.Column("duration_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("log_position"),
    )
    op.create_index("ix_updates_adapter_id", "updates", ["adapter_id", "log_position"], unique=False)
    op.create_index("ix_updates_id", "updates", ["id", "log_position"], unique=False)
    op.create_index("ix_updates_parent_id", "updates", ["parent_id", "log_position"], unique=False)
    op.create_table(
        "verdicts",
        sa.Column("log_position", _POSITION, autoincrement=False, nullable=False),
        sa.Column("adapter_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("gate", sa.Text(), nullable=False),
        sa.Column("decision", sa.Text(), nullable=False),
        sa.Column("against", sa.Text(), nullable=False),
        sa.Column("evidence", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("log_position"),
    )
    op.create_index("ix_verdicts_adapter_id", "verdicts", ["adapter_id", "log_position"], unique=False)
    op.create_index("ix_verdicts_gate", "verdicts", ["gate", "log_position"], unique=False)
    op.execute("INSERT INTO log_end (id, log_position) VALUES (1, 0)")
