"""What one tenant's answers looked like from inside: per token, the state that predicted it and the token itself.

The keys and values of a token kNN-LM (arXiv:1911.00172, sec. 2), held by source, so that a correction can be revised
and a person forgotten. It knows no probabilities, no gates and no judgement: what is worth remembering is decided
elsewhere.

Shapes: n tokens of one source, D size of the hidden state, B queries, K neighbours.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradatim.errors import MemoryKeyError, StoreError
from gradatim.memory import token_file
from gradatim.memory.key_index import HOT_ROWS, KeyIndex
from gradatim.memory.key_space import KeySpace

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """What a search found; where it found fewer than K, distance inf, token and row -1."""

    distances: NDArray[np.float32]  # (B, K) squared, of vectors of length 1: 0 to 4, ascending
    tokens: NDArray[np.int64]  # (B, K) what came next there
    rows: NDArray[np.int64]  # (B, K)


class TokenStore:
    """Of one tenant: nothing of another's is ever searched. All methods may be called from any thread."""

    def __init__(self, space: KeySpace, *, hot_rows: int = HOT_ROWS) -> None:
        self.space = space
        self._index = KeyIndex(space.width, hot_rows=hot_rows)
        self._hot_rows = hot_rows
        self._lock = threading.RLock()
        self._tokens: NDArray[np.int32] = np.zeros(1024, np.int32)  # (capacity,)
        self._sources: dict[str, list[range]] = {}  # rows of each

    def __len__(self) -> int:
        """Entries that can be found."""
        return self._index.rows - self._index.removed

    @property
    def wasted(self) -> int:
        """Entries that were removed and still take room."""
        return self._index.removed

    @property
    def sources(self) -> frozenset[str]:
        return frozenset(self._sources)

    @property
    def ready_to_seal(self) -> bool:
        """Enough entries are new for ``seal`` to pay."""
        return self._index.full

    def seal(self) -> None:
        """Make searches of what is new faster. Takes seconds; may run in a thread while others use the store."""
        self._index.seal()

    def add(self, source: str, hidden: Tensor, tokens: Tensor) -> range:
        """Remember that after the state ``hidden[i]`` came ``tokens[i]``; visible to the next search. Gives the rows.

        hidden (n, D) of the space's layer, tokens (n,). MemoryKeyError where a state is not finite or a token is none.
        """
        values = tokens.detach().cpu().numpy().astype(np.int64)
        if hidden.shape != (len(values), self.space.width):
            raise MemoryKeyError(f"states {tuple(hidden.shape)} for {len(values)} tokens and width {self.space.width}")
        if len(values) and not (values.min() >= 0 and values.max() < self.space.vocabulary):
            raise MemoryKeyError(f"a token is outside of the vocabulary of {self.space.vocabulary}")
        return self._take(source, self.space.keys(hidden), values)

    def _take(self, source: str, keys: NDArray[np.float32], tokens: NDArray[np.int64]) -> range:
        with self._lock:
            rows = self._index.add(keys)
            if rows.stop > len(self._tokens):
                grown = np.zeros(max(rows.stop, 2 * len(self._tokens)), np.int32)
                grown[: rows.start] = self._tokens[: rows.start]
                self._tokens = grown
            self._tokens[rows.start : rows.stop] = tokens
            self._sources.setdefault(source, []).append(rows)
            return rows

    def revise(self, source: str, hidden: Tensor, tokens: Tensor) -> range:
        """Replace all that a source had said, in one step for searches. Where the new is refused the old stays."""
        with self._lock:
            before = self._sources.pop(source, [])
            try:
                rows = self.add(source, hidden, tokens)
            except MemoryKeyError:
                if before:
                    self._sources[source] = before
                raise
            self._remove(before)
            return rows

    def forget(self, source: str) -> int:
        """Remove all that a source said, for the next search already. How many entries that were."""
        with self._lock:
            return self._remove(self._sources.pop(source, []))

    def _remove(self, spans: list[range]) -> int:
        for rows in spans:
            self._index.remove(rows)
            self._tokens[rows.start : rows.stop] = 0
        return sum(map(len, spans))

    def search(self, hidden: Tensor, k: int) -> Neighbours:
        """The nearest to states (B, D); none for a state that is not finite."""
        keys = self.space.keys(hidden)
        sound = np.asarray(np.isfinite(keys).all(axis=1))
        with self._lock:
            distances, rows = self._index.search(np.where(sound[:, None], keys, np.float32(0)), k)
            tokens = np.where(rows < 0, -1, self._tokens[rows]).astype(np.int64)
        distances[~sound], tokens[~sound], rows[~sound] = np.inf, -1, -1
        return Neighbours(distances, tokens, rows)

    def source_of(self, row: int) -> str | None:
        """Who said what stands in that row; None where it was removed."""
        with self._lock:
            return next((s for s, spans in self._sources.items() if any(row in span for span in spans)), None)

    def entries(self) -> Iterator[tuple[str, NDArray[np.float16], NDArray[np.int32]]]:
        """(source, keys (n, D), tokens (n,)) of all that can be found, oldest first."""
        with self._lock:
            keys, tokens = self._index.keys(), self._tokens[: self._index.rows].copy()
            spans = sorted((r.start, r.stop, s) for s, rows in self._sources.items() for r in rows)
        for start, end, source in spans:
            yield source, keys[start:end], tokens[start:end]

    def compacted(self) -> TokenStore:
        """A store that holds the same and never held what was removed."""
        out = TokenStore(self.space, hot_rows=self._hot_rows)
        for source, keys, tokens in self.entries():
            out._take(source, keys.astype(np.float32), tokens.astype(np.int64))
        if out.ready_to_seal:
            out.seal()
        return out

    def save(self, folder: Path) -> None:
        """Write it, without what was removed, so that a crash leaves the whole new store or the whole old one.
        StoreError where the disk refuses; the store in memory goes on."""
        with self._lock:
            held = token_file.Snapshot(
                self.space,
                self._index.keys(),
                self._tokens[: self._index.rows].copy(),
                {s: [(r.start, r.stop) for r in rows] for s, rows in self._sources.items()},
                tuple((s.start, s.end, s.to_bytes()) for s in self._index.segments()),
            )
        token_file.write(folder, held)

    @classmethod
    def load(cls, folder: Path, space: KeySpace, *, hot_rows: int = HOT_ROWS) -> TokenStore:
        """What was saved; a search index that is not sound is built again. ForeignMemoryError where it was made in
        another key space, with both digests; StoreError where it is damaged or absent."""
        held, fault = token_file.read(folder, space)
        store = cls(space, hot_rows=hot_rows)
        store._tokens = held.tokens.copy()
        store._sources = {s: [range(a, b) for a, b in spans] for s, spans in held.sources.items()}
        alive = np.zeros(len(held.tokens), np.bool_)
        for rows in (r for spans in store._sources.values() for r in spans):
            alive[rows.start : rows.stop] = True
        store._index.fill(held.keys, alive)
        if not fault:
            try:
                store._index.restore(held.segments)
            except StoreError as e:
                fault = str(e)
        if fault:
            log.warning("the search index is built again: %s", fault)
        if store.ready_to_seal:
            store.seal()
        return store
