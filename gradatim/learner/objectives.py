"""Which loss an example is trained with: a table from kinds of feedback to losses, and what each makes of one example.

    correction, preference   a better answer over the one that was given
    pair                     a good and a bad answer to one state, neither by itself told to be the better one
    success, score           an answer to imitate, after an outcome or a score
    failure                  an answer to avoid
    hint                     an answer that somebody commented on

Everything is relative to the parent, whose log-probabilities are the reference; the state that a loss needs beyond
them (KTO's baseline, advantages) is made anew for each update. It knows no model, no store and no optimiser.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradatim.config import LearnerConfig
from gradatim.learner.batch import Item
from gradatim.nn import losses
from gradatim.nn.pack import Answer, Scored

AVOID_FLOOR_NATS = 4.0  # a bad answer is pushed down by no more than this in one update
SETTLED_NATS = 10.0  # a pair whose margin under the parent is wider is only imitated: or replay widens it for ever
MOST_NOISE = 0.45  # robust DPO divides by 1 - 2 noise
BASELINE_DECAY = 0.9  # of KTO's z0, per gradient step: an update has few
MISMATCHED = 8  # answers to other prompts that z0 is measured on
SILENT_NATS = 0.2  # a hint that moves no token by more says nothing: 16 bits alone move one by up to 0.17

Note = Callable[[str, Tensor], None]  # a figure of the update's record
Score = Callable[[Sequence[Answer]], Sequence[Scored]]  # without gradients, under the weights as they are now


@dataclass(frozen=True, slots=True)
class Scores:
    """One example's tokens (T,) per answer, chosen before rejected, under the weights now and under the parent."""

    item: Item
    now: Sequence[Tensor]
    before: Sequence[Tensor]
    teacher: Tensor | None = None  # (T,) the sampled answer under the parent that was given the hint

    @property
    def judged(self) -> Sequence[tuple[bool, Tensor, Tensor]]:
        """(good, now, before) of each answer, summed over its tokens."""
        good = [True] * (self.item.chosen is not None) + [False] * (self.item.rejected is not None)
        return [(g, n.sum(), b.sum()) for g, n, b in zip(good, self.now, self.before, strict=True)]


class Objective(Protocol):
    """The loss of one example, unweighted: a scalar. Its parts are noted by name."""

    def __call__(self, scores: Scores, note: Note) -> Tensor: ...


def route(item: Item) -> str:
    """The kind of feedback that an example stands for."""
    example = item.example
    if example.kind == "pair":
        return example.origin if example.origin in ("correction", "preference") else "pair"
    if example.kind == "imitate":
        return "score" if example.origin == "score" else "success"
    return "hint" if example.kind == "hint" else "failure"


class Objectives:
    """The losses of one update, by the table in ``LearnerConfig.losses``."""

    def __init__(self, config: LearnerConfig) -> None:
        self._kto = Kto(config.beta)
        self._sampled = (PolicyGradient("policy_gradient", losses.rloo), PolicyGradient("dr_grpo", losses.dr_grpo))
        built: Mapping[str, Objective] = {
            "dpo": Pairwise("dpo", _dpo(config), config.nll),
            "robust_dpo": Pairwise("robust_dpo", _robust_dpo(config), config.nll),
            "ipo": Pairwise("ipo", _ipo(config), config.nll),
            "sft": imitate,
            "avoid": Avoid(config),
            "apo_zero": ApoZero(config.beta),
            "kto": self._kto,
            **{loss.name: loss for loss in self._sampled},
            "self_distillation": SelfDistillation(config.hint),
        }
        self._names: Mapping[str, str] = asdict(config.losses)
        self._built = built

    def of(self, item: Item) -> Objective:
        return self._built[self._name(item)]

    def _name(self, item: Item) -> str:
        """A correction that was stored without a hint cannot be distilled from; it still is a pair."""
        name = self._names[route(item)]
        return "dpo" if name == "self_distillation" and item.hinted is None else name

    def wants_teacher(self, item: Item) -> bool:
        """Whether its loss compares the answer with what the parent says of it when it is given the hint."""
        return item.hinted is not None and isinstance(self.of(item), SelfDistillation)

    def census(self, items: Sequence[Item]) -> dict[str, float]:
        """How many examples each loss has, by its name."""
        names = Counter(self._name(i) for i in items)
        return {f"examples_{name}": float(count) for name, count in names.items()}

    def begin(self, items: Sequence[Item], score: Score) -> None:
        """Before the first gradient step, under the parent's weights: whatever compares the examples of an update."""
        self._kto.begin([i for i in items if self.of(i) is self._kto], score)
        for loss in self._sampled:
            loss.begin([i for i in items if self.of(i) is loss])

    def begin_step(self, score: Score) -> None:
        """Before each gradient step."""
        self._kto.begin_step(score)

    def loss(self, scores: Scores, note: Note) -> Tensor:
        """Of one example, unweighted: a scalar. Parts go to the metrics."""
        return self.of(scores.item)(scores, note)


