"""Bodies of feedback, in our own shape and in those of two other systems, as one ``Opinion``.

Ours is strict: an unknown field is an error, since a misspelt one would be lost in silence. The others, TensorZero's
``/feedback`` and Langfuse's ``/api/public/scores``, are told by their own field names and may carry extras.
Knows nothing of what was issued or stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradatim.server.problems import ApiError
from gradatim.server.wire import ID, invalid
from gradatim.types import OWN_IDS, FeedbackKind

MAX_TEXT_BYTES = 64 * 2**10
SOURCE = r"[a-z][a-z0-9_-]{0,31}(:[^\x00-\x1f]{1,128})?"
_Id = Annotated[str, Field(min_length=1, max_length=200)]
_Tag = Annotated[str, Field(pattern=r"^[^\x00-\x1f]{1,100}\z")]
_Unit = Annotated[float, Field(ge=-1, le=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """One opinion as it was sent: checked in itself, its target not yet looked up."""

    kind: FeedbackKind
    id: str = ""
    response_id: str = ""  # of a preference, the chosen one
    episode_id: str = ""
    rejected_id: str = ""
    value: float | None = None
    correction: str = ""
    comment: str = ""
    source: str = "human"
    confidence: float | None = None
    tags: tuple[str, ...] = ()


class _Ours(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    id: str | None = None
    kind: FeedbackKind
    response_id: _Id | None = None
    episode_id: _Id | None = None
    chosen_id: _Id | None = None
    rejected_id: _Id | None = None
    value: bool | _Unit | None = None
    correction: str | None = None
    comment: str | None = None
    source: Annotated[str, Field(pattern=rf"^{SOURCE}\z")] = "human"
    confidence: Annotated[float, Field(gt=0, le=1)] | None = None
    tags: Annotated[list[_Tag], Field(max_length=32)] = []


class _TextBlock(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["text"]
    text: str


class _TensorZero(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    metric_name: _Tag
    inference_id: _Id | None = None
    episode_id: _Id | None = None
    value: bool | _Unit | str | Annotated[list[_TextBlock], Field(max_length=64)]
    dryrun: bool | None = None


class _Langfuse(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    traceId: _Id | None = None
    sessionId: _Id | None = None  # of a score about a session and no trace of it
    observationId: _Id | None = None
    id: str | None = None
    name: _Tag
    value: float | str
    comment: str | None = None
    dataType: Literal["NUMERIC", "BOOLEAN", "CATEGORICAL"] | None = None


# the fields that each kind needs, and those that it may have beside id, source, comment, confidence and tags
_NEEDS: Mapping[str, frozenset[str]] = {
    "score": frozenset({"value"}),
    "preference": frozenset({"chosen_id", "rejected_id"}),
    "correction": frozenset({"response_id", "correction"}),
    "outcome": frozenset({"value"}),
    "comment": frozenset({"comment"}),
}
_TARGETS = frozenset({"response_id", "episode_id"})
_OWN = frozenset({"value", "chosen_id", "rejected_id", "correction"}) | _TARGETS


def parse_opinion(body: Mapping[str, Any]) -> Opinion:
    """ApiError 422 where the body is none of the three shapes."""
    if "metric_name" in body:
        opinion = _tensorzero(_validate(_TensorZero, body))
    elif "traceId" in body or "sessionId" in body:
        opinion = _langfuse(_validate(_Langfuse, body))
    else:
        opinion = _ours(_validate(_Ours, body))
    if opinion.id:
        check_id(opinion.id, "id")
    return check_size(opinion)


def check_size(opinion: Opinion) -> Opinion:
    """ApiError 422 for a text that is too long."""
    for name, text in (("correction", opinion.correction), ("comment", opinion.comment)):
        if len(text.encode()) > MAX_TEXT_BYTES:
            raise _bad(name, f"is longer than {MAX_TEXT_BYTES} bytes")
    return opinion


def check_id(value: str, param: str) -> str:
    if value.startswith(OWN_IDS):
        raise _bad(param, f"must not begin with {OWN_IDS}: such ids are of the configured critics")
    if not ID.fullmatch(value):
        raise _bad(param, f"must match {ID.pattern} in whole")
    return value


M = TypeVar("M", bound=BaseModel)


def _validate(model: type[M], body: Mapping[str, Any]) -> M:
    try:
        return model.model_validate(body)
    except ValidationError as e:
        raise invalid(e, 422) from None


def _bad(param: str, message: str) -> ApiError:
    return ApiError(422, f"{param} {message}", param=param)


def _ours(b: _Ours) -> Opinion:
    _check_fields(b)
    value = None if b.value is None else (1.0 if b.value else -1.0) if isinstance(b.value, bool) else float(b.value)
    return Opinion(
        id=b.id or "",
        kind=b.kind,
        response_id=b.chosen_id or b.response_id or "",
        episode_id=b.episode_id or "",
        rejected_id=b.rejected_id or "",
        value=value,
        correction=b.correction or "",
        comment=b.comment or "",
        source=b.source,
        confidence=b.confidence,
        tags=tuple(b.tags),
    )


def _check_fields(b: _Ours) -> None:
    """Each kind has its own fields: all that it needs, and none of another's."""
    given = {name for name in b.model_fields_set & (_OWN | {"comment"}) if getattr(b, name) is not None}
    if b.kind == "outcome" and "value" in b.model_fields_set:
        given.add("value")  # null is an outcome: unknown
    for name in sorted(_NEEDS[b.kind] - given):
        raise _bad(name, f"is needed for a {b.kind}")
    targets = frozenset() if b.kind in ("preference", "correction") else _TARGETS
    for name in sorted(given & _OWN - _NEEDS[b.kind] - targets):
        raise _bad(name, f"does not go with a {b.kind}")
    if targets and len(given & _TARGETS) != 1:
        raise _bad("response_id", "or episode_id is needed: exactly one of them")
    _check_values(b)


