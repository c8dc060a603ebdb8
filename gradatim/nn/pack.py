"""Exact log-probabilities of many answers in one forward pass, each shared prefix computed once.

Training and replay batches repeat themselves: one system prompt in front of all, one prompt in front of a chosen and
a rejected answer. The sequences are merged into a trie, the trie is laid out as one row of tokens in depth-first
order, and every token attends to its ancestors only; so values and gradients are those of separate sequences
(prior art: prefix sharing for DPO, arXiv:2410.20305; Tree Training, arXiv:2511.00413). The output head runs on the
rows that predict answer tokens and on no others.

Any transformers model that takes its attention from the library's registry works. This module knows nothing of
LoRA, losses or examples.

Shapes: N tokens of the trie, R rows that predict, M predictions (rows with a target), T tokens of one answer,
H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from gradatim.errors import ModelError

ATTENTION = "gradatim_tree"  # our name in the attention registry
BLOCK_TOKENS = 256  # small neighbouring branches share one attention call up to this many queries
HEAD_ROWS = 128  # rows of the vocabulary projection in memory at once


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion of a prompt. Neither may be empty."""

    prompt_ids: tuple[int, ...]  # (P,)
    completion_ids: tuple[int, ...]  # (T,)

    @property
    def fed(self) -> tuple[int, ...]:
        """What goes through the model: the last token only has to be predicted."""
        return self.prompt_ids + self.completion_ids[:-1]


@dataclass(frozen=True, slots=True)
class Scored:
    """Per token of one answer: its log-probability, and whether it is the most likely token there."""

    logprobs: Tensor  # (T,) fp32, nats, differentiable
    greedy: Tensor  # (T,) bool

    @property
    def total(self) -> Tensor:
        return self.logprobs.sum()


# ------------------------------------------------------------------------------------------------- trie


@dataclass(slots=True)
class _Node:
    """A run of tokens without a branch, and where its subtree ends in the packed row."""

    start: int
    end: int
    children: list[_Node] = field(default_factory=list)
    subtree_end: int = 0


@dataclass(slots=True)
class _Block:
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
    blocks: list[_Block]
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


def _blocks(root: _Node) -> list[_Block]:
    blocks: list[_Block] = []
    _add_children(blocks, root, ())
    return blocks


def _add_children(blocks: list[_Block], node: _Node, before: tuple[int, ...]) -> None:
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
        if size <= BLOCK_TOKENS or not child.children:
            small.append(child)
            continue
        flush()
        blocks.append(_block([_Node(child.start, child.end, [], child.end)], before, blocks))
        _add_children(blocks, child, (*before, len(blocks) - 1))
    flush()


def _block(nodes: Sequence[_Node], before: tuple[int, ...], blocks: Sequence[_Block]) -> _Block:
    start, end = nodes[0].start, nodes[-1].subtree_end
    if not before and len(nodes) == 1 and not nodes[0].children:
        return _Block(start, end, (), None)
    own = torch.full((end - start, end - start), float("-inf"))
    for node in nodes:
        _open(own, node, start, [])
    seen = torch.zeros(end - start, sum(blocks[i].end - blocks[i].start for i in before))
    return _Block(start, end, before, torch.cat([seen, own], 1))


def _open(own: Tensor, node: _Node, offset: int, above: list[tuple[int, int]]) -> None:
    """Let a node's tokens see its ancestors inside the block, and itself causally."""
    lo, hi = node.start - offset, node.end - offset
    for a, b in above:
        own[lo:hi, a:b] = 0
    own[lo:hi, lo:hi] = torch.full((hi - lo, hi - lo), float("-inf")).triu_(1)
    for child in node.children:
        _open(own, child, offset, [*above, (lo, hi)])


# -------------------------------------------------------------------------------------------- attention


