"""What an update costs outside torch, from 10^2 to 10^6 stored episodes.

For each size a real SQLite store is filled in bulk with episodes of two steps, their feedback, rewards, credits and
examples, an update per 24 examples, and adapters with their verdicts and moves: eight named skills of unequal
frequency, one in twenty prompts a common one, one in five adapters refused. Then the real loop, replay, gates, routing
and status run on it, with a learner that trains nothing and a scorer that knows all: in each round new episodes are
captured (not counted), judged, learned from, decided on and reported. What is compared is process CPU time, the median
over the rounds. Then the start of a fresh loop process is measured in one: it follows the whole log once.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import harness

harness.threads()

from sqlalchemy import Connection, create_engine, insert, text, update

from gradatim.app import report
from gradatim.config import Config, GateConfig, RewardConfig
from gradatim.credit import OutcomeCredit
from gradatim.examples import ExampleBuilder
from gradatim.learner.replay import StoreReplay
from gradatim.loop import JUDGED, LEARNED, Loop
from gradatim.release.gates import ReplayGate, StaticGate
from gradatim.release.traffic import Traffic
from gradatim.reward import WeightedReward
from gradatim.skills import PromptSkills
from gradatim.store import SqlStore, open_store, schema
from gradatim.store.rows import to_row
from gradatim.testing.fakes import FakeEngine
from gradatim.testing.records import a_step, an_adapter
from gradatim.types import (
    Adapter,
    AdapterId,
    CaseScore,
    Credit,
    Decision,
    EpisodeId,
    Example,
    Feedback,
    Message,
    Move,
    Record,
    Reward,
    Stage,
    Step,
    StepId,
    Update,
    Verdict,
)

PER_UPDATE = 24  # new examples, one of each episode
REFUSED_EVERY = 5  # adapters
WARM_UP = 3  # rounds that are not counted: the first has the whole log to follow
SKILLS = tuple(f"skill {i}" for i in range(8))
END_OF_TURN = 2
_CHUNK = 20_000  # rows of one bulk write


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", help="episodes in the stores, ascending")
    parser.add_argument("--start", type=Path, help="internal: measure the start of a loop process on this store")
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start_of_a_loop(args.start)))
        return
    sizes = args.sizes or ([100, 1000, 5000] if args.quick else [100, 1000, 10_000, 100_000, 1_000_000])
    rounds = {size: measured(size, 7 if args.quick else 25) for size in sizes}
    costs = {size: {name: cpu for name, (cpu, _) in found.items()} for size, found in rounds.items()}
    goals = list(_goals(sizes, costs, rounds[sizes[-1]]["update"][1]))
    details = {"cpu_ms": costs, "wall_ms": {s: {n: w for n, (_, w) in found.items()} for s, found in rounds.items()}}
    harness.report("bench_store_scale", goals, details, args)


def _goals(sizes: Sequence[int], costs: Mapping[int, Mapping[str, float]], wall_ms: float) -> Iterator[harness.Goal]:
    small, large = sizes[0], sizes[-1]
    span = f"{large:.0e} episodes to {small:.0e}"
    yield harness.Goal(f"CPU of an update outside torch, ratio of {span}", ratio(costs, small, large), "<= 1.5")
    if len(sizes) > 2:
        yield harness.Goal(f"the same, {large:.0e} to {sizes[1]:.0e}", ratio(costs, sizes[1], large), "<= 1.5")
    yield harness.Goal(f"CPU of an update outside torch at {large:.0e}, ms", costs[large]["update"])
    yield harness.Goal("wall of the same, ms (shared machine)", wall_ms)
    for name in costs[large]:
        if name.startswith("start"):
            yield harness.Goal(f"{name} at {large:.0e}", costs[large][name])


def ratio(costs: Mapping[int, Mapping[str, float]], small: int, large: int) -> float:
    return costs[large]["update"] / costs[small]["update"]


# ------------------------------------------------------------------------------------------------ a long history


def history(episodes: int, seed: int = 0) -> Iterator[Record]:
    """Everything that the system would have recorded, in its order."""
    rng = random.Random(seed)
    yield an_adapter(0, base_sha256="base", sha256="base")
    yield Move(adapter_id=AdapterId("agent@0"), created_at=1.0, before=None, after=Stage.LIVE, actor="store")
    live, adapters, waiting = 0, 0, list[str]()
    for number in range(episodes):
        for record in episode(number, rng):
            yield record
            if isinstance(record, Example) and not record.retained:
                waiting.append(record.id)
        if len(waiting) == PER_UPDATE:
            adapters += 1
            passed = adapters % REFUSED_EVERY != 0
            yield from promotion(adapters, live, waiting, passed=passed)
            live, waiting = (adapters if passed else live), []


def prompt(number: int, rng: random.Random) -> tuple[str, tuple[int, ...]]:
    """(skill, tokens): one of a few prompts that come again and again, or one of its own."""
    skill = min(int(rng.expovariate(0.5)), len(SKILLS) - 1)
    own = rng.randrange(40) if rng.random() < 0.05 else 1000 + number
    shared, template = range(100, 160), range(1000 * (skill + 1), 1000 * (skill + 1) + 30)
    return SKILLS[skill], (*shared, END_OF_TURN, *template, 50_000 + own, 7, 8, 9, END_OF_TURN, 4, 5)


def captured(number: int, rng: random.Random, *, named: bool = True) -> list[Step]:
    skill, prompt_ids = prompt(number, rng)
    return [
        a_step(
            f"chatcmpl-{number:09}-{k}",
            f"ep-{number:09}",
            prompt_ids=(*prompt_ids, *range(10 + k, 12 + k)),
            completion_ids=(20 + number % 7, 30 + k, END_OF_TURN),
            logprobs=(-0.1, -0.2, -0.01),
            messages=({"role": "user", "content": "a page of text that is about so long " * 4},),
            skill=skill if named else "default",
            chain_key=f"{number:032x}{k:032x}",
        )
        for k in range(2)
    ]


def opinion(number: int, value: float = 1.0) -> Feedback:
    episode_id = EpisodeId(f"ep-{number:09}")
    id = f"fb-{number:032x}"
    return Feedback(id=id, created_at=2.0, kind="outcome", source="critic:tests", episode_id=episode_id, value=value)


def episode(number: int, rng: random.Random) -> Iterator[Record]:
    steps = captured(number, rng)
    yield from steps
    said = opinion(number)
    yield said
    reward = Reward(episode_id=said.episode_id, created_at=3.0, value=1.0, confidence=0.8, feedback_ids=(said.id,))
    yield reward
    ids = tuple(step.id for step in steps)
    methods = ("outcome", "outcome")
    yield Credit(episode_id=said.episode_id, created_at=3.0, step_ids=ids, advantages=(1.0, 1.0), methods=methods)
    last = steps[-1]
    yield Example(
        id=f"{last.id}#1",
        created_at=3.0,
        episode_id=said.episode_id,
        step_id=last.id,
        prompt_ids=last.prompt_ids,
        chosen_ids=last.completion_ids,
        origin="correction" if rng.random() < 0.25 else "success",
        skill=last.skill,
        state=f"{hash(last.prompt_ids) & 0xFFFFFFFFFFFF:032x}",
        retained=rng.random() < 0.25,
        verified=True,
        feedback_ids=(said.id,),
    )


def promotion(step: int, live: int, example_ids: Sequence[str], *, passed: bool) -> Iterator[Record]:
    yield an_update(step, live, example_ids)
    made = an_adapter(step, base_sha256="base", parent_id=AdapterId(f"agent@{live}"), update_id=f"update-{step}")
    yield made
    yield Move(adapter_id=made.id, created_at=4.0, before=None, after=Stage.CANDIDATE, actor="store")
    decision = Decision.PASS if passed else Decision.FAIL
    for gate in ("static", "replay"):
        evidence = {f"{skill}.live.{k}": 0.5 for skill in SKILLS for k in ("n", "net", "lost", "won", "logprob")}
        yield Verdict(adapter_id=made.id, created_at=5.0, gate=gate, decision=decision, evidence=evidence)
    if passed:
        old = AdapterId(f"agent@{live}")
        yield Move(adapter_id=old, created_at=5.0, before=Stage.LIVE, after=Stage.RETIRED, actor="loop")
    after = Stage.LIVE if passed else Stage.REJECTED
    yield Move(adapter_id=made.id, created_at=5.0, before=Stage.CANDIDATE, after=after, actor="loop")


def an_update(step: int, parent: int, example_ids: Sequence[str]) -> Update:
    return Update(
        id=f"update-{step}",
        created_at=4.0,
        applied=True,
        parent_id=AdapterId(f"agent@{parent}"),
        adapter_id=AdapterId(f"agent@{step}"),
        example_ids=tuple(example_ids),
        kinds={"success": len(example_ids)},
        metrics={"delta_norm": 0.01, "loss_nll": 0.5, "kl": 0.01},
    )


def fill(path: Path, episodes: int) -> None:
    """Write the history in bulk into the store's own tables, and leave those of what may change as it would have."""
    with open_store(path):
        pass  # makes the schema
    engine = create_engine(f"sqlite:///{path}")
    indices = [index for table in schema.TABLES.values() for index in table.indexes]
    with engine.connect() as connection:
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -200000"):
            connection.exec_driver_sql(f"PRAGMA {pragma}")
        for index in indices:  # made anew at the end, which is many times faster
            index.drop(connection)
        stages = _write(connection, episodes)
        for index in indices:
            index.create(connection)
        rows = [
            {"adapter_id": a, "name": "agent", "step": int(a.partition("@")[2]), "stage": s} for a, s in stages.items()
        ]
        connection.execute(insert(schema.stages), rows)
        for table in schema.TABLES.values():
            tally = f"SELECT '', '{table.name}', count(*) FROM {table.name}"
            connection.execute(text(f"INSERT OR REPLACE INTO tallies {tally}"))
        connection.execute(text("INSERT INTO tallies SELECT name, stage, count(*) FROM stages GROUP BY name, stage"))
        connection.commit()
    engine.dispose()


