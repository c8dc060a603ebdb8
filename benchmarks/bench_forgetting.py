"""Forgetting over a stream of four skills: naive fine-tuning against replay, EWC, the KL limit, and the default.

The skills are four of the demo's tasks on its browser-free pages, taught one after the other by the product's learner
on SmolLM2-135M in bfloat16: synthetic pages, a real model. A skill is taught by updates of corrections (the expert's
action over a wrong one). Its score is the chance, on held-out pages, that an answer drawn at temperature 1 is a right
action, teacher-forced; greedy decoding is told beside it. Every arm sees the same corrections, and takes as many
gradient steps with as many of them in each.

    naive     no replay, no limit, no penalty
    replay    an old example beside every new one
    ewc       the penalty alone
    kl        the limit alone: replayed answers are measured at a weight of 1e-6, and not trained on
    default   what the learner's configuration says
    gated     the same with the replay gate before each adapter: as in the product, one correction in four is kept for
              the gate and not trained on, a little harm has the step halved, what was refused is tried once more
    repeated  the same, but each pass over the new examples replays the same old ones

``kept`` is a skill's score at the end over its score right after it was taught (of skills that were taught to at
least MASTERED); backward transfer loss is the mean of what earlier skills have lost at the end. Judged
are default and gated. Naive and default run at every learning rate, gated at the highest one, the others at the middle
one, unless ``--all``. Finished cells are kept in ``--results`` and not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import harness

harness.threads()

import numpy as np
import torch

from gradatim.config import GateConfig, LearnerConfig
from gradatim.demo.agent import messages
from gradatim.demo.browser_free import browser_free_env
from gradatim.learner.learner import LoraLearner
from gradatim.learner.scorer import TorchScorer
from gradatim.loop import SMALLEST_STEP
from gradatim.nn.base import Base, load_base
from gradatim.nn.render import Renderer
from gradatim.protocols import Store
from gradatim.release.gates import ReplayGate
from gradatim.release.harm import chance
from gradatim.store import open_store
from gradatim.testing.records import an_adapter
from gradatim.types import Adapter, Decision, EpisodeId, Example, Move, Stage, StepId, Update, Verdict

SKILLS: tuple[str, ...] = ("enter-text", "click-button", "login-user", "enter-password")
ARMS = ("naive", "replay", "ewc", "kl", "default", "gated", "repeated")
JUDGED = ("default", "gated")
EWC = 0.2  # share of the gradient, in the arms that have it
RATES = (2.5e-4 / 3, 2.5e-4, 7.5e-4)
NEW = 12  # corrections in an update
UPDATES = 2  # of a skill
EPOCHS = 3
BATCH = 4  # new examples in a gradient step
HELD_OUT = 24  # pages of a skill
MASTERED = 0.25
UNTRAINED_WEIGHT = 1e-6


@dataclass(frozen=True, slots=True)
class Score:
    """On some pages: the chance that an answer drawn at temperature 1 is a right action, and the share of pages on
    which greedy decoding gives one."""

    sampled: float
    greedy: float


@dataclass(frozen=True)
class Page:
    prompt_ids: tuple[int, ...]
    right: tuple[tuple[int, ...], ...]
    wrong: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Bench:
    """The model, and the pages of every skill."""

    base: Base
    train: Mapping[str, Sequence[Page]]
    held_out: Mapping[str, Sequence[Page]]


def pages(skill: str, renderer: Renderer, count: int, first_seed: int, known: set[tuple[int, ...]]) -> list[Page]:
    """All pages on the expert's way, of as many episodes as it takes; none whose prompt is ``known``, which grows."""
    env = browser_free_env(skill)
    out: list[Page] = []
    seed = first_seed
    while len(out) < count:
        observation, done = env.reset(seed), False
        while not done and len(out) < count:
            right = env.right_actions()
            wrong = [a for a in env.valid_actions() if a not in right]
            prompt = renderer.prompt_ids(messages(observation, ()))
            if wrong and prompt not in known:
                known.add(prompt)
                ids = [tuple(renderer.completion_ids(a) for a in actions) for actions in (right, wrong)]
                out.append(Page(prompt, ids[0], ids[1]))
            result = env.step(right[0])
            observation, done = result.observation, result.done
        seed += 1
    return out


