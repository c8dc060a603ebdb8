"""The scripted operator: looks at each action before it is carried out, and says what it should have been.

Any right action counts as right, not only the one the expert would have taken first. Inverted, it is the harmful
operator: it leaves wrong actions alone and replaces right ones by wrong ones that are possible on the page. It does
not know how feedback travels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Protocol

from gradatim.demo.tasks import Env, normalise


class Operator(Protocol):
    """Reviews one answer; None lets it pass, a text replaces it."""

    def review(self, env: Env, answer: str) -> str | None: ...


@dataclass(slots=True)
class ScriptedOperator:
    """Corrects what is wrong, or, ``inverted``, what is right."""

    inverted: bool = False
    seed: int = 0
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def review(self, env: Env, answer: str) -> str | None:
        right = env.right_actions()
        is_right = normalise(answer) in right
        if not self.inverted:
            return None if is_right else right[0]
        if not is_right:
            return None
        wrong = [action for action in env.valid_actions() if action not in right]
        return self._rng.choice(wrong) if wrong else None
