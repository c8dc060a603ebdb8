"""The conformance suite of ``protocols.Store``: whatever passes it can stand under the server and the loop.

    from gradatim.testing.store import check_store

    def test_my_store(tmp_path):
        check_store(lambda name: MyStore(tmp_path / name))

The factory opens the store called ``name`` as a context manager: empty the first time, and with all that was
acknowledged whenever it is opened again. To see each check on its own, parametrise a test with ``STORE_CHECKS``.
What needs a crash or a full disk is not checked here, nor how fast anything is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from gradatim.errors import ConflictError, StoreError, TransitionError
from gradatim.protocols import Store
from gradatim.testing.records import a_feedback, a_move, a_step, a_verdict, an_adapter, one_of_each
from gradatim.types import (
    ON_THE_WAY,
    RECORDS,
    Adapter,
    AdapterId,
    Decision,
    EpisodeId,
    Feedback,
    Move,
    Record,
    Stage,
    Step,
    StepId,
    Verdict,
)

OpenStore = Callable[[str], AbstractContextManager[Store]]
Check = Callable[[OpenStore], None]

_WRITERS = 8
_WRITES = 25  # of each writer
_WAIT_S = 60.0


def check_store(open_store: OpenStore) -> None:
    """Run every check. AssertionError, or whatever the store raised, with the check's name as a note."""
    for check in STORE_CHECKS:
        try:
            check(open_store)
        except BaseException as e:
            e.add_note(f"in {check.__name__} of gradatim.testing.store")
            raise


@contextmanager
def _refused(error: type[Exception], *, by: str) -> Iterator[None]:
    try:
        yield
    except error:
        return
    raise AssertionError(f"{by} was not refused with {error.__name__}")


def _log(store: Store) -> list[tuple[int, Record]]:
    """All records of all kinds, in the order of the log."""
    log: list[tuple[int, Record]] = []
    for kind in RECORDS:
        log += store.read(kind, limit=1_000_000)
    return sorted(log, key=lambda entry: entry[0])


def _promote(store: Store, step: int, name: str = "agent") -> None:
    """Register ``name@step`` and make it live in place of the one before."""
    store.append(an_adapter(step, name))
    store.move(
        a_move(f"{name}@{step}", Stage.CANDIDATE, Stage.LIVE),
        a_move(f"{name}@{step - 1}", Stage.LIVE, Stage.RETIRED),
    )


# -------------------------------------------------------------------------------------------------- checks


def check_every_kind_of_record_comes_back_equal(open_store: OpenStore) -> None:
    records = one_of_each()
    with open_store("round-trip") as store:
        for record in records:
            store.append(record)
        move = a_move("agent@1", Stage.CANDIDATE, Stage.SHADOW)
        store.move(move)
        kept = [record for _, record in _log(store)]
        for record in (*records, move):
            assert record in kept, f"{type(record).__name__} did not come back as it was written"
            assert type(kept[kept.index(record)]) is type(record)
        assert {type(record) for record in kept} == set(RECORDS)
        registrations = [m for m in kept if isinstance(m, Move) and m.before is None]
        assert [(m.adapter_id, m.after) for m in registrations] == [
            ("agent@0", Stage.LIVE),
            ("agent@1", Stage.CANDIDATE),
        ]
        verdict = next(record for record in kept if isinstance(record, Verdict))
        assert isinstance(verdict.decision, Decision)


def check_reading_by_position_limit_and_column(open_store: OpenStore) -> None:
    with open_store("read") as store:
        for i in range(10):
            store.append(a_step(f"s{i}", f"e{i % 2}", chain_key="same" if i in (3, 7) else ""))
        everything = store.read(Step)
        assert [step.id for _, step in everything] == [f"s{i}" for i in range(10)]
        fifth = everything[4][0]
        assert [step.id for _, step in store.read(Step, after=fifth, limit=2)] == ["s5", "s6"]
        assert [step.id for _, step in store.read(Step, episode_id="e1")] == ["s1", "s3", "s5", "s7", "s9"]
        assert [step.id for _, step in store.read(Step, after=fifth, episode_id="e1", limit=1)] == ["s5"]
        assert [step.id for _, step in store.read(Step, id="s8")] == ["s8"]
        assert list(store.read(Step, id="\0")) == []
        assert list(store.read(Step, limit=0)) == []
        with _refused(StoreError, by="a column that does not exist"):
            store.read(Step, no_such_column="x")
        episode = store.episode(EpisodeId("e0"))
        assert episode is not None
        assert [step.id for step in episode.steps] == ["s0", "s2", "s4", "s6", "s8"]
        assert store.episode(EpisodeId("unknown")) is None
        by_id, by_chain = store.step(id=StepId("s3")), store.step(chain_key="same")
        assert by_id is not None and by_id.id == "s3"
        assert by_chain is not None and by_chain.id == "s7", "the newest step of a chain key was not found"
        assert store.step(id=StepId("unknown")) is None
        assert store.step(chain_key="") is None, "an empty chain key is no chain key"


