"""The one model that learner and scorer share in a process: the frozen base, and whichever adapter is on it.

It knows no losses and no records but ``Adapter``; who comes second waits for the lock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from gradatim.errors import AdapterError, ModelError
from gradatim.learner.budget import Budget
from gradatim.learner.lineage import read_sound
from gradatim.nn.base import Base
from gradatim.nn.llama import LlamaPass, qualifies
from gradatim.nn.lora import Lora, LoraWeights
from gradatim.nn.pack import Answer, Scored, check_model, passes, score
from gradatim.types import Adapter

log = logging.getLogger(__name__)

PASS_TOKENS = (
    2048  # packed tokens of one pass with gradients; each keeps about 0.7 MB on a model of 135 M weights in fp32
)
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
        self.budget = Budget(PASS_TOKENS)  # of passes with gradients
        self._score_budget = Budget(SCORE_PASS_TOKENS)
        self._on: str | None = None  # digest of the adapter that is on the model
        check_model(base.model)
        self._layers = _own_layers(base.model, self.lora)

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

    def take_off(self) -> None:
        """The frozen base alone; hold the lock."""
        self._on = None
        self.lora.load(None)

    def forward(self, answers: Sequence[Answer]) -> list[Scored]:
        """One pass over all answers, with gradients where they are on; hold the lock."""
        return self._layers(answers) if self._layers else score(self.model, answers)

    def score(self, answers: Sequence[Answer]) -> list[Scored]:
        """Of any number of answers, without gradients."""
        return [group[0] for group in self.score_groups([[a] for a in answers])]

    def score_groups(self, groups: Sequence[Sequence[Answer]]) -> list[list[Scored]]:
        """The same of groups of answers, none empty, that share so much that each is better kept in one pass."""
        with torch.no_grad():
            return self._score_budget.fit(lambda tokens: self._score(groups, tokens))

    def _score(self, groups: Sequence[Sequence[Answer]], pass_tokens: int) -> list[list[Scored]]:
        out: dict[int, list[Scored]] = {}
        for members in passes(groups, pass_tokens):
            scored = self.forward([a for i in members for a in groups[i]])
            out |= {i: [scored.pop(0) for _ in groups[i]] for i in members}
        return [out[i] for i in range(len(groups))]


def _own_layers(model: Any, lora: Lora) -> LlamaPass | None:
    """The hand-written layers where they give this model's own numbers."""
    if not qualifies(model):
        return None
    layers = LlamaPass(model, lora)
    try:
        check_model(model, layers)
    except (ModelError, RuntimeError) as e:
        log.warning("training takes the model-agnostic path: %s", e)
        return None
    return layers


_shared: WeakKeyDictionary[Any, Trainable] = WeakKeyDictionary()
_shared_lock = threading.Lock()


def trainable(base: Base) -> Trainable:
    """The Trainable of this base's model, made at the first call."""
    with _shared_lock:
        if base.model not in _shared:
            _shared[base.model] = Trainable(base)
        return _shared[base.model]
