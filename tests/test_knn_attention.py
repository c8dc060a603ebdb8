"""Reading beyond the window: against the definition in float64, and against the model itself where memory is shut."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gradatim.errors import ForeignMemoryError, ModelError, StoreError
from gradatim.memory.knn_attention import KnnAttention, layers_of
from gradatim.memory.session_file import read_session, write_session
from gradatim.nn.base import Base
from gradatim.nn.session import Past, Rows, rotated
from tests.far_reference import reference
from tests.tiny import VOCABULARY, tiny_model


def text(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def wide_model(seed: int = 0) -> Any:
    return tiny_model(seed).double().requires_grad_(False)


def all_logits(knn: KnnAttention, ids: list[int]) -> Tensor:
    return torch.cat([knn.logits(states) for states in knn.read(knn.session(), ids)])


# --------------------------------------------------------------------------------------- the definition


def window_starts(count: int, window: int, chunk: int) -> list[int]:
    """For each token, the first one that its window still holds."""
    starts, at, local = [], 0, 0
    while at < count:
        n = min(count - at, window - local if window - local >= chunk else chunk)
        local = min(local, window - n) + n
        starts += [at + n - local] * n
        at += n
    return starts


@pytest.mark.parametrize("form", ["joint", "gated"])
@pytest.mark.parametrize(("window", "chunk"), [(12, 4), (12, 12), (9, 1), (10, 7)])
def test_it_is_what_the_definition_says(form: Any, window: int, chunk: int) -> None:
    model, ids = wide_model(), text(270)
    knn = KnnAttention(model, window=window, chunk=chunk, blocks=1, form=form, layers=(0, 1))
    knn.heads = knn.plain_heads(0.7)
    want = reference(model, ids, window_starts(len(ids), window, chunk), window, 1, (0, 1), form, 0.7)
    torch.testing.assert_close(all_logits(knn, ids), want, rtol=1e-4, atol=1e-4)


def test_one_layer_of_two() -> None:
    model, ids = wide_model(1), text(270)
    knn = KnnAttention(model, window=8, chunk=4, blocks=2, layers=(1,))
    want = reference(model, ids, window_starts(len(ids), 8, 4), 8, 2, (1,))
    torch.testing.assert_close(all_logits(knn, ids), want, rtol=1e-4, atol=1e-4)


def test_single_precision_agrees_with_double() -> None:
    model, ids = tiny_model(2).requires_grad_(False), text(60)
    settings: dict[str, Any] = {"window": 16, "chunk": 4, "layers": (0, 1)}
    got = all_logits(KnnAttention(model, **settings), ids)
    want = all_logits(KnnAttention(copy.deepcopy(model).double(), **settings), ids)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------ memory shut


def shut(model: Any, **settings: Any) -> KnnAttention:
    knn = KnnAttention(model, **settings)
    knn.heads = knn.plain_heads(-math.inf)
    return knn


@pytest.mark.parametrize("form", ["joint", "gated"])
def test_a_text_within_the_window_has_the_models_bits(tiny_base: Base, form: Any) -> None:
    ids = text(60)
    want = tiny_base.model(input_ids=torch.tensor([ids])).logits[0]
    for knn in (KnnAttention(tiny_base.model, window=64, form=form, chunk=16), shut(tiny_base.model, form=form)):
        assert torch.equal(all_logits(knn, ids), want)


def test_shut_it_has_the_bits_of_the_model_with_a_cache_of_that_window(tiny_base: Base) -> None:
    """Beyond the window too: the same chunks through the plain model, its cache cut to the window."""
    ids, window, chunk = text(70), 16, 4
    knn = shut(tiny_base.model, window=window, chunk=chunk, layers=(0, 1))
    got = all_logits(knn, ids)
    cache, at, want = DynamicCache(), 0, []
    with torch.no_grad():
        while at < len(ids):
            n = window if at == 0 else chunk
            if at:
                for layer in cache.layers:
                    kept = window - min(n, len(ids) - at)
                    layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]
            piece = torch.tensor([ids[at : at + n]])
            positions = torch.arange(at, at + piece.shape[1])[None]
            out = tiny_base.model(input_ids=piece, position_ids=positions, past_key_values=cache, use_cache=True)
            want.append(out.logits[0])
            at += n
    assert torch.equal(got, torch.cat(want))


def test_generation_within_the_window_is_the_models(tiny_base: Base) -> None:
    ids = text(20, seed=3)
    knn = KnnAttention(tiny_base.model, window=64, chunk=16)
    session = knn.session()
    for _ in knn.read(session, ids):
        pass
    made = tiny_base.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, 20), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert knn.generate(session, 12) == made[0, 20:].tolist()


def test_the_model_that_was_handed_over_is_untouched() -> None:
    model, ids = tiny_model(), torch.tensor([text(30)])
    before, attention = model(input_ids=ids).logits, model.config._attn_implementation
    knn = KnnAttention(model, window=8, chunk=4, layers=(0, 1))
    all_logits(knn, text(30))
    assert torch.equal(model(input_ids=ids).logits, before) and model.config._attn_implementation == attention
    shared = zip(model.parameters(), knn._model.parameters(), strict=True)
    assert all(a is b for a, b in shared)


# -------------------------------------------------------------------------------------------- behaviour


def test_reading_in_pieces_and_scoring_agree(tiny_base: Base) -> None:
    ids = text(50, seed=4)
    knn = KnnAttention(tiny_base.model, window=16, chunk=4, layers=(0, 1))
    whole = knn.score(knn.session(), ids)
    want = torch.log_softmax(all_logits(knn, ids).float(), -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(whole, want, rtol=1e-5, atol=1e-5)
    session = knn.session()
    pieces = [knn.score(session, ids[:16]), knn.score(session, ids[16:20]), knn.score(session, ids[20:])]
    assert [len(p) for p in pieces] == [15, 4, 30]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-5)
    assert len(knn.score(session, [])) == 0


def test_memory_holds_what_left_the_window_and_no_more_than_its_limit(tiny_base: Base) -> None:
    knn = KnnAttention(tiny_base.model, window=16, chunk=4, layers=(0, 1), memory_tokens=20)
    session = knn.session()
    for at, length in ((0, 16), (16, 30), (46, 30)):
        knn.score(session, text(76)[at : at + length])
        assert session.local <= 16 and session.position == at + length
        assert session.remembered == min(20, session.position - session.local)
    assert session.bytes_held >= 2 * 2 * (16 + 20) * 2 * 8 * 4  # keys and values, layers, tokens, heads, width, fp32


def test_a_key_that_left_the_window_is_what_it_was_before_rope() -> None:
    model, ids = wide_model(), text(40)
    knn = KnnAttention(model, window=8, chunk=4, layers=(0,))
    session = knn.session()
    for _ in knn.read(session, ids):
        pass
    layer = model.base_model.layers[0]
    states = layer.input_layernorm(model.base_model.embed_tokens(torch.tensor(ids)))
    want = layer.self_attn.k_proj(states).view(40, 2, 8).transpose(0, 1)[:, :32]
    torch.testing.assert_close(session.layers[0].past.keys.all, want, rtol=1e-5, atol=1e-5)
    assert not len(session.layers[1].past)


def test_sessions_do_not_see_each_other(tiny_base: Base) -> None:
    knn = KnnAttention(tiny_base.model, window=16, chunk=4, layers=(0, 1))
    a, b = knn.session(), knn.session()
    first = knn.score(a, text(40, seed=1))
    knn.score(b, text(40, seed=2))
    assert torch.equal(knn.score(knn.session(), text(40, seed=1)), first)
    alone = knn.session()
    knn.score(alone, text(40, seed=1))
    assert torch.equal(knn.score(a, text(9, seed=3)), knn.score(alone, text(9, seed=3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_session_is_taken_up_again(tmp_path: Path, dtype: torch.dtype) -> None:
    model, path = tiny_model().to(dtype).requires_grad_(False), tmp_path / "sessions" / "one"
    knn = KnnAttention(model, window=16, chunk=4, layers=(1,))
    session = knn.session()
    write_session(session, path, "a" * 64)
    assert read_session(path, "a" * 64).position == 0
    knn.score(session, text(40))
    write_session(session, path, "a" * 64)
    again = read_session(path, "a" * 64)
    assert (again.position, again.local, again.remembered) == (40, 16, 24)
    assert torch.equal(knn.score(again, text(20, seed=2)), knn.score(session, text(20, seed=2)))
    with pytest.raises(ForeignMemoryError, match=r"aaaaaaaaaaaa.*bbbbbbbbbbbb"):
        read_session(path, "b" * 64)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StoreError, match="no sound session"):
        read_session(path, "a" * 64)


def test_a_session_whose_keys_were_kept_wider_is_taken_up_as_if_they_had_not(tmp_path: Path) -> None:
    """Earlier files hold the keys beyond the window in fp32."""
    model, ids = tiny_model().to(torch.bfloat16).requires_grad_(False), text(300)
    knn = KnnAttention(model, window=16, chunk=4, layers=(1,))
    session = knn.session()
    knn.score(session, ids)
    earlier = copy.deepcopy(session)
    past = session.layers[1].past
    earlier.layers[1].past = Past(past.keys.all.float(), past.values.all)
    write_session(earlier, tmp_path / "one", "a" * 64)
    again = read_session(tmp_path / "one", "a" * 64)
    assert again.layers[1].past.blocks == past.blocks == 4
    assert torch.equal(knn.score(again, text(20, seed=2)), knn.score(session, text(20, seed=2)))


@pytest.mark.parametrize("form", ["joint", "gated"])
def test_bias_and_temperature_can_be_trained(form: Any) -> None:
    """In the last layer the gradient is whole; below it, what later chunks read of earlier ones is taken as given."""
    model, ids = wide_model(), text(40)
    knn = KnnAttention(model, window=8, chunk=4, form=form, layers=(1,))
    heads = knn.plain_heads()
    wanted = [*heads.bias.values(), *heads.log_temperature.values()]
    for parameter in wanted:
        parameter.requires_grad_(True)
    knn.heads = heads
    torch.autograd.backward(knn.score(knn.session(), ids).sum())
    for parameter in wanted:
        assert parameter.grad is not None
        step = 1e-2 * torch.eye(4)[1].to(parameter)
        with torch.no_grad():
            sums = []
            for sign in (1, -1):
                parameter += sign * step
                sums.append(float(knn.score(knn.session(), ids).double().sum()))
                parameter -= sign * step
        assert math.isclose(float(parameter.grad[1]), (sums[0] - sums[1]) / 2e-2, rel_tol=0.01, abs_tol=5e-3)


def test_layers_by_default() -> None:
    assert layers_of(30, "joint") == tuple(range(2, 30)) and layers_of(30, "gated") == (18,)
    assert layers_of(2, "joint") == (1,)


def test_what_it_cannot_do_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="does not fit"):
        KnnAttention(model, window=8, chunk=9)
    with pytest.raises(ValueError, match="nothing to continue"):
        knn = KnnAttention(model)
        knn.generate(knn.session(), 3)
    model.base_model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ModelError, match="RoPE of fixed"):
        KnnAttention(model)


def test_rows_grow_and_shrink_without_mixing() -> None:
    rows, want = Rows(), torch.zeros(2, 0, 3)
    generator = torch.Generator().manual_seed(0)
    for at in range(60):
        new = torch.randn(2, 1 + at % 13, 3, generator=generator)
        rows.append(new)
        want = torch.cat([want, new], 1)
        if at % 3 == 2:
            gone = min(len(rows), 17)
            assert torch.equal(rows.take(gone), want[:, :gone])
            want = want[:, gone:]
        assert torch.equal(rows.all, want) and len(rows) == want.shape[1]


def test_turning_by_minus_the_position_undoes_rope() -> None:
    x, angles = (
        torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)),
        torch.arange(5.0)[:, None] * torch.ones(8),
    )
    back = rotated(rotated(x, angles.cos(), angles.sin()), angles.cos(), -angles.sin())
    torch.testing.assert_close(back, x)
