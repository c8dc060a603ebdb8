"""Sessions where they are kept: whose they are, how many, and what becomes of their files. The tensors are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from gradatim.config import MemoryConfig
from gradatim.errors import SessionError, StoreError, UnknownSessionError
from gradatim.memory import sessions as module
from gradatim.memory.session_file import write_session
from gradatim.memory.session_folder import SessionFolder
from gradatim.memory.sessions import SessionStore
from gradatim.nn.session import LayerRows, Rows, Session
from gradatim.types import EpisodeId

EPISODE = EpisodeId("ep")
SIZE = 2 * 2 * 4 * 3 * 4  # bytes: keys and values, heads, tokens, width, fp32


def some(seed: int = 0, tokens: int = 4) -> Session:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, tokens, 3, generator=generator) for _ in range(2))
    return Session([LayerRows(Rows(keys), Rows(values))], tokens, tokens, ids=tuple(range(tokens + 1)))


@pytest.fixture
def clock() -> Callable[[], float]:
    ticks: Iterator[int] = count(1)
    return lambda: float(next(ticks))


def store(folder: Path, clock: Callable[[], float], tokenizer: str = "t", **config: object) -> SessionStore:
    settings = MemoryConfig(**config)  # type: ignore[arg-type]
    return SessionStore(
        SessionFolder(folder), settings, base_sha256="b", tokenizer_sha256=tokenizer, space="s", clock=clock
    )


def fill(kept: SessionStore, user: str, name: str, weights: str = "w", seed: int = 0) -> None:
    reading = kept.open(user, name, weights, episode_id=EPISODE)
    reading.keep(some(seed))
    reading.close()


def known(kept: SessionStore, user: str, name: str, weights: str = "w") -> Session | None:
    reading = kept.open(user, name, weights, episode_id=EPISODE)
    reading.close()
    return reading.before


def test_the_least_recently_used_goes_first_of_each_tenant_and_of_all(
    tmp_path: Path, clock: Callable[[], float]
) -> None:
    kept = store(tmp_path, clock, attention_sessions=2, attention_bytes=5 * SIZE)
    for name in ("a", "b", "a", "c"):
        fill(kept, "alice", name)
    assert known(kept, "alice", "b") is None and known(kept, "alice", "a") and known(kept, "alice", "c")
    for user in ("bob", "carol"):
        fill(kept, user, "a")
        fill(kept, user, "b")
    assert kept.stats()["session_bytes"] == 5 * SIZE and kept.stats()["session_evicted"] == 2
    assert known(kept, "alice", "a") is None and known(kept, "alice", "c")


def test_one_that_a_request_has_does_not_go(tmp_path: Path, clock: Callable[[], float]) -> None:
    kept = store(tmp_path, clock, attention_sessions=1)
    fill(kept, "alice", "a")
    held = kept.open("alice", "a", "w", episode_id=EPISODE)
    fill(kept, "alice", "b")
    with pytest.raises(SessionError, match="another request"):
        kept.open("alice", "a", "w", episode_id=EPISODE)
    held.keep(some(3))
    held.close()
    held.close()
    assert known(kept, "alice", "a") and kept.stats()["sessions"] == 1


def test_files_go_with_their_sessions_and_come_back_with_them(tmp_path: Path, clock: Callable[[], float]) -> None:
    kept = store(tmp_path, clock, attention_sessions=2)
    for seed, name in enumerate("ab"):
        fill(kept, "alice", name, seed=seed)
    kept.write()
    again = store(tmp_path, clock, attention_sessions=2)
    before = known(again, "alice", "b")
    assert before is not None and before.ids == (0, 1, 2, 3, 4)
    assert torch.equal(before.layers[0].keys.all, some(1).layers[0].keys.all)
    fill(again, "alice", "c")
    again.write()
    assert len(list(tmp_path.glob("*/*"))) == 2 and known(again, "alice", "a") is None
    # other weights: its tokens alone
    anew = known(store(tmp_path, clock), "alice", "b", weights="promoted")
    assert anew is not None and not anew.position and anew.ids == before.ids


@pytest.mark.parametrize(
    ("scope", "value", "left"),
    [
        ("all", "", set()),
        ("tenant", "alice", {"bob"}),
        ("user", "bob", {"alice"}),
        ("session", "a", set()),
        ("episode", "ep", set()),
        ("source", "alice", {"alice", "bob"}),
        ("entry", "a", {"alice", "bob"}),
    ],
)
def test_forgetting_takes_what_it_says_from_memory_and_disk(
    tmp_path: Path, clock: Callable[[], float], scope: str, value: str, left: set[str]
) -> None:
    kept = store(tmp_path, clock)
    for user in ("alice", "bob"):
        fill(kept, user, "a")
    kept.write()
    assert kept.forget(scope, value) == 2 - len(left)
    for of in (kept, store(tmp_path, clock)):
        assert {user for user in ("alice", "bob") if known(of, user, "a")} == left
    assert len(list(tmp_path.glob("*/*"))) == len(left)


def test_in_a_shared_memory_whoever_wrote_in_it_takes_it_along(tmp_path: Path, clock: Callable[[], float]) -> None:
    kept = store(tmp_path, clock, tenants="one")
    fill(kept, "alice", "a")
    fill(kept, "bob", "a")
    fill(kept, "bob", "b")
    kept.write()
    assert store(tmp_path, clock, tenants="one").forget("user", "alice") == 1
    assert len(list(tmp_path.glob("*/*"))) == 1


def test_what_is_forgotten_while_it_is_written_leaves_no_file(
    tmp_path: Path, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store(tmp_path, clock)
    fill(kept, "alice", "a")

    def slowly(*args: object) -> None:
        write_session(*args)  # type: ignore[arg-type]
        with kept._lock:
            kept._held.clear()  # what ``forget`` does before it waits for the writer

    monkeypatch.setattr(module, "write_session", slowly)
    kept.write()
    assert not list(tmp_path.glob("*/*"))


def test_files_that_cannot_be_used_are_left_aside(
    tmp_path: Path, clock: Callable[[], float], caplog: pytest.LogCaptureFixture
) -> None:
    kept = store(tmp_path, clock)
    for name in "ab":
        fill(kept, "alice", name)
    kept.write()
    assert store(tmp_path, clock, tokenizer="another").stats()["sessions"] == 0
    assert "made with another tokenizer: t, and the one that is served is another" in caplog.text
    files = sorted(tmp_path.glob("*/*"))
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-5] + bytes(5))  # its header is sound
    files[1].write_bytes(files[1].read_bytes()[:20])
    again = store(tmp_path, clock)
    assert again.stats()["sessions"] == 1
    with pytest.raises(UnknownSessionError):
        for name in "ab":
            again.open("alice", name, "w", episode_id=EPISODE, must_exist=True)
    assert known(again, "alice", "a") is None and known(again, "alice", "b") is None
    assert again.forget("all", "") == 1 or not list(tmp_path.glob("*/*"))


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path, clock: Callable[[], float]) -> None:
    kept = store(tmp_path, clock)
    fill(kept, "alice", "a")
    kept.write()
    (whole,) = tmp_path.glob("*/*")
    whole.with_name(f".{whole.name}-1").write_bytes(b"half")
    assert store(tmp_path, clock).stats()["sessions"] == 1
    assert list(tmp_path.glob("*/*")) == [whole]


def test_a_disk_that_refuses_costs_the_file_and_nothing_else(
    tmp_path: Path, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store(tmp_path, clock)
    fill(kept, "alice", "a")

    def full(*_: object) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_session", full)
        kept.write()
    assert kept.stats()["session_unwritten"] == 1 and known(kept, "alice", "a")
    kept.write()
    assert known(store(tmp_path, clock), "alice", "a")


def test_what_ends_after_its_time_is_not_kept(tmp_path: Path, clock: Callable[[], float]) -> None:
    kept = store(tmp_path, clock)
    late = kept.open("alice", "a", "w", episode_id=EPISODE)
    late.close()
    late.keep(some())
    assert known(kept, "alice", "a") is None and kept.stats()["sessions"] == 0
    gone = kept.open("alice", "a", "w", episode_id=EPISODE)
    assert kept.forget("tenant", "alice") == 1 and gone.forgotten
    gone.keep(some())
    gone.close()
    assert kept.stats()["sessions"] == 0


def test_forks_of_rows_do_not_see_what_the_other_appends() -> None:
    rows = Rows(torch.zeros(1, 2, 1))
    rows.append(torch.ones(1, 2, 1))
    frozen = rows.fork()
    rows.append(torch.full((1, 300, 1), 2.0))
    rows.drop(1)
    assert frozen.all.flatten().tolist() == [0, 0, 1, 1] and len(rows) == 303