@dataclass(slots=True)
class _Tree:
    """The blocks as the attention function wants them, masks moved and repeated once for all layers."""

    blocks: Sequence[_Block]
    sizes: list[int]
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def mask(self, index: int, groups: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """(groups * queries, keys): query heads that share a key head are laid end to end."""
        mask = self.blocks[index].mask
        if mask is None:
            return None
        if (index, groups) not in self.masks:
            self.masks[index, groups] = mask.to(device, dtype).repeat(groups, 1)
        return self.masks[index, groups]


def _tree_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, D)
    key: Tensor,  # (1, key heads, N, D)
    value: Tensor,  # (1, key heads, N, D)
    attention_mask: Tensor | None,
    *,
    tree: _Tree,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of every token to its ancestors, block by block; (1, N, heads, D)."""
    if softcap is not None or s_aux is not None:
        raise ModelError("models with soft-capped attention or attention sinks cannot be trained yet")
    if sliding_window is not None and sliding_window < query.shape[2]:
        raise ModelError("prompts longer than a model's sliding window cannot be trained on yet")
    dtype = query.dtype
    if dtype != torch.float32 and query.device.type == "cpu":  # faster there than bf16, and more exact
        query, key, value = query.float(), key.float(), value.float()
    queries, keys, values = (torch.split(t, tree.sizes, 2) for t in (query, key, value))
    out = []
    for i, block in enumerate(tree.blocks):
        seen = [*block.before, i]
        k = torch.cat([keys[j] for j in seen], 2) if len(seen) > 1 else keys[i]
        v = torch.cat([values[j] for j in seen], 2) if len(seen) > 1 else values[i]
        out.append(_attend(queries[i], k, v, tree, i, scaling))
    return torch.cat(out, 2).to(dtype).transpose(1, 2).contiguous(), None


def _attend(q: Tensor, k: Tensor, v: Tensor, tree: _Tree, index: int, scaling: float | None) -> Tensor:
    heads, key_heads, n = q.shape[1], k.shape[1], q.shape[2]
    groups = heads // key_heads
    mask = tree.mask(index, groups, q.device, q.dtype)
    if mask is None:
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v)) if groups > 1 else (k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    folded = q.reshape(1, key_heads, groups * n, q.shape[3])
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scaling)
    return out.reshape(1, heads, n, v.shape[3])


AttentionInterface.register(ATTENTION, _tree_attention)


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


# ------------------------------------------------------------------------------------------------- head


class _Head(torch.autograd.Function):
    """log softmax(h W^T)[target], with nothing of size (R, V) kept for the backward pass.

    d logp(t) / d h = W[t] - sum_v p_v W_v, and the sum is a (R, H) matrix that the forward pass can make while it
    has the probabilities in hand. W is frozen.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (R, H), weight (V, H), rows (M,) sorted, targets (M,) -> log-probabilities (M,), top tokens (R,)."""
        logprobs = torch.empty(len(rows), dtype=torch.float32, device=hidden.device)
        top = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        expected = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        bounds = torch.searchsorted(rows, torch.arange(0, len(hidden) + HEAD_ROWS, HEAD_ROWS, device=rows.device))
        for chunk, start in enumerate(range(0, len(hidden), HEAD_ROWS)):
            end = start + HEAD_ROWS
            logits = (hidden[start:end] @ weight.t()).float()  # (rows, V)
            top[start:end] = logits.argmax(1)
            logits -= logits.logsumexp(1, keepdim=True)
            mine = slice(int(bounds[chunk]), int(bounds[chunk + 1]))
            logprobs[mine] = logits[rows[mine] - start, targets[mine]]
            if expected is not None:
                expected[start:end] = logits.exp_().to(weight.dtype) @ weight
        ctx.save_for_backward(weight, rows, targets, expected)
        ctx.mark_non_differentiable(top)
        return logprobs, top

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _top: Tensor) -> tuple[Tensor, None, None, None]:
        weight, rows, targets, expected = ctx.saved_tensors
        total = torch.zeros(len(expected), device=grad.device).index_add_(0, rows, grad)  # (R,)
        out = expected.float() * -total[:, None]
        out.index_add_(0, rows, weight[targets].float() * grad[:, None])
        return out.to(expected.dtype), None, None, None


# ---------------------------------------------------------------------------------------------- forward


def score(model: Any, answers: Sequence[Answer]) -> list[Scored]:
    """Log-probabilities of answers, in one pass, differentiable where gradients are on. ValueError, ModelError."""
    packed = pack(answers)
    return _predict(_hidden(model, packed), model.get_output_embeddings().weight, packed, answers)


def drawn(model: Any, answers: Sequence[Answer], generator: torch.Generator) -> Tensor:
    """Log-probabilities (R,) of tokens that the model draws itself, one at every row that predicts a token of an
    answer; differentiable. The rows' contexts are the answers', so this is no text. ``generator`` is on the CPU."""
    packed = pack(answers)
    hidden = _hidden(model, packed)
    weight = model.get_output_embeddings().weight
    hidden = hidden[torch.tensor(sorted({r for rows in packed.rows for r in rows}), device=hidden.device)]  # (R, H)
    with torch.no_grad():
        chances = [(h @ weight.t()).float().softmax(1).cpu() for h in torch.split(hidden, HEAD_ROWS)]
        labels = torch.cat([p.multinomial(1, generator=generator)[:, 0] for p in chances]).to(hidden.device)  # (R,)
    rows = torch.arange(len(hidden), device=hidden.device)
    logprobs: Tensor = _Head.apply(hidden, weight, rows, labels)[0]  # type: ignore[no-untyped-call]
    return logprobs


def _hidden(model: Any, packed: Pack) -> Tensor:
    """The last hidden states (N, H) of a packed row, by the model's own layers."""
    device = model.get_output_embeddings().weight.device
    tree = _Tree(packed.blocks, [b.end - b.start for b in packed.blocks])
    with _attention(model):
        hidden: Tensor = model.base_model(
            input_ids=torch.tensor([packed.token_ids], device=device),
            position_ids=torch.tensor([packed.position_ids], device=device),
            use_cache=False,
            tree=tree,
        ).last_hidden_state[0]
    return hidden


