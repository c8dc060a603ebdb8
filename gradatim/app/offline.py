"""The server's answers without a server: the same routes, in this process, over the data directory's store.

For the command line where nothing listens. There is no engine, so whatever needs one is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import httpx

from gradatim.app import compose, report
from gradatim.app.administration import Administration
from gradatim.app.home import Home
from gradatim.app.memory import open_kept
from gradatim.config import Config
from gradatim.errors import ConfigError, InUseError
from gradatim.reward import AuditedReward, queue
from gradatim.server import build_app
from gradatim.store import SqlStore
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
        kept = open_kept(config, store) if path.startswith("/v1/memory") else None  # it takes a while to read
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
        judge = AuditedReward(store, config.reward, read_only=True)
        judge.follow(store.end())
        rows = []
        for wanted in queue(judge, limit):
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


def _existing(config: Config) -> SqlStore:
    if not config.database and not Home(config.data_dir).exists():
        raise ConfigError(
            f"{config.data_dir} holds no records yet: start `gradatim serve` on it, or name another with --data-dir"
        )
    return compose.build_store(config)
