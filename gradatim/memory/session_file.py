"""A session on disk, so that a conversation longer than the window can be taken up again after a restart.

It knows no models: who writes says in which one the session was read, and nobody else can take it up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gradatim.errors import ForeignMemoryError, StoreError
from gradatim.memory.token_file import replace
from gradatim.nn.session import LayerRows, Past, Rows, Session

_PARTS = ("keys", "values", "memory_keys", "memory_values")
_UNSOUND = (OSError, SafetensorError, ValueError, KeyError, TypeError)


def write_session(session: Session, path: Path, model_digest: str, about: Mapping[str, str] | None = None) -> None:
    """``model_digest`` names the weights, adapter included, that read it; ``about`` is kept beside it for whoever looks
    at the file. StoreError where the disk refuses; what was there before is still there then, and after a crash."""
    tensors = {
        f"{i}.{part}": rows.all.contiguous()
        for i, layer in enumerate(session.layers)
        for part, rows in zip(_PARTS, (layer.keys, layer.values, layer.past.keys, layer.past.values), strict=True)
        if len(rows)
    }
    if session.last is not None:
        tensors["last"] = session.last.contiguous()
    if session.ids:
        tensors["ids"] = torch.tensor(session.ids, dtype=torch.int32)
    at = json.dumps([len(session.layers), session.position, session.local])
    header = {**(about or {}), "model": model_digest, "at": at}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, save(tensors, header | {"sha256": _digest(tensors, header)}))
    except OSError as e:
        raise StoreError(f"cannot write the session {path}: {e.strerror}") from e


def read_session(path: Path, model_digest: str) -> Session:
    """ForeignMemoryError where other weights read it; StoreError where it is damaged or absent."""
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.pop("sha256") != _digest(tensors, header):
            raise ValueError("its bytes are not those that were written")
        count, position, local = json.loads(header["at"])
    except _UNSOUND as e:
        raise StoreError(f"{path} is no sound session: {e}") from e
    if header["model"] != model_digest:
        raise ForeignMemoryError(
            f"{path} was read by other weights: {header['model'][:12]}, but these are {model_digest[:12]}"
        )
    layers = [_layer(*(tensors.get(f"{i}.{part}") for part in _PARTS)) for i in range(count)]
    ids = tensors["ids"].tolist() if "ids" in tensors else ()
    return Session(layers, position, local, tensors.get("last"), tuple(ids))


def _layer(
    keys: Tensor | None, values: Tensor | None, past_keys: Tensor | None, past_values: Tensor | None
) -> LayerRows:
    """Earlier files hold the keys beyond the window in fp32. What blocks are summed up by is made anew."""
    if past_keys is not None and past_values is not None:
        past_keys = past_keys.to(past_values.dtype)
    return LayerRows(Rows(keys), Rows(values), Past(past_keys, past_values))


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
