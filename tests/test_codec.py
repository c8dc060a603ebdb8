"""What is kept of a key: nothing new by keeping it again, and distances that stay what they are."""

from __future__ import annotations

import numpy as np
import pytest

from gradatim.memory.codec import Codec, Floats, halves, nibbles


def unit(count: int, width: int, seed: int) -> Floats:
    x = np.random.default_rng(seed).standard_normal((count, width))
    keys: Floats = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return keys


@pytest.mark.parametrize("codec", [halves(576), nibbles(576), nibbles(8), nibbles(2048), halves(1152)])
def test_keeping_what_is_kept_changes_nothing(codec: Codec) -> None:
    codes = codec.encode(unit(200, codec.width, 0))
    assert codes.shape == (200, codec.code_bytes)
    np.testing.assert_array_equal(codec.pack(codec.decode(codes)), codes)
    assert not codec.decode(codec.pack(np.zeros((3, codec.dims), np.float32))).any()


def test_a_key_does_not_depend_on_those_beside_it() -> None:
    keys = unit(500, 576, 1)
    codec = nibbles(576)
    np.testing.assert_array_equal(codec.encode(keys)[17:18], codec.encode(keys[17:18]))


def test_half_precision_keeps_the_very_numbers() -> None:
    keys = unit(50, 576, 2).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(halves(576).decode(halves(576).encode(keys)), keys)


def test_four_bits_keep_distances_near_and_far() -> None:
    """Also of keys that differ in a few numbers only, as the states of one model do."""
    codec, queries = nibbles(576), unit(2000, 576, 3)
    near = np.zeros_like(queries)
    near[:, :20] = 0.15 * np.random.default_rng(4).standard_normal((2000, 20))
    near = queries + near
    for other in (near / np.linalg.norm(near, axis=1, keepdims=True), unit(2000, 576, 5)):
        exact = np.square(queries - other).sum(1)
        kept = np.square(codec.seen(queries) - codec.decode(codec.encode(other))).sum(1)
        assert abs((kept - exact).mean() - 0.012) < 0.06 * exact.mean()  # rounding adds a hundredth
        assert (kept - exact).std() < 0.02 + 0.03 * exact.mean()


def test_a_million_tokens_of_the_bundled_model_fit_into_300_mb() -> None:
    a_row = nibbles(576).code_bytes + 8 + 4 + 1  # code, row number, token, whether it may be found
    assert a_row * 10**6 <= 280e6  # what is left is for the lists' centres and the sources' names


def test_the_rotation_is_the_same_everywhere() -> None:
    """Codes on disk were made with it."""
    rotation = nibbles(16)._rotation
    assert rotation is not None and rotation.shape == (16, 8)
    np.testing.assert_allclose(rotation.T @ rotation, 2 * np.eye(8), atol=1e-5)
    np.testing.assert_allclose(rotation[0, :3], (0.056354, -0.056510, 0.236325), atol=1e-6)
