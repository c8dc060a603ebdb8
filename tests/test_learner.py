"""Updates of a tiny model: what they learn, refuse, keep and leave behind."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradatim.config import LearnerConfig
from gradatim.errors import AdapterError, DamagedAdapterError, LearnerError
from gradatim.learner import learner as learning
from gradatim.learner import objectives
from gradatim.learner.batch import Item, fit, steps
from gradatim.learner.budget import Budget
from gradatim.learner.learner import LoraLearner
from gradatim.learner.scorer import TorchScorer
from gradatim.nn.lora import STATE_DIGEST_FILE, STATE_FILE, TMP_PREFIX, WEIGHTS_FILE, read_adapter
from gradatim.nn.pack import Answer, Scored, packed_tokens
from gradatim.testing.learner import LEARNER_CHECKS, Check
from gradatim.types import Adapter, Example, Update
from tests import records
from tests.tiny import VOCABULARY, tiny_base

CONFIG = LearnerConfig(rank=4, alpha=8, lr=1e-2, epochs=6, batch=4, max_length=64)
PROMPT = (1, 2, 3, 4)


def base_adapter() -> Adapter:
    return records.adapter(0, base_sha256=tiny_base().sha256, sha256=tiny_base().sha256)


def factory(folder: Path) -> tuple[LoraLearner, TorchScorer, Adapter]:
    return learner(folder), TorchScorer(tiny_base(), CONFIG, folder), base_adapter()


def learner(folder: Path, **changes: Any) -> LoraLearner:
    return LoraLearner(tiny_base(), replace(CONFIG, **changes), folder, "agent")


def pair(number: int = 1, **given: Any) -> Example:
    filled: dict[str, Any] = {"chosen_ids": (10, 11), "rejected_ids": (12, 13, 14), "origin": "correction"}
    return records.example(f"pair-{number}", **({"prompt_ids": (*PROMPT, number)} | filled | given))


def imitate(number: int = 1, **given: Any) -> Example:
    return pair(number, **({"rejected_ids": ()} | given))


def applied(made: tuple[Update, Adapter | None]) -> tuple[Update, Adapter]:
    update, adapter = made
    assert adapter is not None, update.refused_because
    return update, adapter


@pytest.mark.parametrize("check", LEARNER_CHECKS, ids=lambda c: c.__name__)
def test_conformance(check: Check, tmp_path: Path) -> None:
    check(factory, tmp_path)


def test_a_pair_raises_the_chosen_answer_over_the_rejected_one(tmp_path: Path) -> None:
    update, _ = applied(learner(tmp_path, nll=1.0).update([pair(1), pair(2)], [], base_adapter(), 1))
    m = update.metrics
    assert m["chosen_logprob_after"] > m["chosen_logprob_before"] + 1.0
    assert (
        m["chosen_logprob_after"] - m["rejected_logprob_after"]
        > m["chosen_logprob_before"] - m["rejected_logprob_before"]
    )
    assert m["pair_accuracy_after"] == 1.0
    assert m["pairs"] == 2 and m["steps"] == 6 and update.kinds == {"correction": 2}
    assert m["packed_tokens"] < m["tokens"]


def test_an_answer_to_avoid_loses_little_more_than_the_floor(tmp_path: Path) -> None:
    bad = pair(chosen_ids=(), rejected_ids=(12, 13))
    update, _ = applied(learner(tmp_path, epochs=60, beta=0.5).update([bad], [], base_adapter(), 1))
    lost = 2 * (update.metrics["rejected_logprob_before"] - update.metrics["rejected_logprob_after"])
    assert 1.0 < lost < objectives.AVOID_FLOOR_NATS + 8.0  # momentum carries it on for some steps


def test_a_settled_pair_is_only_imitated(tmp_path: Path) -> None:
    preference = pair(origin="preference")
    teacher = learner(tmp_path, epochs=40, nll=1.0, beta=0.5)
    _, parent = applied(teacher.update([preference], [], base_adapter(), 1))
    update, _ = applied(teacher.update([preference], [], parent, 2))
    assert update.metrics["settled"] > 0 and "loss_dpo" not in update.metrics


def test_a_step_that_drifts_too_far_on_replayed_answers_is_taken_back(tmp_path: Path) -> None:
    replay = [imitate(9, chosen_ids=(20, 21), weight=1e-6)]
    new = [imitate(n, prompt_ids=(*PROMPT, 9), chosen_ids=(40, 41)) for n in range(1, 4)]
    free, _ = applied(learner(tmp_path / "free", kl_replay_limit=1e9, epochs=20).update(new, replay, base_adapter(), 1))
    held, _ = applied(learner(tmp_path / "held", kl_replay_limit=0.2, epochs=20).update(new, replay, base_adapter(), 1))
    assert held.metrics["backtracks"] > 0 and free.metrics["backtracks"] == 0
    assert 0 < held.metrics["steps"] < free.metrics["steps"] == 40
    assert free.metrics["kl_max"] > held.metrics["kl_max"] > 0.2
    assert held.replay_ids == ("pair-9",)


def test_bad_examples_are_dropped_and_the_rest_is_learned(tmp_path: Path) -> None:
    bad = [
        pair(2, chosen_ids=(VOCABULARY,)),
        pair(3, chosen_ids=(), rejected_ids=()),
        pair(4, chosen_ids=(1,) * 70),
        pair(5, retained=True),
    ]
    update, _ = applied(learner(tmp_path).update([pair(1), *bad], [], base_adapter(), 1))
    assert update.example_ids == ("pair-1",) and update.metrics["left_out"] == 4


def test_the_token_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    update, adapter = learner(tmp_path).update([pair(chosen_ids=(5, 123456))], [], base_adapter(), 1)
    assert adapter is None and "123456" in update.refused_because


def test_a_long_prompt_loses_its_left_end(tmp_path: Path) -> None:
    update, _ = applied(learner(tmp_path).update([pair(prompt_ids=(7,) * 500)], [], base_adapter(), 1))
    assert update.metrics["truncated"] == 1.0
    fitted = fit(pair(prompt_ids=tuple(range(90))), 64, VOCABULARY)
    assert isinstance(fitted, Item) and fitted.chosen is not None
    assert fitted.chosen.prompt_ids == tuple(range(29, 90)) and fitted.truncated


def test_what_is_not_finite_is_refused_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = learner(tmp_path, lr=float("inf"))
    update, adapter = subject.update([pair()], [], base_adapter(), 1)
    assert adapter is None and "not finite" in update.refused_because
    assert not (tmp_path / "adapters").exists()
    assert all(v == v for v in update.metrics.values())
    again, _ = applied(learner(tmp_path).update([pair()], [], base_adapter(), 1))
    assert again.applied  # the shared model was left clean


def test_a_batch_that_breaks_training_is_refused_and_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    made = learner(tmp_path)
    monkeypatch.setattr(made._trainable, "forward", out_of_memory)
    for budget in ("budget", "_score_budget"):
        monkeypatch.setattr(made._trainable, budget, Budget(512))
    update, adapter = made.update([pair()], [], base_adapter(), 1)
    assert adapter is None and not update.applied
    assert "can't allocate memory" in update.refused_because


def test_damaged_and_foreign_parents_break_the_update(tmp_path: Path) -> None:
    subject = learner(tmp_path)
    _, parent = applied(subject.update([pair()], [], base_adapter(), 1))
    with pytest.raises(LearnerError, match="another base"):
        subject.update([pair()], [], replace(parent, base_sha256="other"), 2)
    shutil.rmtree(tmp_path / parent.path)
    with pytest.raises(AdapterError, match="cannot read"):
        subject.update([pair()], [], parent, 2)


def test_the_optimisers_state_goes_on_and_a_damaged_one_starts_afresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subject = learner(tmp_path)
    _, parent = applied(subject.update([pair()], [], base_adapter(), 1))
    _, child = applied(subject.update([pair(2)], [], parent, 2))
    (tmp_path / parent.path / STATE_FILE).write_bytes(b"junk")
    caplog.clear()
    _, other = applied(subject.update([pair(2)], [], parent, 3))
    assert [r.levelno for r in caplog.records if "the optimiser starts afresh" in r.message] == [logging.ERROR]
    assert other.sha256 != child.sha256


def test_leftovers_of_a_killed_write_are_swept(tmp_path: Path) -> None:
    leftover = tmp_path / "adapters" / f"{TMP_PREFIX}agent@1-abc-99"
    leftover.mkdir(parents=True)
    learner(tmp_path)
    assert not leftover.exists()


def test_steps_visit_every_new_example_once_an_epoch_with_replay_mixed_in() -> None:
    def items(examples: list[Example]) -> list[Item]:
        return [i for e in examples if isinstance(i := fit(e, 64, VOCABULARY), Item)]

    new, replay = items([pair(n) for n in range(5)]), items([pair(n) for n in range(10, 13)])
    batches = list(steps(new, replay, replace(CONFIG, epochs=2, batch=4, replay_share=0.5), seed=0))
    visits = [i.example.id for b in batches for i in b if i in new]
    assert sorted(visits) == sorted(2 * [i.example.id for i in new])
    assert all(sum(i in replay for i in b) == 2 and len(b) <= 4 for b in batches)
    assert len(list(steps(new[:1], [], CONFIG, seed=0))) == CONFIG.epochs
    alone = list(steps(new[:4], [], replace(CONFIG, epochs=1, batch=4, replay_share=0.5), seed=0))
    assert [len(b) for b in alone] == [2, 2]  # as many steps as there would be with replay


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 4), st.floats(0.0, 0.9))
def test_as_many_old_examples_are_asked_for_as_all_steps_have_room_for(
    new: int, batch: int, epochs: int, share: float
) -> None:
    config = replace(CONFIG, epochs=epochs, batch=batch, replay_share=share)
    item = fit(pair(), 64, VOCABULARY)
    assert isinstance(item, Item)
    old = [replace(item, example=replace(item.example, id=f"old-{n}")) for n in range(config.replayed(new))]
    taught = [replace(item, example=replace(item.example, id=f"new-{n}")) for n in range(new)]
    visits = Counter(i.example.id for b in steps(taught, old, config, seed=0) for i in b)
    assert all(visits[i.example.id] == 1 for i in old)
    assert all(visits[i.example.id] == epochs for i in taught)


def test_scores_are_cached_by_weights_and_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, scorer, base = factory(tmp_path)
    first = scorer.score(base, [pair(1), pair(2), pair(1)])
    assert first[0] == first[2] and first[0].logprob < 0.0
    monkeypatch.setattr(scorer._trainable, "score", lambda _answers: pytest.fail("scored again"))
    assert scorer.score(base, [pair(2)]) == [first[1]]


def test_the_scorer_refuses_what_it_cannot_score(tmp_path: Path) -> None:
    _, scorer, base = factory(tmp_path)
    with pytest.raises(LearnerError, match="no chosen answer"):
        scorer.score(base, [pair(chosen_ids=())])
    with pytest.raises(AdapterError, match="another base"):
        scorer.score(replace(base, base_sha256="other"), [pair()])


def test_an_update_between_two_scores_does_not_leak_into_the_base(tmp_path: Path) -> None:
    subject, scorer, base = factory(tmp_path)
    before = scorer.score(base, [pair(1)])[0]
    subject.update([pair(1)], [], base, 1)
    assert TorchScorer(tiny_base(), CONFIG, tmp_path).score(base, [pair(1)])[0] == before
    assert torch.get_num_threads() == CONFIG.threads


def test_every_update_says_how_far_its_weights_moved_for_the_gate_to_judge(tmp_path: Path) -> None:
    update, adapter = applied(learner(tmp_path).update([pair()], [], base_adapter(), 1))
    weights = read_adapter(tmp_path / adapter.path, adapter.sha256)
    model = tiny_base().model
    slow = max(
        float((weights.scaling * b @ a).norm() / model.get_submodule(path).weight.norm())
        for path, (a, b) in weights.modules.items()
    )
    assert update.metrics["delta_norm"] == pytest.approx(slow, rel=1e-4)
    assert slow > 0.0


def test_what_the_parent_gives_already_is_rehearsed_and_not_taught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "KNOWN", 0.5)  # as far as the tiny model comes
    subject = learner(tmp_path, epochs=40, lr=2e-2)
    _, parent = applied(subject.update([imitate(1)], [], base_adapter(), 1))
    update, _ = applied(subject.update([imitate(1), pair(2)], [], parent, 2))
    assert update.metrics["known"] == 1.0
    assert set(update.example_ids) == {imitate(1).id, pair(2).id}
    refused, nothing = subject.update([imitate(1)], [], parent, 3)
    assert nothing is None and "gives all of these 1 answers already" in refused.refused_because


def told_apart(chosen: tuple[int, ...], rejected: tuple[int, ...], origin: str = "correction") -> slice:
    fitted = fit(pair(chosen_ids=chosen, rejected_ids=rejected, origin=origin), 64, VOCABULARY)
    assert isinstance(fitted, Item)
    return fitted.told_apart


def test_a_correction_is_spent_on_the_token_where_the_answer_went_wrong() -> None:
    assert told_apart((5, 6, 7, 2), (5, 9, 7, 2)) == slice(1, 2)
    assert told_apart((5, 6, 7, 2), (9, 6, 7, 2), "preference") == slice(None)
    assert told_apart((5, 6), (5, 6, 7)) == slice(None)  # one begins the other: nothing says where


def test_what_is_right_after_a_wrong_decision_is_not_unlearned(tmp_path: Path) -> None:
    """Chosen "5 6 7", rejected "5 8 9 10": given the wrong 8, the 9 and 10 after it are nobody's fault."""
    subject = learner(tmp_path)
    wrong = pair(chosen_ids=(5, 6, 7), rejected_ids=(5, 8, 9, 10))
    _, after = applied(subject.update([wrong], [], base_adapter(), 1))
    _, other = applied(subject.update([replace(wrong, rejected_ids=(5, 8, 11, 12))], [], base_adapter(), 2))
    assert after.sha256 == other.sha256


