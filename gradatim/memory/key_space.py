"""Which hidden states a memory's keys are made of, and how: keys of two spaces say nothing of each other.

It knows no models, only what identifies one.

Shapes: n states, D size of the hidden state.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class KeySpace:
    """A key is the output of a late layer, standardised per dimension and of length 1: a few dimensions of the residual
    stream outweigh all others, and they do not hold what comes next."""

    base_sha256: str
    layer: int  # the key is the output of this many layers
    vocabulary: int
    mean: NDArray[np.float32]  # (D,)
    scale: NDArray[np.float32]  # (D,)
    adapter_sha256: str = ""  # of the weights on the base; empty for the base alone

    @property
    def width(self) -> int:
        return len(self.mean)

    @property
    def digest(self) -> str:
        names = (self.base_sha256, self.adapter_sha256, self.layer, self.vocabulary)
        sha = hashlib.sha256(json.dumps(names).encode())
        sha.update(self.mean.tobytes() + self.scale.tobytes())
        return sha.hexdigest()

    def keys(self, hidden: Tensor) -> NDArray[np.float32]:
        """(n, D) of hidden states (n, D); NaN where those are not finite."""
        x = (hidden.detach().float().cpu().numpy() - self.mean) / self.scale
        length = np.sqrt(np.square(x).sum(1, keepdims=True))
        with np.errstate(invalid="ignore"):
            keys: NDArray[np.float32] = x / np.maximum(length, 1e-6)
        return keys

    def __str__(self) -> str:
        adapter = f" with adapter {self.adapter_sha256[:12]}" if self.adapter_sha256 else ""
        base = f"base {self.base_sha256[:12]}{adapter}"
        return f"{self.digest[:12]} ({base}, layer {self.layer}, {self.vocabulary} tokens, width {self.width})"


def key_space(base_sha256: str, layer: int, vocabulary: int, hidden: Tensor, adapter_sha256: str = "") -> KeySpace:
    """Standardised by states (n, D) of public text: a tenant's own would leave a trace that no deletion removes."""
    x = hidden.detach().double().cpu()
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    return KeySpace(
        base_sha256, layer, vocabulary, mean.float().numpy(), scale.float().numpy(), adapter_sha256=adapter_sha256
    )


def in_space_of(space: KeySpace, adapter_sha256: str) -> KeySpace:
    """The space of the same base under an adapter."""
    return replace(space, adapter_sha256="" if adapter_sha256 == space.base_sha256 else adapter_sha256)


def late_layer(layers: int) -> int:
    """The layer whose output makes the best keys: 28 of SmolLM2's 30."""
    return max(1, round(0.93 * layers))
