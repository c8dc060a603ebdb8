"""How many packed tokens go through the model at once: memory then does not grow with the batch.

It knows no models and no examples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

log = logging.getLogger(__name__)

LEAST_TOKENS = 64  # of a pass: a batch that does not fit even so does not fit at all


class Budget:
    """Halved, for good, whenever memory runs out."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def fit(self, work: Callable[[int], T]) -> T:
        """What ``work`` gives for the budget; it is called again, from its start, with half of it where memory ran
        out. Any other error, and one with the least budget, is raised."""
        while True:
            try:
                return work(self.tokens)
            except RuntimeError as e:
                if not out_of_memory(e) or self.tokens // 2 < LEAST_TOKENS:
                    raise
                log.warning("out of memory with %d tokens in a pass: from here on half as many", self.tokens)
            # not before the handler is left: until then the error keeps what the pass had allocated
            self.tokens //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that memory ran out; on the CPU only the text tells."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
