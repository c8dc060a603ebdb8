"""What the records say, as plain values for people and machines: every adapter's story, and where learning stands.

Reads the store and changes nothing. It knows neither HTTP nor a model, so it answers with or without a server.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from gradatim.app import figures
from gradatim.app.home import Home
from gradatim.config import Config
from gradatim.loop import JUDGED, LEARNED, is_ripe
from gradatim.release.proof import awaited
from gradatim.release.proxy import standing
from gradatim.store import SqlStore
from gradatim.types import (
    DRIFT,
    ON_THE_WAY,
    Adapter,
    AdapterId,
    Decision,
    Example,
    Feedback,
    Move,
    Record,
    Reward,
    Stage,
    Update,
    Verdict,
)

R = TypeVar("R", bound=Record)
Json = dict[str, Any]
MOST_ADAPTERS = 1000  # in one list
_MOST_DRIFT = 10  # of what was seen to change, the newest
_MOST_CASES = 1000  # unjudged episodes that are counted


def adapters(store: SqlStore, name: str, limit: int = MOST_ADAPTERS) -> list[Json]:
    """The newest versions of a name, oldest first, each with its stage, what made it, what judged it and every move.
    The live one is among them, however old it is."""
    found = store.newest(Adapter, name=name, limit=limit)[::-1]
    if not found:
        return []
    first = found[0][0]  # all that is told of these adapters stands behind it, but for the update that made the first
    updates = {u.id: u for _, u in _after(store, Update, first)}
    verdicts, moves = _by_adapter(_after(store, Verdict, first)), _by_adapter(_after(store, Move, first))
    stories = []
    for _, a in found:
        update = updates.get(a.update_id) or _made_by(store, a)
        stories.append(_adapter(a, moves[a.id][-1].after, update, verdicts[a.id], moves[a.id]))
    live = live_id(store, name)
    if live is None or any(a.id == live for _, a in found):
        return stories
    return [*(_story(store, a) for _, a in store.newest(Adapter, id=live)), *stories]


def _after(store: SqlStore, kind: type[R], position: int) -> Iterator[tuple[int, R]]:
    while page := store.read(kind, after=position):
        yield from page
        position = page[-1][0]


V = TypeVar("V", Verdict, Move)


def _by_adapter(rows: Iterable[tuple[int, V]]) -> Mapping[AdapterId, list[V]]:
    out: dict[AdapterId, list[V]] = defaultdict(list)
    for _, record in rows:
        out[record.adapter_id].append(record)
    return out


def adapter(store: SqlStore, name: str, adapter_id: AdapterId) -> Json | None:
    """One version; None where there is no such one of that name."""
    found = [a for _, a in store.newest(Adapter, id=adapter_id) if a.name == name]
    return _story(store, found[0]) if found else None


def live_id(store: SqlStore, name: str) -> AdapterId | None:
    return next(iter(store.stages(name, Stage.LIVE)), None)


def _story(store: SqlStore, adapter: Adapter) -> Json:
    moves = [m for _, m in store.read(Move, adapter_id=adapter.id)]
    verdicts = [v for _, v in store.read(Verdict, adapter_id=adapter.id)]
    return _adapter(adapter, moves[-1].after, _made_by(store, adapter), verdicts, moves)


def _made_by(store: SqlStore, adapter: Adapter) -> Update | None:
    return next((u for _, u in store.newest(Update, id=adapter.update_id)), None) if adapter.update_id else None


def _adapter(
    adapter: Adapter, stage: Stage, update: Update | None, verdicts: Sequence[Verdict], moves: Sequence[Move]
) -> Json:
    return {
        "id": adapter.id,
        "stage": stage.value,
        "step": adapter.step,
        "parent": adapter.parent_id,
        "sha256": adapter.sha256,
        "base_sha256": adapter.base_sha256,
        "created_at": adapter.created_at,
        "update": update_row(update) if update else None,
        "verdicts": [_verdict(v) for v in verdicts],
        "moves": [_move(m) for m in moves],
    }


def _verdict(verdict: Verdict) -> Json:
    return {
        "gate": verdict.gate,
        "decision": verdict.decision.value,
        "against": list(verdict.against),
        "reason": verdict.reason,
        "evidence": dict(verdict.evidence),
        "at": verdict.created_at,
    }


def _move(move: Move) -> Json:
    return {
        "before": move.before and move.before.value,
        "after": move.after.value,
        "actor": move.actor,
        "reason": move.reason,
        "at": move.created_at,
    }


def update_row(update: Update) -> Json:
    return {
        "id": update.id,
        "at": update.created_at,
        "applied": update.applied,
        "adapter": update.adapter_id,
        "parent": update.parent_id,
        "n_examples": len(update.example_ids),
        "n_replayed": len(update.replay_ids),
        "kinds": dict(update.kinds),
        "metrics": dict(update.metrics),
        "scale": update.scale,
        "refused_because": update.refused_because,
        "left_out": dict(update.left_out),
        "duration_s": update.duration_s,
    }


def feedback_row(feedback: Feedback) -> Json:
    return {
        "id": feedback.id,
        "at": feedback.created_at,
        "kind": feedback.kind,
        "source": feedback.source,
        "episode": feedback.episode_id,
        "response": feedback.step_id,
        "value": feedback.value,
        "correction": feedback.correction,
        "comment": feedback.comment,
        "retracted": feedback.retracted,
    }


def learning(store: SqlStore, config: Config, *, recent: int = 50) -> Json:
    """Where the loop stands on what it was told. ``..._recently``: among the newest ``recent`` records of a kind.
    ``reward``: which rule judges, on how many audited labels, and how well; None before anything was judged.

    ``learning`` is true while there is work that the loop is at, or will take up by itself at once.
    """
    stages, records = store.stage_counts(config.name), store.counts()
    live = live_id(store, config.name)
    rewards, updates = _newest(store, Reward, recent), _newest(store, Update, recent)
    abstained = [r for r in rewards if r.value is None]
    unjudged = len(store.cases(after=store.cursor(JUDGED), limit=_MOST_CASES))
    waiting = _waiting(store)
    ripe = live is not None and is_ripe(waiting, live, config.learner, time.time())
    adapters = sum(stages.values())
    applied = max(0, adapters - 1)  # an update that was applied made one adapter; step 0 is the base
    return {
        "live": live,
        "learning": bool(unjudged or ripe or any(stages[s] for s in ON_THE_WAY)),
        "waiting_feedback": unjudged,
        "waiting_examples": len(waiting),
        "updates_applied": applied,
        "updates_refused": records["updates"] - applied,
        "candidates_refused": stages[Stage.REJECTED],
        "adapters": adapters,
        "records": records,
        "judged_recently": len(rewards),
        "abstained_recently": len(abstained),
        "abstained_because": dict(Counter(r.reason.partition(" (")[0] for r in abstained).most_common(3)),
        "reward": figures.said(Home(config.data_dir), store.end()),
        "updates_recently": len(updates),
        "applied_recently": sum(u.applied for u in updates),
        "last_update": update_row(updates[0]) if updates else None,
        "refused_recently": _refusals(updates, _newest(store, Verdict, recent)),
        "gamed": _gamed(store, live),
        "proof_awaited": _awaited(store),
        "drift": [_drift(v) for _, v in store.newest(Verdict, gate=DRIFT, limit=_MOST_DRIFT)],
    }


def _gamed(store: SqlStore, live: AdapterId | None) -> Json | None:
    """The alarm that the reward is gamed, where one stands."""
    told = standing(store, live)
    return {"at": told.created_at, "adapter": told.adapter_id, "reason": told.reason} if told else None


def _awaited(store: SqlStore) -> Json | None:
    """What the newest candidate was refused for, where that was want of proof that it is better than the anchor."""
    told = awaited(store)
    return {"at": told.created_at, "adapter": told.adapter_id, "reason": told.reason} if told else None


def _drift(verdict: Verdict) -> Json:
    """``what``: changed, world, adapter or unknown."""
    what = next((kind for kind in ("world", "adapter", "unknown", "changed") if kind in verdict.evidence), "")
    return {"at": verdict.created_at, "what": what, "live": verdict.adapter_id, "reason": verdict.reason} | {
        k: bool(verdict.evidence[k]) for k in ("open", "adapt") if k in verdict.evidence
    }


def _newest(store: SqlStore, kind: type[R], limit: int) -> list[R]:
    """Newest first."""
    return [record for _, record in store.newest(kind, limit=limit)]


def _waiting(store: SqlStore) -> Sequence[Example]:
    """Examples that no update was made from yet, the newest of each step."""
    fresh = store.read(Example, after=store.cursor(LEARNED), limit=_MOST_CASES)
    by_step = {e.step_id: e for _, e in fresh}
    return [e for e in by_step.values() if not e.retained and (e.chosen_ids or e.rejected_ids)]


class Latencies:
    """How long feedback took to reach users: from its arrival to the first adapter that learned from it going live.

    Keeps what it has worked out, since it never changes. The first look goes back ``look_back`` changes of stage, and
    takes the adapters of that time for the first ones that learned from their feedback.
    """

    def __init__(self, store: SqlStore, most: int = 2000, look_back: int = 256) -> None:
        self._store = store
        self._look_back = look_back
        self._seen = -1  # store position
        self._known: OrderedDict[str, None] = OrderedDict()  # feedback ids, the last ones
        self._most_known = 16 * most
        self._latencies_s: deque[float] = deque(maxlen=most)

    def newest(self) -> list[float]:
        """In seconds, the last ones, in the order in which they went live."""
        if self._seen < 0:
            first = self._store.newest(Move, limit=self._look_back)
            self._seen = first[-1][0] - 1 if first else 0
        while moves := self._store.read(Move, after=self._seen):
            for self._seen, move in moves:
                if move.after is Stage.LIVE and move.before in ON_THE_WAY:
                    self._add(move)
        return list(self._latencies_s)

    def _add(self, move: Move) -> None:
        for _, update in self._store.read(Update, adapter_id=move.adapter_id):
            examples = [e for i in update.example_ids for _, e in self._store.newest(Example, id=i)]
            fresh = {f for e in examples for f in e.feedback_ids if f not in self._known}
            for i in sorted(fresh):
                self._known[i] = None
                for _, opinion in self._store.read(Feedback, id=i, limit=1):
                    self._latencies_s.append(round(move.created_at - opinion.created_at, 3))
        while len(self._known) > self._most_known:
            self._known.popitem(last=False)


def _refusals(updates: Sequence[Update], verdicts: Sequence[Verdict]) -> list[Json]:
    """Newest first: updates the learner refused, and candidates a gate refused."""
    rows = [
        {"at": u.created_at, "what": u.id, "by": "learner", "reason": u.refused_because}
        for u in updates
        if not u.applied
    ]
    rows += [
        {"at": v.created_at, "what": v.adapter_id, "by": f"gate {v.gate}", "reason": v.reason}
        for v in verdicts
        if v.decision in (Decision.FAIL, Decision.REPAIR) and v.gate != DRIFT
    ]
    return sorted(rows, key=lambda row: row["at"], reverse=True)


def decision(store: SqlStore, name: str, after: int) -> Json:
    """The update made after a position, and what became of it: its verdicts, and the stage its adapter reached."""
    made = store.read(Update, after=after, limit=1)
    update = made[0][1] if made else None
    row = adapter(store, name, update.adapter_id) if update and update.adapter_id else None
    return {
        "update": update_row(update) if update else None,
        "verdicts": row["verdicts"] if row else [],
        "stage": row["stage"] if row else None,
    }