def check_the_newest_come_first(open_store: OpenStore) -> None:
    with open_store("newest") as store:
        assert list(store.newest(Step)) == []
        for i in range(10):
            store.append(a_step(f"s{i}", f"e{i % 2}"), a_feedback(f"f{i}"))
        backwards = list(store.read(Step))[::-1]
        assert list(store.newest(Step)) == backwards[:1]
        assert list(store.newest(Step, limit=100)) == backwards
        assert list(store.newest(Step, before=backwards[3][0], limit=4)) == backwards[4:8]
        assert list(store.newest(Step, before=1)) == []
        assert [step.id for _, step in store.newest(Step, episode_id="e0", limit=2)] == ["s8", "s6"]
        assert list(store.newest(Step, episode_id="\0")) == []
        assert list(store.newest(Step, limit=0)) == []
        with _refused(StoreError, by="a column that does not exist"):
            store.newest(Step, no_such_column="x")


def check_a_submit_is_all_or_nothing(open_store: OpenStore) -> None:
    with open_store("atomic") as store:
        store.append(a_feedback("taken"))
        before = _log(store)
        with _refused(ConflictError, by="an id that stands for another target"):
            store.append(a_step("s"), a_feedback("new"), a_feedback("taken", "another episode"), cursors={"c": 1})
        assert _log(store) == before, "a refused submit left records behind"
        assert store.cursor("c") == 0, "a refused submit moved a cursor"
        last = store.append(a_step("s"), a_feedback("new"), cursors={"c": 1, "d": 2})
        assert [position for position, _ in _log(store)][-1] == last
        assert (store.cursor("c"), store.cursor("d"), store.cursor("never set")) == (1, 2, 0)
        store.append(cursors={"c": last})
        assert store.cursor("c") == last


def check_one_refused_submit_fails_no_other(open_store: OpenStore) -> None:
    with open_store("neighbours") as store:
        store.append(a_feedback("taken"))
        futures = [
            store.submit(
                a_feedback("taken", "another") if i % 3 == 0 else a_feedback(f"f{i}"), cursors={f"c{i}": i + 1}
            )
            for i in range(30)
        ]
        for i, future in enumerate(futures):
            error = future.exception(timeout=_WAIT_S)
            assert isinstance(error, ConflictError) if i % 3 == 0 else error is None
            assert store.cursor(f"c{i}") == (0 if i % 3 == 0 else i + 1)
        assert len(store.read(Feedback)) == 21


def check_feedback_is_idempotent_revised_and_retracted(open_store: OpenStore) -> None:
    with open_store("feedback") as store:
        store.append(a_step("s"), a_step("t"))
        first = store.append(a_feedback("f", value=1.0, created_at=10.0))
        again = store.append(a_feedback("f", value=1.0, created_at=11.0))
        assert again == first, "the same feedback, sent twice, did not resolve to the first position"
        assert len(store.read(Feedback)) == 1
        revised = store.append(a_feedback("f", value=-1.0, created_at=12.0))
        assert revised > first
        (case,) = store.cases()
        assert (case.position, case.touched_at) == (revised, 12.0)
        assert [f.value for f in case.feedback] == [-1.0]
        assert [step.id for step in case.episode.steps] == ["s", "t"]
        back = store.append(
            a_feedback("f", value=1.0, created_at=13.0)
        )  # equals an older revision: still a change of mind
        assert back > revised
        retracted = store.append(a_feedback("f", value=1.0, retracted=True, created_at=14.0))
        (case,) = store.cases(after=back)
        assert (case.position, case.feedback) == (retracted, ()), "an episode without opinions left must still be seen"
        assert list(store.cases(after=retracted)) == []
        renewed = store.append(a_feedback("f", value=1.0, created_at=15.0))
        assert [(c.position, len(c.feedback)) for c in store.cases()] == [(renewed, 1)]


