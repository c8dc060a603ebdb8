"""Reading records back: the newest of a kind, a kind from its end, and any of them as JSON.

The store reads forwards from a position. The end is found by doubling and halving, so that a page of the newest
costs some dozens of small reads however long the log is. Knows nothing of routes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from gradatim.protocols import Store
from gradatim.types import Record

R = TypeVar("R", bound=Record)
_PAGE = 256


def newest(store: Store, kind: type[R], **where: str) -> R | None:
    """The last record that compares equal; of a feedback id, its newest revision."""
    last: R | None = None
    after = 0
    while page := store.read(kind, after=after, limit=_PAGE, **where):
        after, last = page[-1]
        if len(page) < _PAGE:
            break
    return last


def end(store: Store, kind: type[R]) -> int:
    """The position of the newest record of a kind; 0 where there is none."""
    low, high = 0, 1
    while page := store.read(kind, after=high, limit=1):
        low = page[0][0]
        high = 2 * low
    while low < high:  # some record is at or past low (or none at all); none is past high
        middle = (low + high) // 2
        page = store.read(kind, after=middle, limit=1)
        if page:
            low = page[0][0]
        else:
            high = middle
    return low


def backwards(store: Store, kind: type[R], before: int, limit: int) -> Iterator[tuple[int, R]]:
    """Records of positions below ``before``, newest first; looks at no more than ``limit`` of them."""
    seen, width, high = 0, _PAGE, before
    while high > 1 and seen < limit:
        low = max(high - 1 - width, 0)
        window = _window(store, kind, low, high)
        yield from reversed(window)
        seen += len(window)
        high = low + 1
        width *= 2 if len(window) < _PAGE else 1


def _window(store: Store, kind: type[R], low: int, high: int) -> list[tuple[int, R]]:
    """All records of positions in (low, high), oldest first."""
    out: list[tuple[int, R]] = []
    while page := store.read(kind, after=low, limit=_PAGE):
        out += [(position, record) for position, record in page if position < high]
        low = page[-1][0]
        if low >= high - 1 or len(page) < _PAGE:
            break
    return out


def plain(value: Any) -> Any:
    """Any record as JSON: a dataclass as an object, a figure that is not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
