"""What the weights know by themselves is retired, and comes back with other weights."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gradatim.app.offline import consolidation
from gradatim.config import MemoryConfig
from gradatim.learner.replay import StoreReplay
from gradatim.memory import follow
from gradatim.memory.consolidate import Consolidation, supplied, undo
from gradatim.memory.contents import Whose
from gradatim.memory.decisions import DecisionMemory
from gradatim.memory.key_space import KeySpace, Turn, key_of
from gradatim.nn.base import Base
from gradatim.store import SqlShelf, SqlStore, open_store
from gradatim.testing.fakes import FakeStore
from gradatim.types import Adapter, AdapterId, CaseScore, EpisodeId, Example, MemoryEntry, MemoryUse, Stage, StepId
from tests import records
from tests.test_memory_served import SETTLE_S, product, settings, text
from tests.test_replay import learn, move

BASE = AdapterId("agent@0")
CONFIG = MemoryConfig(decisions=True)
ALONG = np.eye(8, dtype=np.float32)


class Knows:
    """A scorer: the weights of each adapter know what they are said to know, by the step it is asked at."""

    def __init__(self, **known: Sequence[str]) -> None:
        self.known, self.asked = known, 0

    def score(self, adapter: Adapter, examples: Sequence[Example]) -> Sequence[CaseScore]:
        self.asked += len(examples)
        mine = self.known.get(f"a{adapter.step}", ())
        return [
            CaseScore(logprob=math.log(0.9 if e.step_id in mine else 0.1), greedy=e.step_id in mine) for e in examples
        ]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(tmp_path / "store.db") as opened:
        opened.append(records.adapter(0), records.adapter(1, 0))
        opened.move(move("agent@0", Stage.LIVE, Stage.RETIRED), move("agent@1", Stage.CANDIDATE, Stage.LIVE))
        yield opened


def remember(
    memory: DecisionMemory,
    store: SqlStore,
    step: str,
    right: tuple[int, ...],
    at: int = 0,
    position: int = 1,
    worded: int | None = None,
) -> None:
    """A correction of a step, whose key lies along one axis; in other words, between that and another."""
    adapter = records.adapter(1, 0)
    if store.step(id=StepId(step)) is None:
        store.append(records.step(step, episode=step))
    blank = MemoryEntry(
        id=f"{step}+",
        tenant="",
        user="",
        episode_id=EpisodeId(step),
        step_id=StepId(step),
        created_at=1.0,
        tokens=right,
        value=1.0,
        position=position,
    )
    wrong = replace(blank, id=f"{step}-", tokens=(99,), value=-1.0)
    memory.write(blank.episode_id, [blank, wrong])
    memory.put_key(
        StepId(step),
        memory.expect(AdapterId("agent@1"), adapter.sha256).id,
        key_of(ALONG[at] + ALONG[at if worded is None else worded]),
    )


def opened(store: SqlStore) -> DecisionMemory:
    return DecisionMemory(SqlShelf(store.engines), CONFIG, KeySpace("b", "t", (1,), Turn()))


def near(memory: DecisionMemory, step: int, at: int = 0) -> set[str]:
    space = memory.expect(AdapterId(f"agent@{step}"), records.adapter(step, step - 1).sha256)
    own = memory.expect(AdapterId("agent@1"), records.adapter(1, 0).sha256)
    memory.bridge(space.id, own.id if space.id != own.id else None)
    return {e.id for e, _ in memory.near(Whose(""), space, key_of(ALONG[at]), 0.5).near}


def test_what_is_known_with_its_paraphrases_is_retired_under_these_weights_alone(store: SqlStore) -> None:
    memory, shelf = opened(store), SqlShelf(store.engines)
    remember(memory, store, "a", (1, 2))
    remember(memory, store, "b", (1, 2), worded=5)  # the same answer near there
    remember(memory, store, "c", (3,), at=1)
    scorer = Knows(a1=("a", "c"))
    told = Consolidation(store, shelf, scorer, CONFIG, "agent").run()
    looked = {row["id"]: row for row in told["entries"]}
    assert (told["looked_at"], told["retired"]) == (3, 1)
    assert looked["a+"]["paraphrases"] == 1 and not looked["a+"]["retired"]  # its paraphrase is not known
    assert looked["c+"]["retired"] and looked["c+"]["chance"] == pytest.approx(0.9)
    assert near(memory, 1, at=1) == {"c+", "c-"}  # the server has not looked yet
    memory.reread_retired()
    assert near(memory, 1, at=1) == set() and near(memory, 1) == {"a+", "a-", "b+", "b-"}
    assert near(memory, 2, at=1) == {"c+", "c-"}  # of other weights nobody knows that
    assert memory.stats()["retired"] == 2
    assert near(opened(store), 1, at=1) == set()  # after a restart
    assert memory.check()["ok"]

    remember(memory, store, "c", (4,), at=1, position=2)  # revised
    assert near(memory, 1, at=1) == {"c+", "c-"}
    assert Consolidation(store, shelf, scorer, CONFIG, "agent").run()["retired"] == 1
    memory.reread_retired()
    assert near(memory, 1, at=1) == set()
    assert undo(shelf, store, "agent") == {"adapter": "agent@1", "undone": 4}
    memory.reread_retired()
    assert near(memory, 1, at=1) == {"c+", "c-"}
    assert Consolidation(store, shelf, scorer, CONFIG, "agent").run()["retired"] == 0  # a person took it back
    memory.forget("episode", "c", actor="person")
    assert Consolidation(store, shelf, scorer, CONFIG, "agent").run()["looked_at"] == 2


def test_it_runs_once_after_each_promotion_and_a_rollback_finds_its_own_ledger(store: SqlStore) -> None:
    memory, scorer = opened(store), Knows(a1=("a",))
    remember(memory, store, "a", (1,))
    consolidation = Consolidation(store, SqlShelf(store.engines), scorer, CONFIG, "agent")
    consolidation.turn()
    consolidation.turn()
    assert scorer.asked == 1
    store.append(records.adapter(2, 1))
    store.move(move("agent@1", Stage.LIVE, Stage.RETIRED), move("agent@2", Stage.CANDIDATE, Stage.LIVE))
    consolidation.turn()
    assert scorer.asked == 2
    memory.reread_retired()
    assert near(memory, 2) == {"a+", "a-"}  # a later adapter no longer knows it
    assert near(memory, 1) == set()


def test_what_is_supplied_again_and_again_comes_first_and_is_rehearsed_first(store: SqlStore) -> None:
    memory, shelf = opened(store), SqlShelf(store.engines)
    for step in "abc":
        remember(memory, store, step, (1,))
    for step, answers in (("a", 3), ("b", 2), ("c", 1)):
        for i in range(answers):
            answer = StepId(f"{step}{i}")
            use = MemoryUse(answer_id=answer, entry_id=f"{step}+", value=1.0)
            memory.write(EpisodeId(answer), [], [use], [answer])
    assert supplied(shelf, records.adapter(1, 0).sha256) == ["a", "b"]
    Consolidation(store, shelf, Knows(a1="abc"), CONFIG, "agent").run()
    assert supplied(shelf, records.adapter(1, 0).sha256) == []
    assert supplied(shelf, "of others") == ["a", "b"]


def test_up_to_half_of_a_rehearsal_is_of_those_and_never_what_may_not_be_drawn() -> None:
    store = FakeStore()
    store.append(records.adapter(0))
    learn(store, 1, *(records.example(f"e{i}", step_id=StepId(f"s{i}")) for i in range(8)))
    learn(store, 2, records.example("x", step_id=StepId("rejected")), live=False)
    first = [StepId(s) for s in ("rejected", "unknown", "s5", "s6", "s7")]
    for seed in range(5):
        drawn = [e.id for e in StoreReplay(store, "agent", seed, first=lambda: first).draw(4)]
        assert drawn[:2] == ["e5", "e6"] and len(set(drawn)) == 4 and "x" not in drawn


async def test_what_is_retired_is_shown_no_more_at_its_place_and_keeps_others_out_of_the_prompt(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "LEDGER_S", 0.05)
    monkeypatch.setattr("gradatim.memory.consolidate.SURE", 0.0)
    config = settings(tiny_model_dir, tmp_path, retrieval=True, retrieval_cosine=-1.0)
    async with product(tiny_base, config) as served:
        own = await served.ask(return_token_ids=True)
        await served.say(response_id=own["id"], kind="score", value=1)
        other = await served.ask("and then?")
        await served.say(response_id=other["id"], kind="correction", correction="left")
        end = time.monotonic() + 20 * SETTLE_S
        while served.remembering.kept.stats()["keys"] < 2 and time.monotonic() < end:
            await asyncio.sleep(0.01)
        shown = await served.ask(return_token_ids=True)
        assert [e["entry"] for e in shown["gradatim"]["memory"]["retrieved"]] == [f"{own['id']}+", f"{other['id']}+"]
        assert (await asyncio.to_thread(consolidation, config))["retired"] == 1
        while not served.remembering.kept.stats()["retired"] and time.monotonic() < end:
            await asyncio.sleep(0.01)
        known = await served.ask(return_token_ids=True)
        assert known["prompt_token_ids"] == own["prompt_token_ids"] and text(known) == text(own)
        elsewhere = await served.ask("and then?")
        both = {f"{own['id']}+", f"{other['id']}+"}  # there nobody looked what the weights know
        assert {e["entry"] for e in elsewhere["gradatim"]["memory"]["retrieved"]} == both


async def test_by_hand_beside_a_server_that_follows(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen model's own answer, judged good, is nothing that memory has to supply."""
    monkeypatch.setattr(follow, "LEDGER_S", 0.05)
    monkeypatch.setattr("gradatim.memory.consolidate.SURE", 0.0)  # a random model is never sure
    config = settings(tiny_model_dir, tmp_path, decisions=True)
    async with product(tiny_base, config) as served:
        own = await served.ask()
        await served.say(response_id=own["id"], kind="score", value=1)
        other = await served.ask("and then?")
        await served.say(response_id=other["id"], kind="correction", correction="left")
        assert (await served.ask())["gradatim"]["memory"]["weight"] > 0
        told = await asyncio.to_thread(consolidation, config)
        assert {row["id"]: row["retired"] for row in told["entries"]} == {
            f"{own['id']}+": True,
            f"{other['id']}+": False,
        }
        end = time.monotonic() + 20 * SETTLE_S
        while not served.remembering.kept.stats()["retired"] and time.monotonic() < end:
            await asyncio.sleep(0.01)
        answer = await served.ask()
        assert text(answer) == text(own)
        step = served.store.step(id=answer["id"])
        assert step is not None and f"{own['id']}+" not in step.memory.get("for", ())
        assert text(await served.ask("and then?")) == "left"
        assert (await served.http.post("/v1/memory/compact", json={})).json() == {"spaces": 0, "keys": 0, "orphans": 0}
        assert (await asyncio.to_thread(consolidation, config, undo=True))["undone"] == 1


def test_what_is_retired_still_speaks_in_other_words_and_twins_are_no_paraphrases(store: SqlStore) -> None:
    """The weights were found to know it where it was said, and nobody looked elsewhere."""
    memory, shelf = opened(store), SqlShelf(store.engines)
    remember(memory, store, "a", (1, 2))
    remember(memory, store, "twin", (1, 2))  # asked again, word for word
    scorer = Knows(a1=("a",))
    told = Consolidation(store, shelf, scorer, CONFIG, "agent").run()
    assert {row["id"]: (row["paraphrases"], row["retired"]) for row in told["entries"]} == {
        "a+": (0, True),
        "twin+": (0, False),
    }
    memory.reread_retired()
    assert near(memory, 1) == {"twin+", "twin-"}
    space = memory.expect(AdapterId("agent@1"), records.adapter(1, 0).sha256)
    found = memory.near(Whose(""), space, key_of(ALONG[0] + ALONG[5]), 0.5)
    assert {e.id for e, _ in found.near} == {"a+", "a-", "twin+", "twin-"} and not found.known
