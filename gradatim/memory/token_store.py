"""What one tenant's answers looked like from inside: per token, the state that predicted it and the token itself.

The keys and values of a token kNN-LM (arXiv:1911.00172, sec. 2), held by source, so that a correction can be revised
and a person forgotten: what came next, beside a key index that keeps four bits a number. It knows no probabilities, no
gates and no judgement: what is worth remembering is decided elsewhere.

Shapes: n tokens of one source, D size of the hidden state, B queries, K neighbours.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradatim.errors import MemoryKeyError, StoreError
from gradatim.memory import token_file
from gradatim.memory.codec import Codec, nibbles
from gradatim.memory.key_index import HOT_ROWS, KeyIndex
from gradatim.memory.key_space import EachToken, KeySpace


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """What a search found; where it found fewer than K, distance inf, token and row -1."""

    distances: NDArray[np.float32]  # (B, K) squared, of vectors of length 1: 0 to 4, ascending
    tokens: NDArray[np.int64]  # (B, K) what came next there
    rows: NDArray[np.int64]  # (B, K)


class TokenStore:
    """Of one tenant: nothing of another's is ever searched. ``vocabulary``: tokens are below it. All methods may be
    called from any thread."""

    def __init__(self, space: KeySpace[EachToken], vocabulary: int, *, hot_rows: int = HOT_ROWS) -> None:
        self.space, self.vocabulary = space, vocabulary
        self._index = KeyIndex(space.pooling.width, _codec(space.pooling), hot_rows=hot_rows)
        self._hot_rows = hot_rows
        self._lock = threading.RLock()
        self._tokens: NDArray[np.int32] = np.zeros(1024, np.int32)  # (capacity,)

    def __len__(self) -> int:
        """Entries that can be found."""
        return len(self._index)

    @property
    def index(self) -> KeyIndex:
        """To be looked at, and sealed."""
        return self._index

    @property
    def sources(self) -> frozenset[str]:
        return self._index.names

    def add(self, source: str, hidden: Tensor, tokens: Tensor) -> range:
        """Remember that after the state ``hidden[i]`` came ``tokens[i]``; visible to the next search. Gives the rows.

        hidden (n, D) of the space's layer, tokens (n,). MemoryKeyError where a state is not finite or a token is none.
        """
        keys, values = self._checked(hidden, tokens)
        with self._lock:
            return self._say(self._index.add(source, keys), values)

    def revise(self, source: str, hidden: Tensor, tokens: Tensor) -> range:
        """Replace all that a source had said, in one step for searches. Where the new is refused the old stays."""
        keys, values = self._checked(hidden, tokens)
        with self._lock:
            rows, gone = self._index.replace(source, keys)
            self._unsay(gone)
            return self._say(rows, values)

    def forget(self, source: str) -> int:
        """Remove all that a source said, for the next search already. How many entries that were."""
        with self._lock:
            return self._unsay(self._index.remove(source))

    def _checked(self, hidden: Tensor, tokens: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        values = tokens.detach().cpu().numpy().astype(np.int64)
        width = self.space.pooling.width
        if hidden.shape != (len(values), width):
            raise MemoryKeyError(f"states {tuple(hidden.shape)} for {len(values)} tokens and width {width}")
        if len(values) and not (values.min() >= 0 and values.max() < self.vocabulary):
            raise MemoryKeyError(f"a token is outside of the vocabulary of {self.vocabulary}")
        return self._keys(hidden), values

    def _keys(self, hidden: Tensor) -> NDArray[np.float32]:
        return self.space.pooling.keys(hidden.detach().float().cpu().numpy())

    def _say(self, rows: range, tokens: NDArray[Any]) -> range:
        if rows.stop > len(self._tokens):
            grown = np.zeros(max(rows.stop, 2 * len(self._tokens)), np.int32)
            grown[: rows.start] = self._tokens[: rows.start]
            self._tokens = grown
        self._tokens[rows.start : rows.stop] = tokens
        return rows

    def _unsay(self, spans: list[range]) -> int:
        for rows in spans:
            self._tokens[rows.start : rows.stop] = 0
        return sum(map(len, spans))

    def search(self, hidden: Tensor, k: int) -> Neighbours:
        """The nearest to states (B, D); none for a state that is not finite."""
        keys = self._keys(hidden)
        sound = np.asarray(np.isfinite(keys).all(axis=1))
        with self._lock:
            distances, rows = self._index.search(np.where(sound[:, None], keys, np.float32(0)), k)
            tokens = np.where(rows < 0, -1, self._tokens[rows]).astype(np.int64)
        distances[~sound], tokens[~sound], rows[~sound] = np.inf, -1, -1
        return Neighbours(distances, tokens, rows)

    def said(self) -> dict[str, tuple[int, ...]]:
        """The tokens of each source, in the order in which they came."""
        with self._lock:
            spans, tokens = self._index.spans(), self._tokens
            return {s: tuple(t for a, b in some for t in tokens[a:b].tolist()) for s, some in spans.items()}

    def compacted(self) -> TokenStore:
        """A store of the same that never held what was removed; see ``KeyIndex.compacted``. May take seconds."""
        out = TokenStore(self.space, self.vocabulary, hot_rows=self._hot_rows)
        with self._index.still():
            with self._lock:
                held = self._index.held()
                tokens = self._tokens[: len(held.alive)].copy()
            left = tokens[held.alive]
            out._index = self._index.compacted(held)
        out._say(range(len(left)), left)
        return out

    def stands_for(self, other: TokenStore, rows: int) -> bool:
        """See ``KeyIndex.stands_for``."""
        if not self._index.stands_for(other.index, rows):
            return False
        self._tokens[: self._index.rows][~self._index.alive()] = 0
        return True

    def save(self, folder: Path) -> None:
        """Write it, without what was removed, so that a crash leaves the whole new store or the whole old one.
        StoreError where the disk refuses; the store in memory goes on."""
        with self._index.still():
            with self._lock:
                held = self._index.held()
                tokens = self._tokens[: len(held.alive)].copy()
            token_file.write(folder, token_file.Snapshot(self.space, held.segments, held.codes, tokens, held.spans))

    @classmethod
    def load(cls, folder: Path, space: KeySpace[EachToken], vocabulary: int, *, hot_rows: int = HOT_ROWS) -> TokenStore:
        """What was saved. ForeignMemoryError where it was made in another key space, with both digests; StoreError
        where it is damaged or absent."""
        store = cls(space, vocabulary, hot_rows=hot_rows)
        held = token_file.read(folder, space, store.index.codec)
        store._index.fill(held.segments, held.codes, held.sources)
        if len(held.tokens) != store.index.rows:
            raise StoreError(f"{folder} is no sound memory: {len(held.tokens)} tokens for {store.index.rows} keys")
        store._say(range(len(held.tokens)), held.tokens)
        return store


@lru_cache(maxsize=8)
def _codec(pooling: EachToken) -> Codec:
    """Shared by the stores of all tenants."""
    return nibbles(pooling.axes)
