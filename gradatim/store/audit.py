"""A chain of hashes over every decision: each update, adapter, verdict and move, in the order of the log.

    hash_i = SHA-256(hash_{i-1} + payload_i),    payload: kind, position and contents as JSON

It is written in the transaction that writes the decision. ``check`` finds whatever was changed, deleted, inserted or
put elsewhere afterwards, in the chain or in the tables. A chain alone cannot tell that its end was cut off: keep a head
that was exported, outside, and check against that. Nothing is signed here: whoever can write the database can write a
new chain, and only a head that was kept elsewhere gives it away (``app.signing``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from gradatim.store import schema
from gradatim.types import Adapter, Move, Update, Verdict

DECISIONS = (Update, Adapter, Verdict, Move)
_KINDS = {kind.__name__: schema.TABLES[kind] for kind in DECISIONS}
_PAGE = 500


@dataclass(frozen=True, slots=True)
class Audit:
    """What a check found. ``first``: position of the first decision that is chained, 0 where none is."""

    decisions: int
    first: int
    head: str
    problems: tuple[str, ...]


def payload(kind: str, position: int, row: Mapping[str, Any]) -> str:
    return json.dumps([kind, position, dict(row)], sort_keys=True, separators=(",", ":"))


def link(previous: str, content: str) -> str:
    return hashlib.sha256((previous + content).encode()).hexdigest()


def newest(connection: Connection) -> str:
    """The head of the chain; empty where it has not begun."""
    table = schema.audit
    return connection.scalar(select(table.c.hash).order_by(table.c.log_position.desc()).limit(1)) or ""


def entries(connection: Connection) -> Iterator[tuple[int, str, str]]:
    """(position, payload, hash), oldest first."""
    table, after = schema.audit, 0
    while rows := connection.execute(
        select(table).where(table.c.log_position > after).order_by(table.c.log_position).limit(_PAGE)
    ).all():
        for row in rows:
            yield row.log_position, row.payload, row.hash
        after = rows[-1].log_position


def check(connection: Connection, known_head: str = "") -> Audit:
    """Recompute the chain and compare it with the tables; ``known_head``: one that was exported and must be in it."""
    problems: list[str] = []
    head, first, count, met = "", 0, 0, not known_head
    for position, content, hashed in entries(connection):
        first, count = first or position, count + 1
        if link(head, content) != hashed:
            problems.append(f"position {position}: the chain is broken: this or an entry before it was changed")
        head = hashed
        met = met or head == known_head
        problems += _differences(connection, position, content)
    problems += _unchained(connection, first)
    if not met:
        problems.append("the head that was kept is not in the chain: its end was cut off, or all of it was rewritten")
    return Audit(count, first, head, tuple(problems))


def _differences(connection: Connection, position: int, content: str) -> list[str]:
    """Between an entry and the record it stands for. Columns that are younger than the entry are not compared."""
    try:
        kind, place, said = json.loads(content)
        table = _KINDS[kind]
    except (ValueError, KeyError, TypeError):
        return [f"position {position}: the entry cannot be read"]
    row = connection.execute(select(table).where(table.c.log_position == position)).mappings().first()
    if place != position or row is None:
        return [f"position {position}: the {kind} is gone"]
    changed = [name for name, value in said.items() if row.get(name) != value]
    return [f"position {position}: {kind}.{name} was changed" for name in changed]


def _unchained(connection: Connection, first: int) -> list[str]:
    """Decisions behind the chain's begin that are not in it."""
    out = []
    for kind, table in _KINDS.items():
        known = select(schema.audit.c.log_position)
        query = select(table.c.log_position).where(
            table.c.log_position >= max(1, first), table.c.log_position.not_in(known)
        )
        if first:
            out += [f"position {row[0]}: the {kind} was put in past the chain" for row in connection.execute(query)]
    return out
