"""A known-bad adapter, put before each gate by itself: every one of them stops it, and lets a sound one pass."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from gradatim.config import Config, GateConfig, ReleaseConfig, ShadowConfig
from gradatim.release.gates import ReplayGate, StaticGate
from gradatim.release.shadow import ShadowGate
from gradatim.release.suite import SuiteCase, SuiteGate
from gradatim.release.trial import Trial
from gradatim.release.units import CLASSES, Scored, Served
from gradatim.release.watch import Watch
from gradatim.store import SqlShelf, open_store
from gradatim.types import Decision, EpisodeId

from . import test_gates as offline
from . import test_shadow as shadows

N = 400  # cases, prompts or episodes


def static(folder: Path, bad: bool) -> bool:
    with open_store(folder / "s.db") as store:
        store.append(offline.update(delta_norm=5.0 if bad else 0.01))
        gate = StaticGate(store, offline.TableScorer({}), GateConfig())
        return gate.check(offline.CANDIDATE, offline.BASE, offline.BASE).decision is Decision.PASS


def replay(folder: Path, bad: bool) -> bool:
    cases = offline.verified("a", 40, "s")
    known = {e.id for e in cases}
    with open_store(folder / "s.db") as store:
        store.append(*cases)
        scorer = offline.TableScorer({"agent@0": known, "agent@1": set() if bad else known})
        gate = ReplayGate(store, scorer, GateConfig())
        return gate.check(offline.CANDIDATE, offline.BASE, offline.BASE).decision is Decision.PASS


def suite(folder: Path, bad: bool) -> bool:
    cases = [SuiteCase(messages=({"role": "user", "content": "6 * 7?"},), answer="42")] * 30
    gate = SuiteGate(cases, lambda of, asked: ["no" if bad and of.step else "42"] * len(asked), GateConfig())
    return gate.check(offline.CANDIDATE, offline.BASE, offline.BASE).decision is Decision.PASS


def shadow(folder: Path, bad: bool) -> bool:
    arms = shadows.Arms(lambda s: "wrong" if bad and shadows.of_digit(s, 4) else "right")
    with open_store(folder / "s.db") as store:
        store.append(shadows.LIVE)
        shadows.prompts(store, N)
        shadows.begin(store)
        config = Config(shadow=ShadowConfig(prompts=N, at_once=N))
        gate = ShadowGate(store, SqlShelf(store.engines), config, arms, arms.judge, clock=lambda: shadows.BEGAN)
        return shadows.run(gate).decision is Decision.PASS


def canary(folder: Path, bad: bool) -> bool:
    config = ReleaseConfig(min_s=0.0, min_users=0, min_episodes=100, ramp_s=0.0)
    trial = Trial(config, required=CLASSES[:1])
    units = episodes(0.3 if bad else 0.9, 0.7, 0.5, 5 * N)
    trial.serve([u.served for u in units])
    trial.score(units)
    return trial.proven and not trial.harm


def watch(folder: Path, bad: bool) -> bool:
    subject = Watch(ReleaseConfig(canary=True), (0.7, math.nan))
    units = episodes(0.3 if bad else 0.7, 0.7, 0.95, 5 * N)
    for unit in units:
        subject.score([unit])
    return not subject.harm


def episodes(treated: float, control: float, share: float, n: int) -> list[Scored]:
    """Rated by a program; ``share`` of them by the adapter in question."""
    rng, out = random.Random(0), []
    for i in range(n):
        arm = rng.random() < share
        reward = float(rng.random() < (treated if arm else control))
        served = Served(EpisodeId(str(i)), arm, share, float(i), float(i), "", (0.0, 0.0, 0.0, 0.5, 0.5))
        out.append(Scored(served, (reward, math.nan), rated=True, abstained=False))
    return out


@pytest.mark.parametrize("gate", [static, replay, suite, shadow, canary, watch])
def test_a_known_bad_adapter_is_stopped_at_each_gate_by_itself(
    gate: Callable[[Path, bool], bool], tmp_path: Path
) -> None:
    for bad in (False, True):
        folder = tmp_path / str(bad)
        folder.mkdir()
        assert gate(folder, bad) is not bad
