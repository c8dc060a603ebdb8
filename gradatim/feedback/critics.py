"""What a critic is made of: finding the one that the configuration names, the parts of an episode that it reads, and
the opinion that it gives.

A critic is ``critic(episode) -> Feedback | None``: an opinion, or none. One that fails or takes too long has said
nothing; it never has to guard itself. Knows nothing of where critics run and what becomes of what they say.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from gradatim.config import CriticConfig
from gradatim.errors import ConfigError, GradatimError
from gradatim.protocols import Critic
from gradatim.types import Episode, Feedback, FeedbackKind, Step

TOO_LONG = 4000  # characters of a comment; the rest is cut


def load(config: CriticConfig) -> Critic:
    """What ``use`` names; where ``options`` are given, what it returns when it is called with them. ConfigError."""
    where = f"critics.run: {config.use}"
    module, _, name = config.use.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        critic: Any = found if config.options is None else cast(Any, found)(**config.options)
    except GradatimError as e:
        raise ConfigError(f"{where}: {e}") from e
    except Exception as e:  # whatever a module does when it is imported
        raise ConfigError(f"{where} cannot be used: {type(e).__name__}: {e}") from e
    if not callable(critic):
        raise ConfigError(f"{where} is not a function of an episode")
    return cast(Critic, critic)


def last_step(episode: Episode) -> Step | None:
    """The last answer that counts: not of a side call, and whole."""
    counted = [s for s in episode.steps if s.trainable and s.finish_reason != "aborted"]
    return counted[-1] if counted else None


def question(step: Step) -> str:
    """What the user said last before this answer; empty where there are no messages."""
    return next((text_of(m) for m in reversed(step.messages) if m.get("role") == "user"), "")


def text_of(message: Mapping[str, Any]) -> str:
    """A message's content as text, whichever of OpenAI's two forms it has."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts: Sequence[Any] = content if isinstance(content, list) else ()
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))


def opinion(
    about: Episode | Step,
    value: float | bool | None,
    comment: str = "",
    *,
    kind: FeedbackKind | None = None,
    confidence: float | None = None,
    tags: Sequence[str] = (),
    source: str = "",
) -> Feedback:
    """An opinion on an episode or on one of its steps: by default an outcome where ``value`` is a boolean or None, and
    a score in [-1, 1] where it is a number. Id, time and, where none is given, source are filled in by who runs it."""
    known = isinstance(value, bool) or value is None
    return Feedback(
        id="",
        created_at=0.0,
        kind=kind or ("outcome" if known else "score"),
        source=source,
        episode_id=about.episode_id if isinstance(about, Step) else about.id,
        step_id=about.id if isinstance(about, Step) else None,
        value=(1.0 if value else -1.0) if isinstance(value, bool) else value,
        comment=comment[:TOO_LONG],
        confidence=confidence,
        tags=tuple(tags),
    )
