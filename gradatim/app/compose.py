"""Builds the parts from the configuration, for each of the two processes.

Call ``set_threads`` first: OpenMP reads its environment once, when torch is imported. Imports of parts that need
torch stand inside the functions for that reason. This module decides nothing; it only wires.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from gradatim.app.home import Home
from gradatim.config import Config, GateConfig, MemoryConfig
from gradatim.errors import ConfigError
from gradatim.store import SqlStore, open_store
from gradatim.types import ON_THE_WAY, Adapter, AdapterId, Episode, Stage, Step, StepId

if TYPE_CHECKING:
    from gradatim.engine.transformers import TransformersEngine
    from gradatim.feedback.critique import Critique
    from gradatim.loop import Loop
    from gradatim.memory.consolidate import Consolidation
    from gradatim.nn.base import Base
    from gradatim.protocols import CreditAssigner, Gate, LogRatios
    from gradatim.release.drift import Drift
    from gradatim.release.proxy import ProxyWatch
    from gradatim.release.shadow import ShadowGate
    from gradatim.reward import AuditedReward, Hidden

log = logging.getLogger(__name__)


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


def key_layers(config: Config, base: Base) -> tuple[int, ...]:
    """The layers whose inputs are the key of a situation. None where no memory that is on asks where a request stands,
    or a sentence encoder tells it: the engine does not look, and reads nothing again for it."""
    from gradatim.memory.key_space import turn_layers

    on = (config.memory.decisions or config.memory.retrieval) and not config.memory.encoder
    return turn_layers(base.model.config.get_text_config().num_hidden_layers) if on else ()


def token_layer(config: Config, base: Base) -> int | None:
    """The layer whose input is the key of a token memory: a late one. None where it is off."""
    from gradatim.memory.key_space import late_layer

    layers = base.model.config.get_text_config().num_hidden_layers
    return late_layer(layers) if config.memory.tokens else None


def build_engine(config: Config, base: Base) -> TransformersEngine:
    from gradatim.engine.transformers import TransformersEngine
    from gradatim.nn.render import Renderer

    return TransformersEngine(
        base,
        Renderer(base),
        config.engine,
        config.data_dir,
        max_queue=config.server.max_queue,
        key_layers=key_layers(config, base),
        token_layer=token_layer(config, base),
        attention_tokens=config.memory.attention_tokens if config.memory.attention else 0,
        attention_bytes=config.memory.attention_bytes,
    )


def check_critics(config: Config) -> None:
    """ConfigError, before anything else is begun, where a critic of the configuration cannot be made, or code that it
    runs in a sandbox could read the records; or where the shadow's also gives feedback to learn from."""
    _check_shadow(config)
    check_held_out(config)
    if not config.critics.run:
        return
    from gradatim.feedback.sandbox import readable
    from gradatim.feedback.worker import Bench

    names = [critic.called for critic in config.critics.run]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"critics.run: two critics are called {', '.join(sorted(twice))}; give each a name of its own"
        )
    data_dir = Path(config.data_dir).resolve()
    for shown in readable():
        if data_dir.is_relative_to(shown):
            raise ConfigError(
                f"{data_dir} lies in {shown}, which code in a sandbox can read; choose another --data-dir"
            )
    with Bench(config.critics.run) as bench:
        bench.check()


def _check_shadow(config: Config) -> None:
    if config.shadow.critic is None:
        return
    from gradatim.feedback.worker import Bench

    critic = config.shadow.critic
    if any((critic.use, critic.options) == (other.use, other.options) for other in config.critics.run):
        raise ConfigError(
            f"shadow.critic: {critic.use} gives feedback to learn from; another one must judge the shadow"
        )
    with Bench([critic]) as bench:
        bench.check()


def build_critique(config: Config, store: SqlStore) -> Critique | None:
    """None where nothing is configured."""
    if not config.critics.run and not config.critics.implicit:
        return None
    from gradatim.feedback.critique import Critique

    return Critique(store, config.critics, sources=config.reward.weights)


