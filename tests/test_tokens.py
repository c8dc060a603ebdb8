"""Token memory in one process: what goes into it, what is dropped, and what lies on disk."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from gradatim.config import MemoryConfig
from gradatim.errors import StoreError
from gradatim.memory.decisions import DecisionMemory
from gradatim.memory.key_space import KeySpace, Turn
from gradatim.memory.knn_gate import near_gate
from gradatim.memory.knn_lm import KnnLm
from gradatim.memory.public_space import public_space
from gradatim.memory.recall import Recall
from gradatim.memory.shipped import FILE, shipped, write_shipped
from gradatim.memory.tell import Teller
from gradatim.memory.token_folders import TokenFolders
from gradatim.memory.token_store import TokenStore
from gradatim.memory.tokens import TokenMemory
from gradatim.nn.base import Base
from gradatim.nn.states import tap
from gradatim.protocols import Recollection, Store
from gradatim.store import SqlShelf, open_store
from gradatim.testing.records import a_step
from gradatim.types import AdapterId, EpisodeId, MemoryEntry, Step, StepId
from tests.token_memory import VOCABULARY, WIDTH, drawn, open_gate, space

BASE = AdapterId("agent@0")
SHA = space().base_sha256
CONFIG = MemoryConfig(tokens=True)


def entry(name: str, tokens: Sequence[int] = (5, 6, 7), value: float = 1.0, **fields: Any) -> MemoryEntry:
    given_: dict[str, Any] = {
        "id": f"{name}{'+' if value > 0 else '-'}",
        "tenant": "",
        "user": "",
        "episode_id": EpisodeId(f"ep-{name}"),
        "step_id": StepId(name),
        "created_at": float(name[1:]),
        "tokens": tuple(tokens),
        "value": value,
        "sources": ("human",),
    }
    return MemoryEntry(**{**given_, **fields})


def states_of(name: str, count: int) -> Tensor:
    return drawn(32, WIDTH, seed=int(name[1:]))[:count]


class Memories:
    """A decision memory with a token memory, and what fills it."""

    def __init__(self, folder: Path, **fields: Any) -> None:
        self.folders = TokenFolders(folder / "tokens")
        self.tokens = TokenMemory(
            space(),
            KnnLm(open_gate(4.0).lambdas, k=4),
            vocabulary=VOCABULARY,
            folders=self.folders,
            **{"max_tokens": 99, **fields},
        )
        self._held = open_store(folder / "store.db")
        self.store = self._held.__enter__()
        self.memory = DecisionMemory(
            SqlShelf(self.store.engines),
            CONFIG,
            KeySpace(SHA, "t" * 64, (1,), Turn()),
            tokens=self.tokens,
            folders=self.folders,
        )
        self.space = self.memory.expect(BASE, SHA)
        self.read: list[str] = []  # what was read anew

    def close(self) -> None:
        self._held.__exit__(None, None, None)

    def write(self, *entries: MemoryEntry) -> None:
        for one in entries:
            self.memory.write(one.episode_id, [one])

    async def tell(self) -> None:
        """Until nothing is lacking."""

        async def states(ids: Sequence[int], start: int, adapter_id: AdapterId) -> Tensor:
            name = f"s{ids[0]}"
            self.read.append(name)
            return states_of(name, len(ids) - start)

        class Steps:
            def step(self, *, id: StepId | None = None, chain_key: str | None = None) -> Step | None:
                return replace(a_step(str(id)), prompt_ids=(int(str(id)[1:]),))

        teller = Teller(self.memory, self.tokens, cast(Store, Steps()), states)
        while await teller.turn():
            pass

    def holds(self) -> set[str]:
        return {entry_id for held in self.tokens._held.values() for entry_id in held.store.sources}

    def says(self, name: str, at: int, user: str = "") -> Tensor:
        """The log-probabilities (V,) where that answer's token ``at`` is predicted; those of a flat model if closed."""
        recall: Recollection = self.memory.recollect(user, BASE, SHA)
        found = self.tokens.mix([recall], states_of(name, at + 1)[-1:], torch.zeros(1, VOCABULARY))
        logits = torch.zeros(VOCABULARY)
        for blend in found.values():
            logits[torch.from_numpy(blend.tokens)] += torch.from_numpy(blend.nats)
        return logits.log_softmax(-1)


