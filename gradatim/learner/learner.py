"""One update: parent adapter + examples -> a new adapter, or the reason why not.

Everything is relative to the parent, which is the live adapter: its log-probabilities are the reference of every loss
and the centre of the trust region. The learner keeps nothing between updates that the parent's folder does not hold.
Which loss an example is trained with is not decided here (``objectives``). It knows no store, no stages and no gates.
"""

from __future__ import annotations

import logging
import math
import random
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gradatim.config import LearnerConfig
from gradatim.errors import GradatimError
from gradatim.learner import claims, direction, forgetting, lineage
from gradatim.learner.adam import FlatAdam
from gradatim.learner.batch import Item, fit, steps
from gradatim.learner.forgetting import Elastic
from gradatim.learner.habits import Phrases
from gradatim.learner.lineage import Beside
from gradatim.learner.objectives import Objectives, Scores, is_silent
from gradatim.learner.region import Region
from gradatim.learner.run import RefusedError, Run, retention, summary
from gradatim.learner.trainable import Trainable, trainable
from gradatim.nn import losses
from gradatim.nn.base import Base
from gradatim.nn.fisher import Fisher, gathering
from gradatim.nn.lora import TMP_PREFIX, Lora, LoraWeights, blend, read_adapter, relative_norm
from gradatim.nn.pack import Scored, drawn, packed_tokens, passes
from gradatim.types import Adapter, Example, Step, StepId, Update

log = logging.getLogger(__name__)

CLIP_NORM = 1.0
KNOWN = 0.9  # an answer to imitate that the parent gives with this chance is rehearsed, not taught
BACKTRACKS = 3  # so many steps taken back end an update
OF_THE_WHOLE = re.compile("_after$|^kl_fresh$|^kl_base$|^habit_")  # figures that do not hold of half a change
PROBE_EXAMPLES = 8  # new and replayed examples, each, that are scored once more at the end, for the record


