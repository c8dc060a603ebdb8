"""A deployment in small, for tests that stop it at random: the product's store, loop and learner on a tiny model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gradatim.config import LearnerConfig, LoopConfig
from gradatim.learner.learner import LoraLearner
from gradatim.loop import Loop
from gradatim.nn.base import Base
from gradatim.nn.lora import read_adapter
from gradatim.release.traffic import rollback
from gradatim.store import SqlStore, audit
from gradatim.types import Adapter, AdapterId, Feedback, Stage, Step, StepId

from . import test_flow as flow
from .records import adapter, feedback, step

LEARNING = LearnerConfig(
    rank=2, min_examples=1, epochs=1, max_length=64, habit_limit=0.0, length_limit=0.0, kl_base_limit=1e9
)


def loop_on(store: SqlStore, base: Base, root: Path) -> Loop:
    loop, _ = flow.loop_on(store)
    learner = LoraLearner(base, LEARNING, root, "agent")
    return replace(loop, learner=learner, learning=LEARNING, config=LoopConfig(settle_s=0.0), clock=time.time)


def lives(store: SqlStore) -> list[AdapterId]:
    return list(store.stages("agent", Stage.LIVE))


def begin(store: SqlStore, base: Base) -> None:
    store.append(adapter(0, base_sha256=base.sha256, sha256=base.sha256))


def one_round(store: SqlStore, loop: Loop, n: int, tell: Callable[[str, str], None]) -> None:
    """Ingest, train, publish, promote, and roll back every other time. ``tell``: what is acknowledged: ("said", name)
    of an opinion and its step, ("live", adapter); and ("now", phase) before each phase."""
    tell("now", "ingest")
    for i in range(4):
        name = f"{n}-{i}"
        store.append(step(f"s{name}", f"e{name}", prompt_ids=(3, 4, n % 90, i), completion_ids=(20 + i, 0)))
        store.append(feedback("outcome", f"e{name}", id=f"f{name}", value=1.0))
        tell("said", name)
    tell("now", "judge, train, publish")
    while loop.turn(flush=True):
        tell("live", lives(store)[0])
        tell("now", "decide, promote")
    if n % 2:
        tell("now", "roll back")
        rollback(store, "agent", actor="person", reason="test")
        tell("live", lives(store)[0])


def not_kept(store: SqlStore, acknowledged: list[str]) -> list[str]:
    """Of what was acknowledged, what is lost."""
    return [n for n in acknowledged if not store.read(Feedback, id=f"f{n}") or store.step(id=StepId(f"s{n}")) is None]


def check_records(store: SqlStore, root: Path) -> int:
    """How many adapters are registered; asserts that all agrees, and that every adapter can be read."""
    assert all(s.completion_ids for _, s in store.read(Step))
    made = [a for _, a in store.read(Adapter)]
    for one in made:
        if one.step:
            read_adapter(root / one.path, one.sha256)
    with store.engines.read.begin() as connection:
        assert audit.check(connection).problems == ()
    return len(made)