def bench(data_dir: Path, held_out: int) -> Bench:
    base = load_base("smollm2", data_dir, dtype="bfloat16", device="cpu")
    renderer = Renderer(base)
    known: set[tuple[int, ...]] = set()
    tests = {skill: pages(skill, renderer, held_out, 10**6, known) for skill in SKILLS}
    train = {skill: pages(skill, renderer, 3 * NEW * UPDATES, 0, known) for skill in SKILLS}
    return Bench(base, train, tests)


def correction(page: Page, skill: str, number: int, rng: random.Random) -> Example:
    return Example(
        id=f"{skill}-{number}",
        created_at=0.0,
        episode_id=EpisodeId("bench"),
        step_id=StepId(f"{skill}-{number}"),
        prompt_ids=page.prompt_ids,
        chosen_ids=page.right[0],
        rejected_ids=rng.choice(page.wrong),
        origin="correction",
        skill=skill,
        verified=True,
    )


def settings(arm: str, lr: float, seed: int) -> LearnerConfig:
    """The default configuration with parts of it switched off."""
    config = LearnerConfig(lr=lr, seed=seed, epochs=EPOCHS, batch=2 * BATCH, replay_share=0.5)
    bare = replace(config, ewc=0.0, agem=False, kl_replay_limit=1e9)
    return {
        "naive": bare,
        "replay": bare,
        "ewc": replace(bare, ewc=EWC),
        "kl": replace(bare, kl_replay_limit=config.kl_replay_limit),
        "default": config,
        "gated": config,
        "repeated": config,
    }[arm]


