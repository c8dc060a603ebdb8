"""Which new examples may move the weights: gradient gating, once an update, at its parent's weights.

    direction     What an example claims is the margin of its good answer over its bad one, where they differ. It is
                  left out where that falls along the way on which the claims of trusted examples rise. Clipping norms
                  does not tell a flipped label from an honest one: their gradients are equally long, and opposite.
    contributors  Where more than five people's examples are in an update, no one's gradient has more than a fifth of
                  the sum of all norms.

Claims, not losses: the loss of an answer to imitate hardly pulls against that of another answer to the same prompt as
long as neither is likely, and it vanishes once an answer is known. The slope of every single claim along one direction
costs two forward passes of all new examples, by central differences, and no gradient of its own.

It knows no losses and no model: both come as functions. Its blind spots: what trusted examples are wrong about, and a
harmful example that is at right angles to all of them. An honest one that says of its page the opposite of what most
trusted ones say of theirs is refused wrongly, as long as the model does not tell such pages apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gradatim.learner.batch import Item

TRUSTED = 16  # trusted examples whose gradient is the direction, at most
LEAST_TRUSTED = 4  # with fewer there is no direction to go by
TYPICAL = 3  # new examples whose own gradients are measured, for the typical norm
MOST_SHARE = 0.2  # of one contributor in the sum of norms


@dataclass(frozen=True, slots=True)
class Measure:
    """How claims and losses look from a set of weights."""

    flat: Tensor  # (P,) the weights themselves, moved and put back
    step: float  # how far, in the norm of all A and B: in 16 bits a short one drowns in rounding
    claim_gradient: Callable[[Sequence[Item]], Tensor]  # of the mean claim of some examples, (P,)
    claims: Callable[[Sequence[Item]], Tensor]  # of each example, (N,), without gradients
    loss_gradient: Callable[[Sequence[Item]], Tensor]  # of the mean weighted loss of some examples, (P,)


@dataclass(slots=True)
class Judged:
    """What is to be left out and made smaller, and the figures for the update's record."""

    against: dict[str, float] = field(default_factory=dict)  # id of an example left out -> its cosine, about
    scale: dict[str, float] = field(default_factory=dict)  # id of an example -> factor of its weight, below 1
    metrics: dict[str, float] = field(default_factory=dict)

    def reasons(self) -> dict[str, str]:
        """Of those left out, by id."""
        return {i: f"it pulls against the trusted ones (cosine {c:+.2f})" for i, c in self.against.items()}


def claim(item: Item, logprobs: Sequence[Tensor]) -> Tensor:
    """What an example says of its answers, in nats a token, a scalar: the more of it, the more the model agrees.
    ``logprobs`` are (T,) of each of its answers."""
    where = item.told_apart
    if item.chosen is None:
        return -logprobs[0].mean()
    if item.rejected is None:
        return logprobs[0].mean()
    return logprobs[0][where].mean() - logprobs[1][where].mean()


def trusted(replay: Sequence[Item]) -> list[Item]:
    """Replayed examples that a program or an auditor has confirmed, evenly over skills."""
    by_skill: dict[str, list[Item]] = defaultdict(list)
    for item in replay:
        if item.example.verified and item.chosen is not None:
            by_skill[item.example.skill].append(item)
    turns = range(max(map(len, by_skill.values()), default=0))
    return [items[k] for k in turns for items in by_skill.values() if k < len(items)][:TRUSTED]


def judge(new: Sequence[Item], anchor: Sequence[Item], measure: Measure, threshold: float) -> Judged:
    """Compare every new example with the trusted ones; ``threshold`` is the cosine, in (0, 1), below the negative of
    which it is against them; 0 switches the comparison off."""
    judged = Judged()
    if threshold > 0.0 and len(anchor) >= LEAST_TRUSTED and new:
        _judge_direction(judged, new, anchor, measure, threshold)
    _judge_shares(judged, [i for i in new if i.example.id not in judged.against], measure)
    return judged


# -------------------------------------------------------------------------------------------- direction


def _judge_direction(
    judged: Judged, new: Sequence[Item], anchor: Sequence[Item], measure: Measure, threshold: float
) -> None:
    gradient = measure.claim_gradient(anchor)  # (P,)
    norm = float(gradient.norm())
    judged.metrics |= {"gate_trusted": float(len(anchor)), "gate_anchor_norm": norm}
    if not 0.0 < norm < math.inf:
        return
    typical = _typical_norm(new, measure)
    slopes = _slopes(new, gradient / norm, measure)
    cosines = (slopes / typical).clamp(-1.0, 1.0) if typical else slopes
    for item, cosine in zip(new, cosines.tolist(), strict=True):
        if not cosine >= -threshold:  # or not a number
            judged.against[item.example.id] = cosine
    judged.metrics |= {
        "gate_cosine": float(cosines.mean()),
        "gate_cosine_min": float(cosines.min()),
        "gate_refused": float(len(judged.against)),
    }


def _typical_norm(new: Sequence[Item], measure: Measure) -> float:
    """The median norm of some examples' own gradients. With it in place of each one's own, an example of a small
    gradient, which could do little harm, comes out nearer to a right angle than it is."""
    some = new[:: -(-len(new) // TYPICAL)]
    norms = sorted(n for i in some if math.isfinite(n := float(measure.claim_gradient([i]).norm())))
    return norms[len(norms) // 2] if norms else 0.0


def _slopes(items: Sequence[Item], direction: Tensor, measure: Measure) -> Tensor:
    """d claim / d step of each example (N,) along ``direction`` (P,), by central differences."""
    start = measure.flat.detach().clone()
    try:
        measure.flat.data.add_(direction, alpha=measure.step)
        ahead = measure.claims(items)
        measure.flat.data.copy_(start).add_(direction, alpha=-measure.step)
        behind = measure.claims(items)
    finally:
        measure.flat.data.copy_(start)
    return (ahead - behind) / (2.0 * measure.step)


# ----------------------------------------------------------------------------------------- contributors


def _judge_shares(judged: Judged, new: Sequence[Item], measure: Measure) -> None:
    """Where contributors are named and too many for the limit to bind them all alike."""
    by_user: dict[str, list[Item]] = defaultdict(list)
    for item in new:
        by_user[item.example.user].append(item)
    by_user.pop("", None)
    if len(by_user) * MOST_SHARE <= 1.0:
        return
    norms = {user: len(items) * float(measure.loss_gradient(items).norm()) for user, items in by_user.items()}
    level = level_for(norms.values(), MOST_SHARE)
    for user, items in by_user.items():
        if norms[user] > level:
            judged.scale |= {i.example.id: level / norms[user] for i in items}
    total = sum(norms.values())
    judged.metrics |= {
        "contributors": float(len(norms)),
        "contributor_share_max": max(norms.values()) / total if total else 0.0,
        "contributors_clipped": float(sum(n > level for n in norms.values())),
    }


def level_for(norms: Iterable[float], share: float) -> float:
    """The greatest L with ``L <= share * sum_c min(norm_c, L)``: clipped at L, nobody has more than that share."""
    ordered = sorted(norms)
    below = 0.0
    for k, norm in enumerate(ordered):
        rest = len(ordered) - k
        if share * rest < 1.0:  # L = share (below + rest L)
            level = share * below / (1.0 - share * rest)
            if level <= norm:
                return level
        below += norm
    return math.inf