def is_silent(before: Tensor, teacher: Tensor) -> bool:
    """Whether a hint changes nothing about the answer it is on: there is nothing to learn from it."""
    return float((teacher - before).abs().max()) < SILENT_NATS


# ------------------------------------------------------------------------------------------------- pairs

_Pairwise = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]  # chosen, rejected, both before, label


def _dpo(config: LearnerConfig) -> _Pairwise:
    return lambda c, r, before_c, before_r, label: losses.dpo(c, r, before_c, before_r, config.beta, label)


def _robust_dpo(config: LearnerConfig) -> _Pairwise:
    def loss(c: Tensor, r: Tensor, before_c: Tensor, before_r: Tensor, label: float) -> Tensor:
        noise = config.label_noise
        flipped = min(label * noise + (1.0 - label) * (1.0 - noise), MOST_NOISE)
        return losses.robust_dpo(c, r, before_c, before_r, config.beta, flipped)

    return loss


def _ipo(config: LearnerConfig) -> _Pairwise:
    """Times beta squared, which leaves the minimum where it is and makes its pull comparable with DPO's."""
    return lambda c, r, before_c, before_r, _: config.beta**2 * losses.ipo(c, r, before_c, before_r, config.beta)


@dataclass(frozen=True, slots=True)
class Pairwise:
    """A preference, on the tokens that tell the two answers apart, beside the chosen answer's own likelihood."""

    name: str
    preference: _Pairwise
    nll: float  # weight of the guard

    def __call__(self, scores: Scores, note: Note) -> Tensor:
        item = scores.item
        guard = _nll(scores.now[0])
        note("loss_nll", guard)
        sure = 2.0 * item.example.label - 1.0  # 0 where the label is a coin's: then nothing is known of the chosen one
        apart = item.told_apart
        now, before = ([x[apart].sum() for x in pair] for pair in (scores.now, scores.before))
        if before[0] - before[1] > SETTLED_NATS:
            note("settled", torch.ones(()))
            return self.nll * sure * guard
        loss = self.preference(now[0], now[1], before[0], before[1], item.example.label)
        note(f"loss_{self.name}", loss)
        return loss + self.nll * sure * guard


# ------------------------------------------------------------------------------------------ single answers


def _nll(logprobs: Tensor) -> Tensor:
    return losses.nll(logprobs.sum(), torch.tensor(float(len(logprobs))))


def imitate(scores: Scores, note: Note) -> Tensor:
    """SFT on the chosen answer; of a pair, the rejected one is left alone."""
    loss = _nll(scores.now[0])
    note("loss_imitate", loss)
    return loss


@dataclass(frozen=True, slots=True)
class Avoid:
    """A bad answer for which no good one is known loses a few nats, and no more."""

    config: LearnerConfig

    def __call__(self, scores: Scores, note: Note) -> Tensor:
        loss = losses.avoid(scores.now[0].sum(), scores.before[0].sum(), self.config.beta, AVOID_FLOOR_NATS)
        note("loss_avoid", loss)
        return self.config.avoid * loss


@dataclass(frozen=True, slots=True)
class ApoZero:
    """Each answer judged by itself, good or bad, against the parent."""

    beta: float

    def __call__(self, scores: Scores, note: Note) -> Tensor:
        parts = [losses.apo_zero_unpaired(now, before, self.beta, good=good) for good, now, before in scores.judged]
        loss = torch.stack(parts).sum()
        note("loss_apo_zero", loss)
        return loss


