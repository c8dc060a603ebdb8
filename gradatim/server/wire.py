"""OpenAI's request bodies, checked at the edge and turned into the package's own request.

Unknown fields are ignored, since real clients send extras; known ones of a wrong type, and known ones that would
change the answer and are not supported, are refused by name. Knows no engine and no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradatim.server.problems import ApiError
from gradatim.types import Message, Request, Sampling

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@=+-]{0,127}")  # of sessions, feedback
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_BIASES = 1024

# fields that would change the answer, and the values of each that ask for nothing
_UNSUPPORTED_CHAT: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
}
_UNSUPPORTED_COMPLETION: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to generate, after validation."""

    request: Request
    model: str
    messages: tuple[Message, ...] = ()  # as received; empty for /v1/completions
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None  # how many alternatives; None: no log-probabilities in the answer
    return_token_ids: bool = False
    user: str = ""
    skill: str = "default"
    session_id: str = ""
    reads_on: str = ""  # the session that it goes on from
    must_exist: bool = False  # that session

    @property
    def chat(self) -> bool:
        return self.request.messages is not None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class _Extension(BaseModel):
    """What no other server knows."""

    model_config = ConfigDict(strict=True, extra="forbid")
    session: str | None = None
    resume: bool = False


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Any = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    metadata: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    return_token_ids: bool | None = None
    gradatim: _Extension | None = None


class _ChatBody(_Body):
    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class _CompletionBody(_Body):
    prompt: Any
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None


def parse_chat(body: Mapping[str, Any]) -> Call:
    """ApiError 400, with the parameter it is about."""
    _refuse_unsupported(body, _UNSUPPORTED_CHAT)
    b = _validate(_ChatBody, body)
    if not b.messages:
        raise ApiError(400, "messages is empty; send at least one", param="messages")
    if b.top_logprobs and not b.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    messages = tuple(_message(message, f"messages[{i}]") for i, message in enumerate(b.messages))
    logprobs = (b.top_logprobs or 0) if b.logprobs else None
    sampling = _sampling(b, b.max_completion_tokens or b.max_tokens, logprobs)
    return _call(b, Request(messages=messages, sampling=sampling), logprobs, tuple(b.messages))


def parse_completion(body: Mapping[str, Any]) -> Call:
    """ApiError 400, with the parameter it is about."""
    _refuse_unsupported(body, _UNSUPPORTED_COMPLETION)
    b = _validate(_CompletionBody, body)
    if b.best_of is not None and b.best_of != (b.n or 1):
        raise ApiError(400, "best_of other than n is not supported", param="best_of", code="unsupported_parameter")
    sampling = _sampling(b, b.max_tokens or 16, b.logprobs)  # 16 is the default of this old route
    return _call(b, Request(prompt=_prompt(b.prompt), sampling=sampling), b.logprobs, ())


def session(value: object, param: str) -> str:
    """A session id that may name an episode; ApiError 400."""
    if not isinstance(value, str) or not ID.fullmatch(value):
        raise ApiError(400, f"{param} must match {ID.pattern} in whole", param=param)
    return value


def _refuse_unsupported(body: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]]) -> None:
    for name, harmless in table.items():
        value = body.get(name)
        if value is not None and value not in harmless:
            message = f"{name} is not supported yet by the embedded engine"
            raise ApiError(400, message, param=name, code="unsupported_parameter")


B = TypeVar("B", bound=BaseModel)


def _validate(model: type[B], body: Mapping[str, Any]) -> B:
    try:
        return model.model_validate(body)
    except ValidationError as e:
        raise invalid(e, 400) from None


