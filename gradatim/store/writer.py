"""Group commit: one thread writes what all the others submit, and many share one fsync.

While one transaction is being synced, submits queue up; the next takes all that are queued, without waiting for more.
Each has a savepoint, so that one that is refused takes none of its neighbours along. A future is resolved only after
the commit returned. When the database itself fails (full or broken disk, a lost server), the whole batch fails, the
connection is thrown away, and the next batch starts on a new one; nothing is tried twice, because after a failed fsync
a second one may succeed without having written anything.

Knows transactions and jobs; knows nothing of records.
"""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import Future
from contextlib import suppress

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from gradatim.errors import ConflictError, StoreError
from gradatim.store.connections import Engines, explain, is_fault
from gradatim.store.transaction import Job, Transaction

_log = logging.getLogger(__name__)
_Queued = tuple[Job, "Future[int]"]


class Writer:
    """Owns the thread. ``submit`` never blocks."""

    def __init__(self, engines: Engines, *, max_batch: int, max_queue: int) -> None:
        self._engines = engines
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._queue: queue.SimpleQueue[_Queued | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # between submit and close
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="gradatim-store-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Future[int]:
        future: Future[int] = Future()
        # what was submitted will be written, also when its waiter gives up, as asyncio's do on cancellation
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                future.set_exception(StoreError("the store is closed; open it again"))
            elif self._queue.qsize() >= self._max_queue:
                future.set_exception(
                    StoreError(f"{self._max_queue} writes are waiting: the disk is too slow or stuck; try again later")
                )
            else:
                self._queue.put((job, future))
        return future

    def is_current_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Write what was submitted before, then stop."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    # ------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            batch, last = self._take()
            if batch:
                self._commit(batch)
            if last:
                return

    def _take(self) -> tuple[list[_Queued], bool]:
        """All that is queued, at least one; and whether it was the last."""
        batch: list[_Queued] = []
        item = self._queue.get()
        while item is not None:
            batch.append(item)
            if len(batch) == self._max_batch:
                return batch, False
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _commit(self, batch: list[_Queued]) -> None:
        jobs = [job for job, _ in batch]
        outcomes: list[int | StoreError]
        try:
            outcomes = self._transaction(jobs)
        except SQLAlchemyError as e:
            _log.error("%d writes to %s failed: %s", len(batch), self._engines.where, explain(e))
            outcomes = [self._refused(e) for _ in batch]
        except Exception as e:  # noqa: BLE001  the thread's boundary: whoever waits must be told, and it must go on
            _log.exception("%d writes to %s failed", len(batch), self._engines.where)
            outcomes = [self._refused(e) for _ in batch]
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, StoreError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _refused(self, error: Exception) -> StoreError:
        why = explain(error) if isinstance(error, SQLAlchemyError) else repr(error)
        refused = StoreError(f"not written to {self._engines.where}: {why}")
        refused.__cause__ = error
        return refused

    def _transaction(self, jobs: list[Job]) -> list[int | StoreError]:
        with self._engines.write.connect() as connection:
            try:
                with connection.begin():
                    transaction = Transaction(connection)
                    outcomes = [self._apply(connection, transaction, job) for job in jobs]
                    transaction.close()
                return outcomes
            except BaseException:
                with suppress(SQLAlchemyError):
                    connection.invalidate()
                raise

    def _apply(self, connection: Connection, transaction: Transaction, job: Job) -> int | StoreError:
        """The job's position, or why it was refused; then it has left no trace."""
        mark = transaction.mark()
        connection.exec_driver_sql("SAVEPOINT job")
        try:
            position = transaction.apply(job)
        except StoreError as e:
            refusal = e
        except DBAPIError as e:
            if is_fault(e):
                raise
            refusal = ConflictError(f"a rule of the database forbids it: {explain(e)}")
            refusal.__cause__ = e
        else:
            connection.exec_driver_sql("RELEASE SAVEPOINT job")
            return position
        connection.exec_driver_sql("ROLLBACK TO SAVEPOINT job")
        connection.exec_driver_sql("RELEASE SAVEPOINT job")
        transaction.back_to(mark)
        return refusal
