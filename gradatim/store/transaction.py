"""What one write transaction may do: put records into the log, set cursors, change stages, and refuse.

Every writer, in whatever process, first locks the one row of ``log_end``. So all that is checked here still holds when
it is written, and positions become visible in their order. (A sequence would be faster on PostgreSQL, and wrong: two
transactions that overlap may commit in the other order than they drew their numbers, and a reader that has seen the
higher one moves its cursor past the lower for good.)

Knows nothing of threads, batches and futures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, bindparam, insert, select, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from gradatim.errors import ConflictError, StoreError, TransitionError
from gradatim.store import audit, schema
from gradatim.store.rows import Row, storable, to_row
from gradatim.types import ON_THE_WAY, TRANSITIONS, Adapter, Feedback, Move, Record, Stage, Step

_LEAVES = frozenset({Stage.RETIRED, Stage.REJECTED, Stage.ROLLED_BACK})


@dataclass(frozen=True, slots=True)
class Job:
    """What one caller wants written, all or nothing. It is made, or refused as malformed, in the caller's thread."""

    rows: Sequence[tuple[Record, Row]] = ()
    moves: Sequence[tuple[Move, Row]] = ()
    cursors: Mapping[str, int] = field(default_factory=dict)


def job(records: Iterable[Record], moves: Iterable[Move], cursors: Mapping[str, int] | None) -> Job:
    """StoreError for a record that cannot be kept."""
    rows = [(record, to_row(record)) for record in records]
    for record, _ in rows:
        if isinstance(record, Move):
            raise StoreError("a Move is written by move(), together with the change it describes")
        if isinstance(record, Adapter) and record.id != f"{record.name}@{record.step}":
            raise StoreError(f"an adapter's id is name@step: {record.id} should be {record.name}@{record.step}")
    for name, position in (cursors or {}).items():
        if not storable(name) or not 0 <= position < 2**63:
            raise StoreError("a cursor is a name and a position in the store, 0 or more")
    return Job(rows=rows, moves=[(move, to_row(move)) for move in moves], cursors=dict(cursors or {}))


# statements are built once: building one costs more than running it
_END = select(schema.log_end.c.log_position).where(schema.log_end.c.id == 1).with_for_update()
_SET_END = update(schema.log_end).where(schema.log_end.c.id == 1).values(log_position=bindparam("end"))
_INSERTS = {kind: insert(table) for kind, table in schema.TABLES.items()}
_STAGE = select(schema.stages.c.stage, schema.stages.c.name).where(schema.stages.c.adapter_id == bindparam("id"))
_IN_STAGE = (
    select(schema.stages.c.adapter_id, schema.stages.c.stage)
    .where(schema.stages.c.name == bindparam("name"), schema.stages.c.stage.in_(bindparam("among", expanding=True)))
    .limit(1)
)
_CHAIN = insert(schema.audit)
_SET_STAGE = update(schema.stages).where(schema.stages.c.adapter_id == bindparam("id")).values(stage=bindparam("after"))


def _newest(table: Any) -> Select[Any]:
    return select(table).where(table.c.id == bindparam("id")).order_by(table.c.log_position.desc()).limit(1)


_NEWEST = {kind: _newest(schema.TABLES[kind]) for kind in (Feedback, Step, Adapter)}


