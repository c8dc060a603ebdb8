"""Names for what prompts are about, where clients give none: similar prompts share a skill.

Leader clustering (Hartigan 1975, Clustering Algorithms, ch. 3), online: a prompt joins the nearest leader, or becomes
one where none is near. What is compared are the pairs of neighbouring tokens of a prompt's last message (Broder 1997,
On the resemblance of documents): what stands before it, such as instructions and worked examples, is shared by all
tasks of an agent. A skill's leader is the first example in the log that carries its name, so a restart finds all of
them again. Knows no words: tasks that are told apart by one word only are one skill.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from gradatim.protocols import Store
from gradatim.types import Example

UNNAMED = "default"  # the skill of a request whose client names none
MOST_LEADERS = 64  # later prompts that resemble none of them join the nearest
NEAR = 0.5  # Jaccard similarity of two prompts of one skill
LONGEST = 1024  # tokens that are looked at, from the end
_GENERATION_PROMPT = 12  # tokens after the last end of turn: fewer are the chat template's, not a message


def last_message(prompt_ids: Sequence[int], end_of_turn: int) -> Sequence[int]:
    """What stands behind the last message but one; all of a prompt without turns."""
    recent = prompt_ids[-LONGEST:]
    ends = [i for i, token in enumerate(recent) if token == end_of_turn]
    if not ends or len(recent) - ends[-1] > _GENERATION_PROMPT:
        return recent[ends[-1] + 1 :] if ends else recent
    return recent[ends[-2] + 1 if len(ends) > 1 else 0 : ends[-1]]


def resemblance(a: frozenset[tuple[int, int]], b: frozenset[tuple[int, int]]) -> float:
    """Jaccard: the share of their token pairs that both have. Two without any are equal."""
    either = len(a | b)
    return len(a & b) / either if either else 1.0


class PromptSkills:
    """``end_of_turn``: the token that ends a message. For one thread: the loop's."""

    def __init__(self, store: Store, end_of_turn: int, *, most: int = MOST_LEADERS) -> None:
        self._store = store
        self._end_of_turn = end_of_turn
        self._most = most
        self._leaders: list[frozenset[tuple[int, int]]] | None = None

    def name(self, prompt_ids: Sequence[int]) -> str:
        """The skill of a prompt. The caller stores an example of that name, or asks with the same prompt again."""
        if self._leaders is None:
            self._leaders = self._recorded()
        pairs = self._pairs(prompt_ids)
        near = [resemblance(pairs, leader) for leader in self._leaders]
        nearest = max(range(len(near)), key=near.__getitem__, default=-1)
        if len(near) < self._most and (nearest < 0 or near[nearest] < NEAR):
            self._leaders.append(pairs)
            nearest = len(near)
        return _name(nearest)

    def _recorded(self) -> list[frozenset[tuple[int, int]]]:
        leaders: list[frozenset[tuple[int, int]]] = []
        while len(leaders) < self._most:
            found = self._store.read(Example, skill=_name(len(leaders)), limit=1)
            if not found:
                break
            leaders.append(self._pairs(found[0][1].prompt_ids))
        return leaders

    def _pairs(self, prompt_ids: Sequence[int]) -> frozenset[tuple[int, int]]:
        message = last_message(prompt_ids, self._end_of_turn)
        return frozenset(pairwise(message))


def _name(index: int) -> str:
    return f"auto:{index + 1}"
