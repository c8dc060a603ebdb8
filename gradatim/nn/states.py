"""The hidden states of one layer, beside what the model makes of them. It knows no memory and no sampling.

Shapes: T tokens, D size of the hidden state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def tapped(model: Any, layer: int) -> Iterator[list[Tensor]]:
    """While it lasts, every forward pass appends the output (B, T, D) of the first ``layer`` layers to the list."""
    seen: list[Tensor] = []

    def keep(_module: Any, _args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    hook = model.base_model.layers[layer - 1].register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


@torch.inference_mode()
def states_and_logprobs(model: Any, ids: Sequence[int], layer: int) -> tuple[Tensor, Tensor]:
    """Of one text: the states (T, D) after ``layer`` layers and the log-probabilities (T, V), fp32, of what follows."""
    with tapped(model, layer) as seen:
        out = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    return seen[0][0], torch.log_softmax(out.logits[0].float(), -1)


@torch.inference_mode()
def states(model: Any, ids: Sequence[int], layer: int) -> Tensor:
    """The first alone, (T, D)."""
    with tapped(model, layer) as seen:
        model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    return seen[0][0]


class _SeenEnough(Exception):
    """Layers above the one that was asked for need not run."""


@torch.inference_mode()
def lower_states(model: Any, ids: Sequence[int], layer: int) -> Tensor:
    """The same as ``states``, without the layers above."""

    def stop(_module: Any, _args: Any, _out: Any) -> None:
        raise _SeenEnough

    with tapped(model, layer) as seen:
        hook = model.base_model.layers[layer - 1].register_forward_hook(stop)
        try:
            model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
        except _SeenEnough:
            pass
        finally:
            hook.remove()
    return seen[0][0]