class Transaction:
    """The log, locked for writing, inside a transaction that the caller began and will commit."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._end: int = connection.execute(_END).scalar_one()
        self._tally: Counter[tuple[str, str]] = Counter()  # (name, what) -> change
        self._head: str | None = None  # of the chain of decisions; None: not read yet

    def close(self) -> None:
        """Write down where the log ends now, and how much is in it. To be called once, before the commit."""
        self._connection.execute(_SET_END, {"end": self._end})
        statement = self._upsert(schema.tallies)
        total = schema.tallies.c["count"] + statement.excluded["count"]
        statement = statement.on_conflict_do_update(index_elements=["name", "what"], set_={"count": total})
        changes = [{"name": name, "what": what, "count": n} for (name, what), n in sorted(self._tally.items()) if n]
        if changes:
            self._connection.execute(statement, changes)

    def mark(self) -> object:
        """What ``back_to`` needs when the database has been rolled back to where it is now."""
        return self._end, self._tally.copy(), self._head

    def back_to(self, mark: Any) -> None:
        self._end, self._tally, self._head = mark

    def apply(self, job: Job) -> int:
        """The position of the last record of the job, or of the record that it repeats."""
        positions = [self._write(record, row) for record, row in job.rows]
        positions += self._move(job.moves)
        self._set_cursors(job.cursors)
        return max(positions, default=self._end)

    # -------------------------------------------------------------------------------------------- records

    def _write(self, record: Record, row: Row) -> int:
        if isinstance(record, Feedback):
            return self._write_feedback(record, row)
        if isinstance(record, Step):
            kept = self._same(record, row, "give each response an id of its own")
            return kept or self._insert(record, row)
        if isinstance(record, Adapter):
            return self._same(record, row, "an adapter is immutable: give it the next step") or self._register(
                record, row
            )
        return self._insert(record, row)

    def _insert(self, record: Record, row: Row) -> int:
        self._end += 1
        self._connection.execute(_INSERTS[type(record)], {"log_position": self._end, **row})
        self._tally["", schema.TABLES[type(record)].name] += 1
        if isinstance(record, audit.DECISIONS):
            self._chain(type(record).__name__, row)
        return self._end

    def _chain(self, kind: str, row: Row) -> None:
        before = audit.newest(self._connection) if self._head is None else self._head
        content = audit.payload(kind, self._end, row)
        self._head = audit.link(before, content)
        self._connection.execute(_CHAIN, {"log_position": self._end, "payload": content, "hash": self._head})

    def _find(self, record: Feedback | Step | Adapter) -> RowMapping | None:
        return self._connection.execute(_NEWEST[type(record)], {"id": record.id}).mappings().first()

    def _same(self, record: Step | Adapter, row: Row, way_out: str) -> int:
        """0 for a new id; where an equal record is kept already, its position. ConflictError for another content."""
        kept = self._find(record)
        if kept is None:
            return 0
        if any(kept[name] != value for name, value in row.items()):
            raise ConflictError(
                f"{type(record).__name__} {record.id} was already stored with other contents; {way_out}"
            )
        return int(kept["log_position"])

    def _write_feedback(self, feedback: Feedback, row: Row) -> int:
        newest = self._find(feedback)
        if newest is None:
            return self._insert(feedback, row)
        if (newest["episode_id"], newest["step_id"] or "", newest["rejected_id"] or "") != feedback.target:
            raise ConflictError(
                f"feedback {feedback.id} was already given for another target; "
                "use a new id, or the first target to revise it"
            )
        if all(newest[name] == value for name, value in row.items() if name != "created_at"):
            return int(newest["log_position"])  # sent twice: nothing new
        return self._insert(feedback, row)

    # -------------------------------------------------------------------------------------------- adapters

    def _register(self, adapter: Adapter, row: Row) -> int:
        stage = Stage.CANDIDATE if adapter.step else Stage.LIVE
        if adapter.parent_id is not None and self._stage(adapter.parent_id) is None:
            raise StoreError(f"{adapter.id} cannot be registered before its parent {adapter.parent_id}")
        self._refuse_second(adapter.id, adapter.name, stage)
        self._insert(adapter, row)
        self._connection.execute(
            insert(schema.stages),
            {"adapter_id": adapter.id, "name": adapter.name, "step": adapter.step, "stage": stage.value},
        )
        self._tally[adapter.name, stage.value] += 1
        move = Move(
            adapter_id=adapter.id,
            created_at=adapter.created_at,
            before=None,
            after=stage,
            actor="store",
            reason="registered",
        )
        return self._insert(move, to_row(move))

    def _stage(self, adapter_id: str) -> tuple[Stage, str] | None:
        """Its stage and its name."""
        row = self._connection.execute(_STAGE, {"id": adapter_id}).first()
        return (Stage(row.stage), row.name) if row else None

    def _in(self, name: str, among: Iterable[Stage]) -> tuple[str, str] | None:
        """One adapter of that name that is in one of these stages, and which."""
        row = self._connection.execute(_IN_STAGE, {"name": name, "among": [stage.value for stage in among]}).first()
        return (row.adapter_id, row.stage) if row else None

    def _refuse_second(self, adapter_id: str, name: str, after: Stage) -> None:
        """TransitionError where that stage is taken by another adapter of the name."""
        if after is Stage.LIVE and (taken := self._in(name, [Stage.LIVE])) and taken[0] != adapter_id:
            raise TransitionError(
                f"{adapter_id} cannot become live: {taken[0]} is. Retire or roll back {taken[0]} in the same move()"
            )
        if after in ON_THE_WAY and (taken := self._in(name, ON_THE_WAY)) and taken[0] != adapter_id:
            raise TransitionError(
                f"{adapter_id} cannot become {after.value}: {taken[0]} is on its way ({taken[1]}). "
                f"Promote or reject {taken[0]} first"
            )

    def _move(self, moves: Sequence[tuple[Move, Row]]) -> list[int]:
        # who leaves goes first, so that the place is free for who comes
        ordered = sorted(moves, key=lambda move: move[0].after not in _LEAVES)
        positions, left = [], set()
        for move, row in ordered:
            name = self._change(move)
            positions.append(self._insert(move, row))
            if move.before is Stage.LIVE:
                left.add((name, move.adapter_id))
        for name, adapter_id in left:
            if self._in(name, [Stage.LIVE]) is None:
                raise TransitionError(
                    f"{adapter_id} is the live adapter of {name}, and nothing would be live after it. "
                    f"Make its successor, or {name}@0, live in the same move()"
                )
        return positions

    def _change(self, move: Move) -> str:
        found = self._stage(move.adapter_id)
        if found is None:
            raise TransitionError(f"{move.adapter_id} is not registered; append its Adapter first")
        stage, name = found
        if move.before is None:
            raise TransitionError(
                f"{move.adapter_id} is registered already; append its Adapter instead of moving it in"
            )
        if stage is not move.before:
            raise TransitionError(
                f"{move.adapter_id} is {stage.value} by now, not {move.before.value}. "
                "Read stages() again and decide anew"
            )
        if move.after not in TRANSITIONS[stage]:
            allowed = (
                ", ".join(sorted(after.value for after in TRANSITIONS[stage])) or "nothing: register a new adapter"
            )
            raise TransitionError(
                f"{move.adapter_id} is {stage.value} and cannot become {move.after.value}; allowed: {allowed}"
            )
        self._refuse_second(move.adapter_id, name, move.after)
        self._connection.execute(_SET_STAGE, {"id": move.adapter_id, "after": move.after.value})
        self._tally[name, stage.value] -= 1
        self._tally[name, move.after.value] += 1
        return name

    # --------------------------------------------------------------------------------------------- cursors

    def _set_cursors(self, cursors: Mapping[str, int]) -> None:
        if not cursors:
            return
        statement = self._upsert(schema.cursors)
        statement = statement.on_conflict_do_update(
            index_elements=["name"], set_={"position": statement.excluded.position}
        )
        self._connection.execute(statement, [{"name": name, "position": at} for name, at in sorted(cursors.items())])

    def _upsert(self, table: Any) -> Any:
        return sqlite_insert(table) if self._connection.dialect.name == "sqlite" else postgresql_insert(table)
