"""``SqlStore``: the store on SQLite or PostgreSQL. Writing is handed to the writer thread; reading is here.

Every read is one snapshot on a connection of its own, from whatever thread, and walks an index from where it starts.
Knows no policy: which feedback counts, and what becomes of it, is decided elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import ColumnElement, Connection, RowMapping, Table, func, select, true

from gradatim.errors import StoreError
from gradatim.store import schema
from gradatim.store.connections import Engines, connect, in_words
from gradatim.store.exclusive import Exclusive
from gradatim.store.migrations import migrate
from gradatim.store.rows import storable, to_record
from gradatim.store.transaction import job
from gradatim.store.writer import Writer
from gradatim.types import (
    AdapterId,
    Case,
    Episode,
    EpisodeId,
    Feedback,
    Move,
    Record,
    Stage,
    Step,
    StepId,
    Verdict,
)

R = TypeVar("R", bound=Record)
_CHUNK = 500  # ids in one IN (...)


def open_store(
    url_or_path: str | Path,
    *,
    max_batch: int = 512,
    max_queue: int = 16_384,
    busy_timeout_s: float = 30.0,
    pool_size: int = 5,
) -> SqlStore:
    """Open or make the store at a file's path, ``sqlite:///PATH`` or ``postgresql://...``, at the newest schema.

    ``max_batch``: submits in one transaction. ``max_queue``: submits that may wait; more are refused.
    ``busy_timeout_s``: how long to wait for a lock of another process. ``pool_size``: connections kept for reading.
    StoreError where it cannot be opened for writing, or was written by a newer version.
    """
    engines = connect(url_or_path, busy_timeout_s=busy_timeout_s, pool_size=pool_size)
    try:
        with in_words(f"cannot open {engines.where}"):
            migrate(engines.write, engines.where)
        return SqlStore(engines, Writer(engines, max_batch=max_batch, max_queue=max_queue))
    except BaseException:
        engines.dispose()
        raise


class SqlStore:
    """``protocols.Store``, safe to use from any thread. Close it, or use it in a ``with`` statement."""

    def __init__(self, engines: Engines, writer: Writer) -> None:
        self.engines = engines
        self._writer = writer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Write what was submitted, then let go of the database."""
        self._writer.close()
        self.engines.dispose()

    # --------------------------------------------------------------------------------------------- writing

    def submit(self, *records: Record, cursors: Mapping[str, int] | None = None) -> Future[int]:
        return self._submit(records, (), cursors)

    def append(self, *records: Record, cursors: Mapping[str, int] | None = None) -> int:
        return self._wait(records, (), cursors)

    def move(self, *moves: Move, verdicts: Sequence[Verdict] = (), cursors: Mapping[str, int] | None = None) -> None:
        self._wait(verdicts, moves, cursors)

    def _submit(
        self, records: Sequence[Record], moves: Sequence[Move], cursors: Mapping[str, int] | None
    ) -> Future[int]:
        try:
            return self._writer.submit(job(records, moves, cursors))
        except StoreError as e:
            refused: Future[int] = Future()
            refused.set_exception(e)
            return refused

    def _wait(self, records: Sequence[Record], moves: Sequence[Move], cursors: Mapping[str, int] | None) -> int:
        if self._writer.is_current_thread():
            raise StoreError("a callback of submit() would wait for itself here; use submit() in it")
        return self._submit(records, moves, cursors).result()

    # --------------------------------------------------------------------------------------------- reading

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with in_words(f"cannot read {self.engines.where}"), self.engines.read.begin() as connection:
            yield connection

    def read(self, kind: type[R], *, after: int = 0, limit: int = 1000, **where: str) -> Sequence[tuple[int, R]]:
        """Columns that can be compared: see ``by`` in ``store/schema.py``. StoreError for another one."""
        table = schema.TABLES[kind]
        return self._select(kind, where, table.c.log_position > after, table.c.log_position, limit)

    def newest(self, kind: type[R], *, before: int = 0, limit: int = 1, **where: str) -> Sequence[tuple[int, R]]:
        """As ``read``, from the end backwards."""
        table = schema.TABLES[kind]
        place = table.c.log_position < before if before > 0 else true()
        return self._select(kind, where, place, table.c.log_position.desc(), limit)

    def _select(
        self, kind: type[R], where: Mapping[str, str], place: ColumnElement[bool], order: ColumnElement[Any], limit: int
    ) -> Sequence[tuple[int, R]]:
        table = schema.TABLES[kind]
        if unknown := where.keys() - table.info["by"]:
            known = ", ".join(sorted(table.info["by"]))
            raise StoreError(f"{kind.__name__} has no index on {', '.join(sorted(unknown))}; it can be read by {known}")
        if not all(map(storable, where.values())):
            return []
        query = select(table).where(place, *(table.c[name] == key for name, key in where.items()))
        with self._reading() as connection:
            rows = connection.execute(query.order_by(order).limit(max(0, limit))).mappings().all()
        return [to_record(kind, row) for row in rows]

    def episode(self, episode_id: EpisodeId) -> Episode | None:
        if not storable(episode_id):
            return None
        with self._reading() as connection:
            rows = _rows_of(connection, schema.steps, [episode_id])
        steps = tuple(to_record(Step, row)[1] for row in rows)
        return Episode(id=episode_id, steps=steps) if steps else None

    def step(self, *, id: StepId | None = None, chain_key: str | None = None) -> Step | None:
        """Exactly one of them must be given. An empty chain key names no step."""
        column, key = ("id", id) if id is not None else ("chain_key", chain_key)
        if not key or not storable(key):
            return None
        table = schema.steps
        query = select(table).where(table.c[column] == key).order_by(table.c.log_position.desc()).limit(1)
        with self._reading() as connection:
            row = connection.execute(query).mappings().first()
        return to_record(Step, row)[1] if row else None

    def cases(self, *, after: int = 0, limit: int = 100) -> Sequence[Case]:
        """An episode whose feedback was all retracted comes without any; one without steps yet, without steps."""
        newest, later = schema.feedback, schema.feedback.alias("later")
        superseded = select(later.c.log_position).where(
            later.c.episode_id == newest.c.episode_id, later.c.log_position > newest.c.log_position
        )
        # walks the log from `after` and stops at `limit`, with one look into an index for each row on the way
        query = (
            select(newest.c.episode_id, newest.c.log_position, newest.c.created_at)
            .where(newest.c.log_position > after, ~superseded.exists())
            .order_by(newest.c.log_position)
            .limit(max(0, limit))
        )
        with self._reading() as connection:
            heads = connection.execute(query).all()
            ids = [head.episode_id for head in heads]
            step_rows = _rows_of(connection, schema.steps, ids)
            feedback_rows = _rows_of(connection, schema.feedback, ids)
        steps: dict[str, list[Step]] = defaultdict(list)
        for row in step_rows:
            steps[row["episode_id"]].append(to_record(Step, row)[1])
        feedback: dict[str, dict[str, Feedback]] = defaultdict(dict)
        for row in feedback_rows:
            feedback[row["episode_id"]][row["id"]] = to_record(Feedback, row)[1]  # the newest revision comes last
        return [
            Case(
                position=head.log_position,
                episode=Episode(id=EpisodeId(head.episode_id), steps=tuple(steps[head.episode_id])),
                feedback=tuple(f for f in feedback[head.episode_id].values() if not f.retracted),
                touched_at=head.created_at,
            )
            for head in heads
        ]

    def cursor(self, name: str) -> int:
        with self._reading() as connection:
            position = connection.scalar(select(schema.cursors.c.position).where(schema.cursors.c.name == name))
        return position or 0

    def stages(self, name: str, *among: Stage) -> Mapping[AdapterId, Stage]:
        """In the order of their steps."""
        table = schema.stages
        query = select(table.c.adapter_id, table.c.stage).where(table.c.name == name).order_by(table.c.step)
        if among:
            query = query.where(table.c.stage.in_([stage.value for stage in among]))
        with self._reading() as connection:
            return {AdapterId(row.adapter_id): Stage(row.stage) for row in connection.execute(query)}

    # ------------------------------------------------------------------------------- beyond the protocol

    @contextmanager
    def exclusive(self, role: str, *, wait_s: float = 1.0) -> Iterator[Exclusive]:
        """Be the only ``role`` on this database until the block ends. InUseError where another process is."""
        held = Exclusive(self.engines, role)
        held.take(wait_s=wait_s)
        try:
            yield held
        finally:
            held.release()

    def generation(self) -> int:
        """A number that rises whenever any stage changes: the position of the newest Move. Cheap to poll."""
        with self._reading() as connection:
            return connection.scalar(select(func.max(schema.moves.c.log_position))) or 0

    def end(self) -> int:
        """The position of the newest record."""
        with self._reading() as connection:
            return connection.scalar(select(schema.log_end.c.log_position)) or 0

    def counts(self) -> dict[str, int]:
        """Records by table."""
        found = self._tallies("")
        return {table.name: found.get(table.name, 0) for table in schema.TABLES.values()}

    def stage_counts(self, name: str) -> Mapping[Stage, int]:
        """How many adapters of that name are in each stage."""
        found = self._tallies(name)
        return {stage: found.get(stage.value, 0) for stage in Stage}

    def _tallies(self, name: str) -> Mapping[str, int]:
        table = schema.tallies
        with self._reading() as connection:
            rows = connection.execute(select(table.c.what, table.c["count"]).where(table.c.name == name)).all()
        return {row[0]: row[1] for row in rows}


def _rows_of(connection: Connection, table: Table, episode_ids: Sequence[str]) -> list[RowMapping]:
    """All rows of these episodes; those of one episode are in the order of the log."""
    rows: list[RowMapping] = []
    for start in range(0, len(episode_ids), _CHUNK):
        chosen = table.c.episode_id.in_(episode_ids[start : start + _CHUNK])
        rows += connection.execute(select(table).where(chosen).order_by(table.c.log_position)).mappings().all()
    return rows
