"""What lies beyond the window of a row: tokens that left it, and attention that still reaches them.

A row holds the last W tokens. When it is full, its oldest tokens leave together; their keys are turned back to before
RoPE and kept beside the row. From then on its queries attend to the window and to the best blocks of those keys in one
softmax (``nn.nearest``), in all layers but the first two. Which tokens are in the window depends on nothing but how
many came before, so an answer does not depend on how its prompt was cut into chunks.

Rows that have nothing beyond their window never come here: their numbers are the model's own, bit for bit. It knows
rows and their numbers, and nothing of requests, tenants or files.

Shapes: L layers, n new tokens of a row, m in its window, H key-value heads, G query heads for each, E head width.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradatim.engine.attention import FarRow, RowCache, Segment
from gradatim.errors import OverloadedError, PromptTooLongError
from gradatim.nn.nearest import BLOCKS, beyond, check_rope, joint, memory_layers, within
from gradatim.nn.session import BLOCK_TOKENS, LayerRows, Past, Rows, Session, rotated

_SLIDE = 128  # tokens that leave a full window together
_CHUNK = 128  # tokens of a row with something beyond its window that are read in one step

Part = Mapping[int, Past]  # by layer


@dataclass(slots=True, eq=False)
class Far:
    """Of one row. Its tokens are counted from the first one that its session still knows."""

    base: int = 0  # the position of that token
    gone: int = 0  # tokens that are no more in the window
    parts: Sequence[Part] = ()  # in the order of their tokens; the last one is this row's own, and grows
    drawn: int = 0  # tokens that were drawn with something beyond the window
    weight: Tensor | None = None  # () sum over those, and over layers, of the attention that went there

    @property
    def kept(self) -> int:
        """Tokens beyond the window that can be attended to."""
        return sum(len(_any(part)) for part in self.parts)


def _any(part: Part) -> Past:
    """Of one layer: they are all equally long."""
    return next(iter(part.values()))


@dataclass(frozen=True, slots=True)
class Use:
    """What the memory of a row came to."""

    kept: int  # tokens beyond the window
    attended: int  # tokens drawn while there were any
    share: float  # of attention that went beyond the window in those, over the layers that look there


class Beyond:
    """For one model and its row cache. ``max_bytes`` bounds what all rows that run may keep; ``bias`` is added to the
    scores beyond the window, and -inf shuts them out. Used by the engine's thread but for ``limit``, ``reserve`` and
    ``give_back``. ModelError where the model's positions are of another kind."""

    def __init__(
        self, model: Any, *, window: int, max_tokens: int, max_bytes: int, blocks: int = BLOCKS, bias: float = 0.0
    ) -> None:
        check_rope(model)
        self._rotary = model.base_model.rotary_emb
        self._layers = memory_layers(len(model.base_model.layers))
        self.window, self._slide, self._max_tokens = window, min(_SLIDE, max(1, window // 4)), max_tokens
        self._blocks, self._bias = blocks, bias
        attention, weight = model.base_model.layers[0].self_attn, model.get_input_embeddings().weight
        numbers: int = model.config.get_text_config().num_key_value_heads * attention.head_dim
        self._device = weight.device
        own: int = weight.dtype.itemsize
        of_mean = torch.promote_types(weight.dtype, torch.float32).itemsize / BLOCK_TOKENS
        self.token_bytes = math.ceil(len(self._layers) * numbers * (2 * own + of_mean))
        of_window = 2 * len(model.base_model.layers) * numbers * own * window
        self.session_bytes = of_window + max_tokens * self.token_bytes  # of one that is full
        self._max_bytes, self._taken_bytes, self._lock = max_bytes, 0, threading.Lock()

    # ------------------------------------------------------------------------------------- before it runs

    def limit(self, brought: int, before: int, max_tokens: int | None) -> int:
        """How many tokens an answer may have, where a request brings some and its session has some ``before`` them.
        PromptTooLongError where what it brings alone is more than can be kept."""
        room = self.window + self._max_tokens - brought
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {brought} tokens: the context window of {self.window} and the {self._max_tokens} "
                "beyond it (memory.attention_tokens) must hold it and its answer: shorten the prompt"
            )
        left = self.window - before - brought
        return min(room, max_tokens or (left if left > 0 else self.window))

    def reserve(self, brought: int, local: int, limit: int, n: int) -> int:
        """Bytes for what a request may move out of its window, to be given back. OverloadedError where others have
        them, PromptTooLongError where there are never so many."""
        leaving = max(0, local + brought + limit - self.window) + self._slide
        wanted = self.token_bytes * (min(leaving, self._max_tokens) + (n - 1) * min(leaving, limit + self._slide))
        if wanted > self._max_bytes:
            raise PromptTooLongError(
                f"the prompt and its {n} answers would keep {wanted} bytes beyond the context window, more than "
                f"memory.attention_bytes ({self._max_bytes}) allows: ask for less"
            )
        with self._lock:
            if self._taken_bytes + wanted > self._max_bytes:
                raise OverloadedError("requests that reach beyond their window have all the memory; try again later")
            self._taken_bytes += wanted
        return wanted

    def give_back(self, reserved: int) -> None:
        with self._lock:
            self._taken_bytes -= reserved

    # ----------------------------------------------------------------------------------------------- rows

    def open(self, session: Session | None) -> Far:
        """For a row that goes on where a session stands, or that begins."""
        own = self._empty()
        if session is None or not session.position:
            return Far(parts=[own])
        kept = {i: session.layers[i].past.fork() for i in self._layers}
        parts = [kept, own] if session.remembered else [own]
        return Far(session.position - session.local - session.remembered, session.remembered, parts)

    def restore(self, session: Session, cache: RowCache, slot: int) -> None:
        """Write a session's window into a row."""
        for layer, rows in enumerate(session.layers):
            cache.data[layer, 0, slot, :, : session.local] = rows.keys.all
            cache.data[layer, 1, slot, :, : session.local] = rows.values.all

    def fork(self, far: Far) -> Far:
        """For a further choice that goes on from the same tokens."""
        parts = [{i: past.fork() for i, past in part.items()} for part in far.parts]
        weight = None if far.weight is None else far.weight.clone()
        return Far(far.base, far.gone, [*parts, self._empty()], far.drawn, weight)

    @torch.inference_mode()
    def slide(self, far: Far, cache: RowCache, slot: int, length: int) -> int:
        """Let the oldest tokens leave a window of ``length``; its length then."""
        count = min(self._slide, length)
        block = cache.read(slot, 0, count)  # (L, 2, H, count, E)
        first = far.base + far.gone
        back = self._angles(-torch.arange(first, first + count, device=self._device))
        for layer, past in far.parts[-1].items():
            past.append(rotated(block[layer, 0], *back).to(block.dtype), block[layer, 1])
        cache.data[:, :, slot, :, : length - count] = cache.read(slot, count, length)
        far.gone += count
        self._drop(far, far.kept - self._max_tokens)
        return length - count

    def _drop(self, far: Far, count: int) -> None:
        """The oldest tokens beyond the window."""
        for part in far.parts:
            count -= max(past.drop(count) for past in part.values())

    @torch.inference_mode()
    def session(self, far: Far, cache: RowCache, slot: int, length: int, ids: Sequence[int]) -> Session:
        """What a row has come to; ``ids`` are its tokens from the first that its session knew, drawn ones that were
        not read yet among them."""
        block = cache.read(slot, 0, length)  # (L, 2, H, length, E)
        layers = [LayerRows(Rows(k.contiguous()), Rows(v.contiguous())) for k, v in block]
        kept = far.kept
        for layer in self._layers if kept else ():
            layers[layer].past = _together([part[layer] for part in far.parts])
        read = far.gone + length
        return Session(layers, far.base + read, length, ids=tuple(ids[read - length - kept :]))

    def use(self, far: Far) -> Use:
        weight = 0.0 if far.weight is None else float(far.weight) / max(1, far.drawn * len(self._layers))
        return Use(far.kept, far.drawn, weight)

    def _empty(self) -> Part:
        return {i: Past() for i in self._layers}

    # -------------------------------------------------------------------------------------------- attention

    def reaches(self, far: Far) -> bool:
        """Whether a row has something to attend to beyond its window."""
        return self._bias > -math.inf and far.kept > 0

    @property
    def chunk(self) -> int:
        return _CHUNK

    def turn(self, segment: Segment, far: Far) -> FarRow | None:
        """The attention of a row in one forward pass; None where all it has is in its slot."""
        if not self.reaches(far):
            return None
        at = segment.offset + segment.start + torch.arange(len(segment.ids), device=self._device)
        far.drawn += segment.wants_logits
        return _Turn(self, far, self._angles(self.window - at), segment.wants_logits)

    def attend(
        self, turn: _Turn, layer: int, q: Tensor, keys: Tensor, values: Tensor, scale: float | None
    ) -> Tensor | None:
        """See ``attention.FarRow``."""
        if layer not in self._layers:
            return None
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        pasts = [part[layer] for part in turn.far.parts if len(part[layer])]
        far = beyond(rotated(q, *turn.angles), pasts, scale, self._blocks)
        out, share = joint(within(q, keys, values, scale), far, self._bias)
        if turn.draws:
            weight = share[:, -1].mean()
            turn.far.weight = weight if turn.far.weight is None else turn.far.weight + weight
        return out

    @torch.inference_mode()
    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (n, E) in fp32 of positions (n,), which may be negative."""
        cos, sin = self._rotary(torch.zeros(1, device=positions.device), positions[None])
        return cos[0], sin[0]


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """One row in one forward pass. Implements ``attention.FarRow``."""

    beyond: Beyond
    far: Far
    angles: tuple[Tensor, Tensor] = field(repr=False)  # (n, E) each: from a query's position to distance W
    draws: bool  # from its last token

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor | None:
        return self.beyond.attend(self, layer, q, keys, values, scale)


def _together(parts: Sequence[Past]) -> Past:
    """All in one. The first one's memory is used on: nobody else may append to it."""
    first, *others = (past for past in parts if len(past))
    out = first.fork()
    for past in others:
        out.append(past.keys.all, past.values.all)
    return out
