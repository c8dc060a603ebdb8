"""Attention that reaches beyond its window by nearest neighbours (Memorizing Transformers, arXiv:2203.08913).

The model is frozen and knows positions by RoPE.
A text is read in chunks. What leaves the window of the last W tokens goes into the session's memory, its keys turned
back to before RoPE. A query attends to its best blocks of them (``nn.nearest``), turned as if all of them stood at the
one distance W: the farthest the local window knows (as InfLLM does, arXiv:2402.04617). Two forms:

- joint: one softmax over the scores of window and memory, in all layers but the first two. Needs no training.
- gated: eq. 1 of the paper, g * memory + (1 - g) * local with g learned per head, in one late layer.

Biases and temperatures per head can be trained; with every bias at -inf the model's own attention runs, bit for bit.
The model that is handed over is never changed: its modules are copied around the same weights. It knows no requests,
no tenants and no sampling.

Shapes: T tokens read, n of them in a chunk, m in the window, M in memory; H query heads, KH key heads, G = H / KH, E
width of a head, D of a state, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gradatim.errors import ModelError
from gradatim.nn.nearest import BLOCKS, beyond, check_rope, joint, memory_layers, mixed, within
from gradatim.nn.session import LayerRows, Rows, Session, rotated

NAME = "gradatim_memory"  # under which transformers' models find ``_attention``
WINDOW, CHUNK = 512, 128
MEMORY_TOKENS = 16_384  # of one session; the oldest go
_GATED_LAYER = 0.6  # of the depth: 18 of 30

Form = Literal["joint", "gated"]


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """How each head takes its memory, per layer that has one: {layer: (H,)}."""

    bias: dict[int, Tensor]  # joint: added to memory scores; gated: the logit of g. -inf: closed
    log_temperature: dict[int, Tensor]  # memory scores are multiplied by its exponential

    def closed(self, layer: int) -> bool:
        return layer not in self.bias or bool(torch.isneginf(self.bias[layer]).all())

    @property
    def trained(self) -> bool:
        return any(t.requires_grad for t in (*self.bias.values(), *self.log_temperature.values()))


def layers_of(layers: int, form: Form) -> tuple[int, ...]:
    """Which layers get a memory by default, counted from 0."""
    return memory_layers(layers) if form == "joint" else (min(layers - 1, round(_GATED_LAYER * layers)),)


@dataclass(slots=True)
class _Turn:
    """Of the chunk that is being read."""

    session: Session
    mask: Tensor | None  # (1, 1, n, m) bool, None where it is plainly causal
    far: tuple[Tensor, Tensor]  # cos and sin (n, E) that turn a query from its position to distance W from position 0


class KnnAttention:
    """A frozen Llama-type model that reads texts longer than its window. One session, one row at a time; sessions of
    several threads need one object each."""

    def __init__(
        self,
        model: Any,
        *,
        window: int = WINDOW,
        chunk: int = CHUNK,
        blocks: int = BLOCKS,
        form: Form = "joint",
        layers: Sequence[int] | None = None,
        heads: Heads | None = None,
        memory_tokens: int = MEMORY_TOKENS,
    ) -> None:
        """``layers`` counts from 0; ``heads`` are as ``plain_heads`` makes them. ModelError where the model's attention
        is of another kind."""
        if not getattr(model, "_supports_attention_backend", False):
            kind = type(model).__name__
            raise ModelError(f"kNN attention does not support {kind}: transformers cannot exchange its attention")
        check_rope(model)
        if not 0 < chunk <= window:
            raise ValueError(f"a chunk of {chunk} tokens does not fit a window of {window}")
        self._model = _private_copy(model)
        self._base = self._model.base_model
        self._window, self._chunk, self._blocks, self._form = window, chunk, blocks, form
        self._memory_tokens = memory_tokens
        self._layers = tuple(layers_of(len(self._base.layers), form) if layers is None else layers)
        self.heads = heads or self.plain_heads()
        self._turn: _Turn | None = None
        for layer in self._base.layers:
            layer.self_attn.knn_attention = self._attend

    def plain_heads(self, bias: float = 0.0) -> Heads:
        """All heads alike, untrained; bias -inf closes them."""
        config, device = self._model.config, self._model.device
        every = {i: torch.full((config.num_attention_heads,), bias, device=device) for i in self._layers}
        return Heads(every, {i: torch.zeros_like(b) for i, b in every.items()})

    def session(self) -> Session:
        return Session([LayerRows() for _ in self._base.layers])

    # ------------------------------------------------------------------------------------------ reading

    def read(self, session: Session, ids: Sequence[int]) -> Iterator[Tensor]:
        """Read on. Per chunk the states (n, D) that predict what follows each token; ``logits`` makes of them what the
        model says. Nothing is read before it is asked for."""
        left = list(ids)
        while left:
            room = self._window - session.local
            count = min(len(left), room if room >= self._chunk else self._chunk)
            with torch.set_grad_enabled(self.heads.trained):
                states = self._read_chunk(session, left[:count])
            session.last = states[-1].detach()
            yield states
            left = left[count:]

    def logits(self, states: Tensor) -> Tensor:
        """(n, V) of states (n, D)."""
        with torch.set_grad_enabled(self.heads.trained):
            out: Tensor = self._model.get_output_embeddings()(states[None])[0]
        return out

    def score(self, session: Session, ids: Sequence[int]) -> Tensor:
        """Log-probability, fp32 nats, of each token after all that was read before it: (T,), or (T - 1,) where nothing
        was, as the first has nothing to follow."""
        out: list[Tensor] = []
        at = 0
        before = session.last
        for states in self.read(session, ids):
            targets = torch.tensor(ids[at : at + len(states)], device=states.device)
            predicting = states[:-1] if before is None else torch.cat([before[None], states[:-1]])
            targets = targets[len(targets) - len(predicting) :]
            logprobs = torch.log_softmax(self.logits(predicting).float(), -1)
            out.append(logprobs.gather(1, targets[:, None])[:, 0])
            before, at = states[-1], at + len(states)
        return torch.cat(out) if out else torch.zeros(0)

    def generate(self, session: Session, max_tokens: int, stop: frozenset[int] = frozenset()) -> list[int]:
        """The likeliest continuation of what was read, token by token, with the stopping one if there was one. What it
        says becomes part of the session. ValueError where nothing was read."""
        if session.last is None:
            raise ValueError("there is nothing to continue: read something first")
        out: list[int] = []
        while len(out) < max_tokens and not (out and out[-1] in stop):
            out.append(int(self.logits(session.last[None])[0].argmax()))
            for _ in self.read(session, out[-1:]):
                pass
        return out

    def _read_chunk(self, session: Session, ids: Sequence[int]) -> Tensor:
        device = self._model.device
        self._make_room(session, len(ids))
        positions = torch.arange(session.position, session.position + len(ids), device=device)[None]
        self._turn = _Turn(session, _causal(len(ids), session.local, device), self._angles(self._window - positions))
        try:
            out = self._base(
                input_ids=torch.tensor([list(ids)], device=device), position_ids=positions, use_cache=False
            )
        finally:
            self._turn = None
        session.position += len(ids)
        session.local += len(ids)
        states: Tensor = out.last_hidden_state[0]
        return states

    @torch.no_grad()
    def _make_room(self, session: Session, count: int) -> None:
        """Move what no longer fits the window into memory."""
        leaving = session.local + count - self._window
        if leaving <= 0:
            return
        first = session.position - session.local
        back = self._angles(-torch.arange(first, first + leaving, device=self._model.device)[None])
        for i, rows in enumerate(session.layers):
            keys, values = rows.keys.take(leaving), rows.values.take(leaving)
            if i in self._layers:
                rows.past.append(rotated(keys, *back).to(keys.dtype), values)
                rows.past.drop(len(rows.past) - self._memory_tokens)
        session.local -= leaving

    @torch.no_grad()
    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (n, E) in fp32 of positions (1, n), which may be negative."""
        cos, sin = self._base.rotary_emb(torch.zeros(1, device=positions.device), positions)
        return cos[0], sin[0]

    # ---------------------------------------------------------------------------------------- attention

    def _attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q (1, H, n, E) and k (1, KH, n, E), both rotated, v (1, KH, n, E) -> (1, n, H, E)."""
        turn, layer = self._turn, int(module.layer_idx)
        assert turn is not None, "attention outside of a reading"
        rows = turn.session.layers[layer]
        keys, values = self._extended(rows.keys, k[0])[None], self._extended(rows.values, v[0])[None]
        if self.heads.closed(layer) or not len(rows.past):
            out: Tensor = sdpa_attention_forward(module, q, keys, values, turn.mask, scaling=scaling)[0]
            return out
        bias, temperature = self.heads.bias[layer][:, None], self.heads.log_temperature[layer].exp()
        turned = rotated(q[0], *turn.far) * temperature[:, None, None]
        near = within(q[0], keys[0], values[0], scaling)
        far = beyond(turned, [rows.past], scaling, self._blocks)
        if self._form == "gated":
            return mixed(near[0], far[0], torch.sigmoid(bias).expand_as(near[1]))[None]
        return joint(near, far, bias)[0][None]

    def _extended(self, rows: Rows, new: Tensor) -> Tensor:
        """All of the window (KH, m, E), the chunk's own included; of what was read before no gradient is kept."""
        before = rows.all if self.heads.trained and len(rows) else new[:, :0]
        rows.append(new.detach())
        return torch.cat([before, new], 1) if self.heads.trained else rows.all


def _causal(count: int, before: int, device: torch.device) -> Tensor | None:
    """(1, 1, n, m): token i of the chunk sees what came before and itself. None where transformers needs none."""
    if not before or count == 1:
        return None
    seen = torch.ones(count, before + count, dtype=torch.bool, device=device).tril_(before)
    return seen[None, None]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    attend: Any = module.knn_attention
    return attend(module, query, key, value, rest["scaling"]), None


AttentionInterface.register(NAME, _attention)


def _private_copy(model: Any) -> Any:
    """The same modules anew, around the same weights."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    private = copy.deepcopy(model, memo=shared)
    private.set_attn_implementation(NAME)
    return private.eval()
