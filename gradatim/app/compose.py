"""Builds the parts from the configuration, for each of the two processes.

Call ``set_threads`` first: OpenMP reads its environment once, when torch is imported. Imports of parts that need
torch stand inside the functions for that reason. This module decides nothing; it only wires.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gradatim.app.home import Home
from gradatim.config import Config
from gradatim.errors import ConfigError
from gradatim.store import SqlStore, open_store
from gradatim.types import Adapter, AdapterId, Stage

if TYPE_CHECKING:
    from gradatim.engine.transformers import TransformersEngine
    from gradatim.loop import Loop
    from gradatim.nn.base import Base


def thread_environment(threads: int) -> Mapping[str, str]:
    """What OpenMP must find before torch is imported: pools that sleep when idle (two spinning pools on the same
    cores are up to ten times slower than one)."""
    return {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": str(threads)}


def serving_threads(config: Config) -> int:
    return config.engine.threads or max(1, (os.cpu_count() or 2) - 1)


def set_threads(threads: int) -> None:
    os.environ.update(thread_environment(threads))


def build_store(config: Config) -> SqlStore:
    return open_store(config.database or Home(config.data_dir).store)


def build_base(config: Config) -> Base:
    from gradatim.nn.base import load_base

    return load_base(config.model, config.data_dir, dtype=config.engine.dtype, device=config.engine.device)


def register_base(store: SqlStore, config: Config, base_sha256: str) -> None:
    """``name@0``, the frozen base: written once, and never another one. ConfigError names both digests."""
    own = [adapter for _, adapter in store.newest(Adapter, id=f"{config.name}@0")]
    first = [adapter for _, adapter in store.read(Adapter, limit=1)]  # whatever it is named, all have one base
    for adapter in (*own, *first):
        if adapter.base_sha256 != base_sha256:
            raise ConfigError(
                f"{config.data_dir} was made with another base model: its digest is {adapter.base_sha256}, that of "
                f"{config.model} is {base_sha256}. Serve the model it was made with, or give this one a --data-dir"
            )
    if own:
        return
    store.append(
        Adapter(
            id=AdapterId(f"{config.name}@0"),
            name=config.name,
            step=0,
            base_sha256=base_sha256,
            parent_id=None,
            sha256=base_sha256,
            path="",
            created_at=time.time(),
        )
    )


def build_engine(config: Config, base: Base) -> TransformersEngine:
    from gradatim.engine.transformers import TransformersEngine
    from gradatim.nn.render import Renderer

    return TransformersEngine(base, Renderer(base), config.engine, config.data_dir, max_queue=config.server.max_queue)


def build_loop(config: Config, store: SqlStore, base: Base) -> Loop:
    from gradatim.credit import HorizonCredit
    from gradatim.examples import ExampleBuilder
    from gradatim.learner.learner import LoraLearner
    from gradatim.learner.replay import StoreReplay
    from gradatim.learner.scorer import TorchScorer
    from gradatim.loop import Loop
    from gradatim.nn.render import Renderer
    from gradatim.release.gates import ReplayGate, StaticGate
    from gradatim.reward import AuditedReward
    from gradatim.skills import PromptSkills

    scorer = TorchScorer(base, config.learner, config.data_dir)
    renderer = Renderer(base)
    skills = PromptSkills(store, end_of_turn=renderer.completion_ids("")[-1])
    return Loop(
        name=config.name,
        store=store,
        reward_model=AuditedReward(store, config.reward),
        credit=HorizonCredit(store, config.credit, config.reward),
        examples=ExampleBuilder(
            store,
            renderer,
            retain_every=config.learner.retain_every,
            hint_corrections=config.learner.losses.correction == "self_distillation",
            skills=skills,
        ),
        replay=StoreReplay(store, config.name, config.learner.seed),
        learner=LoraLearner(base, config.learner, config.data_dir, config.name),
        gates={Stage.CANDIDATE: (StaticGate(store, scorer, config.gate), ReplayGate(store, scorer, config.gate))},
        config=config.loop,
        learning=config.learner,
    )
