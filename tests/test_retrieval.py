"""What memory puts into the prompt: earlier answers where they are near, and notes that are pinned."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradatim.config import MemoryConfig
from gradatim.errors import ConflictError, StoreError
from gradatim.memory.notes import MOST_CHARS, Notes, noted
from gradatim.memory.retrieval import choose, within
from gradatim.nn.base import Base
from gradatim.nn.render import Renderer
from gradatim.protocols import Shelf
from gradatim.types import EpisodeId, MemoryEntry, MemoryNote, StepId, Tombstone
from tests.test_memory_served import SETTLE_S, Product, product, settings, text

DAY_S = 86_400.0


def an_entry(step: str, tokens: tuple[int, ...], value: float, position: int, at: float = 0.0) -> MemoryEntry:
    return MemoryEntry(
        id=f"{step}{'+' if value > 0 else '-'}",
        tenant="",
        user="",
        episode_id=EpisodeId(f"of {step}"),
        step_id=StepId(step),
        created_at=at,
        tokens=tokens,
        value=value,
        position=position,
    )


# ------------------------------------------------------------------------------------------- what is chosen


def test_of_one_situation_the_newest_correction_wins_and_nothing_that_was_spoken_against_since() -> None:
    old, new = an_entry("a", (1,), 1.0, 1), an_entry("b", (2,), 1.0, 2)
    asked = {StepId(s): "where to?" for s in "abcd"}
    near = [(old, 0.99), (new, 0.98)]
    assert [f.entry for f in choose(near, asked, MemoryConfig(), 0.0)] == [new]
    against = an_entry("c", (2,), -1.0, 3)
    assert [f.entry for f in choose([*near, (against, 0.9)], asked, MemoryConfig(), 0.0)] == [old]
    assert choose([(against, 1.0)], asked, MemoryConfig(), 0.0) == []  # a bad answer is no demonstration
    asked[StepId("b")] = "and then?"
    assert {f.entry.id for f in choose(near, asked, MemoryConfig(), 0.0)} == {"a+", "b+"}
    assert choose(near, {}, MemoryConfig(), 0.0) == []  # whose text cannot be shown


def test_what_the_weights_know_is_not_shown_and_nothing_takes_its_place() -> None:
    config = MemoryConfig(half_life_s=DAY_S)
    asked = {StepId("a"): "where to?", StepId("b"): "where to?", StepId("c"): "and then?", StepId("d"): "why?"}
    old, new = an_entry("a", (1,), 1.0, 1), an_entry("b", (2,), 1.0, 2)
    nearer, farther = an_entry("c", (3,), 1.0, 3), an_entry("d", (4,), 1.0, 4)

    def shown(near: list[tuple[MemoryEntry, float]], known: list[tuple[MemoryEntry, float]], now: float = 0.0) -> Any:
        return [f.entry for f in choose(near, asked, config, now, known=known)]

    assert shown([(old, 0.9)], [(new, 0.9)]) == []  # the older answer was put right
    assert shown([(new, 0.9)], [(old, 0.9)]) == [new]  # the known one was
    assert shown([(nearer, 0.95), (farther, 0.8)], [(new, 0.9)]) == [nearer]
    assert shown([(farther, 0.8)], [(new, 0.9)], now=9 * DAY_S) == []  # what is known does not age
    wrong = an_entry("b", (5,), -1.0, 2)
    assert shown([(farther, 0.8)], [(wrong, 0.9)]) == [farther]  # of a known answer only the bad one before it is near


def test_near_worthy_and_young_ones_come_first() -> None:
    config = MemoryConfig(half_life_s=DAY_S)
    asked = {StepId(s): s for s in "abc"}
    now = 4 * DAY_S
    far, aged, doubted = an_entry("a", (1,), 1.0, 1, now), an_entry("b", (2,), 1.0, 2), an_entry("c", (3,), 0.5, 3, now)
    scores = {f.entry.id: f.score for f in choose([(far, 0.8), (aged, 1.0), (doubted, 1.0)], asked, config, now)}
    assert scores == pytest.approx({"a+": 2.718281828**-1.0, "b+": 2.0**-4, "c+": 0.5})
    assert list(scores) == ["c+", "a+", "b+"]


@given(st.lists(st.integers(1, 300), max_size=12), st.integers(1, 600), st.integers(1, 5))
def test_what_is_shown_fits_in_number_and_tokens(costs: list[int], budget: int, most: int) -> None:
    config = MemoryConfig(retrieved=most, retrieval_tokens=budget)
    asked = {StepId(str(i)): str(i) for i in range(len(costs))}
    near = [(an_entry(str(i), (i,), 1.0, i), 1.0 - i / 100) for i in range(len(costs))]
    found = choose(near, asked, config, 0.0)
    shown = within(found, config, lambda f: costs[int(f.asked)])
    assert len(shown) <= most
    assert sum(costs[int(f.asked)] for f in shown) <= budget
    if len(shown) < most:  # nothing that would have fitted was left out
        left = budget - sum(costs[int(f.asked)] for f in shown)
        assert all(costs[int(f.asked)] > left for f in found if f not in shown)


# ------------------------------------------------------------------------------------------------- notes


class ListShelf:
    """Notes in a list."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def load(self, kind: type[Any], **where: str) -> Sequence[Any]:
        return [k for k in self.kept if isinstance(k, kind)]

    def change(self, *, put: Sequence[Any] = (), drop: Sequence[Any] = (), cursors: Any = None) -> None:
        gone = {where["id"] for _, where in drop}
        self.kept = [*(k for k in self.kept if k.id not in gone), *put]


