"""ViCrop's window search: the release's boxes, a plain NumPy reference, ties, alignment, batching, compilation."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxvqa.errors import UserError
from jaxvqa.geometry import for_crop, for_pad, for_squash
from jaxvqa.images import pixel_box
from jaxvqa.regions.windows import RATIOS, find, high_res_split, plan, search

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "vicrop_bbox.json").read_text())
MODES = {"pad": for_pad, "crop": for_crop, "squash": for_squash}
SIZES = [(1024, 768), (768, 1024), (640, 640), (300, 1200), (1200, 300), (100, 90), (333, 517), (6000, 4500), (8, 1500)]
GRIDS = [(6, 6), (4, 9)]  # few, because each compiles


def golden_map(case):
    random = np.random.RandomState(case["seed"])
    h, w = case["map_shape"]
    heat = random.rand(h, w)
    if case["blob"]:
        cy, cx, s = random.rand() * h, random.rand() * w, 1 + 3 * random.rand()
        y, x = np.mgrid[:h, :w]
        heat += 8 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * s**2))
    return heat


def name(case):
    return f"{case['seed']}-{'x'.join(map(str, case['image_size']))}"


@pytest.mark.parametrize("case", GOLDEN["bbox"], ids=name)
def test_official_alignment_gives_the_boxes_of_the_release(case):
    box = search(golden_map(case), tuple(case["image_size"]), case["base"], alignment="official")
    assert list(box) == case["bbox"]
    x1, y1, x2, y2 = pixel_box(box, tuple(case["image_size"]))
    assert [x2 - x1, y2 - y1] == case["pil_crop"]


@pytest.mark.parametrize("case", GOLDEN["high_res_split"], ids=lambda case: str(case["size"]))
def test_tiles_are_those_of_the_release_and_never_none(case):
    tiles = high_res_split(tuple(case["size"]))
    if "error" in case:
        W, H = case["size"]
        assert tiles.columns == 1 and tiles.size == (W, math.ceil(H / tiles.rows))
    else:
        assert (tiles.rows, tiles.columns, list(tiles.size)) == (case["vertical"], case["horizontal"], case["tile"])


def candidates(heat, geometry, base, ratios=RATIOS, neighbours=4, area_norm=True):
    """The search written as loops in float64: [(score, ratio index, box)], or None for the whole image."""
    (r0, r1), (c0, c1) = geometry.valid_ranges()
    (W, H), (h, w) = geometry.image_size, geometry.grid
    bx, by = geometry.extent[0] / w, geometry.extent[1] / h
    heat = heat.astype(np.float64)
    out = []
    for index, ratio in enumerate(ratios):
        side = base * ratio
        nx, ny = max(1, min(int(side / bx), c1 - c0)), max(1, min(int(side / by), r1 - r0))
        if nx == c1 - c0 and ny == r1 - r0:
            if ratio == 1:
                return None
            continue
        sums = {}
        for x in range(c0, c1 - nx + 1):  # x outer: the first maximum wins
            for y in range(r0, r1 - ny + 1):
                sums[x, y] = heat[y : y + ny, x : x + nx].sum()
        x, y = max(sums, key=sums.get)
        steps = [(-1, 0), (1, 0), (0, -1), (0, 1)]
        if neighbours == 8:
            steps += [(-1, -1), (-1, 1), (1, -1), (1, 1)]
        near = [sums[x + dx, y + dy] for dx, dy in steps if (x + dx, y + dy) in sums]
        score = sums[x, y] - np.mean(near)
        half = side // 2
        cx = min(max(int(geometry.origin[0] + (x * bx + bx * nx / 2)), half), W - half)
        cy = min(max(int(geometry.origin[1] + (y * by + by * ny / 2)), half), H - half)
        box = (max(0, cx - half), max(0, cy - half), min(W, cx + half), min(H, cy + half))
        out.append((score / (nx * ny) if area_norm else score, index, box))
    return out or None


def expected(heat, geometry, base, **options):
    """(box, decided): not decided if another ratio is as good up to float32."""
    found = candidates(heat, geometry, base, **options)
    if found is None:
        return (0, 0, *geometry.image_size), True
    best = max(found, key=lambda c: (c[0], -c[1]))
    close = [c for c in found if c[0] >= best[0] - 1e-5 * max(1, abs(best[0]))]
    return best[2], len(close) == 1


def draw_map(data, grid):
    """Small whole numbers: sums are exact, ties frequent."""
    cells = data.draw(st.lists(st.integers(0, 4), min_size=grid[0] * grid[1], max_size=grid[0] * grid[1]))
    return np.array(cells, np.float32).reshape(grid)


@settings(max_examples=150)
@given(st.data())
def test_the_search_agrees_with_loops_for_every_preprocessing(data):
    grid, size = data.draw(st.sampled_from(GRIDS)), data.draw(st.sampled_from(SIZES))
    geometry = MODES[data.draw(st.sampled_from(list(MODES)))](*size, 336, grid)
    base = data.draw(st.sampled_from([64, 224, 336]))
    options = data.draw(st.sampled_from([{}, {"neighbours": 8, "area_norm": False}]))
    heat = draw_map(data, grid)
    box, decided = expected(heat, geometry, base, **options)
    assume(decided)
    assert search(heat, size, base, geometry=geometry, **options) == box


@settings(max_examples=100)
@given(st.data())
def test_a_box_lies_inside_the_image_and_holds_a_pixel(data):
    grid = data.draw(st.sampled_from(GRIDS))
    size = (data.draw(st.integers(1, 9000)), data.draw(st.integers(1, 9000)))
    geometry = MODES[data.draw(st.sampled_from(list(MODES)))](*size, 336, grid)
    box = search(draw_map(data, grid), size, 336, geometry=geometry)
    assert 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]
    assert all(value == int(value) for value in box)
    assert pixel_box(box, size) == box


@settings(max_examples=100)
@given(st.data(), st.integers(-30, 30), st.integers(-8, 8))
def test_the_choice_does_not_change_with_scale_and_offset(data, exponent, offset):
    grid, size = (6, 6), data.draw(st.sampled_from(SIZES))
    geometry = for_pad(*size, 336, grid)
    heat = draw_map(data, grid)
    changed = (heat + offset) * np.float32(2.0**exponent)
    assert search(changed, size, 336, geometry=geometry) == search(heat, size, 336, geometry=geometry)


@pytest.mark.parametrize("value", [0, 0.1, 1e38, -7.3])
def test_a_constant_map_takes_the_first_position_and_the_first_ratio(value):
    heat = np.full((24, 24), value, np.float32)
    assert search(heat, (1024, 768), 336, alignment="official") == (0, 0, 336, 336)


def test_ties_go_to_the_left_column_before_the_upper_row():
    heat = np.zeros((6, 6), np.float32)
    heat[0, 4] = heat[4, 0] = 1  # one on the right above, one on the left below
    box = search(heat, (600, 600), 100, ratios=(1.0,), alignment="official")
    assert box == (0, 400, 100, 500)


def test_huge_values_do_not_overflow():
    heat = np.zeros((6, 6), np.float32)
    heat[2, 3] = 3e38
    heat[2:4, 3:5] += 1e38 / 4
    size = (600, 600)
    assert search(heat, size, 100, alignment="official") == search(heat / 2.0**100, size, 100, alignment="official")


def test_cells_larger_than_the_window_still_give_a_box():
    heat = np.zeros((24, 24), np.float32)
    heat[3, 20] = 1
    box = search(heat, (24 * 500, 24 * 500), 336, ratios=(1.0,), alignment="official")
    assert box == (20 * 500 + 250 - 168, 3 * 500 + 250 - 168, 20 * 500 + 250 + 168, 3 * 500 + 250 + 168)


def test_an_image_no_larger_than_the_base_is_returned_whole():
    heat = np.random.default_rng(0).random((24, 24))
    for size in ((336, 336), (300, 200)):
        for mode in MODES.values():
            assert search(heat, size, 336, geometry=mode(*size, 336, (24, 24))) == (0, 0, *size)


def test_the_whole_image_is_returned_when_every_ratio_covers_it():
    heat = np.random.default_rng(0).random((24, 24))
    assert search(heat, (400, 400), 336, ratios=(1.5, 2.0), alignment="official") == (0, 0, 400, 400)


def test_one_axis_covered_leaves_the_other_to_search():
    heat = np.zeros((24, 24), np.float32)
    heat[23] = 1
    box = search(heat, (300, 2400), 336, ratios=(1.0,), alignment="official")
    assert box == (0, 2064, 300, 2400)


def test_padding_never_wins():
    geometry = for_pad(1024, 768, 336, (24, 24))
    heat = np.where(geometry.valid(), 0, 1e3).astype(np.float32)
    heat[15, 18] = 1
    x1, y1, x2, y2 = search(heat, (1024, 768), 336, geometry=geometry)
    assert x1 <= 18.5 * 1024 / 24 <= x2 and y1 <= 15.5 * 1024 / 24 - 128 <= y2


@pytest.mark.parametrize("seed", range(20))
def test_a_padded_map_is_searched_like_the_map_of_its_visible_rows(seed):
    """1024 x 768 pads exactly three rows of cells above and below: what is left is a map of the whole image."""
    heat = np.random.default_rng(seed).random((24, 24), np.float32)
    padded = search(heat, (1024, 768), 336, geometry=for_pad(1024, 768, 336, (24, 24)))
    alone = search(heat[3:21], (1024, 768), 336, alignment="official")
    # Centres are truncated to whole pixels; 128 pixels of offset may round to the other side.
    assert padded == pytest.approx(alone, abs=1)


@pytest.mark.parametrize("seed", range(20))
def test_corrected_and_official_agree_on_square_images(seed):
    heat = np.random.default_rng(seed).random((24, 24), np.float32)
    official = search(heat, (900, 900), 336, alignment="official")
    for mode in MODES.values():
        assert search(heat, (900, 900), 336, geometry=mode(900, 900, 336, (24, 24))) == official


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1200, 700), (700, 1200), (2250, 1500), (1333, 800)])
def test_the_corrected_box_holds_the_hot_cell_and_the_official_one_may_not(mode, size):
    geometry = MODES[mode](*size, 336, (24, 24))
    boxes = geometry.cell_boxes()
    missed = 0
    for row, column in np.argwhere(geometry.valid())[::37]:
        heat = np.zeros((24, 24), np.float32)
        heat[row, column] = 1
        x, y = (boxes[row, column, :2] + boxes[row, column, 2:]) / 2
        x1, y1, x2, y2 = search(heat, size, 336, geometry=geometry)
        assert x1 <= x <= x2 and y1 <= y <= y2
        x1, y1, x2, y2 = search(heat, size, 336, alignment="official")
        missed += not (x1 <= x <= x2 and y1 <= y <= y2)
    assert (missed > 0) == (mode != "squash")


# The table of HiPerson's section 9: 24 x 24 cells, base 336; ratio, window (x, y, columns, rows), sum, score with and
# without area normalisation (None where the table leaves it out).


def hot_cell():
    heat = np.zeros((24, 24), np.float32)
    heat[12, 12] = 1
    return heat


def hot_block():
    heat = np.zeros((24, 24), np.float32)
    heat[8:14, 10:16] = 1
    return heat


def gaussian():
    """Windows of an odd number of rows tie with their mirror image; in the table's arithmetic the lower one won."""
    y, x = np.mgrid[:24, :24]
    return np.exp(-((x - 15.5) ** 2 + (y - 7.5 - 2e-6) ** 2) / 18).astype(np.float32)


