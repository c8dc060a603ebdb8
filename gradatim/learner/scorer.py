"""How well an adapter gives the chosen answers of examples, teacher-forced: the evidence of the replay gate.

Prompts are cut as in training. It knows neither gates nor thresholds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch

from gradatim.config import LearnerConfig
from gradatim.errors import LearnerError
from gradatim.learner.batch import fit
from gradatim.learner.trainable import trainable
from gradatim.nn.base import Base
from gradatim.nn.pack import Answer
from gradatim.types import Adapter, CaseScore, Example

CACHE_SIZE = 20_000  # scores kept; the live adapter's are asked for again and again


class TorchScorer:
    """A ``protocols.Scorer`` on the learner's own model. Scores are cached by (adapter, example)."""

    def __init__(self, base: Base, config: LearnerConfig, data_dir: Path) -> None:
        self._trainable = trainable(base)
        self._config = config
        self._data_dir = data_dir
        self._cache: OrderedDict[tuple[str, str], CaseScore] = OrderedDict()
        torch.set_num_threads(config.threads)

    def score(self, adapter: Adapter, examples: Sequence[Example]) -> Sequence[CaseScore]:
        """One score per example, in order; the adapter's files are looked at also where there is no example.

        AdapterError; LearnerError for an example that cannot be scored.
        """
        answers = {e.id: self._answer(e) for e in examples}
        with self._trainable.lock:
            known = {e.id: s for e in examples if (s := self._cache.get((adapter.sha256, e.id))) is not None}
            missing = [i for i in answers if i not in known]
            if missing or not examples:  # nothing to score: still, whether its files are sound
                self._trainable.wear(adapter, self._data_dir)
                scored = self._trainable.score([answers[i] for i in missing])
                for i, result in zip(missing, scored, strict=True):
                    known[i] = CaseScore(logprob=float(result.logprobs.mean()), greedy=bool(result.greedy.all()))
            self._remember(adapter, known)
        return [known[e.id] for e in examples]

    def _answer(self, example: Example) -> Answer:
        fitted = fit(example, self._config.max_length, self._trainable.vocabulary)
        if isinstance(fitted, str) or fitted.chosen is None:
            why = fitted if isinstance(fitted, str) else "it has no chosen answer"
            raise LearnerError(f"example {example.id} cannot be scored: {why}")
        return fitted.chosen

    def _remember(self, adapter: Adapter, scores: dict[str, CaseScore]) -> None:
        for i, score in scores.items():
            self._cache[adapter.sha256, i] = score
            self._cache.move_to_end((adapter.sha256, i))
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
