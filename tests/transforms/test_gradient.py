"""Gradient maps against NumPy loops, finite differences and the released high-pass map."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from batched import assert_batched
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from jaxvqa.errors import UserError
from jaxvqa.transforms.gradient import (
    attention_gradient,
    gradient_map,
    high_pass,
    high_pass_mask,
    match_layer,
    pixel_gradient_map,
    text_rows,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "vicrop_highpass.json").read_text())
SHAPE = (4, 3, 2, 5)
"""Heads, rows, grid."""
GRID = SHAPE[2:]
seeds = st.integers(0, 2**31 - 1)
finite = st.floats(width=32, allow_infinity=False, allow_nan=False)
moderate = st.floats(-4, 4, width=32)
RELU = ["sum", "grad"]


# ---- ∂y/∂A ----


@given(seeds, st.sampled_from([1, 2, 4]))
def test_the_gradient_to_the_attention_is_that_of_finite_differences(seed, kv_heads):
    """y = Σ c·tanh(A V); four query heads share the value heads in runs."""
    rng = np.random.default_rng(seed)
    R, N, S, H = 2, 4, 5, 3
    values = rng.standard_normal((S, kv_heads, H))
    attention = rng.random((N, R, S))
    weigh = rng.standard_normal((R, N, H))

    def outputs(attention):
        out = np.zeros((R, N, H))
        for n in range(N):
            out[:, n] = attention[n] @ values[:, n * kv_heads // N]
        return out

    to_outputs = weigh * (1 - np.tanh(outputs(attention)) ** 2)
    ours = attention_gradient(to_outputs.astype(np.float32), values.astype(np.float32))
    assert ours.shape == (N, R, S) and ours.dtype == jnp.float32
    for at in np.ndindex(N, R, S):
        ends = []
        for step in (1e-5, -1e-5):
            moved = attention.copy()
            moved[at] += step
            ends.append((weigh * np.tanh(outputs(moved))).sum())
        assert ours[at] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-5)


@given(seeds, st.permutations(range(3)))
def test_gradients_of_a_batch_do_not_mix(seed, order):
    rng = np.random.default_rng(seed)
    head_gradient = rng.standard_normal((3, 2, 4, 3)).astype(np.float32)
    values = rng.standard_normal((3, 5, 2, 3)).astype(np.float32)
    assert_batched(attention_gradient, head_gradient, values, order=order, atol=1e-6)


# ---- ∂y/∂A ⊙ A ----


def reference(attention, gradient, rows, relu):
    """HiPerson Eq. 4 and LAVIS, as loops in float64."""
    N, R, h, w = attention.shape
    total = np.zeros((h, w))
    for r in range(R):
        if not rows[r]:
            continue
        one = np.zeros((h, w))
        for n in range(N):
            a, g = attention[n, r].astype(np.float64), gradient[n, r].astype(np.float64)
            one += a * (np.maximum(g, 0) if relu == "grad" else g)
        total += np.maximum(one, 0) if relu == "sum" else one / N
    return total / max(1, sum(rows))


def inputs(elements=moderate, batch=()):
    return st.tuples(
        arrays(np.float32, (*batch, *SHAPE), elements=st.floats(0, 1, width=32)),
        arrays(np.float32, (*batch, *SHAPE), elements=elements),
        arrays(bool, (*batch, SHAPE[1])),
    )


@given(inputs(), st.sampled_from(RELU))
def test_the_map_is_the_equation(case, relu):
    ours = gradient_map(*case, relu=relu)
    assert ours.shape == GRID and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, reference(*case, relu), rtol=1e-5, atol=1e-6)


@given(inputs(), st.sampled_from(RELU))
def test_all_rows_count_where_none_are_named(case, relu):
    attention, gradient, _ = case
    expected = reference(attention, gradient, [True] * SHAPE[1], relu)
    np.testing.assert_allclose(gradient_map(attention, gradient, relu=relu), expected, rtol=1e-5, atol=1e-6)


def test_the_two_orders_differ_where_heads_disagree():
    """One head in favour of a cell, one as much against it: Eq. 4 keeps nothing, LAVIS half."""
    attention, gradient = np.ones((2, 1, 1, 1), np.float32), np.float32([1, -1]).reshape(2, 1, 1, 1)
    assert float(gradient_map(attention, gradient, relu="sum")[0, 0]) == 0
    assert float(gradient_map(attention, gradient, relu="grad")[0, 0]) == 0.5


@given(inputs(finite), st.sampled_from(RELU))
def test_the_map_is_finite_and_not_negative_for_every_finite_gradient(case, relu):
    ours = np.asarray(gradient_map(*case, relu=relu))
    assert np.isfinite(ours).all() and (ours >= 0).all()


@pytest.mark.parametrize("relu", RELU)
def test_the_largest_gradients_do_not_overflow(relu):
    attention, gradient = np.ones(SHAPE, np.float32), np.full(SHAPE, np.finfo(np.float32).max)
    assert np.isfinite(gradient_map(attention, gradient, relu=relu)).all()
    gradient[::2] *= -1
    assert np.isfinite(gradient_map(attention, gradient, relu=relu)).all()


@given(inputs(), st.permutations(range(4)), st.sampled_from(RELU))
def test_the_order_of_heads_does_not_matter_and_rows_that_do_not_count_are_not_read(case, order, relu):
    attention, gradient, rows = case
    whole = gradient_map(*case, relu=relu)
    shuffled = gradient_map(attention[order], gradient[order], rows, relu=relu)
    np.testing.assert_allclose(shuffled, whole, rtol=1e-5, atol=1e-6)
    other = np.where(rows[:, None, None], gradient, 7).astype(np.float32)
    np.testing.assert_array_equal(gradient_map(attention, other, rows, relu=relu), whole)


def test_no_row_and_no_gradient_give_zeros():
    attention = np.ones(SHAPE, np.float32)
    np.testing.assert_array_equal(gradient_map(attention, attention, np.zeros(3, bool)), np.zeros(GRID))
    np.testing.assert_array_equal(gradient_map(attention, 0 * attention), np.zeros(GRID))


PARTIAL = {relu: functools.partial(gradient_map, relu=relu) for relu in RELU}


@given(inputs(batch=(3,)), st.permutations(range(3)), st.sampled_from(RELU))
def test_maps_of_a_batch_do_not_mix(case, order, relu):
    assert_batched(PARTIAL[relu], *case, order=order, rtol=1e-5, atol=1e-6)


def test_half_precision_is_weighted_in_float32():
    rng = np.random.default_rng(0)
    case = [rng.standard_normal(SHAPE).astype(jnp.bfloat16) for _ in range(2)]
    ours = gradient_map(*map(jnp.asarray, case))
    np.testing.assert_array_equal(ours, gradient_map(*[x.astype(np.float32) for x in case]))
    pair = [rng.standard_normal(s).astype(jnp.bfloat16) for s in ((2, 4, 3), (5, 2, 3))]
    ours = attention_gradient(*map(jnp.asarray, pair))
    np.testing.assert_array_equal(ours, attention_gradient(*[x.astype(np.float32) for x in pair]))


def test_an_unknown_order_is_refused():
    with pytest.raises(UserError, match="relu='both'; expected 'sum' or 'grad'"):
        gradient_map(np.ones(SHAPE, np.float32), np.ones(SHAPE, np.float32), relu="both")


# ---- which layer and which rows of a matching model ----


def test_the_last_layer_with_the_mean_over_tokens_is_refused():
    for layer in (-1, 11):
        with pytest.raises(UserError, match=r"only the \[ENC\] row has a gradient"):
            match_layer(layer, 12, "tokens_mean")
        assert match_layer(layer, 12, "enc") == 11
    assert match_layer(6, 12, "tokens_mean") == match_layer(-6, 12, "tokens_mean") == 6


@pytest.mark.parametrize("layer", [12, -13])
def test_a_layer_that_does_not_exist_is_refused(layer):
    with pytest.raises(UserError, match="has layers 0 to 11"):
        match_layer(layer, 12, "enc")


def test_the_rows_of_a_text_are_its_first_or_its_own_tokens():
    """Lengths count [ENC] and [SEP]; a text without a token of its own has no rows."""
    lengths = np.array([5, 3, 2], np.int32)
    np.testing.assert_array_equal(text_rows("enc", lengths, 6), [[1, 0, 0, 0, 0, 0]] * 3)
    expected = [[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(text_rows("tokens_mean", lengths, 6), expected)
    np.testing.assert_array_equal(text_rows("tokens_mean", lengths[:1], 6)[0], expected[0])
    with pytest.raises(UserError, match="expected 'enc' or 'tokens_mean'"):
        text_rows("all", lengths, 6)


# ---- pure_grad ----


def picture(case):
    """The synthetic image of a golden case."""
    W, H = case["size"]
    random = np.random.RandomState(case["seed"])
    blocks = random.randint(0, 256, (H // 25 + 1, W // 25 + 1, 3))
    pixels = blocks.repeat(25, 0).repeat(25, 1)[:H, :W] + random.randint(-20, 21, (H, W, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: "x".join(map(str, case["size"])))
def test_the_high_pass_map_is_that_of_the_release(case):
    detail = high_pass(picture(case), case["res"])
    assert detail.shape == (case["res"], case["res"]) and detail.dtype == np.float32
    assert np.median(detail) == pytest.approx(case["median"], abs=1e-6)
    assert detail.mean() == pytest.approx(case["mean"], abs=1e-6)
    if "reduced" in case:
        cells = case["res"] // 14
        sums = detail.reshape(cells, 14, cells, 14).sum((1, 3))
        np.testing.assert_allclose(sums, case["reduced"], atol=2e-4)


def test_the_mask_is_what_lies_above_the_median():
    case = GOLDEN["cases"][2]
    mask = high_pass_mask(picture(case), case["res"])
    assert mask.dtype == bool and mask.mean() == pytest.approx(case["frac_above_median"], abs=1e-4)
    np.testing.assert_array_equal(mask, high_pass(picture(case), case["res"]) > case["median"])
    assert not high_pass_mask(Image.new("L", (30, 20), 7), 28).any()  # no pixel of a plain image has detail


E, CELL = (6, 8), 2


def pixels(elements=moderate, batch=()):
    gradients = arrays(np.float32, (*batch, *E, 3), elements=elements)
    return st.tuples(gradients, gradients, arrays(bool, (*batch, *E)))


def pixel_reference(question, general, mask):
    lengths = [np.sqrt((np.float64(g) ** 2).sum(-1)) for g in (question, general)]
    known = lengths[1] >= np.finfo(np.float32).tiny
    ratio = np.where(known & mask, lengths[0] / np.where(known, lengths[1], 1), 0)
    ratio = np.minimum(ratio, np.finfo(np.float32).max)
    out = np.zeros((E[0] // CELL, E[1] // CELL))
    for y, x in np.ndindex(out.shape):
        out[y, x] = ratio[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL].mean()
    return out


@given(pixels())
def test_the_pixel_map_is_the_masked_ratio_of_lengths(case):
    ours = pixel_gradient_map(*case, CELL)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, pixel_reference(*case), rtol=2e-6, atol=1e-37)


@given(pixels(finite))
def test_the_pixel_map_is_finite_for_every_finite_gradient(case):
    ours = np.asarray(pixel_gradient_map(*case, CELL))
    assert np.isfinite(ours).all() and (ours >= 0).all()


def test_tiny_and_huge_gradients_keep_their_ratio():
    """Their squares are not float32 numbers."""
    gradient, mask = np.ones((*E, 3), np.float32), np.ones(E, bool)
    for scale in (1e-30, 1e30):
        ours = pixel_gradient_map(np.float32(3 * scale) * gradient, np.float32(scale) * gradient, mask, CELL)
        np.testing.assert_allclose(ours, np.full((3, 4), 3), rtol=1e-6)


def in_cells(*pixels):
    return pixel_gradient_map(*pixels, CELL)


@given(pixels(batch=(3,)), st.permutations(range(3)))
def test_pixel_maps_of_a_batch_do_not_mix(case, order):
    assert_batched(in_cells, *case, order=order, rtol=2e-6, atol=1e-37)