HIPERSON = [
    (hot_cell, (2016, 2016), 1.0, (9, 9, 4, 4), 1, 0.03125, 0.5),
    (hot_cell, (2016, 2016), 1.2, (9, 9, 4, 4), 1, 0.03125, 0.5),
    (hot_cell, (2016, 2016), 1.4, (8, 8, 5, 5), 1, 0.02, 0.5),
    (hot_cell, (2016, 2016), 1.6, (7, 7, 6, 6), 1, 0.013889, 0.5),
    (hot_cell, (2016, 2016), 1.8, (6, 6, 7, 7), 1, None, None),
    (hot_cell, (2016, 2016), 2.0, (5, 5, 8, 8), 1, None, None),
    (hot_block, (2016, 2016), 1.0, (10, 8, 4, 4), 16, 0.125, 2),
    (hot_block, (2016, 2016), 1.4, (10, 8, 5, 5), 25, 0.1, 2.5),
    (hot_block, (2016, 2016), 1.6, (10, 8, 6, 6), 36, 0.166667, 6),
    (hot_block, (2016, 2016), 1.8, (9, 7, 7, 7), 36, 0.061224, 3),
    (hot_block, (2016, 2016), 2.0, (8, 6, 8, 8), 36, 0.046875, 3),
    (gaussian, (2016, 1512), 1.0, (14, 6, 4, 5), 16.609252, 0.037110, 0.742208),
    (gaussian, (2016, 1512), 1.2, (14, 5, 4, 6), 19.250285, 0.034467, 0.827197),
    (gaussian, (2016, 1512), 1.4, (13, 5, 5, 7), 25.140205, 0.027326, 0.956393),
    (gaussian, (2016, 1512), 1.6, (13, 4, 6, 8), 31.745728, 0.022608, 1.085199),
    (gaussian, (2016, 1512), 1.8, (12, 4, 7, 9), 36.703037, 0.017020, 1.072255),
    (gaussian, (2016, 1512), 2.0, (12, 3, 8, 10), 41.989112, 0.013067, 1.045325),
]