@pytest.fixture
def memories(tmp_path: Path) -> Any:
    made = Memories(tmp_path)
    yield made
    made.close()


def flat() -> Tensor:
    return torch.zeros(VOCABULARY).log_softmax(-1)


async def test_good_answers_alone_go_in_and_each_for_its_tenant(memories: Memories) -> None:
    memories.write(entry("s1", (5, 6), user="a", tenant="a"), entry("s2", (7, 8), value=-1.0, user="a", tenant="a"))
    await memories.tell()
    assert memories.read == ["s1"]
    assert int(memories.says("s1", 0, "a").argmax()) == 5 and int(memories.says("s1", 1, "a").argmax()) == 6
    assert torch.equal(memories.says("s1", 0, "b"), flat())
    assert torch.equal(memories.says("s1", 0), flat())
    await memories.tell()
    assert memories.read == ["s1"]  # once
    stats = memories.memory.stats()
    assert stats["tokens"] == 2 and stats["retrieved"] == 0.5 and 0.2 < stats["lambda"] <= 0.25


@pytest.mark.parametrize("scope", ["user", "tenant", "episode", "source", "entry", "all"])
async def test_what_is_forgotten_is_gone_when_the_call_returns_from_disk_too(memories: Memories, scope: str) -> None:
    memories.write(entry("s1", user="a", tenant="a"), entry("s2", (9,), user="b", tenant="b", sources=("critic",)))
    await memories.tell()
    memories.tokens.write()
    mine = memories.folders.path("a", space().id)
    assert (mine / "tokens.safetensors").exists()
    value = {"user": "a", "tenant": "a", "episode": "ep-s1", "source": "human", "entry": "s1+", "all": ""}[scope]
    memories.memory.forget(scope, value, actor="test")
    assert torch.equal(memories.says("s1", 0, "a"), flat())
    assert not mine.exists()
    assert torch.equal(memories.says("s2", 0, "b"), flat()) == (scope == "all")
    await memories.tell()
    assert memories.memory.stats()["tokens"] == (0 if scope == "all" else 1)


def test_a_memory_that_is_off_forgets_what_it_left_on_disk(memories: Memories) -> None:
    asyncio.run(_filled(memories))
    off = DecisionMemory(
        SqlShelf(memories.store.engines),
        MemoryConfig(),
        KeySpace("", "", (), Turn()),
        folders=memories.folders,
        looked_at=True,
    )
    off.forget("user", "", actor="test")
    assert not memories.folders.path("", space().id).exists()


async def _filled(memories: Memories) -> None:
    memories.write(entry("s1"), entry("s2", (9,)))
    await memories.tell()
    memories.tokens.write()


def test_what_a_killed_process_had_forgotten_and_not_removed_is_gone_at_the_next_start(
    memories: Memories, tmp_path: Path
) -> None:
    asyncio.run(_filled(memories))
    path = memories.folders.path("", space().id)
    half = path / ".tokens.safetensors-1"
    half.write_bytes(b"half")
    memories.close()
    again = Memories(tmp_path)
    assert path.exists() and not half.exists()
    again.memory._all.tokens = None  # killed when the store had it
    again.memory.forget("entry", "s1+", actor="test")
    again.close()
    assert path.exists()
    memories.__init__(tmp_path)  # type: ignore[misc]  # it is closed by its fixture
    assert not path.exists()


