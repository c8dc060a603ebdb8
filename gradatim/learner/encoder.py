"""An answer -> one vector: the states of the frozen base in the middle of its layers, over the tokens of the answer.

The base alone, without an adapter: a vector of last month can be compared with one of today, whatever went live since.
What is read is bounded: of a long prompt the end, of a long answer the end too. Knows nothing of rewards.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from gradatim.learner.trainable import trainable
from gradatim.nn.base import Base
from gradatim.nn.states import lower_states
from gradatim.types import Step

LONGEST = 384  # tokens of one pass, answer and what came before it
MOST_ANSWER = 256  # of them, tokens of the answer


class StateEncoder:
    """``protocols.Encoder`` on the learner's own model. ModelError where that is one which it cannot train."""

    def __init__(self, base: Base) -> None:
        self._trainable = trainable(base)
        self._layer = max(1, base.model.config.get_text_config().num_hidden_layers // 2)
        told = f"{base.sha256} mean of layer {self._layer}, {LONGEST}, {MOST_ANSWER}"
        self._space = hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def space(self) -> str:
        return self._space

    def encode(self, step: Step) -> NDArray[np.float32] | None:
        """(D,) fp32: the mean over the answer's tokens."""
        answer = step.completion_ids[-MOST_ANSWER:]
        ids = (*step.prompt_ids, *step.completion_ids)[-LONGEST:]
        if not answer or max(ids) >= self._trainable.vocabulary:
            return None
        with self._trainable.lock:
            self._trainable.take_off()
            seen = lower_states(self._trainable.model, ids, self._layer)  # (T, D)
        pooled: NDArray[np.float32] = seen[-len(answer) :].float().mean(0).cpu().numpy()
        return pooled
