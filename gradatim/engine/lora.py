"""LoRA for each token of a batch (Hu 2021, arXiv:2106.09685): y = W x + scaling * B A x, adapter by adapter.

The linear layers of the engine's own module tree are replaced by ones that keep a stack of (A, B), one for each
slot, and add to each token what its slot says. Slot 0 is no adapter: its tokens go through ``F.linear`` and nothing
else. It knows nothing of adapters' names, files or life times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradatim.errors import AdapterError
from gradatim.nn.lora import LoraWeights


@dataclass(slots=True)
class Groups:
    """Which tokens of the running forward pass belong to which slot; those of slot 0 are in no group."""

    tokens: Sequence[tuple[int, slice | Tensor]] = field(default_factory=tuple)

    def set(self, lora_slots: Sequence[int], counts: Sequence[int], device: torch.device) -> None:
        """From the slot and the number of tokens of each segment, in order."""
        spans: dict[int, list[tuple[int, int]]] = {}
        at = 0
        for slot, n in zip(lora_slots, counts, strict=True):
            runs = spans.setdefault(slot, [])
            if runs and runs[-1][1] == at:
                runs[-1] = (runs[-1][0], at + n)
            else:
                runs.append((at, at + n))
            at += n
        spans.pop(0, None)
        self.tokens = [(slot, _index(runs, device)) for slot, runs in spans.items()]


def _index(runs: Sequence[tuple[int, int]], device: torch.device) -> slice | Tensor:
    if len(runs) == 1:
        return slice(*runs[0])
    return torch.tensor([i for lo, hi in runs for i in range(lo, hi)], device=device)


class LoraLinear(nn.Module):
    """A linear layer whose frozen weight is shared with the base, and whose adapters are its own."""

    def __init__(self, linear: nn.Linear, groups: Groups) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._groups = groups
        self._a: Tensor | None = None  # (slots + 1, in, r)
        self._b: Tensor | None = None  # (slots + 1, r, out), scaling included

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self._a is None or self._b is None or not self._groups.tokens:
            return y
        x_n, y_n = x.reshape(-1, self.in_features), y.view(-1, self.out_features)  # (N, in), (N, out)
        for slot, index in self._groups.tokens:
            a, b = self._a[slot], self._b[slot]
            if isinstance(index, slice):
                y_n[index].addmm_(x_n[index] @ a, b)
            else:
                y_n.index_add_(0, index, (x_n[index] @ a) @ b)
        return y

    def put(self, slot: int, slots: int, pair: tuple[Tensor, Tensor] | None, scaling: float) -> None:
        """Fill a slot with A (r, in) and B (out, r), or with nothing."""
        if pair is None:
            if self._b is not None:
                self._b[slot] = 0
            return
        a, b = pair
        self._reserve(slots, len(a))
        assert self._a is not None and self._b is not None
        self._a[slot], self._b[slot] = 0, 0
        self._a[slot, :, : len(a)] = a.T
        self._b[slot, : len(a)] = b.T * scaling

    def _reserve(self, slots: int, rank: int) -> None:
        """Room for that rank in every slot; smaller adapters are padded with zeros."""
        known = 0 if self._a is None else self._a.shape[-1]
        if rank <= known:
            return
        a = self.weight.new_zeros(slots + 1, self.in_features, rank)
        b = self.weight.new_zeros(slots + 1, rank, self.out_features)
        if self._a is not None and self._b is not None:
            a[:, :, :known], b[:, :known] = self._a, self._b
        self._a, self._b = a, b


class LoraLayers:
    """All the adaptable layers of one module tree."""

    def __init__(self, model: nn.Module, slots: int, head: nn.Module | None) -> None:
        self.groups = Groups()
        self._slots = slots
        self._layers: dict[str, LoraLinear] = {}
        linears = [(path, m) for path, m in model.named_modules() if type(m) is nn.Linear and m is not head]
        for path, linear in linears:
            parent, _, name = path.rpartition(".")
            layer = self._layers[path] = LoraLinear(linear, self.groups)
            setattr(model.get_submodule(parent), name, layer)

    def check(self, modules: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """AdapterError where an adapter does not fit this model."""
        for path, (a, b) in modules.items():
            layer = self._layers.get(path)
            if layer is None:
                raise AdapterError(f"the adapter changes {path}, which this model lacks or cannot adapt")
            if (a.shape[1], b.shape[0]) != (layer.in_features, layer.out_features):
                raise AdapterError(f"the adapter's {path} is {b.shape[0]} x {a.shape[1]}, made for another base model")

    @torch.inference_mode()
    def put(self, slot: int, weights: LoraWeights) -> None:
        """Fill a slot that no row uses. Milliseconds: a copy of the adapter's numbers."""
        for path, layer in self._layers.items():
            layer.put(slot, self._slots, weights.modules.get(path), weights.scaling)
