"""Exact log-probabilities of many answers in one forward pass, each shared prefix computed once.

The answers are laid out as a trie in one row and every token attends to its ancestors only; the output head runs on
the rows that predict answer tokens and on no others. Values and gradients are those of separate sequences.

Any transformers model that takes its attention from the library's registry works; ``gradatim.nn.llama`` does the
same for one family of models in less time. This module knows nothing of LoRA, losses or examples.

Shapes: N tokens of the trie, T tokens of one answer, D size of an attention head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from gradatim.errors import ModelError
from gradatim.nn.head import Scored, draw, predict, rows_of
from gradatim.nn.trie import Answer, Block, Pack, pack, packed_tokens, passes, shared_length

__all__ = [
    "ATTENTION", "Answer", "Pack", "Scored", "check_model", "logprobs", "pack", "packed_tokens", "passes", "score",
    "shared_length",
]  # fmt: skip

ATTENTION = "gradatim_tree"  # our name in the attention registry


# -------------------------------------------------------------------------------------------- attention


@dataclass(slots=True)
class _Tree:
    """The blocks as the attention function wants them, masks moved and repeated once for all layers."""

    blocks: Sequence[Block]
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


# ---------------------------------------------------------------------------------------------- forward


def score(model: Any, answers: Sequence[Answer]) -> list[Scored]:
    """Log-probabilities of answers, in one pass, differentiable where gradients are on. ValueError, ModelError."""
    packed = pack(answers)
    hidden = _hidden(model, packed)
    wanted = rows_of(packed, answers, hidden.device)
    return predict(hidden[wanted.needed], model.get_output_embeddings().weight, wanted)


def drawn(model: Any, answers: Sequence[Answer], generator: torch.Generator) -> Tensor:
    """Log-probabilities (R,) of tokens that the model draws itself, one at every row that predicts a token of an
    answer; differentiable. The rows' contexts are the answers', so this is no text. ``generator`` is on the CPU."""
    packed = pack(answers)
    hidden = _hidden(model, packed)
    needed = sorted({r for rows in packed.rows for r in rows})
    return draw(hidden[torch.tensor(needed, device=hidden.device)], model.get_output_embeddings().weight, generator)


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


def logprobs(model: Any, answers: Sequence[Answer]) -> list[Tensor]:
    """Per-token log-probabilities (T,) of each answer; see ``score``."""
    return [s.logprobs for s in score(model, answers)]


def check_model(model: Any, forward: Callable[[Sequence[Answer]], list[Scored]] | None = None) -> None:
    """ModelError where the packed pass, or another ``forward``, does not give this model's own log-probabilities.

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
        ours = torch.cat([s.logprobs for s in (forward(answers) if forward else score(model, answers))])
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
