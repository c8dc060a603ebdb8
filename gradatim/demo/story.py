"""The story of the demo, over the wire: baselines, learning in production, a redesign, harm stopped, a way back.

Each phase is one method of `Story`, in the order in which `Story.run` tells them. The story is a client: it asks,
gives feedback, waits until the server says that the loop is done, and tests held-out prompts against an adapter
pinned by name. It decides nothing about learning and cannot see how it is done.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import openai

from gradatim.demo.agent import Caller, EpisodeRecord, PromptBuilder, messages, run_episode
from gradatim.demo.baselines import RetrievalAgent, random_valid_episode
from gradatim.demo.operator import Operator, ScriptedOperator
from gradatim.demo.pool import EnvPool
from gradatim.demo.results import (
    Episode,
    Evaluation,
    Harmful,
    Identity,
    Phase,
    Results,
    Rollback,
    Split,
    StoryConfig,
)
from gradatim.demo.tasks import TASKS, Splits, split
from gradatim.demo.wire import AdapterInfo, Wire

CORRECTED = "login-user"
REDESIGNED = "login-user-popup"
BOLDER = 0.3  # more temperature at each further attempt
BY_OUTCOME = {"click-button": 3, "enter-text": 1}  # pages per round, in units of ``StoryConfig.outcomes``
TRANSFER = "enter-password"
ON_THEIR_WAY = {"candidate", "shadow", "canary"}


class Screen(Protocol):
    """Shows the story to a person while it happens."""

    def phase(self, title: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def refresh(self, results: Results, live: str) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(slots=True)
class Story:
    """Runs the phases against one server and fills in `Results`."""

    config: StoryConfig
    client: openai.OpenAI
    wire: Wire
    pool: EnvPool
    results: Results
    screen: Screen
    _splits: dict[str, Splits] = field(init=False, default_factory=dict)
    _next_train: dict[str, Iterator[int]] = field(init=False, default_factory=dict)
    _retrieval: RetrievalAgent = field(init=False)
    _sessions: Iterator[int] = field(init=False, default_factory=count)
    _run_id: str = field(init=False, default_factory=lambda: f"{random.SystemRandom().getrandbits(32):08x}")
    _started: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._retrieval = RetrievalAgent(self.config.retrieved)

    def run(self) -> None:
        """Tells everything, in order."""
        with self._phase("split", "Drawing held-out prompts, disjoint by rendered page"):
            self._draw_splits()
        before = self._frozen_answers()
        with self._phase("baselines", "(i) Baselines: random-valid and frozen"):
            self._baselines()
        with self._phase("stream", "(ii) Learning in production: corrections and outcomes"):
            self._stream("stream", CORRECTED, self.config.rounds, (CORRECTED, *BY_OUTCOME))
        with self._phase("test", "(iii) Held-out test, transfer and retention"):
            self._test("test", (CORRECTED, TRANSFER, *BY_OUTCOME), (CORRECTED,))
        with self._phase("redesign", "(iv) The page is redesigned: a dialog comes between"):
            self._stream("redesign", REDESIGNED, self.config.redesign_rounds, (REDESIGNED, CORRECTED))
            self._test("after redesign", (REDESIGNED, CORRECTED, *BY_OUTCOME), (REDESIGNED,))
        with self._phase("harm", "(v) A harmful batch: inverted corrections"):
            self.results.harmful = self._harm()
        with self._phase("rollback", "(vi) Rollback"):
            self.results.rollback = self._roll_back()
        after = self._frozen_answers()
        self.results.identity = Identity(len(before), before, after)
        self.results.complete = True

    def collect(self) -> None:
        """Takes the server's own account, and this client's, into the results."""
        status = self.wire.status()
        self.results.adapters = self.wire.adapters()[0]
        self.results.feedback_to_live_s = list(status.feedback_to_live_s)
        self.results.updates_applied = status.updates_applied
        self.results.updates_refused = status.updates_refused

    def count_traffic(self) -> None:
        traffic = self.wire.traffic
        self.results.requests = traffic.requests
        self.results.failures = list(traffic.failures)
        self.results.latencies_s = [round(latency, 4) for latency in traffic.latencies_s]

    # (i)

    def _draw_splits(self) -> None:
        config = self.config
        corrected = config.corrected
        train = {
            CORRECTED: config.rounds * corrected + config.harmful,
            REDESIGNED: config.redesign_rounds * corrected,
            **{task: n * (config.rounds + config.redesign_rounds) * config.outcomes for task, n in BY_OUTCOME.items()},
        }
        for task in TASKS:
            with self.pool.env(task) as env:
                drawn = split(env, held_out=config.held_out, train=train.get(task, 0), first_seed=config.first_seed)
            self._splits[task] = drawn
            self._next_train[task] = iter(drawn.train)
            self.results.splits.append(
                Split(task, len(drawn.train), len(drawn.held_out), drawn.seeds_tried, drawn.distinct_prompts)
            )

    def _baselines(self) -> None:
        for task in TASKS:
            seeds = range(10**6, 10**6 + self.config.random_episodes)
            wins = list(self.pool.map(self._random_attempt(task), seeds))
            self.results.random_floor[task] = sum(wins) / len(wins)
            self._evaluate("baselines", "frozen", task, self._frozen, self.config.held_out)

    def _random_attempt(self, task: str) -> Callable[[int], bool]:
        def attempt(seed: int) -> bool:
            with self.pool.env(task) as env:
                return random_valid_episode(env, seed)

        return attempt

    # (ii) and (iv)

    def _stream(self, phase: str, corrected: str, rounds: int, watched: Sequence[str]) -> None:
        for task in watched:
            self._evaluate(phase, "live", task, self._live(), self.config.curve)
        for number in range(1, rounds + 1):
            self._round(phase, corrected, f"round {number} of {rounds}")
            self._settle(self.config.settle_s)
            live = self._live()
            if number == rounds or number % self.config.curve_every == 0:
                for task in watched:
                    self._evaluate(phase, "live", task, live, self.config.curve)
            self._report_round(phase, number, live)

    def _round(self, phase: str, corrected: str, what: str) -> None:
        jobs = [(corrected, True)] * self.config.corrected
        jobs += [(task, False) for task, n in BY_OUTCOME.items() for _ in range(n * self.config.outcomes)]
        random.Random(f"{phase} {what}").shuffle(jobs)
        drawn = [(task, next(self._next_train[task]), has_operator) for task, has_operator in jobs]

        def work(job: tuple[str, int, bool]) -> list[EpisodeRecord]:
            task, seed, has_operator = job
            if has_operator:
                return [self._attempt(task, seed, operator=ScriptedOperator())]
            return list(self._attempts(task, seed))

        self._retrieval.learn(self._collected(phase, what, self.pool.map(work, drawn), len(drawn)))

    def _attempts(self, task: str, seed: int) -> Iterator[EpisodeRecord]:
        """An agent that failed tries the same page again, a little bolder each time, and does not repeat what failed:
        what failed and what worked then have one state."""
        failed: set[tuple[str, str]] = set()
        for attempt in range(self.config.attempts):
            bold = self.config.temperature + BOLDER * attempt
            record = self._attempt(task, seed, temperature=bold, failed=failed)
            yield record
            if record.success is not False:
                return
            failed |= record.last_move

    def _report_round(self, phase: str, number: int, live: str) -> None:
        last = [e for e in self.results.episodes if e.phase == phase and e.task.startswith(CORRECTED)]
        last = last[-self.config.corrected :]
        corrections = sum(e.corrections for e in last) / max(1, len(last))
        self.screen.note(f"{phase} round {number}: live {live}, {corrections:.1f} corrections per corrected episode")

    def _attempt(
        self,
        task: str,
        seed: int,
        *,
        operator: Operator | None = None,
        outcome: bool = True,
        temperature: float | None = None,
        failed: Set[tuple[str, str]] = frozenset(),
    ) -> EpisodeRecord:
        """One episode of the stream: routed like any user's, sampled, with feedback."""
        with self.pool.env(task) as env:
            return run_episode(
                self.client,
                env,
                seed,
                model=self.results.model,
                temperature=self.config.temperature if temperature is None else temperature,
                session_id=self._session(),
                feedback=self.wire,
                operator=operator,
                outcome=outcome,
                traffic=self.wire.traffic,
                failed=failed,
            )

    def _collected(
        self, phase: str, what: str, pages: Iterator[list[EpisodeRecord]], total: int
    ) -> list[EpisodeRecord]:
        """The records of all attempts, page by page, noted in the results."""
        kept = []
        for done, records in enumerate(pages, 1):
            kept.extend(records)
            self.results.episodes.extend(self._noted(phase, record) for record in records)
            self.screen.progress(f"{phase}: {what}", done, total)
        return kept

    def _noted(self, phase: str, record: EpisodeRecord) -> Episode:
        return Episode(
            at_s=self._now(),
            phase=phase,
            task=record.task,
            seed=record.seed,
            success=record.success,
            steps=len(record.steps),
            corrections=record.corrections,
            adapters=tuple(dict.fromkeys(step.adapter for step in record.steps)),
            met_dialog=record.met_dialog,
        )

    # (iii)

    def _test(self, phase: str, tasks: Sequence[str], retrieval_tasks: Sequence[str]) -> None:
        live = self._live()
        for task in tasks:
            self._evaluate(phase, "live", task, live, self.config.held_out)
        for task in retrieval_tasks:
            prompt = self._retrieval.prompt
            self._evaluate(phase, "retrieval", task, self._frozen, self.config.retrieval, prompt=prompt)

    def _evaluate(
        self, phase: str, who: str, task: str, model: str, n: int, *, prompt: PromptBuilder = messages
    ) -> Evaluation:
        """Held-out, greedy, pinned to one adapter, and marked so that nothing of it is learned."""
        seeds = self._splits[task].held_out[:n]

        def attempt(seed: int) -> EpisodeRecord:
            with self.pool.env(task) as env:
                return run_episode(
                    self.client,
                    env,
                    seed,
                    model=model,
                    temperature=0.0,
                    session_id=self._session(),
                    prompt=prompt,
                    side=True,
                    traffic=self.wire.traffic,
                )

        records = []
        for done, record in enumerate(self.pool.map(attempt, seeds), 1):
            records.append(record)
            self.screen.progress(f"{phase}: {who} {model} on {task}", done, len(seeds))
        known = [r for r in records if r.success is not None]
        dialogs = [r for r in known if r.met_dialog]
        evaluation = Evaluation(
            at_s=self._now(),
            phase=phase,
            agent=who,
            model=model,
            task=task,
            n=len(known),
            successes=sum(bool(r.success) for r in known),
            corrected_episodes=self.results.corrected_episodes,
            unknown=len(records) - len(known),
            dialogs=len(dialogs),
            dialog_successes=sum(bool(r.success) for r in dialogs),
        )
        self.results.evaluations.append(evaluation)
        self.screen.refresh(self.results, self._live())
        return evaluation

    # (v)

    def _harm(self) -> Harmful:
        self._settle(self.config.judge_s)  # so that what is judged next is of the harmful batch and of nothing else
        known = {a.id for a in self.wire.adapters()[0]}
        before = self.wire.status()
        seeds = [next(self._next_train[CORRECTED]) for _ in range(self.config.harmful)]

        def work(seed: int) -> list[EpisodeRecord]:
            return [self._attempt(CORRECTED, seed, operator=ScriptedOperator(inverted=True, seed=seed), outcome=False)]

        records = self._collected("harm", "inverted corrections", self.pool.map(work, seeds), len(seeds))
        judged = self._settle(self.config.judge_s, until=lambda: self._new_verdicts(known, before.updates_refused))
        made = tuple(a for a in self.wire.adapters()[0] if a.id not in known)
        after = self.wire.status()
        harmful = Harmful(
            corrections=sum(r.corrections for r in records),
            live_before=before.live,
            live_after=after.live,
            judged=judged,
            adapters=made,
            updates_refused=after.updates_refused - before.updates_refused,
        )
        fate = "stopped" if harmful.stopped else "NOT stopped" if judged else "no verdict in time"
        self.screen.note(f"harmful batch of {harmful.corrections} inverted corrections: {fate}; live {after.live}")
        return harmful

    def _new_verdicts(self, known: set[str], refused_before: int) -> bool:
        adapters, live = self.wire.adapters()
        new = [a for a in adapters if a.id not in known]
        decided = any(a.stage not in ON_THEIR_WAY for a in new)
        return decided or live not in known or self.wire.status().updates_refused > refused_before

    # (vi)

    def _roll_back(self) -> Rollback:
        adapters, live = self.wire.adapters()
        target = previous(adapters, live)
        if target is None:
            return Rollback(before=live, skipped=f"{live} has no predecessor: nothing was promoted")
        started = time.monotonic()
        self.wire.rollback(target)
        with self.pool.env(CORRECTED) as env:
            observation = env.reset(self._splits[CORRECTED].held_out[0])
        asked = self._caller(self.results.model, temperature=self.config.temperature)
        _, who, _ = asked.ask(observation, session_id=self._session(), task=CORRECTED)
        done = Rollback(live, target, who.adapter, seconds=time.monotonic() - started)
        self.screen.note(f"rolled back from {live} to {target}; the next answer came from {who.adapter}")
        return done

    # shared

    @property
    def _frozen(self) -> str:
        return f"{self.results.model}@0"

    def _live(self) -> str:
        return self.wire.status().live or self._frozen

    def _frozen_answers(self) -> tuple[str, ...]:
        """Greedy answers of the frozen model to the first pages of all tasks."""
        asked = self._caller(self._frozen, temperature=0.0)
        answers = []
        for number in range(self.config.identity):
            task = TASKS[number % len(TASKS)]
            with self.pool.env(task) as env:
                observation = env.reset(self._splits[task].held_out[number // len(TASKS)])
            answers.append(asked.ask(observation, session_id=self._session(), task=task)[0])
        return tuple(answers)

    def _caller(self, model: str, temperature: float) -> Caller:
        return Caller(self.client, model, temperature, side=True, traffic=self.wire.traffic)

    def _settle(self, limit_s: float, until: Callable[[], bool] = lambda: True) -> bool:
        """Waits until nothing is waiting to be learned or judged, and ``until`` holds; False when time ran out."""
        deadline = time.monotonic() + limit_s
        quiet = 0
        while time.monotonic() < deadline:
            quiet = quiet + 1 if self._is_quiet() and until() else 0
            if quiet == 2:  # twice, because the loop may be between two pieces of work
                return True
            time.sleep(min(1.0, limit_s / 20))
        return False

    def _is_quiet(self) -> bool:
        status = self.wire.status()
        if status.waiting_feedback or status.learning:
            return False
        return not any(a.stage in ON_THEIR_WAY for a in self.wire.adapters()[0])

    def _session(self) -> str:
        return f"demo-{self._run_id}-{next(self._sessions)}"

    def _now(self) -> float:
        return round(time.monotonic() - self._started, 2)

    @contextmanager
    def _phase(self, name: str, title: str) -> Iterator[None]:
        self.screen.phase(title)
        start = self._now()
        yield
        self.results.phases.append(Phase(name, start, self._now()))


def previous(adapters: Sequence[AdapterInfo], live: str) -> str | None:
    """The adapter to go back to: the live one's parent, or else the newest retired one."""
    by_id = {a.id: a for a in adapters}
    parent = by_id[live].parent if live in by_id else None
    if parent is not None:
        return parent
    retired = [a.id for a in adapters if a.stage == "retired"]
    return retired[-1] if retired else None