class LoraLearner:
    """A ``protocols.Learner`` that trains a LoRA adapter on a frozen base."""

    def __init__(
        self, base: Base, config: LearnerConfig, data_dir: Path, name: str, pace: Callable[[], float] = lambda: 1.0
    ) -> None:
        """``pace``: times the configured learning rate, asked before every update."""
        self._base = base
        self._pace = pace
        self._config = config
        self._data_dir = data_dir
        self._name = name
        self._trainable: Trainable = trainable(base)
        self._objectives = Objectives(config)  # of the update at hand
        self._phrases = Phrases.of(base)
        torch.set_num_threads(config.threads)
        for leftover in (data_dir / "adapters").glob(f"{TMP_PREFIX}*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)

    def update(
        self,
        examples: Sequence[Example],
        replay: Sequence[Example],
        parent: Adapter,
        step: int,
        traffic: Sequence[Step] = (),
        good: Set[StepId] = frozenset(),
    ) -> tuple[Update, Adapter | None]:
        """Train a child of ``parent``. Refused where no example is usable, a number is not finite or torch gives up.

        LearnerError (AdapterError) where the parent's files are damaged or of another base, or the disk refuses.
        """
        started_s = time.monotonic()
        update_id = f"update-{uuid.uuid4().hex}"
        run = self._admit(examples, replay)
        adapter: Adapter | None = None
        refused = ""
        extra: dict[str, float] = {}
        try:
            if not run.new:
                reasons = "; ".join(sorted(set(run.left_out.values()))[:3]) or "none was given"
                raise RefusedError(f"no usable example: {reasons}")
            weights, beside, extra = self._train(run, parent, step, traffic, good)
            adapter = self._save(weights, beside, parent, step, update_id)
        except GradatimError:
            raise  # of the parent or the disk: the same examples are worth another try
        except (RefusedError, RuntimeError) as e:  # torch's own too, or a batch that breaks it is tried for ever
            refused = str(e) if isinstance(e, RefusedError) else f"training broke: {type(e).__name__}: {e}"
            log.warning("update %s of %s refused: %s", step, parent.id, refused)
        update = Update(
            id=update_id,
            created_at=time.time(),
            applied=adapter is not None,
            parent_id=parent.id,
            adapter_id=adapter.id if adapter else None,
            example_ids=tuple(i.example.id for i in run.new),
            replay_ids=tuple(i.example.id for i in run.replay if i.example.id in run.used),
            kinds=Counter(i.example.origin for i in run.new),
            metrics=run.metrics() | extra,
            refused_because=refused,
            duration_s=time.monotonic() - started_s,
            left_out=run.left_out,
        )
        return update, adapter

    def shrink(self, update: Update, adapter: Adapter, parent: Adapter, step: int) -> tuple[Update, Adapter]:
        """Half of what the update changed: the step is too long more often than its direction is wrong.

        LearnerError (AdapterError) as ``update``.
        """
        started_s = time.monotonic()
        update_id = f"update-{uuid.uuid4().hex}"
        folder = self._data_dir / adapter.path
        weights = blend(self._start(parent)[0], read_adapter(folder, adapter.sha256), 0.5)
        made = self._save(weights, lineage.beside(folder), parent, step, update_id)
        changed = {"delta_norm": relative_norm(self._base.model, weights)}
        kept = {name: value for name, value in update.metrics.items() if not OF_THE_WHOLE.search(name)}
        record = replace(
            update,
            id=update_id,
            created_at=time.time(),
            adapter_id=made.id,
            metrics=kept | changed,
            scale=0.5 * update.scale,
            duration_s=time.monotonic() - started_s,
        )
        return record, made

    def _start(self, parent: Adapter) -> tuple[LoraWeights, Beside]:
        return lineage.start(self._base, self._config, self._data_dir, parent)

    def _save(self, weights: LoraWeights, beside: Beside, parent: Adapter, step: int, update_id: str) -> Adapter:
        return lineage.save(self._base, self._data_dir, self._name, weights, beside, parent, step, update_id)

    # ------------------------------------------------------------------------------------- what goes in

    def _admit(self, examples: Sequence[Example], replay: Sequence[Example]) -> Run:
        run = Run([], [])
        known = {e.id for e in examples}
        for example, replayed in [*((e, False) for e in examples), *((e, True) for e in replay if e.id not in known)]:
            fitted: Item | str = "it is retained for the gate"
            if not example.retained:
                fitted = fit(example, self._config.max_length, self._trainable.vocabulary, replayed=replayed)
            if isinstance(fitted, str):
                run.left_out[example.id] = fitted
                log.warning("example %s is left out: %s", example.id, fitted)
            else:
                (run.replay if replayed else run.new).append(fitted)
        return run

    # ----------------------------------------------------------------------------------------- training

    def _train(
        self, run: Run, parent: Adapter, step: int, traffic: Sequence[Step], good: Set[StepId]
    ) -> tuple[LoraWeights, Beside, dict[str, float]]:
        weights, beside = self._start(parent)
        self._objectives = Objectives(self._config)
        elastic = Elastic(weights, beside.fisher, self._config.ewc)
        with self._trainable.training(weights) as lora:
            optimizer = _optimizer(lora, beside.state)
            started_s = time.monotonic()
            first = lora.flat.detach().clone()
            region = Region(self._trainable, traffic, good, self._config, self._phrases)
            batches = self._batches(run, seed=self._config.seed + 7919 * step)
            self._refer(run, [i for batch in batches[1:] for i in batch], but=batches[0])
            self._objectives.begin([*run.new, *run.replay], self._trainable.score)
            run.figures |= self._objectives.census(run.new)
            self._walk(run, lora, optimizer, elastic, first, batches, warm_up=not beside.state)
            if too_far := region.hold(run, lora, first):
                raise RefusedError(too_far)
            run.train_s = time.monotonic() - started_s
            made = lora.weights()
            if made is None or not lora.flat.isfinite().all():
                raise RefusedError("the weights are not finite")
            size = {"delta_norm": relative_norm(self._base.model, made)}
            fisher = elastic.renewed(run, lora, self._fisher(run, made, step)) if elastic.enabled else {}
            return made, Beside(optimizer.state(), fisher), self._probe(run) | size

    def _fisher(self, run: Run, made: LoraWeights, step: int) -> Fisher:
        """Of the new weights, on contexts of this update, with labels that they draw themselves."""
        answers = forgetting.contexts(run.new, run.replay)

        def attempt(pass_tokens: int) -> Fisher:
            generator = torch.Generator().manual_seed(self._config.seed + 7919 * step)
            labels = 0
            with gathering(self._trainable.model, tuple(made.modules)) as gathered:
                for members in passes([[a] for a in answers], pass_tokens):
                    logprobs = drawn(self._trainable.model, [answers[m] for m in members], generator)
                    torch.autograd.backward(logprobs.sum())
                    labels += len(logprobs)
            return gathered.fisher(max(1, labels))

        return self._trainable.budget.fit(attempt)

    def _batches(self, run: Run, seed: int) -> list[list[Item]]:
        """Of all gradient steps. What the parent gives already would teach nothing, and Adam would turn its tiny
        gradients into steps as long as any other: it joins the rehearsal. So would a hint that changes nothing, and
        there is nothing in it to rehearse."""
        self._refer(run, run.new)
        run.known = [i for i in run.new if i.rejected is None and i.chosen is not None and run.chance(i) >= KNOWN]
        run.silent = [i for i in run.new if self._is_silent(run, i)]
        skipped = {i.example.id for i in (*run.known, *run.silent)}
        taught = [i for i in run.new if i.example.id not in skipped]
        if not taught:
            raise RefusedError(_nothing_to_learn(run))
        run.figures["borne_out"] = _borne_out(taught)
        taught = claims.admitted(run, taught, self._measure(run), self._config.gate_cosine)
        rehearsed = [*(replace(i, replayed=True) for i in run.known), *run.replay]
        random.Random(seed).shuffle(rehearsed)
        return list(steps(taught, rehearsed, self._config, seed))

    def _is_silent(self, run: Run, item: Item) -> bool:
        teacher = run.teacher.get(item.example.id)
        return teacher is not None and is_silent(run.reference[item.example.id][-1], teacher)

    def _measure(self, run: Run) -> direction.Measure:
        """Claims and losses at the parent's weights, without a trace in the run's figures."""
        lora = self._trainable.lora

        def loss_gradient(items: Sequence[Item]) -> Tensor:
            lora.zero_grad()
            self._step(Run([], [], reference=run.reference), items, len(items), self._trainable.budget.tokens)
            return lora.gradient()

        return claims.measured(self._trainable, loss_gradient)

    def _walk(
        self,
        run: Run,
        lora: Lora,
        optimizer: FlatAdam,
        elastic: Elastic,
        first: Tensor,
        batches: Sequence[Sequence[Item]],
        *,
        warm_up: bool,
    ) -> None:
        """One gradient step a batch from ``first`` (P,), inside the trust region: a step that went too far is taken
        back, and the next ones are half as long. After ``BACKTRACKS`` of them the update ends where it is."""
        pace = self._pace()
        run.figures["pace"] = pace
        lr = self._config.lr * pace
        last = first.clone()
        for batch in batches:
            if self._gradient(run, lora, batch):
                lora.flat.data.copy_(last)
                run.backtracks += 1
                lr *= 0.5
                if run.backtracks == BACKTRACKS:
                    break
                continue
            last.copy_(lora.flat.detach())
            elastic.pull(run, lora)
            _descend(run, lora, optimizer, lr * (0.5 if warm_up and run.steps == 0 else 1.0))
        else:
            run.drifted(self._drift(run, batches[-1]))
            if run.kl > self._config.kl_replay_limit:
                lora.flat.data.copy_(last)
                run.backtracks += 1
        if torch.equal(lora.flat, first):
            raise RefusedError(
                f"every step moved replayed answers by more than {self._config.kl_replay_limit} nats a token"
                if run.backtracks
                else "the gradient of all examples together is zero"
            )

    def _drift(self, run: Run, batch: Sequence[Item]) -> float:
        """The same estimate as each step's, after the last one."""
        items = [i for i in batch if i.replayed and i.chosen is not None and i.example.id in run.reference]
        scored = self._trainable.score([i.chosen for i in items if i.chosen is not None])
        drift = [
            losses.kl_forward(s.logprobs, run.reference[i.example.id][0]) for i, s in zip(items, scored, strict=True)
        ]
        return float(torch.cat(drift).mean()) if drift else 0.0

    def _refer(self, run: Run, items: Sequence[Item], but: Sequence[Item] = ()) -> None:
        """The parent's log-probabilities, once, of all that is compared with it. The first batch needs no pass of
        its own: when it is trained on, the weights still are the parent's."""
        skipped = run.reference.keys() | {i.example.id for i in but if not self._objectives.wants_teacher(i)}
        items = list({i.example.id: i for i in items if i.example.id not in skipped}.values())
        hinted = {i.example.id: i.hinted for i in items if i.hinted and self._objectives.wants_teacher(i)}
        scored = self._trainable.score([*(a for i in items for a in i.answers), *hinted.values()])
        for item in items:
            run.reference[item.example.id] = [scored.pop(0).logprobs for _ in item.answers]
        run.teacher |= {example_id: scored.pop(0).logprobs for example_id in hinted}

    def _gradient(self, run: Run, lora: Lora, batch: Sequence[Item]) -> bool:
        """The batch's gradient in ``lora.flat.grad``; true when it has drifted too far from the parent."""
        self._objectives.begin_step(self._trainable.score)
        before = run.counted()

        def attempt(pass_tokens: int) -> list[Tensor]:
            run.recount(before)
            lora.zero_grad()
            old = [i for i in batch if i.replayed]
            if not (self._config.agem and 0 < len(old) < len(batch)):
                return self._step(run, batch, len(batch), pass_tokens)
            drift = self._step(run, old, len(batch), pass_tokens)
            reference = lora.gradient()
            lora.zero_grad()
            self._step(run, [i for i in batch if not i.replayed], len(batch), pass_tokens)
            assert lora.flat.grad is not None
            forgetting.without_conflict(run, lora.flat.grad, reference)
            lora.flat.grad.add_(reference)
            return drift

        drift = self._trainable.budget.fit(attempt)
        run.drifted(float(torch.cat(drift).mean()) if drift else 0.0)
        return run.kl > self._config.kl_replay_limit

    def _step(self, run: Run, batch: Sequence[Item], of: int, pass_tokens: int) -> list[Tensor]:
        """Add the gradient of some examples of a batch ``of`` so many, pass by pass; gives how far the replayed ones
        drifted from the parent, per token."""
        drift: list[Tensor] = []
        for members in passes([i.answers for i in batch], pass_tokens):
            items = [batch[m] for m in members]
            answers = [a for i in items for a in i.answers]
            scored = self._trainable.forward(answers)
            run.tokens += sum(len(a.fed) for a in answers)
            run.packed += packed_tokens(answers)
            total = torch.zeros((), device=self._base.device)
            for item in items:
                mine = [scored.pop(0) for _ in item.answers]
                reference = run.reference.setdefault(item.example.id, [s.logprobs.detach() for s in mine])
                total = total + item.example.weight * self._loss(run, item, mine, reference)
                if item.replayed and item.chosen is not None:
                    drift.append(losses.kl_forward(mine[0].logprobs.detach(), reference[0]))
            if not total.isfinite():
                raise RefusedError("the loss is not finite")
            (total / of).backward()  # type: ignore[no-untyped-call]
            run.used.update(i.example.id for i in items)
        return drift

    def _loss(self, run: Run, item: Item, mine: Sequence[Scored], reference: Sequence[Tensor]) -> Tensor:
        """Loss of one example, unweighted: a scalar."""
        scores = Scores(item, [s.logprobs for s in mine], reference, run.teacher.get(item.example.id))
        return self._objectives.loss(scores, run.add)

    def _probe(self, run: Run) -> dict[str, float]:
        """Some new examples, before and after: did it learn them? And some replayed ones: does it still know them?"""
        taught = _some([i for i in run.new if i not in run.known])
        kept = _some([i for i in run.replay if i.chosen is not None and i.example.id in run.reference])
        scored = self._trainable.score([a for i in (*taught, *kept) for a in i.answers])
        after = {i.example.id: [scored.pop(0).logprobs for _ in i.answers] for i in (*taught, *kept)}
        figures = summary(taught, run.reference, "before") | summary(taught, after, "after")
        return figures | retention(kept, run.reference, "before") | retention(kept, after, "after")


def _some(items: Sequence[Item]) -> Sequence[Item]:
    """At even distances."""
    return items[:: -(-len(items) // PROBE_EXAMPLES) or 1]


def _borne_out(taught: Sequence[Item]) -> float:
    """Of the weight of those that show a better answer, the share in episodes that ended well."""
    shown = [i.example for i in taught if i.example.instructive]
    whole = sum(e.weight for e in shown)
    return sum(e.weight for e in shown if e.verified) / whole if whole else 0.0


def _nothing_to_learn(run: Run) -> str:
    reasons = []
    if run.known:
        reasons.append(f"the live adapter gives all of these {len(run.known)} answers already")
    if run.silent:
        reasons.append(f"{len(run.silent)} hints change nothing about the answers they are on")
    return f"nothing to learn: {'; '.join(reasons)}"


# -------------------------------------------------------------------------------------------- optimiser


def _optimizer(lora: Lora, state: Mapping[str, Tensor]) -> FlatAdam:
    """Going on from the parent's state where there is one that fits."""
    try:
        return FlatAdam(lora.flat, state)
    except (KeyError, RuntimeError) as e:
        log.error("the optimiser starts afresh: its saved state does not fit: %s", e)
        return FlatAdam(lora.flat, {})


def _descend(run: Run, lora: Lora, optimizer: FlatAdam, lr: float) -> None:
    norm = float(torch.nn.utils.clip_grad_norm_([lora.flat], CLIP_NORM))
    if not math.isfinite(norm):
        raise RefusedError("the gradient is not finite")
    optimizer.step(lr)
    run.grad_norms.append(norm)
    run.steps += 1
