"""What became of an answer: captured, judged, credited, trained on or dropped, and why. Read from the store alone.

Knows nothing of how any of it is decided.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence, Set
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gradatim.protocols import Store
from gradatim.server.memory import MemoryAdmin
from gradatim.server.problems import ApiError, json_response
from gradatim.server.records import backwards, newest, plain
from gradatim.types import Adapter, Credit, EpisodeId, Example, Feedback, Move, Reward, Step, StepId, Update, Verdict

MAX_PAGE = 200
SCAN = 2000  # records that one request may look through
Json = dict[str, Any]


class ExplainRoutes:
    """Episodes, and the story of one answer."""

    def __init__(self, store: Store, memory: MemoryAdmin | None = None) -> None:
        self._store, self._memory = store, memory

    async def list_episodes(self, request: Request) -> Response:
        """Newest first. ``after`` is ``next_after`` of the page before."""
        limit = _integer(request, "limit", 20, high=MAX_PAGE)
        after = _integer(request, "after", 0, high=2**62)
        return json_response(await asyncio.to_thread(self._page, limit, after))

    async def get_episode(self, request: Request) -> Response:
        return json_response(await asyncio.to_thread(self._episode, request.path_params["id"]))

    async def explain(self, request: Request) -> Response:
        return json_response(await asyncio.to_thread(self._explain, request.path_params["id"]))

    def _page(self, limit: int, after: int) -> Json:
        low = after
        seen: set[str] = set()
        rows: list[Json] = []
        for position, step in backwards(self._store, Step, after, SCAN):
            if step.episode_id not in seen:
                if len(rows) == limit:
                    break
                seen.add(step.episode_id)
                newer = after and self._store.read(Step, after=position, episode_id=step.episode_id, limit=1)
                if not newer:  # else it stood on an earlier page
                    rows.append(self._row(step))
            low = position
        more = self._older(low)
        return {"object": "list", "data": rows, "has_more": more, "next_after": str(low) if more else None}

    def _older(self, position: int) -> bool:
        first = self._store.read(Step, limit=1)
        return bool(first) and first[0][0] < position

    def _row(self, step: Step) -> Json:
        """An episode by its newest step."""
        steps = self._store.read(Step, episode_id=step.episode_id)
        feedback = self._feedback(step.episode_id)
        reward = newest(self._store, Reward, episode_id=step.episode_id)
        return {
            "id": step.episode_id,
            "steps": len(steps),
            "began_at": steps[0][1].created_at if steps else step.created_at,
            "last_at": step.created_at,
            "adapter": step.adapter_id,
            "skill": step.skill,
            "user": step.user,
            "feedback": len(feedback),
            "reward": plain(reward.value) if reward else None,
        }

    def _episode(self, episode_id: str) -> Json:
        episode = self._store.episode(EpisodeId(episode_id))
        if episode is None:
            raise ApiError(404, "no episode of that id was recorded", param="id", code="not_found")
        return {
            "id": episode.id,
            "steps": plain(episode.steps),
            "feedback": plain(self._feedback(episode_id)),
            "reward": plain(newest(self._store, Reward, episode_id=episode_id)),
            "credit": plain(newest(self._store, Credit, episode_id=episode_id)),
        }

    def _feedback(self, episode_id: str) -> list[Feedback]:
        """The newest revision of each opinion."""
        found = self._store.read(Feedback, episode_id=episode_id)
        return list({feedback.id: feedback for _, feedback in found}.values())

    def _explain(self, step_id: str) -> Json:
        step = self._store.step(id=StepId(step_id))
        if step is None:
            raise ApiError(404, "no response of that id was recorded", param="id", code="not_found")
        feedback = [f for f in self._feedback(step.episode_id) if step.id in (f.step_id or step.id, f.rejected_id)]
        examples = self._store.read(Example, step_id=step.id)
        updates = self._updates(examples)
        reward = newest(self._store, Reward, episode_id=step.episode_id)
        return {
            "response_id": step.id,
            "step": plain(step),
            "feedback": plain(feedback),
            "reward": plain(reward),
            "credit": _share(newest(self._store, Credit, episode_id=step.episode_id), step.id),
            "examples": plain([example for _, example in examples]),
            "updates": [_use(update, {example.id for _, example in examples}) for update in updates],
            "adapters": [self._adapter(u.adapter_id) for u in updates if u.adapter_id],
            "memory": {"of_it": plain(step.memory), "from_it": self._remembered(step.id)},
            "summary": _summary(step, feedback, reward, {example.id for _, example in examples}, updates),
        }

    def _remembered(self, step_id: StepId) -> list[Json]:
        """The entries that were made of it."""
        return [] if self._memory is None else plain(self._memory.show(step_id=step_id))

    def _updates(self, examples: Sequence[tuple[int, Example]]) -> list[Update]:
        """Updates that trained on, replayed or left out any of these; SCAN after the oldest example are looked at."""
        if not examples:
            return []
        ids = {example.id for _, example in examples}
        later = self._store.read(Update, after=examples[0][0], limit=SCAN)
        return [
            update
            for _, update in later
            if not ids.isdisjoint((*update.example_ids, *update.replay_ids, *update.left_out))
        ]

    def _adapter(self, adapter_id: str) -> Json:
        return {
            "adapter": plain(newest(self._store, Adapter, id=adapter_id)),
            "verdicts": plain([verdict for _, verdict in self._store.read(Verdict, adapter_id=adapter_id)]),
            "moves": plain([move for _, move in self._store.read(Move, adapter_id=adapter_id)]),
        }


def _share(credit: Credit | None, step_id: StepId) -> Json | None:
    if credit is None or step_id not in credit.step_ids:
        return None
    index = credit.step_ids.index(step_id)
    return {
        "advantage": plain(credit.advantages[index]),
        "method": credit.methods[index],
        "why": credit.reasons[index] if credit.reasons else "",
        "at": credit.created_at,
    }


def _use(update: Update, ids: set[str]) -> Json:
    return {
        "id": update.id,
        "created_at": update.created_at,
        "applied": update.applied,
        "parent": update.parent_id,
        "adapter": update.adapter_id,
        "trained_on": sorted(ids.intersection(update.example_ids)),
        "replayed": sorted(ids.intersection(update.replay_ids)),
        "left_out": {i: update.left_out[i] for i in sorted(ids.intersection(update.left_out))},
        "n_examples": len(update.example_ids),
        "refused_because": update.refused_because,
        "metrics": plain(update.metrics),
        "scale": update.scale,
    }


def _summary(
    step: Step, feedback: Sequence[Feedback], reward: Reward | None, examples: Set[str], updates: Sequence[Update]
) -> str:
    """One sentence: how far it came."""
    took_part = [u for u in updates if not examples.isdisjoint((*u.example_ids, *u.replay_ids))]
    made = [update.adapter_id for update in took_part if update.applied and update.adapter_id]
    if made:
        return f"trained into {', '.join(made)}"
    if updates and not took_part:
        reasons = {why for update in updates for i, why in update.left_out.items() if i in examples}
        return f"left out of an update: {'; '.join(sorted(reasons))}"
    if updates:
        return f"the update was refused: {updates[-1].refused_because or 'no reason recorded'}"
    if examples:
        return f"{len(examples)} examples wait for an update"
    if not step.trainable:
        return f"recorded, never trained on ({'aborted' if step.finish_reason == 'aborted' else 'a side call'})"
    if not any(not opinion.retracted for opinion in feedback):
        return "recorded; no feedback yet"
    if reward is None:
        return "feedback recorded; not judged yet"
    worth = "abstained" if reward.value is None else f"judged {reward.value:+.2f}"
    return f"{worth}: {reward.reason or 'no example was made'}"


def _integer(request: Request, name: str, default: int, *, high: int) -> int:
    value = request.query_params.get(name, str(default))
    if not (value.isascii() and value.isdigit() and len(value) < 20 and int(value) <= high):
        raise ApiError(422, f"{name} must be a whole number of 0 to {high}", param=name)
    return int(value)
