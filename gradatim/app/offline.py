"""The server's answers without a server: the same routes, in this process, over the data directory's store.

For the command line where nothing listens. There is no engine, so whatever needs one is refused.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx

from gradatim.app import compose, report
from gradatim.app.administration import Administration
from gradatim.app.home import Home
from gradatim.app.memory import open_admin
from gradatim.config import Config
from gradatim.errors import ConfigError, InUseError, UnknownAdapterError
from gradatim.reward import in_turns, queue, unheard
from gradatim.server import build_app
from gradatim.store import SqlStore
from gradatim.store import audit as chain
from gradatim.types import Adapter, AdapterId, Delta, EpisodeId, Feedback, Request, Route, Started, Step

_NOT_RUNNING = "no server runs on this data directory: start one with `gradatim serve`"


class _Absent:
    """Engine and Router of a server that is not there."""

    async def generate(self, request: Request, adapter_id: AdapterId) -> AsyncIterator[Started | Delta]:
        raise InUseError(_NOT_RUNNING)
        yield  # pragma: no cover  makes it an iterator

    async def load(self, adapter: Adapter) -> None:
        raise InUseError(_NOT_RUNNING)

    async def unload(self, adapter_id: AdapterId) -> None: ...

    def loaded(self) -> frozenset[AdapterId]:
        return frozenset()

    async def route(self, model: str, episode_id: EpisodeId) -> Route:
        raise InUseError(_NOT_RUNNING)


def ask(config: Config, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
    """One request to the routes. ConfigError where the data directory holds no records."""
    open_config = replace(config, server=replace(config.server, api_key=""))
    with _existing(config) as store:
        admin = Administration(open_config, store, loop=lambda: {"state": "off", "restarts": 0}, turn_to=lambda: None)
        kept = open_admin(config, store) if path.startswith("/v1/memory") else None  # it takes a while to read
        app = build_app(
            engine=_Absent(), store=store, router=_Absent(), config=open_config, admin=admin, memory_admin=kept
        )

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                return await client.request(method, path, json=body)

        return asyncio.run(send())


def newest_feedback(config: Config, limit: int) -> list[dict[str, Any]]:
    """Every revision counts, newest first. ConfigError where the data directory holds no records."""
    with _existing(config) as store:
        return [report.feedback_row(f) for _, f in store.newest(Feedback, limit=limit)]


def audit_queue(config: Config, limit: int) -> list[dict[str, Any]]:
    """The episodes whose audited label would help most, each with its last response and what is believed of it.
    ConfigError where the data directory holds no records."""
    with _existing(config) as store:
        judge, _ = compose.build_judges(config, store, read_only=True)
        judge.follow(store.end())
        silent = unheard(store, limit) if config.reward.silence_s else []
        rows = []
        for wanted in in_turns(queue(judge, limit), silent)[:limit]:
            last = store.newest(Step, episode_id=wanted.episode_id)
            rows.append(
                {
                    "episode": wanted.episode_id,
                    "response": last[0][1].id if last else None,
                    "good": wanted.good,
                    "why": wanted.why,
                    "answer": last[0][1].text if last else "",
                }
            )
        return rows


def evaluation(config: Config, suite: Path, adapter_id: str, against: str | None) -> dict[str, Any]:
    """The suite gate's verdict on one adapter against another (the live one), by an engine made for it."""
    from gradatim.app.answering import Answers
    from gradatim.release.suite import SuiteGate, load_suite

    cases = load_suite(suite)
    with _existing(config) as store:
        base = compose.build_base(config)
        compose.register_base(store, config, base.sha256)
        other = against or report.live_id(store, config.name) or f"{config.name}@0"
        subject, reference, anchor = (_adapter(store, a) for a in (adapter_id, other, f"{config.name}@0"))
        with closing(compose.build_engine(config, base)) as engine:
            verdict = SuiteGate(cases, Answers(engine), config.gate).check(subject, reference, anchor)
    return {
        "adapter": verdict.adapter_id,
        "against": other,
        "decision": verdict.decision.value,
        "reason": verdict.reason,
        **verdict.evidence,
    }


def consolidation(config: Config, *, undo: bool = False) -> dict[str, Any]:
    """What the live adapter knows of what is remembered is retired, or all of that is taken back; a server that runs
    follows within seconds. ConfigError where the data directory holds no records."""
    with _existing(config) as store:
        if undo:
            from gradatim.memory.consolidate import undo as take_back
            from gradatim.store import SqlShelf

            return take_back(SqlShelf(store.engines), store, config.name)
        base = compose.build_base(config)
        compose.register_base(store, config, base.sha256)
        return compose.build_consolidation(config, store, base).run()


def _adapter(store: SqlStore, adapter_id: str) -> Adapter:
    for _, adapter in store.newest(Adapter, id=adapter_id):
        return adapter
    raise UnknownAdapterError(f"no adapter {adapter_id}: see `gradatim adapters list`")


def audit(config: Config, head: str) -> dict[str, Any]:
    """What a check of the chain of decisions found."""
    with _existing(config) as store, store.engines.read.begin() as connection:
        found = chain.check(connection, head)
    return {**asdict(found), "problems": list(found.problems)}


def decisions(config: Config) -> Iterator[str]:
    """Every chained decision as a line of JSON, oldest first."""
    with _existing(config) as store, store.engines.read.begin() as connection:
        for position, content, hashed in chain.entries(connection):
            yield json.dumps({"position": position, "decision": json.loads(content), "hash": hashed})


def _existing(config: Config) -> SqlStore:
    if not config.database and not Home(config.data_dir).exists():
        raise ConfigError(
            f"{config.data_dir} holds no records yet: start `gradatim serve` on it, or name another with --data-dir"
        )
    return compose.build_store(config)