# ------------------------------------------------------------------------------------------------ what is damaged


def test_a_parent_whose_weights_are_damaged_is_named(tmp_path: Path) -> None:
    subject, scorer, _ = factory(tmp_path)
    _, parent = applied(subject.update([pair()], [], base_adapter(), 1))
    weights = tmp_path / parent.path / WEIGHTS_FILE
    whole = weights.read_bytes()
    for damage in (lambda: weights.write_bytes(whole[:-9]), weights.unlink):
        damage()
        for call in (
            lambda: subject.update([pair(2)], [], parent, 2),
            lambda: factory(tmp_path)[1].score(parent, [pair()]),
            lambda: factory(tmp_path)[1].score(parent, []),  # nothing to score: its files are looked at all the same
        ):
            with pytest.raises(DamagedAdapterError) as damaged:
                call()
            assert damaged.value.adapter_id == parent.id == "agent@1"
    weights.write_bytes(whole)
    scorer.score(parent, [])
    (tmp_path / "adapters").rename(tmp_path / "elsewhere")  # as where the disk is not mounted: it may come back
    with pytest.raises(AdapterError) as away:
        subject.update([pair(2)], [], parent, 2)
    assert not isinstance(away.value, DamagedAdapterError)


def test_a_parent_whose_optimiser_state_was_tidied_away_is_trained_from_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subject = learner(tmp_path)
    _, parent = applied(subject.update([pair()], [], base_adapter(), 1))
    _, child = applied(subject.update([pair(2)], [], parent, 2))
    assert "afresh" not in caplog.text
    for name in (STATE_FILE, STATE_DIGEST_FILE):
        (tmp_path / parent.path / name).unlink()
    update, other = applied(subject.update([pair(2)], [], parent, 3))
    assert update.applied and other.sha256 != child.sha256
    assert "the optimiser starts afresh: there is no state of it beside agent@1" in caplog.text


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"weight": float("nan")}, "its weight is nan"),
        ({"weight": float("inf")}, "its weight is inf"),
        ({"weight": -1.0}, "its weight is -1.0"),
        ({"chosen_ids": (5, VOCABULARY)}, f"token id {VOCABULARY} is outside"),
        ({"rejected_ids": (-1,)}, "token id -1 is outside"),
        ({"prompt_ids": (2**31 - 1,)}, "is outside the vocabulary"),
    ],
)
def test_a_broken_example_is_refused_by_its_id_and_the_update_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: dict[str, Any], why: str
) -> None:
    bad = replace(pair(9), id="the-bad-one", **broken)
    for new, old in (([pair(1), bad], []), ([pair(1)], [pair(2), bad])):
        caplog.clear()
        update, _ = applied(learner(tmp_path, epochs=1).update(new, old, base_adapter(), 1 + len(old)))
        assert bad.id not in (*update.example_ids, *update.replay_ids) and update.metrics["left_out"] == 1.0
        (line,) = (r.getMessage() for r in caplog.records if "is left out" in r.getMessage())
        assert line.startswith("example the-bad-one is left out") and why in line


