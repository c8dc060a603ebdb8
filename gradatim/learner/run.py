"""What one update has seen and measured, and the figures of its record. It knows no model and no loss."""

from __future__ import annotations

import math
import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradatim.learner.batch import Item


class RefusedError(Exception):
    """The update cannot be made from these examples, or went wrong in a way that must not be kept."""


@dataclass(slots=True)
class Run:
    """An update so far."""

    new: list[Item]
    replay: list[Item]
    known: list[Item] = field(default_factory=list)  # new ones that the parent gives already
    silent: list[Item] = field(default_factory=list)  # new ones whose hint changes nothing
    reference: dict[str, list[Tensor]] = field(default_factory=dict)  # example id -> (T,) per answer, parent's
    teacher: dict[str, Tensor] = field(default_factory=dict)  # example id -> (T,), the parent's when it has the hint
    used: Counter[str] = field(default_factory=Counter)  # example id -> passes in which it was trained on
    sums: dict[str, float] = field(default_factory=dict)  # of loss parts
    counts: Counter[str] = field(default_factory=Counter)  # of their terms
    steps: int = 0
    tokens: int = 0
    packed: int = 0
    train_s: float = 0.0
    kl: float = 0.0
    kl_max: float = 0.0
    backtracks: int = 0  # steps that were taken back
    grad_norms: list[float] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)  # of the gate
    left_out: dict[str, str] = field(default_factory=dict)  # example id -> why it is not trained on

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        self.counts[name] += 1

    def counted(self) -> dict[str, Any]:
        """What the passes of a step add up, as it is now."""
        counts = {"sums": dict(self.sums), "counts": Counter(self.counts), "used": Counter(self.used)}
        return counts | {"tokens": self.tokens, "packed": self.packed}

    def recount(self, before: Mapping[str, Any]) -> None:
        """Go back to what was ``counted`` before a step that has to be made again."""
        for name, value in before.items():
            setattr(self, name, copy(value))

    def chance(self, item: Item) -> float:
        """Of the parent giving exactly the item's first answer at temperature 1."""
        return math.exp(float(self.reference[item.example.id][0].sum()))

    def drifted(self, kl: float) -> None:
        """Note how far replayed answers are from the parent, nats a token."""
        self.kl, self.kl_max = kl, max(self.kl_max, kl)

    def metrics(self) -> dict[str, float]:
        """The finite figures of the update's record."""
        kinds = Counter(i.example.kind for i in self.new)
        rehearsed = [self.used[i.example.id] for i in (*self.replay, *self.known)]
        out: dict[str, float] = {name: self.sums[name] / self.counts[name] for name in self.sums if name != "settled"}
        out |= {
            "settled": self.counts["settled"],
            "pairs": kinds["pair"],
            "imitated": kinds["imitate"],
            "avoided": kinds["avoid"],
            "hinted": kinds["hint"],
            "known": len(self.known),
            "silent_hints": len(self.silent),
            "left_out": len(self.left_out),
            "truncated": sum(i.truncated for i in (*self.new, *self.replay)),
            "replayed": sum(passes > 0 for passes in rehearsed),
            "replay_share": sum(rehearsed) / self.used.total() if self.used else 0.0,
            "peak_memory_bytes": peak_memory_bytes(),
            "steps": self.steps,
            "tokens": self.tokens,
            "packed_tokens": self.packed,
            "tokens_per_s": self.tokens / self.train_s if self.train_s else 0.0,
            "kl": self.kl,
            "kl_max": self.kl_max,
            "backtracks": self.backtracks,
            **self.figures,
            "grad_norm": sum(self.grad_norms) / len(self.grad_norms) if self.grad_norms else 0.0,
        }
        return {name: float(value) for name, value in out.items() if math.isfinite(value)}


def summary(items: Sequence[Item], logprobs: Mapping[str, Sequence[Tensor]], when: str) -> dict[str, float]:
    """Mean log-probability per token of chosen and rejected answers, and how often the chosen one is likelier."""
    chosen = [float(logprobs[i.example.id][0].mean()) for i in items if i.chosen is not None]
    rejected = [float(logprobs[i.example.id][-1].mean()) for i in items if i.rejected is not None]
    wins = [
        float(logprobs[i.example.id][0].sum() > logprobs[i.example.id][1].sum())
        for i in items
        if i.chosen is not None and i.rejected is not None
    ]
    named = {"chosen_logprob": chosen, "rejected_logprob": rejected, "pair_accuracy": wins}
    return {f"{name}_{when}": sum(values) / len(values) for name, values in named.items() if values}


def retention(items: Sequence[Item], logprobs: Mapping[str, Sequence[Tensor]], when: str) -> dict[str, float]:
    """Mean chance of giving exactly the good answers of replayed examples."""
    chances = [math.exp(float(logprobs[i.example.id][0].sum())) for i in items]
    return {f"replay_chance_{when}": sum(chances) / len(chances)} if chances else {}


def peak_memory_bytes() -> int:
    """The most that this process ever held: on the graphics card, where it uses one, or else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
