"""Two adapters on the same prompts: what is compared of their answers, and when that is enough to decide.

A critic's reward, where there is one, and what can be seen of the answers themselves. Each measure is a paired
difference in [-1, 1], above 0 where the candidate does better, and has two e-processes (``stats.paired``): one that it
loses no more than its margin, one that it loses. It moves on where *all* measures show the first, each at level
``alpha`` (an intersection-union test needs no more), and is out as soon as one shows the second, the reward in every
skill for itself. A pure function of the pairs in their order; knows no store and no model.

Where a critic does not judge the candidate's answer, that pair can only speak against it: for its reward it counts as
the worst answer, and nothing of it counts for it. Where it does not judge the live adapter's, it says nothing of the
reward. So abstentions never move a candidate on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gradatim.config import ShadowConfig
from gradatim.phrases import REFUSALS
from gradatim.release.units import is_broken
from gradatim.stats.paired import Paired
from gradatim.types import ShadowPair, Step

# a loss of the mean that is let pass; of the reward it is configured
GUARDS: Mapping[str, float] = {"broken": 0.03, "cut short": 0.05, "refused": 0.05, "tool calls": 0.03, "length": 0.15}
REWARD = "reward"
_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


def guards(step: Step, usual_tokens: float, unsound: bool) -> tuple[float, ...]:
    """How bad an answer looks, without a judge: one number in [0, 1] for each of ``GUARDS``."""
    n = float(len(step.completion_ids))
    return (
        float(is_broken(step)),
        float(step.finish_reason == "length"),
        float(step.text.lstrip().startswith(REFUSALS)),
        float(unsound),
        n / (n + usual_tokens),
    )


def is_malformed_call(step: Step) -> bool:
    """A tool call in the text that is no JSON object with a name and, if any, an object of arguments."""
    return not all(map(_is_call, _TOOL_CALL.findall(step.text)))


def _is_call(raw: str) -> bool:
    try:
        call = json.loads(raw)
    except ValueError:
        return False
    named = isinstance(call, dict) and isinstance(call.get("name"), str)
    return named and isinstance(call.get("arguments", {}), dict)


@dataclass(slots=True)
class _Measure:
    """One thing that is compared: a mean difference of which ``margin`` may be lost."""

    margin: float
    kept: Paired
    worse: Paired
    by_skill: Mapping[str, Paired] = field(default_factory=dict)  # the same of one skill's pairs
    n: int = 0
    total: float = 0.0

    @staticmethod
    def of(margin: float, worse: float, skills: Iterable[str] = ()) -> _Measure:
        """``worse``: the loss beyond which it is out."""
        return _Measure(margin, Paired(-margin, 1), Paired(-worse, -1), {s: Paired(-worse, -1) for s in skills})

    def count(self, difference: float, *, in_favour: bool) -> None:
        """``in_favour``: whether it may count for the candidate."""
        self.n, self.total = self.n + 1, self.total + difference
        if in_favour:
            self.kept.update([difference])
        else:
            self.kept.update([min(difference, -self.margin)], learn=False)

    def loss(self, difference: float, skill: str) -> float:
        """The largest log e-value that speaks of a loss."""
        processes = (self.worse, self.by_skill.get(skill))
        return max(p.update([difference])[-1] for p in processes if p is not None)


class Comparison:
    """``skills``: of the prompts, known before the first answer. ``judged``: whether there is a critic."""

    def __init__(self, config: ShadowConfig, skills: Iterable[str], *, judged: bool) -> None:
        self._config, self._judged = config, judged
        self.harm = ""  # why it is out; never unsaid
        self.proven = False  # nothing is lost beyond the margins
        self.pairs = 0
        self.judged = 0  # pairs that may count for the candidate
        self._measures = {name: _Measure.of(m, m) for name, m in GUARDS.items()}
        if judged:
            names = sorted(set(skills))
            self._measures[REWARD] = _Measure.of(config.margin, 0.0, names if len(names) > 1 else ())
        tests = sum(1 + len(m.by_skill) for m in self._measures.values())
        self._level = math.log(tests / config.alpha_worse)

    def take(self, pair: ShadowPair) -> None:
        """The next pair. After a decision nothing changes it."""
        if self.harm or self.proven:
            return
        in_favour = not self._judged or not (pair.reward is None or pair.live_reward is None)
        self.pairs, self.judged = self.pairs + 1, self.judged + in_favour
        for name, ours, lives in zip(GUARDS, pair.guards, pair.live_guards, strict=True):
            self._see(name, lives - ours, pair.skill, in_favour=in_favour)
        if self._judged and pair.live_reward is not None:
            self._see(REWARD, (pair.reward or 0.0) - pair.live_reward, pair.skill, in_favour=in_favour)
        self.proven = not self.harm and self.judged >= self._config.least and self._is_kept()

    def _see(self, name: str, difference: float, skill: str, *, in_favour: bool) -> None:
        if not -1.0 <= difference <= 1.0:  # NaN too
            self.harm = self.harm or f"{name}: its answers cannot be compared"
            return
        measure = self._measures[name]
        measure.count(difference, in_favour=in_favour)
        if measure.loss(difference, skill) >= self._level:
            mean = measure.total / measure.n
            self.harm = self.harm or f"{name}: worse than the live adapter on the same prompts ({mean:+.3f})"

    def _is_kept(self) -> bool:
        enough = -math.log(self._config.alpha)
        return all(measure.kept.log_e >= enough for measure in self._measures.values())

    def evidence(self) -> dict[str, float]:
        """For the verdict: counts, and of each measure its mean difference and the log e-values that it is kept (3.7 is
        1 / 0.025) and that it is lost."""
        out = {"pairs": float(self.pairs), "judged": float(self.judged)}
        for name, m in self._measures.items():
            out |= {f"{name}.gain": m.total / max(1, m.n), f"{name}.kept": m.kept.log_e}
            out[f"{name}.worse"] = max(p.log_e for p in (m.worse, *m.by_skill.values()))
        return {k: round(v, 4) for k, v in out.items()}