def check_feedback_for_another_target_conflicts(open_store: OpenStore) -> None:
    with open_store("conflict") as store:
        store.append(a_feedback("f", step_id=StepId("s")))
        for other in (
            a_feedback("f"),
            a_feedback("f", step_id=StepId("t")),
            a_feedback("f", "elsewhere", step_id=StepId("s")),
            a_feedback("f", step_id=StepId("s"), rejected_id=StepId("t")),
        ):
            with _refused(ConflictError, by="feedback for another target"):
                store.append(other)
        assert len(store.read(Feedback)) == 1
        # within one submit as well
        with _refused(ConflictError, by="two targets under one id in one submit"):
            store.append(a_feedback("g"), a_feedback("g", "elsewhere"))
        assert len(store.read(Feedback)) == 1


def check_a_used_id_keeps_its_contents(open_store: OpenStore) -> None:
    with open_store("immutable") as store:
        store.append(a_step("s"), an_adapter(0))
        with _refused(ConflictError, by="another step under a used id"):
            store.append(a_step("s", text="something else"))
        with _refused(ConflictError, by="another adapter under a used id"):
            store.append(an_adapter(0, sha256="ff" * 32))
        assert [step.text for _, step in store.read(Step)] == ["hello"]
        assert [adapter.sha256 for _, adapter in store.read(Adapter)] == ["00" * 32]


def check_cases_come_in_the_order_of_their_newest_feedback(open_store: OpenStore) -> None:
    with open_store("cases") as store:
        for i in range(6):
            store.append(a_step(f"s{i}", f"e{i}"))
        for i in range(5):  # e5 has no feedback
            store.append(a_feedback(f"f{i}", f"e{i}"))
        store.append(a_feedback("late", "e1", source="critic:tests"))  # e1 goes to the end
        seen: list[str] = []
        after = 0
        while batch := store.cases(after=after, limit=2):
            assert len(batch) <= 2
            assert all(case.position > after for case in batch)
            seen += [case.episode.id for case in batch]
            after = batch[-1].position
        assert seen == ["e0", "e2", "e3", "e4", "e1"]
        (last,) = store.cases(after=after - 1)
        assert [f.id for f in last.feedback] == ["f1", "late"], "a case must bring all the feedback of its episode"


def check_positions_rise_and_cursors_never_skip(open_store: OpenStore) -> None:
    """Eight writers at once, and readers that follow with a cursor: they see every record, once, in order."""
    with open_store("concurrent") as store:
        done = threading.Event()

        def write(writer: int) -> list[int]:
            positions = []
            for i in range(_WRITES):
                kind = a_feedback if i % 2 else a_step
                positions.append(store.append(kind(f"{writer}-{i}", f"e{writer}")))
            return positions

        def follow(kind: type[Record]) -> list[tuple[int, Record]]:
            seen: list[tuple[int, Record]] = []
            while True:
                last_look = done.is_set()
                new = store.read(kind, after=seen[-1][0] if seen else 0, limit=7)
                seen += new
                if last_look and not new:
                    return seen

        with ThreadPoolExecutor(_WRITERS + 2) as pool:
            readers = [pool.submit(follow, kind) for kind in (Step, Feedback)]
            try:
                written = [future.result(_WAIT_S) for future in [pool.submit(write, w) for w in range(_WRITERS)]]
            finally:
                done.set()
            seen = [entry for reader in readers for entry in reader.result(_WAIT_S)]
        for positions in written:
            assert positions == sorted(set(positions)), "a writer's positions must rise"
        acknowledged = sorted(position for positions in written for position in positions)
        assert len(set(acknowledged)) == _WRITERS * _WRITES, "a position was given twice"
        assert sorted(position for position, _ in seen) == acknowledged, "a reader with a cursor skipped a record"
        assert sorted(_log(store), key=lambda entry: entry[0]) == sorted(seen, key=lambda entry: entry[0])


