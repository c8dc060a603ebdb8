"""Critics that misbehave, named by the tests as a configuration names them. One of them counts its calls in a file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradatim.errors import CriticError
from gradatim.feedback.critics import opinion
from gradatim.types import Episode, Feedback


def good(episode: Episode) -> Feedback | None:
    return opinion(episode, True)


def last(episode: Episode) -> Feedback | None:
    return opinion(episode.steps[-1], -0.5, "the last one", tags=("mine",))


def silent(episode: Episode) -> Feedback | None:
    return None


def raises(episode: Episode) -> Feedback | None:
    raise ValueError("holds a user's text")


def refuses(episode: Episode) -> Feedback | None:
    raise CriticError("the judge is away")


def hangs(episode: Episode) -> Feedback | None:
    while True:
        time.sleep(1)


def dies(episode: Episode) -> Feedback | None:
    os._exit(7)


def eats(episode: Episode) -> Feedback | None:
    raise MemoryError


def wrong_value(episode: Episode) -> Feedback | None:
    return opinion(episode, float("nan"))


def wrong_type(episode: Episode) -> Any:
    return "good"


def wrong_target(episode: Episode) -> Feedback | None:
    from tests.records import step

    return opinion(step("elsewhere", "elsewhere"), 1.0)


def wrong_source(episode: Episode) -> Feedback | None:
    return opinion(episode, True, source="stranger:x")


def counting(path: str) -> Callable[[Episode], Feedback | None]:
    def critic(episode: Episode) -> Feedback | None:
        with Path(path).open("a") as file:
            file.write(f"{episode.id} {len(episode.steps)}\n")
        return opinion(episode, len(episode.steps) > 1)

    return critic


def counting_silence(path: str) -> Callable[[Episode], Feedback | None]:
    count = counting(path)

    def critic(episode: Episode) -> Feedback | None:
        count(episode)
        return None

    return critic


not_a_critic = 3
