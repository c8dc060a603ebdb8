"""What the two sides of ``bench_dpo_step`` train on, and our side: the product's packed step on given token ids.

SmolLM2-135M, LoRA of rank 16 on all linear layers. It knows nothing of TRL.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradatim.learner.trainable import Trainable
from gradatim.nn import losses
from gradatim.nn.base import Base, load_base
from gradatim.nn.lora import LoraWeights, fresh_weights
from gradatim.nn.pack import Answer, Scored, passes, score

RANK, ALPHA, BETA, LR = 16, 32, 0.1, 1e-5
MICRO = 4  # pairs in one of TRL's passes
PASS_TOKENS = 2048  # packed tokens in one of ours
SYSTEM_TOKENS, LONG_SYSTEM_TOKENS = 75, 1024


@dataclass(frozen=True, slots=True)
class Pair:
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def answers(self) -> list[Answer]:
        return [Answer(self.prompt, self.chosen), Answer(self.prompt, self.rejected)]


@dataclass(frozen=True, slots=True)
class Thumb:
    """One judged answer, and the answer to another prompt that KTO's baseline is measured on."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    mismatched: tuple[int, ...]
    good: bool


def load(data_dir: Path, dtype: str, *, quick: bool) -> Base:
    """SmolLM2; the first two of its layers for a smoke run."""
    base = load_base("smollm2", data_dir, dtype=dtype, device="cpu")
    if quick:
        base.model.model.layers = base.model.model.layers[:2]
        base.model.config.num_hidden_layers = 2
    return base


def text_ids(tokenizer: Any) -> list[int]:
    """Ordinary English to cut prompts from: this project's own pages."""
    pages = sorted((Path(__file__).resolve().parent.parent / "docs").glob("[0-9]*.md"))
    ids: list[int] = tokenizer("\n".join(p.read_text() for p in pages))["input_ids"]
    return ids


def make_pairs(
    ids: Sequence[int], count: int, system: int, prompt: tuple[int, int], answer: tuple[int, int]
) -> list[Pair]:
    """Pairs with that many shared system tokens, and own prompts and answers of these ranges of lengths."""
    rng = random.Random(7)

    def piece(bounds: tuple[int, int]) -> tuple[int, ...]:
        length = rng.randint(*bounds)
        start = rng.randrange(len(ids) - length)
        return tuple(ids[start : start + length])

    shared = (*ids, *ids)[:system]
    return [Pair(shared + piece(prompt), piece(answer), piece(answer)) for _ in range(count)]


def thumbs_of(pairs: Sequence[Pair]) -> list[Thumb]:
    """The chosen answer of each pair, every other one of them down; mismatched as TRL does it, by one place."""
    before = [pairs[-1], *pairs[:-1]]
    return [Thumb(p.prompt, p.chosen, b.chosen, k % 2 == 0) for k, (p, b) in enumerate(zip(pairs, before, strict=True))]


def relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, all tensors together."""
    assert found.keys() == expected.keys()
    error = sum(float((found[n] - expected[n]).double().square().sum()) for n in expected)
    return float((error / sum(float(t.double().square().sum()) for t in expected.values())) ** 0.5)


def start_weights(model: Any) -> LoraWeights:
    """As after some training: with B = 0 half of all gradients would be 0 whatever the code does."""
    generator = torch.Generator().manual_seed(1)
    fresh = fresh_weights(model, RANK, ALPHA, seed=0)
    modules = {p: (a, 2e-3 * torch.randn(b.shape, generator=generator)) for p, (a, b) in fresh.modules.items()}
    return LoraWeights(RANK, ALPHA / RANK, modules)


class Ours:
    """The product's step. ``generic`` takes the model-agnostic path."""

    def __init__(self, base: Base, *, generic: bool = False, pass_tokens: int = PASS_TOKENS) -> None:
        self._pass_tokens = pass_tokens
        self._trainable = Trainable(base)
        self._forward: Callable[[Sequence[Answer]], list[Scored]] = (
            (lambda answers: score(base.model, answers)) if generic else self._trainable.forward
        )
        self._lora = self._trainable.lora
        self._lora.load(start_weights(base.model), trainable=True)
        self._optimizer = torch.optim.AdamW([self._lora.flat], lr=LR, weight_decay=0.0)

    def reference(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """Log-probabilities (2,) of each pair under the bare base."""
        out: dict[int, Tensor] = {}
        with torch.no_grad(), self._lora.disabled():
            for members in passes([p.answers for p in pairs], self._pass_tokens):
                totals = [s.total for s in self._forward([a for m in members for a in pairs[m].answers])]
                out |= {m: torch.stack(totals[2 * k : 2 * k + 2]) for k, m in enumerate(members)}
        return [out[m] for m in range(len(pairs))]

    def gradient(self, pairs: Sequence[Pair], reference: Sequence[Tensor] | None = None) -> float:
        self._lora.zero_grad()
        reference = reference or self.reference(pairs)
        mean = 0.0
        for members in passes([p.answers for p in pairs], self._pass_tokens):
            scored = self._forward([a for m in members for a in pairs[m].answers])
            now = torch.stack([s.total for s in scored]).view(-1, 2)
            before = torch.stack([reference[m] for m in members])
            loss = losses.dpo(now[:, 0], now[:, 1], before[:, 0], before[:, 1], BETA).sum() / len(pairs)
            loss.backward()  # type: ignore[no-untyped-call]
            mean += float(loss.detach())
        return mean

    def thumbs_gradient(self, thumbs: Sequence[Thumb], *, kto: bool) -> float:
        """KTO with its baseline from mismatched answers, or APO-zero-unpaired; the reference is part of the step."""
        self._lora.zero_grad()
        answers = [Answer(t.prompt, t.answer) for t in thumbs]
        mismatched = [Answer(t.prompt, t.mismatched) for t in thumbs] if kto else []
        with self._lora.disabled():
            before = [s.total for s in self._trainable.score([*answers, *mismatched])]
        shift = [s.total - b for s, b in zip(self._trainable.score(mismatched), before[len(thumbs) :], strict=True)]
        z0 = max(0.0, float(torch.stack(shift).mean())) if kto else 0.0
        total = torch.zeros(())
        for thumb, scored, reference in zip(thumbs, self._forward(answers), before, strict=False):
            total = total + losses.kto(scored.total, reference, BETA, z0, good=thumb.good) / len(thumbs)
        total.backward()  # type: ignore[no-untyped-call]
        return float(total.detach())

    def sft_gradient(self, thumbs: Sequence[Thumb]) -> float:
        """Likelihood of the answers, mean over their tokens."""
        self._lora.zero_grad()
        scored = self._forward([Answer(t.prompt, t.answer) for t in thumbs])
        loss = -torch.cat([s.logprobs for s in scored]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def descend(self) -> None:
        torch.nn.utils.clip_grad_norm_([self._lora.flat], 1.0)
        self._optimizer.step()

    def step(self, pairs: Sequence[Pair], reference: Sequence[Tensor] | None = None) -> float:
        loss = self.gradient(pairs, reference)
        self.descend()
        return loss

    def gradients(self) -> dict[str, Tensor]:
        """By module and factor."""
        out: dict[str, Tensor] = {}
        for path, (a, b) in self._lora.branches().items():
            assert a.grad is not None and b.grad is not None
            out |= {f"{path}.A": a.grad.clone(), f"{path}.B": b.grad.clone()}
        return out
