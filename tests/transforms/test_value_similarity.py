"""FOCUS's relevance map, against figures worked out by hand and the S x S computation that it avoids."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvqa.transforms.value_similarity import relevance, value_similarity

# As methods run them; a scan outside of a program would compile at every call.
value_similarity = jax.jit(value_similarity, static_argnames="norm")
relevance = jax.jit(relevance, static_argnames="clip_negative")

# Two layers, six tokens, two heads of size 2: each value is a unit vector at this angle (degrees). 0-3 are the image.
ANGLES = {
    "A": ((0, 30, 60, 90, 0, 45), (0, 0, 90, 180, 30, 90)),
    "B": ((10, 20, 30, 40, 20, 30), (0, 90, 45, 0, 0, 60)),
}
# Of tokens 4 and 5, divided by its sum.
TOKENS = {
    ("A", "row"): ((0.5, 0.464102, 0.267949, -0.232051), (0.1627, 0.222253, 0.452346, 0.1627)),
    ("A", "column"): ((1.239627, 1.006853, 0.562307, -1.808787), (0.129994, 0.155387, 0.305918, 0.408702)),
    ("AB", "row"): ((0.388178, 0.289137, 0.261109, 0.061576), (0.190252, 0.250582, 0.365290, 0.193877)),
    ("AB", "column"): ((0.545152, 0.392009, 0.322676, -0.259837), (0.165130, 0.224189, 0.288269, 0.322411)),
}
RELEVANCE = {
    ("A", "row"): (0.266108, 0.337411, 0.396481, 0),
    ("A", "column"): (0.329123, 0.319540, 0.351337, 0),
    ("AB", "row"): (0.291186, 0.285670, 0.376073, 0.047070),
    ("AB", "column"): (0.332275, 0.324388, 0.343337, 0),
}


def values_at(layers: str) -> np.ndarray:
    angles = np.deg2rad([ANGLES[layer] for layer in layers])
    return np.stack([np.cos(angles), np.sin(angles)], -1).transpose(0, 2, 1, 3).astype(np.float32)


def random_values(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.4, 1, (2, 9, 2, 4)).astype(np.float32)


@pytest.mark.parametrize(("layers", "norm"), RELEVANCE)
def test_maps_are_those_worked_out_by_hand(layers, norm):
    maps = value_similarity(values_at(layers), np.array([4, 5]), np.ones(6, bool), norm)
    image = np.asarray(maps)[:, :4]
    np.testing.assert_allclose(image / image.sum(1, keepdims=True), TOKENS[layers, norm], atol=2e-6)
    found = relevance(image.reshape(2, 2, 2)).reshape(4)
    np.testing.assert_allclose(found, RELEVANCE[layers, norm], atol=2e-6)
    kept = np.prod(TOKENS[layers, norm], axis=0)
    found = relevance(image.reshape(2, 2, 2), clip_negative=False).reshape(4)
    np.testing.assert_allclose(found, kept / np.abs(kept).sum(), atol=2e-6)


@given(st.integers(0, 99), st.sampled_from(["row", "column"]))
def test_rows_are_those_of_the_whole_matrix(seed, norm):
    values = random_values(seed)
    unit = values.astype(np.float64) / np.linalg.norm(values, axis=-1, keepdims=True)
    ratio = 0
    for layer in unit:
        alike = (np.einsum("IKH,JKH->IJ", layer, layer) + np.eye(9)) / 2
        sums = alike.sum(1)
        ratio = ratio + alike / (sums[:, None] if norm == "row" else sums[None, :])
    found = value_similarity(values, np.array([7, 2]), np.ones(9, bool), norm)
    np.testing.assert_allclose(found, ratio[[7, 2]], rtol=2e-3, atol=1e-4)


@given(st.integers(0, 99))
def test_lengths_of_values_do_not_matter(seed):
    values, every = random_values(seed), np.ones(9, bool)
    scale = np.random.default_rng(seed).uniform(0.1, 9, (2, 9, 2, 1)).astype(np.float32)
    first, second = (value_similarity(v, np.array([8]), every) for v in (values, values * scale))
    np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-5)


@given(st.integers(0, 99), st.sampled_from([0.0, 5.0, np.nan]))
def test_padding_changes_nothing(seed, filler):
    values = random_values(seed)
    wide = np.concatenate([values, np.full((2, 3, 2, 4), filler, np.float32)], axis=1)
    expected = value_similarity(values, np.array([7]), np.ones(9, bool))
    found = value_similarity(wide, np.array([7]), np.arange(12) < 9)
    np.testing.assert_allclose(found[:, :9], expected, rtol=1e-5, atol=1e-6)
    assert not np.asarray(found[:, 9:]).any()


@given(st.integers(0, 99), st.integers(1, 40))
def test_the_map_of_a_name_is_the_product_of_its_tokens(seed, tokens):
    """However many: 40 maps of a thousandth each would underflow."""
    maps = np.random.default_rng(seed).uniform(1e-3, 1.2e-3, (tokens, 3, 4)).astype(np.float32)
    log = np.log(maps.astype(np.float64)).sum(0)
    expected = np.exp(log - log.max())
    np.testing.assert_allclose(relevance(maps), expected / expected.sum(), rtol=1e-4)


def test_tokens_that_do_not_count_are_left_out():
    maps = np.random.default_rng(0).uniform(0.1, 1, (3, 2, 2)).astype(np.float32)
    np.testing.assert_allclose(relevance(maps, np.array([True, True, False])), relevance(maps[:2]), rtol=1e-6)


def test_a_token_that_leaves_no_cell_ends_the_product():
    first, second = np.array([[[4, 0], [0, 1]], [[1, 1], [1, 3]]], np.float32)
    nothing, last = np.zeros((2, 2), np.float32), np.array([[0, 0], [0, 1]], np.float32)
    expected = np.array([[4, 0], [0, 3]]) / 7
    np.testing.assert_allclose(relevance(np.stack([first, second, nothing, last])), expected, rtol=1e-6)
    np.testing.assert_allclose(relevance(nothing[None]), np.full((2, 2), 0.25))


@given(st.lists(st.floats(-2, 2, width=32), min_size=12, max_size=12), st.booleans())
def test_each_map_is_divided_by_its_sum_before_negative_values_are_cut(drawn, clip):
    """A sum below zero turns a map over: the pseudocode's division."""
    maps = np.array(drawn, np.float64).reshape(3, 2, 2)
    sums = maps.sum((1, 2), keepdims=True)
    if (np.abs(sums) < 1e-3).any():
        return
    divided = maps / sums
    expected = np.prod(np.maximum(divided, 0) if clip else divided, axis=0)
    if np.abs(expected).max() > 1e-6:
        found = relevance(maps.astype(np.float32), clip_negative=clip)
        np.testing.assert_allclose(found, expected / np.abs(expected).sum(), atol=1e-5)


def test_it_can_be_batched():
    maps = np.random.default_rng(0).uniform(0.1, 1, (4, 3, 2, 2)).astype(np.float32)
    np.testing.assert_allclose(jax.vmap(relevance)(maps), [relevance(m) for m in maps], rtol=1e-6)
