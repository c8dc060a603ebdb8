"""What the demo uses of a gradatim server beyond OpenAI's API: every field name of the wire stands here, once.

`Wire` posts feedback and reads adapters and status over HTTP, and counts every request that failed. It retries
nothing: a failed request is a finding. It does not know why anything is posted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
from openai.types.chat import ChatCompletion

SESSION_HEADER = "X-Session-Id"
TURN_HEADER = "X-Turn-Type"
SIDE = "side"


@dataclass(frozen=True, slots=True)
class Served:
    """Who gave an answer: the exact adapter, and the episode it was filed under."""

    response_id: str
    episode_id: str
    adapter: str
    adapter_sha256: str


def served(response: ChatCompletion) -> Served:
    """Reads the `gradatim` object of a response."""
    extra: Mapping[str, Any] = (response.model_extra or {}).get("gradatim") or {}
    return Served(
        response_id=response.id,
        episode_id=str(extra.get("episode_id", "")),
        adapter=str(extra.get("adapter", "")),
        adapter_sha256=str(extra.get("adapter_sha256", "")),
    )


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One adapter as the server lists it. ``made_of`` counts its examples by kind."""

    id: str
    stage: str
    step: int
    parent: str | None
    created_at: float
    n_examples: int = 0
    made_of: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    refused_because: str = ""
    verdicts: tuple[Mapping[str, Any], ...] = ()

    @staticmethod
    def read(entry: Mapping[str, Any]) -> AdapterInfo:
        update: Mapping[str, Any] = entry.get("update") or {}
        return AdapterInfo(
            id=str(entry["id"]),
            stage=str(entry.get("stage", "")),
            step=int(entry.get("step", 0)),
            parent=entry.get("parent"),
            created_at=float(entry.get("created_at") or 0.0),
            n_examples=int(update.get("n_examples", 0)),
            made_of=update.get("kinds") or {},
            metrics=update.get("metrics") or {},
            refused_because=str(update.get("refused_because", "")),
            verdicts=tuple(entry.get("verdicts") or ()),
        )


@dataclass(frozen=True, slots=True)
class Status:
    """How far the learning loop is."""

    live: str
    waiting_feedback: int
    waiting_examples: int
    updates_applied: int
    updates_refused: int
    learning: bool
    feedback_to_live_s: tuple[float, ...] = ()

    @staticmethod
    def read(body: Mapping[str, Any]) -> Status:
        return Status(
            live=str(body.get("live") or ""),
            waiting_feedback=int(body.get("waiting_feedback", 0)),
            waiting_examples=int(body.get("waiting_examples", 0)),
            updates_applied=int(body.get("updates_applied", 0)),
            updates_refused=int(body.get("updates_refused", 0)),
            learning=bool(body.get("learning", False)),
            feedback_to_live_s=tuple(float(s) for s in body.get("feedback_to_live_s") or ()),
        )


class FeedbackSink(Protocol):
    """Where an episode's feedback goes."""

    def correction(self, response_id: str, correction: str) -> None: ...
    def outcome(self, episode_id: str, value: bool) -> None: ...


class Traffic:
    """Counts requests and keeps the failures; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests = 0
        self.failures: list[str] = []
        self.latencies_s: list[float] = []

    def succeeded(self, latency_s: float) -> None:
        with self._lock:
            self.requests += 1
            self.latencies_s.append(latency_s)

    def failed(self, what: str) -> None:
        with self._lock:
            self.requests += 1
            self.failures.append(what)


class Wire:
    """The gradatim side of a server at ``base_url`` (which ends in ``/v1``, as the openai client wants it)."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str = "",
        traffic: Traffic | None = None,
        person: str = "human:operator",
        critic: str = "critic:miniwob",
        timeout_s: float = 60.0,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=timeout_s)
        self.traffic = traffic or Traffic()
        self._person = person
        self._critic = critic

    def correction(self, response_id: str, correction: str) -> None:
        """A person says what the answer should have been."""
        self._feedback(response_id=response_id, kind="correction", correction=correction, source=self._person)

    def outcome(self, episode_id: str, value: bool) -> None:
        """The task's own grader says whether the episode reached its goal."""
        self._feedback(episode_id=episode_id, kind="outcome", value=value, source=self._critic)

    def adapters(self) -> tuple[list[AdapterInfo], str]:
        """All adapters, oldest first, and the id of the live one."""
        body = self._call("GET", "/adapters")
        infos = sorted((AdapterInfo.read(entry) for entry in body["data"]), key=lambda a: (a.step, a.created_at))
        return infos, str(body.get("live") or "")

    def rollback(self, adapter_id: str) -> None:
        """Makes an earlier adapter live again."""
        self._call("POST", f"/adapters/{adapter_id}/rollback")

    def status(self) -> Status:
        return Status.read(self._call("GET", "/status"))

    def close(self) -> None:
        self._http.close()

    def _feedback(self, **body: Any) -> None:
        self._call("POST", "/feedback", body)

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        started = time.monotonic()
        try:
            response = self._http.request(method, path, json=body)
            response.raise_for_status()
        except httpx.HTTPStatusError as error:
            self.traffic.failed(f"{method} {path}: {error.response.status_code} {error.response.text[:200]}")
            raise
        except httpx.HTTPError as error:
            self.traffic.failed(f"{method} {path}: {type(error).__name__} {error}")
            raise
        self.traffic.succeeded(time.monotonic() - started)
        answer: Mapping[str, Any] = response.json() if response.content else {}
        return answer
