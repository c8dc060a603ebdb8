"""Records to rows and back.

A row holds only what both databases take as it is, so that whatever is wrong with a record is found in the thread of
the caller who made it, before the writer sees it. Never puts a record's contents into an error.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import BigInteger, Boolean, Column, Double, RowMapping

from gradatim.errors import RecordError, StoreError
from gradatim.store.schema import SHELF, TABLES, Codec
from gradatim.types import Kept, Record

R = TypeVar("R", bound=Record)
K = TypeVar("K", bound=Kept)
Row = dict[str, Any]


def storable(key: object) -> bool:
    """Whether both databases can keep and compare this text. What is not storable was never stored."""
    return (
        isinstance(key, str) and "\0" not in key and (key.isascii() or not any("\ud800" <= c <= "\udfff" for c in key))
    )


def _text(value: Any) -> str:
    if not storable(value):
        raise ValueError("it must be text without NUL characters and lone surrogates")
    return str.__str__(value)  # a StrEnum becomes its plain value


def _float(value: Any) -> float:
    number = float(value)
    if math.isnan(number):  # SQLite would keep NULL
        raise ValueError("it must be a number, not NaN")
    return number


def _int(value: Any) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError("it must fit 64 bits")
    return int(value)


def _encoder(column: Column[Any]) -> Callable[[Any], Any]:
    codec: Codec | None = column.info.get("codec")
    if codec:
        return codec.encode
    if isinstance(column.type, Double):
        return _float
    if isinstance(column.type, Boolean):
        return bool
    return _int if isinstance(column.type, BigInteger) else _text


_ALL = {**TABLES, **SHELF}
_FIELDS = {kind: [c for c in table.columns if c.name != "log_position"] for kind, table in _ALL.items()}
_ENCODERS = {kind: [(c.name, _encoder(c), bool(c.nullable)) for c in fields] for kind, fields in _FIELDS.items()}
_CODED = {kind: [(c.name, c.info["codec"]) for c in fields if c.info] for kind, fields in _FIELDS.items()}


def to_row(record: Record) -> Row:
    """RecordError where a field cannot be kept."""
    if type(record) not in TABLES:
        raise RecordError(
            f"{type(record).__name__} is not a kind of record; the store keeps those of gradatim.types.RECORDS"
        )
    return _encoded(record)


def to_kept(kind: type[K], row: RowMapping) -> K:
    """What stands in a row of a memory. StoreError where it is damaged."""
    try:
        return kind(**_decoded(kind, row))
    except (TypeError, ValueError, struct.error) as e:
        raise StoreError(f"a {kind.__name__} is damaged ({type(e).__name__}); restore it from a backup") from e


def from_kept(kept: Kept) -> Row:
    """RecordError where a field cannot be kept."""
    return _encoded(kept)


def _encoded(record: Record | Kept) -> Row:
    row: Row = {}
    for name, encode, nullable in _ENCODERS[type(record)]:
        value = getattr(record, name)
        try:
            row[name] = None if value is None and nullable else encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError, struct.error) as e:
            why = e if isinstance(e, ValueError) and not isinstance(e, UnicodeError) else type(e).__name__
            raise RecordError(f"{type(record).__name__}.{name} cannot be stored: {why}") from e
    return row


def to_record(kind: type[R], row: RowMapping) -> tuple[int, R]:
    """The record of a row with ``log_position``, and that position. StoreError where the row is damaged."""
    position: int = row["log_position"]
    try:
        return position, kind(**_decoded(kind, row))
    except (TypeError, ValueError, struct.error) as e:
        raise StoreError(
            f"the {kind.__name__} at position {position} is damaged ({type(e).__name__}); restore it from a backup"
        ) from e


def _decoded(kind: type[Any], row: RowMapping) -> dict[str, Any]:
    fields = dict(row)
    fields.pop("log_position", None)
    for name, codec in _CODED[kind]:
        fields[name] = codec.missing if fields[name] is None else codec.decode(fields[name])
    return fields
