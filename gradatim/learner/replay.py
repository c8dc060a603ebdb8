"""What to rehearse: the examples that made the live adapter and its ancestors, a few of every skill and origin, and
more of the skills that the live adapter knows least.

Kept in memory is only a bounded index; examples are read from the store when they are drawn. The log is followed in
its order, and read from its beginning only at the start: the index is a function of the log and the seed, so that a
restart draws what it would have drawn. It knows no tokens and no losses.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from itertools import islice

from gradatim.learner.reservoir import Member, Reservoir
from gradatim.protocols import Store
from gradatim.types import Adapter, AdapterId, Example, Move, Record, Stage, StepId, Update, Verdict, is_new_world

CAPACITY = 20_000  # examples in the index, about 10 MB
RECENT = 4096  # examples that wait for an update, in memory; older ones are read again
ON_TRIAL = 64  # adapters whose examples wait for their promotion

_PAGE = 200  # records read at once; an example of 2000 tokens takes 70 KB
CHANCE = ".chance"  # ends the name of a skill in a verdict's evidence: how likely the candidate gives its answers

_Kind = type[Example | Update | Adapter | Verdict | Move]
_KINDS: Sequence[_Kind] = (Example, Update, Adapter, Verdict, Move)


class Lineage:
    """The live adapter and its ancestors, without the base, by their steps."""

    def __init__(self) -> None:
        self._parents = array("q")  # of each step; -1: none, or not known
        self._within = bytearray()  # of each step: whether it is in the lineage
        self._live = 0

    def born(self, step: int, parent: int) -> None:
        missing = step + 1 - len(self._parents)
        self._parents.extend([-1] * missing)
        self._within.extend(bytes(max(0, missing)))
        self._parents[step] = parent

    def turn_to(self, step: int) -> None:
        """Costs one step where a child of the live adapter goes live, and the depth of the lineage where not."""
        if step >= len(self._parents):
            self.born(step, -1)
        if self._parents[step] != self._live:
            self._within = bytearray(len(self._parents))
            at = self._parents[step]
            while at > 0:
                self._within[at] = 1
                at = self._parents[at]
        self._within[step] = step > 0
        self._live = step

    def __contains__(self, step: int) -> bool:
        return step < len(self._within) and bool(self._within[step])


class StoreReplay:
    """A ``protocols.Replay`` over the store's log. ``first``: steps whose examples take up to half of every draw.

    Never drawn: examples that are not in the live adapter's lineage (refused, rejected, rolled back and whatever was
    built on those), retained and withdrawn ones, superseded revisions, and answers to avoid, which would be pushed
    down again and again against an ever newer parent.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        seed: int,
        capacity: int = CAPACITY,
        *,
        first: Callable[[], Sequence[StepId]] | None = None,
    ) -> None:
        self._store = store
        self._first = first
        self._name = name
        self._seed = seed
        self._read: dict[type[Record], int] = dict.fromkeys(_KINDS, 0)  # store positions
        self._recent: OrderedDict[str, Member] = OrderedDict()  # by id: not trained on yet
        self._on_trial: OrderedDict[int, list[Member]] = OrderedDict()  # by step of the adapter
        self._learned = Reservoir(capacity, seed)
        self._by_step: dict[StepId, Member] = {}  # the newest revisions, of recent and learned ones
        self._lineage = Lineage()
        self._measured: tuple[str, Mapping[str, float]] = ("", {})  # the candidate judged last, its chances by skill
        self._known: Mapping[str, float] = {}  # the same of the live adapter
        self._dated: deque[tuple[float, int]] = deque(maxlen=RECENT)  # when the last examples were made, and where
        self._since = 0  # log position: examples before it are of another world

    def draw(self, n: int, *, exclude: Set[str] = frozenset()) -> Sequence[Example]:
        """Up to ``n`` examples, no two of one step, none whose id is in ``exclude``."""
        if n <= 0:
            return []
        self._catch_up()
        rng = random.Random(f"{self._seed}:{self._read[Update]}")
        drawn = self._preferred(n // 2, exclude)
        taken = {member.id for member in drawn} | exclude
        drawn += self._learned.draw(
            n - len(drawn), lambda m: m.adapter in self._lineage and m.id not in taken, self._need, rng, self._since
        )
        return [example for member in drawn for _, example in self._store.newest(Example, id=member.id)]

    def _preferred(self, n: int, exclude: Set[str]) -> list[Member]:
        """Of the steps that are to come first, those that may be drawn at all."""
        found = (self._by_step.get(step_id) for step_id in (self._first() if self._first is not None else ()))
        fit = (m for m in found if m is not None and m.current and m.id not in exclude and m.adapter in self._lineage)
        return list(islice((m for m in fit if self._learned.get(m.id) is m), n))

    def _need(self, skill: str) -> float:
        """In [1, 3]: three times as many of a skill whose answers are not known at all as of one known by heart."""
        return 3.0 - 2.0 * self._known.get(skill, 0.5)

    # ------------------------------------------------------------------------------------ following the log

    def _catch_up(self) -> None:
        for position, record in heapq.merge(*map(self._new, _KINDS), key=lambda row: row[0]):
            self._read[type(record)] = position
            match record:
                case Example():
                    self._dated.append((record.created_at, position))
                    self._note(position, record)
                case Update():
                    self._trained(position, record)
                case Adapter() if record.name == self._name:
                    self._lineage.born(record.step, _step(record.parent_id) if record.parent_id else -1)
                case Verdict():
                    self._judged(record)
                case Move() if record.adapter_id.rpartition("@")[0] == self._name:
                    self._moved(record)

    def _new(self, kind: _Kind) -> Iterator[tuple[int, Record]]:
        after = self._read[kind]
        while rows := self._store.read(kind, after=after, limit=_PAGE):
            yield from rows
            after = rows[-1][0]

    def _note(self, position: int, example: Example) -> None:
        """A newer revision takes the older one's chances away, until it is trained on itself."""
        old = self._by_step.pop(example.step_id, None)
        if old is not None:
            old.current = False
            self._recent.pop(old.id, None)
            self._learned.discard(old.id)
        self._await(position, example)

    def _await(self, position: int, example: Example) -> Member:
        """Also what cannot be rehearsed, or it would be looked for when an update has trained on it."""
        member = Member(example.id, example.step_id, (example.skill, example.origin), position)
        member.current = _rehearsable(example)
        self._recent[member.id] = self._by_step[member.step_id] = member
        while len(self._recent) > RECENT:
            self._forget(self._recent.popitem(last=False)[1])
        return member

    def _trained(self, position: int, update: Update) -> None:
        if update.adapter_id is None or update.adapter_id.rpartition("@")[0] != self._name:
            return
        members = [
            self._recent.get(i) or self._learned.get(i) or self._look_up(i, position) for i in update.example_ids
        ]
        self._on_trial[_step(update.adapter_id)] = [m for m in members if m is not None]
        while len(self._on_trial) > ON_TRIAL:
            self._on_trial.popitem(last=False)

    def _look_up(self, example_id: str, before: int) -> Member | None:
        """An example that waited long for its update, where it was the newest revision of its step by then."""
        for position, example in self._store.newest(Example, id=example_id, before=before):
            newest = self._store.newest(Example, step_id=example.step_id, before=before)
            if newest[0][0] == position:
                return self._await(position, example)
        return None

    def _judged(self, verdict: Verdict) -> None:
        if is_new_world(verdict):
            new = (at for when, at in self._dated if when >= verdict.evidence.get("since", verdict.created_at))
            self._since = next(new, self._dated[-1][1] + 1 if self._dated else 0)
        chances = {
            k.removesuffix(CHANCE): min(1.0, max(0.0, v)) for k, v in verdict.evidence.items() if k.endswith(CHANCE)
        }
        if chances:
            self._measured = (verdict.adapter_id, chances)

    def _moved(self, move: Move) -> None:
        step = _step(move.adapter_id)
        if move.after is Stage.LIVE:
            self._lineage.turn_to(step)
            if self._measured[0] == move.adapter_id:
                self._known = self._measured[1]
        if move.after in (Stage.LIVE, Stage.REJECTED):
            members = self._on_trial.pop(step, [])
            for member in members if move.after is Stage.LIVE else ():
                self._learn(member, step)

    def _learn(self, member: Member, step: int) -> None:
        if not member.current or member.adapter in self._lineage:
            return
        member.adapter = step
        self._by_step[member.step_id] = member
        self._recent.pop(member.id, None)
        if self._learned.get(member.id) is None and (out := self._learned.add(member)) is not None:
            self._forget(out)

    def _forget(self, member: Member) -> None:
        if self._by_step.get(member.step_id) is member:
            del self._by_step[member.step_id]


def _rehearsable(example: Example) -> bool:
    return bool(example.chosen_ids) and not example.retained


def _step(adapter_id: AdapterId) -> int:
    return int(adapter_id.rpartition("@")[2])