@pytest.mark.parametrize(("make", "size", "ratio", "window", "total", "normalised", "literal"), HIPERSON)
def test_each_ratio_has_the_window_and_saliency_of_hipersons_table(
    make, size, ratio, window, total, normalised, literal
):
    heat, windows = make(), plan(for_squash(*size, 336, (24, 24)), 336, (ratio,))
    for area_norm, score in ((True, normalised), (False, literal)):
        found = find(heat, windows, area_norm=area_norm)
        x1, y1, x2, y2 = found.window.tolist()
        assert (x1, y1, x2 - x1, y2 - y1) == window
        # Sums of 42 in float32, and the shift of the Gaussian; an area is 16 cells or more.
        assert heat[y1:y2, x1:x2].sum() == pytest.approx(total, abs=1e-5)
        assert score is None or float(found.score) == pytest.approx(score, abs=1e-6 if area_norm else 1e-5)


@pytest.mark.parametrize(
    ("make", "size", "options", "ratio", "box"),
    [
        (hot_cell, (2016, 2016), {}, 0, (756, 756, 1092, 1092)),
        (hot_cell, (2016, 2016), {"area_norm": False}, 0, (756, 756, 1092, 1092)),
        (hot_block, (2016, 2016), {}, 3, (824, 656, 1360, 1192)),
        (hot_block, (2016, 2016), {"area_norm": False}, 3, (824, 656, 1360, 1192)),
        (hot_block, (2016, 2016), {"neighbours": 8}, 3, (824, 656, 1360, 1192)),
        (hot_block, (2016, 2016), {"neighbours": 8, "area_norm": False}, 3, (824, 656, 1360, 1192)),
        (gaussian, (2016, 1512), {}, 0, (1176, 367, 1512, 703)),
        (gaussian, (2016, 1512), {"area_norm": False}, 3, (1076, 236, 1612, 772)),
        (hot_cell, (336, 336), {}, 0, (0, 0, 336, 336)),
    ],
)
def test_the_chosen_ratio_and_box_are_those_of_hipersons_table(make, size, options, ratio, box):
    found = find(make(), plan(for_squash(*size, 336, (24, 24)), 336), **options)
    assert tuple(found.box.tolist()) == box
    assert found.ratio == ratio


