"""Critics that need nothing but the text: formats, expected answers, and what no answer should have.

Each function makes a critic. A check that an answer passes mostly says nothing of how good it is, so the checks of form
speak only against an answer; ``exact_match`` and ``pattern`` know the right one and speak for it too. Knows no model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradatim.errors import ConfigError
from gradatim.feedback.critics import last_step, opinion, question, text_of
from gradatim.protocols import Critic
from gradatim.types import Episode, Feedback, Step

_FENCE = re.compile(r"^```[a-zA-Z]*\n(.*?)\n?```$", re.DOTALL)
_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_SECRETS: Mapping[str, re.Pattern[str]] = {
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})\b"),
    "a Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "an API key": re.compile(r"\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}"),
    "a Google key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}"),
    "a JSON web token": re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
    "a password in an address": re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s:/@]+:[^\s:/@]{3,}@"),
}


def json_schema(schema: Mapping[str, Any] | str) -> Critic:
    """Against a last answer that is not JSON, or not of this schema (JSON Schema; a mapping, or a file's path). A fence
    around the JSON is allowed."""
    validator = _validator(_read(schema))

    def critic(episode: Episode) -> Feedback | None:
        step = last_step(episode)
        if step is None:
            return None
        fenced = _FENCE.match(step.text.strip())
        wrong = _invalid(fenced[1] if fenced else step.text, validator)
        return opinion(step, -1.0, wrong) if wrong else None

    return critic


def tool_schema(tools: Sequence[Mapping[str, Any]] | str, *, required: bool = False) -> Critic:
    """Against the first answer that calls a tool which there is not, or with arguments that are not of its schema.

    ``tools``: as in OpenAI's requests, or the path of a file of them. Calls are ``<tool_call>{"name", "arguments"}
    </tool_call>`` in the text, or the ``tool_calls`` of messages that the client sent back. ``required``: a last answer
    without any call is wrong too.
    """
    known = {f["name"]: _validator(f.get("parameters", {})) for f in map(_function, _read(tools))}

    def critic(episode: Episode) -> Feedback | None:
        for step in episode.steps:
            for name, arguments in _calls(step, episode):
                if wrong := _wrong_call(name, arguments, known):
                    return opinion(step, -1.0, wrong)
        step = last_step(episode)  # type: ignore[assignment]
        if required and step is not None and not any(_calls(step, episode)):
            return opinion(step, -1.0, "no tool is called")
        return None

    return critic


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function: Mapping[str, Any] = tool.get("function", tool)
    if not isinstance(function.get("name"), str):
        raise ConfigError("a tool needs a name")
    return function


def _calls(step: Step, episode: Episode) -> Iterator[tuple[object, object]]:
    """(name, arguments as JSON text or parsed) of the calls of one answer."""
    for raw in _TOOL_CALL.findall(step.text):
        try:
            call = json.loads(raw)
        except ValueError:
            call = None
        yield (call.get("name"), call.get("arguments", {})) if isinstance(call, dict) else (None, None)
    for message in _sent_back(step, episode):
        for call in message.get("tool_calls") or ():
            function = call.get("function", {}) if isinstance(call, Mapping) else {}
            yield function.get("name"), function.get("arguments", "{}")


def _sent_back(step: Step, episode: Episode) -> Iterator[Mapping[str, Any]]:
    """This answer as the next request repeats it: what stands there beyond the text was taken from it."""
    at = episode.steps.index(step)
    if at + 1 < len(episode.steps) and len(episode.steps[at + 1].messages) > len(step.messages):
        message = episode.steps[at + 1].messages[len(step.messages)]
        if message.get("role") == "assistant":
            yield message


def _wrong_call(name: object, arguments: object, known: Mapping[str, Any]) -> str:
    if not isinstance(name, str):
        return "a tool call is not valid JSON"
    if name not in known:
        return f"there is no tool {name[:100]!r}"
    wrong = _invalid(arguments if isinstance(arguments, str) else json.dumps(arguments), known[name])
    return f"arguments of {name}: {wrong}" if wrong else ""


def exact_match(expected: str | None = None, answers: str | None = None, *, ignore_case: bool = False) -> Critic:
    """Whether the last answer is the expected one, white space apart. ``answers``: the path of a JSON file that gives
    the expected answer to each last message of the user; there is no opinion on other questions."""
    table: Mapping[str, str] = _read(answers) if answers else {}

    def critic(episode: Episode) -> Feedback | None:
        step = last_step(episode)
        right = expected if step is None or not table else table.get(question(step).strip())
        if step is None or right is None:
            return None
        given, wanted = (" ".join(text.split()) for text in (step.text, right))
        same = given.casefold() == wanted.casefold() if ignore_case else given == wanted
        return opinion(episode, same, "" if same else "not the expected answer")

    return critic


def pattern(regex: str, *, forbidden: bool = False) -> Critic:
    """Whether the last answer holds a match of ``regex``; or, ``forbidden``, against one that does."""
    compiled = re.compile(regex)

    def critic(episode: Episode) -> Feedback | None:
        step = last_step(episode)
        if step is None:
            return None
        found = compiled.search(step.text) is not None
        if forbidden:
            return opinion(step, -1.0, "holds what it must not") if found else None
        return opinion(episode, found, "" if found else "does not hold what it must")

    return critic


def length(most_chars: int, least_chars: int = 1) -> Critic:
    """Against the first answer that is too long, too short, or was cut off at its limit of tokens."""

    def critic(episode: Episode) -> Feedback | None:
        for step in _counted(episode):
            size = len(step.text.strip())
            if size > most_chars:
                return opinion(step, -1.0, f"{size} characters are too many")
            if size < least_chars:
                return opinion(step, -1.0, f"{size} characters are too few")
            if step.finish_reason == "length":
                return opinion(step, -1.0, "it was cut off")
        return None

    return critic


def repetition(most: float = 0.5, words: int = 4, least_words: int = 24) -> Critic:
    """Against the first answer of which more than the share ``most`` of its runs of so many ``words`` occurred in it
    before. Answers shorter than ``least_words`` are left alone."""

    def critic(episode: Episode) -> Feedback | None:
        for step in _counted(episode):
            said = step.text.split()
            runs = Counter(tuple(said[i : i + words]) for i in range(len(said) - words + 1))
            total = sum(runs.values())
            if len(said) >= least_words and 1.0 - len(runs) / total > most:
                return opinion(step, -1.0, f"it repeats itself: {1.0 - len(runs) / total:.0%}")
        return None

    return critic


def secrets() -> Critic:
    """Against the first answer with something in it that looks like a secret and that the user did not send. The
    opinion names the kind, never the secret."""

    def critic(episode: Episode) -> Feedback | None:
        for step in _counted(episode):
            sent = "\n".join(text_of(m) for m in step.messages if m.get("role") == "user")
            for kind, regex in _SECRETS.items():
                if any(match[0] not in sent for match in regex.finditer(step.text)):
                    return opinion(step, -1.0, f"it gives away {kind}", tags=("secret",))
        return None

    return critic


def _counted(episode: Episode) -> Iterator[Step]:
    return (s for s in episode.steps if s.trainable and s.finish_reason != "aborted")


def _read(value: Any) -> Any:
    """A JSON file, where it is a path. ConfigError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(Path(value).read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"{value} cannot be read as JSON: {e}") from e


def _validator(schema: Mapping[str, Any]) -> Any:
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    kind: Any = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as e:
        raise ConfigError(f"not a JSON schema: {e.message}") from e
    return kind(schema)


def _invalid(text: str, validator: Any) -> str:
    """What is wrong with it, without the values, which may be private; empty where nothing is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return "not valid JSON"
    error = next(iter(validator.iter_errors(value)), None)
    where = "/".join(map(str, error.absolute_path)) if error is not None else ""
    return f"not of the schema: {error.validator} at /{where}" if error is not None else ""
