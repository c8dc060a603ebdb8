"""Which weights answer a request, and the moves that change it.

A coin per episode, never per request or per user: an episode keeps the adapter it began with as long as that one may
still answer. Stages are read from the store, so that the learning process and the command line need no channel to the
server: this module polls them, loads a newly live adapter, and only then turns to it. Knows nothing of HTTP or tensors.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import ChainMap, OrderedDict
from collections.abc import Mapping, Sequence

from gradatim.config import Config, ReleaseConfig, TrafficConfig
from gradatim.errors import GradatimError, TransitionError, UnknownAdapterError
from gradatim.protocols import Engine, Store
from gradatim.types import APPROVAL, ON_THE_WAY, Adapter, AdapterId, Decision, EpisodeId, Move, Route, Stage, Verdict

log = logging.getLogger(__name__)

_ANSWERS = (Stage.LIVE, Stage.CANARY, Stage.RETIRED)  # may go on answering an episode it began
_MAX_PINS = 10_000


class Traffic:
    """Implements Router."""

    def __init__(self, store: Store, engine: Engine, config: Config) -> None:
        self._store, self._engine = store, engine
        self._name: str = config.name
        self._config: TrafficConfig = config.traffic
        self._release: ReleaseConfig = config.release
        self._shares: dict[AdapterId, float] = {}  # of the canary and of the last good adapter
        self._last_good: AdapterId | None = None  # newest ancestor of the live one that was live
        self._adapters: dict[AdapterId, Adapter] = {}  # those that were asked for
        self._stages: dict[AdapterId, Stage] = {}
        self._answering: Sequence[AdapterId] = ()  # in live or canary
        self._live: AdapterId | None = None
        self._seen = -1  # store position of the newest Move; before the first refresh there is none
        self._pins: OrderedDict[EpisodeId, AdapterId] = OrderedDict()
        self._refreshing = asyncio.Lock()
        self.failed_loads = 0

    @property
    def live(self) -> AdapterId | None:
        """The adapter that new episodes go to; None before the first refresh."""
        return self._live

    async def route(self, model: str, episode_id: EpisodeId) -> Route:
        if model == self._name:
            adapter_id, coin = self._choose(episode_id)
            stage: str = self._stages[adapter_id]
        else:
            adapter_id, coin, stage = AdapterId(model), {}, "pinned"
        adapter = await self._find(adapter_id, model)
        if adapter_id not in self._engine.loaded():
            await self._engine.load(adapter)
        return Route(
            adapter_id=adapter.id,
            adapter_sha256=adapter.sha256,
            stage=stage,
            propensity=coin.get(adapter_id, 1.0),
            coin=coin,
        )

    def _choose(self, episode_id: EpisodeId) -> tuple[AdapterId, Mapping[AdapterId, float]]:
        if self._live is None:
            raise UnknownAdapterError(f"{self._name} has no live adapter yet: the server is still starting")
        pinned = self._pins.get(episode_id)
        if pinned is not None and self._stages.get(pinned) in _ANSWERS and pinned in self._engine.loaded():
            self._pins.move_to_end(episode_id)
            return pinned, {}
        chosen, coin = self._toss(episode_id, self._live)
        self._pins[episode_id] = chosen
        if len(self._pins) > _MAX_PINS:
            self._pins.popitem(last=False)
        return chosen, coin

    def _toss(self, episode_id: EpisodeId, live: AdapterId) -> tuple[AdapterId, Mapping[AdapterId, float]]:
        """Who answers, and the share that each adapter had; empty where there was no choice.

        Arms are ordered and the coin is the episode's own, so that after a restart an episode falls as it fell, and one
        that fell to the canary stays with it when its share rises. Another pair of adapters has another coin.
        """
        arms = {a: share for a, share in self._shares.items() if share > 0.0 and a != live}
        if not arms:
            return live, {}
        coin: dict[AdapterId, float] = {**arms, live: 1.0 - sum(arms.values())}
        salt = " ".join((live, *arms, episode_id))
        place = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "big") / 2**64
        for arm, share in arms.items():
            if place < share:
                return arm, coin
            place -= share
        return live, coin

    async def _find(self, adapter_id: AdapterId, model: str) -> Adapter:
        if adapter_id not in self._adapters:
            for _, adapter in await asyncio.to_thread(self._store.newest, Adapter, id=adapter_id):
                self._adapters[adapter_id] = adapter
        if adapter_id not in self._adapters:
            raise UnknownAdapterError(f"no model {model!r}: use {self._name!r}, or {self._name}@STEP for one version")
        return self._adapters[adapter_id]

    async def refresh(self) -> None:
        """Look at the stages that changed; load what became live before turning to it. A failed load keeps the old
        one, and is tried again at the next look."""
        async with self._refreshing:
            seen, changed = await asyncio.to_thread(self._changed)
            stages = ChainMap(changed, self._stages)
            among = dict.fromkeys((*self._answering, *changed))
            answering = [a for a in among if stages.get(a) in (Stage.LIVE, Stage.CANARY)]
            for adapter_id in answering:
                adapter = await self._find(adapter_id, adapter_id)
                if adapter_id not in self._engine.loaded():
                    await self._engine.load(adapter)
            self._seen = seen
            self._stages.update(changed)
            self._answering = answering
            self._live = next((a for a in answering if self._stages[a] is Stage.LIVE), self._live)
            if changed and self._live is not None:
                self._last_good = await asyncio.to_thread(_ancestor, self._store, self._stages, self._live)
            self._shares = await asyncio.to_thread(self._shared_out)
            for adapter_id in self._engine.loaded():
                if self._stages.get(adapter_id) in (Stage.REJECTED, Stage.ROLLED_BACK):
                    await self._engine.unload(adapter_id)

    def _shared_out(self) -> dict[AdapterId, float]:
        """The canary's and the holdback's shares as the gates said last, the canary's first; then the frozen base's."""
        shares: dict[AdapterId, float] = {}
        canary = next((a for a in self._answering if self._stages[a] is Stage.CANARY), None)
        if canary is not None and self._release.ramp:
            shares[canary] = share_of(self._store, canary, "canary", self._release.ramp[0])
        holdback = self._release.holdback_share
        if self._live is not None and self._last_good is not None and holdback > 0.0:
            shares[self._last_good] = share_of(self._store, self._live, "watch", holdback)
        base = AdapterId(f"{self._name}@0")
        if self._release.base_share > 0.0 and self._stages.get(base) is Stage.RETIRED:
            shares[base] = max(shares.get(base, 0.0), self._release.base_share)
        over = sum(shares.values()) / 0.9  # the live adapter keeps a tenth
        return {a: share / over for a, share in shares.items()} if over > 1.0 else shares

    def _changed(self) -> tuple[int, dict[AdapterId, Stage]]:
        """(position of the newest Move, stages that changed since the last look, all of them at the first)."""
        if self._seen < 0:
            seen = max((position for position, _ in self._store.newest(Move)), default=0)
            return seen, dict(self._store.stages(self._name))  # read after: a later Move is only seen twice
        seen = self._seen
        changed: dict[AdapterId, Stage] = {}
        while page := self._store.read(Move, after=seen):
            seen = page[-1][0]
            changed |= {m.adapter_id: m.after for _, m in page if m.adapter_id.rpartition("@")[0] == self._name}
        return seen, changed

    async def watch(self) -> None:
        """Refresh for ever. An adapter that cannot be loaded is logged and counted, and the old one goes on."""
        while True:
            try:
                await self.refresh()
            except GradatimError as e:
                self.failed_loads += 1
                log.error("the stages could not be followed: %s", e)
                await asyncio.sleep(1.0)
            await asyncio.sleep(self._config.refresh_s)


def share_of(store: Store, adapter_id: AdapterId, gate: str, default: float) -> float:
    """What that gate's newest verdict on an adapter gives to the arm it compares."""
    for _, verdict in store.newest(Verdict, adapter_id=adapter_id, gate=gate):
        return float(verdict.evidence.get("share", default))
    return default