def build_judges(
    config: Config, store: SqlStore, base: Base | None = None, *, read_only: bool = False
) -> tuple[AuditedReward, CreditAssigner]:
    """What turns feedback into reward, and reward into credit: the same for learning and for memory. ``read_only``:
    beside the loop, which moves the cursors. ``base``: whose states over answers are read, in the loop alone."""
    from gradatim.credit import HorizonCredit
    from gradatim.reward import AuditedReward

    reward_model = AuditedReward(store, config.reward, read_only=read_only, hidden=_hidden(config, store, base))
    return reward_model, HorizonCredit(store, config.credit, config.reward, ratios=_ratios(config, store, base))


def build_drift(config: Config, store: SqlStore) -> Drift | None:
    """None where it is switched off."""
    if config.drift.react == "off":
        return None
    from gradatim.release.drift import Drift

    return Drift(store, config, Path(config.data_dir))


def build_proxy(config: Config, store: SqlStore) -> ProxyWatch | None:
    """None where no source is kept for judging."""
    if not config.reward.held_out:
        return None
    from gradatim.release.proxy import ProxyWatch

    return ProxyWatch(store, config, Path(config.data_dir))


def check_held_out(config: Config) -> None:
    """ConfigError where a source is kept for judging and learned from too, or is no critic that there is. A word of
    warning where critics are learned from and none of them is kept."""
    reward, critics = config.reward, [f"critic:{c.called}" for c in config.critics.run]
    if both := set(reward.held_out) & set(reward.audited):
        raise ConfigError(f"reward.held_out: {', '.join(sorted(both))} is audited, and so the reward; keep another one")
    for pattern in reward.held_out:
        if pattern.partition(":")[0] not in reward.weights:
            kinds = ", ".join(sorted(reward.weights))
            raise ConfigError(f"reward.held_out: {pattern!r} names no kind of source; it begins with one of {kinds}")
        if critics and pattern.startswith("critic:") and not any(fnmatchcase(c, pattern) for c in critics):
            raise ConfigError(f"reward.held_out: there is no {pattern}; the critics are {', '.join(critics)}")
    if len(critics) > 1 and not reward.held_out:
        log.warning("no critic is kept for judging: whether the reward is gamed will not be seen (reward.held_out)")


def _hidden(config: Config, store: SqlStore, base: Base | None) -> Hidden | None:
    """None where it is not wanted."""
    from gradatim.reward import Hidden
    from gradatim.store import SqlShelf

    if not config.reward.hidden:
        if config.reward.silence_s:
            raise ConfigError("reward.silence_s: only the model's own states judge in silence: set reward.hidden")
        return None
    if base is None:
        return Hidden(SqlShelf(store.engines), None)
    from gradatim.learner.encoder import StateEncoder

    return Hidden(SqlShelf(store.engines), StateEncoder(base))


def _ratios(config: Config, store: SqlStore, base: Base | None) -> LogRatios | None:
    """None where nothing asks for them, or no model is at hand."""
    if base is None or "implicit" not in config.credit.order:
        return None
    from gradatim.learner.ratios import StepRatios
    from gradatim.learner.scorer import TorchScorer

    return StepRatios(store, TorchScorer(base, config.learner, Path(config.data_dir)), config.name)


