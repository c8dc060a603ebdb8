"""A Llama-style decoder layer as one autograd function, its backward pass written out.

    x = x + O attention(rotary(Q n), rotary(K n), V n),   n = RMSNorm(x)
    x = x + D (silu(G m) * (U m)),                         m = RMSNorm(x)

Every linear layer is frozen and may carry a LoRA branch, whose two products are added in place into the layer's own.
Only the branches and the stream get gradients. The stream x is fp32, norms and SiLU are computed again in the backward
pass, and layers that read the same input share the products of their branches.

It knows no models, tries or heads.

Shapes: N tokens, Q of them needed behind this layer, H hidden size, r rank of a branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradatim.nn.attend import Plan, attend, attend_backward

ROWS = 256  # of the MLP's intermediate values at a time
NAMES = ("q", "k", "v", "o", "gate", "up", "down")  # the linear layers, in the order of their branches


@dataclass(frozen=True, slots=True)
class Layer:
    """The frozen weights of one layer."""

    weights: tuple[Tensor, ...]  # (out, in) each, as in NAMES
    biases: tuple[Tensor | None, ...]  # (out,)
    norms: tuple[Tensor, Tensor]  # (H,) before attention and before the MLP
    eps: tuple[float, float]
    scaling: float  # of attention scores


@dataclass(frozen=True, slots=True)
class Pass:
    """What all layers of one pass share."""

    plan: Plan
    cos: Tensor  # (N, D) fp32
    sin: Tensor
    lora_scaling: float


def layer_forward(x: Tensor, layer: Layer, run: Pass, rows: Tensor | None, branches: Sequence[Tensor | None]) -> Tensor:
    """(N, H) -> (N, H), or (Q, H) where rows (Q,) says which are needed, ascending. ``branches``: A and B of each
    linear layer in turn, None where it has none."""
    out: Tensor = _Layer.apply(x, layer, run, rows, *branches)  # type: ignore[no-untyped-call]
    return out


# ---------------------------------------------------------------------------------- linear layers and LoRA


class _Fan:
    """Linear layers that read the same input: y_i = x W_i^T + s (x A_i^T) B_i^T."""

    def __init__(self, layer: Layer, names: Sequence[str], branches: Sequence[Tensor | None], scaling: float) -> None:
        at = [NAMES.index(name) for name in names]
        self.weights = [layer.weights[i] for i in at]
        self.biases = [layer.biases[i] for i in at]
        self.scaling = scaling
        dtype = self.weights[0].dtype
        pairs = [(branches[2 * i], branches[2 * i + 1]) for i in at]
        self.ups = [None if b is None else b.to(dtype) for _, b in pairs]  # (out, r)
        downs = [a for a, _ in pairs if a is not None]
        self.down = torch.cat(downs).to(dtype) if downs else None  # (sum of r, in)
        self.widths = [0 if a is None else len(a) for a, _ in pairs]

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """x (N, in) -> y of each (N, out), and x A^T (N, sum of r) for the backward pass."""
        ys = [F.linear(x, w, b) for w, b in zip(self.weights, self.biases, strict=True)]
        if self.down is None:
            return ys, None
        h = x @ self.down.t()
        for y, up, mine in zip(ys, self.ups, _split(h, self.widths, 1), strict=True):
            if up is not None:
                y.addmm_(mine, up.t(), alpha=self.scaling)
        return ys, h

    def backward(
        self, gs: Sequence[Tensor], x: Tensor, h: Tensor | None, *, through: bool = True
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Gradient of x (N, in), empty if not to go ``through``, and of A and B of each."""
        dx = x.new_empty(0)
        if through:
            dx = gs[0] @ self.weights[0]
            for g, weight in zip(gs[1:], self.weights[1:], strict=True):
                dx.addmm_(g, weight)
        if self.down is None or h is None:
            return dx, [None] * (2 * len(gs))
        backs = [g @ up for g, up in zip(gs, self.ups, strict=True) if up is not None]  # (N, r) each
        back = (torch.cat(backs, 1) if len(backs) > 1 else backs[0]).mul_(self.scaling)  # (N, sum of r)
        if through:
            dx.addmm_(back, self.down)
        downs = _split(back.t() @ x, self.widths, 0)
        grads: list[Tensor | None] = []
        for g, up, down, mine in zip(gs, self.ups, downs, _split(h, self.widths, 1), strict=True):
            grads += [None, None] if up is None else [down, (mine.t() @ g).t().mul(self.scaling)]
        return dx, grads


# ------------------------------------------------------------------------------------------ norm and rotary


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm (arXiv:1910.07467, eq. 4) of x (N, H), in the weight's dtype; and 1 / rms (N, 1)."""
    inverse = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1] + eps).rsqrt_()
    return ((x * inverse).mul_(weight)).to(weight.dtype), inverse


