"""FOCUS's regions: its worked examples, loops written from the paper, masks, batching, odd maps, pixels, merging."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvqa.errors import UserError
from jaxvqa.geometry import for_crop, for_pad, for_squash
from jaxvqa.images import pixel_box
from jaxvqa.regions.proposals import intersection_over_union, merge, propose, suppress, to_pixels, union

SHAPES = [(5, 8), (1, 1)]  # few, because each compiles
OPTIONS = [
    {},
    {"num_anchors": 5, "anchor_choice": "topk_filter", "distance": 1.5, "nms_iou": 0.5},
    {"num_anchors": 100, "smallest": 1, "largest": 7, "distance": 3, "threshold_ref": "max"},
    {"num_anchors": 7, "smallest": 2, "largest": 5, "distance": 0, "threshold_ref": "absolute", "threshold": 1.5},
]

thin_out = jax.jit(suppress)


# The same from the text of the paper, in Python numbers.


def slow_anchors(heat, visible, count, distance, choice):
    h, w = heat.shape
    ranked = sorted(((r, c) for r in range(h) for c in range(w) if visible[r, c]), key=lambda at: -heat[at])
    if choice == "topk_filter":
        ranked = ranked[:count]
    accepted = []
    for cell in ranked:
        if len(accepted) < count and all(math.dist(cell, other) >= distance for other in accepted):
            accepted.append(cell)
    return accepted


def slow_region(heat, visible, anchor, smallest, largest, least):
    def cut(size):
        return [
            (max(0, at - size // 2), min(length, at - size // 2 + size))
            for at, length in zip(anchor, heat.shape, strict=True)
        ]

    size = smallest
    while size + 2 <= largest:
        (r1, r2), (c1, c2) = cut(size + 2)
        inside = [float(heat[r, c]) for r in range(r1, r2) for c in range(c1, c2) if visible[r, c]]
        if sum(inside) / len(inside) < least:
            break
        size += 2
    (r1, r2), (c1, c2) = cut(size)
    return c1, r1, c2, r2


def slow_iou(a, b):
    across, down = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return across * down / (areas - across * down)


def slow_proposals(
    heat,
    visible,
    num_anchors=30,
    smallest=3,
    largest=5,
    distance=2,
    threshold=0.5,
    nms_iou=0.3,
    anchor_choice="greedy",
    threshold_ref="anchor",
):
    kept = []
    for anchor in slow_anchors(heat, visible, num_anchors, distance, anchor_choice):
        highest = max(float(heat[at]) for at in np.ndindex(heat.shape) if visible[at])
        least = threshold * {"anchor": float(heat[anchor]), "max": highest, "absolute": 1}[threshold_ref]
        box = slow_region(heat, visible, anchor, smallest, largest, least)
        if all(slow_iou(box, other) <= nms_iou for other, _ in kept):
            kept.append((box, anchor))
    return kept


def found(proposals):
    return [
        (tuple(box), tuple(anchor))
        for box, anchor, valid in zip(
            proposals.cells.tolist(), proposals.anchors.tolist(), proposals.valid.tolist(), strict=True
        )
        if valid
    ]


@st.composite
def maps(draw, shapes=SHAPES):
    """Small whole numbers: sums are exact, ties frequent."""
    h, w = draw(st.sampled_from(shapes))
    cells = draw(st.lists(st.integers(0, 4), min_size=h * w, max_size=h * w).filter(any))
    return np.array(cells, np.float32).reshape(h, w)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(maps())
def test_the_regions_are_those_of_loops_from_the_paper(options, heat):
    ours = propose(heat, **options)
    assert found(ours) == slow_proposals(heat, np.ones(heat.shape, bool), **options)
    assert not ours.uniform
    relevance = np.asarray(ours.relevance)[np.asarray(ours.valid)]
    assert relevance.tolist() == [heat[at] for _, at in found(ours)] and (np.diff(relevance) <= 0).all()
    assert not np.asarray(ours.cells)[~np.asarray(ours.valid)].any()


@given(maps([(5, 8)]), st.lists(st.booleans(), min_size=40, max_size=40))
def test_hidden_cells_count_as_little_as_cells_beyond_the_border(heat, visible):
    visible = np.array(visible).reshape(5, 8)
    ours = propose(np.where(visible, heat, np.nan), visible)
    if (heat * visible).any():
        assert found(ours) == slow_proposals(heat, visible) and not ours.uniform
    else:
        assert ours.uniform and all(visible[at] for _, at in found(ours))


def example():
    y, x = np.mgrid[:24, :24]
    return np.exp(-((x - 6) ** 2 + (y - 6) ** 2) / 8) + 0.8 * np.exp(-((x - 17) ** 2 + (y - 15) ** 2) / 2)


# FOCUS, section 12: the example of the regions.
@pytest.mark.parametrize(
    ("distance", "anchors", "boxes", "kept"),
    [
        (2, [(6, 6), (15, 17), (4, 6), (6, 4)], [(4, 4, 9, 9), (16, 14, 19, 17), (4, 2, 9, 7), (2, 4, 7, 9)], 2),
        (3, [(6, 6), (15, 17), (3, 6), (6, 3)], [(4, 4, 9, 9), (16, 14, 19, 17), (4, 1, 9, 6), (1, 4, 6, 9)], 4),
    ],
)
def test_the_worked_example_of_focus(distance, anchors, boxes, kept):
    all_of_them, survivors = (
        propose(example().astype(np.float32), num_anchors=4, distance=distance, nms_iou=iou) for iou in (1.0, 0.3)
    )
    assert found(all_of_them) == list(zip(boxes, anchors, strict=True))
    assert [box for box, _ in found(survivors)] == boxes[:kept]


# FOCUS, section 12: intersections over union of equal squares, and section 5: which of them 0.3 suppresses.
@pytest.mark.parametrize(
    ("side", "offset", "iou"),
    [
        (5, (1, 0), 0.667),
        (5, (1, 1), 0.471),
        (5, (2, 0), 0.429),
        (5, (2, 1), 0.316),
        (5, (3, 0), 0.250),
        (5, (2, 2), 0.220),
        (5, (3, 1), 0.190),
        (3, (1, 0), 0.5),
        (3, (1, 1), 0.286),
        (3, (2, 0), 0.2),
    ],
)
def test_overlaps_of_squares_are_those_of_the_table(side, offset, iou):
    x, y = offset
    boxes = np.array([(0, 0, side, side), (x, y, x + side, y + side)])
    assert float(intersection_over_union(boxes, boxes)[0, 1]) == pytest.approx(iou, abs=5e-4)
    assert thin_out(boxes, np.ones(2, bool), 0.3).tolist() == [True, iou <= 0.3]


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 2, *[st.integers(1, 6)] * 2, st.booleans()), min_size=8, max_size=8))
def test_suppression_is_that_of_a_loop(drawn):
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h, _ in drawn])
    valid = np.array([ok for *_, ok in drawn])
    kept = []
    for i in np.flatnonzero(valid):
        if all(slow_iou(boxes[i].tolist(), boxes[j].tolist()) <= 0.3 for j in kept):
            kept.append(i)
    assert np.flatnonzero(thin_out(boxes, valid, 0.3)).tolist() == kept


def test_a_box_that_only_a_suppressed_one_overlaps_stays():
    boxes = np.array([(0, 0, 4, 1), (2, 0, 6, 1), (4, 0, 8, 1)])
    assert thin_out(boxes, np.ones(3, bool), 0.3).tolist() == [True, False, True]


@pytest.mark.parametrize("value", [0.0, 1.0, 3e38, np.nan, -2.0])
def test_a_constant_map_gives_regions_from_the_first_cell_on(value):
    ours = propose(np.full((6, 6), value, np.float32), num_anchors=4, distance=3, smallest=1, largest=3)
    # 3e38 four times over would be infinite.
    assert [at for _, at in found(ours)] == [(0, 0), (0, 3), (3, 0), (3, 3)]
    if not value < 0:  # below zero the mean is never half the value or more
        assert [box for box, _ in found(ours)] == [(0, 0, 2, 2), (2, 0, 5, 2), (0, 2, 2, 5), (2, 2, 5, 5)]
    assert bool(ours.uniform) == (value == 0 or np.isnan(value))
    assert np.isfinite(ours.relevance).all()


def test_greedy_anchors_go_on_where_filtered_ones_run_out():
    heat = np.float32([[9, 8, 7, 6, 5, 4, 3, 2]])
    count = {
        choice: int(propose(heat, num_anchors=3, distance=2, nms_iou=1, anchor_choice=choice).valid.sum())
        for choice in ("greedy", "topk_filter")
    }
    assert count == {"greedy": 3, "topk_filter": 2}


def test_the_reference_of_the_threshold_is_what_it_is_called():
    """One cell of 1 and one of 0.4 in a map of 0.1: means of 3 x 3 are 0.2 and 0.133."""
    heat = np.full((12, 12), 0.1, np.float32)
    heat[2, 2], heat[8, 8] = 1, 0.4
    sides = {}
    for reference, threshold in (("anchor", 0.25), ("max", 0.15), ("absolute", 0.125), ("absolute", 0.3)):
        options = {"smallest": 1, "largest": 3, "num_anchors": 2, "distance": 5}
        ours = propose(heat, threshold=threshold, threshold_ref=reference, **options)
        sides[reference, threshold] = [x2 - x1 for (x1, _, x2, _), _ in found(ours)]
    assert sides == {
        ("anchor", 0.25): [1, 3],
        ("max", 0.15): [3, 1],
        ("absolute", 0.125): [3, 3],
        ("absolute", 0.3): [1, 1],
    }


@given(maps([(2, 7)]))
def test_a_map_narrower_than_the_smallest_region_is_spanned_by_it(heat):
    ours = found(propose(heat))
    assert ours == slow_proposals(heat, np.ones(heat.shape, bool))
    assert {(y1, y2) for (_, y1, _, y2), _ in ours} == {(0, 2)}


@given(maps(), st.integers(-100, 100))
def test_the_scale_of_a_map_does_not_matter(heat, exponent):
    assert found(propose(heat * np.float32(2.0**exponent))) == found(propose(heat))


@given(maps([(5, 8)]), maps([(5, 8)]))
def test_a_batch_is_its_maps_one_by_one(first, second):
    batch = jax.vmap(propose)(np.stack([first, second]))
    for i, one in enumerate((first, second)):
        for ours, alone in zip(batch, propose(one), strict=True):
            np.testing.assert_array_equal(ours[i], alone)


def test_compiled_and_not_compiled_agree():
    heat = np.random.default_rng(3).random((5, 8), np.float32)
    for compiled, plain in zip(propose(heat), propose.__wrapped__(heat), strict=True):
        np.testing.assert_array_equal(compiled, plain)


def test_wrong_options_are_refused():
    heat = np.ones((5, 8), np.float32)
    with pytest.raises(UserError, match="expected greedy or topk_filter"):
        propose(heat, anchor_choice="best")
    with pytest.raises(UserError, match="expected one of anchor, max, absolute"):
        propose(heat, threshold_ref="mean")
    with pytest.raises(UserError, match="1 <= smallest <= largest"):
        propose(heat, smallest=5, largest=3)
    with pytest.raises(UserError, match="on a 3x3 token grid"):
        to_pixels(propose(heat), for_pad(100, 100, 336, (3, 3)))


# Cells to pixels.


def hot(row, column, grid=(24, 24)):
    heat = np.zeros(grid, np.float32)
    heat[row, column] = 1
    return propose(heat, num_anchors=1)


def test_regions_lie_where_the_geometry_says():
    """1024 x 768, padded: cells of 1024 / 24 pixels, 128 of them above the image."""
    regions = to_pixels(hot(10, 5), for_pad(1024, 768, 336, (24, 24)))
    cell = 1024 / 24
    assert regions.cells.tolist() == [[4, 9, 7, 12]]
    assert regions.boxes == pytest.approx(np.array([[4 * cell, 9 * cell - 128, 7 * cell, 12 * cell - 128]]))
    assert regions.relevance.tolist() == [1]
    whole = to_pixels(hot(0, 23), for_squash(480, 240, 384, (24, 24)))
    assert whole.boxes.tolist() == [[440, 0, 480, 20]]


def test_a_region_in_the_padding_is_dropped_and_one_at_its_edge_is_cut():
    geometry = for_pad(1024, 768, 336, (24, 24))
    assert to_pixels(hot(0, 5), geometry).boxes.shape == (0, 4)
    assert to_pixels(hot(2, 5), geometry).boxes[:, [1, 3]] == pytest.approx(np.array([[0, 1024 / 24]]))


def test_the_mask_of_the_geometry_keeps_anchors_out_of_the_padding():
    geometry = for_pad(1024, 768, 336, (24, 24))
    heat = np.where(geometry.valid(), 1, 5).astype(np.float32)
    seen, everywhere = (
        [at for _, at in found(propose(heat, visible, num_anchors=4))]
        for visible in (geometry.valid(), np.ones((24, 24), bool))
    )
    assert seen and all(geometry.valid()[at] for at in seen)
    assert everywhere and not any(geometry.valid()[at] for at in everywhere)


@pytest.mark.parametrize("make", [for_pad, for_crop, for_squash])
@given(st.sampled_from([(1, 1), (24, 24), (36, 12), (5000, 30), (30, 5000), (1024, 768), (7, 3)]), maps([(5, 8)]))
def test_every_box_in_pixels_holds_a_pixel_of_the_image(make, size, heat):
    geometry = make(*size, 336, heat.shape)
    ours = propose(heat, num_anchors=5)
    regions = to_pixels(ours, geometry)
    assert len(regions.boxes) <= ours.valid.sum()
    for box in regions.boxes:
        pixel_box(box, size)
        assert (box[2:] - box[:2] >= 1).all() and (box >= 0).all() and (box <= np.tile(size, 2)).all()


# Merging.

boxes = st.lists(st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 8)] * 2), max_size=8).map(
    lambda drawn: np.array([(x, y, x + w, y + h) for x, y, w, h in drawn], np.float64).reshape(-1, 4)
)


def touching(a, b, dilation):
    a = (a[0] - dilation, a[1] - dilation, a[2] + dilation, a[3] + dilation)
    b = (b[0] - dilation, b[1] - dilation, b[2] + dilation, b[3] + dilation)
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def slow_merge(found, dilation):
    """Replace any two that overlap, as long as there are any."""
    found = [tuple(box) for box in found]
    while True:
        pair = next(
            ((a, b) for i, a in enumerate(found) for b in found[i + 1 :] if touching(a, b, dilation)),
            None,
        )
        if pair is None:
            return found
        for box in pair:
            found.remove(box)
        found.append(
            tuple(float(f(sides)) for f, sides in zip((min, min, max, max), zip(*pair, strict=True), strict=True))
        )


@given(boxes, st.sampled_from([0, 1, 2.5]), st.randoms())
def test_merging_ends_where_nothing_overlaps_whatever_the_order(found, dilation, random):
    merged = merge(found, dilation)
    assert sorted(map(tuple, merged)) == sorted(slow_merge(found, dilation))
    shuffled = [*found]
    random.shuffle(shuffled)
    assert sorted(map(tuple, merge(np.array(shuffled), dilation))) == sorted(map(tuple, merged))
    # Best first: in the order of the first box that went into each.
    first = [min(i for i, b in enumerate(found) if (union([b, box]) == box).all()) for box in merged]
    assert first == sorted(first)


def test_boxes_that_only_touch_stay_apart_until_dilated():
    pair = np.array([(0, 0, 10, 10), (10, 0, 20, 10)])
    assert merge(pair).tolist() == pair.tolist()
    assert merge(pair, 1).tolist() == [[0, 0, 20, 10]]
    far = np.array([(0, 0, 10, 10), (109, 0, 120, 10), (400, 0, 410, 10)])
    assert merge(far, 50).tolist() == [[0, 0, 120, 10], [400, 0, 410, 10]]
    assert merge(far, 49.5).tolist() == far.tolist()


def test_a_merged_box_keeps_the_rank_of_its_best_part():
    ranked = np.array([(0, 0, 10, 10), (50, 50, 60, 60), (80, 0, 90, 9), (5, 5, 15, 15), (55, 55, 65, 65)])
    assert merge(ranked).tolist() == [[0, 0, 15, 15], [50, 50, 65, 65], [80, 0, 90, 9]]


def test_a_union_may_reach_boxes_that_its_parts_did_not():
    corner = np.array([(0, 0, 2, 10), (6, 1, 8, 3), (1, 8, 10, 10)])
    assert merge(corner).tolist() == [[0, 0, 10, 10]]


def test_nothing_merges_to_nothing():
    assert merge(np.zeros((0, 4))).shape == (0, 4)


@given(st.integers(0, 99), st.sampled_from(OPTIONS))
def test_regions_of_a_padded_map_are_those_of_the_map(seed, options):
    """What lies behind the border neither is a region's nor takes part in its mean."""
    heat = np.random.default_rng(seed).random((5, 8), np.float32)
    plain = propose(heat, **options)
    behind = ((0, 3), (0, 4))
    seen = np.pad(np.ones(heat.shape, bool), behind)
    padded = propose(np.pad(heat, behind), seen, np.array(heat.shape), **options)
    for ours, expected in zip(padded, plain, strict=True):
        np.testing.assert_array_equal(ours, expected)
