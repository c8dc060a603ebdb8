"""Credit for long episodes: which of many steps earned the reward, by the first methods that have an answer.

    what was said of a step  >  other answers to exactly this prompt  >  other answers to this observation
    >  a scorer of prefixes  >  the episode's outcome

and, where ``credit.order`` names them, turn-level GAE and the implicit reward of preference training. The methods
between the first and the last need logged traffic, and abstain without enough of it; one that is half sure leaves the
other half to the next. Short episodes keep the outcome rule: dividing by their few steps costs little.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradatim.config import CreditConfig, RewardConfig
from gradatim.credit.answer import Answer, Blend
from gradatim.credit.history import History, Lived, lived
from gradatim.credit.implicit import ImplicitCredit
from gradatim.credit.methods import Methods
from gradatim.credit.outcome import OutcomeCredit
from gradatim.protocols import CreditAssigner, LogRatios, Store
from gradatim.types import Case, Credit, Episode, Reward


class HorizonCredit:
    """``protocols.CreditAssigner``. ``otherwise`` shares out what no method has an answer to; ``ratios`` is what the
    implicit reward is made of, which abstains without it."""

    def __init__(
        self,
        store: Store,
        config: CreditConfig,
        rewards: RewardConfig,
        *,
        otherwise: CreditAssigner | None = None,
        ratios: LogRatios | None = None,
    ) -> None:
        self._config = config
        self._otherwise = otherwise or OutcomeCredit(rewards)
        self._history = History(store, least_steps=config.long_steps, most=config.window)
        self._methods = Methods(config)
        self._implicit = ImplicitCredit(ratios, self._history, config.least_fit) if ratios else None

    def assign(self, case: Case, reward: Reward) -> Credit:
        plain = self._otherwise.assign(case, reward)
        if not reward.value or len(case.episode.steps) < self._config.long_steps or not self._config.order:
            return plain
        this = lived(case.episode, reward.value)
        past = self._history.past(but=case.episode.id)
        blend = Blend(plain)
        for method in self._config.order:
            answer = self._ask(method, case.episode, this, past)
            if answer is not None:
                blend.add(answer)
            if blend.is_done:
                break
        return blend.result()

    def _ask(self, method: str, episode: Episode, this: Lived, past: Sequence[Lived]) -> Answer | None:
        if method == "implicit":
            return self._implicit.answer(episode, this.value) if self._implicit else None
        return self._methods.answer(method, this, past, self._history.seen)