def check_registering_an_adapter_gives_it_a_stage(open_store: OpenStore) -> None:
    with open_store("register") as store:
        store.append(an_adapter(0))
        store.append(an_adapter(1))
        assert store.stages("agent") == {"agent@0": Stage.LIVE, "agent@1": Stage.CANDIDATE}
        assert store.stages("nobody") == {}
        before = _log(store)
        with _refused(TransitionError, by="a second adapter on its way"):
            store.append(an_adapter(2))
        with _refused(StoreError, by="an adapter without its parent"):
            store.append(an_adapter(7, "orphan"))
        assert _log(store) == before
        assert "agent@2" not in store.stages("agent")
        store.append(an_adapter(0, "other"), an_adapter(1, "other"))  # names do not get in each other's way
        assert store.stages("other") == {"other@0": Stage.LIVE, "other@1": Stage.CANDIDATE}


def check_stages_move_with_what_justified_it(open_store: OpenStore) -> None:
    with open_store("move") as store:
        store.append(an_adapter(0), an_adapter(1))
        store.move(
            a_move("agent@1", Stage.CANDIDATE, Stage.LIVE),  # who comes may stand before who leaves
            a_move("agent@0", Stage.LIVE, Stage.RETIRED),
            verdicts=[a_verdict("agent@1")],
            cursors={"loop": 4},
        )
        assert store.stages("agent") == {"agent@0": Stage.RETIRED, "agent@1": Stage.LIVE}
        assert store.cursor("loop") == 4
        assert [v for _, v in store.read(Verdict, adapter_id="agent@1")] == [a_verdict("agent@1")]
        assert [m.after for _, m in store.read(Move, adapter_id="agent@1")] == [Stage.CANDIDATE, Stage.LIVE]
        store.append(an_adapter(2))
        store.move(a_move("agent@2", Stage.CANDIDATE, Stage.REJECTED))
        store.append(an_adapter(3, parent_id=AdapterId("agent@1")))  # the way is free again
        store.move(  # a rollback
            a_move("agent@1", Stage.LIVE, Stage.ROLLED_BACK),
            a_move("agent@0", Stage.RETIRED, Stage.LIVE),
        )
        assert store.stages("agent") == {
            "agent@0": Stage.LIVE,
            "agent@1": Stage.ROLLED_BACK,
            "agent@2": Stage.REJECTED,
            "agent@3": Stage.CANDIDATE,
        }
        assert store.stages("agent", Stage.LIVE) == {"agent@0": Stage.LIVE}
        assert store.stages("agent", *ON_THE_WAY, Stage.REJECTED) == {
            "agent@2": Stage.REJECTED,
            "agent@3": Stage.CANDIDATE,
        }
        assert store.stages("agent", Stage.SHADOW) == {}


def check_illegal_transitions_write_nothing(open_store: OpenStore) -> None:
    live, candidate, retired, rejected = Stage.LIVE, Stage.CANDIDATE, Stage.RETIRED, Stage.REJECTED
    retire = a_move("agent@1", live, retired)
    refused: Mapping[str, Sequence[Move]] = {
        "a transition that the table lacks": [a_move("agent@1", live, candidate)],
        "a way out of rejected": [a_move("agent@2", rejected, live), retire],
        "an outdated before": [a_move("agent@3", Stage.SHADOW, Stage.CANARY)],
        "a second live adapter": [a_move("agent@3", candidate, live)],
        "nobody live": [retire],
        "nobody live, one of two": [retire, a_move("agent@3", candidate, Stage.SHADOW)],
        "an unknown adapter": [a_move("agent@9", candidate, Stage.SHADOW)],
        "registration by move": [a_move("agent@3", None, candidate)],
        "one wrong of three": [retire, a_move("agent@3", candidate, live), a_move("agent@0", live, retired)],
    }
    with open_store("illegal") as store:
        store.append(an_adapter(0))
        _promote(store, 1)
        store.append(an_adapter(2))
        store.move(a_move("agent@2", candidate, rejected))
        store.append(an_adapter(3, parent_id=AdapterId("agent@1")))
        log, stages = _log(store), dict(store.stages("agent"))
        for name, moves in refused.items():
            with _refused(TransitionError, by=name):
                store.move(*moves, verdicts=[a_verdict("agent@3")], cursors={"loop": 1})
            assert dict(store.stages("agent")) == stages, name
            assert _log(store) == log, f"{name}: something was written"
            assert store.cursor("loop") == 0, name
        with _refused(StoreError, by="a Move that moves nothing"):
            store.append(a_move("agent@3", candidate, Stage.SHADOW))
        assert _log(store) == log


