"""Credit for long episodes: which of many steps earned the reward, by the first method that has an answer.

    what was said of a step  >  other answers to exactly this prompt  >  other answers to this observation
    >  a scorer of prefixes  >  the episode's outcome

The methods between the first and the last need logged traffic, and abstain without enough of it. Short episodes keep
the outcome rule: dividing by their few steps costs little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gradatim.config import CreditConfig, RewardConfig
from gradatim.credit import decompose
from gradatim.credit.anchors import contrast
from gradatim.credit.history import History, Lived, lived
from gradatim.credit.outcome import OutcomeCredit
from gradatim.protocols import CreditAssigner, Store
from gradatim.types import Case, Credit, Reward

_SAID = ("correction", "score")  # methods of credit that rest on what was said of the step itself
_REFIT = 1.1  # the scorer is fitted anew when there are this many times as many episodes


class HorizonCredit:
    """``protocols.CreditAssigner``. ``otherwise`` shares out what no method has an answer to."""

    def __init__(
        self, store: Store, config: CreditConfig, rewards: RewardConfig, *, otherwise: CreditAssigner | None = None
    ) -> None:
        self._config = config
        self._otherwise = otherwise or OutcomeCredit(rewards)
        self._history = History(store, least_steps=config.long_steps, most=config.window)
        self._scorer: decompose.PrefixScorer | None = None
        self._fitted_to = 0

    def assign(self, case: Case, reward: Reward) -> Credit:
        plain = self._otherwise.assign(case, reward)
        if not reward.value or len(case.episode.steps) < self._config.long_steps or not self._config.order:
            return plain
        this = lived(case.episode, reward.value)
        past = self._history.past(but=case.episode.id)
        for method in self._config.order:
            shares = self._ask(method, this, past)
            if shares is not None:
                return _beside_what_was_said(plain, shares, method)
        return plain

    def _ask(self, method: str, this: Lived, past: Sequence[Lived]) -> list[float] | None:
        if method == "fork":
            return contrast(this, this.states, [(e, e.states) for e in past])
        if method == "anchor":
            return contrast(this, this.observations, [(e, e.observations) for e in past])
        if len(past) >= max(decompose.FEWEST, self._fitted_to * _REFIT):
            self._scorer, self._fitted_to = decompose.fit(past), len(past)
        if self._scorer is None or self._scorer.fit < self._config.least_fit:
            return None
        return self._scorer.credit(this)


def _beside_what_was_said(plain: Credit, shares: Sequence[float], method: str) -> Credit:
    """What was said of a step outranks what is inferred of it."""
    said = [m in _SAID for m in plain.methods]
    both = zip(plain.advantages, plain.methods, shares, said, strict=True)
    chosen = [(a, m) if own else (share, method) for a, m, share, own in both]
    return replace(plain, advantages=tuple(a for a, _ in chosen), methods=tuple(m for _, m in chosen))
