"""One request's view of a memory: where it is, what is remembered near there, and what that does to its tokens.

Evidence about an action is summed over the neighbours that it was judged at, each by its distance and by how sure its
judgement was: L(a) = log((1 - noise) / noise) * sum_i k_i value_i, with k_i = exp((cos_i - 1) / width); where the keys
put one thing in two wordings farther apart than at 1, that cosine stands in its place, and k_i is 1 at most. A sure
judgement at this very place so counts in full, a doubtful one less, and contradictions cancel: with clean rewards one
failure rules an action out, with noisy ones it takes a majority.

Knows nothing of how memories are written or kept.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gradatim.config import MemoryConfig
from gradatim.memory.contents import Whose
from gradatim.memory.key_space import KeySpace, Turn
from gradatim.memory.steering import Action, Steering
from gradatim.types import MemoryEntry

Floats = NDArray[np.float32]
_LEAST_KERNEL = 0.005  # what is farther away is not looked at
_LEAST_EVIDENCE = 0.02  # nats
_SHOWN = 16  # entries that are named for one answer
Near = Sequence[tuple[MemoryEntry, float]]  # with the cosine


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """What is remembered near a place."""

    near: Near
    version: int  # of the tenant's memory; another one means that something was taken out of it
    epoch: int
    known: Near = ()  # retired: the weights know it by themselves


@dataclass(slots=True)
class TokenUse:
    """What a token memory did to the answers of one request."""

    searched: int = 0  # tokens
    mixed: int = 0
    lambdas: float = 0.0  # sum over those


class Source(Protocol):
    """The memory, as seen from a request."""

    def near(self, whose: Whose, space: KeySpace[Turn], key: Floats, floor: float) -> Neighbourhood: ...

    def version(self, tenant: str) -> int: ...


def floor_of(config: MemoryConfig) -> float:
    """The cosine below which a neighbour counts for nothing."""
    return config.same + config.width * math.log(_LEAST_KERNEL)


def _kernel(cosine: float, config: MemoryConfig) -> float:
    """k of a neighbour: how far its judgement reaches."""
    return math.exp(min(cosine - config.same, 0.0) / config.width)


def actions_of(near: Near, config: MemoryConfig) -> list[Action]:
    """The evidence about each action that was judged near here."""
    sure = math.log((1.0 - config.label_noise) / config.label_noise)
    total: dict[tuple[int, ...], float] = defaultdict(float)
    logprobs: dict[tuple[int, ...], tuple[float, tuple[float, ...]]] = {}
    for entry, cosine in near:
        total[entry.tokens] += sure * _kernel(cosine, config) * entry.value
        if entry.logprobs and cosine > logprobs.get(entry.tokens, (-2.0, ()))[0]:
            logprobs[entry.tokens] = cosine, entry.logprobs  # as the nearest place had them
    return [
        Action(tokens, evidence, logprobs.get(tokens, (0.0, ()))[1])
        for tokens, evidence in total.items()
        if abs(evidence) >= _LEAST_EVIDENCE
    ]


def steering_of(found: Neighbourhood, config: MemoryConfig) -> Steering:
    """What is known near here by the weights themselves is evidence for the model: what is remembered beside it does
    not take its place, nor speak against it more than it did before."""
    known = [pair for pair in found.known if pair[0].value > 0.0]
    tokens = {entry.tokens for entry, _ in known}
    actions = actions_of([*found.near, *known], config)
    own = [action for action in actions if action.tokens in tokens and action.evidence > 0.0]
    mass = sum(math.expm1(min(action.evidence, 50.0)) for action in own)
    return Steering([a for a in actions if a not in own], odds=config.odds / (1.0 + config.odds * mass))


class Recall:
    """Implements ``protocols.Recollection``. Used by the engine's thread, and read by its owner afterwards."""

    def __init__(self, source: Source, config: MemoryConfig, whose: Whose, space: KeySpace[Turn]) -> None:
        self.whose, self.space = whose, space
        self.key: Floats | None = None
        self.tokens = TokenUse()
        self._source, self._config = source, config
        self._found = Neighbourhood((), 0, 0)
        self._steering = Steering((), odds=config.odds)
        self._leant = False

    @property
    def tenant(self) -> str:
        return self.whose.tenant

    def place(self, key: Floats) -> None:
        """Where its prompt lies as it was asked; what stands in it besides, when it is read, is not to move it."""
        self.key = self.space.key(key)
        self._look()

    def situate(self, key: Floats) -> None:
        if self.key is None:
            self.place(key)

    def lean(
        self, drawn: Sequence[int], path_logprob: float, logprobs: Callable[[Sequence[int]], Sequence[float]]
    ) -> Mapping[int, float]:
        if not self._config.decisions:
            return {}
        if self._found.version != self._source.version(self.tenant):
            self._look()  # something was forgotten while this answer was written
        bias = self._steering.lean(drawn, path_logprob, logprobs)
        self._leant = self._leant or bool(bias)
        return bias

    def _look(self) -> None:
        assert self.key is not None, "situate first"
        if not self._config.decisions:
            return
        self._found = self._source.near(self.whose, self.space, self.key, floor_of(self._config))
        self._steering = steering_of(self._found, self._config)

    def trace(self, tokens: Sequence[int]) -> dict[str, Any]:
        """What memory did to an answer of these tokens; empty where it had no part in it."""
        if not self.tokens.mixed:
            return self._judged(tuple(tokens)) if self._leant else {}
        use = self.tokens
        shown = {"searched": use.searched, "mixed": use.mixed, "lambda": use.lambdas / use.mixed}
        return {"tenant": self.tenant, "space": self.space.id} | self._judged(tuple(tokens)) | {"tokens": shown}

    def _judged(self, answer: tuple[int, ...]) -> dict[str, Any]:
        if not self._leant:
            return {}
        nearest = sorted(self._found.near, key=lambda pair: (-pair[1], pair[0].id))
        spoke_for = [(e.id, _kernel(near, self._config)) for e, near in nearest if e.value > 0.0 and e.tokens == answer]
        against = [e.id for e, _ in nearest if e.value < 0.0 and e.tokens != answer]
        return {
            "tenant": self.tenant,
            "space": self.space.id,
            "epoch": self._found.epoch,
            "weight": self._steering.weight,
            "near": len(self._found.near),
            "nearest": nearest[0][1] if nearest else None,
            "for": [entry_id for entry_id, _ in spoke_for[:_SHOWN]],
            "reach": [round(kernel, 4) for _, kernel in spoke_for[:_SHOWN]],  # of each: 1 at its very place
            "against": against[:_SHOWN],
        }