def rollback(store: Store, name: str, to: AdapterId | None = None, *, actor: str, reason: str = "") -> AdapterId:
    """Take the live adapter back to ``to`` (default: the newest ancestor that was live). Needs no statistics."""
    stages = store.stages(name)
    live = _live(stages, name)
    target = to or _ancestor(store, stages, live)
    if target is None:
        raise TransitionError(f"{live} is the first adapter of {name}: there is nothing to roll back to")
    _swap(store, stages, live, target, Stage.ROLLED_BACK, actor, reason or "rolled back")
    return target


def promote(store: Store, name: str, to: AdapterId, *, actor: str, reason: str = "") -> AdapterId:
    """Put an adapter live by hand, past the gates that are left."""
    stages = store.stages(name)
    _swap(store, stages, _live(stages, name), to, Stage.RETIRED, actor, reason or "promoted by hand")
    return to


def approve(store: Store, name: str, adapter_id: AdapterId, *, actor: str, reason: str = "") -> AdapterId:
    """Make an adapter the anchor: candidates are compared with it as well as with the live one, and may lose only so
    much against it, however many there are. TransitionError for one that was never live."""
    stage = store.stages(name).get(adapter_id)
    if stage is None:
        raise UnknownAdapterError(f"no adapter {adapter_id}: see `gradatim adapters list`")
    if stage not in (Stage.LIVE, Stage.RETIRED):
        raise TransitionError(f"{adapter_id} is {stage.value}: only one that is or was live can be approved")
    store.append(
        Verdict(
            adapter_id=adapter_id,
            created_at=time.time(),
            gate=APPROVAL,
            decision=Decision.PASS,
            reason=f"{actor}: {reason or 'approved'}",
        )
    )
    return adapter_id


