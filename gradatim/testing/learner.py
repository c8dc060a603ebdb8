"""The conformance suite of ``protocols.Learner`` and ``protocols.Scorer``: whatever passes it can stand in the loop.

    from gradatim.testing.learner import check_learner

    def test_my_learner():
        check_learner(lambda data_dir: (MyLearner(data_dir), MyScorer(data_dir), base_adapter))

The factory is called again on the same folder to play a restart. Token ids in use are below 32. Whether anything
useful is learned is not checked here, beyond that trained answers become likelier.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from gradatim.protocols import Learner, Scorer
from gradatim.types import Adapter, EpisodeId, Example, StepId

Factory = Callable[[Path], tuple[Learner, Scorer, Adapter]]
Check = Callable[[Factory, Path], None]


def check_learner(factory: Factory) -> None:
    """Run every check in a fresh folder. AssertionError, or what the learner raised, with the check's name."""
    for check in LEARNER_CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(factory, Path(folder))
            except BaseException as e:
                e.add_note(f"in {check.__name__} of gradatim.testing.learner")
                raise


def _examples(first: int = 1) -> Sequence[Example]:
    """A pair, an answer to imitate and one to avoid."""
    pair = Example(
        id=f"pair-{first}",
        created_at=1.0,
        episode_id=EpisodeId("episode"),
        step_id=StepId(f"pair-{first}"),
        prompt_ids=(1, 2, 3, 4, first),
        chosen_ids=(5, 6, 7),
        rejected_ids=(5, 8),
        origin="correction",
    )
    imitate = replace(pair, id=f"imitate-{first}", step_id=StepId(f"imitate-{first}"), rejected_ids=())
    avoid = replace(pair, id=f"avoid-{first}", step_id=StepId(f"avoid-{first}"), chosen_ids=())
    return [pair, imitate, avoid]


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def _made(learner: Learner, examples: Sequence[Example], parent: Adapter, step: int) -> Adapter:
    update, adapter = learner.update(examples, [], parent, step)
    assert update.applied and adapter is not None, update.refused_because
    assert update.adapter_id == adapter.id and adapter.update_id == update.id
    assert adapter.parent_id == update.parent_id == parent.id and adapter.step == step
    assert adapter.base_sha256 == parent.base_sha256 and adapter.sha256 != parent.sha256
    return adapter


def check_an_update_makes_its_answers_likelier(factory: Factory, folder: Path) -> None:
    learner, scorer, base = factory(folder)
    examples = _examples()
    adapter = _made(learner, examples, base, 1)
    assert not Path(adapter.path).is_absolute() and (folder / adapter.path).is_dir()
    before, after = scorer.score(base, examples[:2]), scorer.score(adapter, examples[:2])
    assert all(a.logprob > b.logprob for a, b in zip(after, before, strict=True))


def check_a_refused_update_leaves_nothing(factory: Factory, folder: Path) -> None:
    learner, _, base = factory(folder)
    before = _files(folder)
    blank = replace(_examples()[0], chosen_ids=(), rejected_ids=())
    for bad in ([], [blank], [replace(blank, chosen_ids=(2**30,))], [replace(_examples()[1], retained=True)]):
        update, adapter = learner.update(bad, [], base, 1)
        assert adapter is None and not update.applied and update.adapter_id is None
        assert update.refused_because
    assert _files(folder) == before


def check_equal_input_gives_equal_weights(factory: Factory, folder: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        (folder / name).mkdir()
        learner, _, base = factory(folder / name)
        first = _made(learner, _examples(), base, 1)
        digests.add((first.sha256, _made(learner, _examples(2), first, 2).sha256))
    assert len(digests) == 1


def check_children_of_one_parent_are_independent(factory: Factory, folder: Path) -> None:
    learner, scorer, base = factory(folder)
    parent = _made(learner, _examples(), base, 1)
    known = scorer.score(parent, _examples()[:2])
    first = _made(learner, _examples(2), parent, 2)
    _made(learner, _examples(3), parent, 3)
    again, _, _ = factory(folder)
    assert _made(again, _examples(2), parent, 2).sha256 == first.sha256
    assert scorer.score(parent, _examples()[:2]) == known


def check_a_restart_finds_the_same_adapter(factory: Factory, folder: Path) -> None:
    learner, scorer, base = factory(folder)
    adapter = _made(learner, _examples(), base, 1)
    _, again, _ = factory(folder)
    assert again.score(adapter, _examples()[:2]) == scorer.score(adapter, _examples()[:2])


def check_half_a_step_is_another_child_of_the_same_parent(factory: Factory, folder: Path) -> None:
    learner, scorer, base = factory(folder)
    parent = _made(learner, _examples(), base, 1)
    update, whole = learner.update(_examples(2), _examples(), parent, 2)
    assert whole is not None
    record, half = learner.shrink(update, whole, parent, 3)
    assert record.applied and record.adapter_id == half.id and half.update_id == record.id != update.id
    assert half.parent_id == parent.id and half.step == 3 and half.sha256 not in (whole.sha256, parent.sha256)
    assert record.scale == 0.5 and record.example_ids == update.example_ids
    before, between, after = (scorer.score(a, _examples(2)[:2]) for a in (parent, half, whole))
    assert all(b.logprob < m.logprob < a.logprob for b, m, a in zip(before, between, after, strict=True))
    again, _ = learner.shrink(record, half, parent, 4)
    assert again.scale == 0.25


LEARNER_CHECKS: Sequence[Check] = (
    check_half_a_step_is_another_child_of_the_same_parent,
    check_an_update_makes_its_answers_likelier,
    check_a_refused_update_leaves_nothing,
    check_equal_input_gives_equal_weights,
    check_children_of_one_parent_are_independent,
    check_a_restart_finds_the_same_adapter,
)
