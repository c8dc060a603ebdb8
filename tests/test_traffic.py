from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gradatim.config import Config, ReleaseConfig
from gradatim.errors import AdapterError, UnknownAdapterError
from gradatim.protocols import Store
from gradatim.release.traffic import Traffic, promote, rollback
from gradatim.store import open_store
from gradatim.types import Adapter, AdapterId, Decision, Delta, EpisodeId, Move, Request, Stage, Started, Verdict

from .records import adapter


class LoadedEngine:
    """Remembers what is loaded, and refuses what it is told to."""

    def __init__(self, broken: frozenset[str] = frozenset()) -> None:
        self.adapters: set[AdapterId] = set()
        self.broken = broken

    async def generate(self, request: Request, adapter_id: AdapterId) -> AsyncIterator[Started | Delta]:
        raise AssertionError("routing does not generate")
        yield

    async def load(self, adapter: Adapter) -> None:
        if adapter.id in self.broken:
            raise AdapterError(f"{adapter.id} is corrupt")
        self.adapters.add(adapter.id)

    async def unload(self, adapter_id: AdapterId) -> None:
        self.adapters.discard(adapter_id)

    def loaded(self) -> frozenset[AdapterId]:
        return frozenset(self.adapters)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "s.db") as opened:
        opened.append(adapter(0))
        yield opened


def go_live(store: Store, number: int) -> None:
    store.append(adapter(number, parent=number - 1))
    promote(store, "agent", AdapterId(f"agent@{number}"), actor="test")


async def traffic_on(store: Store, release: ReleaseConfig | None = None) -> tuple[Traffic, LoadedEngine]:
    engine = LoadedEngine()
    traffic = Traffic(store, engine, Config(release=release or ReleaseConfig()))
    await traffic.refresh()
    return traffic, engine


async def test_the_name_goes_to_the_live_adapter_and_a_version_to_itself(store: Store) -> None:
    go_live(store, 1)
    traffic, _ = await traffic_on(store)
    assert (await traffic.route("agent", EpisodeId("e"))).adapter_id == "agent@1"
    pinned = await traffic.route("agent@0", EpisodeId("e"))
    assert (pinned.adapter_id, pinned.stage, pinned.adapter_sha256) == ("agent@0", "pinned", "sha-0")


async def test_an_unknown_model_or_version_is_named(store: Store) -> None:
    traffic, _ = await traffic_on(store)
    for model in ("gpt-4", "agent@7", "agent@", "@0"):
        with pytest.raises(UnknownAdapterError, match="use 'agent'"):
            await traffic.route(model, EpisodeId("e"))


async def test_an_episode_keeps_its_adapter_and_a_new_one_gets_the_new(store: Store) -> None:
    traffic, _ = await traffic_on(store)
    assert (await traffic.route("agent", EpisodeId("old"))).adapter_id == "agent@0"
    go_live(store, 1)
    await traffic.refresh()
    assert (await traffic.route("agent", EpisodeId("old"))).adapter_id == "agent@0"
    assert (await traffic.route("agent", EpisodeId("new"))).adapter_id == "agent@1"


async def test_a_rollback_acts_on_the_next_request_of_every_episode(store: Store) -> None:
    go_live(store, 1)
    traffic, engine = await traffic_on(store)
    assert (await traffic.route("agent", EpisodeId("e"))).adapter_id == "agent@1"
    rollback(store, "agent", actor="test")
    await traffic.refresh()
    assert (await traffic.route("agent", EpisodeId("e"))).adapter_id == "agent@0"
    assert "agent@1" not in engine.loaded()


async def test_an_adapter_that_cannot_be_loaded_leaves_the_old_one_answering(store: Store) -> None:
    traffic, engine = await traffic_on(store)
    engine.broken = frozenset({"agent@1"})
    go_live(store, 1)
    with pytest.raises(AdapterError):
        await traffic.refresh()
    assert (await traffic.route("agent", EpisodeId("e"))).adapter_id == "agent@0"


def begin_canary(store: Store) -> None:
    store.append(adapter(2, parent=1))
    store.move(
        Move(
            adapter_id=AdapterId("agent@2"),
            created_at=time.time(),
            before=Stage.CANDIDATE,
            after=Stage.CANARY,
            actor="test",
        )
    )


