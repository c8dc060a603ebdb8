"""Between messages and tokens: the chat template one way, incremental detokenisation the other.

It knows nothing of weights, adapters or the wire. Prompts are rendered once and their ids kept; text that a model
drew is never tokenised again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

import jinja2

from gradatim.errors import InvalidRequestError, ModelError
from gradatim.nn.base import Base
from gradatim.types import Message

_REPLACEMENT = "\ufffd"  # what an unfinished multi-byte character decodes to
_ANSWER = "an answer"  # that stands for any
_HINT = "\n\nHint: {}"
_ROLES = {"developer": "system", "function": "tool"}  # newer or older names of roles that templates know


class Renderer:
    """Renders with one base model's tokenizer and chat template. Implements ``protocols.Tokenizer``."""

    def __init__(self, base: Base) -> None:
        self._tokenizer = base.tokenizer
        self._eos_ids = base.eos_ids
        self._encoding = Lock()  # fast tokenizers may not be encoded with from two threads at once
        self._end_of_turn = self._find_end_of_turn()
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The tokens that a model is to continue with the next assistant turn. ValueError where the messages have a
        shape that the chat template cannot render."""
        if not messages:
            raise InvalidRequestError("messages is empty: at least one message is needed")
        return self._encode(self._template([_plain(m, i) for i, m in enumerate(messages)], turn=True))

    def following_ids(self, messages: Sequence[Message], last: int) -> tuple[int, ...]:
        """The tokens of further messages behind an answer, of which token ``last`` is the last one; an answer that was
        cut short is ended first. Errors as of ``prompt_ids``."""
        earlier = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
        text = self._template([*earlier, *(_plain(m, i) for i, m in enumerate(messages))], turn=True)
        if not messages or _ANSWER not in text:
            raise InvalidRequestError("these messages cannot follow an answer: the model's chat template drops it")
        ids = self._encode(text[text.index(_ANSWER) + len(_ANSWER) :].lstrip())
        return ids[1:] if ids and ids[0] == last else ids

    def more_ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a plain text that goes on."""
        return self._encode(text)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a plain prompt (/v1/completions), with the special ones the model expects in front."""
        ids = self._encode(text, special=True)
        if ids:
            return ids
        start = self._tokenizer.bos_token_id
        return (start if start is not None else min(self._eos_ids),)

    def completion_ids(self, text: str) -> tuple[int, ...]:
        """The tokens of an answer, with the end-of-turn token, as the model would have drawn them."""
        return (*self._encode(text), self._end_of_turn)

    def hinted_ids(self, prompt_ids: Sequence[int], messages: Sequence[Message], hint: str) -> tuple[int, ...]:
        """The prompt with a hint at the end of its last user message; what comes before the hint stays as captured.

        Empty where no message is a user's, or where the messages do not end in the tokens that were captured.
        """
        asked = [i for i, message in enumerate(messages) if message.get("role") == "user"]
        if not asked:
            return ()
        at = asked[-1]
        try:
            told = {**messages[at], "content": _text(messages[at].get("content"), at) + _HINT.format(hint.strip())}
            plain = self.prompt_ids(messages)
            hinted = self.prompt_ids([*messages[:at], told, *messages[at + 1 :]])
        except InvalidRequestError:  # captured under another template
            return ()
        start = next((k for k, (a, b) in enumerate(zip(plain, hinted, strict=False)) if a != b), len(plain))
        cut = len(prompt_ids) - (len(plain) - start)
        if cut < 0 or tuple(prompt_ids[cut:]) != plain[start:]:
            return ()
        return (*prompt_ids[:cut], *hinted[start:])

    def turn(self, prompt_ids: Sequence[int], messages: Sequence[Message] | None) -> tuple[int, int]:
        """Where the text of the last message stands in the prompt: tokens [a, b), never empty. The whole prompt where
        there are no messages, or where they cannot be found in it."""
        whole = (0, len(prompt_ids))
        if not messages:
            return whole
        try:
            without = self.prompt_ids([*messages[:-1], {**messages[-1], "content": ""}])
        except InvalidRequestError:
            return whole
        start = _common(prompt_ids, without)
        end = len(prompt_ids) - _common(prompt_ids[start:][::-1], without[start:][::-1])
        return (start, end) if start < end else whole

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, without special ones."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def digest(self) -> str:
        """SHA-256 of the vocabulary and the chat template: what token ids mean depends on them."""
        told = {"vocabulary": self._tokenizer.get_vocab(), "template": self._tokenizer.chat_template}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def stream(self) -> TextStream:
        return TextStream(self)

    def _token_text(self, token_id: int) -> str:
        """One token alone, special ones too: what a log-probability is shown beside."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encode(self, text: str, special: bool = False) -> tuple[int, ...]:
        with self._encoding:
            return tuple(self._tokenizer.encode(text, add_special_tokens=special))

    def _template(self, messages: Sequence[Mapping[str, Any]], turn: bool) -> str:
        if not self._tokenizer.chat_template:
            raise InvalidRequestError("this model has no chat template: use /v1/completions, or serve a chat model")
        try:
            return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=turn))
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as e:
            raise InvalidRequestError(f"the model's chat template cannot render these messages: {e}") from e

    def _find_end_of_turn(self) -> int:
        """The token that the chat template puts behind an answer, where it is one that ends a generation."""
        fallback = self._tokenizer.eos_token_id
        if self._tokenizer.chat_template:
            text = self._template(
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}], turn=False
            )
            behind = self._encode(text[text.rindex(_ANSWER) + len(_ANSWER) :].lstrip()) if _ANSWER in text else ()
            if behind and behind[0] in self._eos_ids:
                return behind[0]
        if fallback is None:
            raise ModelError("this model's tokenizer names no end-of-turn token: set eos_token in its tokenizer_config")
        return int(fallback)


class TextStream:
    """Turns the tokens of one answer into text as they come, never splitting a multi-byte character.

    A token's text can depend on the one before it (spaces), so each piece is decoded together with the last few
    tokens and the difference is given out.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._ids: list[int] = []
        self._start = 0  # decoding starts here,
        self._given = 0  # and the text up to here was given out

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty in the middle of a character."""
        self._ids.append(token_id)
        whole = self._renderer.decode(self._ids[self._start :])
        if whole.endswith(_REPLACEMENT):
            return ""
        return self._advance(whole)

    def flush(self) -> str:
        """What is left when no more tokens come: the text of an unfinished character, if there is one."""
        return self._advance(self._renderer.decode(self._ids[self._start :]))

    def _advance(self, whole: str) -> str:
        before = self._renderer.decode(self._ids[self._start : self._given])
        self._start, self._given = self._given, len(self._ids)
        return whole[len(before) :]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the beginning that both share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _plain(message: Message, index: int) -> dict[str, Any]:
    """A message as chat templates want it: a known role and content that is one string."""
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(f"messages[{index}].role is missing")
    out = {key: value for key, value in message.items() if value is not None}
    out["role"] = _ROLES.get(role, role)
    out["content"] = _text(message.get("content"), index)
    if not out["content"] and role not in ("assistant", "tool") and message.get("content") is None:
        raise InvalidRequestError(f"messages[{index}].content is missing")
    return out


def _text(content: Any, index: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequestError(f"messages[{index}].content must be a string or a list of text parts")
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "refusal"):
            raise InvalidRequestError(f"messages[{index}].content has a part of type {kind!r}; only text can be read")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise InvalidRequestError(f"messages[{index}].content has a {kind} part without text")
        texts.append(text)
    return "".join(texts)