def invalid(error: ValidationError, status: int) -> ApiError:
    """The first thing that is wrong with a body. Says where and what was expected, never the value."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    position = "".join(f"[{part}]" for part in first["loc"][1:2] if isinstance(part, int))
    param = f"{name}{position}" if name else None
    if first["type"] == "extra_forbidden":  # the whole way to it: the name is all that is wrong
        param = ".".join(map(str, first["loc"]))
    code = "missing_required_parameter" if first["type"] == "missing" else None
    return ApiError(status, f"{param or 'body'}: {first['msg']}", param=param, code=code)


def _message(message: Mapping[str, Any], param: str) -> Message:
    """Role and text, which is all that the engine is given."""
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(400, f"{param}.role must be one of {', '.join(sorted(ROLES))}", param=f"{param}.role")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            text = f"{param}.{name} is not supported yet by the embedded engine"
            raise ApiError(400, text, param=f"{param}.{name}", code="unsupported_parameter")
    text = _text(message.get("content"), role, f"{param}.content")
    return {"role": "system" if role == "developer" else role, "content": text}


def _text(content: object, role: str, param: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if isinstance(content, list):
        return "".join(_part(part, f"{param}[{i}]") for i, part in enumerate(content))
    raise ApiError(400, f"{param} must be a string or a list of text parts", param=param)


def _part(part: object, param: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ApiError(400, f'{param} must be {{"type": "text", "text": ...}}; the model reads text only', param=param)


def _prompt(value: object) -> str | tuple[int, ...]:
    """One prompt: a string, its token ids, or a list that holds just one of them."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(i) is int and 0 <= i < 2**31 for i in value):
        return tuple(value)
    message = "prompt must be one non-empty string, or one non-empty list of token ids"
    raise ApiError(400, message, param="prompt")


def _sampling(b: _Body, max_tokens: int | None, logprobs: int | None) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if b.temperature is None else float(b.temperature),
        top_p=1.0 if b.top_p is None else float(b.top_p),
        n=b.n or 1,
        stop=_stop(b.stop),
        seed=b.seed,
        top_logprobs=logprobs or 0,
        presence_penalty=b.presence_penalty or 0.0,
        frequency_penalty=b.frequency_penalty or 0.0,
        logit_bias=_bias(b.logit_bias),
    )


def _stop(value: object) -> tuple[str, ...]:
    stops: Sequence[object] = [] if value is None else value if isinstance(value, list) else [value]
    texts = tuple(s for s in stops if isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS)
    if len(texts) != len(stops) or len(stops) > MAX_STOPS:
        raise ApiError(400, f"stop must be one non-empty string, or up to {MAX_STOPS} in a list", param="stop")
    return texts


def _bias(value: Mapping[str, float] | None) -> dict[int, float]:
    keys = value or {}
    if len(keys) > MAX_BIASES or not all(k.isascii() and k.isdigit() and len(k) < 10 for k in keys):
        raise ApiError(400, f"logit_bias maps up to {MAX_BIASES} token ids to numbers", param="logit_bias")
    return {int(k): float(v) for k, v in keys.items()}


def _call(b: _Body, request: Request, logprobs: int | None, messages: tuple[Message, ...]) -> Call:
    if b.stream_options is not None and not b.stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    metadata = b.metadata or {}
    skill = metadata.get("skill", "default")
    if not isinstance(skill, str) or not 0 < len(skill) <= 100 or not skill.isprintable():
        raise ApiError(400, "metadata.skill must be 1 to 100 printable characters", param="metadata.skill")
    session_id = metadata.get("session_id")
    extension = b.gradatim or _Extension()
    if extension.resume and extension.session is None:
        raise ApiError(400, "gradatim.resume needs gradatim.session", param="gradatim.resume")
    return Call(
        request=request,
        model=b.model,
        messages=messages,
        stream=bool(b.stream),
        include_usage=bool(b.stream_options and b.stream_options.include_usage),
        logprobs=logprobs,
        return_token_ids=bool(b.return_token_ids),
        user=b.user or "",
        skill=skill,
        session_id="" if session_id is None else session(session_id, "metadata.session_id"),
        reads_on="" if extension.session is None else session(extension.session, "gradatim.session"),
        must_exist=extension.resume,
    )
