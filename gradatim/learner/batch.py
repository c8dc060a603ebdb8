"""Examples -> what fits through the model, and which of them share a gradient step.

It knows no model: only token ids and lengths.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from gradatim.config import LearnerConfig
from gradatim.nn.pack import Answer
from gradatim.types import Example


@dataclass(frozen=True, slots=True)
class Item:
    """An example as the model will see it."""

    example: Example
    chosen: Answer | None
    rejected: Answer | None
    truncated: bool  # its prompt lost its left end
    replayed: bool = False
    hinted: Answer | None = None  # the answer that was given, behind a prompt that says what was said of it

    @property
    def told_apart(self) -> slice:
        """The tokens of a pair on which its preference is spent.

        A correction, and two answers of which one failed, say where the bad one went wrong: at the first token that
        differs. What came after was often right, given that token ("type 1 Anna" instead of "type 2 Anna"), and would
        be unlearned with it. A preference between two texts is one of the whole.
        """
        if self.chosen is None or self.rejected is None or self.example.origin == "preference":
            return slice(None)
        both = zip(self.chosen.completion_ids, self.rejected.completion_ids, strict=False)
        fork = next((k for k, (good, bad) in enumerate(both) if good != bad), None)
        return slice(None) if fork is None else slice(fork, fork + 1)

    def scaled(self, factor: float) -> Item:
        """The same with that part of its weight."""
        return replace(self, example=replace(self.example, weight=factor * self.example.weight))

    @property
    def answers(self) -> list[Answer]:
        return [a for a in (self.chosen, self.rejected) if a is not None]


def fit(example: Example, max_length: int, vocabulary: int, *, replayed: bool = False) -> Item | str:
    """The example cut to ``max_length`` tokens from the left, or the reason why it cannot be used."""
    longest = max(len(example.chosen_ids), len(example.rejected_ids))
    if not longest:
        return "it has no answer"
    if not example.prompt_ids:
        return "it has no prompt"
    if longest >= max_length:
        return f"its answer alone has {longest} tokens, and max_length is {max_length}"
    if not 0.0 < example.weight < math.inf:
        return f"its weight is {example.weight}"
    for i in (*example.prompt_ids, *example.chosen_ids, *example.rejected_ids, *example.hint_ids):
        if not 0 <= i < vocabulary:
            return f"token id {i} is outside the vocabulary of {vocabulary}"
    prompt = cut(example.prompt_ids, longest, max_length)
    return Item(
        example,
        Answer(prompt, example.chosen_ids) if example.chosen_ids else None,
        Answer(prompt, example.rejected_ids) if example.rejected_ids else None,
        len(prompt) < len(example.prompt_ids),
        replayed,
        _hinted(example, max_length),
    )


def _hinted(example: Example, max_length: int) -> Answer | None:
    if not example.hint_ids or not example.rejected_ids:
        return None
    return Answer(cut(example.hint_ids, len(example.rejected_ids), max_length), example.rejected_ids)


def cut(prompt_ids: tuple[int, ...], answer_tokens: int, max_length: int) -> tuple[int, ...]:
    """The right end of a prompt that leaves room for an answer, which is shorter than ``max_length``."""
    return prompt_ids[-(max_length - answer_tokens) :]


def steps(new: Sequence[Item], replay: Sequence[Item], config: LearnerConfig, seed: int) -> Iterator[list[Item]]:
    """The batches of all gradient steps: every new item once an epoch, with the share of replayed ones mixed in.

    So many new ones make a step, whether or not there is something to replay beside them: an adapter's first updates
    would else have fewer steps than any later one, and more to learn.
    """
    rng = random.Random(seed)
    replayed = min(len(replay), config.batch - config.new_a_step)
    rehearsal = cycle(replay)
    for _ in range(config.epochs):
        order = rng.sample(list(new), len(new))
        count = -(-len(order) // config.new_a_step)
        for k in range(count):  # of nearly equal size, so that no example gets a step to itself
            yield [*order[k::count], *islice(rehearsal, replayed)]
