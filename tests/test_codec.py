"""What is kept of a key: nothing new by keeping it again, and distances that stay what they are."""

from __future__ import annotations

import numpy as np
import pytest

from gradatim.memory.codec import Codec, Floats, _spread, halves, nibbles
from gradatim.memory.key_space import standardised_by


def unit(count: int, width: int, seed: int) -> Floats:
    x = np.random.default_rng(seed).standard_normal((count, width))
    keys: Floats = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return keys


def axes(width: int, dims: int) -> Floats:
    drawn = np.random.default_rng(6).standard_normal((width, dims))
    return np.linalg.qr(drawn)[0].astype(np.float32)


@pytest.mark.parametrize(
    "codec", [halves(576), nibbles(axes(576, 512)), nibbles(axes(8, 8)), nibbles(axes(2048, 512)), halves(1152)]
)
def test_keeping_what_is_kept_changes_nothing(codec: Codec) -> None:
    codes = codec.encode(unit(200, codec.width, 0))
    assert codes.shape == (200, codec.code_bytes)
    np.testing.assert_array_equal(codec.pack(codec.decode(codes)), codes)
    assert not codec.decode(codec.pack(np.zeros((3, codec.dims), np.float32))).any()


def test_a_key_does_not_depend_on_those_beside_it() -> None:
    keys = unit(500, 576, 1)
    codec = nibbles(axes(576, 512))
    np.testing.assert_array_equal(codec.encode(keys)[17:18], codec.encode(keys[17:18]))


def test_half_precision_keeps_the_very_numbers() -> None:
    keys = unit(50, 576, 2).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(halves(576).decode(halves(576).encode(keys)), keys)


def test_four_bits_keep_distances_near_and_far() -> None:
    """Also of keys that differ in a few numbers only, as the states of one model do."""
    codec, queries = nibbles(axes(576, 576)), unit(2000, 576, 3)
    near = np.zeros_like(queries)
    near[:, :20] = 0.15 * np.random.default_rng(4).standard_normal((2000, 20))
    near = queries + near
    for other in (near / np.linalg.norm(near, axis=1, keepdims=True), unit(2000, 576, 5)):
        exact = np.square(queries - other).sum(1)
        kept = np.square(codec.seen(queries) - codec.decode(codec.encode(other))).sum(1)
        assert abs((kept - exact).mean()) < 0.015
        assert (kept - exact).std() < 0.02


def test_what_is_left_out_is_what_varies_least() -> None:
    """Keys that vary along 40 of 64 directions lose nothing where 56 are kept."""
    rng = np.random.default_rng(7)
    states = rng.standard_normal((3000, 40)) * np.linspace(2, 0.5, 40) @ axes(64, 40).T + 0.001 * rng.standard_normal(
        (3000, 64)
    )
    pooling = standardised_by(states[:1000])
    assert pooling.axes.shape == (64, 56)
    np.testing.assert_allclose(pooling.axes.T @ pooling.axes, np.eye(56), atol=2e-3)
    keys = pooling.keys(states[1000:])
    np.testing.assert_allclose(np.square(nibbles(pooling.axes).seen(keys)).sum(1), 1.0, atol=0.02)


def test_wide_states_keep_no_more_than_512_numbers() -> None:
    states = np.random.default_rng(8).standard_normal((600, 1024))
    assert nibbles(standardised_by(states).axes).code_bytes == 256
    with pytest.raises(ValueError, match="500 states are too few to find 512 axes"):
        standardised_by(states[:500])


def test_a_million_tokens_of_the_bundled_model_fit_into_300_mb() -> None:
    a_row = nibbles(axes(576, 512)).code_bytes + 20 + 8 + 4 + 1  # code, rough code, row, token, whether it may be found
    assert a_row * 10**6 <= 290e6  # what is left is for the lists' centres and the sources' names


def test_the_rotation_is_the_same_everywhere() -> None:
    """Codes on disk were made with it."""
    np.testing.assert_allclose(_spread(8).T @ _spread(8), np.eye(8), atol=1e-12)
    np.testing.assert_allclose(_spread(8)[0, :3], (0.048702, -0.067648, 0.436949), atol=1e-6)
