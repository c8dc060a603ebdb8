"""The server process of ``gradatim serve``: takes the directory and the port, builds the parts, answers until told.

Order matters: whatever can refuse does so before the model is loaded, and nothing listens before everything answers.
Knows no wire format and no tensors. SIGTERM and SIGINT let running streams finish, for a bounded time.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop
from prometheus_client import CollectorRegistry, Gauge

from gradatim.app import compose
from gradatim.app.administration import Administration
from gradatim.app.figures import show_reward
from gradatim.app.home import Home
from gradatim.app.learning import handover
from gradatim.app.memory import Remembering, build_memory, show_figures
from gradatim.app.supervisor import DIES_WITH, Supervisor, die_with_parent
from gradatim.config import Config
from gradatim.errors import AdapterError, ConfigError, InUseError, StoreError
from gradatim.release.drift import KINDS
from gradatim.release.traffic import Traffic, rollback
from gradatim.release.units import CLASSES
from gradatim.server import Metrics, build_app
from gradatim.store import Exclusive, SqlStore

if TYPE_CHECKING:
    from gradatim.engine.transformers import TransformersEngine

log = logging.getLogger(__name__)

FINISH_STREAMS_WITHIN_S = 20
_LOOK_EVERY_S = 5.0  # whether the database's lock is still ours
KEEP_ALIVE_S = 75  # well above the 5 s of httpx and the openai client, or a request may meet a closing connection
LOOP_COMMAND = (sys.executable, "-m", "gradatim", "learn", "--follow")


def check_exposure(config: Config) -> None:
    """Only loopback may be served without a key. ConfigError."""
    host = config.server.host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not config.server.api_key:
        raise ConfigError(
            f"{host} can be reached from other machines, and no API key is set: set GRADATIM_API_KEY, "
            "or serve on 127.0.0.1 (the default)"
        )


def take_port(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. InUseError, or ConfigError for an address that is not ours."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as e:
        raise ConfigError(f"--host {host}: {e.strerror}") from e
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except PermissionError as e:
        raise ConfigError(f"port {port} needs privileges this user lacks; choose one above 1023 with --port") from e
    except OSError as e:
        sock.close()
        raise InUseError(
            f"{host}:{port} cannot be served: {e.strerror}; stop what listens there, or choose another with --port"
        ) from e
    return sock


class _Uvicorn(uvicorn.Server):
    """Without the signal handlers that would end this process before the loop process was stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(config: Config, announce: Callable[[str], None]) -> None:
    """Until SIGTERM or SIGINT. ``announce`` is told the base URL (without ``/v1``) once requests are answered.

    Raises ConfigError, InUseError, ModelError or StoreError before anything listens.
    """
    if launcher := os.environ.get(DIES_WITH):
        die_with_parent(int(launcher))
    check_exposure(config)
    compose.check_critics(config)
    home = Home(Path(config.data_dir))
    home.prepare()
    with home.lock("server"), contextlib.closing(take_port(config.server.host, config.server.port)) as sock:
        compose.set_threads(compose.serving_threads(config))
        with contextlib.ExitStack() as held:
            store = held.enter_context(compose.build_store(config))
            alone = held.enter_context(store.exclusive("server"))
            base = compose.build_base(config)
            runner = held.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
            compose.register_base(store, config, base.sha256)
            engine = held.enter_context(contextlib.closing(compose.build_engine(config, base)))
            remembering = build_memory(config, store, base, engine)
            runner.run(_answer(config, home, store, alone, engine, remembering, sock, announce))


async def _answer(
    config: Config,
    home: Home,
    store: SqlStore,
    alone: Exclusive,
    engine: TransformersEngine,
    remembering: Remembering,
    sock: socket.socket,
    announce: Callable[[str], None],
) -> None:
    traffic = Traffic(store, engine, config)
    await first_refresh(traffic, store, config.name)
    supervisor = _supervisor(config, home) if config.learn else None
    here = asyncio.get_running_loop()
    admin = Administration(
        config,
        store,
        loop=lambda: loop_status(supervisor, home),
        turn_to=lambda: asyncio.run_coroutine_threadsafe(traffic.refresh(), here).result(),
    )
    metrics = _metrics(traffic, supervisor, home)
    show_figures(remembering, metrics.registry)
    show_reward(home, metrics.registry)
    app = build_app(
        engine=engine,
        store=store,
        router=traffic,
        config=config,
        admin=admin,
        metrics=metrics,
        memory=remembering.on,
        memory_admin=remembering.admin,
        sessions=remembering.sessions,
        prompter=remembering.prompter,
    )
    server = _Uvicorn(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=FINISH_STREAMS_WITHIN_S,
        )
    )
    for sig in (signal.SIGINT, signal.SIGTERM):
        here.add_signal_handler(sig, server.handle_exit, sig, None)
    work = {
        "traffic": traffic.watch(),
        "announce": _announce_when_ready(server, home, sock, announce),
        "database lock": stay_alone(alone),
    }
    if supervisor is not None:
        work["supervisor"] = supervisor.run()
    if remembering.follower is not None:
        work["memory"] = remembering.follower.watch()
    if remembering.sessions is not None:
        work["sessions"] = remembering.sessions.watch()
    tasks = [asyncio.create_task(coroutine, name=name) for name, coroutine in work.items()]
    for task in tasks:
        task.add_done_callback(lambda done: _end_with(done, server))
    try:
        await server.serve(sockets=[sock])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(remembering.close)