async def test_after_a_restart_it_is_taken_from_disk_and_what_changed_is_read_anew(
    memories: Memories, tmp_path: Path
) -> None:
    await _filled(memories)
    before = memories.says("s1", 2)
    memories.close()
    again = Memories(tmp_path)
    await again.tell()
    assert again.read == []
    assert torch.equal(again.says("s1", 2), before)
    again.memory._all.tokens = None  # as if the file were older than what is remembered
    again.write(entry("s1", (8, 8, 8)))
    again.close()
    third = Memories(tmp_path)
    await third.tell()
    assert third.read == ["s1"]
    assert int(third.says("s1", 2).argmax()) == 8 and int(third.says("s2", 0).argmax()) == 9
    third.close()
    memories._held = open_store(tmp_path / "other.db")
    memories._held.__enter__()


@pytest.mark.parametrize("damage", ["cut", "absent", "foreign"])
async def test_what_is_damaged_or_foreign_is_made_anew(memories: Memories, tmp_path: Path, damage: str) -> None:
    await _filled(memories)
    path = memories.folders.path("", space().id) / "tokens.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "absent":
        path.unlink()
    else:
        TokenStore(space(base="b" * 64), VOCABULARY).save(path.parent)
    again = Memories(tmp_path / "again")
    again.folders = again.tokens._folders = memories.folders
    again.write(entry("s1"), entry("s2", (9,)))
    await again.tell()
    assert sorted(again.read) == ["s1", "s2"]
    assert int(again.says("s1", 0).argmax()) == 5
    again.close()


