"""Packing: the same numbers as one sequence at a time, for less."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradatim.errors import ModelError
from gradatim.nn import head, trie
from gradatim.nn.lora import Lora
from gradatim.nn.pack import ATTENTION, Answer, Pack, check_model, logprobs, pack, packed_tokens, passes, score
from tests.tiny import VOCABULARY, tiny_model, tiny_weights


def plain(model: Any, answer: Answer) -> Tensor:
    """Log-probabilities (T,) by transformers alone."""
    logits = model(torch.tensor([answer.fed])).logits[0, len(answer.prompt_ids) - 1 :]
    at = torch.arange(len(answer.completion_ids))
    picked: Tensor = logits.log_softmax(-1)[at, torch.tensor(answer.completion_ids)]
    return picked


def agent_batch(examples: int = 5, shared: int = 200, own: int = 60) -> list[Answer]:
    """Pairs that share a long few-shot prefix, with odd ones among them: a prefix of another, a repetition."""
    rng = random.Random(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(n))

    prefix = ids(shared)
    out = []
    for _ in range(examples):
        prompt = prefix + ids(own)
        out += [Answer(prompt, ids(9)), Answer(prompt, ids(7))]
    out += [Answer(prefix[:7], ids(1)), out[0], Answer(prefix[:7], ids(3)), Answer(ids(3), ids(2))]
    return out


def gradients(model: Any, branches: Lora, parts: list[Tensor]) -> Tensor:
    branches.zero_grad()
    sum((0.3 + 0.1 * i) * p.sum() for i, p in enumerate(parts)).backward()  # type: ignore[union-attr]
    assert branches.flat.grad is not None
    return branches.flat.grad.clone()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("block_tokens", [1, 64, 256, 10_000])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_values_and_gradients_equal_the_unpacked_reference(
    block_tokens: int, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trie, "BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(head, "HEAD_ROWS", 16)
    model = tiny_model(key_heads=key_heads)
    branches = Lora(model)
    branches.load(tiny_weights(model), trainable=True)
    answers = agent_batch()
    packed, reference = logprobs(model, answers), [plain(model, a) for a in answers]
    assert relative(torch.cat(packed), torch.cat(reference)) <= 1e-5
    assert relative(gradients(model, branches, packed), gradients(model, branches, reference)) <= 1e-5


def test_shared_prefixes_are_computed_once() -> None:
    answers = agent_batch()
    packed = pack(answers)
    assert len(packed.token_ids) == packed_tokens(answers) < 0.25 * sum(len(a.fed) for a in answers)


def test_greedy_says_where_the_token_is_the_likeliest() -> None:
    model = tiny_model()
    prompt = (3, 1, 4, 1, 5)
    with torch.no_grad():
        best = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=[]
        )
        chosen = tuple(best[0, len(prompt) :].tolist())
        other = (*chosen[:3], (chosen[3] + 1) % VOCABULARY, *chosen[4:])
        found = score(model, [Answer(prompt, chosen), Answer(prompt, other)])
    assert found[0].greedy.tolist() == [True] * 6
    assert found[1].greedy.tolist()[:4] == [True, True, True, False]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(0, 2), min_size=1, max_size=4)
        ),
        min_size=1,
        max_size=8,
    )
)
def test_every_row_of_any_trie_sees_exactly_its_own_history(pairs: list[tuple[list[int], list[int]]]) -> None:
    answers = [Answer(tuple(p), tuple(c)) for p, c in pairs]
    packed = pack(answers)
    assert (
        len(packed.token_ids)
        == packed_tokens(answers)
        == len({a.fed[:k] for a in answers for k in range(1, len(a.fed) + 1)})
    )
    history = _histories(packed)
    for answer, rows in zip(answers, packed.rows, strict=True):
        assert [history[r] for r in rows] == [
            answer.fed[: len(answer.prompt_ids) + k] for k in range(len(answer.completion_ids))
        ]


def _histories(packed: Pack) -> list[tuple[int, ...]]:
    """What each packed token attends to, in the order of positions."""
    out: list[tuple[int, ...]] = []
    for block in packed.blocks:
        keys = [t for b in block.before for t in range(packed.blocks[b].start, packed.blocks[b].end)]
        keys += range(block.start, block.end)
        for q in range(block.start, block.end):
            row = None if block.mask is None else block.mask[q - block.start]
            seen = [k for j, k in enumerate(keys) if (k <= q if row is None else row[j] == 0)]
            assert [packed.position_ids[k] for k in seen] == list(range(packed.position_ids[q] + 1))
            out.append(tuple(packed.token_ids[k] for k in seen))
    return out


def test_passes_keep_the_budget_and_groups_together() -> None:
    answers = agent_batch(examples=8)
    groups = [answers[i : i + 2] for i in range(0, 16, 2)]
    split = passes(groups, budget_tokens=400)
    assert sorted(i for members in split for i in members) == list(range(8))
    assert len(split) > 1
    assert all(packed_tokens([a for i in m for a in groups[i]]) <= 400 for m in split)
    assert passes(groups, budget_tokens=1) == [[i] for m in passes(groups, 10**6) for i in m]


def test_empty_answers_are_refused() -> None:
    for bad in ([], [Answer((), (1,))], [Answer((1,), ())]):
        with pytest.raises(ValueError, match="at least one"):
            pack(bad)


def test_the_models_own_attention_is_back_afterwards() -> None:
    model = tiny_model()
    before = model.config._attn_implementation
    logprobs(model, [Answer((1, 2), (3,))])
    assert model.config._attn_implementation == before != ATTENTION


def test_a_model_that_computes_otherwise_is_found_out() -> None:
    model = tiny_model()
    check_model(model)
    model.lm_head.register_forward_hook(lambda _m, _a, logits: 0.5 * logits)
    with pytest.raises(ModelError, match="output head"):
        check_model(model)


def test_bf16_weights_give_nearly_the_same() -> None:
    model = tiny_model()
    answers = agent_batch(examples=2)
    with torch.no_grad():
        exact = torch.cat(logprobs(model, answers))
        rough = torch.cat(logprobs(model.to(torch.bfloat16), answers))
    assert float((exact - rough).abs().mean()) < 0.1
