"""Elastic weight consolidation of adapters, against the whole matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradatim.errors import AdapterError
from gradatim.nn import fisher as ewc
from gradatim.nn import lora
from gradatim.nn.fisher import Fisher
from gradatim.nn.lora import Lora, LoraWeights, read_fisher, write_adapter
from gradatim.nn.pack import Answer, drawn
from tests.tiny import tiny_model, tiny_weights

OUT, IN, RANK = 7, 5, 2
LAYER = "a.layer"
ANSWERS = [Answer((1, 2, 3), (4, 5, 6)), Answer((1, 2, 3), (7, 8)), Answer((9, 10), (11, 12, 13))]


def random(seed: int, scaling: float = 0.5) -> LoraWeights:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((RANK, IN), (OUT, RANK)))
    return LoraWeights(RANK, scaling, {LAYER: (a, b)})


def random_fisher(seed: int = 9) -> Fisher:
    g = torch.Generator().manual_seed(seed)
    f = torch.rand(OUT, IN, generator=g, dtype=torch.float64)
    return Fisher({LAYER: (f.sum(1), f.sum(0))})


def slow(fisher: Fisher, anchor: LoraWeights, a: Tensor, b: Tensor) -> Tensor:
    """1/2 sum_ij F_ij D_ij^2 with F and D as matrices."""
    s, columns = fisher.sums[LAYER]
    a0, b0 = anchor.modules[LAYER]
    d = anchor.scaling * (b @ a - b0 @ a0)
    return 0.5 * (torch.outer(s, columns) / s.sum() * d.square()).sum()


def test_penalty_and_gradient_are_those_of_the_whole_matrix() -> None:
    fisher, anchor, now = random_fisher(), random(0), random(1)
    a, b = (t.clone().requires_grad_() for t in now.modules[LAYER])
    expected = slow(fisher, anchor, a, b)
    torch.autograd.backward(expected)
    found, gradient = ewc.penalty(fisher, anchor, now)
    assert found == pytest.approx(float(expected.detach()), rel=1e-12)
    for ours, theirs in zip(gradient[LAYER], (a.grad, b.grad), strict=True):
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_another_factorisation_of_the_same_change_costs_the_same() -> None:
    fisher, anchor, now = random_fisher(), random(0), random(1)
    m = torch.tensor([[2.0, 0.3], [-1.0, 0.5]], dtype=torch.float64)
    a, b = now.modules[LAYER]
    turned = LoraWeights(RANK, now.scaling, {LAYER: (m.inverse() @ a, b @ m)})
    assert ewc.penalty(fisher, anchor, turned)[0] == pytest.approx(ewc.penalty(fisher, anchor, now)[0], rel=1e-12)


def test_at_the_anchor_there_is_no_penalty_and_no_pull() -> None:
    found, gradient = ewc.penalty(random_fisher(), random(0), random(0))
    assert found == 0.0 and ewc.norm(gradient) == 0.0


def test_it_is_defined_where_the_anchor_is_a_fresh_adapter() -> None:
    """There B = 0, and the Fisher information of A would be 0 whatever A does."""
    anchor, now = random(0), random(1)
    anchor.modules[LAYER][1].zero_()
    found, gradient = ewc.penalty(random_fisher(), anchor, now)
    a, b = now.modules[LAYER]
    assert found == pytest.approx(float(slow(random_fisher(), anchor, a, b))) and found > 0.0
    assert all(bool((g != 0).any()) for g in gradient[LAYER])


def test_near_the_anchor_float32_loses_nothing() -> None:
    fisher, anchor, far = random_fisher(), random(0), random(1)
    near = lora.blend(anchor, far, 1e-5)
    exact = ewc.penalty(fisher, anchor, near)[0]
    rounded = ewc.penalty(fisher, _float32(anchor), _float32(near))[0]
    assert rounded == pytest.approx(exact, rel=0.05)


def _float32(weights: LoraWeights) -> LoraWeights:
    return replace(weights, modules={p: (a.float(), b.float()) for p, (a, b) in weights.modules.items()})


def test_online_sums_are_those_of_the_summed_matrix() -> None:
    old, new = random_fisher(1), random_fisher(2)
    both = old.followed_by(new, 0.5)
    assert both.trace() == pytest.approx(0.5 * old.trace() + new.trace())
    torch.testing.assert_close(both.sums[LAYER][1], 0.5 * old.sums[LAYER][1] + new.sums[LAYER][1])


# ---------------------------------------------------------------------------------------- on a model


class Records:
    """Inputs and output gradients of every layer, all kept."""

    def __init__(self, model: Any, paths: tuple[str, ...]) -> None:
        self.x: dict[str, Tensor] = {}
        self.delta: dict[str, Tensor] = {}
        for path in paths:
            model.get_submodule(path).register_forward_hook(self._forward(path))
            model.get_submodule(path).register_full_backward_hook(self._backward(path))

    def _forward(self, path: str) -> Any:
        def keep(_module: Any, args: tuple[Tensor, ...], _y: Tensor) -> None:
            self.x[path] = args[0][0].detach().double()

        return keep

    def _backward(self, path: str) -> Any:
        def keep(_module: Any, _in: Any, out: tuple[Tensor, ...]) -> None:
            self.delta[path] = out[0][0].detach().double()

        return keep


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_the_gathered_sums_are_those_of_the_per_token_fisher() -> None:
    model = tiny_model()
    branches = Lora(model)
    branches.load(tiny_weights(model), trainable=True)
    paths = lora.linear_paths(model)
    records = Records(model, paths)
    with ewc.gathering(model, paths) as gathered:
        logprobs = drawn(model, ANSWERS, torch.Generator().manual_seed(0))
        torch.autograd.backward(logprobs.sum())
    found = gathered.fisher(len(logprobs))
    for path in paths:
        slow = torch.einsum("ti,tj->ij", records.delta[path].square(), records.x[path].square()) / len(logprobs)
        s, a = found.sums[path]
        torch.testing.assert_close(s.double(), slow.sum(1), rtol=1e-4, atol=1e-10)
        torch.testing.assert_close(a.double(), slow.sum(0), rtol=1e-4, atol=1e-10)
    assert found.trace() > 0.0
    before = found.trace()
    torch.autograd.backward(drawn(model, ANSWERS, torch.Generator().manual_seed(0)).sum())
    assert gathered.fisher(len(logprobs)).trace() == before  # the hooks are off


def test_labels_are_drawn_as_the_model_would() -> None:
    """E[-log p(y)] over own labels is the entropy of the rows; one row for each token an answer has of its own."""
    model = tiny_model()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found = torch.stack([drawn(model, ANSWERS[:1], g) for _ in range(400)])  # (400, R)
        logits = model(input_ids=torch.tensor([ANSWERS[0].fed])).logits[0, 2:].log_softmax(-1)
    entropy = -(logits.exp() * logits).sum(1)
    assert found.shape[1] == 3
    spread = found.std(0) / 20.0  # of a mean of 400
    assert bool(((-found.mean(0) - entropy).abs() < 4.0 * spread).all())


def test_the_gradient_of_drawn_labels_is_that_of_the_plain_model() -> None:
    """The expected score of own labels is 0: the mean gradient over many draws is small beside a single one."""
    model = tiny_model()
    branches = Lora(model)
    branches.load(tiny_weights(model), trainable=True)
    g = torch.Generator().manual_seed(0)
    single = 0.0
    for _ in range(200):
        before = branches.flat.grad.clone()  # type: ignore[union-attr]
        torch.autograd.backward(drawn(model, ANSWERS, g).sum())
        single += float((branches.flat.grad - before).norm()) / 200  # type: ignore[operator]
    assert branches.flat.grad is not None
    assert float(branches.flat.grad.norm()) / 200 < 3.0 * single / 200**0.5


# ---------------------------------------------------------------------------------------- in files


def test_it_is_kept_beside_the_adapter_and_damage_is_seen(tmp_path: Path) -> None:
    weights = tiny_weights(tiny_model())
    sums = {p: (torch.rand(b.shape[0]), torch.rand(a.shape[1])) for p, (a, b) in weights.modules.items()}
    kept = Fisher(sums)
    sha = write_adapter(tmp_path / "with", weights, 8, "tiny", fisher=kept.tensors())
    assert sha == write_adapter(tmp_path / "without", weights, 8, "tiny")
    assert read_fisher(tmp_path / "without") == {}
    found = Fisher.from_tensors(read_fisher(tmp_path / "with"), weights)
    assert all(torch.equal(found.sums[p][1], a) for p, (_, a) in sums.items())
    (tmp_path / "with" / lora.FISHER_FILE).write_bytes(b"junk")
    with pytest.raises(AdapterError, match="does not match"):
        read_fisher(tmp_path / "with")


def test_what_cannot_be_a_fisher_is_refused() -> None:
    weights = tiny_weights(tiny_model())
    good = {p: (torch.rand(b.shape[0]), torch.rand(a.shape[1])) for p, (a, b) in weights.modules.items()}
    tensors = Fisher(good).tensors()
    name = next(iter(tensors))
    for bad in (torch.full_like(tensors[name], -1.0), torch.full_like(tensors[name], torch.nan), torch.ones(3)):
        with pytest.raises(AdapterError):
            Fisher.from_tensors(tensors | {name: bad}, weights)
    with pytest.raises(AdapterError):
        Fisher.from_tensors({}, weights)