def test_notes_are_bounded_kept_and_go_with_their_tenant() -> None:
    shelf: Shelf = ListShelf()
    notes = Notes(shelf, by_user=True)
    first = notes.pin("alice", "  works in Berlin ", actor="person")
    assert first.text == "works in Berlin"
    notes.pin("bob", "x" * MOST_CHARS, actor="person")
    for wrong in ("", "   "):
        with pytest.raises(ConflictError, match="needs a text"):
            notes.pin("alice", wrong, actor="person")
    with pytest.raises(ConflictError, match="unpin one first"):
        notes.pin("bob", "y", actor="person")
    assert [n.id for n in Notes(shelf, by_user=True).of("alice")] == [first.id]
    assert {n.tenant for n in notes.show()} == {"alice", "bob"}

    def gone(scope: Any, value: str, by_user: bool = True) -> set[str]:
        tombstone = Tombstone(id="t", scope=scope, value=value, created_at=1.0, actor="person")
        return {n.tenant for n in Notes(shelf, by_user=by_user).covered(tombstone)}

    assert gone("tenant", "alice") == gone("user", "alice") == {"alice"}
    assert gone("user", "alice", by_user=False) == gone("episode", "alice") == set()
    assert gone("all", "") == {"alice", "bob"}
    assert notes.unpin(first.id).id == first.id
    with pytest.raises(StoreError, match="no note"):
        notes.unpin(first.id)
    assert notes.of("alice") == []


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_note_stands_at_the_end_of_the_system_part(role: str) -> None:
    note = MemoryNote(id="n", tenant="", text="be brief", created_at=0.0, actor="person")
    user = {"role": "user", "content": "hello"}
    assert noted([user], []) == (user,)
    assert noted([user], [note]) == ({"role": "system", "content": "be brief"}, user)
    told = noted([{"role": role, "content": "you are a clerk"}, user], [note, note])
    assert told[0] == {"role": role, "content": "you are a clerk\n\nbe brief\n\nbe brief"}
    parts = noted([{"role": role, "content": [{"type": "text", "text": "a"}]}], [note])[0]["content"]
    assert parts == [{"type": "text", "text": "a"}, {"type": "text", "text": "\n\nbe brief"}]


# ------------------------------------------------------------------------------------------- as it is served


async def keyed(served: Product, count: int) -> None:
    end = time.monotonic() + 20 * SETTLE_S
    while served.remembering.kept.stats()["keys"] < count and time.monotonic() < end:
        await asyncio.sleep(0.01)


