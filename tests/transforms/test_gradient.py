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
from jaxvqa.geometry import for_crop, for_pad, for_squash
from jaxvqa.transforms.gradient import (
    attention_gradient,
    gradient_length,
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
    detail = high_pass(picture(case), (case["res"], case["res"]))
    assert detail.shape == (case["res"], case["res"]) and detail.dtype == np.float32
    assert np.median(detail) == pytest.approx(case["median"], abs=1e-6)
    assert detail.mean() == pytest.approx(case["mean"], abs=1e-6)
    if "reduced" in case:
        cells = case["res"] // 14
        sums = detail.reshape(cells, 14, cells, 14).sum((1, 3))
        np.testing.assert_allclose(sums, case["reduced"], atol=2e-4)


def test_the_releases_mask_is_what_lies_above_the_median_of_the_squashed_image():
    case = GOLDEN["cases"][2]
    image, side = picture(case), case["res"]
    mask = high_pass_mask(image, for_squash(*image.size, side, (16, 16)))
    assert mask.dtype == bool and mask.mean() == pytest.approx(case["frac_above_median"], abs=1e-4)
    np.testing.assert_array_equal(mask, high_pass(image, (side, side)) > case["median"])


VIEWS = {"pad": for_pad, "crop": for_crop, "squash": for_squash}


@pytest.mark.parametrize("view", VIEWS)
def test_a_plain_image_has_no_detail(view):
    assert not high_pass_mask(Image.new("L", (30, 20), 7), VIEWS[view](30, 20, 28, (2, 2))).any()


def test_the_mask_lies_where_the_encoder_sees_the_image_and_padding_has_no_part_in_it():
    """At full size, so that nothing is resampled: 56 x 28 in the middle of a square of 56."""
    image = picture({"size": [56, 28], "seed": 3})
    mask = high_pass_mask(image, for_pad(56, 28, 56, (4, 4)))
    detail = high_pass(image, (56, 28))
    np.testing.assert_array_equal(mask[14:42], detail > np.median(detail))
    assert not mask[:14].any() and not mask[42:].any() and 0.45 < mask[14:42].mean() <= 0.5


def test_the_mask_of_a_cropped_image_is_that_of_the_crop():
    image = picture({"size": [112, 56], "seed": 3})
    mask = high_pass_mask(image, for_crop(112, 56, 56, (4, 4)))
    detail = high_pass(image.crop((28, 0, 84, 56)), (56, 56))
    np.testing.assert_array_equal(mask, detail > np.median(detail))


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(list(VIEWS)))
def test_images_of_any_shape_have_a_mask(width, height, view):
    geometry = VIEWS[view](width, height, 28, (2, 2))
    image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))
    mask = high_pass_mask(image, geometry)
    assert mask.shape == (28, 28) and mask.sum() <= 28 * 28 / 2
    x, y = np.clip(geometry.to_encoder(np.array([(0, 0), image.size])).T, 0, 28)
    rows, columns = np.nonzero(mask)  # a pixel that the image only touches is part of it
    assert (rows > y[0] - 1).all() and (rows < y[1]).all() and (columns > x[0] - 1).all() and (columns < x[1]).all()


E, CELL = (6, 8), 2


def gradients(elements=moderate):
    return arrays(np.float32, (*E, 3), elements=elements)


def lengths(batch=()):
    """Lengths of two gradients, and a mask."""
    length = arrays(np.float32, (*batch, *E), elements=finite.map(abs))
    return st.tuples(length, length, arrays(bool, (*batch, *E)))


@given(gradients(finite))
def test_the_length_of_a_gradient_is_euclidean(gradient):
    ours = gradient_length(gradient)
    assert ours.shape == E and ours.dtype == jnp.float32
    expected = np.minimum(np.sqrt(np.square(gradient.astype(np.float64)).sum(-1)), np.finfo(np.float32).max)
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-37)


def test_tiny_and_huge_gradients_keep_their_length():
    """Their squares are not float32 numbers."""
    for scale in (1e-30, 1e30):
        ours = gradient_length(np.full((*E, 3), scale, np.float32))
        np.testing.assert_allclose(ours, np.full(E, 3**0.5 * scale), rtol=1e-6)


def pixel_reference(question, general, mask):
    known = general >= np.finfo(np.float32).tiny
    ratio = np.where(known & mask, question.astype(np.float64) / np.where(known, general, 1), 0)
    ratio = np.minimum(ratio, np.finfo(np.float32).max)
    out = np.zeros((E[0] // CELL, E[1] // CELL))
    for y, x in np.ndindex(out.shape):
        out[y, x] = ratio[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL].mean()
    return out


@given(lengths())
def test_the_pixel_map_is_the_masked_ratio_of_lengths_and_finite(case):
    ours = np.asarray(pixel_gradient_map(*case, CELL))
    assert ours.dtype == jnp.float32 and np.isfinite(ours).all()
    np.testing.assert_allclose(ours, pixel_reference(*case), rtol=2e-6, atol=1e-37)


def in_cells(*pixels):
    return pixel_gradient_map(*pixels, CELL)


@given(lengths(batch=(3,)), st.permutations(range(3)))
def test_pixel_maps_of_a_batch_do_not_mix(case, order):
    assert_batched(in_cells, *case, order=order, rtol=2e-6, atol=1e-37)