def build_loop(
    config: Config,
    store: SqlStore,
    base: Base,
    judges: tuple[AuditedReward, CreditAssigner] | None = None,
    drift: Drift | None = None,
) -> Loop:
    """``judges``: where the caller wants to look at them; else made here. ``drift``: whose word on the lift in traffic
    is proof to the replay gate."""
    from gradatim.examples import ExampleBuilder
    from gradatim.learner.learner import LoraLearner
    from gradatim.learner.pace import Pace
    from gradatim.learner.replay import StoreReplay
    from gradatim.learner.scorer import TorchScorer
    from gradatim.loop import Loop
    from gradatim.nn.render import Renderer
    from gradatim.release.canary import CanaryGate
    from gradatim.release.gates import PersonGate, ReplayGate, StaticGate
    from gradatim.release.proxy import ProxyGate
    from gradatim.release.watch import WatchGate
    from gradatim.skills import PromptSkills

    reward_model, credit = judges or build_judges(config, store, base)
    scorer = TorchScorer(base, config.learner, config.data_dir)
    renderer = Renderer(base)
    skills = PromptSkills(store, end_of_turn=renderer.completion_ids("")[-1])
    replay = ReplayGate(store, scorer, _asking(config), lift=drift.lift_of if drift is not None else None)
    offline = (StaticGate(store, scorer, config.gate), replay)
    gamed = (ProxyGate(store),) if config.reward.held_out and config.reward.gamed == "hold" else ()
    gates: dict[Stage, tuple[Gate, ...]] = {Stage.CANDIDATE: (*gamed, *offline, *_suite_gate(config, base))}
    if config.shadow.prompts:
        gates[Stage.SHADOW] = (build_shadow(config, store, base),)
    if config.release.canary:
        gates |= {Stage.CANARY: (*gamed, CanaryGate(store, config)), Stage.LIVE: (WatchGate(store, config),)}
    if config.mode == "propose":
        last = Stage.CANARY if config.release.canary else Stage.SHADOW
        gates[last] = (*gates.get(last, ()), PersonGate())
    way = [stage for stage in (*ON_THE_WAY, Stage.LIVE) if stage in gates or stage is Stage.LIVE]
    return Loop(
        name=config.name,
        store=store,
        reward_model=reward_model,
        credit=credit,
        examples=ExampleBuilder(
            store,
            renderer,
            retain_every=config.learner.retain_every,
            hint_corrections=config.learner.losses.correction == "self_distillation",
            skills=skills,
        ),
        replay=StoreReplay(store, config.name, config.learner.seed, first=_supplied(config, store)),
        learner=LoraLearner(base, config.learner, config.data_dir, config.name, Pace(store, config.drift)),
        gates=gates,
        path=dict(pairwise(way)),
        cool_down_s=config.release.cool_down_s,
        config=config.loop,
        learning=config.learner,
        rewards=config.reward,
    )


def _asking(config: Config) -> GateConfig:
    """Where a person puts every adapter live, none of them needs proof."""
    return replace(config.gate, unproven=0) if config.mode == "propose" else config.gate


def _supplied(config: Config, store: SqlStore) -> Callable[[], Sequence[StepId]] | None:
    """What memory keeps having to supply. None where nothing is consolidated."""
    from gradatim.memory.consolidate import supplied
    from gradatim.store import SqlShelf

    if not config.memory.consolidate:
        return None

    def first() -> Sequence[StepId]:
        live = [a for i in store.stages(config.name, Stage.LIVE) for _, a in store.newest(Adapter, id=i)]
        return supplied(SqlShelf(store.engines), live[0].sha256 if live else "")

    return first


def build_consolidation(config: Config, store: SqlStore, base: Base) -> Consolidation:
    """From memory to weights, by a scorer of its own on the learner's model."""
    from gradatim.learner.scorer import TorchScorer
    from gradatim.memory.consolidate import Consolidation
    from gradatim.store import SqlShelf

    scorer = TorchScorer(base, config.learner, config.data_dir)
    return Consolidation(store, SqlShelf(store.engines), scorer, config.memory, config.name)


def _suite_gate(config: Config, base: Base) -> tuple[Gate, ...]:
    """The user's own cases, where there are any."""
    from gradatim.app.answering import Answers
    from gradatim.release.suite import SuiteGate, load_suite

    if not config.gate.suite:
        return ()
    return (SuiteGate(load_suite(Path(config.gate.suite)), Answers(build_engine(config, base)), config.gate),)


def build_shadow(config: Config, store: SqlStore, base: Base) -> ShadowGate:
    """With an engine and, where one is configured, a critic's process of its own; both begin when first needed."""
    from gradatim.app.answering import Replays
    from gradatim.feedback.checks import tool_schema
    from gradatim.feedback.worker import Bench
    from gradatim.release.comparison import is_malformed_call
    from gradatim.release.shadow import ShadowGate
    from gradatim.store import SqlShelf

    shadow = config.shadow
    engine = replace(config.engine, threads=config.learner.threads, adapter_slots=2)
    plain = replace(config, engine=engine, memory=MemoryConfig())  # answers are compared without what is remembered
    of_schema = tool_schema(shadow.tools) if shadow.tools else None

    def unsound(step: Step) -> bool:
        return of_schema is not None and of_schema(Episode(id=step.episode_id, steps=(step,))) is not None

    return ShadowGate(
        store,
        SqlShelf(store.engines),
        config,
        Replays(build_engine(plain, base), shadow.max_tokens),
        partial(Bench([shadow.critic]).ask, 0) if shadow.critic else None,
        unsound=unsound if shadow.tools else is_malformed_call,
    )
