"""One forward pass over a ragged batch, through the model's own code.

The engine's module tree is a copy that shares every weight with the base, with our attention and our linear layers
in it. It knows nothing of requests, queues or sampling.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradatim.engine.attention import NAME, RowCache, Segment, make_plan
from gradatim.engine.lora import LoraLayers
from gradatim.errors import ModelError
from gradatim.nn.base import Base
from gradatim.nn.states import tap

_PROBE_TOKENS = 24
_PROBE_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25}  # of a logit, relative to the largest one


class Runner:
    """Rows of tokens in, logits out. Used by one thread. ModelError where the architecture is not supported."""

    def __init__(
        self,
        base: Base,
        slots: int,
        lora_slots: int,
        key_layers: Sequence[int] = (),
        token_layer: int | None = None,
    ) -> None:
        self._base = base
        self._model = _private_copy(base.model)
        self._states: dict[int, Tensor] = {}  # of the last forward pass, by layer: what goes into it, (N, H)
        self._key_layers, self._token_layer = sorted(key_layers), token_layer
        self._watch(sorted({*key_layers} | ({token_layer} if token_layer is not None else set())))
        probe = _probe_ids(self._model.config.get_text_config().vocab_size, base.device)
        want, shape = _reference(base, probe, slots)
        self.cache = RowCache(shape, base.dtype, base.device)
        for module in self._model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.row_cache = self.cache
        self.lora = LoraLayers(self._model, lora_slots, self._model.get_output_embeddings())
        self._self_test(probe[0].tolist(), want)

    @property
    def device(self) -> torch.device:
        return self._base.device

    @property
    def model(self) -> Any:
        return self._model

    def states(self) -> Tensor | None:
        """What went into the key layers in the last forward pass, side by side, (N, layers * H); None where there are
        none."""
        if not self._key_layers:
            return None
        return torch.cat([self._states[layer] for layer in self._key_layers], -1)

    def token_states(self) -> Tensor | None:
        """What went into the token layer then, (N, H); None where there is none."""
        return None if self._token_layer is None else self._states[self._token_layer]

    def _watch(self, layers: Sequence[int]) -> None:
        for layer in layers:

            def keep(states: Tensor, layer: int = layer) -> None:
                self._states[layer] = states[0]

            tap(self._model, layer, keep)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], decoding: int) -> Tensor:
        """Logits (M, V), fp32, of the last token of each segment that wants them.

        The first ``decoding`` segments are rows 0.. with one token each. Writing keys and values is idempotent: a
        pass that failed may be run again, whole or in parts.
        """
        device = self._base.device
        counts = [len(s.ids) for s in segments]
        ids = torch.tensor([i for s in segments for i in s.ids], device=device)
        positions = torch.tensor([s.offset + s.start + i for s in segments for i in range(len(s.ids))], device=device)
        ends = torch.tensor(counts, device=device).cumsum(0) - 1
        wanted = torch.tensor([s.wants_logits for s in segments], device=device)
        self.lora.groups.set([s.lora_slot for s in segments], counts, device)
        self.cache.plan = make_plan(segments, decoding, device)
        try:
            out: Any = self._model(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=ends[wanted] if bool(wanted.any()) else ends[-1:],
            )
        finally:
            self.cache.plan = None
        logits: Tensor = out.logits[0].float()
        return logits if bool(wanted.any()) else logits[:0]

    @torch.inference_mode()
    def _self_test(self, ids: list[int], want: Tensor) -> None:
        """A prompt in two chunks beside a row that decodes must give the plain model's logits; a model whose
        attention has something that ours lacks is found out here and not by its users."""
        half = len(ids) // 2
        self.cache.reserve(len(ids), [0] * self.cache.slots)
        last = min(1, self.cache.slots - 1)
        self.forward([Segment(0, 0, ids[:half], wants_logits=False)], 0)
        self.forward([Segment(0, half, ids[half:-1], wants_logits=False)], 0)
        segments = [Segment(0, len(ids) - 1, ids[-1:])]
        if last:
            segments.append(Segment(last, 0, ids))
        got = self.forward(segments, 1)
        self.cache.release()
        error = float((got - want).abs().max() / want.abs().max())
        if not error <= _PROBE_TOLERANCE[self._base.dtype]:
            raise ModelError(
                f"the embedded engine does not support {type(self._base.model).__name__}: its logits differ from the "
                f"plain model's by {error:.2g} of the largest; serve it with another engine"
            )


def _private_copy(model: Any) -> Any:
    """The same modules anew, around the same weights."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    private = copy.deepcopy(model, memo=shared)
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(
            f"the embedded engine does not support {type(model).__name__}: transformers cannot exchange its attention; "
            "serve it with another engine"
        )
    private.set_attn_implementation(NAME)
    return private.eval()


def _probe_ids(vocabulary: int, device: torch.device) -> Tensor:
    return (torch.arange(_PROBE_TOKENS, device=device)[None] * 7919 + 13) % vocabulary  # (1, T)


@torch.inference_mode()
def _reference(base: Base, ids: Tensor, slots: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The plain model's last logits (1, V), and the shape (L, S, H, E) of what it keeps of each token."""
    out = base.model(input_ids=ids, use_cache=True)
    layers = getattr(out.past_key_values, "layers", ())
    keys = [getattr(layer, "keys", None) for layer in layers]
    values = [getattr(layer, "values", None) for layer in layers]
    shapes = {None if t is None else (t.shape[1], t.shape[3]) for t in [*keys, *values]}
    if len(shapes) != 1 or None in shapes:
        raise ModelError(
            f"the embedded engine does not support {type(base.model).__name__}: its layers do not all keep keys and "
            "values of one shape; serve it with another engine"
        )
    heads, width = next(s for s in shapes if s is not None)
    return out.logits[:, -1].float(), (len(layers), slots, heads, width)
