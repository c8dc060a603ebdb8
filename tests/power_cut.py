"""A power cut, simulated: what a disk may hold when the machine goes dark at a random moment.

SQLite runs on a VFS that passes everything through to real files and keeps a second image of each, of what was synced.
At a cut each file is that image plus any of the writes since, in any 512-byte pieces: a disk keeps, loses, tears and
reorders what nobody has synced. Files written by Python are followed by their ``os.fsync`` and ``os.rename``: data that
was not synced is torn, and a new name may be missing until its folder was synced. Deleted files are gone at once.

The store reaches that VFS by ``Driver``, a DBAPI over apsw with the little of ``sqlite3`` that SQLAlchemy asks for.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

SECTOR = 512
_counter = iter(range(10**9))


@dataclass
class _File:
    """Of one database file: what is synced, and the writes since."""

    synced: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # at an offset; None: cut off there

    def sync(self) -> None:
        for write in self.pending:
            _apply(self.synced, *write)
        self.pending.clear()

    def after_a_cut(self, dice: random.Random) -> bytes:
        image = bytearray(self.synced)
        kept = dice.choice((0.0, 0.5, 1.0))
        for offset, data in self.pending:
            if data is None:
                if dice.random() < kept:
                    _apply(image, offset, None)
                continue
            for start in range(0, len(data), SECTOR):
                if dice.random() < kept:
                    _apply(image, offset + start, data[start : start + SECTOR])
        return bytes(image)


def _apply(image: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del image[offset:]
        return
    if len(image) < offset:
        image.extend(bytes(offset - len(image)))
    image[offset : offset + len(data)] = data


class Disk:
    """Everything below ``root``. ``on_write`` is called before every write and sync, in the thread that makes it."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.lock = threading.RLock()
        self.on_write: Callable[[], None] = lambda: None
        self._dice = random.Random(seed)
        self._databases: dict[str, _File] = {}
        self._synced: dict[Path, bytes] = {}  # contents of other files when they were synced
        self._unsure: dict[Path, Path | None] = {}  # a name that is not synced yet -> the one before, if any
        self.vfs = f"cut{next(_counter)}"
        self._registered = _Vfs(self.vfs, self)

    def at(self, path: str) -> _File:
        return self._databases.setdefault(path, _File())

    def gone(self, path: str) -> None:
        with self.lock:
            self._databases.pop(path, None)

    # ------------------------------------------------------------------ files that Python writes

    def was_synced(self, fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        with self.lock:
            if path.is_dir():
                self._unsure = {new: old for new, old in self._unsure.items() if new.parent != path}
            elif path.is_relative_to(self.root):
                self._synced[path] = path.read_bytes()

    def was_renamed(self, old: Path, new: Path) -> None:
        with self.lock:
            self._unsure[new] = old
            for path in [p for p in self._synced if p == old or p.is_relative_to(old)]:
                self._synced[new / path.relative_to(old)] = self._synced.pop(path)

    def was_made(self, folder: Path) -> None:
        with self.lock:
            if folder.is_relative_to(self.root) and folder != self.root:
                self._unsure[folder] = None

    # ------------------------------------------------------------------ the cut

    def cut(self, into: Path) -> None:
        """What the disk may hold now."""
        with self.lock:
            dice = self._dice
            into.mkdir(parents=True)
            for name, file in self._databases.items():
                target = into / Path(name).relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.after_a_cut(dice))
            lost = [new for new in self._unsure if dice.random() < 0.5]
            for path in sorted(self.root.rglob("*")):
                if path.is_file() and str(path) not in self._databases and not path.name.endswith("-shm"):
                    self._copy(path, into, lost)

    def _copy(self, path: Path, into: Path, lost: Sequence[Path]) -> None:
        at = path
        for new in sorted(lost, key=lambda p: len(p.parts), reverse=True):
            if at == new or at.is_relative_to(new):
                old = self._unsure[new]
                if old is None:
                    return
                at = old / at.relative_to(new)
        data, synced = path.read_bytes(), self._synced.get(path)
        if synced != data:
            data = data[: self._dice.randint(0, len(data))]
        target = into / at.relative_to(self.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Python's own syncs and new names are seen meanwhile."""
        fsync, rename, mkdir = os.fsync, os.rename, os.mkdir

        def seen_fsync(fd: int) -> None:
            self.on_write()
            fsync(fd)
            self.was_synced(fd)

        def seen_rename(old: Any, new: Any) -> None:
            self.on_write()
            with self.lock:
                rename(old, new)
                self.was_renamed(Path(old), Path(new))

        def seen_mkdir(path: Any, mode: int = 0o777, **rest: Any) -> None:
            mkdir(path, mode, **rest)
            self.was_made(Path(path))

        os.fsync, os.rename, os.mkdir = seen_fsync, seen_rename, seen_mkdir  # type: ignore[assignment]
        try:
            yield
        finally:
            os.fsync, os.rename, os.mkdir = fsync, rename, mkdir


class _Vfs(apsw.VFS):
    def __init__(self, name: str, disk: Disk) -> None:
        self._disk = disk
        super().__init__(name, "")

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _VfsFile(name, flags, self._disk)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        self._disk.gone(filename)


class _VfsFile(apsw.VFSFile):
    def __init__(self, name: Any, flags: list[int], disk: Disk) -> None:
        super().__init__("", name, flags)
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._disk, self._path = disk, str(path)
        self._kept = bool(path)

    def xWrite(self, data: bytes, offset: int) -> None:
        self._disk.on_write()
        with self._disk.lock:
            super().xWrite(data, offset)
            if self._kept:
                self._disk.at(self._path).pending.append((offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:
        with self._disk.lock:
            super().xTruncate(newsize)
            if self._kept:
                self._disk.at(self._path).pending.append((newsize, None))

    def xSync(self, flags: int) -> None:
        self._disk.on_write()
        with self._disk.lock:
            super().xSync(flags)
            if self._kept:
                self._disk.at(self._path).sync()


# ------------------------------------------------------------------------------------------------ the driver


class Driver:
    """A DBAPI 2.0 module over apsw, on one VFS."""

    paramstyle, apilevel, threadsafety = "qmark", "2.0", 1
    sqlite_version_info = tuple(int(x) for x in apsw.sqlite_lib_version().split("."))
    sqlite_version = apsw.sqlite_lib_version()
    Error, DatabaseError, OperationalError = sqlite3.Error, sqlite3.DatabaseError, sqlite3.OperationalError
    IntegrityError, InterfaceError, InternalError = (
        sqlite3.IntegrityError,
        sqlite3.InterfaceError,
        sqlite3.InternalError,
    )
    ProgrammingError, NotSupportedError, DataError = (
        sqlite3.ProgrammingError,
        sqlite3.NotSupportedError,
        sqlite3.DataError,
    )
    PARSE_COLNAMES = PARSE_DECLTYPES = 0
    Binary = bytes

    def __init__(self, vfs: str) -> None:
        self._vfs = vfs

    def connect(self, database: str, timeout: float = 5.0, **_: Any) -> Connected:
        with _translated():
            opened = apsw.Connection(database, vfs=self._vfs)
        opened.set_busy_timeout(round(1000 * timeout))
        return Connected(opened)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except apsw.ConstraintError as e:
        raise sqlite3.IntegrityError(str(e)) from e
    except apsw.Error as e:
        raise sqlite3.OperationalError(str(e)) from e


class Connected:
    isolation_level: str | None = None  # transactions are begun by hand

    def __init__(self, opened: apsw.Connection) -> None:
        self._opened = opened

    def cursor(self) -> Cursor:
        return Cursor(self._opened)

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Cursor:
        return self.cursor().execute(statement, parameters)

    def create_function(self, name: str, arguments: int, function: Any, **_: Any) -> None:
        self._opened.create_scalar_function(name, function, arguments)

    def commit(self) -> None:
        self._end("COMMIT")

    def rollback(self) -> None:
        self._end("ROLLBACK")

    def _end(self, how: str) -> None:
        if self._opened.in_transaction:
            with _translated():
                self._opened.execute(how)

    def close(self) -> None:
        self._opened.close()


class Cursor:
    arraysize = 1
    lastrowid: int | None = None

    def __init__(self, opened: apsw.Connection) -> None:
        self._opened = opened
        self._rows: list[Any] = []
        self.description: Any = None
        self.rowcount = -1

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Cursor:
        def told(cursor: Any, *_: Any) -> bool:
            columns = cursor.getdescription()
            self.description = tuple((name, None, None, None, None, None, None) for name, _ in columns) or None
            return True

        with _translated():
            cursor = self._opened.cursor()
            cursor.exec_trace = told
            self._rows = list(cursor.execute(statement, tuple(parameters)))
        self.rowcount, self.lastrowid = self._opened.changes(), self._opened.last_insert_rowid()
        return self

    def executemany(self, statement: str, many: Sequence[Sequence[Any]]) -> Cursor:
        changed = 0
        for parameters in many:
            self.execute(statement, parameters)
            changed += self.rowcount
        self.rowcount = changed
        return self

    def fetchone(self) -> Any:
        return self._rows.pop(0) if self._rows else None

    def fetchall(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return rows

    def fetchmany(self, size: int | None = None) -> list[Any]:
        n = self.arraysize if size is None else size
        rows, self._rows = self._rows[:n], self._rows[n:]
        return rows

    def close(self) -> None:
        self._rows = []


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
