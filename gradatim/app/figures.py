"""The figures of the reward: said by the process that judges (``Sayer``), shown by whoever is asked (``said``).

Who judges has read all feedback anyway; nobody else has to, so a status costs a file of a few kilobytes. Where nothing
was ever judged there are none.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gradatim.app.home import Home
from gradatim.reward import FAULT, AuditedReward
from gradatim.store import SqlStore
from gradatim.types import Reward

WINDOW = 200  # rewards, the newest, of which it is said how many abstained
Json = dict[str, Any]


class Sayer:
    """Call it after anything was judged. Reads the rewards that are new."""

    def __init__(self, store: SqlStore, home: Home, model: AuditedReward) -> None:
        self._store, self._home, self._model = store, home, model
        newest = store.newest(Reward, limit=WINDOW)
        self._seen = newest[0][0] if newest else 0
        self._rewards = deque((reward for _, reward in reversed(newest)), maxlen=WINDOW)

    def __call__(self) -> None:
        while page := self._store.read(Reward, after=self._seen):
            self._rewards.extend(reward for _, reward in page)
            self._seen = page[-1][0]
        self._home.say("reward", {**self._model.describe(), **self._rates()})

    def _rates(self) -> Json:
        n = len(self._rewards)
        abstained = sum(r.value is None for r in self._rewards)
        faults = sum(r.reason.startswith(FAULT) for r in self._rewards)
        why = Counter(r.reason.removeprefix(f"{FAULT}: ") for r in self._rewards if r.reason.startswith(FAULT))
        return {
            "faults": {reason: count / n for reason, count in sorted(why.items())},
            "window_rewards": n,
            "abstain_rate": abstained / n if n else None,
            "fault_rate": faults / n if n else None,
        }


def said(home: Home, end: int) -> Json | None:
    """What was last said of the reward; None where nothing was, or of other records: ``end`` is the newest position."""
    facts = home.said("reward")
    if "rule" not in facts or facts["position"] > end:
        return None
    return {key: value for key, value in facts.items() if key not in ("pid", "at")}


_GAUGES = {
    "gradatim_reward_audited_labels": "audited labels that the reward is learned from",
    "gradatim_reward_labels_wanted": "audited labels that calibration takes",
    "gradatim_reward_risk": "stated share of rewards that may have the wrong sign",
    "gradatim_reward_risk_alarms": "how often that risk was found not to be kept",
    "gradatim_reward_acts_from": "how sure the calibrated model must be to give a reward",
    "gradatim_reward_coverage": "share of the episodes without a label that would get a reward",
    "gradatim_reward_ece": "expected calibration error on held-out labels",
    "gradatim_reward_selective_risk": "share of wrong rewards on held-out labels",
    "gradatim_reward_window_labels": "audited labels in the newest window",
    "gradatim_reward_window_coverage": "share of its episodes that had a reward before their label came",
    "gradatim_reward_window_ece": "expected calibration error of those",
    "gradatim_reward_window_selective_risk": "share of wrong ones among those",
    "gradatim_reward_abstain_rate": "share of abstentions among the newest rewards",
    "gradatim_reward_fault_rate": "share of those that nobody could judge because of how the agent answered",
}


class _RewardFigures(Collector):
    def __init__(self, home: Home) -> None:
        self._home = home

    def collect(self) -> Iterator[Metric]:
        facts = self._home.said("reward")
        if "rule" not in facts:
            return
        calibrated = float(facts["rule"] == "calibrated")
        yield GaugeMetricFamily("gradatim_reward_calibrated", "1 where the calibrated model judges", value=calibrated)
        for name, about in _GAUGES.items():
            value = facts.get(name.removeprefix("gradatim_reward_"))
            if value is not None:
                yield GaugeMetricFamily(name, about, value=float(value))
        yield from _families(facts.get("families", {}))
        faults = GaugeMetricFamily("gradatim_reward_faults", "those by what the agent did", labels=["behaviour"])
        for behaviour, share in facts.get("faults", {}).items():
            faults.add_metric([behaviour], share)
        yield faults

    def describe(self) -> Iterator[Metric]:
        return iter(())


def _families(families: Mapping[str, Mapping[str, float]]) -> Iterator[Metric]:
    """By family: a source's name is a client's text, and stays out of labels."""
    right = GaugeMetricFamily(
        "gradatim_reward_source_reliability", "share of a family's opinions that is right", labels=["family"]
    )
    opinions = GaugeMetricFamily(
        "gradatim_reward_source_opinions", "that reliabilities were learned from", labels=["family"]
    )
    for family, figures in families.items():
        right.add_metric([family], figures["right"])
        opinions.add_metric([family], figures["opinions"])
    yield right
    yield opinions


def show_reward(home: Home, registry: CollectorRegistry) -> None:
    """As metrics, read anew at every scrape."""
    registry.register(_RewardFigures(home))
