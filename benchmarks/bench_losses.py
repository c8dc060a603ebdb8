"""What each loss makes of the same 36 interactions: held-out success and retention, by kind of feedback.

A frozen model answers 36 pages twice (browser-free pages of two tasks, temperature 0.7); a program that knows the right
actions gives feedback: thumbs on the first answer, a preference where exactly one of the two is right, a correction of
the first, or a thumb where it is right and otherwise what should be done, in words. Each loss makes one update of these
in the learner, without replay, gates or server. Success: the share of other pages of the same tasks on which greedy
decoding gives a right action. Retention: the share of tokens of the frozen model's greedy answers to unrelated
questions that greedy decoding still gives, each after the answer's own beginning.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import harness

harness.threads()

import torch

from gradatim.config import EngineConfig, LearnerConfig, LossConfig
from gradatim.demo.agent import messages
from gradatim.demo.browser_free import browser_free_env
from gradatim.demo.tasks import normalise
from gradatim.engine.transformers import TransformersEngine
from gradatim.learner.learner import LoraLearner
from gradatim.learner.trainable import trainable
from gradatim.nn.base import Base, load_base
from gradatim.nn.pack import Answer
from gradatim.nn.render import Renderer
from gradatim.testing.records import an_adapter
from gradatim.types import Adapter, AdapterId, Delta, EpisodeId, Example, Message, Request, Sampling, StepId

TASKS = ("login-user", "enter-text")
QUESTIONS = (
    "Name three rivers of Europe.",
    "What is the capital of Peru?",
    "Write one sentence about rain.",
    "Why is the sky blue?",
    "Translate 'good morning' into French.",
    "How many legs does a spider have?",
)
# (kind of feedback, name of the loss, the table that makes it so); the first of a kind is the product's default
LOSSES: Sequence[tuple[str, str, Mapping[str, Any]]] = (
    ("thumbs", "sft, avoid", {}),
    ("thumbs", "apo_zero", {"score": "apo_zero", "failure": "apo_zero"}),
    ("thumbs", "kto", {"score": "kto", "failure": "kto"}),
    ("thumbs", "policy_gradient", {"score": "policy_gradient", "failure": "policy_gradient"}),
    ("pairs", "dpo", {}),
    ("pairs", "robust_dpo", {"preference": "robust_dpo"}),
    ("pairs", "ipo", {"preference": "ipo"}),
    ("corrections", "dpo", {}),
    ("corrections", "sft", {"correction": "sft"}),
    ("corrections", "self_distillation", {"correction": "self_distillation"}),
    ("hints", "self_distillation", {}),
)


@dataclass(frozen=True, slots=True)
class State:
    """A page in the middle of an episode, and every right action on it."""

    task: str
    messages: Sequence[Message]
    right: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """An answer as it was drawn."""

    text: str
    ids: tuple[int, ...]  # (T,)
    logprobs: tuple[float, ...]  # (T,)


def states(count: int, first_seed: int, rng: random.Random) -> list[State]:
    """From episodes of both tasks in turn, each right action taken at random; no two prompts are equal."""
    out: dict[str, State] = {}
    seed = first_seed
    while len(out) < count:
        env = browser_free_env(TASKS[seed % len(TASKS)])
        observation, done = env.reset(seed), False
        while not done:
            right = env.right_actions()
            out.setdefault(observation, State(env.task, tuple(messages(observation)), tuple(right)))
            result = env.step(rng.choice(right))
            observation, done = result.observation, result.done
        seed += 1
    return list(out.values())[:count]


async def answers(engine: TransformersEngine, asked: Sequence[Message], sampling: Sampling) -> list[Given]:
    """All choices of one request, drawn by the engine."""
    drawn: list[list[Any]] = [[] for _ in range(sampling.n)]
    async for event in engine.generate(Request(messages=tuple(asked), sampling=sampling), AdapterId("agent@0")):
        if isinstance(event, Delta):
            drawn[event.index].append(event)
    tokens = [[t for delta in deltas for t in delta.tokens] for deltas in drawn]
    texts = ["".join(delta.text for delta in deltas) for deltas in drawn]
    return [
        Given(text, tuple(t.id for t in mine), tuple(t.logprob for t in mine))
        for text, mine in zip(texts, tokens, strict=True)
    ]


async def draw(
    base: Base, data_dir: Path, frozen: Adapter, pages: Sequence[State], seed: int
) -> tuple[list[list[Given]], list[Given]]:
    """Two answers to each page, and the greedy answers to the unrelated questions."""
    config = EngineConfig(threads=1)
    engine = TransformersEngine(base, Renderer(base), config, data_dir, max_queue=256)
    try:
        await engine.load(frozen)
        two = Sampling(max_tokens=16, temperature=0.7, n=2, seed=seed)
        pairs = await asyncio.gather(*(answers(engine, page.messages, two) for page in pages))
        greedy = Sampling(max_tokens=24, temperature=0.0)
        known = [await answers(engine, [{"role": "user", "content": q}], greedy) for q in QUESTIONS]
    finally:
        engine.close()
    return list(pairs), [k[0] for k in known]


def in_words(action: str) -> str:
    """What a person would say instead of giving the action itself."""
    verb, number, *text = action.split(" ", 2)
    what = f"click on element {number}" if verb == "click" else f"type {text[0]} into element {number}"
    return f"That was wrong. The next thing to do is to {what}."


@dataclass(frozen=True, slots=True)
class Teacher:
    """The program that judges, and what the product makes of its judgements."""

    renderer: Renderer

    def example(self, kind: str, number: int, page: State, given: Sequence[Given]) -> Example | None:
        answer, other = given
        blank = Example(
            id=f"{kind}-{number}",
            created_at=0.0,
            episode_id=EpisodeId(str(number)),
            step_id=StepId(str(number)),
            prompt_ids=self.renderer.prompt_ids(page.messages),
            origin="",
            skill=page.task,
            logprobs=answer.logprobs,
        )
        ok, other_ok = (normalise(a.text) in page.right for a in (answer, other))
        if kind == "pairs":
            good, bad = (answer, other) if ok else (other, answer)
            pair = replace(blank, chosen_ids=good.ids, rejected_ids=bad.ids, origin="preference", logprobs=())
            return pair if ok != other_ok else None
        if ok:
            return replace(blank, chosen_ids=answer.ids, origin="score")
        bad_one = replace(blank, rejected_ids=answer.ids, origin="failure")
        return {"thumbs": self._thumb, "corrections": self._corrected, "hints": self._hinted}[kind](bad_one, page)

    def _thumb(self, bad: Example, page: State) -> Example:
        return bad

    def _corrected(self, bad: Example, page: State) -> Example:
        told = f"A better answer: {page.right[0]}"
        hint_ids = self.renderer.hinted_ids(bad.prompt_ids, page.messages, told)
        chosen_ids = self.renderer.completion_ids(page.right[0])
        return replace(bad, chosen_ids=chosen_ids, hint_ids=hint_ids, origin="correction")

    def _hinted(self, bad: Example, page: State) -> Example:
        hint_ids = self.renderer.hinted_ids(bad.prompt_ids, page.messages, in_words(page.right[0]))
        return replace(bad, hint_ids=hint_ids, origin="hint")


@dataclass(frozen=True, slots=True)
class Exam:
    """Held-out pages and unrelated questions, scored teacher-forced under one adapter."""

    base: Base
    data_dir: Path
    pages: Sequence[State]
    known: Sequence[Given]

    def of(self, adapter: Adapter) -> dict[str, float]:
        renderer, model = Renderer(self.base), trainable(self.base)
        right = [
            Answer(renderer.prompt_ids(p.messages), renderer.completion_ids(action))
            for p in self.pages
            for action in p.right
        ]
        asked = [renderer.prompt_ids([{"role": "user", "content": q}]) for q in QUESTIONS]
        kept = [Answer(prompt, given.ids) for prompt, given in zip(asked, self.known, strict=True)]
        with model.lock:
            model.wear(adapter, self.data_dir)
            scored = model.score([*right, *kept])
        chances, hits = [], []
        for page in self.pages:
            mine = [scored.pop(0) for _ in page.right]
            chances.append(sum(float(s.total.exp()) for s in mine))
            hits.append(any(bool(s.greedy.all()) for s in mine))
        still = torch.cat([s.greedy for s in scored]).float()
        return {"success": fmean(hits), "chance": fmean(chances), "retention": float(still.mean())}


def frozen_adapter(base: Base) -> Adapter:
    return an_adapter(0, base_sha256=base.sha256, sha256=base.sha256)


Loss = tuple[str, str, Mapping[str, Any]]
FROZEN: Loss = ("none", "frozen", {})


def run_seed(
    seed: int, data_dir: Path, counts: tuple[int, int], losses: Sequence[Loss], results: Path
) -> list[dict[str, Any]]:
    """One row per loss, after one for the frozen model. Rows that lie in ``results`` are not made again."""
    files = {x[:2]: results / f"{seed}-{x[0]}-{x[1].replace(', ', '+')}.json" for x in (FROZEN, *losses)}
    missing = [(k, x) for k, x in enumerate((FROZEN, *losses)) if not files[x[:2]].exists()]
    if missing:
        for row in made_rows(seed, data_dir, counts, missing):
            files[row["feedback"], row["loss"]].write_text(json.dumps(row))
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return [json.loads(file.read_text()) for file in files.values()]


def made_rows(
    seed: int, data_dir: Path, counts: tuple[int, int], wanted: Sequence[tuple[int, Loss]]
) -> Iterator[dict[str, Any]]:
    train, held_out = counts
    rng = random.Random(seed)
    pages = states(train, 10_000 * (seed + 1), rng)
    taken = {str(p.messages[-1]) for p in pages}
    others = [p for p in states(held_out + train, 1_000_000 * (seed + 1), rng) if str(p.messages[-1]) not in taken]
    engine_base = load_base("smollm2", data_dir, dtype="bfloat16", device="cpu")
    given, known = asyncio.run(draw(engine_base, data_dir, frozen_adapter(engine_base), pages, seed))
    base = load_base("smollm2", data_dir, dtype="bfloat16", device="cpu")
    frozen, teacher = frozen_adapter(base), Teacher(Renderer(base))
    exam = Exam(base, data_dir, others[:held_out], known)
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, name, table) in wanted:
            row: dict[str, Any] = {"seed": seed, "feedback": kind, "loss": name}
            if number == 0:
                yield row | exam.of(frozen)
                continue
            made = [teacher.example(kind, i, p, g) for i, (p, g) in enumerate(zip(pages, given, strict=True))]
            examples = [e for e in made if e is not None]
            config = LearnerConfig(seed=seed, losses=LossConfig(**table))
            learner = LoraLearner(base, config, Path(folder), "agent")
            started_s = time.process_time()
            update, adapter = learner.update(examples, [], frozen, number)
            row |= {"examples": len(examples), "cpu_s": time.process_time() - started_s}
            row["refused"] = update.refused_because
            row |= {k: update.metrics[k] for k in ("silent_hints", "delta_norm", "hint_nats") if k in update.metrics}
            yield row | replace(exam, data_dir=Path(folder)).of(adapter or frozen)


def mean(rows: Sequence[Mapping[str, Any]], kind: str, loss: str, what: str) -> float:
    return fmean(float(r[what]) for r in rows if (r["feedback"], r["loss"]) == (kind, loss))


def goals(rows: Sequence[Mapping[str, Any]], losses: Sequence[Any]) -> list[harness.Goal]:
    frozen = mean(rows, "none", "frozen", "success")
    kept = mean(rows, "none", "frozen", "retention")  # decoded and scored in 16 bits, which differ at near ties
    out = [harness.Goal("success, frozen", frozen), harness.Goal("retention, frozen", kept, ">= 0.9")]
    for kind, loss, _ in losses:
        out.append(harness.Goal(f"success, {kind}: {loss}", mean(rows, kind, loss, "success")))
        out.append(harness.Goal(f"retention, {kind}: {loss}", mean(rows, kind, loss, "retention")))
    for kind in dict.fromkeys(k for k, _, _ in losses):
        names = [n for k, n, _ in losses if k == kind]
        by_name = {n: mean(rows, kind, n, "success") for n in names}
        if len(names) > 1:
            behind = by_name[names[0]] - max(by_name[n] for n in names[1:])
            out.append(harness.Goal(f"success of the default for {kind} less the best other's", behind, ">= -0.05"))
        out.append(harness.Goal(f"gain of the default for {kind}", by_name[names[0]] - frozen, ">= 0"))
    pair = [("corrections", n) for n in ("self_distillation", "sft")]
    if all(p in [(k, n) for k, n, _ in losses] for p in pair):
        for what in ("success", "retention"):
            value = mean(rows, *pair[0], what) - mean(rows, *pair[1], what)
            target = ">= 0" if what == "retention" else "reported"
            out.append(harness.Goal(f"{what}, self-distillation less SFT on the same corrections", value, target))
    return out


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--results", type=Path, help="where finished rows are kept (default: a temporary folder)")
    parser.add_argument("--data-dir", type=Path, help="holds the converted model (default: a temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quick = bool(args.quick)
    losses = [x for x in LOSSES if not quick or x[0] in ("corrections", "hints")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        results: Path = args.results or Path(scratch) / "results"
        results.mkdir(parents=True, exist_ok=True)
        for seed in range(1 if quick else 3):
            rows += run_seed(seed, args.data_dir or Path(scratch), (8, 6) if quick else (36, 32), losses, results)
    harness.report("bench_losses", goals(rows, losses), {"rows": rows}, args)


if __name__ == "__main__":
    main()