async def test_a_correction_is_shown_in_the_prompt_and_the_record_keeps_the_prompt_without_it(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    config = settings(tiny_model_dir, tmp_path, retrieval=True, retrieval_cosine=0.99)
    renderer = Renderer(tiny_base)
    async with product(tiny_base, config) as served:
        frozen = await served.ask(user="alice", return_token_ids=True)
        await served.say(response_id=frozen["id"], kind="correction", correction="left", source="human:a")
        await keyed(served, 1)
        told = await served.ask(user="alice", return_token_ids=True)
        asked = {"role": "user", "content": "where to?"}
        shown = [asked, {"role": "assistant", "content": "left"}, asked]
        assert told["prompt_token_ids"] == list(renderer.prompt_ids(shown))
        assert told["gradatim"]["memory"]["retrieved"][0]["entry"] == f"{frozen['id']}+"
        step = served.store.step(id=told["id"])
        assert step is not None
        assert step.prompt_ids == renderer.prompt_ids([asked]) == tuple(frozen["prompt_token_ids"])
        assert step.memory["read_ids"] == told["prompt_token_ids"]
        assert list(step.messages) == [asked]
        story = (await served.http.get(f"/v1/explain/{told['id']}")).json()
        assert story["memory"]["of_it"]["retrieved"][0]["answer"] == "left"
        assert story["memory"]["of_it"]["retrieved"][0]["asked"] == "where to?"

        for other in (
            await served.ask(user="bob", return_token_ids=True),
            await served.ask(user="alice", model="agent@0", return_token_ids=True),
        ):
            assert other["prompt_token_ids"] == frozen["prompt_token_ids"]
            assert "memory" not in other["gradatim"]
        stream = await served.ask(user="alice", stream=True)
        assert '"retrieved":[' in stream.text.replace(" ", "")
        assert "gradatim_memory_shown 2.0" in (await served.http.get("/metrics")).text

        await served.http.post("/v1/memory/forget", json={"scope": "user", "value": "alice"})
        after = await served.ask(user="alice", return_token_ids=True)
        assert after["prompt_token_ids"] == frozen["prompt_token_ids"]


async def test_what_has_no_room_is_not_shown_and_a_failing_search_costs_nothing(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_model_dir, tmp_path, retrieval=True, retrieval_cosine=0.9, retrieval_tokens=10_000)
    async with product(tiny_base, config) as served:
        long = "where to? " * 20
        frozen = await served.ask(long, return_token_ids=True)
        await served.say(response_id=frozen["id"], kind="correction", correction="left")
        await keyed(served, 1)
        monkeypatch.setattr(served.engine, "_context_tokens", len(frozen["prompt_token_ids"]) + 10)
        alone = await served.ask(long, return_token_ids=True)
        assert alone["prompt_token_ids"] == frozen["prompt_token_ids"]
        assert "retrieved" not in alone["gradatim"].get("memory", {})

        def broken(*_: Any) -> Any:
            raise RuntimeError("a test")

        monkeypatch.setattr(served.remembering.kept, "holds", broken)
        assert text(await served.ask(long)) == text(frozen)
        assert "gradatim_memory_failed_total 1.0" in (await served.http.get("/metrics")).text


async def test_a_decision_memory_beside_it_is_placed_by_the_request_alone(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    config = settings(tiny_model_dir, tmp_path, retrieval=True, decisions=True, retrieval_cosine=0.99)
    async with product(tiny_base, config) as served:
        frozen = await served.ask()
        await served.say(response_id=frozen["id"], kind="correction", correction="left")
        told = await served.ask()
        assert text(told) == "left"
        step = served.store.step(id=told["id"])
        assert step is not None
        assert step.memory["nearest"] == pytest.approx(1.0, abs=1e-3)
        assert step.memory["for"] == [f"{frozen['id']}+"]


async def test_a_pinned_note_is_told_recorded_unpinned_and_forgotten(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    renderer = Renderer(tiny_base)
    asked = {"role": "user", "content": "where to?"}
    with_note = renderer.prompt_ids([{"role": "system", "content": "it is night"}, asked])
    async with product(tiny_base, settings(tiny_model_dir, tmp_path)) as served:  # every memory is off
        note = (await served.http.post("/v1/memory/notes", json={"tenant": "alice", "text": "it is night"})).json()
        told = await served.ask(user="alice", return_token_ids=True)
        assert told["prompt_token_ids"] == list(with_note)
        step = served.store.step(id=told["id"])
        assert step is not None and step.prompt_ids == with_note  # learned from with it
        assert renderer.prompt_ids(step.messages) == with_note
        for alone in (await served.ask(), await served.ask(user="alice", model="agent@0")):
            plain = served.store.step(id=alone["id"])
            assert plain is not None and plain.prompt_ids == renderer.prompt_ids([asked])
        listed = (await served.http.get("/v1/memory/notes?tenant=alice")).json()["data"]
        assert [row["id"] for row in listed] == [note["id"]]
        assert (await served.http.get("/v1/memory/notes?tenant=bob")).json()["data"] == []
        assert (await served.http.delete("/v1/memory/notes/none")).status_code == 404
        too_long = await served.http.post("/v1/memory/notes", json={"tenant": "alice", "text": "x" * MOST_CHARS})
        assert too_long.status_code == 409
        second = (await served.http.post("/v1/memory/notes", json={"tenant": "alice", "text": "and cold"})).json()
        assert (await served.http.delete(f"/v1/memory/notes/{second['id']}")).json()["text"] == "and cold"
        gone = await served.http.post("/v1/memory/forget", json={"scope": "user", "value": "alice"})
        assert gone.json()["notes"] == 1
        after = await served.ask(user="alice", return_token_ids=True)
        assert after["prompt_token_ids"] == list(renderer.prompt_ids([asked]))
    async with product(tiny_base, settings(tiny_model_dir, tmp_path)) as served:
        assert served.remembering.kept.notes.show() == []