def rms_backward(into: Tensor, grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """Gradient of x (N, H), given that of its norm, added to ``into``."""
    t = grad.to(x.dtype) * weight  # (N, H)
    along = (t * x).sum(-1, keepdim=True) * inverse**3 / x.shape[-1]  # (N, 1)
    return torch.addcmul(into, t, inverse).addcmul_(x, along, value=-1)


def _rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864, eq. 34, halves instead of neighbours): y (..., N, G, D)."""
    half = y.shape[-1] // 2
    out = y * cos
    out[..., :half].addcmul_(y[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(y[..., :half], sin[..., half:])
    return out


def _split_heads(y: Tensor, key_heads: int, size: int) -> Tensor:
    """(N, KH * G * D) -> (KH, N, G, D), fp32 or wider."""
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.view(len(y), key_heads, -1, size).transpose(0, 1).to(wide, memory_format=torch.contiguous_format)


def _join_heads(y: Tensor, dtype: torch.dtype) -> Tensor:
    """(KH, N, G, D) -> (N, KH * G * D)."""
    return y.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format).flatten(1)


# -------------------------------------------------------------------------------------------------- layer


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, run: Pass, rows: Tensor | None, *branches: Tensor | None) -> Tensor:
        fans = _fans(layer, run, branches)
        n, inverse1 = rms_norm(x, layer.norms[0], layer.eps[0])
        (q, k, v), h1 = fans[0].forward(n)
        size = run.cos.shape[-1]
        key_heads = k.shape[1] // size
        cos, sin = run.cos[:, None], run.sin[:, None]  # (N, 1, D)
        q = _rotate(_split_heads(q, key_heads, size), cos * layer.scaling, sin * layer.scaling)  # (KH, N, G, D)
        k = _rotate(_split_heads(k, key_heads, size), cos, sin).flatten(1, 2)  # (KH, N, D)
        v = v.view(len(v), key_heads, size).transpose(0, 1).contiguous()
        stream = x
        if rows is not None:
            q, stream = q[:, rows], x[rows]
        q = q.flatten(1, 2)  # (KH, Q * G, D)
        mixed = attend(run.plan, q, k, v)  # (Q, H)
        (y,), h2 = fans[1].forward(mixed)
        middle = stream + y
        m, inverse2 = rms_norm(middle, layer.norms[1], layer.eps[1])
        (gate, up), h3 = fans[2].forward(m)
        y, h4 = _down(fans[3], gate, up)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(
                x, rows, inverse1, q, k, v, mixed, middle, inverse2, gate, up, h1, h2, h3, h4, *branches
            )
            ctx.layer, ctx.run = layer, run
        return middle + y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, inverse1, q, k, v, mixed, middle, inverse2, gate, up, h1, h2, h3, h4, *branches = ctx.saved_tensors
        layer: Layer = ctx.layer
        run: Pass = ctx.run
        fans = _fans(layer, run, branches)
        dtype: torch.dtype = gate.dtype

        grad, mlp_grads = _mlp_backward(fans[2:], layer, grad, (middle, inverse2, gate, up, h3, h4))

        d_mixed, out_grads = fans[1].backward([grad.to(dtype)], mixed, h2)
        dq, dk, dv = attend_backward(run.plan, d_mixed, q, k, v, mixed)
        if rows is not None:
            dq, grad = _spread(dq.view(len(k), len(rows), -1), rows, len(x), 1), _spread(grad, rows, len(x), 0)
        cos, sin = run.cos[:, None], -run.sin[:, None]
        dq = _rotate(dq.view(*k.shape[:2], -1, k.shape[2]), cos * layer.scaling, sin * layer.scaling)
        dk = _rotate(dk[:, :, None], cos, sin)
        n = (x * inverse1).mul_(layer.norms[0]).to(dtype)
        heads = [_join_heads(d, dtype) for d in (dq, dk, dv[:, :, None])]
        through = ctx.needs_input_grad[0]
        d_n, in_grads = fans[0].backward(heads, n, h1, through=through)
        dx = rms_backward(grad, d_n, x, inverse1, layer.norms[0]) if through else None
        return dx, None, None, None, *in_grads, *out_grads, *mlp_grads


def _down(fan: _Fan, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor | None]:
    """The MLP's last layer, by a few rows at a time."""
    pairs = zip(torch.split(gate, ROWS), torch.split(up, ROWS), strict=True)
    parts = [fan.forward(F.silu(g).mul_(u)) for g, u in pairs]
    hs = [h for _, h in parts if h is not None]
    return torch.cat([ys[0] for ys, _ in parts]), torch.cat(hs) if hs else None


def _mlp_backward(
    fans: Sequence[_Fan], layer: Layer, grad: Tensor, saved: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradient of the stream before the MLP, and of the branches of gate, up and down. By a few rows at a time: what
    lies between two products then stays in the cache, and takes no fresh pages."""
    out = torch.empty_like(grad)
    sums: list[Tensor | None] = []
    for chunk in zip(*(repeat(None) if t is None else torch.split(t, ROWS) for t in (out, grad, *saved)), strict=False):
        into, g, middle, inverse, gate, up, h3, h4 = chunk
        silu = F.silu(gate)
        (d_act, down_grads) = fans[1].backward([g.to(gate.dtype)], silu * up, h4)
        d_gate = torch.ops.aten.silu_backward(d_act * up, gate)
        m = (middle * inverse).mul_(layer.norms[1]).to(gate.dtype)
        d_m, grads = fans[0].backward([d_gate, d_act.mul_(silu)], m, h3)
        into.copy_(rms_backward(g, d_m, middle, inverse, layer.norms[1]))
        sums = _added(sums, [*grads, *down_grads], grad.dtype)
    return out, sums


def _added(sums: list[Tensor | None], grads: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    if not sums:
        return [None if g is None else g.to(dtype, copy=True) for g in grads]
    return [None if s is None or g is None else s.add_(g) for s, g in zip(sums, grads, strict=True)]


def _fans(layer: Layer, run: Pass, branches: Sequence[Tensor | None]) -> list[_Fan]:
    together = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
    return [_Fan(layer, names, branches, run.lora_scaling) for names in together]


def _split(x: Tensor, widths: list[int], dim: int) -> tuple[Tensor, ...]:
    return torch.split(x, widths, dim)


def _spread(x: Tensor, rows: Tensor, count: int, dim: int) -> Tensor:
    """The rows in their places among ``count`` along ``dim``, zeros in the others."""
    shape = list(x.shape)
    shape[dim] = count
    return x.new_zeros(shape).index_copy_(dim, rows, x)
