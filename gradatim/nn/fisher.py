"""Elastic weight consolidation (Kirkpatrick 2017, PNAS 114, eq. 3) of a LoRA adapter, on the change D of the weights.

On the factors A and B themselves it is degenerate: at B = 0 the Fisher information of A is 0, and (B M, M^-1 A) is the
same adapter at another penalty. So the Fisher is that of the frozen W that D is added to. Of each layer's diagonal
only the sums over rows and over columns are kept, and

    F_ij ~ s_i a_j / n        s_i = sum_j F_ij (out,)    a_j = sum_i F_ij (in,)    n = sum_ij F_ij

is the nearest rank-one matrix in I-divergence (Shazeer 2018, arXiv:1804.04235, sec. 3). F_ij = E sum_t (d_ti x_tj)^2 a
predicted token, x_t and d_t being a layer's input and its output's gradient at token t, of labels that the model draws
itself: the true Fisher. Sums add up, so online EWC (Schwarz 2018, arXiv:1805.06370, sec. 3.2) needs nothing more.

It knows no examples, no losses and no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradatim.errors import AdapterError
from gradatim.nn.lora import LoraWeights

_ROWS, _COLUMNS = ".rows", ".columns"


@dataclass(frozen=True, slots=True)
class Fisher:
    """``sums`` maps a layer's path to (s, a), fp32, which have the same total; nats^2 a predicted token."""

    sums: Mapping[str, tuple[Tensor, Tensor]]  # s (out,), a (in,)

    def trace(self) -> float:
        return float(sum(s.sum() for s, _ in self.sums.values()))

    def tensors(self) -> dict[str, Tensor]:
        """As a file keeps it; see ``from_tensors``."""
        named = {path + _ROWS: s for path, (s, _) in self.sums.items()}
        return named | {path + _COLUMNS: a for path, (_, a) in self.sums.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], weights: LoraWeights) -> Fisher:
        """Of the layers of ``weights``. AdapterError where one lacks, has another shape, or cannot be a Fisher."""
        sums = {}
        for path, (a, b) in weights.modules.items():
            rows, columns = tensors.get(path + _ROWS), tensors.get(path + _COLUMNS)
            if rows is None or columns is None or rows.shape != b.shape[:1] or columns.shape != a.shape[1:]:
                raise AdapterError(f"the Fisher information of {path} is missing or has another shape")
            if not all(bool(t.isfinite().all()) and bool((t >= 0).all()) for t in (rows, columns)):
                raise AdapterError(f"the Fisher information of {path} is negative or not finite")
            sums[path] = (rows.float(), columns.float())
        return cls(sums)

    def followed_by(self, new: Fisher, decay: float) -> Fisher:
        """Online EWC: ``decay F + F_new``. Both are of the same layers."""
        mine = self.sums
        return Fisher({p: (decay * mine[p][0] + s, decay * mine[p][1] + a) for p, (s, a) in new.sums.items()})


# --------------------------------------------------------------------------------------------- gathering


@contextmanager
def gathering(model: Any, paths: Iterator[str] | tuple[str, ...]) -> Iterator[Gathered]:
    """Inside the block, backward passes of the summed log-probabilities of drawn labels are added up.

    It costs two reductions a layer. Layers whose output has no gradient are left at 0; only layers that run as
    modules are seen.
    """
    gathered = Gathered({p: _zeros(model.get_submodule(p)) for p in paths})
    handles = [model.get_submodule(p).register_forward_hook(gathered.hook(p)) for p in gathered.sums]
    try:
        yield gathered
    finally:
        for handle in handles:
            handle.remove()


def _zeros(linear: Any) -> tuple[Tensor, Tensor]:
    out, width = linear.weight.shape
    device = linear.weight.device
    return torch.zeros(out, device=device), torch.zeros(width, device=device)


@dataclass(slots=True)
class Gathered:
    """Sums over all backward passes so far."""

    sums: dict[str, tuple[Tensor, Tensor]]

    def fisher(self, labels: int) -> Fisher:
        """Per label drawn."""
        return Fisher({p: (s.cpu() / labels, a.cpu() / labels) for p, (s, a) in self.sums.items()})

    def hook(self, path: str) -> Any:
        def watch(_module: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
            if y.requires_grad:
                y.register_hook(partial(self._add, path, args[0].detach()))  # type: ignore[no-untyped-call]

        return watch

    @torch.no_grad()
    def _add(self, path: str, x: Tensor, delta: Tensor) -> None:
        """x (..., in), delta (..., out): F's sums over columns and rows, without F."""
        x2 = x.reshape(-1, x.shape[-1]).float().square()  # (T, in)
        d2 = delta.reshape(-1, delta.shape[-1]).float().square()  # (T, out)
        s, a = self.sums[path]
        s.addmv_(d2.t(), x2.sum(1))
        a.addmv_(x2.t(), d2.sum(1))


# ----------------------------------------------------------------------------------------------- penalty


def penalty(fisher: Fisher, anchor: LoraWeights, now: LoraWeights) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """``1/2 sum_ij F_ij D_ij^2`` over all layers, and its gradient by (A, B); for lambda multiply both.

    D = scaling (B A - B* A*) is never built: D = U V with U = scaling [B - B*, B*] (out, 2r) and V = [A; A - A*]
    (2r, in), so that the penalty is ``1/2 tr[(U^T S U)(V N V^T)]``, at O((in + out) r^2), exactly 0 at the anchor,
    and free of the cancellation of B A against B* A*.
    """
    total, gradient = 0.0, {}
    for path, (s, a_sum) in fisher.sums.items():
        (a, b), (a0, b0) = now.modules[path], anchor.modules[path]
        s, a_sum, a0, b0 = (t.to(a.device, a.dtype) for t in (s, a_sum, a0, b0))
        n = a_sum / a_sum.sum().clamp_min(torch.finfo(a.dtype).tiny)  # (in,), so that s_i n_j ~ F_ij
        u = now.scaling * torch.cat([b - b0, b0], 1)  # (out, 2r)
        v = torch.cat([a, a - a0], 0)  # (2r, in)
        su, vn = s[:, None] * u, v * n  # (out, 2r), (2r, in)
        inner = vn @ v.t()  # (2r, 2r)
        total += 0.5 * float(((u.t() @ su) * inner).sum())
        gradient[path] = (now.scaling * ((b.t() @ su) @ vn), now.scaling * (su @ (vn @ a.t())))
    return total, gradient


def norm(gradient: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Euclidean, over all layers."""
    return math.sqrt(sum(float(g.square().sum()) for pair in gradient.values() for g in pair))
