"""The key space and the gate that come with this package for the bundled model, as ``bench_token_gate`` makes them.

Any other model has a key space of its own and the gate that needs no training. It knows no stores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from gradatim.memory.key_space import EachToken, KeySpace
from gradatim.memory.knn_gate import Gate
from gradatim.memory.token_file import replace

FILE = Path(__file__).with_name("smollm2.safetensors")
_SPACE = ("space.mean", "space.scale", "space.axes")


def shipped(
    base_sha256: str, tokenizer_sha256: str, layer: int, path: Path = FILE
) -> tuple[KeySpace[EachToken], Gate] | None:
    """None where there is none for that layer of that base model."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if base_sha256 not in json.loads(header["bases"]) or layer != int(header["layer"]):
        return None
    gate = Gate()
    pooling = EachToken(*(tensors.pop(name).float().numpy() for name in _SPACE))
    gate.load_state_dict(tensors)
    return KeySpace(base_sha256, tokenizer_sha256, (layer,), pooling), gate.requires_grad_(False).eval()


def write_shipped(path: Path, bases: Sequence[str], space: KeySpace[EachToken], gate: Gate) -> None:
    """``bases``: digests of that model, one for each type of its numbers."""
    pooling = space.pooling
    of_space = (torch.from_numpy(x) for x in (pooling.mean, pooling.scale, pooling.axes.astype(np.float16)))
    tensors = {**dict(zip(_SPACE, of_space, strict=True)), **gate.state_dict()}
    header = {"bases": json.dumps(sorted(bases)), "layer": str(space.layers[0])}
    replace(path, save({name: x.contiguous() for name, x in tensors.items()}, header))