def _check_values(b: _Ours) -> None:
    if b.kind == "outcome" and not isinstance(b.value, bool | None):
        raise _bad("value", "of an outcome is true, false, or null for unknown")
    if b.kind == "correction" and not (b.correction or "").strip():
        raise _bad("correction", "is empty; send the whole better answer")
    if b.kind == "comment" and not (b.comment or "").strip():
        raise _bad("comment", "is empty")
    if b.kind == "preference" and b.chosen_id == b.rejected_id:
        raise _bad("rejected_id", "is the chosen answer itself")


def _tensorzero(b: _TensorZero) -> Opinion:
    """A boolean about an episode is its outcome; any other value in [-1, 1] is a score."""
    if (b.inference_id is None) == (b.episode_id is None):
        raise _bad("inference_id", "or episode_id is needed: exactly one of them")
    if b.dryrun:
        raise _bad("dryrun", "is not supported: nothing was recorded")
    target: dict[str, Any] = {"response_id": b.inference_id or "", "episode_id": b.episode_id or ""}
    tags = (f"metric:{b.metric_name}",)
    if isinstance(b.value, str | list):
        text = b.value if isinstance(b.value, str) else "".join(block.text for block in b.value)
        if b.metric_name == "comment" and text.strip():
            return Opinion(kind="comment", comment=text, **target)
        if b.metric_name == "demonstration" and b.inference_id and text.strip():
            return Opinion(kind="correction", correction=text, **target)
        raise _bad("value", "is a text only for the metrics comment, and demonstration of an inference")
    kind: FeedbackKind = "outcome" if isinstance(b.value, bool) and b.episode_id else "score"
    value = (1.0 if b.value else -1.0) if isinstance(b.value, bool) else float(b.value)
    return Opinion(kind=kind, value=value, source=f"critic:{b.metric_name}", tags=tags, **target)


def _langfuse(b: _Langfuse) -> Opinion:
    """A BOOLEAN (1 or 0) and a NUMERIC in [-1, 1] are scores; a text is a comment. A trace is a response or episode, a
    session an episode."""
    trace_id = b.traceId or b.sessionId or ""
    if not trace_id:
        raise _bad("traceId", "or sessionId is needed")
    response_id = b.observationId or (trace_id if trace_id.startswith(("chatcmpl-", "cmpl-")) else "")
    shared: dict[str, Any] = {
        "id": b.id or "",
        "response_id": response_id,
        "episode_id": "" if response_id else trace_id,
        "tags": (f"metric:{b.name}",),
    }
    if isinstance(b.value, str):
        return Opinion(kind="comment", comment=": ".join(filter(None, (b.name, b.value, b.comment))), **shared)
    value = b.value
    if b.dataType == "BOOLEAN":
        if value not in (0, 1):
            raise _bad("value", "of a BOOLEAN is 0 or 1")
        value = 1.0 if value else -1.0
    if not -1 <= value <= 1:
        raise _bad("value", "must be in [-1, 1]")
    return Opinion(kind="score", value=value, comment=b.comment or "", source=f"critic:{b.name}", **shared)