def reject(store: Store, name: str, adapter_id: AdapterId, *, actor: str, reason: str = "") -> None:
    """Take an adapter that is on its way up off it. TransitionError for any other."""
    stage = store.stages(name, *ON_THE_WAY).get(adapter_id)
    if stage is None:
        raise TransitionError(f"{adapter_id} is not on its way up; a live one is taken off by a rollback")
    why = reason or "rejected by hand"
    store.move(
        Move(
            adapter_id=adapter_id,
            created_at=time.time(),
            before=stage,
            after=Stage.REJECTED,
            actor=actor,
            reason=why,
        )
    )


def _live(stages: Mapping[AdapterId, Stage], name: str) -> AdapterId:
    live = next((a for a, s in stages.items() if s is Stage.LIVE), None)
    if live is None:
        raise TransitionError(f"{name} has no live adapter: has a server ever run on this data directory?")
    return live


def _ancestor(store: Store, stages: Mapping[AdapterId, Stage], of: AdapterId) -> AdapterId | None:
    """Its newest one that was live and was not rolled back."""
    parent = store.read(Adapter, id=of)[0][1].parent_id
    while parent is not None and stages.get(parent) is not Stage.RETIRED:
        parent = store.read(Adapter, id=parent)[0][1].parent_id
    return parent


def _swap(
    store: Store,
    stages: Mapping[AdapterId, Stage],
    live: AdapterId,
    target: AdapterId,
    leaves_as: Stage,
    actor: str,
    reason: str,
) -> None:
    if target not in stages:
        raise UnknownAdapterError(f"no adapter {target}: see `gradatim adapters list`")
    if target == live:
        raise TransitionError(f"{target} is live already")
    now = time.time()
    store.move(
        Move(adapter_id=live, created_at=now, before=Stage.LIVE, after=leaves_as, actor=actor, reason=reason),
        Move(adapter_id=target, created_at=now, before=stages[target], after=Stage.LIVE, actor=actor, reason=reason),
    )
