"""The feedback routes: an opinion is checked, its target looked up, and it is durable before its 202.

Knows nothing of what is made of an opinion.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import time

from starlette.requests import Request
from starlette.responses import Response

from gradatim.errors import GradatimError
from gradatim.protocols import Store
from gradatim.server import otlp
from gradatim.server.body import parse_json, read_bytes, read_object
from gradatim.server.health import Writes
from gradatim.server.metrics import Metrics
from gradatim.server.opinions import Opinion, check_id, parse_opinion
from gradatim.server.problems import ApiError, json_response
from gradatim.server.records import newest, plain
from gradatim.types import EpisodeId, Feedback, Step, StepId

log = logging.getLogger("gradatim.server")
WRITE_TIMEOUT_S = 30.0
_RETRY = {"Retry-After": "1"}
_PROTOBUF = "application/x-protobuf"


class FeedbackRoutes:
    """Opinions in, revised, read and retracted."""

    def __init__(
        self, store: Store, metrics: Metrics, writes: Writes, *, sources: Mapping[str, float], max_body_bytes: int
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._writes = writes
        self._sources = sources
        self._max_body_bytes = max_body_bytes

    async def post_feedback(self, request: Request) -> Response:
        return json_response({"id": (await self._receive(request)).id}, 202)

    async def post_tensorzero(self, request: Request) -> Response:
        return json_response({"feedback_id": (await self._receive(request)).id})

    async def post_langfuse(self, request: Request) -> Response:
        return json_response({"id": (await self._receive(request)).id})

    async def post_logs(self, request: Request) -> Response:
        """OTLP's logs: evaluations are feedback, all that can be is written at once, the rest is counted back."""
        raw = await read_bytes(request, self._max_body_bytes)
        binary = request.headers.get("content-type", "").partition(";")[0].strip() == _PROTOBUF
        found = otlp.from_protobuf(raw) if binary else otlp.from_json(parse_json(raw))
        good, bad = await asyncio.to_thread(self._resolve_all, found)
        if good:
            await self._write(*good)
        for feedback in good:
            self._metrics.feedback.labels(feedback.kind).inc()
        message = otlp.first_problem(bad)
        if binary:
            return Response(otlp.partial_protobuf(len(bad), message), media_type=_PROTOBUF)
        return json_response(otlp.partial_json(len(bad), message))

    def _resolve_all(self, found: Sequence[otlp.Evaluation]) -> tuple[list[Feedback], list[ApiError]]:
        good, bad = [], []
        for evaluation in found:
            try:
                opinion = otlp.to_opinion(evaluation)
                self._check_source(opinion.source)
                good.append(self._resolve(opinion))
            except ApiError as e:
                bad.append(e)
        return good, bad

    async def get_feedback(self, request: Request) -> Response:
        return json_response(plain(await self._find(request.path_params["id"])))

    async def delete_feedback(self, request: Request) -> Response:
        """Retract: a newer revision that says so. Doing it twice does nothing."""
        found = await self._find(request.path_params["id"])
        if not found.retracted:
            await self._write(replace(found, retracted=True, created_at=time()))
        return json_response({"id": found.id, "retracted": True})

    async def _receive(self, request: Request) -> Feedback:
        opinion = parse_opinion(await read_object(request, self._max_body_bytes, status=422))
        self._check_source(opinion.source)
        opinion = replace(opinion, id=_key(request, opinion))
        feedback = await asyncio.to_thread(self._resolve, opinion)
        await self._write(feedback)
        self._metrics.feedback.labels(feedback.kind).inc()
        return feedback

    def _check_source(self, source: str) -> None:
        if source.partition(":")[0] not in self._sources:
            known = ", ".join(sorted(self._sources))
            raise ApiError(422, f"source must begin with one of {known}, as in human:alice", param="source")

    def _resolve(self, opinion: Opinion) -> Feedback:
        """The record, with the episode it is about. ApiError 404, or 422 for answers to different prompts."""
        step = self._step(opinion.response_id, "response_id") if opinion.response_id else None
        if opinion.rejected_id:
            assert step is not None, "a preference has a chosen answer"
            if self._step(opinion.rejected_id, "rejected_id").prompt_ids != step.prompt_ids:
                message = "chosen_id and rejected_id must be answers to the same prompt"
                raise ApiError(422, message, param="rejected_id")
        return Feedback(
            id=opinion.id or f"fb-{uuid.uuid4().hex}",
            created_at=time(),
            kind=opinion.kind,
            source=opinion.source,
            episode_id=step.episode_id if step else self._episode(opinion.episode_id),
            step_id=step.id if step else None,
            value=opinion.value,
            rejected_id=StepId(opinion.rejected_id) if opinion.rejected_id else None,
            correction=opinion.correction,
            comment=opinion.comment,
            confidence=opinion.confidence,
            tags=opinion.tags,
        )

    def _step(self, step_id: str, param: str) -> Step:
        step = self._store.step(id=StepId(step_id))
        if step is None:
            raise ApiError(404, f"{param}: no response of that id was recorded", param=param, code="not_found")
        return step

    def _episode(self, episode_id: str) -> EpisodeId:
        if not self._store.read(Step, episode_id=episode_id, limit=1):
            message = "episode_id: no episode of that id was recorded"
            raise ApiError(404, message, param="episode_id", code="not_found")
        return EpisodeId(episode_id)

    async def _find(self, feedback_id: str) -> Feedback:
        found = await asyncio.to_thread(newest, self._store, Feedback, id=feedback_id)
        if found is None:
            raise ApiError(404, "no feedback of that id was recorded", param="id", code="not_found")
        return found

    async def _write(self, *feedback: Feedback) -> None:
        """Durable when this returns. ConflictError, or ApiError 503 where nothing was acknowledged."""
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await asyncio.shield(asyncio.wrap_future(self._store.submit(*feedback)))
        except GradatimError as e:
            self._writes.failed(e)
            raise
        except Exception as e:  # a full or read-only disk; the driver's own errors
            self._writes.failed(e)
            log.error("feedback was not recorded: %s", type(e).__name__)
            message = "the feedback could not be recorded; send it again with the same id"
            raise ApiError(503, message, code="unavailable", headers=_RETRY) from e


def _key(request: Request, opinion: Opinion) -> str:
    header = request.headers.get("idempotency-key", "")
    if not header:
        return opinion.id
    check_id(header, "Idempotency-Key")
    if opinion.id and opinion.id != header:
        raise ApiError(422, "id and the Idempotency-Key header differ", param="id")
    return header
