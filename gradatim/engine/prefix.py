"""The prefix cache: keys and values of token sequences that were read before, shared block by block.

A tree for each adapter, because keys and values depend on the weights that made them. A node is a block of
``BLOCK`` tokens; sequences with a common beginning share nodes. The least recently used block goes first. It knows
nothing of requests; only the engine's worker thread touches it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gradatim.engine.attention import RowCache

BLOCK = 16  # tokens


@dataclass(slots=True, eq=False)
class _Node:
    parent: _Node | None
    tokens: tuple[int, ...]
    data: Tensor | None = None  # (L, 2, H, BLOCK, E)
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


class PrefixCache:
    """At most ``capacity_tokens`` tokens over all adapters."""

    def __init__(self, capacity_tokens: int) -> None:
        self._max_blocks = capacity_tokens // BLOCK
        self._roots: dict[str, _Node] = {}
        self._used: OrderedDict[_Node, None] = OrderedDict()  # oldest first; a node is always younger than its children

    @property
    def tokens(self) -> int:
        return len(self._used) * BLOCK

    def restore(self, key: str, ids: Sequence[int], cache: RowCache, slot: int) -> int:
        """Write what is known of the beginning of ``ids`` into a row; how many tokens that was."""
        found = self._walk(key, ids)
        for i, node in enumerate(found):
            assert node.data is not None
            cache.write(slot, i * BLOCK, node.data)
        self._touch(found)
        return len(found) * BLOCK

    def match(self, key: str, ids: Sequence[int]) -> int:
        """How many tokens ``restore`` would find."""
        return len(self._walk(key, ids)) * BLOCK

    def insert(self, key: str, ids: Sequence[int], cache: RowCache, slot: int) -> None:
        """Remember the row's whole blocks; ``ids`` are the tokens whose keys and values the row holds."""
        blocks = min(len(ids) // BLOCK, self._max_blocks)
        if not blocks:
            return
        node = self._roots.setdefault(key, _Node(None, ()))
        path: list[_Node] = []
        for i in range(blocks):
            tokens = tuple(ids[i * BLOCK : (i + 1) * BLOCK])
            child = node.children.get(tokens)
            if child is None:
                child = node.children[tokens] = _Node(node, tokens, cache.read(slot, i * BLOCK, (i + 1) * BLOCK))
            path.append(child)
            node = child
        self._touch(path)
        while len(self._used) > self._max_blocks:
            self._evict(next(iter(self._used)))

    def drop(self, key: str) -> None:
        """Forget everything of one adapter."""
        root = self._roots.pop(key, None)
        stack = list(root.children.values()) if root else []
        while stack:
            node = stack.pop()
            self._used.pop(node, None)
            stack.extend(node.children.values())

    def _walk(self, key: str, ids: Sequence[int]) -> list[_Node]:
        node = self._roots.get(key)
        found: list[_Node] = []
        for i in range(0, len(ids) - BLOCK + 1, BLOCK):
            node = node.children.get(tuple(ids[i : i + BLOCK])) if node else None
            if node is None:
                break
            found.append(node)
        return found

    def _touch(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):  # the deepest first, so that a leaf is always older than what it hangs on
            self._used[node] = None
            self._used.move_to_end(node)

    def _evict(self, node: _Node) -> None:
        del self._used[node]
        if node.parent is not None:
            del node.parent.children[node.tokens]
