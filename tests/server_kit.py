"""What the tests of the server share: an app on fakes, and a real HTTP server around one."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette

from gradatim.config import Config, ServerConfig
from gradatim.errors import TransitionError
from gradatim.protocols import Store
from gradatim.server import build_app
from gradatim.testing.fakes import FakeEngine, FakeRouter, FakeStore
from gradatim.types import AdapterId

BASE = "http://gradatim.test"


class FakeAdmin:
    """Two adapters, of which agent@1 can be rolled back once."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str, str]] = []
        self._live = "agent@1"

    def adapters(self) -> Sequence[Mapping[str, Any]]:
        return [
            {"id": f"agent@{step}", "stage": "live" if self._live == f"agent@{step}" else "retired", "step": step}
            | {"parent": f"agent@{step - 1}" if step else None, "created_at": 1.0, "update": None, "verdicts": []}
            for step in (0, 1)
        ]

    def adapter(self, adapter_id: AdapterId) -> Mapping[str, Any] | None:
        return next((row for row in self.adapters() if row["id"] == adapter_id), None)

    def live(self) -> AdapterId | None:
        return AdapterId(self._live)

    def rollback(self, adapter_id: AdapterId, *, actor: str, reason: str) -> Mapping[str, Any]:
        if self._live != adapter_id or adapter_id == "agent@0":
            raise TransitionError(f"{adapter_id} is not live")
        self.calls.append(("rollback", adapter_id, actor, reason))
        self._live = "agent@0"
        return {"live": self._live}

    def promote(self, adapter_id: AdapterId, *, actor: str, reason: str) -> Mapping[str, Any]:
        self.calls.append(("promote", adapter_id, actor, reason))
        self._live = adapter_id
        return {"live": self._live}

    def approve(self, adapter_id: AdapterId, *, actor: str, reason: str) -> Mapping[str, Any]:
        self.calls.append(("approve", adapter_id, actor, reason))
        return {"anchor": adapter_id}

    def reject(self, adapter_id: AdapterId, *, actor: str, reason: str) -> Mapping[str, Any]:
        raise TransitionError(f"{adapter_id} is not on its way up")

    def status(self) -> Mapping[str, Any]:
        return {"learning": True, "ratio": float("nan")}


@dataclass
class Kit:
    """An app, and the fakes behind it."""

    engine: FakeEngine = field(default_factory=FakeEngine)
    store: Store = field(default_factory=FakeStore)
    router: FakeRouter = field(default_factory=FakeRouter)
    admin: FakeAdmin = field(default_factory=FakeAdmin)
    config: Config = field(default_factory=Config)

    def app(self) -> Starlette:
        return build_app(engine=self.engine, store=self.store, router=self.router, config=self.config, admin=self.admin)

    def client(self, **headers: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app()), base_url=BASE, headers=headers)


def with_key(key: str, **server: Any) -> Config:
    return Config(server=ServerConfig(api_key=key, **server))


def chat(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "agent", "messages": [{"role": "user", "content": text}], **fields}


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The app behind a real server on a free port; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", ws="none", lifespan="off", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def until(condition: Any, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
