"""CoF's boxes: replies good and bad, the table of expanded boxes and cells, conversions to pixels."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvqa.errors import UserError
from jaxvqa.geometry import for_crop, for_pad, for_squash, from_padded, to_padded
from jaxvqa.regions.boxes import PRESETS, expand, from_pixels, parse, rasterise, select, to_pixels

GRID = (24, 24)
FIGURE_2 = '{"train_1": [0, 0.2, 0.6, 0.8], "train_2": [0.55, 0.35, 0.9, 0.7], "person": [0.8, 0.4, 1, 0.6]}'


def ground(reply, preset, alpha=1.0, grid=GRID, **changes):
    """From a reply to the mask."""
    options = {**PRESETS[preset], **changes}
    return select(parse(reply, 100, options.pop("parse")).boxes, grid, alpha, **options)


def ranges(mask):
    """(x first, x last, y first, y last) of a mask, or None."""
    y, x = np.nonzero(mask)
    return (x.min(), x.max(), y.min(), y.max()) if len(x) else None


# CoF, section 9: box, α, then cells and their number in the strict and in the default preset.
TABLE = [
    ((0.4, 0.4, 0.6, 0.6), 1.0, (9, 13, 9, 13), 25, (9, 13, 9, 13), 25),
    ((0.4, 0.4, 0.6, 0.6), 1.3, (8, 14, 8, 14), 49, (8, 14, 8, 14), 49),
    ((0.31, 0.2, 0.55, 0.8), 1.0, (0, 23, 0, 23), 576, (2, 16, 4, 18), 225),
    ((0.31, 0.2, 0.55, 0.8), 1.3, (0, 23, 0, 23), 576, (0, 18, 2, 20), 361),
    ((0.1, 0.1, 0.2, 0.2), 1.0, (2, 4, 2, 4), 9, (2, 4, 2, 4), 9),
    ((0.05, 0.5, 0.15, 0.55), 1.0, (1, 3, 10, 13), 12, (1, 3, 10, 13), 12),
    ((0.8, 0.4, 1.0, 0.6), 1.0, (18, 23, 9, 13), 30, (18, 23, 9, 13), 30),
    ((0.55, 0.35, 0.9, 0.7), 1.0, (12, 23, 8, 16), 108, (12, 20, 8, 16), 81),
    ((0.55, 0.35, 0.9, 0.7), 1.3, (11, 23, 6, 17), 156, (11, 21, 6, 17), 132),
    ((0.0, 0.2, 0.6, 0.8), 1.0, (0, 13, 0, 23), 336, (0, 13, 4, 18), 210),
    ((0.45, 0.3, 0.5, 0.7), 1.3, (0, 16, 0, 23), 408, (4, 16, 5, 17), 169),
    ((0.6, 0.4, 0.4, 0.6), 1.0, (9, 13, 9, 13), 25, (9, 13, 9, 13), 25),
    ((0.6, 0.6, 0.4, 0.4), 1.0, None, 0, (9, 13, 9, 13), 25),
    ((0.5, 0.5, 0.5, 0.5), 1.0, (11, 11, 11, 11), 1, (11, 11, 11, 11), 1),
    ((0.5, 0.5, 0.5, 0.5), 1.3, (11, 11, 11, 11), 1, (11, 11, 11, 11), 1),
]


@pytest.mark.parametrize(("box", "alpha", "strict", "strict_count", "default", "count"), TABLE)
def test_each_box_selects_the_cells_of_the_table(box, alpha, strict, strict_count, default, count):
    reply = f"The region is {list(box)}."
    mask = ground(reply, "strict", alpha)
    assert (ranges(mask), mask.sum()) == (strict, strict_count)
    mask = ground(reply, "default", alpha)
    assert (ranges(mask), mask.sum()) == (default, count)


def test_the_boxes_of_figure_2_select_their_union_or_the_only_one_that_the_release_reads():
    assert ground(FIGURE_2, "default").sum() == 288
    assert ground(FIGURE_2, "strict").sum() == 108
    assert ground(FIGURE_2, "default", multi_box="first").sum() == 210


def slow_mask(box, alpha, clamp, grid=GRID, square=True):
    """Section 5 of the specification, one number at a time."""
    x1, y1, x2, y2 = box
    cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) * alpha, (y2 - y1) * alpha
    if square:
        w = h = max(w, h)
    ends = []
    for centre, size, cells in ((cx, w, grid[1]), (cy, h, grid[0])):
        if clamp == "code":
            low = centre - size / 2 if centre - size > 0 else 0
            high = centre + size / 2 if centre + size < 1 else 1
        else:
            low, high = centre - size / 2, centre + size / 2
            if low < 0:
                low, high = low + -low, high + -low
            if high > 1:
                low, high = low - (high - 1), high - (high - 1)
            low, high = min(max(low, 0), 1), min(max(high, 0), 1)
        ends.append((int(low * (cells - 1)), int(high * (cells - 1))))
    (c1, c2), (r1, r2) = ends
    return np.array([[r1 <= r <= r2 and c1 <= c <= c2 for c in range(grid[1])] for r in range(grid[0])])


fraction = st.floats(0, 1).map(lambda value: round(value, 3))


@given(
    st.tuples(*[fraction] * 4),
    st.sampled_from([1.0, 1.3, 2.0]),
    st.sampled_from(["shift", "code"]),
    st.booleans(),
    st.sampled_from([(24, 24), (7, 16), (1, 1)]),
)
def test_masks_agree_with_the_specification_number_by_number(box, alpha, clamp, square, grid):
    ours = rasterise(expand(box, alpha, square=square, clamp=clamp), grid)
    np.testing.assert_array_equal(ours, slow_mask(box, alpha, clamp, grid, square))


@given(st.lists(st.tuples(*[fraction] * 4), min_size=1, max_size=4), st.sampled_from(["code", "cover"]))
def test_a_mask_of_several_boxes_is_the_union_of_theirs(boxes, raster):
    each = [select(box, GRID, 1.3, raster=raster) for box in boxes]
    np.testing.assert_array_equal(select(boxes, GRID, 1.3, raster=raster), np.any(each, axis=0))
    np.testing.assert_array_equal(select(boxes, GRID, 1.3, raster=raster, multi_box="first"), each[0])


@given(st.tuples(*[fraction] * 4), st.sampled_from([1.0, 1.3]))
def test_an_expanded_box_is_inside_and_moved_as_little_as_its_size_allows(box, alpha):
    x1, x2, y1, y2 = *sorted(box[::2]), *sorted(box[1::2])
    low_x, low_y, high_x, high_y = expand((x1, y1, x2, y2), alpha)
    size = min(max(x2 - x1, y2 - y1) * alpha, 1)
    assert (high_x - low_x, high_y - low_y) == pytest.approx((size, size))
    assert 0 <= low_x <= high_x <= 1 and 0 <= low_y <= high_y <= 1
    assert low_x <= x1 + 1e-9 and x2 <= high_x + 1e-9 and low_y <= y1 + 1e-9 and y2 <= high_y + 1e-9


def test_without_square_the_sides_grow_by_themselves():
    assert expand((0.4, 0.3, 0.6, 0.7), 1.5, square=False) == pytest.approx(np.array([0.35, 0.2, 0.65, 0.8]))


# Rasters.


@given(st.tuples(*[fraction] * 4), st.sampled_from([(24, 24), (7, 16)]))
def test_the_cover_raster_takes_each_cell_that_the_box_touches(box, grid):
    x1, x2, y1, y2 = *sorted(box[::2]), *sorted(box[1::2])
    h, w = grid
    expected = np.array([
        [x1 * w < c + 1 and c < x2 * w and y1 * h < r + 1 and r < y2 * h for c in range(w)] for r in range(h)
    ])  # fmt: skip
    ours = rasterise((x1, y1, x2, y2), grid, "cover")
    if x1 < x2 and y1 < y2:
        np.testing.assert_array_equal(ours, expected)
    else:
        assert ours.any() and (ours | ~expected).all()


def test_a_box_without_area_covers_the_cell_that_holds_it_up_to_the_border():
    for at, cell in ((0.0, 0), (0.5, 12), (0.99, 23), (1.0, 23)):
        assert np.argwhere(rasterise((at, at, at, at), GRID, "cover")).tolist() == [[cell, cell]]


@pytest.mark.parametrize("raster", ["code", "cover"])
@pytest.mark.parametrize("box", [(1.2, 1.2, 1.4, 1.4), (-0.9, -0.9, -0.5, -0.5), (0.6, 0.6, 0.4, 0.4)])
def test_a_box_beyond_the_view_or_inside_out_covers_nothing(raster, box):
    assert not rasterise(box, GRID, raster).any()


# Replies.


def boxes_of(reply, how="tolerant", side=400):
    found = parse(reply, side, how)
    return found.boxes.tolist(), found.status


# CoF, section 9, "Parsing tests", tolerant and strict.
@pytest.mark.parametrize(
    ("reply", "tolerant", "strict"),
    [
        ('{"a": [0.55, 0.35, 0.9, 0.7]}', [[0.55, 0.35, 0.9, 0.7]], [[0.55, 0.35, 0.9, 0.7]]),
        ("[0, 0.2, 0.6, 0.8]", [[0, 0.2, 0.6, 0.8]], []),
        ("[0.1,0.2,0.3,0.4]", [[0.1, 0.2, 0.3, 0.4]], []),
        ("[-0.1, 0.2, 0.3, 0.4]", [[0, 0.2, 0.3, 0.4]], []),
        ("[-0.1, 0.2, 0.3, 0.4] and more", [[0, 0.2, 0.3, 0.4]], []),
        (
            "[0.1, 0.2, 0.3, 0.4] and [0.5, 0.6, 0.7, 0.8]",
            [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]],
            [[0.1, 0.2, 0.3, 0.4]],
        ),
        ("There is no such thing in the image.", [], []),
        ("", [], []),
        ("[0.1, 0.2, 0.3]", [], []),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", [], []),
        ("[120, 40, 300, 200]", [[0.3, 0.1, 0.75, 0.5]], []),
        # Beyond the specification's list.
        ("[[0.1, 0.2, 0.3, 0.4]]", [[0.1, 0.2, 0.3, 0.4]], [[0.1, 0.2, 0.3, 0.4]]),
        ('{"things": [{"bbox": [0.1, 0.2, 0.3, 0.4]}, [[0.5, 0.5, 1, 1]]]}',
         [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 1, 1]], [[0.1, 0.2, 0.3, 0.4]]),
        ('{"x_min": 0.1, "y_min": 0.2, "x_max": 0.3, "y_max": 0.4, "label": "dog"}', [[0.1, 0.2, 0.3, 0.4]], []),
        ('{"x2": 0.3, "y1": 0.2, "x1": 0.1, "y2": 0.4}', [[0.1, 0.2, 0.3, 0.4]], []),
        ('{"a": [0.1, 0.2, 0.3, 0.4], "b": [0.5, 0.', [[0.1, 0.2, 0.3, 0.4]], [[0.1, 0.2, 0.3, 0.4]]),
        ("```json\n{'a': [ 0.1 , 0.2, 0.3,0.4 ]}\n```", [[0.1, 0.2, 0.3, 0.4]], []),
        ("[1e400, 0.2, 0.3, 0.4] [NaN, 0, 1, 1] [true, 0, 1, 1] [null, 0.1, 0.2, 0.3]", [], []),
        ("[" * 5000 + "0.1, 0.2, 0.3, 0.4]", [[0.1, 0.2, 0.3, 0.4]], [[0.1, 0.2, 0.3, 0.4]]),
        ("[1" + "0" * 5000 + ", 0, 1, 1]", [], []),
        ("[0.2, 0.1, 1.5, 1.2]", [[0.2, 0.1, 1, 1]], [[0.2, 0.1, 1.5, 1.2]]),
    ],
)  # fmt: skip
def test_replies_are_read_as_listed(reply, tolerant, strict):
    if reply.startswith("[-0.1"):
        strict = [[-0.1, 0.2, 0.3, 0.4]]
    assert boxes_of(reply) == (tolerant, "ok" if tolerant else "no_box")
    assert boxes_of(reply, "strict") == (strict, "ok" if strict else "no_box")


@pytest.mark.parametrize(
    ("reply", "how", "boxes"),
    [
        ("[0.5, 0.5, 0.5, 0.5]", "tolerant", [[0.5, 0.5, 0.5, 0.5]]),
        ("[0.5, 0.5, 0.5, 0.5]", "strict", [[0.5, 0.5, 0.5, 0.5]]),
        ("[0.2, 0.1, 0.2, 0.9]", "tolerant", [[0.2, 0.1, 0.2, 0.9]]),
        ("[0.6, 0.4, 0.4, 0.6]", "strict", [[0.6, 0.4, 0.4, 0.6]]),
        ("[0.6, 0.6, 0.4, 0.4]", "strict", [[0.6, 0.6, 0.4, 0.4]]),
        ("[1.2, 1.2, 1.4, 1.4]", "tolerant", [[1, 1, 1, 1]]),
        ("[900, 900, 1000, 950]", "tolerant", [[1, 1, 1, 1]]),
        ("[-0.4, -0.4, -0.2, -0.2]", "tolerant", [[0, 0, 0, 0]]),
    ],
)
def test_boxes_without_an_area_are_called_degenerate(reply, how, boxes):
    assert boxes_of(reply, how) == (boxes, "degenerate")


def test_one_good_box_among_degenerate_ones_is_enough():
    assert boxes_of("[0.5, 0.5, 0.5, 0.5] [0.1, 0.1, 0.2, 0.2]")[1] == "ok"


def test_corners_are_sorted_unless_strict():
    assert boxes_of("[0.6, 0.6, 0.4, 0.4]") == ([[0.4, 0.4, 0.6, 0.6]], "ok")


@given(st.text(alphabet='[]{}()", 0123456789.-eENaxy:\n', max_size=60), st.sampled_from(["tolerant", "strict"]))
def test_no_reply_breaks_the_parser_or_the_mask(reply, how):
    found = parse(reply, 336, how)
    assert np.isfinite(found.boxes).all() and (len(found.boxes) == 0) == (found.status == "no_box")
    for preset in PRESETS.values():
        options = {name: value for name, value in preset.items() if name != "parse"}
        assert select(found.boxes, GRID, 1.3, **options).shape == GRID


@given(st.lists(st.tuples(*[fraction] * 4), max_size=4))
def test_json_of_any_boxes_is_read_back(boxes):
    found = parse("Sure: " + json.dumps({str(i): box for i, box in enumerate(boxes)}), 336)
    expected = [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in boxes]
    assert found.boxes.tolist() == expected


@pytest.mark.parametrize("digits", [20, 300, 400])
def test_huge_numbers_overflow_nowhere(digits):
    reply = f"[0.1, 0.1, {'9' * digits}.0, {'9' * digits}.0]"
    assert boxes_of(reply)[1] == ("no_box" if digits > 308 else "ok")
    for preset in PRESETS:
        assert ground(reply, preset).shape == GRID


def test_no_box_selects_everything_unless_told_otherwise():
    for preset in PRESETS:
        assert ground("nothing", preset).all()
        assert not ground("nothing", preset, fallback="none").any()


def test_wrong_options_are_refused():
    box = [(0.1, 0.1, 0.2, 0.2)]
    with pytest.raises(UserError, match="expected tolerant or strict"):
        parse("", 100, "lenient")
    with pytest.raises(UserError, match="expected shift or code"):
        expand(box, clamp="cut")
    with pytest.raises(UserError, match="expected code or cover"):
        rasterise(box, GRID, "round")
    for wrong in ({"multi_box": "all"}, {"fallback": "half"}):
        with pytest.raises(UserError, match="expected union or first, all or none"):
            select(box, GRID, **wrong)


# Pixels.


@given(st.sampled_from([(1024, 768), (100, 300), (5000, 40), (1, 1)]), st.tuples(*[fraction] * 4))
def test_fractions_of_a_padded_square_are_llavas_boxes(size, box):
    geometry = for_pad(*size, 336, GRID)
    np.testing.assert_allclose(to_pixels(box, geometry), from_padded(box, size), atol=1e-9)
    pixels = to_pixels(box, geometry)
    np.testing.assert_allclose(from_pixels(pixels, geometry), to_padded(pixels, size), atol=1e-12)


@given(st.sampled_from([for_pad, for_crop, for_squash]), st.sampled_from([(1024, 768), (100, 300)]), st.data())
def test_pixel_boxes_survive_the_way_there_and_back(make, size, data):
    box = np.array(data.draw(st.tuples(*[fraction] * 4))) * np.tile(size, 2)
    geometry = make(*size, 336, GRID)
    np.testing.assert_allclose(to_pixels(from_pixels(box, geometry), geometry), box, atol=1e-9)


def test_ground_truth_selects_the_cells_that_see_it():
    """1024 x 768 padded: a box of the image's upper left corner lies four cells down."""
    geometry = for_pad(1024, 768, 336, GRID)
    box = from_pixels((0, 0, 128, 128), geometry)
    mask = select(box, GRID, raster="cover")
    assert ranges(mask) == (0, 2, 3, 5)
    np.testing.assert_array_equal(mask, geometry.cells_of_box((0, 0, 128, 128)) > 1e-9)