def _running_out(
    make: Callable[[Sequence[Answer]], list[Scored]], calls: list[int], limit: int, error: Exception
) -> Any:
    """A pass that runs out of memory above that many tokens."""

    def forward(answers: Sequence[Answer]) -> list[Scored]:
        calls.append(packed_tokens(answers))
        if calls[-1] > limit:
            raise error
        return make(answers)

    return forward


_NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
]


@pytest.mark.parametrize("error", _NO_MEMORY)
def test_when_memory_runs_out_the_step_is_made_again_in_smaller_passes(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [pair(n, prompt_ids=tuple(range(n, n + 40))) for n in range(1, 9)]
    expected, plenty = applied(learner(tmp_path / "a", batch=8).update(examples, (), base_adapter(), 1))
    other = learner(tmp_path / "b", batch=8)
    calls: list[int] = []
    trained = other._trainable
    monkeypatch.setattr(trained, "forward", _running_out(trained.forward, calls, 150, error))
    monkeypatch.setattr(trained, "budget", Budget(512))
    monkeypatch.setattr(trained, "_score_budget", Budget(512))
    update, scarce = applied(other.update(examples, (), base_adapter(), 1))
    assert max(calls) > 150 >= calls[-1]
    assert trained.budget.tokens == 128
    for name in ("loss_dpo", "loss_nll", "steps", "tokens", "pairs"):
        assert update.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4), name
    found, wanted = (read_adapter(f / a.path) for f, a in ((tmp_path / "b", scarce), (tmp_path / "a", plenty)))
    for path, (_a, b) in wanted.modules.items():
        assert (found.modules[path][1] - b).norm() <= 0.02 * b.norm()  # Adam's first steps enlarge what rounding leaves


