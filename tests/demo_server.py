"""A scripted stand-in for a gradatim server, for the tests of the demo: no model, real HTTP.

The frozen model clicks 1 whatever it sees. An adapter acts like the expert on the skills it was taught, and on
anything with the same words once three right corrections of a skill have come in. Wrong corrections make an adapter
that is rejected.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gradatim.demo.tasks import Element, Page, right_actions

TAUGHT_AFTER = 3
_ELEMENT = re.compile(r"\d+ (field|button) ?(.*?)(?: ?= (\S+))?")


def read_page(observation: str) -> Page:
    """The page back from its text."""
    lines = observation.split("\n")
    dialog = lines[2].removeprefix("Dialog: ") if lines[2].startswith("Dialog:") else ""
    elements = []
    for line in lines[2:]:
        if match := _ELEMENT.fullmatch(line):
            elements.append(Element("field" if match[1] == "field" else "button", match[2] or "", match[3] or ""))
    return Page(lines[0].removeprefix("Task: "), tuple(elements), dialog)


@dataclass
class FakeServer:
    """State and routes. ``fail_every`` makes every n-th completion a 500."""

    fail_every: int = 0
    taught: dict[int, frozenset[str]] = field(default_factory=lambda: {0: frozenset()})
    adapters: list[dict[str, Any]] = field(default_factory=list)
    live: int = 0
    corrections: dict[str, int] = field(default_factory=dict)
    feedback: list[dict[str, Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    _shown: dict[str, tuple[str, str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/v1/feedback", self.accept, methods=["POST"]),
                Route("/v1/adapters", self.list_adapters),
                Route("/v1/adapters/{id}/rollback", self.roll_back, methods=["POST"]),
                Route("/v1/status", self.status),
            ]
        )

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        with self._lock:
            return self._complete(body, request.headers.get("x-session-id", ""), request.headers.get("x-turn-type"))

    def _complete(self, body: dict[str, Any], session: str, turn: str | None) -> Response:
        number = len(self.asked)
        self.asked.append(body | {"session": session, "turn": turn})
        if self.fail_every and number % self.fail_every == self.fail_every - 1:
            return JSONResponse({"error": {"message": "scripted failure", "type": "server_error"}}, status_code=500)
        name, _, pinned = body["model"].partition("@")
        step = int(pinned) if pinned else self.live
        observation = body["messages"][-1]["content"]
        page = read_page(observation)
        skill = body["metadata"]["skill"]
        text = right_actions(page)[0] if self._knows(step, skill, page) else "click 1"
        response_id = f"chatcmpl-{number}"
        self._shown[response_id] = (skill, observation)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return JSONResponse(
            {
                "id": response_id,
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [choice],
                "gradatim": {
                    "episode_id": session,
                    "adapter": f"{name}@{step}",
                    "adapter_sha256": "00",
                    "stage": "live",
                },
            }
        )

    def _knows(self, step: int, skill: str, page: Page) -> bool:
        taught = self.taught[step]
        return skill in taught or (skill == "login-user-popup" and "login-user" in taught and not page.dialog)

    async def accept(self, request: Request) -> Response:
        body = await request.json()
        with self._lock:
            self.feedback.append(body)
            if body["kind"] == "correction":
                self._learn(body["response_id"], body["correction"])
        return JSONResponse({"id": f"fb-{len(self.feedback)}"}, status_code=202)

    def _learn(self, response_id: str, correction: str) -> None:
        skill, observation = self._shown[response_id]
        if correction not in right_actions(read_page(observation)):
            self._add("rejected", self.taught[self.live])
            return
        self.corrections[skill] = self.corrections.get(skill, 0) + 1
        if self.corrections[skill] == TAUGHT_AFTER:
            parent = self.live
            self._add("live", self.taught[parent] | {skill})
            self.live = self.adapters[-1]["step"]

    def _add(self, stage: str, taught: frozenset[str]) -> None:
        for adapter in self.adapters:
            if stage == "live" and adapter["stage"] == "live":
                adapter["stage"] = "retired"
        step = len(self.adapters) + 1
        self.taught[step] = taught
        verdict = {"gate": "regression", "decision": "pass" if stage == "live" else "fail", "reason": "scripted"}
        self.adapters.append(
            {
                "id": f"agent@{step}",
                "stage": stage,
                "step": step,
                "parent": f"agent@{self.live}",
                "created_at": time.time(),
                "update": {
                    "n_examples": 3,
                    "kinds": {"correction": 3},
                    "metrics": {"loss": 0.5},
                    "refused_because": "",
                },
                "verdicts": [verdict],
            }
        )

    async def list_adapters(self, request: Request) -> Response:
        return JSONResponse({"data": self.adapters, "live": f"agent@{self.live}"})

    async def roll_back(self, request: Request) -> Response:
        self.live = int(request.path_params["id"].partition("@")[2])
        return JSONResponse({"live": f"agent@{self.live}"})

    async def status(self, request: Request) -> Response:
        counts = {"waiting_feedback": 0, "waiting_examples": 0, "updates_applied": len(self.adapters)}
        more = {"updates_refused": 0, "learning": False, "feedback_to_live_s": [1.0, 2.5]}
        return Response(json.dumps({"live": f"agent@{self.live}"} | counts | more), media_type="application/json")


@contextmanager
def serving(server: FakeServer) -> Iterator[str]:
    """Runs it on a free port; yields the base_url."""
    config = uvicorn.Config(
        server.app(),
        host="127.0.0.1",
        port=0,
        log_level="warning",
        lifespan="off",
        ws="none",
        timeout_keep_alive=60,  # longer than the client's five seconds, or an idle connection may close under a request
    )
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    port = runner.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        runner.should_exit = True
        thread.join(timeout=10)
