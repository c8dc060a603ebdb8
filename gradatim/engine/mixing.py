"""A memory of single tokens, mixed into the logits of the rows that have one.

It knows nothing of how the memory works: an exception costs the requests their memory and nothing else. Shapes: M rows
that draw, N tokens of the forward pass, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradatim.engine.generation import Generation
from gradatim.protocols import TokenMixer


def mixed_in(
    memory: TokenMixer, generations: Sequence[Generation], states: Tensor, ends: Sequence[int], logits: Tensor
) -> tuple[Tensor, frozenset[int]]:
    """Logits (M, V) to draw from, and which of the rows are not the model's own: those hold log-probabilities. Where
    none is, the very tensor comes back.

    ``generations`` (M,) are of the rows; row m is predicted at ``states[ends[m]]`` (N, H).
    """
    asking = [(i, g.recollection) for i, g in enumerate(generations) if g.recollection is not None]
    if not asking:
        return logits, frozenset()
    rows = torch.tensor([i for i, _ in asking], device=logits.device)
    at = torch.tensor([ends[i] for i, _ in asking], device=states.device)
    try:
        found = memory.mix([recollection for _, recollection in asking], states[at], logits[rows])
    except Exception:  # noqa: BLE001 - the boundary to the memory: an answer without it is better than none
        for generation in {id(g): g for g in generations if g.recollection is not None}.values():
            generation.forget()
        return logits, frozenset()
    if not found:
        return logits, frozenset()
    out = logits.clone()
    for k, logprobs in found.items():
        out[asking[k][0]] = logprobs
    return out, frozenset(asking[k][0] for k in found)
