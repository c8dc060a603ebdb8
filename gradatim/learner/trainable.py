"""The one model that learner and scorer share in a process: the frozen base, and whichever adapter is on it.

It knows no losses and no records but ``Adapter``; who comes second waits for the lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from gradatim.errors import AdapterError, DamagedAdapterError
from gradatim.nn.base import Base
from gradatim.nn.lora import Lora, LoraWeights, read_adapter
from gradatim.nn.pack import Answer, Scored, check_model, passes, score
from gradatim.types import Adapter

PASS_TOKENS = 2048  # packed tokens of one pass with gradients; about 2 MB each on a model of 135 M weights
SCORE_PASS_TOKENS = 4096  # without gradients


class Trainable:
    """Get it by ``trainable(base)``: two on one model would add their branches twice. ModelError where the model
    computes in a way that packing does not know."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.model: Any = base.model
        self.vocabulary: int = base.model.get_input_embeddings().weight.shape[0]
        self.lora = Lora(base.model)
        self.lock = threading.RLock()
        self._on: str | None = None  # digest of the adapter that is on the model
        check_model(base.model)

    @contextmanager
    def training(self, weights: LoraWeights) -> Iterator[Lora]:
        """These weights on the model, trainable; off again at the end, whatever happened."""
        with self.lock:
            self._on = None
            self.lora.load(weights, trainable=True)
            try:
                yield self.lora
            finally:
                self.lora.load(None)

    def wear(self, adapter: Adapter, data_dir: Path) -> None:
        """Put an adapter on for scoring; hold the lock. AdapterError."""
        if adapter.base_sha256 != self.base.sha256:
            raise AdapterError(f"{adapter.id} was trained on another base model ({adapter.base_sha256[:12]})")
        if self._on == adapter.sha256:
            return
        self._on = None
        self.lora.load(None if adapter.step == 0 else read_sound(adapter, data_dir))
        self._on = adapter.sha256

    def score(self, answers: Sequence[Answer]) -> list[Scored]:
        """Of any number of answers, without gradients."""
        out: list[Scored | None] = [None] * len(answers)
        with torch.no_grad():
            for members in passes([[a] for a in answers], SCORE_PASS_TOKENS):
                scored = score(self.model, [answers[i] for i in members])
                for i, s in zip(members, scored, strict=True):
                    out[i] = s
        return [s for s in out if s is not None]


def read_sound(adapter: Adapter, data_dir: Path) -> LoraWeights:
    """Its weights. DamagedAdapterError where its files are missing or not what they were; AdapterError where the disk
    does not give them now, as when the data directory is not mounted."""
    folder = data_dir / adapter.path
    try:
        return read_adapter(folder, adapter.sha256)
    except AdapterError as e:
        cause = e.__cause__
        away = isinstance(cause, OSError) and not (isinstance(cause, FileNotFoundError) and folder.parent.is_dir())
        if away:
            raise
        raise DamagedAdapterError(adapter.id, f"{adapter.id} is damaged: {e}") from e


_shared: WeakKeyDictionary[Any, Trainable] = WeakKeyDictionary()
_shared_lock = threading.Lock()


def trainable(base: Base) -> Trainable:
    """The Trainable of this base's model, made at the first call."""
    with _shared_lock:
        if base.model not in _shared:
            _shared[base.model] = Trainable(base)
        return _shared[base.model]