@pytest.mark.parametrize(("area_norm", "score"), [(True, 0.236111), (False, 8.5)])
def test_eight_neighbours_lower_the_surroundings_of_a_block(area_norm, score):
    found = find(hot_block(), plan(for_squash(2016, 2016, 336, (24, 24)), 336), neighbours=8, area_norm=area_norm)
    assert float(found.score) == pytest.approx(score, abs=1e-6)


def test_the_window_of_a_whole_image_is_all_that_sees_it():
    found = find(hot_cell(), plan(for_pad(300, 150, 336, (24, 24)), 336))
    assert found.window.tolist() == [0, 6, 24, 18]


def test_a_batch_of_images_of_any_size_is_one_call():
    rng = np.random.default_rng(0)
    heat = rng.random((len(SIZES), 24, 24), np.float32)
    plans = [plan(for_pad(*size, 336, (24, 24)), 336) for size in SIZES]
    batch = jax.vmap(find)(heat, jax.tree.map(lambda *leaves: np.stack(leaves), *plans))
    for i, single in enumerate(plans):
        one = find(heat[i], single)
        np.testing.assert_array_equal(batch.box[i], one.box)
        assert batch.ratio[i] == one.ratio
        np.testing.assert_allclose(batch.score[i], one.score, rtol=1e-5)


def test_compiled_and_not_compiled_agree():
    heat = np.random.default_rng(3).random((6, 6), np.float32)
    windows = plan(for_pad(800, 500, 336, (6, 6)), 224)
    np.testing.assert_array_equal(find.__wrapped__(heat, windows).box, find(heat, windows).box)


def test_another_image_size_or_base_compiles_nothing(compilations):
    heat = np.random.default_rng(0).random((7, 5), np.float32)
    search(heat, (640, 480), 336, alignment="official")
    before = compilations()
    for size in SIZES:
        for mode in MODES.values():
            search(heat, size, 224, geometry=mode(*size, 336, (7, 5)))
    assert compilations() == before


@pytest.fixture
def compilations():
    """A function that tells how many programs have been compiled since the test began."""
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(events)
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_compilation_counter_counts(compilations):
    search(np.zeros((3, 11), np.float32), (640, 480), 336, (1, 1.1, 1.3, 1.7), alignment="official")
    assert compilations() > 0


def test_wrong_requests_say_what_is_wrong():
    heat = np.zeros((24, 24), np.float32)
    with pytest.raises(UserError, match="needs the geometry"):
        search(heat, (640, 480), 336)
    with pytest.raises(UserError, match="expected corrected or official"):
        search(heat, (640, 480), 336, alignment="exact")
    with pytest.raises(UserError, match=r"\(640, 480\) image on a grid \(24, 24\), the map of a \(480, 640\) image"):
        search(heat, (480, 640), 336, geometry=for_pad(640, 480, 336, (24, 24)))
    with pytest.raises(UserError, match="finite heat map"):
        search(np.full((24, 24), np.nan), (640, 480), 336, alignment="official")
    with pytest.raises(UserError, match="expected positive numbers"):
        search(heat, (640, 480), 0, alignment="official")
    with pytest.raises(UserError, match="expected 4 or 8"):
        search(heat, (640, 480), 336, alignment="official", neighbours=6)