async def test_a_full_disk_is_counted_and_memory_goes_on(memories: Memories, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise StoreError("disk is full")

    monkeypatch.setattr(TokenStore, "save", full)
    await _filled(memories)
    assert memories.memory.stats()["unwritten"] == 1
    assert int(memories.says("s1", 0).argmax()) == 5


async def test_the_oldest_answers_leave_a_full_store(tmp_path: Path) -> None:
    memories = Memories(tmp_path, max_tokens=6)
    memories.write(entry("s1"), entry("s2"))
    await memories.tell()
    memories.write(entry("s3"))
    await memories.tell()
    assert memories.memory.stats()["tokens"] == 6
    assert memories.holds() == {"s2+", "s3+"}
    memories.memory.forget("entry", "s3+", actor="test")
    await memories.tell()
    assert memories.holds() == {"s1+", "s2+"}  # there is room again
    memories.close()


async def test_after_a_promotion_answers_are_read_anew_and_unused_spaces_are_left(memories: Memories) -> None:
    memories.write(entry("s1"))
    await memories.tell()
    for n in range(1, 5):
        memories.memory.expect(AdapterId(f"agent@{n}"), f"sha{n}")
        await memories.tell()
    assert memories.read == ["s1"] * 5
    assert memories.memory.stats()["tokens"] == 4 * 3  # the base's space has left
    memories.folders.path("", space().id).mkdir(parents=True)
    memories.tokens.write()
    assert len(list(memories.folders.path("", "").iterdir())) == 4
    assert {held.store.space.adapter_sha256 for held in memories.tokens._held.values()} == {
        f"sha{n}" for n in range(1, 5)
    }


async def test_states_that_are_no_numbers_are_refused_and_what_was_withdrawn_meanwhile_stays_out(
    memories: Memories,
) -> None:
    memories.write(entry("s1"))
    (lacking,) = memories.memory.untold(9, frozenset())
    memories.memory.forget("entry", "s1+", actor="test")
    memories.memory.tell(*lacking, states_of("s1", 3))
    assert memories.memory.stats()["tokens"] == 0

    async def broken(ids: Sequence[int], start: int, adapter_id: AdapterId) -> Tensor:
        return torch.full((len(ids) - start, WIDTH), torch.nan)

    class Steps:
        def step(self, *, id: StepId | None = None, chain_key: str | None = None) -> Step | None:
            return a_step(str(id))

    memories.write(entry("s2"))
    teller = Teller(memories.memory, memories.tokens, cast(Store, Steps()), broken)
    assert await teller.turn() and not await teller.turn()
    assert memories.memory.stats()["unreadable"] == 1 and memories.memory.stats()["tokens"] == 0


@given(
    st.lists(st.tuples(st.sampled_from(["add", "revise", "bad", "forget", "compact"]), st.integers(1, 6)), max_size=14)
)
@hypothesis_settings(max_examples=25, deadline=None)
def test_in_any_order_it_is_as_if_only_what_is_left_had_ever_been_said(ops: list[tuple[str, int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        lived, fresh = Memories(Path(folder) / "a"), Memories(Path(folder) / "b")
        left: dict[str, MemoryEntry] = {}
        for op, n in ops:
            name = f"s{n}"
            if op == "compact":
                for held in lived.tokens._held.values():
                    lived.tokens._compact(held)
                continue
            if op == "forget":
                lived.memory.write(EpisodeId(f"ep-{name}"), [])
                left.pop(name, None)
            else:
                tokens = (n, n + 1) if op == "add" else (n + 9, n + 10, n + 11)
                said = entry(name, tokens, value=-1.0 if op == "bad" else 1.0)
                lived.write(said)
                left = {k: v for k, v in left.items() if k != name} | ({name: said} if op != "bad" else {})
            asyncio.run(lived.tell())
        fresh.write(*left.values())
        asyncio.run(fresh.tell())
        assert lived.memory.check()["ok"]
        assert (
            lived.memory.stats()["tokens"]
            == fresh.memory.stats()["tokens"]
            == sum(len(e.tokens) for e in left.values())
        )
        for n in range(1, 7):
            torch.testing.assert_close(lived.says(f"s{n}", 1), fresh.says(f"s{n}", 1), rtol=1e-5, atol=1e-5)
        lived.close()
        fresh.close()


def test_the_gate_without_training_is_shut_at_the_distances_of_unlike_text() -> None:
    features = np.zeros((4, 10), np.float32)
    features[:, 0] = np.log([1e-4, 0.05, 0.6, 2.0])
    features[:, 3] = 1.0
    lambdas = near_gate(features).tolist()
    assert lambdas[0] > 0.9 and 0.5 < lambdas[1] < 0.6 and lambdas[2] < 0.005 > lambdas[3]
    features[:, 3] = 0.1  # they do not agree
    assert near_gate(features).max() < 0.1


def test_a_recollection_of_another_kind_is_left_alone(memories: Memories) -> None:
    assert memories.tokens.mix([cast(Recall, object())], torch.zeros(1, WIDTH), torch.zeros(1, VOCABULARY)) == {}


def test_the_gate_that_is_shipped_is_for_its_model_and_layer_alone(tmp_path: Path) -> None:
    path, own, gate = tmp_path / "gate", space(), open_gate(1.0)
    write_shipped(path, (own.base_sha256, "f" * 64), own, gate)
    (layer,) = own.layers
    found = shipped(own.base_sha256, own.tokenizer_sha256, layer, path)
    assert found is not None and found[0].id == own.id
    features = drawn(5, 10, seed=1)
    assert torch.equal(found[1](features), gate(features))
    assert shipped("f" * 64, "t", layer, path) is not None
    assert shipped("e" * 64, "t", layer, path) is None
    assert shipped(own.base_sha256, "t", layer + 1, path) is None


def test_the_gate_in_the_package_can_be_read_and_no_other_model_has_it() -> None:
    with safe_open(FILE, framework="pt") as file:
        header = file.metadata()
    for sha256 in json.loads(header["bases"]):
        found = shipped(sha256, "t", 28)
        assert found is not None and found[0].pooling.width == 576
    assert shipped("e" * 64, "t", 28) is None


def test_the_space_of_another_model_is_made_of_public_text_and_kept(tiny_base: Base, tmp_path: Path) -> None:
    made = public_space(tiny_base, 2, tmp_path)
    assert made.pooling.width == 64 and (made.pooling.scale > 0).all()
    layer = tiny_base.model.base_model.layers[-1]
    hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
    assert not [hook for hook in hooks if hook.__module__ == tap.__module__]
    (path,) = tmp_path.iterdir()
    assert public_space(tiny_base, 2, tmp_path).id == made.id
    path.write_bytes(path.read_bytes()[:-9])
    assert public_space(tiny_base, 2, tmp_path).id == made.id
    assert public_space(tiny_base, 1, tmp_path).id != made.id
