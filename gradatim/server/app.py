"""Puts the server together: the table of routes, and what each of them needs.

Every route under /v1 also stands under /sessions/{id}/v1, so that a client can name its episode by base_url alone.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route

from gradatim.config import Config
from gradatim.errors import GradatimError
from gradatim.protocols import Engine, Memory, Prompter, Router, Sessions, Store
from gradatim.server.admin import Admin, AdminRoutes
from gradatim.server.completions import Completions
from gradatim.server.edge import Edge
from gradatim.server.episodes import Episodes
from gradatim.server.explain import ExplainRoutes
from gradatim.server.feedback import FeedbackRoutes
from gradatim.server.generation import Services
from gradatim.server.health import Writes
from gradatim.server.memory import MemoryAdmin, MemoryRoutes
from gradatim.server.metrics import Metrics
from gradatim.server.problems import ApiError, problem


def build_app(
    *,
    engine: Engine,
    store: Store,
    router: Router,
    config: Config,
    admin: Admin,
    metrics: Metrics | None = None,
    memory: Memory | None = None,
    memory_admin: MemoryAdmin | None = None,
    sessions: Sessions | None = None,
    prompter: Prompter | None = None,
) -> Starlette:
    """The ASGI application. Starts and stops nothing: engine, store and memory belong to the caller."""
    metrics = metrics or Metrics()
    metrics.watch(engine)
    writes = Writes()
    limit = config.server.max_body_bytes
    services = Services(
        engine=engine,
        store=store,
        router=router,
        episodes=Episodes(store),
        metrics=metrics,
        writes=writes,
        max_queue=config.server.max_queue,
        blind=config.release.blind,
        memory=memory,
        sessions=sessions,
        prompter=prompter,
    )
    completions = Completions(services, limit)
    feedback = FeedbackRoutes(store, metrics, writes, sources=config.reward.weights, max_body_bytes=limit)
    explain = ExplainRoutes(store, memory_admin)
    operator = AdminRoutes(
        admin=admin, engine=engine, store=store, router=router, metrics=metrics, writes=writes, name=config.name
    )
    v1 = _v1(completions, feedback, explain, operator) + _memory(MemoryRoutes(memory_admin))
    app = Starlette(
        routes=[
            Mount("/v1", routes=v1),
            Mount("/sessions/{session_id}/v1", routes=v1),
            Route("/feedback", feedback.post_tensorzero, methods=["POST"]),
            Route("/api/public/scores", feedback.post_langfuse, methods=["POST"]),
            Route("/healthz", operator.healthz),
            Route("/readyz", operator.readyz),
            Route("/metrics", operator.metrics),
        ],
        middleware=[Middleware(Edge, api_key=config.server.api_key, metrics=metrics)],
        exception_handlers={ApiError: _answer, GradatimError: _answer, HTTPException: _answer_http},
    )
    app.router.redirect_slashes = False
    return app


def _v1(
    completions: Completions, feedback: FeedbackRoutes, explain: ExplainRoutes, operator: AdminRoutes
) -> list[BaseRoute]:
    return [
        Route("/chat/completions", completions.chat_completions, methods=["POST"]),
        Route("/completions", completions.completions, methods=["POST"]),
        Route("/feedback", feedback.post_feedback, methods=["POST"]),
        Route("/feedback/{id}", feedback.get_feedback),
        Route("/feedback/{id}", feedback.delete_feedback, methods=["DELETE"]),
        Route("/logs", feedback.post_logs, methods=["POST"]),
        Route("/models", operator.list_models),
        Route("/models/{id:path}", operator.get_model),
        Route("/episodes", explain.list_episodes),
        Route("/episodes/{id}", explain.get_episode),
        Route("/explain/{id}", explain.explain),
        Route("/adapters", operator.list_adapters),
        Route("/adapters/{id}", operator.get_adapter),
        Route("/adapters/{id}/rollback", operator.rollback, methods=["POST"]),
        Route("/adapters/{id}/promote", operator.promote, methods=["POST"]),
        Route("/adapters/{id}/approve", operator.approve, methods=["POST"]),
        Route("/adapters/{id}/reject", operator.reject, methods=["POST"]),
        Route("/status", operator.status),
    ]


def _memory(memory: MemoryRoutes) -> list[BaseRoute]:
    return [
        Route("/memory", memory.stats),
        Route("/memory/entries", memory.entries),
        Route("/memory/check", memory.check),
        Route("/memory/epoch", memory.epoch, methods=["POST"]),
        Route("/memory/undo-epoch", memory.undo_epoch, methods=["POST"]),
        Route("/memory/forget", memory.forget, methods=["POST"]),
        Route("/memory/compact", memory.compact, methods=["POST"]),
        Route("/memory/notes", memory.pins),
        Route("/memory/notes", memory.pin, methods=["POST"]),
        Route("/memory/notes/{id}", memory.unpin, methods=["DELETE"]),
    ]


async def _answer(request: Request, exc: Exception) -> Response:
    return problem(exc).response()


async def _answer_http(request: Request, exc: Exception) -> Response:
    """What the routing itself refuses: 404 and 405."""
    assert isinstance(exc, HTTPException)
    what = f"{request.method} {request.url.path}"
    message = {404: f"there is no {what}", 405: f"{what} is not allowed"}.get(exc.status_code, exc.detail)
    return ApiError(exc.status_code, message, code="unknown_url", headers=exc.headers).response()
