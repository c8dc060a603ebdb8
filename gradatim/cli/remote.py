"""Whom the command line asks: the server that runs on the data directory, over HTTP, or its routes in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from gradatim.app.home import Home
from gradatim.config import Config
from gradatim.errors import ConflictError, GradatimError, InUseError, StoreError

_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Routes:
    """The HTTP routes of a data directory. ``url`` is None where no server runs."""

    config: Config
    url: str | None

    def get(self, path: str) -> Any:
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._ask("POST", path, body)

    def delete(self, path: str) -> Any:
        return self._ask("DELETE", path, None)

    def readiness(self) -> Mapping[str, str] | None:
        """What the server says of its own parts; its ``status`` is ok where it would answer and record a request now.
        None where no server runs or it does not answer."""
        if self.url is None:
            return None
        try:
            said = httpx.get(self.url + "/readyz", timeout=5.0, trust_env=False).json()
        except (httpx.HTTPError, ValueError):
            return None
        return {str(k): str(v) for k, v in said.items()} if isinstance(said, dict) else None

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """The answer's JSON. StoreError, ConflictError or InUseError in the server's own words."""
        answer = self._offline(method, path, body) if self.url is None else self._online(method, path, body)
        if answer.is_success:
            return answer.json()
        raise _error(answer)

    def _offline(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        from gradatim.app.offline import ask

        return ask(self.config, method, path, body)

    def _online(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        key = self.config.server.api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            return httpx.request(
                method, f"{self.url}{path}", json=body, headers=headers, timeout=_TIMEOUT_S, trust_env=False
            )
        except httpx.HTTPError as e:
            raise InUseError(f"the server at {self.url} does not answer ({e}): see `gradatim doctor`") from e


def _error(answer: httpx.Response) -> GradatimError:
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {answer.status_code}"
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        message += "; set GRADATIM_API_KEY to the server's key"
    return ConflictError(message) if answer.status_code == httpx.codes.CONFLICT else StoreError(message)


def routes(config: Config) -> Routes:
    """The server that runs on this data directory and listens, or its routes without one."""
    return Routes(config, Home(config.data_dir).server_url())
