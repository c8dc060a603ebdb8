"""Searching by blocks: against the definition in float64, and how much of exact attention it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradatim.nn.nearest import BLOCKS, best_blocks, beyond, joint, within
from gradatim.nn.session import BLOCK_TOKENS, Past
from tests.far_reference import attended

HEADS, SHARED, WIDTH, SCALE = 6, 2, 16, 0.25  # query heads, key heads


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def past(tokens: int, seed: int, scale: float = 1.0) -> Past:
    """Blocks that differ from each other more than the tokens in them, as those of texts do."""
    topics = 2 * draw(SHARED, -(-tokens // BLOCK_TOKENS), WIDTH, seed=seed + 100).repeat_interleave(BLOCK_TOKENS, 1)
    keys = scale * (topics[:, :tokens] + draw(SHARED, tokens, WIDTH, seed=seed))
    return Past(keys, draw(SHARED, tokens, WIDTH, seed=seed + 1))


def defined(q: Tensor, keys: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Token by token and head by head, (H, n, E) and (H, n)."""
    out, total = torch.zeros_like(q), torch.zeros(q.shape[:2], dtype=q.dtype)
    for head in range(HEADS):
        of = head // (HEADS // SHARED)
        for t in range(q.shape[1]):
            mine = q[of * (HEADS // SHARED) : (of + 1) * (HEADS // SHARED), t]
            at = attended(mine, keys[of], count)
            scores = keys[of, at] @ q[head, t] * SCALE
            out[head, t], total[head, t] = scores.softmax(0) @ values[of, at], scores.logsumexp(0)
    return out, total


@pytest.mark.parametrize("n", [1, 5, 16, 37])
@pytest.mark.parametrize("tokens", [3, 2 * BLOCK_TOKENS, 9 * BLOCK_TOKENS, 12 * BLOCK_TOKENS + 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_what_the_definition_says(n: int, tokens: int, dtype: torch.dtype) -> None:
    wide, q = past(tokens, 1), draw(HEADS, n, WIDTH, seed=3)
    got = beyond(q.to(dtype), [Past(wide.keys.all.to(dtype), wide.values.all.to(dtype))], SCALE)
    for one, other in zip(got, defined(q, wide.keys.all, wide.values.all, BLOCKS), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_stretches_that_end_with_whole_blocks_are_one() -> None:
    q, parts = draw(HEADS, 21, WIDTH, seed=3), [past(BLOCK_TOKENS * k, k) for k in (5, 1, 6)]
    whole = Past(*(torch.cat([getattr(p, name).all for p in parts], 1) for name in ("keys", "values")))
    for one, other in zip(beyond(q, parts, SCALE), beyond(q, [whole], SCALE), strict=True):
        torch.testing.assert_close(one, other)


def test_a_query_takes_nothing_from_those_beside_it() -> None:
    q, far = draw(HEADS, 40, WIDTH, seed=4), [past(12 * BLOCK_TOKENS + 3, 1)]
    whole = beyond(q, far, SCALE)
    for cut in (slice(0, 7), slice(7, 39), slice(39, 40)):
        for one, other in zip(beyond(q[:, cut], far, SCALE), whole, strict=True):
            torch.testing.assert_close(one, other[:, cut])


def test_with_gradients_it_is_the_same() -> None:
    q, far = draw(HEADS, 20, WIDTH, seed=4), [past(12 * BLOCK_TOKENS + 3, 1)]
    for one, other in zip(beyond(q.clone().requires_grad_(), far, SCALE), beyond(q, far, SCALE), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("n", [1, 9])
def test_one_softmax_over_window_and_beyond(n: int) -> None:
    q, turned = draw(HEADS, n, WIDTH, seed=5), draw(HEADS, n, WIDTH, seed=6)
    keys, values, far = draw(SHARED, 30, WIDTH, seed=7), draw(SHARED, 30, WIDTH, seed=8), past(2 * BLOCK_TOKENS, 1)
    out, share = joint(within(q, keys, values, SCALE), beyond(turned, [far], SCALE), 0.3)
    for head in range(HEADS):
        of = head // (HEADS // SHARED)
        for t in range(n):
            m = 30 - n + t + 1
            scores = torch.cat([keys[of, :m] @ q[head, t] * SCALE, far.keys.all[of] @ turned[head, t] * SCALE + 0.3])
            weights = scores.softmax(0)
            torch.testing.assert_close(share[head, t], weights[m:].sum())
            torch.testing.assert_close(out[t, head], weights @ torch.cat([values[of, :m], far.values.all[of]]))


def test_recall_of_the_best_keys_and_of_their_weight() -> None:
    """Where queries seek what some block is about: the best key is in a block that is looked at, and most of the
    weight that attention to all keys would spend."""
    far, n = past(128 * BLOCK_TOKENS, 1, scale=0.7), 64
    blocks = torch.randint(1, 128, (SHARED, n), generator=torch.Generator().manual_seed(9))
    sought = far.means.all.gather(1, blocks[..., None].expand(-1, -1, WIDTH))  # (KH, n, E)
    q = sought.repeat_interleave(HEADS // SHARED, 0) + 0.25 * draw(HEADS, n, WIDTH, seed=2)
    seen = torch.zeros(SHARED, n, 128, dtype=torch.bool)
    seen.scatter_(2, best_blocks(q.view(SHARED, -1, n, WIDTH), [far], BLOCKS), True)
    scores = q @ far.keys.all.repeat_interleave(HEADS // SHARED, 0).transpose(1, 2)  # (H, n, M)
    looked_at = seen.repeat_interleave(BLOCK_TOKENS, -1).repeat_interleave(HEADS // SHARED, 0)
    assert float(looked_at.gather(2, scores.argmax(-1, keepdim=True)).double().mean()) >= 0.9
    assert float((scores.softmax(-1) * looked_at).sum(-1).mean()) >= 0.9


def test_blocks_are_summed_up_as_they_fill_and_go_as_wholes() -> None:
    whole, grown = past(5 * BLOCK_TOKENS + 9, 1), Past()
    for start in range(0, len(whole), 7):
        grown.append(whole.keys.all[:, start : start + 7], whole.values.all[:, start : start + 7])
        assert grown.blocks == len(grown) // BLOCK_TOKENS
    torch.testing.assert_close(grown.means.all, whole.means.all)
    want = whole.keys.all.clone()
    assert (grown.drop(0), grown.drop(1), grown.drop(BLOCK_TOKENS + 1)) == (0, BLOCK_TOKENS, 2 * BLOCK_TOKENS)
    assert grown.blocks == 2 and torch.equal(grown.keys.all, want[:, 3 * BLOCK_TOKENS :])
    torch.testing.assert_close(grown.means.all, Past(grown.keys.all, grown.values.all).means.all)
    assert grown.drop(2 * BLOCK_TOKENS + 4) == 2 * BLOCK_TOKENS + 4 and len(grown) == 5 and grown.drop(99) == 5