def _predict(hidden: Tensor, weight: Tensor, packed: Pack, answers: Sequence[Answer]) -> list[Scored]:
    flat_rows = torch.tensor([r for rows in packed.rows for r in rows], device=hidden.device)  # (M,)
    targets = torch.tensor([t for a in answers for t in a.completion_ids], device=hidden.device)  # (M,)
    needed, rows = torch.unique(flat_rows, return_inverse=True)  # (R,), (M,)
    order = rows.argsort(stable=True)
    logprobs, top = _Head.apply(  # type: ignore[no-untyped-call]
        hidden[needed], weight, rows[order], targets[order]
    )
    back = order.argsort()
    greedy = top[rows] == targets
    lengths = [len(a.completion_ids) for a in answers]
    return [Scored(p, g) for p, g in zip(logprobs[back].split(lengths), greedy.split(lengths), strict=True)]


def logprobs(model: Any, answers: Sequence[Answer]) -> list[Tensor]:
    """Per-token log-probabilities (T,) of each answer; see ``score``."""
    return [s.logprobs for s in score(model, answers)]


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


def check_model(model: Any) -> None:
    """ModelError where the packed pass does not give this model's own log-probabilities.

    In 16 bits single tokens of either pass are off by some tenths of a nat, so their mean distance is judged.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids = [7919 * i % vocabulary for i in range(1, 14)]  # ordinary tokens: the first few of a vocabulary are special
    answers = [
        Answer((*ids[:5],), (*ids[5:8],)),
        Answer((*ids[:5],), (*ids[8:11],)),
        Answer((*ids[:3],), (*ids[11:],)),
    ]
    with torch.no_grad():
        ours = torch.cat(logprobs(model, answers))
        own = torch.cat([_plain(model, a) for a in answers])
    if not (ours - own).abs().mean() < (1e-3 if model.dtype == torch.float32 else 0.3):
        raise ModelError(
            f"{type(model).__name__} computes its attention or its output head in a way that training does not know"
        )


def _plain(model: Any, answer: Answer) -> Tensor:
    """Log-probabilities (T,) by the model's own forward pass."""
    ids = torch.tensor([answer.fed], device=model.get_output_embeddings().weight.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(answer.prompt_ids) - 1 :]  # (T, V)
    logprobs: Tensor = logits.float().log_softmax(-1).gather(1, ids.new_tensor(answer.completion_ids)[:, None])[:, 0]
    return logprobs
