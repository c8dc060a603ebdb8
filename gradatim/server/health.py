"""Whether what the server is told can be kept: the writes that failed of late.

A store that answers reads may still have no room for a write. Nothing is written to find out; what clients sent
says it. Knows no route and no database.
"""

from __future__ import annotations

import time

from gradatim.errors import ConflictError, RecordError, TransitionError

REMEMBERED_S = 60.0
_NOT_OURS = (ConflictError, TransitionError, RecordError)  # the request is at fault, not the store


class Writes:
    """Tell it of every failure to record a step or an opinion."""

    def __init__(self) -> None:
        self._failed_at: float | None = None
        self._kind = ""

    def failed(self, error: BaseException) -> None:
        if not isinstance(error, _NOT_OURS):
            self._failed_at, self._kind = time.monotonic(), type(error).__name__

    def trouble(self) -> str:
        """In words without a client's text or a path; empty where nothing failed within ``REMEMBERED_S``."""
        if self._failed_at is None or (ago_s := time.monotonic() - self._failed_at) > REMEMBERED_S:
            return ""
        return f"a write failed {ago_s:.0f} s ago ({self._kind}): see the server's log, and whether the disk is full"
