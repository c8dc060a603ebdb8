"""Feedback from Python: what an agent's code says of its answers, sent so that nothing is lost or counted twice.

    from gradatim.client import Gradatim

    gradatim = Gradatim("http://127.0.0.1:8080")
    gradatim.score(answer.id, -1, comment="the tone is off")
    gradatim.correct(answer.id, "click 3")
    llm = OpenAI(base_url=gradatim.base_url, default_headers=gradatim.headers)
    with gradatim.episode() as episode:  # every call of llm in here belongs to it
        ...
        episode.outcome(True)

Each opinion is sent under an id, the same one in every attempt, so a retry after a lost answer changes nothing. What
it returns is that id: send another opinion of the same kind and target under it to revise the first, or ``retract`` it.
``AsyncGradatim`` has the same methods, to be awaited. Knows nothing of models; imports httpx and no torch.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import random
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar, cast
from urllib.parse import quote

import httpx

from gradatim.errors import FeedbackError

SESSION = "X-Session-Id"
RESPONSES = ("chatcmpl-", "cmpl-")  # ids that begin so are of responses; others are of episodes
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_PAUSE_S = 20.0
_episode: ContextVar[str] = ContextVar("gradatim_episode", default="")

Sent = TypeVar("Sent")  # an id, or what is awaited for one
F = TypeVar("F", bound=Callable[..., Any])


class HasId(Protocol):
    """A response of any OpenAI client."""

    id: str


def current_episode() -> str:
    """The id of the innermost ``episode()`` block that this code runs in; empty outside of one."""
    return _episode.get()


class EpisodeHeaders(Mapping[str, str]):
    """The headers of the episode that is current when they are read; none outside of one."""

    def __getitem__(self, name: str) -> str:
        if name == SESSION and (episode := current_episode()):
            return episode
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter((SESSION,) if current_episode() else ())

    def __len__(self) -> int:
        return 1 if current_episode() else 0

    def __bool__(self) -> bool:
        return True  # a client that is made outside of an episode must not take it for nothing


@dataclass(frozen=True, slots=True)
class _Call:
    """One request, the same in every attempt."""

    method: str
    path: str
    body: dict[str, Any] | None
    id: str


class Opinions(ABC, Generic[Sent]):
    """One method for each kind of feedback.

    ``target`` is a response (the client's object or its id) or an episode's id. Every method takes, by name:
    ``source`` ("human:alice"; default: that of the client), ``confidence`` in (0, 1], ``comment``, ``tags``, ``id``.
    """

    def __init__(self, *, source: str) -> None:
        self._source = source

    def score(self, target: str | HasId, value: float | bool, **more: Any) -> Sent:
        """How good it was: -1 to 1, or a boolean."""
        return self._say("score", {**_about(target), "value": value}, more)

    def prefer(self, chosen: str | HasId, rejected: str | HasId, **more: Any) -> Sent:
        """One answer over another to the same prompt."""
        return self._say("preference", {"chosen_id": _id(chosen), "rejected_id": _id(rejected)}, more)

    def correct(self, response: str | HasId, correction: str, **more: Any) -> Sent:
        """The whole better answer."""
        return self._say("correction", {"response_id": _id(response), "correction": correction}, more)

    def outcome(self, target: str | HasId, value: bool | None, **more: Any) -> Sent:
        """How the task ended; None where nobody knows."""
        return self._say("outcome", {**_about(target), "value": value}, more)

    def comment(self, target: str | HasId, comment: str, **more: Any) -> Sent:
        """What was wrong with it, or how to do better, in words."""
        return self._say("comment", {**_about(target), "comment": comment}, more)

    def retract(self, feedback_id: str) -> Sent:
        """Take an opinion back. Twice is as good as once."""
        return self._send(_Call("DELETE", f"/v1/feedback/{quote(feedback_id, safe='')}", None, feedback_id))

    def _say(self, kind: str, body: dict[str, Any], more: dict[str, Any]) -> Sent:
        if unknown := more.keys() - {"source", "confidence", "comment", "tags", "id"}:
            raise TypeError(f"unexpected argument: {', '.join(sorted(unknown))}")
        sent_id = more.pop("id", None) or f"fb-{uuid.uuid4().hex}"
        given = {name: value for name, value in more.items() if value is not None}
        whole = {"source": self._source, **given, **body, "kind": kind, "id": sent_id}
        return self._send(_Call("POST", "/v1/feedback", whole, sent_id))

    @abstractmethod
    def _send(self, call: _Call) -> Sent:
        """Until it is recorded. FeedbackError."""


class Episode(Generic[Sent]):
    """One task: a name for all the calls that were made for it, and the opinions on it as a whole."""

    def __init__(self, opinions: Opinions[Sent], episode_id: str, url: str) -> None:
        self._opinions = opinions
        self.id = episode_id
        self.base_url = f"{url}/sessions/{episode_id}/v1"  # for a client that can be given nothing but a base_url
        self.headers = {SESSION: episode_id}  # for one that can be given headers

    def score(self, value: float | bool, **more: Any) -> Sent:
        return self._opinions.score(self.id, value, **more)

    def outcome(self, value: bool | None, **more: Any) -> Sent:
        return self._opinions.outcome(self.id, value, **more)

    def comment(self, comment: str, **more: Any) -> Sent:
        return self._opinions.comment(self.id, comment, **more)


class _Episodes(Opinions[Sent]):
    """What both clients are, whichever way they send."""

    def __init__(self, url: str, *, source: str, retries: int) -> None:
        super().__init__(source=source)
        self.url = url.rstrip("/").removesuffix("/v1")
        self.base_url = f"{self.url}/v1"  # for an OpenAI client
        self.headers: Mapping[str, str] = EpisodeHeaders()  # its ``default_headers``: calls join the current episode
        self._retries = retries

    @contextmanager
    def episode(self, episode_id: str = "") -> Iterator[Episode[Sent]]:
        """Group the calls that are made inside into one episode, under a new id or the given one. A plain ``with``,
        in async code too; blocks in other tasks and threads have episodes of their own."""
        episode = Episode(self, episode_id or f"ep-{uuid.uuid4().hex}", self.url)
        token = _episode.set(episode.id)
        try:
            yield episode
        finally:
            _episode.reset(token)

    def in_episode(self, function: F) -> F:
        """Decorator, for a plain or an async function: every call of it is an episode of its own. In it,
        ``current_episode()`` is the id."""
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                with self.episode():
                    return await function(*args, **kwargs)

            return cast(F, awaited)

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with self.episode():
                return function(*args, **kwargs)

        return cast(F, called)


class Gradatim(_Episodes[str]):
    """A client of one server. Safe to use from any thread; close it, or use it in a ``with`` statement.

    ``url``: with or without ``/v1``. ``api_key``: GRADATIM_API_KEY where none is given. ``retries``: further attempts
    after a lost connection, a timeout, 408, 429 or a 5xx. FeedbackError where the server refuses, or never answers.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        *,
        api_key: str | None = None,
        source: str = "human",
        retries: int = 5,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, source=source, retries=retries)
        self._http = httpx.Client(
            base_url=self.url, headers=_key(api_key), timeout=timeout_s, transport=transport, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _send(self, call: _Call) -> str:
        for attempt in range(self._retries + 1):
            answer: httpx.Response | httpx.TransportError
            try:
                answer = self._http.request(call.method, call.path, json=call.body)
            except httpx.TransportError as e:
                answer = e
            pause_s = _judged(answer, attempt, self._retries)
            if pause_s is None:
                break
            time.sleep(pause_s)
        return call.id


class AsyncGradatim(_Episodes[Awaitable[str]]):
    """The same for async code: ``await client.score(...)``, ``async with AsyncGradatim(...) as client``."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        *,
        api_key: str | None = None,
        source: str = "human",
        retries: int = 5,
        timeout_s: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, source=source, retries=retries)
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=_key(api_key), timeout=timeout_s, transport=transport, trust_env=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def _send(self, call: _Call) -> str:
        for attempt in range(self._retries + 1):
            answer: httpx.Response | httpx.TransportError
            try:
                answer = await self._http.request(call.method, call.path, json=call.body)
            except httpx.TransportError as e:
                answer = e
            pause_s = _judged(answer, attempt, self._retries)
            if pause_s is None:
                break
            await asyncio.sleep(pause_s)
        return call.id


def _key(api_key: str | None) -> dict[str, str]:
    key = os.environ.get("GRADATIM_API_KEY", "") if api_key is None else api_key
    return {"Authorization": f"Bearer {key}"} if key else {}


def _id(target: str | HasId) -> str:
    return target if isinstance(target, str) else target.id


def _about(target: str | HasId) -> dict[str, str]:
    found = _id(target)
    return {"response_id" if found.startswith(RESPONSES) else "episode_id": found}


def _judged(answer: httpx.Response | httpx.TransportError, attempt: int, retries: int) -> float | None:
    """None when it is recorded; else how long to wait, in seconds, before it is sent again. FeedbackError."""
    if isinstance(answer, httpx.Response) and answer.is_success:
        return None
    if attempt == retries or (isinstance(answer, httpx.Response) and answer.status_code not in _AGAIN):
        raise _refused(answer)
    after = answer.headers.get("retry-after", "") if isinstance(answer, httpx.Response) else ""
    at_least = float(after) if after.isascii() and after.isdigit() else 0.0
    backoff_s = random.uniform(0.5, 1.0) * 0.25 * 2.0**attempt
    return min(max(at_least, backoff_s), _LONGEST_PAUSE_S)


def _refused(answer: httpx.Response | httpx.TransportError) -> FeedbackError:
    if isinstance(answer, httpx.TransportError):
        return FeedbackError(f"the server cannot be reached: {type(answer).__name__}: {answer}")
    try:
        error = answer.json()["error"]
        message, param = str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):  # not our server: a proxy before it
        message, param = answer.reason_phrase, None
    return FeedbackError(f"{answer.status_code}: {message}", status=answer.status_code, param=param)