def _write(connection: Connection, episodes: int) -> Mapping[str, Stage]:
    """All records; the stages that the adapters end in."""
    stages: dict[str, Stage] = {}
    rows: dict[type[Record], list[dict[str, object]]] = {}
    position = 0
    for record in history(episodes):
        position += 1
        rows.setdefault(type(record), []).append({"log_position": position, **to_row(record)})
        if isinstance(record, Move):
            stages[record.adapter_id] = record.after
        if len(rows[type(record)]) == _CHUNK:
            connection.execute(insert(schema.TABLES[type(record)]), rows.pop(type(record)))
    for kind, left in rows.items():
        connection.execute(insert(schema.TABLES[kind]), left)
    connection.execute(update(schema.log_end).values(log_position=position))
    connection.execute(insert(schema.cursors), [{"name": c, "position": position} for c in (JUDGED, LEARNED)])
    return stages


# ---------------------------------------------------------------------------------------------- what is measured


class Learner:
    """Trains nothing."""

    def update(
        self,
        examples: Sequence[Example],
        replay: Sequence[Example],
        parent: Adapter,
        step: int,
        traffic: Sequence[Step] = (),
        good: Set[StepId] = frozenset(),
    ) -> tuple[Update, Adapter | None]:
        made = an_adapter(step, base_sha256="base", parent_id=parent.id, update_id=f"update-{step}")
        return an_update(step, parent.step, [e.id for e in examples]), made

    def shrink(self, update: Update, adapter: Adapter, parent: Adapter, step: int) -> tuple[Update, Adapter]:
        raise AssertionError("no gate asks for less of an update whose adapter knows every answer")


