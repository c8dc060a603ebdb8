"""The tables, declared once for SQLite and PostgreSQL: of records, of what is remembered, and five of facts.

A column has the name of the field it keeps. ``log_position`` is the record's place in the log, unique and rising over
all tables (``position`` is a field of some records: the newest feedback they rest on). Three ways to keep a value:

* what is compared or counted has a column of its own type, and an index that ends in ``log_position``;
* tokens are little-endian int32, log-probabilities little-endian **float64**: what the engine said comes back bit for
  bit, whatever precision it computed in (prompts outweigh completions: float32 would save little);
* mappings, messages and free text are JSON in a text column: JSON escapes what PostgreSQL's text cannot hold (NUL) and
  what UTF-8 cannot (lone surrogates), and a user may type either.

This module opens no connection. A change here needs a migration beside it: a test compares the two.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, Integer, LargeBinary, MetaData, Table, Text, text

from gradatim.types import (
    ON_THE_WAY,
    Adapter,
    Credit,
    Decision,
    Example,
    Feedback,
    MemoryEntry,
    MemoryEpoch,
    MemoryKey,
    MemoryNote,
    MemoryRetirement,
    MemorySpace,
    MemoryUse,
    Move,
    Reward,
    ShadowPair,
    Sketch,
    Stage,
    Step,
    Tombstone,
    Update,
    Verdict,
)

# ------------------------------------------------------------------------------- how fields become columns


@dataclass(frozen=True, slots=True)
class Codec:
    """How a value that the database has no type for is kept. Errors are ValueError, TypeError or struct.error."""

    encode: Callable[[Any], str | bytes]
    decode: Callable[[Any], Any]
    missing: Any = None  # what NULL stands for: in a column that is younger than the row, nothing


def _dump(value: Any) -> str:
    out = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        out.encode()
    except UnicodeEncodeError:  # a lone surrogate: write all of it in ASCII escapes
        return json.dumps(value, separators=(",", ":"))
    return out


def _array(code: str, size_bytes: int) -> Codec:
    return Codec(
        encode=lambda values: struct.pack(f"<{len(values)}{code}", *values),
        decode=lambda blob: struct.unpack(f"<{len(blob) // size_bytes}{code}", blob),
        missing=(),
    )


TOKENS = _array("i", 4)
FLOATS = _array("d", 8)
BYTES = Codec(encode=bytes, decode=bytes)
JSON = Codec(encode=_dump, decode=json.loads, missing={})
JSON_TUPLE = Codec(encode=lambda values: _dump(list(values)), decode=lambda text: tuple(json.loads(text)), missing=())
STAGE = Codec(encode=lambda stage: Stage(stage).value, decode=Stage)
DECISION = Codec(encode=lambda decision: Decision(decision).value, decode=Decision)

_POSITION = BigInteger().with_variant(Integer, "sqlite")  # on SQLite: the row id itself, no second index


def _key(name: str, *, null: bool = False) -> Column[str]:
    return Column(name, Text, nullable=null)


def _float(name: str, *, null: bool = False) -> Column[float]:
    return Column(name, Double, nullable=null)


def _int(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _bool(name: str) -> Column[bool]:
    return Column(name, Boolean, nullable=False)


def _coded(name: str, codec: Codec, *, null: bool = False) -> Column[Any]:
    kept = LargeBinary if codec in (TOKENS, FLOATS, BYTES) else Text
    return Column(name, kept, nullable=null, info={"codec": codec})


def _free_text(name: str) -> Column[Any]:
    return _coded(name, JSON)


metadata = MetaData()


def _log(name: str, *columns: Column[Any], by: Sequence[str], unique: str = "") -> Table:
    """A table of records. ``by``: the columns that ``Store.read`` may compare."""
    return Table(
        name,
        metadata,
        Column("log_position", _POSITION, primary_key=True, autoincrement=False),
        *columns,
        *(Index(f"ix_{name}_{column}", column, "log_position") for column in by if column != unique),
        *([Index(f"ux_{name}_{unique}", unique, unique=True)] if unique else []),
        info={"by": frozenset(by)},
    )


# ------------------------------------------------------------------------------------------------ records

steps = _log(
    "steps",
    _key("id"),
    _key("episode_id"),
    _float("created_at"),
    _key("adapter_id"),
    _key("adapter_sha256"),
    _key("stage"),
    _float("propensity"),
    _coded("messages", JSON_TUPLE),
    _coded("prompt_ids", TOKENS),  # (P,)
    _coded("completion_ids", TOKENS),  # (T,)
    _coded("logprobs", FLOATS),  # (T,)
    _free_text("text"),
    _key("finish_reason"),
    _coded("sampling", JSON),
    _key("user"),
    _key("skill"),
    _bool("trainable"),
    _key("chain_key"),
    _float("latency_s"),
    _coded("drawn_logprobs", FLOATS, null=True),  # (T,)
    _coded("memory", JSON, null=True),
    Column("coin", Text, nullable=False, server_default=text("'{}'"), info={"codec": JSON}),
    _key("scope", null=True),
    by=("id", "episode_id", "chain_key", "adapter_id", "user"),
    unique="id",
)

feedback = _log(
    "feedback",
    _key("id"),
    _float("created_at"),
    _key("kind"),
    _key("source"),
    _key("episode_id"),
    _key("step_id", null=True),
    _float("value", null=True),
    _key("rejected_id", null=True),
    _free_text("correction"),
    _free_text("comment"),
    _float("confidence", null=True),
    _coded("tags", JSON_TUPLE),
    _bool("retracted"),
    by=("id", "episode_id", "source"),
)

rewards = _log(
    "rewards",
    _key("episode_id"),
    _float("created_at"),
    _float("value", null=True),
    _float("confidence"),
    _free_text("reason"),
    _coded("feedback_ids", JSON_TUPLE),
    _int("position"),
    by=("episode_id",),
)

credits = _log(
    "credits",
    _key("episode_id"),
    _float("created_at"),
    _coded("step_ids", JSON_TUPLE),  # (S,)
    _coded("advantages", FLOATS),  # (S,)
    _coded("methods", JSON_TUPLE),  # (S,)
    _int("position"),
    _coded("reasons", JSON_TUPLE, null=True),  # (S,)
    by=("episode_id",),
)

examples = _log(
    "examples",
    _key("id"),
    _float("created_at"),
    _key("episode_id"),
    _key("step_id"),
    _coded("prompt_ids", TOKENS),  # (P,)
    _coded("chosen_ids", TOKENS),  # (T,)
    _coded("rejected_ids", TOKENS),  # (T',)
    _float("weight"),
    _key("origin"),
    _key("skill"),
    _key("state"),
    _bool("retained"),
    _bool("verified"),
    _coded("feedback_ids", JSON_TUPLE),
    _key("user"),
    _int("position"),
    Column("label", Double, nullable=False, server_default=text("1.0")),
    _coded("logprobs", FLOATS, null=True),  # (T,)
    _coded("hint_ids", TOKENS, null=True),  # (P',)
    by=("id", "episode_id", "step_id", "state", "skill", "user"),
)

updates = _log(
    "updates",
    _key("id"),
    _float("created_at"),
    _bool("applied"),
    _key("parent_id"),
    _key("adapter_id", null=True),
    _coded("example_ids", JSON_TUPLE),
    _coded("replay_ids", JSON_TUPLE),
    _coded("kinds", JSON),
    _coded("metrics", JSON),
    _free_text("refused_because"),
    _float("duration_s"),
    Column("left_out", Text, nullable=False, server_default=text("'{}'"), info={"codec": JSON}),
    Column("scale", Double, nullable=False, server_default=text("1.0")),
    by=("id", "parent_id", "adapter_id"),
)

adapters = _log(
    "adapters",
    _key("id"),
    _key("name"),
    _int("step"),
    _key("base_sha256"),
    _key("parent_id", null=True),
    _key("sha256"),
    _key("path"),
    _float("created_at"),
    _key("update_id"),
    by=("id", "name", "parent_id"),
    unique="id",
)

verdicts = _log(
    "verdicts",
    _key("adapter_id"),
    _float("created_at"),
    _key("gate"),
    _coded("decision", DECISION),
    _coded("against", JSON_TUPLE),
    _coded("evidence", JSON),
    _free_text("reason"),
    by=("adapter_id", "gate"),
)

moves = _log(
    "moves",
    _key("adapter_id"),
    _float("created_at"),
    _coded("before", STAGE, null=True),
    _coded("after", STAGE),
    _key("actor"),
    _free_text("reason"),
    by=("adapter_id",),
)

TABLES: Mapping[type[Any], Table] = {
    Step: steps,
    Feedback: feedback,
    Reward: rewards,
    Credit: credits,
    Example: examples,
    Update: updates,
    Adapter: adapters,
    Verdict: verdicts,
    Move: moves,
}

# ------------------------------------------------------------------- what is remembered, and may be forgotten


def _shelf(name: str, *columns: Column[Any], by: Sequence[str] = ()) -> Table:
    """A table of rows with ids of their own. ``by``: further columns by which they are found and deleted."""
    return Table(name, metadata, *columns, *(Index(f"ix_{name}_{column}", column) for column in by))


def _id(name: str) -> Column[str]:
    return Column(name, Text, primary_key=True)


memory_entries = _shelf(
    "memory_entries",
    _id("id"),
    _key("tenant"),
    _key("user"),
    _key("episode_id"),
    _key("step_id"),
    _float("created_at"),
    _coded("tokens", TOKENS),  # (T,)
    _coded("logprobs", FLOATS),  # (T,)
    _float("value"),
    _coded("sources", JSON_TUPLE),
    _int("epoch"),
    _int("position"),
    Column("scope", Text, nullable=False, server_default=text("''")),
    by=("tenant", "episode_id", "step_id"),
)

memory_keys = _shelf("memory_keys", _id("step_id"), _id("space"), _coded("key", BYTES), by=("space",))

memory_spaces = _shelf(
    "memory_spaces",
    _id("id"),
    _key("base_sha256"),
    _key("tokenizer_sha256"),
    _key("adapter_id"),
    _key("adapter_sha256"),
    _coded("layers", JSON_TUPLE),
    _float("created_at"),
)

memory_uses = _shelf("memory_uses", _id("answer_id"), _id("entry_id"), _float("value"), by=("entry_id",))

memory_epochs = _shelf(
    "memory_epochs",
    _id("id"),
    _int("number"),
    _key("tenant", null=True),
    _float("created_at"),
    _key("actor"),
    _free_text("reason"),
    _float("undone_at", null=True),
)

memory_tombstones = _shelf(
    "memory_tombstones",
    _id("id"),
    _key("scope"),
    _key("value"),
    _float("created_at"),
    _key("actor"),
    _free_text("reason"),
)

reward_sketches = _shelf(
    "reward_sketches",
    _id("step_id"),
    _id("space"),
    _key("episode_id"),
    _coded("vector", BYTES),
    _int("position"),
    by=("episode_id",),
)

shadow_pairs = _shelf(
    "shadow_pairs",
    _id("adapter_id"),
    _id("step_id"),
    _int("number"),
    _key("skill"),
    _coded("guards", FLOATS),
    _coded("live_guards", FLOATS),
    _float("reward", null=True),
    _float("live_reward", null=True),
)

memory_notes = _shelf(
    "memory_notes",
    _id("id"),
    _key("tenant"),
    _free_text("text"),
    _float("created_at"),
    _key("actor"),
    by=("tenant",),
)

memory_retirements = _shelf(
    "memory_retirements",
    _id("id"),
    _key("entry_id"),
    _int("position"),
    _key("adapter_sha256"),
    _key("adapter_id"),
    _float("chance"),
    _float("created_at"),
    _float("undone_at", null=True),
    by=("entry_id", "adapter_sha256"),
)

SHELF: Mapping[type[Any], Table] = {
    MemoryEntry: memory_entries,
    MemoryKey: memory_keys,
    MemorySpace: memory_spaces,
    MemoryUse: memory_uses,
    MemoryEpoch: memory_epochs,
    Tombstone: memory_tombstones,
    Sketch: reward_sketches,
    ShadowPair: shadow_pairs,
    MemoryNote: memory_notes,
    MemoryRetirement: memory_retirements,
}

# ------------------------------------------------------------------------------ the facts that may change

log_end = Table(
    "log_end",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # always 1: there is one row
    Column("log_position", BigInteger, nullable=False),  # of the newest record
)

cursors = Table(
    "cursors",
    metadata,
    Column("name", Text, primary_key=True),
    Column("position", BigInteger, nullable=False),
)

_LIVE = text(f"stage = '{Stage.LIVE.value}'")
_ON_THE_WAY = text(f"stage IN ({', '.join(repr(stage.value) for stage in ON_THE_WAY)})")

stages = Table(
    "stages",
    metadata,
    Column("adapter_id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("stage", Text, nullable=False),
    Index("ix_stages_name", "name", "step"),
    Index("ix_stages_name_stage", "name", "stage", "step"),
    # the last line of defence: the rules are checked, with better messages, before a row is written
    Index("ux_stages_live", "name", unique=True, sqlite_where=_LIVE, postgresql_where=_LIVE),
    Index("ux_stages_on_the_way", "name", unique=True, sqlite_where=_ON_THE_WAY, postgresql_where=_ON_THE_WAY),
)

tallies = Table(  # what would take longer to count the longer the log is; kept in the transaction that changes it
    "tallies",
    metadata,
    Column("name", Text, primary_key=True),  # of an agent; empty for records of all of them
    Column("what", Text, primary_key=True),  # a table of records, or a stage
    Column("count", BigInteger, nullable=False),
)

audit = Table(  # see store/audit.py
    "audit",
    metadata,
    Column("log_position", BigInteger, primary_key=True, autoincrement=False),  # of the decision
    Column("payload", Text, nullable=False),
    Column("hash", Text, nullable=False),
)