class Kto:
    """Each answer judged by itself against how far the model has moved on answers that nobody judged."""

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._mean = 0.0  # z0 before it is cut off at 0; exact at the start, where the model is the reference
        self._mismatched: Sequence[Answer] = ()
        self._reference: Tensor | None = None  # (N,)
        self._desirable = self._undesirable = 1.0

    def begin(self, items: Sequence[Item], score: Score) -> None:
        """Draw the mismatched answers: the prompt of each example with an answer to the next one."""
        prompts = [i.answers[0].prompt_ids for i in items]
        completions = [i.answers[0].completion_ids for i in items]
        shifted = zip(prompts, completions[1:] + completions[:1], strict=True)
        self._mismatched = [Answer(p, c) for k, (p, c) in enumerate(shifted) if c != completions[k]][:MISMATCHED]
        self._reference = _totals(score(self._mismatched)) if self._mismatched else None
        self._balance(items)

    def _balance(self, items: Sequence[Item]) -> None:
        """Weights that make good and bad answers count alike in sum (sec. 4.2 of the paper: a ratio of 1 to 4/3)."""
        good = sum(i.chosen is not None for i in items)
        bad = sum(i.rejected is not None for i in items)
        self._desirable, self._undesirable = (
            (min(1.0, bad / good), min(1.0, good / bad)) if good and bad else (1.0, 1.0)
        )

    def begin_step(self, score: Score) -> None:
        if self._reference is not None:
            ratios = _totals(score(self._mismatched)) - self._reference
            self._mean = losses.kto_baseline(self._mean, ratios, BASELINE_DECAY)

    def __call__(self, scores: Scores, note: Note) -> Tensor:
        z0 = max(0.0, self._mean)
        parts = [
            losses.kto(
                now,
                before,
                self._beta,
                z0,
                good=good,
                weight=self._desirable if good else self._undesirable,
            )
            for good, now, before in scores.judged
        ]
        loss = torch.stack(parts).sum()
        note("loss_kto", loss)
        note("kto_baseline", torch.tensor(z0))
        return loss


def _totals(scored: Sequence[Scored]) -> Tensor:
    return torch.stack([s.total for s in scored])


# ------------------------------------------------------------------------------------------ sampled tokens


class PolicyGradient:
    """A sampled answer with the reward 1 or -1, compared with the other answers to its state, or where there is none,
    with the other examples of its skill. ``advantages``: of the rewards (G,) of a group, (G,)."""

    def __init__(self, name: str, advantages: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self._advantages = advantages
        self._advantage: dict[str, float] = {}
        self._mean_length = 1.0  # of all answers: one constant, so that no length is favoured

    def begin(self, items: Sequence[Item]) -> None:
        for item in items:
            others = [i for i in items if i is not item]
            reward = _reward(item)
            compared = [_reward(o) for o in others if o.example.state and o.example.state == item.example.state]
            compared += [-reward] if item.example.kind == "pair" else []
            compared = compared or [_reward(o) for o in others if o.example.skill == item.example.skill]
            group = torch.tensor([reward, *compared])
            self._advantage[item.example.id] = float(self._advantages(group)[0]) if compared else reward
        self._mean_length = sum(len(_sampled(i).completion_ids) for i in items) / max(1, len(items))

    def __call__(self, scores: Scores, note: Note) -> Tensor:
        item = scores.item
        which = item.answers.index(_sampled(item))
        now, old = scores.now[which], scores.before[which]
        advantages = torch.full_like(now, self._advantage[item.example.id])
        loss = losses.policy_gradient(now, old, advantages, _importance(item, old)) / self._mean_length
        note(f"loss_{self.name}", loss)
        return loss


def _reward(item: Item) -> float:
    return -1.0 if item.example.origin == "failure" else 1.0


def _sampled(item: Item) -> Answer:
    """The answer that the example's own step gave; the other one of a pair was given elsewhere."""
    return item.answers[-1] if item.example.origin == "failure" else item.answers[0]


def _importance(item: Item, old: Tensor) -> Tensor | None:
    """(T,) how much each token counts as one of ours, where the engine's log-probabilities are on record."""
    engine = item.example.logprobs
    if len(engine) != len(old):
        return None
    return losses.truncated_importance(old, torch.tensor(engine, dtype=old.dtype, device=old.device))


@dataclass(frozen=True, slots=True)
class SelfDistillation:
    """The answer that was given, in the light of what was said about it; mean over its tokens."""

    weight: float

    def __call__(self, scores: Scores, note: Note) -> Tensor:
        if scores.teacher is None:
            raise ValueError(f"example {scores.item.example.id} has no hint")
        now, before = scores.now[-1], scores.before[-1]
        loss = losses.self_distillation(now, scores.teacher, _importance(scores.item, before)) / len(now)
        note("loss_self_distillation", loss)
        note("hint_nats", (scores.teacher - now).detach().abs().mean())
        return self.weight * loss
