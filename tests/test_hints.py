"""From words about an answer to an update, over the wire and on a real if tiny model; and what a hint teaches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from torch import Tensor

from gradatim.app import compose
from gradatim.config import Config, EngineConfig, LearnerConfig, LossConfig
from gradatim.engine.transformers import TransformersEngine
from gradatim.learner.batch import Item, fit
from gradatim.learner.objectives import Note, Objectives, Scores
from gradatim.learner.trainable import trainable
from gradatim.nn.base import Base, load_base
from gradatim.nn.render import Renderer
from gradatim.server import build_app
from gradatim.store import SqlStore, open_store
from gradatim.testing.fakes import FakeRouter
from gradatim.types import Adapter, Example, Reward, Step, Update
from tests import tiny
from tests.server_kit import BASE, FakeAdmin, chat
from tests.test_learner import PROMPT, applied, base_adapter, learner, pair
from tests.test_objectives import hint
from tests.tiny import VOCABULARY

CONFIG = Config(
    engine=EngineConfig(threads=1, max_batch=2, adapter_slots=2),
    learner=LearnerConfig(rank=4, alpha=8, lr=1e-2, batch=4, min_examples=1, max_length=256, kl_replay_limit=1e9),
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
async def client(store: SqlStore, tiny_model_dir: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    base = load_base(str(tiny_model_dir), tmp_path, dtype="float32", device="cpu")
    compose.register_base(store, CONFIG, base.sha256)
    engine = TransformersEngine(base, Renderer(base), CONFIG.engine, tmp_path, max_queue=8)
    await engine.load(store.read(Adapter)[0][1])
    app = build_app(engine=engine, store=store, router=FakeRouter(), config=CONFIG, admin=FakeAdmin())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as client:
        yield client
    engine.close()


async def test_a_comment_over_the_wire_becomes_a_hint_and_an_update(
    client: httpx.AsyncClient, store: SqlStore, tiny_base: Base, tmp_path: Path
) -> None:
    for number in range(3):
        asked = chat(f"Q{number}?", max_tokens=6, seed=number)
        answer = (await client.post("/v1/chat/completions", json=asked)).raise_for_status().json()
        said = {"kind": "comment", "response_id": answer["id"], "comment": f"say {number}", "source": "human:alice"}
        assert (await client.post("/v1/feedback", json=said)).status_code == 202
    loop = compose.build_loop(replace(CONFIG, data_dir=tmp_path), store, tiny_base)
    assert loop.judge(flush=True)
    examples = [e for _, e in store.read(Example)]
    assert [e.kind for e in examples] == ["hint"] * 3
    assert all(r.value == 0.0 and "comments" in r.reason for _, r in store.read(Reward))
    renderer = Renderer(tiny_base)
    for number, e in enumerate(examples):
        step = store.step(id=e.step_id)
        assert isinstance(step, Step)
        assert (e.rejected_ids, e.prompt_ids, e.logprobs) == (step.completion_ids, step.prompt_ids, step.logprobs)
        assert renderer.decode(e.hint_ids) == renderer.decode(e.prompt_ids).replace(
            f"Q{number}?", f"Q{number}?\n\nHint: say {number}"
        )
    assert loop.learn()  # without flush: hints are worth an update by themselves
    ((_, update),) = store.read(Update)
    assert update.applied, update.refused_because
    assert update.kinds == {"hint": 3} and update.metrics["hinted"] == 3
    assert update.metrics["loss_self_distillation"] != 0.0 and update.metrics["silent_hints"] == 0


def far_from_teacher(adapter: Adapter, folder: Path, hints: Sequence[Example]) -> Tensor:
    """|log teacher - log student| of every token of the commented answers: the teacher is the base with the hint."""
    told, plain = [], []
    for example in hints:
        fitted = fit(example, CONFIG.learner.max_length, VOCABULARY)
        assert isinstance(fitted, Item) and fitted.hinted is not None and fitted.rejected is not None
        told.append(fitted.hinted)
        plain.append(fitted.rejected)
    model = trainable(tiny.tiny_base())
    with model.lock:
        model.wear(base_adapter(), folder)
        teacher = torch.cat([s.logprobs for s in model.score(told)])
        model.wear(adapter, folder)
        return (teacher - torch.cat([s.logprobs for s in model.score(plain)])).abs()


def test_hints_bring_the_student_to_its_hinted_parent(tmp_path: Path) -> None:
    subject, hints = learner(tmp_path, epochs=40, lr=2e-3, kl_replay_limit=1e9), [hint(1), hint(2)]
    update, adapter = applied(subject.update(hints, [], base_adapter(), 1))
    before = far_from_teacher(base_adapter(), tmp_path, hints)
    after = far_from_teacher(adapter, tmp_path, hints)
    assert float(before.mean()) > 0.4
    assert float(after.mean()) < 0.25 * float(before.mean())
    assert update.metrics["hinted"] == 2


def test_the_teacher_is_the_parent_and_not_what_is_trained(tmp_path: Path) -> None:
    """After one step the student has moved; its teacher, as recorded, has not."""
    subject = learner(tmp_path, epochs=2)
    seen: list[Tensor] = []
    whole = Objectives.loss

    def noting(self: Objectives, scores: Scores, note: Note) -> Tensor:
        assert scores.teacher is not None
        seen.append(scores.teacher)
        return whole(self, scores, note)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objectives, "loss", noting)
        applied(subject.update([hint(1)], [], base_adapter(), 1))
    assert len(seen) == 2 and torch.equal(seen[0], seen[1]) and not seen[0].requires_grad


def test_a_hint_that_changes_nothing_is_left_out_and_counted(tmp_path: Path) -> None:
    silent = hint(3, hint_ids=(*PROMPT, 3))  # the prompt as it was: nothing was said
    update, _ = applied(learner(tmp_path).update([hint(1), silent], [], base_adapter(), 1))
    assert update.metrics["silent_hints"] == 1 and update.metrics["hinted"] == 2
    refused, adapter = learner(tmp_path).update([silent], [], base_adapter(), 2)
    assert adapter is None and "1 hints change nothing" in refused.refused_because


def test_a_correction_may_teach_as_a_hint_and_is_rehearsed_with_its_teacher(tmp_path: Path) -> None:
    subject = learner(tmp_path, losses=LossConfig(correction="self_distillation"))
    new = [pair(n, hint_ids=(1, 2, 50, 3, 4, n)) for n in (1, 2)]
    update, _ = applied(subject.update(new, [pair(3, hint_ids=(1, 2, 50, 3, 4, 3))], base_adapter(), 1))
    assert "loss_dpo" not in update.metrics and update.metrics["loss_self_distillation"] != 0.0
    assert update.replay_ids == ("pair-3",)


def test_hints_that_cannot_be_used_are_dropped(tmp_path: Path) -> None:
    bad = hint(2, hint_ids=(1, 10_000))
    update, _ = applied(learner(tmp_path).update([hint(1), bad], [], base_adapter(), 1))
    assert update.metrics["left_out"] == 1
    fitted = fit(hint(1, hint_ids=tuple(range(90))), 64, VOCABULARY)
    assert isinstance(fitted, Item) and fitted.hinted is not None
    assert fitted.hinted.prompt_ids == tuple(range(29, 90))  # like a prompt, it loses its left end
