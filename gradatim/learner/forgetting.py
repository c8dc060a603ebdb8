"""What holds an update to what is known already, between a batch's gradient and the optimiser's step.

    EWC     the pull back to the parent's weights, stiffest where what was taught before is sensitive (``nn.fisher``)
    A-GEM   what of the new examples' gradient opposes that of the replayed ones is taken out
            (Chaudhry 2019, arXiv:1812.00420, eq. 11)

Replay itself and the trust region in KL are the learner's. This module knows no losses, no passes and no files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradatim.errors import AdapterError
from gradatim.learner.batch import Item
from gradatim.learner.run import Run
from gradatim.nn.fisher import Fisher, norm, penalty
from gradatim.nn.lora import Lora, LoraWeights
from gradatim.nn.pack import Answer

log = logging.getLogger(__name__)

DECAY = 0.95  # of the Fisher information at each promotion (Schwarz 2018, arXiv:1805.06370, table 4)
EXAMPLES = 12  # on whose contexts it is measured, once an update
_STRENGTH = "strength"


class Elastic:
    """Online EWC over one update of ``parent``, with what is ``kept`` in its folder.

    lambda follows one rule: at the distance that an update ends at, the penalty's gradient has ``share`` of the norm of
    the task's. Each update measures which lambda that would have been, and goes half of the way there, on a log scale.
    """

    def __init__(self, parent: LoraWeights, kept: Mapping[str, Tensor], share: float) -> None:
        self._parent = parent
        self._share = share
        self._fisher: Fisher | None = None
        self._strength = 0.0
        self._task_norms: list[float] = []
        if share and kept:
            try:
                self._fisher = Fisher.from_tensors(kept, parent)
                self._strength = _positive(kept)
            except AdapterError as e:
                self._fisher = None
                log.error("the Fisher information starts afresh: %s", e)

    @property
    def enabled(self) -> bool:
        return self._share > 0.0

    def pull(self, run: Run, lora: Lora) -> None:
        """Add lambda times the penalty's gradient to the task's, which is in ``lora.flat.grad`` (P,)."""
        if not self.enabled:
            return
        assert lora.flat.grad is not None
        task = float(lora.flat.grad.norm())
        self._task_norms.append(task)
        if self._fisher is None or not self._strength:
            return
        value, gradient = penalty(self._fisher, self._parent, lora.view())
        flat = torch.cat([g.reshape(-1) for path in sorted(gradient) for g in gradient[path]])
        lora.flat.grad.add_(flat, alpha=self._strength)
        run.add("ewc_penalty", torch.tensor(self._strength * value))
        run.add("ewc_share", torch.tensor(self._strength * float(flat.norm()) / task if task else 0.0))

    def renewed(self, run: Run, lora: Lora, found: Fisher) -> dict[str, Tensor]:
        """What the child's folder keeps: the Fisher information with that ``found`` at its weights, and lambda."""
        fisher = found if self._fisher is None else self._fisher.followed_by(found, DECAY)
        pull = norm(penalty(fisher, self._parent, lora.view())[1])
        task = sum(self._task_norms) / max(1, len(self._task_norms))
        strength = self._strength
        if pull > 0.0 and task > 0.0 and math.isfinite(task / pull):
            wanted = self._share * task / pull
            strength = math.sqrt(strength * wanted) if strength else wanted
        run.add("ewc_strength", torch.tensor(strength))
        run.add("fisher_trace", torch.tensor(found.trace()))
        return fisher.tensors() | {_STRENGTH: torch.tensor(strength, dtype=torch.float64)}


def _positive(kept: Mapping[str, Tensor]) -> float:
    value = float(kept[_STRENGTH]) if _STRENGTH in kept and kept[_STRENGTH].numel() == 1 else math.nan
    if not (math.isfinite(value) and value >= 0.0):
        raise AdapterError(f"lambda is {value}")
    return value


def contexts(new: Sequence[Item], replay: Sequence[Item]) -> list[Answer]:
    """Answers whose contexts stand for what an adapter is asked: half of them new, if there are enough of both."""
    fresh, old = ([i.chosen for i in items if i.chosen is not None] for items in (new, replay))
    half = max(EXAMPLES // 2, EXAMPLES - len(old))
    picked = _spread(fresh, half)
    return picked + _spread(old, EXAMPLES - len(picked))


def _spread(answers: Sequence[Answer], count: int) -> list[Answer]:
    """Up to ``count`` of them, at even distances."""
    step = max(1.0, len(answers) / count) if count else 1.0
    return [answers[int(k * step)] for k in range(min(count, len(answers)))]


def without_conflict(run: Run, gradient: Tensor, reference: Tensor) -> None:
    """A-GEM in place: ``g - (g . r / r . r) r`` where g . r < 0; both (P,)."""
    dot, square = float(gradient @ reference), float(reference @ reference)
    size = math.sqrt(float(gradient @ gradient) * square)
    run.add("agem_cosine", torch.tensor(dot / size if size else 0.0))
    conflict = dot < 0.0 < square
    run.add("agem_projected", torch.tensor(float(conflict)))
    if conflict:
        gradient.add_(reference, alpha=-dot / square)