def test_other_errors_and_batches_that_never_fit_are_not_tried_again() -> None:
    calls: list[int] = []

    def broken(tokens: int) -> None:
        calls.append(tokens)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        Budget(512).fit(broken)
    assert calls == [512]

    def never(tokens: int) -> None:
        calls.append(tokens)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Budget(512).fit(never)
    assert calls == [512, 512, 256, 128, 64]


def test_the_record_says_what_was_trained_how_and_at_what_cost(tmp_path: Path) -> None:
    subject = learner(tmp_path, epochs=20)
    _, parent = applied(subject.update([imitate(9, chosen_ids=(20, 21))], [], base_adapter(), 1))
    replay = [imitate(9, chosen_ids=(20, 21))]
    update, _ = applied(subject.update([pair(1), pair(2), imitate(3)], replay, parent, 2))
    metrics = update.metrics
    assert (metrics["examples_dpo"], metrics["examples_sft"]) == (2, 1)
    assert (metrics["replayed"], metrics["replay_share"]) == (
        1,
        0.4,
    )  # 2 of 5 in each epoch: of its 2 steps one has 1 new
    assert 0.5 < metrics["replay_chance_before"] < 1.0 and 0.0 < metrics["replay_chance_after"] < 1.0
    assert 10**7 < metrics["peak_memory_bytes"] < 10**11