def said(adapter_id: str, gate: str, share: float) -> Verdict:
    evidence = {"share": share}
    return Verdict(
        adapter_id=AdapterId(adapter_id), created_at=1.0, gate=gate, decision=Decision.WAIT, evidence=evidence
    )


async def test_the_coin_is_tossed_per_episode_with_the_logged_propensity(store: Store) -> None:
    go_live(store, 1)
    begin_canary(store)
    traffic, _ = await traffic_on(store, ReleaseConfig(canary=True, ramp=(0.2,), holdback=0.1))
    routes = [await traffic.route("agent", EpisodeId(f"e{i}")) for i in range(3000)]
    share = {a: sum(r.adapter_id == a for r in routes) / 3000 for a in ("agent@0", "agent@1", "agent@2")}
    assert share["agent@2"] == pytest.approx(0.2, abs=0.03)
    assert share["agent@0"] == pytest.approx(0.1, abs=0.03)
    for route in routes:
        assert route.coin == pytest.approx({"agent@0": 0.1, "agent@1": 0.7, "agent@2": 0.2})
        assert route.propensity == route.coin[route.adapter_id]
    again = await traffic.route("agent", EpisodeId("e0"))
    assert (again.adapter_id, again.coin, again.propensity) == (routes[0].adapter_id, {}, 1.0)


async def test_the_gates_verdicts_set_the_shares_and_a_restart_keeps_every_canary_episode(store: Store) -> None:
    go_live(store, 1)
    begin_canary(store)
    release = ReleaseConfig(canary=True, ramp=(0.1, 0.5), holdback=0.0)
    before, _ = await traffic_on(store, release)
    episodes = [EpisodeId(f"e{i}") for i in range(300)]
    first = {e for e in episodes if (await before.route("agent", e)).adapter_id == "agent@2"}
    store.append(said("agent@2", "canary", 0.5))
    after, _ = await traffic_on(store, release)
    routes = {e: await after.route("agent", e) for e in episodes}
    second = {e for e, r in routes.items() if r.adapter_id == "agent@2"}
    assert first < second
    assert len(second) == pytest.approx(150, abs=30)
    assert {r.coin[AdapterId("agent@2")] for r in routes.values()} == {0.5}


async def test_an_alarm_evens_the_shares_out_with_the_last_good_one(store: Store) -> None:
    go_live(store, 1)
    go_live(store, 2)
    traffic, _ = await traffic_on(store, ReleaseConfig(canary=True))
    assert (await traffic.route("agent", EpisodeId("a"))).coin == pytest.approx({"agent@1": 0.05, "agent@2": 0.95})
    store.append(said("agent@2", "watch", 0.5))
    await traffic.refresh()
    assert (await traffic.route("agent", EpisodeId("b"))).coin == {"agent@1": 0.5, "agent@2": 0.5}


async def test_without_a_canary_no_coin_is_tossed(store: Store) -> None:
    go_live(store, 1)
    traffic, _ = await traffic_on(store)
    route = await traffic.route("agent", EpisodeId("e"))
    assert (route.adapter_id, route.coin) == ("agent@1", {})


async def test_a_share_stays_on_the_frozen_base_for_good(store: Store) -> None:
    release = ReleaseConfig(canary=True, holdback=0.05, base_share=0.1)
    traffic, _ = await traffic_on(store, release)
    assert (await traffic.route("agent", EpisodeId("e"))).coin == {}  # the base itself is live
    go_live(store, 1)
    await traffic.refresh()
    assert (await traffic.route("agent", EpisodeId("f"))).coin == {"agent@0": 0.1, "agent@1": 0.9}  # it is both
    go_live(store, 2)
    await traffic.refresh()
    coin = {"agent@0": 0.1, "agent@1": 0.05, "agent@2": pytest.approx(0.85)}
    routes = [await traffic.route("agent", EpisodeId(f"e{i}")) for i in range(1000)]
    assert all(route.coin == coin for route in routes)
    frozen = [route for route in routes if route.adapter_id == "agent@0"]
    assert 70 <= len(frozen) <= 130
    assert {(route.stage, route.propensity) for route in frozen} == {("retired", 0.1)}