def check_exactly_one_is_live_whoever_promotes(open_store: OpenStore) -> None:
    """Many try to promote at once while others look: one wins, and nobody ever sees none or two live."""
    with open_store("race") as store:
        store.append(an_adapter(0), an_adapter(1))
        done = threading.Event()
        seen: list[int] = []

        def watch() -> None:
            while not done.is_set():
                seen.append(list(store.stages("agent").values()).count(Stage.LIVE))

        def promote(_: int) -> bool:
            try:
                store.move(a_move("agent@1", Stage.CANDIDATE, Stage.LIVE), a_move("agent@0", Stage.LIVE, Stage.RETIRED))
            except TransitionError:
                return False
            return True

        with ThreadPoolExecutor(_WRITERS + 1) as pool:
            watcher = pool.submit(watch)
            try:
                won = list(pool.map(promote, range(_WRITERS)))
            finally:
                done.set()
            watcher.result(_WAIT_S)
        assert won.count(True) == 1
        assert set(seen) <= {1}, "there was a moment without exactly one live adapter"
        assert store.stages("agent") == {"agent@0": Stage.RETIRED, "agent@1": Stage.LIVE}


def check_reopening_shows_everything(open_store: OpenStore) -> None:
    with open_store("reopen") as store:
        store.append(*one_of_each(), cursors={"loop": 3})
        store.move(a_move("agent@1", Stage.CANDIDATE, Stage.SHADOW))
        futures = [store.submit(a_feedback(f"f{i}")) for i in range(20)]  # closing must not drop what waits
        log = _log(store) if all(f.exception(_WAIT_S) is None for f in futures) else []
        cases, stages = list(store.cases()), dict(store.stages("agent"))
    with open_store("reopen") as store:
        assert _log(store) == log
        assert list(store.cases()) == cases
        assert dict(store.stages("agent")) == stages
        assert store.cursor("loop") == 3
        assert store.append(a_feedback("after")) == log[-1][0] + 1, "positions must go on where they were"


def check_two_openings_see_each_other(open_store: OpenStore) -> None:
    """The server and the loop are two processes on one store."""
    with open_store("shared") as server, open_store("shared") as loop:
        with ThreadPoolExecutor(2) as pool:
            ours = pool.submit(lambda: [server.append(a_feedback(f"a{i}")) for i in range(_WRITES)])
            theirs = pool.submit(lambda: [loop.append(a_feedback(f"b{i}")) for i in range(_WRITES)])
            positions = ours.result(_WAIT_S) + theirs.result(_WAIT_S)
        assert sorted(positions) == list(range(1, 2 * _WRITES + 1))
        assert _log(server) == _log(loop)
        server.append(an_adapter(0), an_adapter(1))
        loop.move(a_move("agent@1", Stage.CANDIDATE, Stage.LIVE), a_move("agent@0", Stage.LIVE, Stage.RETIRED))
        assert server.stages("agent")[AdapterId("agent@1")] is Stage.LIVE
        with _refused(ConflictError, by="an id that the other process used for another target"):
            server.append(replace(a_feedback("b0"), episode_id=EpisodeId("elsewhere")))


STORE_CHECKS: Sequence[Check] = (
    check_every_kind_of_record_comes_back_equal,
    check_reading_by_position_limit_and_column,
    check_the_newest_come_first,
    check_a_submit_is_all_or_nothing,
    check_one_refused_submit_fails_no_other,
    check_feedback_is_idempotent_revised_and_retracted,
    check_feedback_for_another_target_conflicts,
    check_a_used_id_keeps_its_contents,
    check_cases_come_in_the_order_of_their_newest_feedback,
    check_positions_rise_and_cursors_never_skip,
    check_registering_an_adapter_gives_it_a_stage,
    check_stages_move_with_what_justified_it,
    check_illegal_transitions_write_nothing,
    check_exactly_one_is_live_whoever_promotes,
    check_reopening_shows_everything,
    check_two_openings_see_each_other,
)
