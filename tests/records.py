"""Records for tests, with everything that does not matter filled in."""

from __future__ import annotations

import itertools
from typing import Any

from gradatim.types import Adapter, AdapterId, Case, Episode, EpisodeId, Example, Feedback, FeedbackKind, Step, StepId

_count = itertools.count(1)


def step(step_id: str = "s0", episode: str = "e", **given: Any) -> Step:
    filled: dict[str, Any] = {
        "created_at": 1.0,
        "adapter_id": AdapterId("agent@0"),
        "adapter_sha256": "base",
        "stage": "live",
        "prompt_ids": (1, 2, 3),
        "completion_ids": (7, 8),
        "logprobs": (-0.5, -0.25),
        "text": "click 2",
        "finish_reason": "stop",
    }
    return Step(id=StepId(step_id), episode_id=EpisodeId(episode), **(filled | given))


def feedback(kind: FeedbackKind, episode: str = "e", step_id: str | None = None, **given: Any) -> Feedback:
    filled: dict[str, Any] = {"id": f"f{next(_count)}", "created_at": 1.0, "source": "human:alice"}
    return Feedback(
        kind=kind,
        episode_id=EpisodeId(episode),
        step_id=StepId(step_id) if step_id else None,
        **(filled | given),
    )


def case_of(*opinions: Feedback, steps: tuple[Step, ...] = (), position: int = 1) -> Case:
    episode = Episode(id=EpisodeId("e"), steps=steps or (step(),))
    return Case(position=position, episode=episode, feedback=opinions, touched_at=1.0)


def example(example_id: str = "x", **given: Any) -> Example:
    filled: dict[str, Any] = {
        "created_at": 1.0,
        "episode_id": EpisodeId("e"),
        "step_id": StepId(f"step-{example_id}"),
        "prompt_ids": (1, 2, 3),
        "chosen_ids": (7, 8),
        "origin": "success",
    }
    return Example(id=example_id, **(filled | given))


def adapter(step_number: int, parent: int | None = None, name: str = "agent", **given: Any) -> Adapter:
    filled: dict[str, Any] = {
        "base_sha256": "base",
        "sha256": f"sha-{step_number}",
        "path": f"adapters/{step_number}" if step_number else "",
        "created_at": float(step_number),
        "update_id": f"u{step_number}" if step_number else "",
    }
    return Adapter(
        id=AdapterId(f"{name}@{step_number}"),
        name=name,
        step=step_number,
        parent_id=None if parent is None else AdapterId(f"{name}@{parent}"),
        **(filled | given),
    )
