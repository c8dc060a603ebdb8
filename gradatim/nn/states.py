"""The hidden states of one layer, beside what the model makes of them. It knows no memory and no sampling.

Shapes: T tokens, D size of the hidden state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradatim.errors import ModelError


def tap(model: Any, layer: int, keep: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``keep`` in every forward pass with what its first ``layer`` layers made, (B, T, D). ModelError where they
    cannot be found."""
    stack: Any = getattr(model.base_model, "layers", None)
    if stack is None or not 0 <= layer <= len(stack):
        raise ModelError(f"memory cannot look into the layers of {type(model).__name__}: turn it off")

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def after(_module: Any, _args: Any, out: Any) -> None:
        keep(out[0] if isinstance(out, tuple) else out)

    if layer < len(stack):
        handle: RemovableHandle = stack[layer].register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = stack[-1].register_forward_hook(after)
    return handle


@contextmanager
def tapped(model: Any, layer: int) -> Iterator[list[Tensor]]:
    """While it lasts, every forward pass appends the output (B, T, D) of the first ``layer`` layers to the list."""
    seen: list[Tensor] = []
    handle = tap(model, layer, seen.append)
    try:
        yield seen
    finally:
        handle.remove()


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

    seen: list[Tensor] = []

    def keep(states: Tensor) -> None:
        seen.append(states)
        raise _SeenEnough

    handle = tap(model, layer, keep)
    try:
        model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    except _SeenEnough:
        pass
    finally:
        handle.remove()
    return seen[0][0]
