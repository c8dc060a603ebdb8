"""Answers laid out as one row of tokens, each shared prefix once.

Training and replay batches repeat themselves: one system prompt in front of all, one prompt in front of a chosen and
a rejected answer. The sequences are merged into a trie and the trie is laid out in depth-first order; a token that
attends to its ancestors only then has the values and gradients of its separate sequences (prior art: prefix sharing
for DPO, arXiv:2410.20305; Tree Training, arXiv:2511.00413).

It knows tokens and indices, but no model.

Shapes: N tokens of the trie, T tokens of one answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK_TOKENS = 128  # queries of one attention call: small neighbouring branches share one, long runs are cut


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion of a prompt. Neither may be empty."""

    prompt_ids: tuple[int, ...]  # (P,)
    completion_ids: tuple[int, ...]  # (T,)

    @property
    def fed(self) -> tuple[int, ...]:
        """What goes through the model: the last token only has to be predicted."""
        return self.prompt_ids + self.completion_ids[:-1]


@dataclass(slots=True)
class _Node:
    """A run of tokens without a branch, and where its subtree ends in the packed row."""

    start: int
    end: int
    children: list[_Node] = field(default_factory=list)
    subtree_end: int = 0


@dataclass(slots=True)
class Block:
    """Queries [start, end) that are served by one attention call: they see all of ``before`` and, inside the
    block, what ``mask`` leaves open."""

    start: int
    end: int
    before: tuple[int, ...]  # blocks whose tokens are all ancestors of this one's
    mask: Tensor | None  # (queries, keys) additive, fp32; None: plain causal


@dataclass(slots=True)
class Pack:
    """Answers laid out as one row."""

    token_ids: list[int]  # (N,)
    position_ids: list[int]  # (N,) depth in the trie
    blocks: list[Block]
    rows: list[list[int]]  # of each answer, the rows that predict its tokens (T,)


def pack(answers: Sequence[Answer]) -> Pack:
    """Lay answers out as one row. ValueError where a prompt or completion is empty."""
    if not answers or any(not a.prompt_ids or not a.completion_ids for a in answers):
        raise ValueError("every answer needs at least one prompt token and one completion token")
    order = sorted(range(len(answers)), key=lambda i: answers[i].fed)
    sequences = [answers[i].fed for i in order]
    packed = Pack([], [], [], [[] for _ in answers])
    path: list[int] = []  # packed index of each depth of the sequence before
    previous: tuple[int, ...] = ()
    for i, sequence in zip(order, sequences, strict=True):
        shared = shared_length(previous, sequence)
        start = len(packed.token_ids)
        packed.token_ids += sequence[shared:]
        packed.position_ids += range(shared, len(sequence))
        path[shared:] = range(start, len(packed.token_ids))
        packed.rows[i] = path[len(answers[i].prompt_ids) - 1 :]
        previous = sequence
    packed.blocks = _blocks(_tree(sequences))
    return packed


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(k for k in range(n) if a[k] != b[k])


def packed_tokens(answers: Sequence[Answer]) -> int:
    """N: how many tokens the trie of these answers has."""
    total, previous = 0, ()
    for sequence in sorted(a.fed for a in answers):
        total += len(sequence) - shared_length(previous, sequence)
        previous = sequence  # type: ignore[assignment]
    return total


def passes(groups: Sequence[Sequence[Answer]], budget_tokens: int) -> list[list[int]]:
    """Indices of groups of answers, split into passes of at most ``budget_tokens`` packed tokens each.

    Answers of one group stay together; neighbours in a pass share as long a prefix as can be. A group that is over
    the budget alone gets a pass alone.
    """
    order = sorted((i for i, g in enumerate(groups) if g), key=lambda i: min(a.fed for a in groups[i]))
    out: list[list[int]] = []
    members: list[Answer] = []
    for i in order:
        if out and packed_tokens([*members, *groups[i]]) <= budget_tokens:
            out[-1].append(i)
            members += groups[i]
        else:
            out.append([i])
            members = list(groups[i])
    return out


def _tree(sequences: Sequence[tuple[int, ...]]) -> _Node:
    """The trie of sorted sequences, numbered as ``pack`` lays it out, under a root without tokens."""
    counter = 0

    def grow(lo: int, hi: int, depth: int) -> list[_Node]:
        nonlocal counter
        nodes = []
        while lo < hi:
            if len(sequences[lo]) == depth:  # ends here: no tokens of its own
                lo += 1
                continue
            end = lo + 1
            while end < hi and sequences[end][depth] == sequences[lo][depth]:
                end += 1
            below = shared_length(sequences[lo], sequences[end - 1])
            node = _Node(counter, counter + below - depth)
            counter = node.end
            node.children = grow(lo, end, below)
            node.subtree_end = counter
            nodes.append(node)
            lo = end
        return nodes

    root = _Node(0, 0)
    root.children = grow(0, len(sequences), 0)
    root.subtree_end = counter
    return root


def _blocks(root: _Node) -> list[Block]:
    blocks: list[Block] = []
    _add_children(blocks, root, ())
    return blocks


def _add_children(blocks: list[Block], node: _Node, before: tuple[int, ...]) -> None:
    """Blocks for all that hangs below a node: whole small subtrees together, a large one's own run by itself."""
    small: list[_Node] = []

    def flush() -> None:
        if small:
            blocks.append(_block(small, before, blocks))
            small.clear()

    for child in node.children:
        size = child.subtree_end - child.start
        if small and child.subtree_end - small[0].start > BLOCK_TOKENS:
            flush()
        if size <= BLOCK_TOKENS or not (child.children or before):
            small.append(child)
            continue
        flush()
        _add_children(blocks, child, _add_run(blocks, child, before))
    flush()


def _add_run(blocks: list[Block], node: _Node, before: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks for a long node's own run; what its children see before them. Behind a prefix it is cut, for a masked
    block computes the upper half of its square too."""
    size = node.end - node.start if not before else BLOCK_TOKENS
    for start in range(node.start, node.end, size):
        end = min(start + size, node.end)
        blocks.append(_block([_Node(start, end, [], end)], before, blocks))
        before = (*before, len(blocks) - 1)
    return before


def _block(nodes: Sequence[_Node], before: tuple[int, ...], blocks: Sequence[Block]) -> Block:
    start, end = nodes[0].start, nodes[-1].subtree_end
    if not before and len(nodes) == 1 and not nodes[0].children:
        return Block(start, end, (), None)
    own = torch.full((end - start, end - start), float("-inf"))
    for node in nodes:
        _open(own, node, start, [])
    seen = torch.zeros(end - start, sum(blocks[i].end - blocks[i].start for i in before))
    return Block(start, end, before, torch.cat([seen, own], 1))


def _open(own: Tensor, node: _Node, offset: int, above: list[tuple[int, int]]) -> None:
    """Let a node's tokens see its ancestors inside the block, and itself causally."""
    lo, hi = node.start - offset, node.end - offset
    for a, b in above:
        own[lo:hi, a:b] = 0
    own[lo:hi, lo:hi] = torch.full((hi - lo, hi - lo), float("-inf")).triu_(1)
    for child in node.children:
        _open(own, child, offset, [*above, (lo, hi)])
