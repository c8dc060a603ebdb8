"""What a turn of the loop, a look at the stages and a report read does not grow with what is stored."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import pytest

from gradatim.app import report
from gradatim.app.figures import Sayer
from gradatim.app.home import Home
from gradatim.config import Config, CreditConfig, GateConfig, LearnerConfig, RewardConfig
from gradatim.credit import HorizonCredit
from gradatim.examples import ExampleBuilder
from gradatim.learner.replay import StoreReplay
from gradatim.loop import Loop
from gradatim.release.gates import ReplayGate, StaticGate
from gradatim.release.traffic import Traffic
from gradatim.reward import AuditedReward
from gradatim.skills import PromptSkills
from gradatim.store import SqlStore, open_store, rows
from gradatim.testing.fakes import FakeEngine
from gradatim.types import Adapter, AdapterId, CaseScore, Example, Message, Stage, Step, StepId, Update

from .records import adapter, feedback, step

ROUNDS = 60
EPISODES = 4  # of a round


class Learner:
    """Makes an adapter of anything; every third one is refused by the gates."""

    def update(
        self,
        examples: Sequence[Example],
        replay: Sequence[Example],
        parent: Adapter,
        number: int,
        traffic: Sequence[Step] = (),
        good: Set[StepId] = frozenset(),
    ) -> tuple[Update, Adapter | None]:
        made = adapter(number, parent=parent.step)
        update = Update(
            id=made.update_id,
            created_at=1.0,
            applied=True,
            parent_id=parent.id,
            adapter_id=made.id,
            example_ids=tuple(e.id for e in examples),
            metrics={"delta_norm": 9.0 if number % 3 == 0 else 0.01},
        )
        return update, made

    def shrink(self, update: Update, whole: Adapter, parent: Adapter, number: int) -> tuple[Update, Adapter]:
        raise AssertionError("these gates refuse or pass")


class Scorer:
    def score(self, adapter: Adapter, examples: Sequence[Example]) -> Sequence[CaseScore]:
        return [CaseScore(logprob=-0.1, greedy=True) for _ in examples]


class Letters:
    def completion_ids(self, text: str) -> tuple[int, ...]:
        return (*text.encode(), 2)

    def hinted_ids(self, prompt_ids: Sequence[int], messages: Sequence[Message], hint: str) -> tuple[int, ...]:
        return ()


def loop_on(store: SqlStore, judge: AuditedReward) -> Loop:
    gate, scorer = GateConfig(max_cases=8), Scorer()
    return Loop(
        name="agent",
        store=store,
        reward_model=judge,
        credit=HorizonCredit(store, CreditConfig(), RewardConfig()),
        examples=ExampleBuilder(store, Letters(), skills=PromptSkills(store, 2)),
        replay=StoreReplay(store, "agent", seed=0),
        learner=Learner(),
        gates={Stage.CANDIDATE: (StaticGate(store, scorer, gate), ReplayGate(store, scorer, gate))},
        learning=LearnerConfig(min_examples=1, max_examples=8, batch=8),
    )


def test_a_turn_reads_no_more_records_after_many_updates_than_after_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Counter[str]] = []
    genuine = rows.to_record
    monkeypatch.setattr("gradatim.examples.PAIRED_AMONG", 8)

    def counted(kind: Any, row: Any) -> Any:
        read[-1][kind.__name__] += 1
        return genuine(kind, row)

    monkeypatch.setattr("gradatim.store.sql.to_record", counted)
    read.append(Counter())
    with open_store(tmp_path / "s.db") as store:
        store.append(adapter(0))
        judge = AuditedReward(store, RewardConfig())
        loop, traffic, config = loop_on(store, judge), Traffic(store, FakeEngine(), Config()), Config(data_dir=tmp_path)
        say_figures = Sayer(store, Home(tmp_path), judge)
        for k in range(ROUNDS):
            for e in range(EPISODES):
                name = f"{k}-{e}"
                ids = (1, 2, 3) if e == 0 else (1, 2, 3, 10 + k, 100 + e)  # one prompt comes every time
                store.append(
                    step(name, name, prompt_ids=ids, completion_ids=(k, e)), feedback("outcome", name, value=1.0)
                )
            read.append(Counter())
            while loop.turn(flush=True):
                pass
            asyncio.run(traffic.refresh())
            say_figures()
            assert report.learning(store, config, recent=5)["reward"] is not None
            report.live_id(store, "agent")
            report.adapter(store, "agent", AdapterId("agent@1"))
        assert len(store.stages("agent")) > ROUNDS
    late, early = (sum(map(Counter.total, rounds)) for rounds in (read[-9:], read[21:30]))
    assert late <= 1.15 * early, (read[25], read[-5])
