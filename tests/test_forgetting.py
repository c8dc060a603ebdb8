"""EWC and A-GEM inside updates of a tiny model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gradatim.learner.batch import fit
from gradatim.learner.forgetting import EXAMPLES, Elastic, contexts, without_conflict
from gradatim.learner.learner import LoraLearner
from gradatim.learner.run import Run
from gradatim.learner.scorer import TorchScorer
from gradatim.nn.fisher import Fisher, norm, penalty
from gradatim.nn.lora import FISHER_FILE, Lora, fresh_weights, read_adapter, read_fisher, write_adapter
from gradatim.types import Adapter, Example
from tests.test_learner import CONFIG, PROMPT, applied, base_adapter, imitate, pair
from tests.test_learner import learner as plain_learner
from tests.tiny import VOCABULARY, tiny_base, tiny_model, tiny_weights


def learner(folder: Path, **changes: Any) -> LoraLearner:
    """With EWC, which is off by default."""
    return plain_learner(folder, **({"ewc": 0.2} | changes))


def taught(folder: Path, **changes: object) -> tuple[Adapter, list[Example]]:
    """An adapter that was taught some pairs, and those pairs."""
    known = [pair(n) for n in range(1, 5)]
    _, parent = applied(learner(folder, **changes).update(known, [], base_adapter(), 1))
    return parent, known


def test_every_adapter_keeps_its_fisher_and_its_lambda(tmp_path: Path) -> None:
    parent, _ = taught(tmp_path)
    weights = read_adapter(tmp_path / parent.path, parent.sha256)
    kept = read_fisher(tmp_path / parent.path)
    first = Fisher.from_tensors(kept, weights)
    assert first.trace() > 0.0 and float(kept["strength"]) > 0.0
    update, child = applied(learner(tmp_path).update([imitate(7)], [], parent, 2))
    m = update.metrics
    assert m["ewc_penalty"] > 0.0 and m["ewc_share"] > 0.0 and m["ewc_strength"] > 0.0
    second = Fisher.from_tensors(read_fisher(tmp_path / child.path), weights)
    assert second.trace() == pytest.approx(0.95 * first.trace() + m["fisher_trace"], rel=1e-3)


def test_off_means_off(tmp_path: Path) -> None:
    parent, _ = taught(tmp_path, ewc=0.0)
    assert not (tmp_path / parent.path / FISHER_FILE).exists()
    update, child = applied(learner(tmp_path, ewc=0.0).update([imitate(7)], [], parent, 2))
    assert not any(name.startswith(("ewc", "fisher", "agem")) for name in update.metrics)
    assert not (tmp_path / child.path / FISHER_FILE).exists()


def test_lambda_is_set_so_that_the_pull_is_that_share_of_the_task_gradient() -> None:
    model = tiny_model()
    branches = Lora(model)
    parent = tiny_weights(model, seed=0)
    branches.load(tiny_weights(model, seed=1), trainable=True)
    assert branches.flat.grad is not None
    branches.flat.grad.normal_(generator=torch.Generator().manual_seed(0))
    task = float(branches.flat.grad.norm())
    run = Run([], [])
    elastic = Elastic(parent, {}, 0.25)
    elastic.pull(run, branches)  # nothing is kept yet: the gradient stays as it is
    assert float(branches.flat.grad.norm()) == task and "ewc_share" not in run.metrics()
    found = Fisher({p: (torch.rand(b.shape[0]), torch.rand(a.shape[1])) for p, (a, b) in parent.modules.items()})
    kept = elastic.renewed(run, branches, found)
    pull = float(kept["strength"]) * norm(penalty(found, parent, branches.view())[1])
    assert pull == pytest.approx(0.25 * task, rel=1e-4)
    before = branches.flat.grad.clone()
    Elastic(parent, kept, 0.25).pull(run, branches)
    assert float((branches.flat.grad - before).norm()) == pytest.approx(0.25 * task, rel=1e-3)
    assert run.metrics()["ewc_share"] == pytest.approx(0.25, rel=1e-3)


def test_the_pull_is_the_gradient_of_the_penalty_in_the_flat_vector() -> None:
    """Finite differences along a random direction of all A and B at once."""
    model = tiny_model()
    branches = Lora(model)
    parent, now = tiny_weights(model, seed=0), tiny_weights(model, seed=1)
    found = Fisher({p: (torch.rand(b.shape[0]), torch.rand(a.shape[1])) for p, (a, b) in parent.modules.items()})
    kept = found.tensors() | {"strength": torch.tensor(1.0)}
    branches.load(now, trainable=True)
    Elastic(parent, kept, 0.2).pull(Run([], []), branches)
    assert branches.flat.grad is not None
    direction = torch.randn(branches.flat.shape, generator=torch.Generator().manual_seed(0))
    slope = float(branches.flat.grad @ direction)
    ends = []
    for sign in (1.0, -1.0):
        branches.load(now, trainable=True)
        branches.flat.data.add_(direction, alpha=sign * 1e-3)
        ends.append(penalty(found, parent, branches.view())[0])
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=1e-2)


def test_a_stiff_pull_keeps_more_of_what_was_taught(tmp_path: Path) -> None:
    """New answers to prompts like the taught ones, without replay and without a trust region."""
    parent, known = taught(tmp_path)
    other = [imitate(n, chosen_ids=(40, 41)) for n in range(11, 15)]
    scorer = TorchScorer(tiny_base(), CONFIG, tmp_path)
    kept, learned = [], []
    for step, share in ((2, 0.0), (3, 3.0)):
        # lambda was set at the parent for a share of 0.2, so 15 times that is what a share of 3 starts with
        subject = learner(tmp_path, ewc=share, kl_replay_limit=1e9)
        _, child = applied(subject.update(other, [], stiffer(tmp_path, parent, 15.0), step))
        kept.append(sum(s.logprob for s in scorer.score(child, known)))
        learned.append(sum(s.logprob for s in scorer.score(child, other)))
    assert kept[1] > kept[0] + 0.5
    assert learned[1] > sum(s.logprob for s in scorer.score(parent, other)) + 4.0


def stiffer(folder: Path, adapter: Adapter, times: float) -> Adapter:
    """The same adapter with another lambda in its folder."""
    weights = read_adapter(folder / adapter.path, adapter.sha256)
    kept = read_fisher(folder / adapter.path)
    changed = kept | {"strength": times * kept["strength"]}
    write_adapter(folder / "stiff", weights, 8, "tiny", fisher=changed)
    return replace(adapter, path="stiff")


@pytest.mark.parametrize("damage", [b"junk", b""])
def test_a_damaged_fisher_starts_afresh_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes) -> None:
    parent, _ = taught(tmp_path)
    (tmp_path / parent.path / FISHER_FILE).write_bytes(damage)
    with caplog.at_level(logging.ERROR):
        update, child = applied(learner(tmp_path).update([imitate(7)], [], parent, 2))
    assert "Fisher information starts afresh" in caplog.text
    assert "ewc_penalty" not in update.metrics
    assert load_file(tmp_path / child.path / FISHER_FILE)


def test_half_a_step_keeps_the_fisher(tmp_path: Path) -> None:
    update, whole = applied(learner(tmp_path).update([pair()], [], base_adapter(), 1))
    _, half = learner(tmp_path).shrink(update, whole, base_adapter(), 2)
    one, two = (read_fisher(tmp_path / a.path) for a in (whole, half))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_contexts_are_half_new_where_there_are_enough_of_both() -> None:
    def items(first: int, count: int) -> list[object]:
        return [fit(imitate(first + n, prompt_ids=(*PROMPT, first, n)), 64, VOCABULARY) for n in range(count)]

    for new, old, expected in ((20, 20, EXAMPLES // 2), (20, 0, EXAMPLES), (2, 20, 2), (20, 3, EXAMPLES - 3)):
        fresh = items(30, new)
        picked = contexts(fresh, items(60, old))  # type: ignore[arg-type]
        assert sum(a.prompt_ids[-2] == 30 for a in picked) == expected
        assert len(set(picked)) == len(picked) == min(EXAMPLES, new + old)


def test_agem_leaves_nothing_that_opposes_the_reference() -> None:
    run = Run([], [])
    g, r = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 4.0])
    without_conflict(run, g, r)
    assert g.tolist() == [1.0, 0.0]
    without_conflict(run, g, r)  # at a right angle now
    assert g.tolist() == [1.0, 0.0]
    without_conflict(run, g, torch.zeros(2))
    assert g.tolist() == [1.0, 0.0]
    assert run.metrics()["agem_projected"] == pytest.approx(1 / 3)


def test_agem_projects_new_examples_that_oppose_replayed_ones(tmp_path: Path) -> None:
    parent, known = taught(tmp_path)
    inverted = [
        replace(e, id=f"flip-{e.id}", step_id=e.step_id, chosen_ids=e.rejected_ids, rejected_ids=e.chosen_ids)
        for e in known
    ]
    update, _ = applied(
        learner(tmp_path, agem=True, epochs=1, batch=8, kl_replay_limit=1e9).update(inverted, known, parent, 2)
    )
    assert update.metrics["agem_projected"] > 0.0 and update.metrics["agem_cosine"] < 0.0


def test_parts_make_the_same_gradient_as_the_whole(tmp_path: Path) -> None:
    """Where nothing conflicts A-GEM changes nothing but the order of the sums."""
    parent, known = taught(tmp_path)
    made = []
    for agem in (False, True):
        subject = learner(tmp_path, agem=agem, epochs=1, batch=8, kl_replay_limit=1e9)
        update, child = applied(subject.update([pair(7), pair(8)], known, parent, 2))
        assert not update.metrics.get("agem_projected")
        made.append(read_adapter(tmp_path / child.path))
        fresh = fresh_weights(tiny_base().model, 4, 8, 0)
        assert made[-1].modules.keys() == fresh.modules.keys()
    for path, (a, b) in made[0].modules.items():
        torch.testing.assert_close(a, made[1].modules[path][0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(b, made[1].modules[path][1], rtol=1e-3, atol=1e-5)
