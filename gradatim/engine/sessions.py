"""The rows of a batch that may outgrow their slots: what they go on from, what leaves, and what is kept at the end.

A ``protocols.Reading`` comes with a request. What its row read is handed back when the first choice is complete, so
that a request which fails or is cancelled leaves its session as it was. It runs no model and knows no tenants.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from gradatim.engine.attention import RowCache, Segment
from gradatim.engine.batch import Row
from gradatim.engine.beyond import Beyond
from gradatim.protocols import Reading

logger = logging.getLogger(__name__)


class FarRows:
    """``beyond`` is None where no row may outgrow its slot: then nothing here does anything."""

    def __init__(self, cache: RowCache, beyond: Beyond | None) -> None:
        self._cache, self._beyond = cache, beyond

    def held(self, row: Row) -> int:
        """Positions of the slot that a session needs at once; 0 where it brings no window."""
        reading = row.generation.reading
        return 0 if reading is None or reading.before is None else reading.before.local

    def begin(self, row: Row) -> None:
        """Give the row what its session left; there must be room for it."""
        reading = row.generation.reading
        if self._beyond is None or reading is None:
            return
        row.far = self._beyond.open(reading.before)
        if reading.before is not None and reading.before.local:
            self._beyond.restore(reading.before, self._cache, row.slot)
            row.length = reading.before.local

    def rooms(self, rows: Sequence[Row]) -> tuple[dict[Row, int], list[Row]]:
        """How many tokens each of them may read now, and those whose window cannot be moved on."""
        out, stuck = {}, []
        for row in rows:
            try:
                out[row] = self.room(row)
            except RuntimeError:  # torch's own, out of memory
                logger.exception("a window could not be moved on")
                stuck.append(row)
        return out, stuck

    def room(self, row: Row) -> int:
        """How many more tokens may be read at once; a full window is moved on first."""
        if self._beyond is None or row.far is None:
            return 1 << 30
        if row.length >= self._beyond.window:
            row.length = self._beyond.slide(row.far, self._cache, row.slot, row.length)
        room = self._beyond.window - row.length
        return min(room, self._beyond.chunk) if self._beyond.reaches(row.far) else room

    def start(self, rows: Sequence[Row]) -> None:
        """The first one has read the prompt; the others go on from it."""
        first = rows[0].far
        for other in rows[1:] if self._beyond is not None and first is not None else ():
            assert self._beyond is not None and first is not None
            other.far = self._beyond.fork(first)

    def reach(self, rows: Sequence[Row], segments: Sequence[Segment]) -> Sequence[Segment]:
        """The segments of one forward pass, with the attention of those rows that reach beyond their slots."""
        beyond = self._beyond
        if beyond is None:
            return segments
        return [
            replace(segment, far=beyond.turn(segment, row.far)) if row.far is not None else segment
            for row, segment in zip(rows, segments, strict=True)
        ]

    def finish(self, row: Row) -> None:
        """A choice is complete. The first one's row is kept."""
        reading = row.generation.reading
        if self._beyond is None or reading is None or row.far is None or row.choice.index:
            return
        try:
            use = self._beyond.use(row.far)
            reading.tell(use.kept, use.attended, use.share)
            if reading.wanted:
                ids = (*row.generation.prompt_ids, *row.choice.ids)
                reading.keep(self._beyond.session(row.far, self._cache, row.slot, row.length, ids))
        except Exception:
            logger.exception("a session could not be kept; it stays as it was before this request")
            reading.fail()


def is_gone(reading: Reading | None) -> bool:
    """Whether what a request goes on from was forgotten while it ran."""
    return reading is not None and reading.forgotten
