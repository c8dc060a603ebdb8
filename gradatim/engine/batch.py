"""The rows of the running batch, and which slot of the cache each of them has.

Slots 0..D-1 decode, D..R-1 read their prompt or wait for the one that reads it for them. It knows no queue and runs
no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradatim.engine.attention import RowCache, Segment
from gradatim.engine.beyond import Far
from gradatim.engine.generation import Choice, Generation


@dataclass(slots=True, eq=False)
class Row:
    """One sequence with keys and values in a slot."""

    choice: Choice
    slot: int
    length: int = 0  # tokens whose keys and values are in the slot
    siblings: Sequence[Row] = ()  # of the row that reads the prompt: the further choices, which copy it
    reads: bool = False  # its own prompt
    far: Far | None = None  # of a row that may outgrow its slot

    @property
    def generation(self) -> Generation:
        return self.choice.generation

    @property
    def read(self) -> int:
        """Tokens of prompt and answer that were read; the first of them may have left the slot."""
        return self.length + (0 if self.far is None else self.far.gone)

    @property
    def whole(self) -> bool:
        """Whether all that was read is in the slot, as it would be without a session."""
        return self.far is None or not (self.far.base or self.far.gone)

    def next(self, ids: Sequence[int], wants_logits: bool = True) -> Segment:
        """Of the tokens that follow."""
        offset = 0 if self.far is None else self.far.base + self.far.gone
        return Segment(self.slot, self.length, ids, self.generation.lora_slot, wants_logits, offset)


class Batch:
    """At most as many rows as the cache has slots."""

    def __init__(self, cache: RowCache) -> None:
        self._cache = cache
        self.rows: list[Row] = []  # by slot
        self.decoding = 0  # D

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, generation: Generation) -> list[Row]:
        return [row for row in self.rows if row.generation is generation]

    def add(self, choices: Sequence[Choice]) -> Row:
        """Rows of one request; the one that reads the prompt for all."""
        rows = [Row(choice, len(self.rows) + i) for i, choice in enumerate(choices)]
        self.rows.extend(rows)
        rows[0].reads, rows[0].siblings = True, rows[1:]
        return rows[0]

    def reserve(self, positions: int) -> None:
        """Room for so many in a row."""
        self._cache.reserve(positions, [row.length for row in self.rows])

    def scrub(self) -> None:
        """Zero what no row holds."""
        self._cache.scrub([row.length for row in self.rows])

    def start(self, row: Row) -> list[Row]:
        """Its prompt is read: the further choices copy it, and all of them decode from now on."""
        started = [row, *row.siblings]
        for other in row.siblings:
            self._cache.copy(row.slot, other.slot, row.length)
            other.length = row.length
        row.reads, row.siblings = False, ()
        for each in started:
            self._swap(each.slot, self.decoding)
            self.decoding += 1
        return started

    def remove(self, row: Row) -> None:
        """Free its slot, with the last rows taking the places that become empty."""
        row.length = 0
        if row.slot < self.decoding:
            self._move_last_into(row, self.decoding - 1)
            self.decoding -= 1
        self._move_last_into(row, len(self.rows) - 1)
        self.rows.pop()

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        first, second = self.rows[a], self.rows[b]
        self._cache.swap(a, b, max(first.length, second.length))
        self.rows[a], self.rows[b] = second, first
        first.slot, second.slot = b, a

    def _move_last_into(self, hole: Row, last: int) -> None:
        """Exchange a row that holds nothing with another, copying one way only."""
        if hole.slot == last:
            return
        other = self.rows[last]
        self._cache.copy(last, hole.slot, other.length)
        self.rows[hole.slot], self.rows[last] = other, hole
        hole.slot, other.slot = last, hole.slot
