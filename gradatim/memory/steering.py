"""From what is remembered about some actions to a bias on the next token, so that whole actions get their due.

With p the model's probability of a token sequence, G(y) <= 1 how far a bad action y is to lose, m a distribution over
good actions and lambda how much of the answer memory gives, the answer is drawn from

    q(y)  ~  (1 - lambda) p(y) G(y)  +  lambda m(y)                                        (a mixture, as in 1911.00172)

token by token: after a prefix u, the token v has the weight (1 - lambda) p(uv) F(uv) + lambda m(uv), where m(uv) sums m
over the good actions that begin with uv, and F(uv) is what the bad ones leave of the model's continuations of uv:
F(uv) = 1 - sum_a P(a | uv) (1 - G(a)), with P(a | uv) from the log-probabilities captured when a was sampled. A bad
action is so avoided where it parts from others, and not at its last token alone. No sequence but a remembered one is
touched, whatever the format of the answers is.

Knows nothing of keys, stores and models.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_LEAST = 1e-9  # share of a token's weight that is always left to it
Prefix = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Action:
    """What the neighbourhood says of one answer."""

    tokens: Prefix  # (T,)
    evidence: float  # nats: above 0 it is wanted, below it is not
    logprobs: tuple[float, ...] = ()  # (T,) the model's own, when it sampled it; () where nobody did


class Steering:
    """The bias of one situation. ``odds``: how likely, before any evidence, a remembered action is the one wanted."""

    def __init__(self, actions: Sequence[Action], *, odds: float) -> None:
        good = [(a, math.expm1(min(a.evidence, 50.0))) for a in actions if a.evidence > 0.0 and a.tokens]
        total = sum(mass for _, mass in good)
        self.weight = odds * total / (1.0 + odds * total)  # lambda
        self._log_odds = math.log(odds * total) if total else -math.inf  # log lambda / (1 - lambda)
        self._good: dict[Prefix, dict[int, float]] = defaultdict(dict)  # prefix -> next token -> m
        self._bad: dict[Prefix, dict[int, float]] = defaultdict(dict)  # prefix -> next token -> 1 - F
        for action, mass in good:
            _add(self._good, action.tokens, [mass / total] * len(action.tokens))
        most: dict[Prefix, float] = defaultdict(float)
        for action in actions:
            if action.evidence < 0.0 and action.tokens:
                lost = -math.expm1(action.evidence)
                _add(self._bad, action.tokens, [lost * share for share in _ahead(action)])
                for i in range(len(action.tokens)):
                    most[action.tokens[: i + 1]] = max(most[action.tokens[: i + 1]], lost)
        for prefix, tokens in self._bad.items():  # shares were seen in different places and may add up to more than 1
            for token, lost in tokens.items():
                tokens[token] = min(lost, most[*prefix, token], 1.0 - _LEAST)

    def lean(
        self, drawn: Sequence[int], path_logprob: float, logprobs: Callable[[Sequence[int]], Sequence[float]]
    ) -> Mapping[int, float]:
        """See ``protocols.Recollection.lean``: log q(v | u) - log p(v | u), up to the same constant for all tokens."""
        prefix = tuple(drawn)
        good, bad = self._good.get(prefix, {}), self._bad.get(prefix, {})
        ids = list(dict.fromkeys((*good, *bad)))
        if not ids:
            return {}
        out: dict[int, float] = {}
        for token, logprob in zip(ids, logprobs(ids), strict=True):
            left = math.log1p(-bad.get(token, 0.0))
            if token in good:
                given = self._log_odds + math.log(good[token]) - path_logprob - logprob
                left = max(left, given) + math.log1p(math.exp(-abs(left - given)))
            out[token] = left
        return out


def _add(tree: dict[Prefix, dict[int, float]], tokens: Prefix, values: Sequence[float]) -> None:
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        node = tree[tokens[:i]]
        node[token] = node.get(token, 0.0) + value


def _ahead(action: Action) -> list[float]:
    """P(a | its first i + 1 tokens), for each i: the model's own probability of the rest. (T,)"""
    if len(action.logprobs) != len(action.tokens):
        return [1.0] * len(action.tokens)
    out, ahead = [1.0], 0.0
    for logprob in action.logprobs[:0:-1]:
        ahead += logprob
        out.append(math.exp(min(ahead, 0.0)))
    return out[::-1]
