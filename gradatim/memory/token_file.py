"""A token store on disk: one file that is replaced as a whole or not at all, and beside it the search index.

The index is derived from the file: where it is missing, cut short, damaged or of other data it is left aside, and the
store builds it again. It knows no searches.

Shapes: N rows, D width of a key.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gradatim.errors import ForeignMemoryError, StoreError
from gradatim.memory.key_space import EachToken, KeySpace, made_with

TRUTH_FILE = "tokens.safetensors"
INDEX_FILE = "index.safetensors"
_FORMAT = "2"
_UNSOUND = (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError)

Spans = tuple[tuple[int, int, bytes], ...]
_Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """All that a store holds. Rows that belong to no source were removed, and are zero."""

    space: KeySpace[EachToken]
    keys: NDArray[np.float16]  # (N, D)
    tokens: NDArray[np.int32]  # (N,)
    sources: Mapping[str, list[tuple[int, int]]]  # rows [start, end) of each
    segments: Spans = ()  # (start, end, index) from row 0 on


def write(folder: Path, held: Snapshot) -> None:
    """StoreError where the disk refuses; what was there before is still there then, and after a crash."""
    space = held.space
    arrays: dict[str, NDArray[Any]] = {
        "keys": held.keys,
        "tokens": held.tokens,
        "mean": space.pooling.mean,
        "scale": space.pooling.scale,
    }
    header = {
        "format": _FORMAT,
        "space": json.dumps([space.base_sha256, space.tokenizer_sha256, space.layers, space.adapter_sha256]),
        "sources": json.dumps(held.sources),
    }
    pieces: dict[str, NDArray[Any]] = {
        str(i): np.frombuffer(data, np.uint8) for i, (_, _, data) in enumerate(held.segments)
    }
    spans = json.dumps([(start, end) for start, end, _ in held.segments])
    digest = _digest(arrays, header)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / TRUTH_FILE, save(arrays, header | {"sha256": digest}))
        derived = {"of": digest, "spans": spans}
        replace(folder / INDEX_FILE, save(pieces, derived | {"sha256": _digest(pieces, derived)}))
    except OSError as e:
        raise StoreError(f"cannot write the memory {folder}: {e.strerror}") from e


def read(folder: Path, space: KeySpace[EachToken]) -> tuple[Snapshot, str]:
    """What was written, and why its index is not among it: empty where it is. ForeignMemoryError where it was made in
    another key space; StoreError where it is damaged or cannot be read."""
    path = folder / TRUTH_FILE
    try:
        arrays, header = _read(path)
        base, tokenizer, layers, adapter = _space(header)
        theirs = KeySpace(base, tokenizer, layers, EachToken(arrays["mean"], arrays["scale"]), adapter)
        sources = {s: [(a, b) for a, b in spans] for s, spans in json.loads(header["sources"]).items()}
    except _UNSOUND as e:
        raise StoreError(f"{path} is no sound memory: {e}") from e
    if theirs.id != space.id:
        raise ForeignMemoryError(f"{path} was made in another key space: {theirs}, but this is {space}")
    segments, fault = _segments(folder / INDEX_FILE, header["sha256"])
    return Snapshot(space, arrays["keys"], arrays["tokens"], sources, segments), fault


def about(folder: Path) -> tuple[Mapping[str, str], frozenset[str]]:
    """What a written one was made with, and its sources; it is looked at no further. StoreError where it is damaged or
    absent."""
    path = folder / TRUTH_FILE
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
        return made_with(*_space(header)[:3]), frozenset(json.loads(header["sources"]))
    except _UNSOUND as e:
        raise StoreError(f"{path} is no sound memory: {e}") from e


def _space(header: Mapping[str, str]) -> tuple[str, str, tuple[int, ...], str]:
    """Digests of the base model and the tokenizer, layers, and the digest of the weights."""
    if header["format"] != _FORMAT:
        raise ValueError(f"its format is {header['format']}, and this is {_FORMAT}")
    base, tokenizer, layers, adapter = json.loads(header["space"])
    return base, tokenizer, tuple(layers), adapter


def _segments(path: Path, of: str) -> tuple[Spans, str]:
    try:
        pieces, header = _read(path)
        if header["of"] != of:
            return (), f"{path} is of other data"
        spans = [(int(a), int(b)) for a, b in json.loads(header["spans"])]
        return tuple((a, b, pieces[str(i)].tobytes()) for i, (a, b) in enumerate(spans)), ""
    except _UNSOUND as e:
        return (), f"{path} is no sound index: {e}"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with safe_open(path, framework="numpy") as file:
        header = dict(file.metadata() or {})
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    digest = header.pop("sha256")
    if digest != _digest(arrays, header):
        raise ValueError("its bytes are not those that were written")
    return arrays, header | {"sha256": digest}


def _digest(arrays: Mapping[str, NDArray[Any]], header: Mapping[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        sha.update(np.ascontiguousarray(arrays[name]).data)
    return sha.hexdigest()


def replace(path: Path, data: bytes) -> None:
    """All of it under that name, or what was there before."""
    tmp = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with tmp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