class Scorer:
    """Every adapter knows every answer, the base by chance only, so that there is proof of what was learned."""

    def score(self, adapter: Adapter, examples: Sequence[Example]) -> Sequence[CaseScore]:
        found = CaseScore(logprob=-0.01, greedy=True) if adapter.step else CaseScore(logprob=-2.0, greedy=False)
        return [found for _ in examples]


class Letters:
    def completion_ids(self, text: str) -> tuple[int, ...]:
        return (*text.encode(), END_OF_TURN)

    def hinted_ids(self, prompt_ids: Sequence[int], messages: Sequence[Message], hint: str) -> tuple[int, ...]:
        return ()


def loop_on(store: SqlStore) -> Loop:
    scorer, gate, reward = Scorer(), GateConfig(), RewardConfig()
    skills = PromptSkills(store, END_OF_TURN)
    return Loop(
        name="agent",
        store=store,
        reward_model=WeightedReward(reward),
        credit=OutcomeCredit(reward),
        examples=ExampleBuilder(store, Letters(), skills=skills),
        replay=StoreReplay(store, "agent", seed=0),
        learner=Learner(),
        gates={Stage.CANDIDATE: (StaticGate(store, scorer, gate), ReplayGate(store, scorer, gate))},
    )


class Clock:
    """Sums of CPU and wall time by name; each round's are kept."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, tuple[float, float]]] = []

    def lap(self) -> None:
        self.rounds.append({})

    def of(self, name: str, call: Callable[[], object]) -> None:
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        call()
        before = self.rounds[-1].get(name, (0.0, 0.0))
        spent = (time.process_time() - cpu_s, time.perf_counter() - wall_s)
        self.rounds[-1][name] = (before[0] + 1000 * spent[0], before[1] + 1000 * spent[1])

    def medians(self) -> dict[str, tuple[float, float]]:
        """Of the rounds after the warm-up, in ms; ``update`` is the sum of a round."""
        counted = self.rounds[WARM_UP:]
        totals = [tuple(sum(v[i] for v in r.values()) for i in (0, 1)) for r in counted]
        out = {n: tuple(median(r[n][i] for r in counted) for i in (0, 1)) for n in counted[0]}
        out["update"] = tuple(median(t[i] for t in totals) for i in (0, 1))
        return {name: (values[0], values[1]) for name, values in out.items()}


def measured(size: int, rounds: int) -> Mapping[str, tuple[float, float]]:
    """CPU and wall of each part of an update, ms; and of the start of a loop process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gradatim.db"
        began_s = time.perf_counter()
        fill(path, size)
        with open_store(path) as store:
            print(f"{size} episodes written in {time.perf_counter() - began_s:.0f} s", file=sys.stderr)
            medians = asyncio.run(_rounds(store, size, rounds))
        command = [sys.executable, __file__, "--start", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        started = json.loads(done.stdout)
    return {**medians, **{name: (value, value) for name, value in started.items()}}


async def _rounds(store: SqlStore, size: int, rounds: int) -> Mapping[str, tuple[float, float]]:
    rng, clock, loop, config = random.Random(1), Clock(), loop_on(store), Config()
    traffic = Traffic(store, FakeEngine(), config)
    latencies = report.Latencies(store)
    await traffic.refresh()
    for k in range(rounds + WARM_UP):
        for number in range(size + k * PER_UPDATE, size + (k + 1) * PER_UPDATE):
            store.append(*captured(number, rng, named=number % 4 != 0), opinion(number))
        clock.lap()
        clock.of("judge", lambda: loop.judge(flush=True))
        clock.of("waiting", loop.waiting)
        clock.of("learn", lambda: loop.learn(flush=True))
        clock.of("decide", lambda: _decide(loop))
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        await traffic.refresh()
        clock.rounds[-1]["routing"] = (1e3 * (time.process_time() - cpu_s), 1e3 * (time.perf_counter() - wall_s))
        clock.of("status", lambda: (report.learning(store, config), latencies.newest()))
        clock.of("metrics", lambda: report.live_id(store, "agent"))
        clock.of("adapter", lambda: report.adapter(store, "agent", AdapterId("agent@1")))
    return clock.medians()


def _decide(loop: Loop) -> None:
    found = loop._on_the_way()
    assert found is not None, "the learner made nothing"
    assert loop.decide(*found)
    assert not loop.store.stages("agent", Stage.CANDIDATE, Stage.REJECTED).keys() & {found[0].id}


# ------------------------------------------------------------------------------------------ the start of a process


@contextmanager
def _spent(name: str, into: dict[str, float]) -> Iterator[None]:
    began_s = time.process_time()
    yield
    into[f"start: {name}, CPU s"] = time.process_time() - began_s


def resident_mib() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def start_of_a_loop(path: Path) -> Mapping[str, float]:
    """What the first turn of a process costs beside loading the model."""
    out: dict[str, float] = {}
    with open_store(path) as store:
        store.read(Step, limit=1)
        before = resident_mib()
        replay, gate = StoreReplay(store, "agent", seed=0), ReplayGate(store, Scorer(), GateConfig())
        with _spent("replay", out):
            replay.draw(16)
        with _spent("cases", out):
            gate.check(an_adapter(1), an_adapter(0), an_adapter(0))
        with _spent("skills", out):
            PromptSkills(store, END_OF_TURN).name((1, 2, 3))
        grown = resident_mib() - before
        per = store.counts()["examples"] / 1e5
    whole = sum(out.values())
    return {**out, "start: CPU s per 10^5 examples": whole / per, "start: memory, MiB": grown}


if __name__ == "__main__":
    main()
