"""The episodes of a trial, in the order in which they were served, and what became of them.

A unit is an episode for which the router tossed a coin between the two adapters of the trial. Its arm and propensity
are those of the toss, whatever answered later (intention to treat). What can be seen of the answer itself is known at
once; rewards are read when the feedback window has closed, so that an arm whose feedback is slow does not bias the
order. All of it is a function of the store's records and of the clock. Knows no statistics.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gradatim.config import Config
from gradatim.opinions import weigh
from gradatim.protocols import Store
from gradatim.types import AdapterId, EpisodeId, Feedback, Step

GRACE_S = 5.0  # after the window: what was accepted in it is durable by then
CLASSES = ("programs", "people")  # of sources
_PAGE = 200
_MOST_KNOWN = 100_000  # episodes that are remembered, so that one is not counted twice
_RUN = 16  # equal tokens in a row
_UNLIKELY = -5.0  # nats a token: text no sound adapter draws


@dataclass(frozen=True, slots=True)
class Served:
    """One episode of a trial. ``propensity``: of the treated arm among the two; NaN where no coin was tossed."""

    episode_id: EpisodeId
    treated: bool
    propensity: float
    served_at: float
    answered_at: float
    user: str
    harms: Sequence[float]  # see ``harms``, in [0, 1]


@dataclass(frozen=True, slots=True)
class Scored:
    """The same after its feedback window. A reward is in [0, 1], NaN where there is none."""

    served: Served
    rewards: Sequence[float]  # one of each of CLASSES
    rated: bool  # somebody said something
    abstained: bool  # somebody did, and it is no reward


HARMS = ("broken", "cut short", "aborted", "length", "latency")


@dataclass(frozen=True, slots=True)
class Usual:
    """What answers were like before the trial."""

    tokens: float = 64.0
    latency_s: float = 1.0

    @staticmethod
    def of(steps: Sequence[Step]) -> Usual:
        if not steps:
            return Usual()
        tokens = sum(len(s.completion_ids) for s in steps) / len(steps)
        return Usual(max(1.0, tokens), max(1e-3, sum(s.latency_s for s in steps) / len(steps)))


def harms(step: Step, usual: Usual) -> Sequence[float]:
    """One number in [0, 1] for each of ``HARMS``; twice the usual length or time is 2/3."""
    n = float(len(step.completion_ids))
    return (
        float(is_broken(step)),
        float(step.finish_reason == "length"),
        float(step.finish_reason == "aborted"),
        n / (n + usual.tokens),
        step.latency_s / (step.latency_s + usual.latency_s),
    )


def is_broken(step: Step) -> bool:
    """Empty, undecodable, going round in circles, or drawn from a distribution that has come apart."""
    if step.finish_reason == "aborted":
        return False
    ids = step.completion_ids
    if not step.text.strip() or step.text.count("\ufffd") > len(step.text) / 10:
        return True
    if step.logprobs and not sum(step.logprobs) / len(step.logprobs) >= _UNLIKELY:  # NaN is broken too
        return True
    return _longest_run(ids) >= _RUN or (len(ids) >= 4 * _RUN and len(set(ids)) < len(ids) / 10)


def _longest_run(ids: Sequence[int]) -> int:
    longest = run = 0
    last: int | None = None
    for token in ids:
        run = run + 1 if token == last else 1
        last, longest = token, max(longest, run)
    return longest


class Units:
    """Follows the log from a position on, for a trial of ``treated`` against ``control``."""

    def __init__(
        self,
        store: Store,
        config: Config,
        treated: AdapterId,
        control: AdapterId,
        after: int,
        usual: Usual,
        *,
        tossed_only: bool = True,
    ) -> None:
        self._store, self._config, self._usual = store, config, usual
        self._treated, self._control, self._tossed_only = treated, control, tossed_only
        self._seen = after  # store position
        self._known: OrderedDict[EpisodeId, None] = OrderedDict()
        self._waiting: deque[Served] = deque()
        self._counted: Counter[str] = Counter()  # rated episodes by user

    def served(self) -> list[Served]:
        """What was served since the last call."""
        out: list[Served] = []
        while page := self._store.read(Step, after=self._seen, limit=_PAGE):
            self._seen = page[-1][0]
            out += filter(None, (self._unit(step) for _, step in page))
        self._waiting.extend(out)
        return out

    def _unit(self, step: Step) -> Served | None:
        if step.stage == "pinned" or step.adapter_id not in (self._treated, self._control):
            return None
        both = step.coin.get(self._treated, 0.0), step.coin.get(self._control, 0.0)
        tossed = min(both) > 0.0
        if step.episode_id in self._known or not (tossed or not self._tossed_only):
            return None
        self._known[step.episode_id] = None
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
        return Served(
            episode_id=step.episode_id,
            treated=step.adapter_id == self._treated,
            propensity=both[0] / sum(both) if tossed else math.nan,
            served_at=step.created_at,
            answered_at=step.created_at + step.latency_s,
            user=step.user,
            harms=harms(step, self._usual),
        )

    def scored(self, now: float) -> list[Scored]:
        """Those whose window has closed since the last call; none is passed over for a later one."""
        out = []
        wait_s = self._config.release.window_s
        while self._waiting and self._waiting[0].answered_at + wait_s + GRACE_S <= now:
            served = self._waiting.popleft()
            out.append(self._score(served, served.answered_at + wait_s))
        return out

    def _score(self, served: Served, until: float) -> Scored:
        newest: dict[str, Feedback] = {}
        for _, feedback in self._store.read(Feedback, episode_id=served.episode_id):
            if feedback.created_at <= until:
                newest[feedback.id] = feedback
        valid = [f for f in newest.values() if not f.retracted]
        rewards = rewards_of(valid, self._config)
        abstained = bool(valid) and all(map(math.isnan, rewards))
        if not abstained and valid and not self._counts(served.user):
            rewards = (math.nan,) * len(CLASSES)
        return Scored(served, rewards, bool(valid), abstained)

    def _counts(self, user: str) -> bool:
        cap = self._config.release.user_cap
        if not user or not cap:
            return True
        self._counted[user] += 1
        return self._counted[user] <= cap


def class_of(source: str, trusted: Iterable[str]) -> str:
    return CLASSES[0] if source.partition(":")[0] in trusted else CLASSES[1]


def rewards_of(feedback: Sequence[Feedback], config: Config) -> Sequence[float]:
    """The mean opinion of each class of sources, from [-1, 1] to [0, 1]: on the episode, or where there is none, on its
    steps. Corrections, preferences and comments are no rewards: they come of bad answers alone."""
    by_class: Mapping[str, list[Feedback]] = {name: [] for name in CLASSES}
    for f in feedback:
        if f.kind in ("outcome", "score"):
            by_class[class_of(f.source, config.release.trusted)].append(f)
    return tuple(_reward(by_class[name], config) for name in CLASSES)


def _reward(opinions: Sequence[Feedback], config: Config) -> float:
    whole = [f for f in opinions if f.kind == "outcome" or f.step_id is None]
    mean, total = weigh(whole, config.reward)
    if mean is None:
        mean, total = weigh(opinions, config.reward)
    if mean is None or total <= 0.0:
        return math.nan
    return min(1.0, max(0.0, (mean + 1.0) / 2.0))
