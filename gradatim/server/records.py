"""Reading records back: the newest of a kind, a kind from its end, and any of them as JSON.

Knows nothing of routes.
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
    return next((record for _, record in store.newest(kind, before=0, limit=1, **where)), None)


def backwards(store: Store, kind: type[R], before: int, limit: int) -> Iterator[tuple[int, R]]:
    """Records of positions below ``before`` (0: all), newest first; looks at no more than ``limit`` of them."""
    while limit > 0 and (page := store.newest(kind, before=before, limit=min(limit, _PAGE))):
        yield from page
        limit -= len(page)
        before = page[-1][0]


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
