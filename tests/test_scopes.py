"""Memory counts only for the kind of task that it was made in, as the system part says it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradatim.config import MemoryConfig
from gradatim.memory.contents import Whose
from gradatim.memory.session_folder import About, _about
from gradatim.nn.base import Base
from gradatim.scopes import scope_of
from gradatim.store import SqlStore
from tests.test_attention_served import in_session
from tests.test_memory import bias, entry, learn, opened, store
from tests.test_memory_served import product, settings, text

__all__ = ["store"]  # a fixture
ROUTER, COOK = "You route tickets to teams.", "You are a cook."


def told(content: Any, role: str = "system") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}, {"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    "other",
    [
        told("You  route tickets\nto teams. "),
        told("YOU ROUTE TICKETS TO TEAMS."),
        told(ROUTER, role="developer"),
        told([{"type": "text", "text": ROUTER}]),
        [*told(ROUTER), {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "My parcel"}],
    ],
)
def test_what_says_the_same_is_the_same_kind_of_task(other: Any) -> None:
    assert scope_of(other) == scope_of(told(ROUTER)) != ""


def test_dates_and_numbers_do_not_tell_tasks_apart_and_words_do() -> None:
    day = "Today is {}. Answer questions."
    assert scope_of(told(day.format("Monday, 23 November 2026"))) == scope_of(
        told(day.format("Tuesday, 1 December 2026"))
    )
    assert len({scope_of(told(t)) for t in (ROUTER, COOK, day, "23", "")}) == 5
    assert scope_of(told("")) == scope_of([{"role": "user", "content": ROUTER}]) == scope_of([]) == ""
    assert scope_of(told(None)) == scope_of(told([{"type": "image_url"}])) == ""


def test_an_entry_counts_in_its_scope_alone_unless_all_are_one(store: SqlStore) -> None:
    made = entry("x", scope="a")
    memory = opened(store)
    learn(memory, made, 1)
    for now in (memory, opened(store)):
        assert [bool(bias(now, 1, scope=scope)) for scope in ("a", "b", "")] == [True, False, False]
        assert now.holds(Whose("", "a")) and not now.holds(Whose("", "b"))
    together = opened(store, MemoryConfig(decisions=True, scopes="one"))
    assert all(bias(together, 1, scope=scope) for scope in ("a", "b", ""))
    assert memory.stats()["scopes"] == 1
    memory.forget("entry", made.id, actor="test")
    assert not bias(memory, 1, scope="a") and not memory.holds(Whose("", "a"))


def test_a_session_file_of_before_scopes_can_be_read() -> None:
    about = About(tenant="t", id="trip", base_sha256="b", tokenizer_sha256="k", users={"u"}, used_at=2.0, scope="abc")
    assert _about(about.header()) == about
    older = {"about": about.header()["about"].replace(', "abc"]', "]")}
    assert _about(older) == replace(about, scope="")


@pytest.mark.parametrize("scopes", ["system", "one"])
async def test_a_correction_changes_nothing_under_other_instructions(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path, scopes: str
) -> None:
    config = settings(tiny_model_dir, tmp_path, decisions=True, scopes=scopes)
    async with product(tiny_base, config) as served:

        async def ask(system: str) -> Any:
            return await served.ask(messages=[*told(system)[:1], {"role": "user", "content": "where to?"}])

        other = text(await ask(COOK))
        first = await ask(ROUTER + " Today is Monday.")
        await served.say(response_id=first["id"], kind="correction", correction="left")
        assert text(await ask(ROUTER + " Today is Tuesday.")) == "left"
        now = await ask(COOK)
        assert ("memory" in now["gradatim"]) == (scopes == "one")
        assert scopes == "one" or text(now) == other != "left"
        kept = served.store.step(id=first["id"])
        assert kept is not None and kept.scope == scope_of(kept.messages)


async def test_pinned_notes_do_not_make_it_another_task(tiny_model_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    async with product(tiny_base, settings(tiny_model_dir, tmp_path, decisions=True)) as served:
        first = await served.ask()
        await served.say(response_id=first["id"], kind="correction", correction="left")
        body = {"tenant": "", "text": "Be brief."}
        assert (await served.http.post("/v1/memory/notes", json=body)).status_code < 300
        assert "memory" in (await served.ask())["gradatim"]


async def test_a_session_stays_the_kind_of_task_that_it_began_as(
    tiny_model_dir: Path, tiny_base: Base, tmp_path: Path
) -> None:
    config = settings(tiny_model_dir, tmp_path, decisions=True, attention=True)
    for messages in (told(ROUTER), told("")[1:]):  # the second time with what the first left on disk
        async with product(tiny_base, config) as served:
            answer = await served.ask(messages=messages, **in_session("s1"))
            step = served.store.step(id=answer["id"])
            assert step is not None and step.scope == scope_of(told(ROUTER))
