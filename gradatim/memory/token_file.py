"""A token store on disk: a folder with one file that names all others and is replaced as a whole or not at all.

Beside it lie the sealed parts of its keys, each under its digest, written once. It knows no searches.

Shapes: N rows, n of them unsealed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gradatim.errors import ForeignMemoryError, StoreError
from gradatim.memory.codec import Codec, Codes
from gradatim.memory.key_index import Spans
from gradatim.memory.key_space import EachToken, KeySpace, made_with
from gradatim.memory.segments import Segment

TRUTH_FILE = "tokens.safetensors"
_FORMAT = "5"
_UNSOUND = (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError)
_Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """All that a store holds. Rows that belong to no source were removed."""

    space: KeySpace[EachToken]
    segments: tuple[Segment, ...]  # from row 0 on
    codes: Codes  # (n, bytes) of the rows after
    tokens: NDArray[np.int32]  # (N,)
    sources: Spans


def write(folder: Path, held: Snapshot) -> None:
    """StoreError where the disk refuses; what was there before is still there then, and after a crash."""
    space = held.space
    arrays: dict[str, NDArray[Any]] = {
        "codes": held.codes,
        "tokens": held.tokens,
        "spans": _table(held.sources),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        named = [(s.start, s.end, _write_segment(folder, s)) for s in held.segments]
        header = {
            "format": _FORMAT,
            "space": space.id,
            "space_is": str(space),
            "made_with": json.dumps([space.base_sha256, space.tokenizer_sha256, space.layers]),
            "sources": json.dumps(list(held.sources)),
            "segments": json.dumps(named),
        }
        replace(folder / TRUTH_FILE, save(arrays, header | {"sha256": _digest(arrays, header)}))
        for path in set(folder.glob("*.faiss")) - {_segment_file(folder, digest) for _, _, digest in named}:
            path.unlink(missing_ok=True)
    except OSError as e:
        raise StoreError(f"cannot write the memory {folder}: {e.strerror or e}") from e


def _write_segment(folder: Path, segment: Segment) -> str:
    """The digest that it lies under, where it lay already if nothing in it has changed."""
    digest = segment.file_sha256
    if digest and _segment_file(folder, digest).exists():
        return digest
    tmp = folder / f".segment-{os.getpid()}"
    try:
        digest = segment.write(tmp)
        with tmp.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(tmp, _segment_file(folder, digest))
    finally:
        tmp.unlink(missing_ok=True)
    return digest


def _segment_file(folder: Path, digest: str) -> Path:
    return folder / f"{digest[:32]}.faiss"


def read(folder: Path, space: KeySpace[EachToken], codec: Codec) -> Snapshot:
    """What was written. ForeignMemoryError where it was made in another key space; StoreError where it is damaged or
    cannot be read."""
    path = folder / TRUTH_FILE
    try:
        arrays, header = _read(path)
        _made_with(header)
        theirs, said = header["space"], header["space_is"]
        sources = _sources(json.loads(header["sources"]), arrays["spans"])
        named = [(int(a), int(b), str(digest)) for a, b, digest in json.loads(header["segments"])]
    except _UNSOUND as e:
        raise StoreError(f"{path} is no sound memory: {e}") from e
    if theirs != space.id:
        raise ForeignMemoryError(f"{path} was made in another key space: {said}, but this is {space}")
    found = tuple(Segment.read(a, b, codec, _segment_file(folder, digest), digest) for a, b, digest in named)
    return Snapshot(space, found, arrays["codes"], arrays["tokens"], sources)


def _table(sources: Spans) -> NDArray[np.int64]:
    """(S, 3): of each span the number of its source, start and end. JSON of them all would hold every other thread."""
    rows = [(at, start, end) for at, spans in enumerate(sources.values()) for start, end in spans]
    return np.array(rows, np.int64).reshape(-1, 3)


def _sources(names: Sequence[str], table: NDArray[np.int64]) -> Spans:
    out: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    for at, start, end in table.tolist():
        out[names[at]].append((start, end))
    return out


def about(folder: Path) -> tuple[Mapping[str, str], frozenset[str]]:
    """What a written one was made with, and its sources; it is looked at no further. StoreError where it is damaged or
    absent."""
    path = folder / TRUTH_FILE
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
        return _made_with(header), frozenset(json.loads(header["sources"]))
    except _UNSOUND as e:
        raise StoreError(f"{path} is no sound memory: {e}") from e


def _made_with(header: Mapping[str, str]) -> Mapping[str, str]:
    if header["format"] != _FORMAT:
        raise ValueError(f"its format is {header['format']}, and this is {_FORMAT}")
    base, tokenizer, layers = json.loads(header["made_with"])
    return made_with(base, tokenizer, tuple(layers))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with safe_open(path, framework="numpy") as file:
        header = dict(file.metadata() or {})
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    digest = header.pop("sha256")
    if digest != _digest(arrays, header):
        raise ValueError("its bytes are not those that were written")
    return arrays, header


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
