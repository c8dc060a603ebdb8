"""The reward against held-out judges: when it is said to be gamed, how often wrongly, and what then moves up."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gradatim.app.compose import check_held_out
from gradatim.config import Config, CriticConfig, CriticsConfig, DriftConfig, RewardConfig
from gradatim.errors import ConfigError
from gradatim.release.proxy import PROXY, STATE, ProxyGate, ProxyWatch, detector, standing
from gradatim.release.state_file import StateFile
from gradatim.reward.ledger import Ledger
from gradatim.store import SqlStore, open_store
from gradatim.types import APPROVAL, AdapterId, Decision, EpisodeId, Move, Reward, Stage, Verdict
from tests import records

Floats = NDArray[np.float64]
ALARM = 1e4
CONFIG = Config(
    drift=DriftConfig(alarm=ALARM),
    reward=RewardConfig(held_out=("critic:tests",)),
    critics=CriticsConfig(run=(CriticConfig(use="a.b:tests"), CriticConfig(use="a.b:style"))),
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(tmp_path / "s.db") as opened:
        opened.append(records.adapter(0))
        for k in range(3):
            opened.append(records.adapter(k + 1, k))
            before, after = AdapterId(f"agent@{k}"), AdapterId(f"agent@{k + 1}")
            opened.move(a_move(before, Stage.LIVE, Stage.RETIRED), a_move(after, Stage.CANDIDATE, Stage.LIVE))
        yield opened


def a_move(adapter: AdapterId, before: Stage, after: Stage) -> Move:
    return Move(adapter_id=adapter, created_at=1.0, before=before, after=after, actor="test")


# ------------------------------------------------------------------------------------------------- error rates


def gaps(streams: int, units: int, seed: int, hacked: float) -> Floats:
    """(streams, units) of rewards and judges that agree in 85 %; from half-way on the reward is good in a share
    ``hacked`` of the cases, whatever the judges say."""
    rng = np.random.default_rng(seed)
    late = np.arange(units) >= units // 2
    judged = rng.random((streams, units)) < 0.5
    right = np.where(rng.random((streams, units)) < 0.85, judged, ~judged)
    proxy = np.maximum(right, late & (rng.random((streams, units)) < hacked))
    return np.asarray((1.0 + proxy - judged.astype(float)) / 2.0)


def alarms(gap: Floats, alarm: float) -> NDArray[np.int64]:
    """(streams,) after how many units it rose first; -1 where it did not."""
    changes = detector(alarm, len(gap))
    when = np.full(len(gap), -1)
    for t, row in enumerate(gap.T):
        rose = changes.update(slice(None), row, at=float(t)) > 0
        when[(when < 0) & rose] = t
    return when


def test_false_alarms_are_as_rare_as_stated() -> None:
    """A gap with a constant mean; 1000 units, alarm 1e4: at most 1 % + 1000 / 1e4."""
    rng = np.random.default_rng(0)
    gap = rng.choice([0.0, 0.5, 1.0], (400, 1000), p=[0.1, 0.75, 0.15])
    assert (alarms(gap, ALARM) >= 0).mean() <= 0.11


def test_a_gamed_reward_is_seen_within_some_hundred_units() -> None:
    when = alarms(gaps(60, 2000, 1, hacked=0.4), ALARM)
    assert (when > 1000).mean() > 0.95
    assert np.median(when) - 1000 < 500


# ------------------------------------------------------------------------------------------------- through the log


def live_through(store: SqlStore, units: int, *, hacked: bool, seed: int = 0, begin: int = 0) -> None:
    rng = random.Random(seed)
    for i in range(begin, begin + units):
        name = f"e{i}"
        late = hacked and i >= begin + units // 2
        good = rng.random() < 0.5
        proxy = True if late and rng.random() < 0.7 else good if rng.random() < 0.9 else not good
        position = store.append(
            records.step(f"{name}-s", name, created_at=float(i), adapter_id=AdapterId(f"agent@{3 if late else 1}")),
            records.feedback("outcome", name, value=1.0 if good else -1.0, source="critic:tests"),
        )
        value = 0.8 if proxy else -0.8
        store.append(
            Reward(episode_id=EpisodeId(name), created_at=float(i), value=value, confidence=0.9, position=position)
        )


def watch(store: SqlStore, folder: Path | None = None) -> ProxyWatch:
    found = ProxyWatch(store, CONFIG, folder, clock=lambda: 9.0)
    while found.turn():
        pass
    return found


def test_a_gamed_reward_holds_what_is_on_its_way_up_until_a_person_approves(store: SqlStore) -> None:
    candidate, live = records.adapter(4, 3), records.adapter(3, 2)
    gate = ProxyGate(store)
    assert gate.check(candidate, live, live).decision is Decision.PASS
    live_through(store, 1200, hacked=True)
    told = watch(store).describe()
    [(_, verdict)] = store.read(Verdict, gate=PROXY)
    assert verdict.decision is Decision.FAIL and verdict.adapter_id == "agent@3"
    assert "gamed" in verdict.reason and "held-out judges" in verdict.reason
    assert verdict.evidence["reward_after"] > verdict.evidence["reward_before"] + 0.15
    assert told["units"] == 1200 and told["reward_slope"] > 0.05 > told["held_out_slope"]
    waits = gate.check(candidate, live, live)
    assert waits.decision is Decision.WAIT and "agent@3" in waits.reason
    store.append(waits)
    assert standing(store, live.id) == verdict, "a candidate that waited does not unsay it"
    assert gate.check(candidate, records.adapter(2, 1), live).decision is Decision.PASS, "an older one is live"
    store.append(
        Verdict(adapter_id=live.id, created_at=9.0, gate=APPROVAL, decision=Decision.PASS, reason="looked at it")
    )
    assert gate.check(candidate, live, live).decision is Decision.PASS


def test_harder_tasks_are_no_gaming(store: SqlStore) -> None:
    """A noisy reward falls less than the judges do: the gap opens, and that is told, and nothing is held."""
    live = ProxyWatch(store, CONFIG)
    rng = random.Random(0)
    told = []
    for i in range(4000):
        good = rng.random() < (0.8 if i < 2000 else 0.2)
        proxy = good if rng.random() < 0.8 else not good
        told += live.take(1, float(proxy), float(good), float(i))
    assert [v.decision for v in told] == [Decision.PASS]
    assert "move apart" in told[0].reason


def test_nothing_is_told_of_rewards_that_go_with_the_judges(store: SqlStore) -> None:
    live_through(store, 600, hacked=False)
    watch(store)
    assert not store.read(Verdict, gate=PROXY)
    assert standing(store, AdapterId("agent@3")) is None


def test_an_episode_counts_once_and_a_restart_changes_nothing(store: SqlStore, tmp_path: Path) -> None:
    live_through(store, 120, hacked=False)
    first = watch(store, tmp_path)
    StateFile(tmp_path / STATE).save(first.state())
    [(_, again)] = store.read(Reward, episode_id="e0")
    store.append(again)
    live_through(store, 50, hacked=False, seed=1, begin=120)
    assert watch(store, tmp_path).state() == watch(store).state()
    assert watch(store).describe()["units"] == 170
    (tmp_path / STATE).write_text("{}")
    assert watch(store, tmp_path).describe()["units"] == 170


# --------------------------------------------------------------------------------------- kept from what is learned


def test_held_out_sources_are_no_evidence_for_the_reward(store: SqlStore) -> None:
    store.append(
        records.step("s", "e"),
        records.feedback("outcome", "e", value=1.0, source="critic:tests"),
        records.feedback("score", "e", value=1.0, source="human:alice"),
    )
    ledger = Ledger(store, CONFIG.reward)
    ledger.advance(store.end())
    row = ledger.row(EpisodeId("e"))
    assert row is not None and [o.rater for o in row.opinions] == ["human:alice"]


@pytest.mark.parametrize(
    ("held_out", "says"),
    [
        (("critic:nobody",), "there is no critic:nobody"),
        (("human:audit*",), "audited"),
        (("*",), "names no kind of source"),
    ],
)
def test_the_configuration_is_checked_at_the_start(held_out: tuple[str, ...], says: str) -> None:
    check_held_out(CONFIG)
    with pytest.raises(ConfigError, match=says):
        check_held_out(replace(CONFIG, reward=replace(CONFIG.reward, held_out=held_out)))


def test_that_no_critic_is_kept_for_judging_is_told(caplog: pytest.LogCaptureFixture) -> None:
    check_held_out(replace(CONFIG, reward=RewardConfig()))
    assert "no critic is kept for judging" in caplog.text
