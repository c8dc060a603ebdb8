"""The loop process beside a server (``follow``), and one turn of the same loop by hand (``once``).

Either holds the loop's lock, so that one data directory never learns twice at a time. A turn that fails is logged,
shown and tried again later; it never touches serving.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradatim import config as configuration
from gradatim.app import compose, report
from gradatim.app.figures import Sayer
from gradatim.app.home import Home
from gradatim.app.states import OptimiserStates
from gradatim.app.supervisor import die_with_parent, step_back
from gradatim.config import Config
from gradatim.errors import GradatimError, StoreError
from gradatim.loop import JUDGED

if TYPE_CHECKING:
    from gradatim.feedback.critique import Critique
    from gradatim.release.drift import Drift
    from gradatim.release.proxy import ProxyWatch

log = logging.getLogger(__name__)

_HEARTBEAT_S = 2.0
_LONGEST_PAUSE_S = 60.0


def handover(config: Config, parent_pid: int) -> bytes:
    """What the server tells its loop process over stdin; never in its arguments, and without the API key."""
    plain = asdict(replace(config, server=replace(config.server, api_key="")))
    return json.dumps({"parent": parent_pid, "config": plain}, default=str).encode()


def take_over() -> Config:
    """The other end of ``handover``; binds this process's life to the server's."""
    told = json.loads(sys.stdin.buffer.read())
    die_with_parent(told["parent"])
    return configuration.load(overrides=told["config"], env={})


def follow(config: Config) -> None:
    """Learn for as long as the server lives."""
    step_back()
    home = Home(Path(config.data_dir))
    with home.lock("loop", wait_s=10.0):  # of the loop before, should it still be dying
        home.say("loop", {"state": "starting"})
        base = compose.build_base(config)
        with compose.build_store(config) as store, store.exclusive("loop", wait_s=10.0):
            judges = compose.build_judges(config, store, base)
            judges[0].follow(store.cursor(JUDGED))
            say_figures = Sayer(store, home, judges[0])
            say_figures()
            drift = compose.build_drift(config, store)
            loop = compose.build_loop(config, store, base, judges, drift)
            tidy: list[Callable[[], object]] = [OptimiserStates(store, config), say_figures]
            if config.memory.consolidate:
                tidy.append(compose.build_consolidation(config, store, base).turn)
            turn = tidily(loop.turn, *tidy)
            critique, proxy = compose.build_critique(config, store), compose.build_proxy(config, store)
            for watch in (drift, proxy):
                turn = together(turn, watch.turn) if watch is not None else turn
            if critique is not None:  # in a thread: it waits for others, and learning must not wait for it
                threading.Thread(target=judge_for_ever, args=(critique, config.loop.poll_s), daemon=True).start()
            turn_for_ever(turn, home, config.loop.poll_s, beside=lambda: _beside(critique, drift, proxy))


def _beside(critique: Critique | None, drift: Drift | None, proxy: ProxyWatch | None) -> Mapping[str, Any]:
    """What runs beside the loop, as it says itself."""
    told = {
        "critics": critique.status() if critique else {},
        "drift": drift.describe() if drift else {},
        "proxy": proxy.describe() if proxy else {},
    }
    return {name: facts for name, facts in told.items() if facts}


def judge_for_ever(critique: Critique, poll_s: float) -> None:
    """Critics beside the loop; what fails is logged and tried again."""
    failures = 0
    while True:
        try:
            failures, pause_s = 0, 0.0 if critique.turn() else poll_s
        except Exception as e:  # noqa: BLE001  the boundary of what others wrote: logged, shown, and tried again
            failures += 1
            pause_s = min(2.0**failures, _LONGEST_PAUSE_S)
            log.error("the critics failed: %s", e if isinstance(e, GradatimError) else type(e).__name__)
        time.sleep(pause_s)


def tidily(turn: Callable[[], bool], *tidy: Callable[[], object]) -> Callable[[], bool]:
    """The same turn, and, where it changed anything, what is to be done after it."""

    def turned() -> bool:
        worked = turn()
        if worked:
            for step in tidy:
                step()
        return worked

    return turned


def together(first: Callable[[], bool], second: Callable[[], bool]) -> Callable[[], bool]:
    """One turn of each; whether either did anything."""

    def turned() -> bool:
        worked = first()
        return second() or worked

    return turned


def turn_for_ever(
    turn: Callable[[], bool], home: Home, poll_s: float, *, beside: Callable[[], Mapping[str, Any]] = dict
) -> None:
    """``beside``: what else to say."""
    turns = failures = 0
    said_at = 0.0
    facts: Mapping[str, Any] = {}
    while True:
        try:
            worked = turn()
            turns, failures, pause_s = turns + worked, 0, 0.0 if worked else poll_s
            facts = {"state": "working" if worked else "idle", "turns": turns}
        except GradatimError as e:
            failures += 1
            log.error("a turn of the loop failed: %s", e, exc_info=not isinstance(e, StoreError))
            worked, pause_s = True, min(2.0**failures, _LONGEST_PAUSE_S)
            facts = {"state": "failing", "turns": turns, "failures": failures, "error": str(e)}
        if worked or time.monotonic() - said_at > _HEARTBEAT_S:
            home.say("loop", {**facts, **beside()})
            said_at = time.monotonic()
        time.sleep(pause_s)


def once(config: Config) -> dict[str, Any]:
    """Judge everything, make one update and let the gates decide on it. InUseError while a loop process runs.

    Returns ``{"update", "verdicts", "stage"}``; the update is None when there was nothing to learn from.
    """
    home = Home(Path(config.data_dir))
    home.prepare()
    with home.lock("loop"):
        base = compose.build_base(config)
        with compose.build_store(config) as store, store.exclusive("loop"):
            compose.register_base(store, config, base.sha256)
            before = store.end()
            judges = compose.build_judges(config, store, base)
            drift = compose.build_drift(config, store)
            loop = compose.build_loop(config, store, base, judges, drift)
            if (critique := compose.build_critique(config, store)) is not None:
                with contextlib.closing(critique):
                    critique.turn(flush=True)
            while loop.turn(flush=True):
                made = report.decision(store, config.name, before)
                if made["update"] is not None and made["stage"] != "candidate":
                    break
            for watch in (drift, compose.build_proxy(config, store)):
                while watch is not None and watch.turn():
                    pass
            Sayer(store, home, judges[0])()
            if config.memory.consolidate:
                compose.build_consolidation(config, store, base).turn()
            return report.decision(store, config.name, before)
