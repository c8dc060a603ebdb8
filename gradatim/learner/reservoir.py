"""A bounded sample of what was learned, with a place for every stratum however rare.

Class-balancing reservoir sampling (Chrysakis and Moens 2020, Online Continual Learning from Imbalanced Data): while
there is room all is kept; then a new member of a small stratum takes the place of a random one of the largest, and a
large stratum is a uniform sample of its own stream (Vitter 1985, algorithm R). What it holds is a function of the
seed and of the order of calls. Knows no store and no model.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gradatim.types import StepId

MOST_STRATA = 256  # later ones share a stratum
_OTHERS = ("", "")
_OF_ANOTHER_WORLD = 0.25
_FEW = 64  # members of a stratum that are all looked at; and draws in a row that found nobody in a larger one

Stratum = tuple[str, str]  # skill, origin


@dataclass(slots=True)
class Member:
    """One step's example, in the revision that was trained on."""

    id: str
    step_id: StepId
    stratum: Stratum
    position: int  # in the log
    adapter: int = 0  # step of the adapter that was trained on it
    current: bool = True  # it can be rehearsed, and no newer revision has come


class Reservoir:
    """At most ``capacity`` members, each in one stratum."""

    def __init__(self, capacity: int, seed: int) -> None:
        self._capacity = capacity
        self._rng = random.Random(seed)
        self._strata: dict[Stratum, list[Member]] = {}
        self._slots: dict[str, tuple[Stratum, int]] = {}  # id -> where
        self._arrived: Counter[Stratum] = Counter()
        self._full: set[Stratum] = set()  # strata that were the largest once

    def __len__(self) -> int:
        return len(self._slots)

    def get(self, id: str) -> Member | None:
        if id not in self._slots:
            return None
        stratum, index = self._slots[id]
        return self._strata[stratum][index]

    def add(self, member: Member) -> Member | None:
        """Who has no place after this: nobody, the member itself, or the one whose place it took."""
        stratum = self._stratum(member)
        self._arrived[stratum] += 1
        if len(self._slots) < self._capacity:
            self._append(stratum, member)
            return None
        largest = max(self._strata, key=lambda s: len(self._strata[s]))
        self._full.add(largest)
        if stratum not in self._full:
            return self._replace(largest, stratum, member)
        if self._rng.random() * self._arrived[stratum] < len(self._strata[stratum]):
            return self._replace(stratum, stratum, member)
        return member

    def discard(self, id: str) -> None:
        """The last of its stratum takes its place."""
        found = self._slots.pop(id, None)
        if found is None:
            return
        stratum, index = found
        members = self._strata[stratum]
        last = members.pop()
        if last.id != id:
            members[index] = last
            self._slots[last.id] = (stratum, index)

    def draw(
        self,
        n: int,
        eligible: Callable[[Member], bool],
        need: Callable[[str], float],
        rng: random.Random,
        since: int = 0,
    ) -> list[Member]:
        """One of each stratum, in a random order of strata, then more of those whose skill needs more, until there are
        ``n`` or none is left. ``need``: of a skill, how many turns it gets beside one of need 1. ``since``: members
        before that position count for less."""
        turns: list[tuple[float, Stratum, Iterator[Member]]] = []  # (when, whose, what comes)
        for stratum, members in self._strata.items():
            if members:
                first = -(rng.random() ** (1.0 / need(stratum[0])))  # in [-1, 0]: before anybody's second
                turns.append((first, stratum, _at_random(members, eligible, rng, since)))
        heapq.heapify(turns)
        out: list[Member] = []
        while turns and len(out) < n:
            when, stratum, members_left = heapq.heappop(turns)
            if (member := next(members_left, None)) is not None:
                out.append(member)
                heapq.heappush(turns, (max(0.0, when) + 1.0 / need(stratum[0]), stratum, members_left))
        return out

    def _stratum(self, member: Member) -> Stratum:
        known = member.stratum in self._strata or len(self._strata) < MOST_STRATA
        return member.stratum if known else _OTHERS

    def _append(self, stratum: Stratum, member: Member) -> None:
        members = self._strata.setdefault(stratum, [])
        self._slots[member.id] = (stratum, len(members))
        members.append(member)

    def _replace(self, victims: Stratum, stratum: Stratum, member: Member) -> Member:
        victim = self._rng.choice(self._strata[victims])
        self.discard(victim.id)
        self._append(stratum, member)
        return victim


def weight(member: Member, oldest: int, newest: int, since: int = 0) -> float:
    """In [1, 2]: the newest is twice as likely as the oldest. A quarter of that from before ``since``: what was learned
    in another world is rehearsed less, and not forgotten, since that world may come back."""
    recency = (member.position - oldest) / (newest - oldest) if newest > oldest else 0.0
    return (1.0 if member.position >= since else _OF_ANOTHER_WORLD) * (1.0 + min(1.0, max(0.0, recency)))


def _at_random(
    members: list[Member], eligible: Callable[[Member], bool], rng: random.Random, since: int
) -> Iterator[Member]:
    """The eligible ones by weight, each once, without looking at all of a large stratum."""
    sampled = [m.position for m in (members if len(members) <= _FEW else rng.sample(members, _FEW))]
    oldest, newest = min(sampled), max(sampled)
    taken: set[str] = set()
    unlucky = 0 if len(members) > _FEW else _FEW
    while unlucky < _FEW:
        member = rng.choice(members)
        lucky = rng.random() * 2.0 < weight(member, oldest, newest, since)
        if lucky and member.id not in taken and eligible(member):
            unlucky = 0
            taken.add(member.id)
            yield member
        else:
            unlucky += 1
    left = [m for m in members if m.id not in taken and eligible(m)]
    # Efraimidis and Spirakis 2006: in the order of u^(1/w)
    keys = {m.id: rng.random() ** (1.0 / weight(m, oldest, newest, since)) for m in left}
    yield from sorted(left, key=lambda m: keys[m.id], reverse=True)
