"""What a method of credit has to say of an episode, and how answers of several methods become one credit.

A method says of every step what it earned, and how surely it knows; what it is not sure of is left to the next one, so
that evidence that grows takes over from the rule behind it little by little. Knows no method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gradatim.types import Credit

_LEAST = 0.05  # less than this of the credit is not handed on, and a method less sure than this says nothing
_SAID = ("correction", "score")  # methods of credit that rest on what was said of the step itself


@dataclass(frozen=True, slots=True)
class Answer:
    """Of S steps. ``sure`` is the chance that the method knows what decided the episode; shares are weighed by it."""

    method: str
    shares: Sequence[float]  # (S,) in [-1, 1]
    why: Sequence[str]  # (S,)
    sure: float = 1.0


class Blend:
    """The credit of an episode, method after method; ``plain`` is what it is without any."""

    def __init__(self, plain: Credit) -> None:
        self._plain = plain
        self._parts: list[tuple[float, Answer]] = []
        self.left = 1.0  # share of the credit that nobody was sure of yet

    @property
    def is_done(self) -> bool:
        return self.left == 0.0

    def add(self, answer: Answer) -> None:
        if answer.sure < _LEAST:
            return
        part = self.left * answer.sure
        self.left -= part
        if self.left < _LEAST:
            part, self.left = part + self.left, 0.0
        self._parts.append((part, answer))

    def result(self) -> Credit:
        """What was said of a step outranks what is inferred of it; what is left is the plain credit's."""
        if not self._parts:
            return self._plain
        steps = [self._step(k) for k in range(len(self._plain.step_ids))]
        shares, methods, reasons = zip(*steps, strict=True)
        return replace(self._plain, advantages=shares, methods=methods, reasons=reasons)

    def _step(self, k: int) -> tuple[float, str, str]:
        """Its credit, and the method that gave most of it, or else had the largest part."""
        method, why = self._plain.methods[k], self._plain.reasons[k] if self._plain.reasons else ""
        if method in _SAID:
            return self._plain.advantages[k], method, why
        given = [(part, part * a.shares[k], a.method, a.why[k]) for part, a in self._parts]
        given.append((self.left, self.left * self._plain.advantages[k], method, why))
        part, _, method, why = max(given, key=lambda g: (abs(g[1]), g[0]))
        total = sum(share for _, share, _, _ in given)
        return max(-1.0, min(1.0, total)), method, why if part > 1.0 - _LEAST else f"{why} (weight {part:.2f})"