def loop_status(supervisor: Supervisor | None, home: Home) -> Mapping[str, Any]:
    """Whether the loop process lives, and what it last said of itself (``does``, ``turns``, ``error``)."""
    if supervisor is None:
        return {"state": "off", "restarts": 0}
    watched, said = supervisor.status(), home.said("loop")
    if watched["state"] != "running" or said.get("pid") != watched["pid"]:
        return {**watched, "does": "starting"}
    return {
        **watched,
        "does": said["state"],
        **{k: said[k] for k in ("turns", "failures", "error", "critics", "drift", "proxy") if k in said},
    }


def _metrics(traffic: Traffic, supervisor: Supervisor | None, home: Home) -> Metrics:
    metrics = Metrics()
    shown: Mapping[str, tuple[str, Callable[[], float]]] = {
        "gradatim_loop_up": ("1 while the loop process lives", lambda: float(bool(supervisor and supervisor.alive))),
        "gradatim_loop_restarts": ("of the loop process", lambda: supervisor.restarts if supervisor else 0),
        "gradatim_critics_unknown": (
            "episodes that a critic could not judge, in this life of the loop process",
            lambda: _unknown(home),
        ),
        "gradatim_failed_loads": ("adapters that could not be loaded", lambda: traffic.failed_loads),
    }
    for name, (help_text, read) in shown.items():
        Gauge(name, help_text, registry=metrics.registry).set_function(read)
    _show_drift(home, metrics.registry)
    for name, key in (("units", "units"), ("reward_slope", "reward_slope"), ("held_out_slope", "held_out_slope")):
        about = "the reward against held-out judges: episodes with both, and change of each with every adapter"
        gauge = Gauge(f"gradatim_proxy_{name}", about, registry=metrics.registry)
        gauge.set_function(partial(_proxy, home, key))
    return metrics


def _proxy(home: Home, key: str) -> float:
    value = home.said("loop").get("proxy", {}).get(key)
    return math.nan if value is None else float(value)


def _show_drift(home: Home, registry: CollectorRegistry) -> None:
    """What the loop process said last of what it sees change, and of the lift of learning."""

    def said(*path: str, default: float) -> Callable[[], float]:
        def read() -> float:
            at: Any = home.said("loop").get("drift", {})
            for name in path:
                at = at.get(name) or {}
            return float(at) if isinstance(at, int | float) else default

        return read

    found = Gauge("gradatim_drift", "what was seen to change, by what it is", ["what"], registry=registry)
    for kind in KINDS:
        found.labels(kind).set_function(said("changes", kind, default=0.0))
    lift = Gauge("gradatim_lift", "reward of learned adapters less the base's", ["source", "bound"], registry=registry)
    for source in CLASSES:
        for bound in ("lift", "low", "high"):
            lift.labels(source, bound).set_function(said("lift", source, bound, default=math.nan))


def _unknown(home: Home) -> float:
    return float(sum(counts["unknown"] for counts in home.said("loop").get("critics", {}).values()))


def _end_with(done: asyncio.Task[None], server: uvicorn.Server) -> None:
    """A part that ended by a fault takes the server down in good order, so that whoever watches it restarts it."""
    if not done.cancelled() and (fault := done.exception()) is not None:
        log.critical("%s ended", done.get_name(), exc_info=fault)
        server.should_exit = True


async def stay_alone(alone: Exclusive, every_s: float = _LOOK_EVERY_S) -> None:
    """Until the database is found in the hands of another server: InUseError."""
    while alone.needed:
        await asyncio.sleep(every_s)
        try:
            await asyncio.to_thread(alone.keep)
        except StoreError as e:  # it is away; requests say so themselves
            log.warning("the database's lock cannot be looked at: %s", e)


async def first_refresh(traffic: Traffic, store: SqlStore, name: str) -> None:
    """Load the live adapter; one whose files are damaged is rolled back, loudly, to its newest sound ancestor."""
    while True:
        try:
            return await traffic.refresh()
        except AdapterError as e:
            log.error("the live adapter cannot be loaded and is rolled back: %s", e)
            rollback(store, name, actor="server", reason=f"could not be loaded at start: {e}")


def _supervisor(config: Config, home: Home) -> Supervisor:
    env = {k: v for k, v in os.environ.items() if k != "GRADATIM_API_KEY"}
    return Supervisor(
        LOOP_COMMAND,
        env={**env, **compose.thread_environment(config.learner.threads)},
        stdin=handover(config, os.getpid()),
        log_path=home.loop_log,
    )


async def _announce_when_ready(
    server: uvicorn.Server, home: Home, sock: socket.socket, announce: Callable[[str], None]
) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    host, port = sock.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    home.say("server", {"url": url.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")})
    announce(url)
