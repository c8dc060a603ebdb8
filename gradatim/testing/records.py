"""Records of every kind with everything that does not matter filled in, for checks of a store and for users' tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradatim.types import (
    Adapter,
    AdapterId,
    Credit,
    Decision,
    EpisodeId,
    Example,
    Feedback,
    Move,
    Record,
    Reward,
    Stage,
    Step,
    StepId,
    Update,
    Verdict,
)


def a_step(id: str, episode: str = "episode", **fields: Any) -> Step:
    given: dict[str, Any] = {
        "adapter_id": AdapterId("agent@0"),
        "adapter_sha256": "00" * 32,
        "stage": "live",
        "prompt_ids": (1, 2, 3),
        "completion_ids": (4, 5),
        "logprobs": (-0.25, -1.5),
        "text": "hello",
        "finish_reason": "stop",
        **fields,
    }
    return Step(id=StepId(id), episode_id=EpisodeId(episode), created_at=1.0, **given)


def a_feedback(id: str, episode: str = "episode", **fields: Any) -> Feedback:
    given: dict[str, Any] = {"created_at": 2.0, "kind": "score", "source": "human:alice", "value": 1.0, **fields}
    return Feedback(id=id, episode_id=EpisodeId(episode), **given)


def an_adapter(step: int, name: str = "agent", **fields: Any) -> Adapter:
    given: dict[str, Any] = {
        "parent_id": AdapterId(f"{name}@{step - 1}") if step else None,
        "path": f"adapters/{name}/{step}" if step else "",
        "base_sha256": "ba" * 32,
        "sha256": f"{step:02x}" * 32,
        "created_at": 3.0 + step,
        "update_id": f"u{step}" if step else "",
        **fields,
    }
    return Adapter(id=AdapterId(f"{name}@{step}"), name=name, step=step, **given)


def a_move(adapter: str, before: Stage | None, after: Stage) -> Move:
    return Move(adapter_id=AdapterId(adapter), created_at=9.0, before=before, after=after, actor="person", reason="why")


def a_verdict(adapter: str) -> Verdict:
    return Verdict(
        adapter_id=AdapterId(adapter),
        created_at=8.0,
        gate="replay",
        decision=Decision.PASS,
        against=(AdapterId("agent@0"), AdapterId("agent@1")),
        evidence={"p": 0.125, "lost": 1.0, "ratio": float("inf")},
        reason="no skill lost more than \N{GREEK SMALL LETTER DELTA}",
    )


ODD = "tab\t, newline\n, NUL\0, \N{SNOWMAN}, \N{GRINNING FACE}, a lone surrogate \ud800, 'quotes\" and \\"


def one_of_each() -> Sequence[Record]:
    """Every kind but Move, whose only way in is ``move``; with what is hard to keep in every field that users fill."""
    episode, step = EpisodeId("episode"), StepId("step")
    messages = ({"role": "user", "content": ODD}, {"role": "tool", "content": [{"n": 1.5, "none": None, "yes": True}]})
    return (
        a_step(
            "step",
            propensity=0.9,
            messages=messages,
            prompt_ids=(0, 1, 2**31 - 1),
            logprobs=(-0.1, -1.0 / 3.0),
            text=ODD,
            sampling={"temperature": 0.7, "logit_bias": {"5": -1.0}, "stop": None},
            user="alice \N{SNOWMAN}",
            skill="login",
            trainable=False,
            chain_key="c" * 64,
            latency_s=0.125,
            coin={"agent@0": 0.9, "agent@1": 0.1},
        ),
        a_step("step:1", messages=(), prompt_ids=(), completion_ids=(), logprobs=(), text="", finish_reason="aborted"),
        a_feedback(
            "feedback",
            kind="preference",
            step_id=step,
            rejected_id=StepId("step:1"),
            value=None,
            correction=ODD,
            comment=ODD,
            confidence=0.3,
            tags=("a", "b,c"),
        ),
        Reward(
            episode_id=episode,
            created_at=3.0,
            value=None,
            confidence=0.1,
            reason=ODD,
            feedback_ids=("feedback",),
            position=3,
        ),
        Reward(episode_id=episode, created_at=3.5, value=-1.0 / 3.0, confidence=1.0),
        Credit(
            episode_id=episode,
            created_at=4.0,
            step_ids=(step, StepId("step:1")),
            advantages=(1.0 / 3.0, -1.0),
            methods=("correction", "outcome"),
            position=3,
        ),
        Example(
            id="example",
            created_at=5.0,
            episode_id=episode,
            step_id=step,
            prompt_ids=(1, 2, 3),
            chosen_ids=(4,),
            rejected_ids=(5, 6),
            weight=0.1,
            origin="correction",
            skill="login",
            state="s" * 64,
            retained=True,
            verified=True,
            feedback_ids=("feedback",),
            user="alice",
            position=3,
            label=2.0 / 3.0,
            logprobs=(-0.1, -1.0 / 3.0),
            hint_ids=(1, 2, 9, 3),
        ),
        an_adapter(0),
        Update(
            id="u1",
            created_at=6.0,
            applied=True,
            parent_id=AdapterId("agent@0"),
            adapter_id=AdapterId("agent@1"),
            example_ids=("example",),
            replay_ids=("old",),
            kinds={"correction": 1},
            metrics={"loss": 0.1, "kl": 1e-9},
            duration_s=0.5,
            scale=0.25,
        ),
        Update(id="u2", created_at=6.5, applied=False, parent_id=AdapterId("agent@0"), refused_because=ODD),
        an_adapter(1),
        a_verdict("agent@1"),
    )
