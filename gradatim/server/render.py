"""Answers in OpenAI's shapes: chat and the old completions, whole and as chunks of a stream.

Pure functions of a generation. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from gradatim.server.generation import Generation
from gradatim.types import Delta, Token

_FLOOR = -9999.0  # JSON has no -inf; OpenAI sends this instead
_SHOWN = ("entry", "cosine", "age_s")  # of what was retrieved; explain tells its text
Json = dict[str, Any]


def provenance(gen: Generation, *, final: bool) -> Json:
    """The ``gradatim`` object: exactly which weights answered, in which episode, and whether it was recorded. Where
    raters must not know the weights, the answer's own id is the receipt for them."""
    route = gen.route
    out: Json = {"episode_id": gen.episode_id}
    if gen.is_blind:
        out["receipt"] = gen.id
    else:
        out |= {"adapter": route.adapter_id, "adapter_sha256": route.adapter_sha256, "stage": route.stage}
    if not final:
        return out
    if gen.memory:
        names = ("weight", "near", "tokens", "attention")
        out["memory"] = {name: gen.memory[name] for name in names if name in gen.memory}
        if "retrieved" in gen.memory:
            out["memory"]["retrieved"] = [{k: one[k] for k in _SHOWN} for one in gen.memory["retrieved"]]
    return out | {"captured": gen.captured}


def headers(gen: Generation) -> dict[str, str]:
    out = {"X-Request-Id": gen.id, "X-Gradatim-Episode": gen.episode_id}
    if not gen.is_blind:
        out["X-Gradatim-Adapter"] = quote(gen.route.adapter_id, safe="@:/+ ")
    return out


def usage(gen: Generation) -> Json:
    prompt, completion = len(gen.prompt_ids), gen.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": gen.cached_tokens},
    }


def whole(gen: Generation) -> Json:
    """The answer of a request that does not stream."""
    body = _envelope(gen, "chat.completion" if gen.call.chat else "text_completion")
    body["choices"] = [_choice(gen, index) for index in range(len(gen.choices))]
    body["usage"] = usage(gen)
    body["gradatim"] = provenance(gen, final=True)
    if gen.call.return_token_ids and gen.call.chat:
        body["prompt_token_ids"] = gen.prompt_ids
    return body


def first_chunks(gen: Generation) -> list[Json]:
    """What a stream begins with: the role of each choice, and the prompt's tokens where they were asked for."""
    if not gen.call.chat:
        first = _chunk(gen, 0, "")
        if gen.call.return_token_ids:
            first["choices"][0]["prompt_token_ids"] = gen.prompt_ids
        return [first | {"gradatim": provenance(gen, final=False)}]
    chunks = [_chunk(gen, index, "", role="assistant") for index in range(len(gen.choices))]
    if gen.call.return_token_ids:
        chunks[0]["prompt_token_ids"] = gen.prompt_ids
    chunks[0]["gradatim"] = provenance(gen, final=False)
    return chunks


def delta_chunk(gen: Generation, delta: Delta) -> Json | None:
    """One decoding step; none where it has nothing to show."""
    asked = gen.call.return_token_ids or gen.call.logprobs is not None
    if not delta.text and not (asked and delta.tokens):
        return None
    chunk = _chunk(gen, delta.index, delta.text)
    choice = chunk["choices"][0]
    if gen.call.logprobs is not None and delta.tokens:
        offset = sum(len(d.text) for d in gen.choices[delta.index].deltas) - len(delta.text)
        choice["logprobs"] = _logprobs(gen, delta.tokens, offset)
    if gen.call.return_token_ids:
        choice["token_ids"] = [token.id for token in delta.tokens]
    return chunk


def last_chunks(gen: Generation) -> list[Json]:
    """The finish reason of each choice, then the usage where it was asked for."""
    chunks = []
    for index, choice in enumerate(gen.choices):
        chunk = _chunk(gen, index, None if gen.call.chat else "")
        chunk["choices"][0]["finish_reason"] = choice.finish_reason
        chunks.append(chunk)
    if gen.call.include_usage:
        chunks.append(_envelope(gen, _chunk_object(gen)) | {"choices": [], "usage": usage(gen)})
    for chunk in chunks:
        chunk["gradatim"] = provenance(gen, final=True)
    return chunks


def _envelope(gen: Generation, kind: str) -> Json:
    return {
        "id": gen.id,
        "object": kind,
        "created": int(gen.created_at),
        "model": gen.call.model,
        "system_fingerprint": None if gen.is_blind else gen.route.adapter_sha256[:16],
    }


def _chunk_object(gen: Generation) -> str:
    return "chat.completion.chunk" if gen.call.chat else "text_completion"


def _chunk(gen: Generation, index: int, text: str | None, role: str = "") -> Json:
    choice: Json = {"index": index, "logprobs": None, "finish_reason": None}
    if gen.call.chat:
        choice["delta"] = ({"role": role} if role else {}) | ({} if text is None else {"content": text})
    else:
        choice["text"] = text or ""
    return _envelope(gen, _chunk_object(gen)) | {"choices": [choice]}


def _choice(gen: Generation, index: int) -> Json:
    choice = gen.choices[index]
    out: Json = {"index": index, "finish_reason": choice.finish_reason, "logprobs": None}
    if gen.call.chat:
        out["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
    else:
        out["text"] = choice.text
    if gen.call.logprobs is not None:
        out["logprobs"] = _logprobs(gen, [token for delta in choice.deltas for token in delta.tokens], 0)
    if gen.call.return_token_ids:
        out["token_ids"] = choice.token_ids
        if not gen.call.chat:
            out["prompt_token_ids"] = gen.prompt_ids
    return out


def _logprobs(gen: Generation, tokens: Sequence[Token], offset: int) -> Json:
    if gen.call.chat:
        return {"content": [_chat_logprob(token) for token in tokens], "refusal": None}
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [{text: _finite(value) for _, text, value in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _chat_logprob(token: Token) -> Json:
    top = [_entry(text, value) for _, text, value in token.top]
    return _entry(token.text, token.logprob) | {"top_logprobs": top}


def _entry(text: str, logprob: float) -> Json:
    unknown = "\ufffd" in text  # a token in the middle of a character: its bytes are not those of the text
    return {"token": text, "logprob": _finite(logprob), "bytes": None if unknown else list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, _FLOOR)


def events(chunks: Iterable[bytes]) -> bytes:
    """Server-sent events, one for each chunk."""
    return b"".join(b"data: " + chunk + b"\n\n" for chunk in chunks)
