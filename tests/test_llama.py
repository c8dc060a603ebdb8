"""The hand-written layers against the library's, in float64, and against the model-agnostic path."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gradatim.nn import attend, head, trie
from gradatim.nn.llama import LlamaPass, qualifies
from gradatim.nn.lora import Lora, LoraWeights
from gradatim.nn.pack import Answer, check_model, score
from tests.test_pack import agent_batch, plain, relative
from tests.tiny import VOCABULARY, tiny_model, tiny_weights


def ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCABULARY) for _ in range(count))


def chain(turns: int = 4) -> list[Answer]:
    """The steps of one episode: each prompt goes on where the step before ended."""
    rng = random.Random(1)
    prompt, out = ids(rng, 30), []
    for _ in range(turns):
        out.append(Answer(prompt, ids(rng, 5)))
        prompt = prompt + out[-1].completion_ids + ids(rng, 20)
    return out


def tries() -> dict[str, list[Answer]]:
    rng = random.Random(2)
    return {
        "agents": agent_batch(),
        "episode": chain(),
        "one answer": [Answer(ids(rng, 40), ids(rng, 6))],
        "one token": [Answer(ids(rng, 1), ids(rng, 1))],
        "nothing shared": [Answer((i, *ids(rng, 20)), ids(rng, 3)) for i in range(4)],
        "samples of one prompt": [Answer((1, 2, 3, 4), ids(rng, k)) for k in (1, 4, 9, 20)],
    }


def model_of(kind: str, **changes: Any) -> Any:
    torch.manual_seed(3)
    common = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    }  # fmt: skip
    made: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**common, **changes})),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**common, **changes})),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**{**common, **changes})),
    }[kind]()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def graded(model: Any, lora: Lora, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """All log-probabilities, and the gradients of all LoRA factors of a weighted sum of them."""
    lora.zero_grad()
    sum((0.3 + 0.1 * i) * p.sum() for i, p in enumerate(logprobs)).backward()  # type: ignore[union-attr]
    found = {}
    for path, pair in lora.branches().items():
        for name, leaf in zip("AB", pair, strict=True):
            assert leaf.grad is not None
            found[f"{path}.{name}"] = leaf.grad.clone()
    return torch.cat(logprobs).detach(), found


def compare(model: Any, answers: list[Answer], weights: LoraWeights, *, tolerance: float = 1e-5) -> None:
    """Ours in fp32 against the library in float64, value by value and tensor by tensor."""
    lora = Lora(model)
    lora.load(weights, trainable=True)
    mine, found = graded(model, lora, [s.logprobs for s in LlamaPass(model, lora)(answers)])
    exact = model.double()
    expected, wanted = graded(exact, lora, [plain(exact, a) for a in answers])
    assert relative(mine, expected) <= tolerance
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= 10 * tolerance * wanted[name].norm(), name


@pytest.mark.parametrize("name", list(tries()))
@pytest.mark.parametrize("block_tokens", [1, 16, 256])
def test_any_trie_gives_the_values_and_gradients_of_float64(
    name: str, block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trie, "BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(attend, "BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(head, "HEAD_ROWS", 16)
    model = tiny_model()
    compare(model, tries()[name], tiny_weights(model))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"head_dim": 16}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_hidden_layers": 1}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_any_model_of_the_family_gives_the_values_and_gradients_of_float64(kind: str, changes: dict[str, Any]) -> None:
    model = model_of(kind, **changes)
    assert qualifies(model)
    compare(model, tries()["agents"], tiny_weights(model))


def test_modules_without_a_branch_are_left_alone() -> None:
    model = tiny_model()
    whole = tiny_weights(model)
    some = {p: pair for p, pair in whole.modules.items() if p.endswith(("k_proj", "down_proj")) or ".1.mlp.up" in p}
    compare(model, tries()["agents"], LoraWeights(whole.rank, whole.scaling, some))


def test_without_an_adapter_it_is_the_base() -> None:
    model = tiny_model()
    lora = Lora(model)
    ours = LlamaPass(model, lora)
    lora.load(tiny_weights(model))
    answers = tries()["agents"]
    with torch.no_grad(), lora.disabled():
        bare = torch.cat([s.logprobs for s in ours(answers)])
    lora.load(None)
    with torch.no_grad():
        expected = torch.cat([plain(model, a) for a in answers])
        again = torch.cat([s.logprobs for s in ours(answers)])
    assert torch.equal(bare, again)
    assert relative(bare, expected) <= 1e-5


def test_it_says_the_same_tokens_are_greedy_as_the_generic_path() -> None:
    model = tiny_model()
    with torch.no_grad():
        ours, generic = LlamaPass(model, Lora(model))(agent_batch()), score(model, agent_batch())
    assert [s.greedy.tolist() for s in ours] == [s.greedy.tolist() for s in generic]


@pytest.mark.parametrize("seed", range(3))
def test_in_bf16_it_is_no_further_from_float32_than_the_generic_path(seed: int) -> None:
    model = tiny_model(seed)
    weights, answers = tiny_weights(model, seed), tries()["agents"]
    lora = Lora(model)
    lora.load(weights, trainable=True)
    exact, wanted = graded(model, lora, [s.logprobs for s in score(model, answers)])
    model.to(torch.bfloat16)
    generic = graded(model, lora, [s.logprobs for s in score(model, answers)])
    ours = graded(model, lora, [s.logprobs for s in LlamaPass(model, lora)(answers)])

    def error(found: tuple[Tensor, dict[str, Tensor]]) -> tuple[float, float]:
        flat = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in (found[1], wanted)]
        return relative(found[0], exact), relative(*flat)

    assert error(ours)[0] <= error(generic)[0]
    assert error(ours)[1] <= error(generic)[1]


def test_other_architectures_do_not_qualify() -> None:
    assert not qualifies(model_of("qwen3"))
    assert not qualifies(model_of("llama", hidden_act="gelu"))
    assert not qualifies(model_of("qwen2", use_sliding_window=True, sliding_window=8))


def test_a_model_that_computes_otherwise_is_found_out() -> None:
    model = tiny_model()
    lora = Lora(model)
    check_model(model, LlamaPass(model, lora))
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, y: 0.5 * y)
    with pytest.raises(Exception, match="does not know"):
        check_model(model, LlamaPass(model, lora))
