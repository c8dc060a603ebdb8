"""A memory of single tokens, mixed into the logits of the rows that have one.

It knows nothing of how the memory works: an exception costs the requests their memory and nothing else. Shapes: M rows
that draw, N tokens of the forward pass, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gradatim.engine.generation import Generation
from gradatim.protocols import TokenMixer
from gradatim.types import Blend


def mixed_in(
    memory: TokenMixer, generations: Sequence[Generation], states: Tensor, ends: Sequence[int], logits: Tensor
) -> Mapping[int, Blend]:
    """Adds to the model's logits (M, V), in place, and tells what to which rows: that gives the model's own back.

    ``generations`` (M,) are of the rows; row m is predicted at ``states[ends[m]]`` (N, H).
    """
    asking = [i for i, g in enumerate(generations) if g.recollection is not None]
    if not asking:
        return {}
    at = [ends[i] for i in asking]
    seen = states if at == list(range(len(states))) else states[torch.tensor(at, device=states.device)]  # (M', H)
    rows = logits if len(asking) == len(logits) else logits[torch.tensor(asking, device=logits.device)]
    try:
        found = memory.mix([r for g in generations if (r := g.recollection) is not None], seen, rows)
    except Exception:  # noqa: BLE001 - the boundary to the memory: an answer without it is better than none
        for generation in {id(g): g for g in generations if g.recollection is not None}.values():
            generation.forget()
        return {}
    blends = {asking[k]: blend for k, blend in found.items()}
    if blends:
        _add(logits, blends)
    return blends


@torch.inference_mode()
def _add(logits: Tensor, blends: Mapping[int, Blend]) -> None:
    rows = np.repeat(list(blends), [len(b.tokens) for b in blends.values()])
    at, nats = (np.concatenate([getattr(b, name) for b in blends.values()]) for name in ("tokens", "nats"))
    where = (torch.from_numpy(rows).to(logits.device), torch.from_numpy(at).to(logits.device))
    logits.index_put_(where, torch.from_numpy(nats).to(logits.device, logits.dtype), accumulate=True)