def replayed(arm: str, past: Sequence[Example], rng: random.Random) -> list[Example]:
    """An old example for every new one in every pass, evenly over skills, no two alike where there are enough."""
    if arm in ("naive", "ewc"):
        return []
    skills = sorted({e.skill for e in past})
    count = NEW * (1 if arm == "repeated" else EPOCHS)
    drawn = [
        e
        for k, s in enumerate(skills)
        for e in some([e for e in past if e.skill == s], (count + k) // len(skills), rng)
    ]
    return [replace(e, weight=UNTRAINED_WEIGHT) for e in drawn] if arm == "kl" else drawn


def some(examples: Sequence[Example], n: int, rng: random.Random) -> list[Example]:
    return rng.sample(examples, min(n, len(examples)))


def score(scorer: TorchScorer, adapter: Adapter, tests: Sequence[Page]) -> Score:
    blank = Example(
        id="", created_at=0.0, episode_id=EpisodeId("bench"), step_id=StepId("test"), prompt_ids=(), origin="score"
    )
    asked = [
        replace(blank, id=f"{hash((p.prompt_ids, a))}", prompt_ids=p.prompt_ids, chosen_ids=a)
        for p in tests
        for a in p.right
    ]
    found = iter(zip(asked, scorer.score(adapter, asked), strict=True))
    pages = [[next(found) for _ in p.right] for p in tests]
    return Score(
        sampled=float(np.mean([sum(chance(s, len(e.chosen_ids)) for e, s in page) for page in pages])),
        greedy=float(np.mean([any(s.greedy for _, s in page) for page in pages])),
    )


class Trial:
    """The way of an update to the live adapter: straight, or through the shipped gate."""

    def __init__(self, store: Store, learner: LoraLearner, gate: ReplayGate, base: Adapter, *, gated: bool) -> None:
        self.live, self._base = base, base
        self._store, self._learner, self._gate, self._gated = store, learner, gate, gated
        self._step = 0
        self._tried: set[str] = set()
        self._refused: list[Example] = []  # for the first time
        store.append(base)

    def lots(self, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
        """What is taught of a skill, update by update."""
        every = LearnerConfig().retain_every if self._gated else len(examples) + 1
        kept = [replace(e, retained=True) for e in examples[every - 1 :: every]]
        taught = [e for k, e in enumerate(examples) if (k + 1) % every]
        if self._gated:
            self._store.append(*kept, *taught)
        size = -(-len(taught) // UPDATES)
        for k in range(UPDATES):
            yield taught[k * size : (k + 1) * size]
        while self._refused:
            again, self._refused = self._refused[:size], self._refused[size:]
            yield again

    def update(self, new: Sequence[Example], old: Sequence[Example]) -> tuple[Update, bool]:
        """Whether it went live."""
        update, made = self._learner.update(new, old, self.live, self._next())
        while made is not None and self._gated:
            self._store.append(update, made)
            verdict = self._gate.check(made, self.live, self._base)
            self._move(made, verdict)
            if verdict.decision is Decision.PASS:
                break
            if verdict.decision is Decision.REPAIR and update.scale > SMALLEST_STEP:
                update, made = self._learner.shrink(update, made, self.live, self._next())
            else:
                update, made = replace(update, refused_because=verdict.reason), None
        if made is not None:
            self.live = made
        elif self._gated:
            self._refused += [e for e in new if e.id not in self._tried]
        self._tried |= {e.id for e in new}
        return update, made is not None

    def _move(self, made: Adapter, verdict: Verdict) -> None:
        """As the loop does it: one candidate at a time, one live adapter."""
        passed = verdict.decision is Decision.PASS
        off = [(self.live.id, Stage.LIVE, Stage.RETIRED)] if passed else []
        ways = [*off, (made.id, Stage.CANDIDATE, Stage.LIVE if passed else Stage.REJECTED)]
        moves = [Move(adapter_id=i, created_at=0.0, before=b, after=a, actor="bench") for i, b, a in ways]
        self._store.move(*moves, verdicts=[verdict])

    def _next(self) -> int:
        self._step += 1
        return self._step


def cell(subject: Bench, arm: str, lr: float, seed: int, folder: Path) -> dict[str, Any]:
    """One stream: scores before it, right after each skill, and at its end."""
    started_s = time.process_time()
    config = settings(arm, lr, seed)
    learner, scorer = LoraLearner(subject.base, config, folder, "agent"), TorchScorer(subject.base, config, folder)
    sha = subject.base.sha256
    adapter = an_adapter(0, base_sha256=sha, sha256=sha)
    rng, replay_rng = random.Random(seed), random.Random(f"{seed}/replay")  # the same corrections in all arms
    past: list[Example] = []
    taught: dict[str, Score] = {}
    metrics: list[dict[str, float]] = []
    refused: list[str] = []
    with open_store(folder / "store.db") as store:
        trial = Trial(store, learner, ReplayGate(store, scorer, GateConfig()), adapter, gated=arm == "gated")
        for skill in SKILLS:
            chosen = rng.sample(range(len(subject.train[skill])), NEW * UPDATES)
            examples = [correction(subject.train[skill][i], skill, i, rng) for i in chosen]
            for new in trial.lots(examples):
                update, made = trial.update(new, replayed(arm, past, replay_rng) if past else [])
                if made:
                    past += new
                    metrics.append(dict(update.metrics) | {"scale": update.scale})
                else:
                    refused.append(update.refused_because)
            taught[skill] = score(scorer, trial.live, subject.held_out[skill])
        adapter = trial.live
    end = {s: taught[s] if s == SKILLS[-1] else score(scorer, adapter, subject.held_out[s]) for s in SKILLS}
    return {
        "taught": {skill: asdict(found) for skill, found in taught.items()},
        "end": {skill: asdict(found) for skill, found in end.items()},
        "refused": refused,
        "metrics": metrics,
        "cpu_s": time.process_time() - started_s,
    }


# --------------------------------------------------------------------------------------------- figures


def loss(done: Mapping[str, Any], by: str) -> float:
    """Backward transfer loss (Lopez-Paz 2017, arXiv:1706.08840, sec. 3.1, with the sign turned)."""
    earlier = SKILLS[:-1]
    return float(np.mean([done["taught"][s][by] - done["end"][s][by] for s in earlier]))


def kept(cells: Sequence[Mapping[str, Any]], by: str) -> float:
    """The smallest share, over the earlier skills, of its taught score that a skill has at the end."""
    shares = []
    for skill in SKILLS[:-1]:
        mastered = [c for c in cells if c["taught"][skill][by] >= MASTERED]
        if mastered:
            shares.append(sum(c["end"][skill][by] for c in mastered) / sum(c["taught"][skill][by] for c in mastered))
    return min(shares, default=float("nan"))


def goals_of(cells: Mapping[tuple[str, float, int], Mapping[str, Any]], rates: Sequence[float]) -> list[harness.Goal]:
    goals = []
    for lr in rates:
        arms = [arm for arm in ARMS if any((a, r) == (arm, lr) for a, r, _ in cells)]
        of = {arm: [c for (a, r, _), c in cells.items() if (a, r) == (arm, lr)] for arm in arms}
        losses = {arm: float(np.mean([loss(c, "sampled") for c in of[arm]])) for arm in arms}
        newest = {arm: float(np.mean([c["end"][SKILLS[-1]]["sampled"] for c in of[arm]])) for arm in arms}
        greedy = {arm: float(np.mean([loss(c, "greedy") for c in of[arm]])) for arm in arms}
        at, times = f"lr {lr:.2g}: ", "naive's backward transfer loss over"
        for arm in (a for a in JUDGED if a in arms):
            goals.append(
                harness.Goal(at + f"least share of an earlier skill kept, {arm}", kept(of[arm], "sampled"), ">= 0.97")
            )
            if losses["naive"] > 0:  # else there is nothing to be saved from
                saved = losses["naive"] / max(losses[arm], 0.005)
                goals.append(harness.Goal(at + f"{times} {arm}'s, taken as 0.005 at least", saved, ">= 5"))
            ratio = newest[arm] / (newest["naive"] or 1)
            goals.append(harness.Goal(at + f"newest skill, {arm} over naive", ratio, ">= 0.95"))
        goals += [
            *(harness.Goal(at + f"backward transfer loss, {arm}", losses[arm]) for arm in arms),
            *(harness.Goal(at + f"backward transfer loss, greedy, {arm}", greedy[arm]) for arm in arms),
            *(harness.Goal(at + f"newest skill, {arm}", newest[arm]) for arm in arms),
        ]
    return goals


def parsed() -> argparse.Namespace:
    parser = harness.options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="*", default=list(RATES))
    parser.add_argument(
        "--arms",
        nargs="*",
        default=list(ARMS),
        choices=ARMS,
        help="naive and default are judged",
    )
    parser.add_argument("--all", action="store_true", help="every arm at every learning rate")
    parser.add_argument("--results", type=Path, help="where finished cells are kept (default: a temporary folder)")
    parser.add_argument("--data-dir", type=Path, help="holds the converted model (default: a temporary folder)")
    return parser.parse_args()


def run(args: argparse.Namespace, subject: Bench, results: Path) -> dict[tuple[str, float, int], dict[str, Any]]:
    cells = {}
    for seed in range(args.seeds):
        for lr in args.rates:
            for arm in (a for a in args.arms if args.all or lr in wanted(a, args.rates)):
                kept_in = results / f"{arm}-{lr:.3g}-{seed}.json"
                if not kept_in.exists():
                    with tempfile.TemporaryDirectory() as folder:
                        done = cell(subject, arm, lr, seed, Path(folder))
                    kept_in.write_text(json.dumps(done))
                    line = " ".join(f"{s} {_shown(done['taught'][s])}>{_shown(done['end'][s])}" for s in SKILLS)
                    print(f"{arm:8} lr {lr:.2g} seed {seed}: {line} ({done['cpu_s']:.0f} s)", flush=True)
                cells[arm, lr, seed] = json.loads(kept_in.read_text())
    return cells


def wanted(arm: str, rates: Sequence[float]) -> Sequence[float]:
    """The learning rates at which an arm says something that the others do not."""
    if arm in ("naive", "default"):
        return rates
    return [max(rates)] if arm == "gated" else [sorted(rates)[len(rates) // 2]]


def _shown(score: Mapping[str, float]) -> str:
    return f"{score['sampled']:.2f} ({score['greedy']:.2f})"


def main() -> None:
    global SKILLS, NEW, HELD_OUT, EPOCHS
    args = parsed()
    torch.set_num_threads(1)
    if args.quick:
        SKILLS, NEW, HELD_OUT, EPOCHS = SKILLS[:2], 4, 6, 1
        args.seeds, args.rates = 1, [RATES[1]]
    with tempfile.TemporaryDirectory() as folder:
        results: Path = args.results or Path(folder) / "results"
        results.mkdir(parents=True, exist_ok=True)
        subject = bench(args.data_dir or Path(folder), HELD_OUT)
        cells = run(args, subject, results)
    if {"naive", "default"} <= set(args.arms):
        scores = {f"{a} {r:.2g} {s}": {k: c[k] for k in ("taught", "end", "cpu_s")} for (a, r, s), c in cells.items()}
        details = {"seeds": args.seeds, "skills": SKILLS, "new": NEW, "epochs": EPOCHS, "cells": scores}
        harness.report("bench_forgetting", goals_of(cells, args.rates), details, args)


if __name__ == "__main__":
    main()
