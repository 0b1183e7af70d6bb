"""How answers, boxes and heat maps are judged, against plain counting."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvqa.geometry import covers
from jaxvqa.requests import Answer, Reply, Sample
from jaxvqa.specks import CHARACTERS
from jaxvqa.specks.evaluation import (
    area_share,
    covered,
    difference,
    gap_closed,
    iou,
    map_quality,
    mass_in,
    near,
    peak_in,
    reading_samples,
    right,
    wilson,
)

SIZE, GRID = (40, 30), (3, 5)  # cells of 8 x 10 pixels


@st.composite
def box(draw):
    x, y = draw(st.integers(0, 38)), draw(st.integers(0, 28))
    return x, y, draw(st.integers(x + 1, 40)), draw(st.integers(y + 1, 30))


def pixels(boxes) -> np.ndarray:
    """Which pixels of the image lie in any of the boxes."""
    mask = np.zeros(SIZE[::-1], bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


boxes = st.lists(box(), max_size=4)
grids = st.sampled_from([(3, 5), (1, 1), (6, 8), (30, 40)])


def test_samples_are_named_by_their_scene_and_know_their_truth():
    samples = reading_samples(7, 2)
    assert [sample.id for sample in samples] == ["small/7/0", "small/7/1"]
    for sample in samples:
        x1, y1, x2, y2 = sample.box
        assert 0 <= x1 < x2 <= sample.image.width and 0 <= y1 < y2 <= sample.image.height
        assert sample.answer in CHARACTERS and "What character" in sample.question


@pytest.mark.parametrize(
    ("text", "truth", "is_right"),
    [
        ("K", "K", True), (" k.", "K", True), ("KK", "K", False), ("", "K", False), ("K and M", "K", False),
        ("yes", "Yes", True), ("No.", "Yes", False),
        ("K and M", "K and M", True), ("m and k.", "K and M", True), ("K", "K and M", False),
        ("K and K", "K and M", False), ("K and K", "K and K", True), ("KandM", "K and M", False),
    ],
)  # fmt: skip
def test_case_a_full_stop_and_the_order_of_two_do_not_count(text, truth, is_right):
    assert right(Answer(text), Sample((), "?", answer=truth)) == is_right
    assert right(Reply(text, ()), Sample((), "?", answer=truth)) == is_right


# ---- accuracies ------------------------------------------------------------------------------------------------------


def test_a_difference_is_that_of_the_shares():
    first, second = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0], bool)
    found = difference(first, second)
    assert found.value == pytest.approx(0.2) and -1 <= found.low < 0.2 < found.high <= 1
    assert difference(second, first) == pytest.approx((-0.2, -found.high, -found.low))


def test_the_interval_is_walds_with_half_a_question_added_to_each_outcome():
    first = np.repeat([True, True, False, False], [794, 150, 86, 570])
    second = np.repeat([True, False, True, False], [794, 150, 86, 570])
    found = difference(first, second)
    middle = 64 / 1602
    spread = 1.959964 * math.sqrt(150.5 + 86.5 - 64**2 / 1602) / 1602
    assert found == pytest.approx((0.04, middle - spread, middle + spread), abs=1e-6)


@pytest.mark.parametrize(
    ("both", "gained", "lost", "n"), [(0.5, 0.2, 0.1, 200), (0.1, 0.7, 0.02, 100), (0.9, 0.03, 0.03, 60)]
)
def test_the_interval_holds_the_truth_in_about_95_of_100_runs(both, gained, lost, n, measured):
    rng, held = np.random.default_rng(n), []
    for _ in range(1500):
        outcome = rng.choice(4, n, p=[both, gained, lost, 1 - both - gained - lost])
        found = difference(outcome <= 1, (outcome == 0) | (outcome == 2))
        held.append(found.low <= gained - lost <= found.high)
    measured(f"95 % interval of a paired difference, {n} questions: holds the truth", float(np.mean(held)))
    assert 0.935 <= np.mean(held) <= 0.99


def test_the_interval_is_as_wide_as_a_paired_bootstraps():
    rng = np.random.default_rng(0)
    first, second = rng.random(400) < 0.6, rng.random(400) < 0.5
    picks = rng.integers(0, 400, (4000, 400))
    low, high = np.quantile(first[picks].mean(1) - second[picks].mean(1), (0.025, 0.975))
    found = difference(first, second)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.006)


def test_the_gap_is_from_the_random_crop_to_the_truth():
    assert gap_closed(0.5, 0.1, 0.9) == pytest.approx(0.5)
    assert gap_closed(0.1, 0.1, 0.9) == 0 and gap_closed(0.9, 0.1, 0.9) == 1
    assert gap_closed(0.0, 0.1, 0.9) < 0 < 1 < gap_closed(1.0, 0.1, 0.9)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_without_a_gap_none_is_closed(method, random, truth):
    assert math.isnan(gap_closed(method, random, truth)) == (truth <= random)


# ---- boxes -----------------------------------------------------------------------------------------------------------


@given(box(), box())
def test_a_box_covers_a_target_when_it_holds_half_of_its_area(one, target):
    held = (pixels([one]) & pixels([target])).sum()
    assert covers(one, target) == (2 * held >= pixels([target]).sum())


@given(box(), box())
def test_iou_is_that_of_the_pixels(a, b):
    one, other = pixels([a]), pixels([b])
    assert iou(a, b) == pytest.approx((one & other).sum() / (one | other).sum())
    assert iou(a, b) == iou(b, a) and iou(a, a) == 1


def test_a_box_without_an_area_overlaps_nothing():
    assert iou((3, 3, 3, 9), (0, 0, 9, 9)) == iou((3, 3, 3, 3), (3, 3, 3, 3)) == iou((5, 0, 1, 9), (0, 0, 9, 9)) == 0


@given(boxes)
def test_shares_of_the_image_count_what_boxes_share_once(some):
    assert area_share(some, SIZE) == pytest.approx(pixels(some).mean())


# ---- heat maps -------------------------------------------------------------------------------------------------------


@given(boxes, grids)
def test_cells_are_covered_as_their_pixels_are(some, grid):
    rows, columns = SIZE[1] // grid[0], SIZE[0] // grid[1]
    expected = pixels(some).reshape(grid[0], rows, grid[1], columns).mean((1, 3))
    np.testing.assert_allclose(covered(some, SIZE, grid), expected, atol=1e-12)


def test_edges_of_cells_need_not_be_whole_pixels():
    np.testing.assert_allclose(covered([(0, 0, 1, 30)], (10, 30), (1, 4)), [[0.4, 0, 0, 0]])
    np.testing.assert_allclose(covered([(1.5, 3.25, 4, 30)], (10, 30), (1, 2)), [[2.5 / 5 * 26.75 / 30, 0]])


@given(boxes, st.integers(0, 2), st.integers(0, 14))
def test_a_peak_counts_in_a_box_or_within_the_margin(some, margin, at):
    heatmap = np.zeros(GRID)
    heatmap.flat[at] = 1
    row, column = divmod(at, GRID[1])
    around = pixels(some)[
        max(0, (row - margin) * 10) : (row + 1 + margin) * 10, max(0, (column - margin) * 8) : (column + 1 + margin) * 8
    ]
    assert peak_in(heatmap, some, SIZE, margin) == bool(around.any())
    assert near(some, SIZE, GRID, margin).flat[at] == bool(around.any())


def test_of_equal_peaks_the_first_counts():
    assert peak_in(np.ones(GRID), [(0, 0, 4, 4)], SIZE) and not peak_in(np.ones(GRID), [(39, 29, 40, 30)], SIZE)


@given(boxes, st.integers(0, 99))
def test_mass_is_that_of_the_map_spread_over_its_cells(some, seed):
    heatmap = np.random.default_rng(seed).random(GRID).astype(np.float32)
    wide = heatmap.repeat(10, 0).repeat(8, 1)
    mass, area = mass_in(heatmap, some, SIZE)
    assert mass == pytest.approx(wide[pixels(some)].sum() / wide.sum(), rel=1e-5)
    assert area == pytest.approx(pixels(some).mean())
    assert mass_in(np.ones(GRID), some, SIZE) == pytest.approx((area, area))
    assert math.isnan(mass_in(np.zeros(GRID), some, SIZE)[0])


def test_the_quality_of_maps_is_a_mean_over_samples():
    target, rival = (0, 0, 8, 10), (32, 20, 40, 30)
    samples = [Sample((), "?", boxes=(target,), rivals=(rival,)), Sample((), "?", boxes=(target, rival))]
    maps = np.zeros((2, *GRID))
    maps[0, 2, 4] = 1
    maps[1, 0, 1] = 3
    maps[1, 2, 4] = 1
    found = map_quality(maps, samples, SIZE)
    assert found.peak == 0.5 and found.rival == 0.5
    assert found.chance == pytest.approx((4 / 15 + 8 / 15) / 2)
    assert found.mass == pytest.approx((0 + 0.25) / 2) and found.area == pytest.approx((1 / 15 + 2 / 15) / 2)


def test_a_rival_beside_the_target_is_no_miss():
    sample = Sample((), "?", boxes=((0, 0, 8, 10),), rivals=((8, 0, 16, 10),))
    heatmap = np.zeros((1, *GRID))
    heatmap[0, 0, 1] = 1
    assert map_quality(heatmap, [sample], SIZE)[:3:2] == (1, 0)


def test_wilsons_interval_is_where_the_share_lies_as_far_away_as_its_own_error_allows():
    for hits, count in ((0, 20), (3, 20), (20, 20), (88, 200)):
        for end in wilson(hits, count):
            assert abs(hits / count - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), abs=1e-6)
    low, high = wilson(88, 200)
    assert low < 0.44 < high
