"""ViCrop as its paper tells it, driven by hand: what it asks, in which words, and what it makes of the replies."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small import cells_from
from tiny import tiny_llava

import jaxvqa
from jaxvqa import methods
from jaxvqa.engine import Engine
from jaxvqa.errors import UserError
from jaxvqa.geometry import for_crop, for_pad, for_squash
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import MAPS, Vicrop, attention_on_image, length_on_image, preview_size, weighted_on_image
from jaxvqa.prompts import GENERAL_QUESTION
from jaxvqa.requests import Answer, Generate, Gradient, Read, Reading, Reply, Row, Sample
from jaxvqa.taps import Readouts, ReadSpec
from jaxvqa.transforms.gradient import high_pass
from tests.methods.driven import FACTS, drive, picture

GRID, SIDE, CELL = (24, 24), 336, 14
SUFFIX = "Answer the question using a single word or phrase."
VICROP = Vicrop(layer=14, base=336)
EVERY = [*MAPS, *(f"{name}_high" for name in MAPS)]


def spike(row, column):
    grid = np.full(GRID, 0.01, np.float32)
    grid[row, column] = 1.0
    return grid


FLAT = np.ones(GRID, np.float32)


def bound(maps="rel_att", **options):
    return methods.bind(Vicrop(maps, **options), FACTS)


def searched(method, sample, maps, view):
    """Drive a method against a made-up map for each tile: (requests of the search, final request, answer)."""
    kind, results = method.maps.removesuffix("_high"), []
    for one in maps:
        if kind == "pure_grad":
            one = np.kron(one, np.ones((CELL, CELL), np.float32))
        results += [Reading(one, (view,))] + [Reading(np.ones_like(one), (view,))] * (kind != "grad_att")
    (search, final), answer = drive(method, sample, results, Reply("42", (1,)))
    return search, final, answer


# ---- what is asked ----


def test_prompts_layers_and_lengths_are_those_of_the_release():
    sample = Sample(picture((672, 672)), "What is on the sign?")
    search, final, _ = searched(VICROP, sample, [spike(4, 20)], for_pad(672, 672, SIDE, GRID))
    assert [request.prompt.text for request in search] == [
        f"<image>\nUSER: What is on the sign? {SUFFIX}\nASSISTANT:",
        f"<image>\nUSER: Write a general description of the image. {SUFFIX}\nASSISTANT:",
    ]
    assert all(isinstance(request, Read) and request.spec.layers == (14,) for request in search)
    assert {request.rows for request in search} == {"last"}
    assert isinstance(final, Generate)
    assert final.prompt.text == f"<image><image>\nUSER: What is on the sign? {SUFFIX}\nASSISTANT:"
    assert (final.max_new_tokens, final.temperature) == (20, 0.0)


def test_grad_att_asks_once_for_the_gradient_to_the_layers_attention_without_a_reference():
    sample = Sample(picture((672, 672)), "What is on the sign?")
    (request,), _, answer = searched(bound("grad_att"), sample, [spike(4, 20)], for_pad(672, 672, SIDE, GRID))
    assert isinstance(request, Gradient)
    assert (request.wrt, request.of, request.rows, request.layers) == ("attention", "top", "last", (14,))
    assert request.prompt == VICROP.prompt("What is on the sign?", 1)
    np.testing.assert_array_equal(answer.grid, spike(4, 20))


def test_pure_grad_asks_for_the_gradient_to_the_pixels_under_the_question_and_a_general_request():
    sample = Sample(picture((672, 672)), "What is on the sign?")
    search, _, _ = searched(bound("pure_grad"), sample, [spike(4, 20)], for_pad(672, 672, SIDE, GRID))
    texts = ("What is on the sign?", GENERAL_QUESTION)
    assert [request.prompt for request in search] == [VICROP.prompt(text, 1) for text in texts]
    assert all(isinstance(request, Gradient) for request in search)
    assert {(request.wrt, request.of, request.layers) for request in search} == {("pixels", "top", ())}


@pytest.mark.parametrize("maps", EVERY)
@pytest.mark.parametrize("question", ["What is on it?", "What is on it?\n(A) a cat\n(B) a dog"])
def test_options_are_in_the_last_prompt_alone(maps, question):
    """In the sample's options, or in the text: maps are made for the stem."""
    options = ("a cat", "a dog") if question == "What is on it?" else ()
    view = for_pad(672, 672, SIDE, GRID)
    sample = Sample(picture((672, 672)), question, options=options)
    search, final, _ = searched(bound(maps), sample, [FLAT], view)
    assert {request.prompt for request in search} <= {
        VICROP.prompt(text, 1) for text in ("What is on it?", GENERAL_QUESTION)
    }
    line = "\nAnswer with the option's letter from the given choices directly." if options else ""
    asked = f"What is on it?\n(A) a cat\n(B) a dog{line}"
    assert final.prompt.text == f"<image><image>\nUSER: {asked} {SUFFIX}\nASSISTANT:"
    if options:
        _, final, _ = searched(bound(maps, listing="mcq_letter"), sample, [FLAT], view)
        assert "What is on it?\nA. a cat\nB. a dog\n" in final.prompt.text


@pytest.mark.parametrize("maps", EVERY)
@pytest.mark.parametrize("question", ["?", "<image>\n<image>\n?"])
def test_further_images_are_shown_before_the_crop_and_beside_each_tile(maps, question):
    images, further = (picture((2000, 1100)), picture((40, 30))), 1 if "high" not in maps else 6
    view = for_pad(*((667, 550) if "high" in maps else (2000, 1100)), SIDE, GRID)
    search, final, _ = searched(bound(maps), Sample(images, question), [FLAT] * further, view)
    assert all(request.images[1] is images[1] for request in search)
    assert {(len(request.images), request.prompt.num_images) for request in search} == {(2, 2)}
    assert final.images[:2] == images and final.prompt.num_images == 3


# ---- the map and the crop ----


def test_the_crop_lies_where_the_ratio_of_the_maps_peaks_and_keeps_the_images_resolution():
    """The question's own peak is explained away by the reference; what stands out is elsewhere."""
    sample, view = Sample(picture((672, 672)), "?"), for_pad(672, 672, SIDE, GRID)
    question = spike(2, 2) + spike(18, 20)
    readings = [Reading(question, (view,)), Reading(spike(2, 2), (view,))]
    (_, final), answer = drive(VICROP, sample, readings, Reply("42", ()))
    [box] = answer.boxes.tolist()
    x1, y1, x2, y2 = box
    assert x1 <= 20.5 * 28 <= x2 and y1 <= 18.5 * 28 <= y2
    assert x2 - x1 == y2 - y1 and x2 - x1 >= 336
    whole, crop = final.images
    assert whole is sample.image
    np.testing.assert_array_equal(np.asarray(crop), np.asarray(sample.image.crop(tuple(map(int, box)))))
    np.testing.assert_allclose(answer.grid, question / spike(2, 2))
    assert answer.text == "42"


@pytest.mark.parametrize("maps", MAPS)
def test_corrected_alignment_follows_the_preprocessing_and_official_the_release(maps):
    """1024 x 768, centre-cropped: cell (20, 21) looks at x 800..832; laid over the whole image, at x 896..939."""
    sample, view = Sample(picture((1024, 768)), "?"), for_crop(1024, 768, SIDE, GRID)
    heat = {}
    for alignment, x in (("corrected", 816), ("official", 917)):
        method = bound(maps, base=100, ratios=(1.0,), alignment=alignment)
        _, _, answer = searched(method, sample, [spike(20, 21)], view)
        x1, _, x2, _ = answer.boxes[0]
        assert x1 <= x <= x2
        heat[alignment] = answer.heatmap
        assert answer.heatmap.shape == (384, 512)
        assert abs(int(answer.heatmap.max(0).argmax()) * 2 - x) < 45
    assert (heat["corrected"][:, :60] == heat["corrected"].min()).all(), "what the encoder did not see stays cold"


@pytest.mark.parametrize("alignment", ["corrected", "official"])
def test_pure_grad_is_the_ratio_of_lengths_where_the_image_has_detail_averaged_over_cells(alignment):
    """1024 x 768, padded: the encoder sees the image in rows 42..293; the release's detail is of a squashed one."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(np.kron(rng.integers(0, 256, (32, 32, 3)), np.ones((24, 32, 1))).astype(np.uint8))
    view, mask = for_pad(*image.size, SIDE, GRID), np.zeros((SIDE, SIDE), bool)
    rows = slice(42, 294) if alignment == "corrected" else slice(0, SIDE)
    detail = high_pass(image, (SIDE, rows.stop - rows.start))
    mask[rows] = detail > np.median(detail)
    asked, general = rng.random((2, SIDE, SIDE), np.float32)
    readings = [Reading(asked, (view,)), Reading(general, (view,))]
    _, answer = drive(bound("pure_grad", alignment=alignment), Sample(image, "?"), readings, Reply("42", ()))
    expected = (asked / general * mask).reshape(24, CELL, 24, CELL).mean((1, 3))
    np.testing.assert_allclose(answer.grid, expected, rtol=1e-4, atol=1e-6)
    assert (answer.grid[:3] == 0).all() == (alignment == "corrected"), "padding has no detail"


# ---- tiles ----


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("alignment", ["corrected", "official"])
def test_the_maps_of_tiles_lie_side_by_side(maps, alignment):
    """An image of V*Bench: six squares of 750, a map of 48 x 72, one crop of the whole image."""
    sample, view = Sample(picture((2250, 1500)), "What?"), for_pad(750, 750, SIDE, GRID)
    hot = [spike(6, 7) if n == 4 else 0.01 * FLAT for n in range(6)]
    method = bound(f"{maps}_high", alignment=alignment)
    search, final, answer = searched(method, sample, hot, view)
    plain, _, _ = searched(bound(maps), sample, hot[:1], for_pad(2250, 1500, SIDE, GRID))
    assert [request.prompt for request in search] == [request.prompt for request in plain] * 6
    tiles = [request.images[0] for request in search[:: len(plain)]]
    corners = [(x, y) for y in (0, 750) for x in (0, 750, 1500)]
    for tile, (x, y) in zip(tiles, corners, strict=True):
        np.testing.assert_array_equal(np.asarray(tile), np.asarray(sample.image)[y : y + 750, x : x + 750])
    assert answer.grid.shape == (48, 72)
    if maps != "pure_grad":
        for (x, y), one in zip(corners, hot, strict=True):
            row, column = y * 24 // 750, x * 24 // 750
            np.testing.assert_array_equal(answer.grid[row : row + 24, column : column + 24], one)
    assert np.unravel_index(answer.grid.argmax(), (48, 72)) == (30, 31)
    x1, y1, x2, y2 = answer.boxes[0]
    assert x1 <= 31.5 * 31.25 <= x2 and y1 <= 30.5 * 31.25 <= y2 and 336 <= x2 - x1 == y2 - y1
    assert [image.size for image in final.images] == [(2250, 1500), (x2 - x1, y2 - y1)]
    assert answer.heatmap.shape == (341, 512)


@pytest.mark.parametrize(("alignment", "y"), [("corrected", 38.8), ("official", 80.2)])
def test_where_a_tile_is_padded_its_map_is_laid_over_what_its_cells_see(alignment, y):
    """2000 x 1100 in tiles of 667 x 550: row 3 of a padded tile sees y 24.9..52.7, and lies at 68.8..91.7 of it."""
    method = bound("grad_att_high", base=40, ratios=(1.0,), alignment=alignment)
    hot = [spike(3, 20) if n == 1 else 0.01 * FLAT for n in range(6)]
    _, _, answer = searched(method, Sample(picture((2000, 1100)), "?"), hot, for_pad(667, 550, SIDE, GRID))
    x1, y1, x2, y2 = answer.boxes[0]
    assert y1 <= y <= y2 and not y1 <= 119 - y <= y2
    assert x1 <= 667 + 20.5 * 667 / 24 <= x2


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("size", [(700, 500), (1023, 1024), (600, 1000)])
def test_an_image_of_one_tile_is_left_whole(maps, size):
    sample, view = Sample(picture(size), "?"), for_pad(*size, SIDE, GRID)
    plain = searched(bound(maps), sample, [spike(9, 12)], view)
    high = searched(bound(f"{maps}_high"), sample, [spike(9, 12)], view)
    assert high[0] == plain[0] and high[0][0].images[0] is sample.image
    np.testing.assert_array_equal(high[2].boxes, plain[2].boxes)
    np.testing.assert_array_equal(high[2].grid, plain[2].grid)


def test_a_tile_is_as_high_as_in_the_paper_in_proportion_to_the_encoder():
    assert bound().tile == 1024
    assert methods.bind(Vicrop(), FACTS._replace(image_side=128)).tile == 390
    assert bound("rel_att_high", tile=500).split((2000, 1000)) == (2, 4, (500, 500))


# ---- odd images and maps ----


@pytest.mark.parametrize("maps", EVERY)
@pytest.mark.parametrize("size", [(300, 200), (336, 336), (1, 1)])
def test_an_image_smaller_than_the_window_is_shown_whole_twice(maps, size):
    sample = Sample(picture(size), "?")
    _, final, answer = searched(bound(maps), sample, [spike(12, 12)], for_pad(*size, SIDE, GRID))
    assert answer.boxes.tolist() == [[0, 0, *size]] and [image.size for image in final.images] == [size, size]


@pytest.mark.parametrize("maps", EVERY)
def test_a_constant_map_gives_the_first_window(maps):
    """A plain image has no detail, so that its pure_grad is constant, too."""
    image = Image.new("RGB", (2001, 1100), (90, 60, 30))
    tiles, size = (6, (667, 550)) if "high" in maps else (1, image.size)
    view = for_squash(*size, SIDE, GRID)
    _, _, answer = searched(bound(maps), Sample(image, "?"), [3 * FLAT] * tiles, view)
    assert answer.boxes.tolist() == [[0, 0, 336, 336]]
    assert np.ptp(answer.grid) == np.ptp(answer.heatmap) == 0


@pytest.mark.parametrize("maps", EVERY)
def test_a_very_wide_image(maps):
    """4000 x 200: 20 square tiles; or, padded, two rows of cells, which the crop is higher than."""
    tiles, view, hot = 1, for_pad(4000, 200, SIDE, GRID), (12, 20)
    if "high" in maps:
        tiles, view, hot = 20, for_pad(200, 200, SIDE, GRID), (12, 2)
    heat = [spike(*hot) if n in (0, 17) else 0.01 * FLAT for n in range(tiles)]
    heat[0] = heat[0] * (1 if tiles == 1 else 0.1)
    x = 20.5 * 4000 / 24 if tiles == 1 else 17 * 200 + 2.5 * 200 / 24
    search, _, answer = searched(bound(maps), Sample(picture((4000, 200)), "?"), heat, view)
    assert len(search) == tiles * (1 if "grad_att" in maps else 2)
    x1, y1, x2, y2 = answer.boxes[0]
    assert x1 <= x <= x2 and (y1, y2) == (0, 200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": "rel"}, "maps='rel'; expected one of rel_att, grad_att, pure_grad, rel_att_high, "),
        ({"alignment": "none"}, "alignment='none'"),
        ({"tile": 0}, "tile=0; expected at least 1 pixel"),
        ({"layer": 32}, "llava-1.5-7b has layers 0 to 31"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        bound(**options)


# ---- reductions ----


def row_of(readouts, gradient=None, starts=(3,), grid=(2, 2)):
    keys = 10
    return Row(
        cells_from(starts, grid),
        jnp.int32(keys),
        jnp.zeros(1, int),
        jnp.ones(1, bool),
        readouts,
        None,
        grid,
        keys,
        gradient,
    )


def test_the_reduction_reads_the_first_images_cells():
    rows = Readouts(rows=jnp.arange(10.0)[None, None])
    np.testing.assert_array_equal(attention_on_image(row_of(rows)), [[3, 4], [5, 6]])


def test_grad_att_drops_what_speaks_against_the_answer_in_each_head_and_averages_over_heads():
    rng = np.random.default_rng(0)
    attention, gradient = rng.random((1, 4, 1, 10)), rng.standard_normal((1, 4, 1, 10))
    row = row_of(Readouts(rows=jnp.asarray(attention)), jnp.asarray(gradient), starts=(5, 0))
    expected = [np.mean([attention[0, n, 0, s] * max(gradient[0, n, 0, s], 0) for n in range(4)]) for s in range(5, 9)]
    np.testing.assert_allclose(weighted_on_image(row), np.reshape(expected, (2, 2)), rtol=1e-6)


def test_pure_grad_takes_the_length_over_the_colours_of_the_first_images_pixels():
    gradient = np.random.default_rng(0).standard_normal((2, 4, 4, 3))
    lengths = length_on_image(row_of(None, jnp.asarray(gradient)))
    np.testing.assert_allclose(lengths, np.linalg.norm(gradient[0], axis=-1), rtol=1e-6)


def test_vanilla_asks_once_with_the_short_ending():
    generator = Vanilla(template="vicuna_v1")(Sample(picture((30, 30)), "What?"))
    request = generator.send(None)
    assert request.prompt.text.endswith(f"USER: <image>\nWhat?\n{SUFFIX} ASSISTANT:")
    with pytest.raises(StopIteration) as stop:
        generator.send(Reply("x", ()))
    assert stop.value.value.text == "x" and len(stop.value.value.boxes) == 0


@given(w=st.integers(1, 5000), h=st.integers(1, 5000))
def test_heat_maps_in_image_coordinates_keep_the_shape_within_512_pixels(w, h):
    width, height = preview_size((w, h))
    assert max(width, height) <= 512 and min(width, height) >= 1
    assert abs(width - w * min(1, 512 / max(w, h))) <= 1


# ---- through the engine ----


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tiny_llava(tmp_path_factory.mktemp("vicrop") / "tiny", text_layers=3, vision_layers=2, feature_layer=-1)
    return Engine(jaxvqa.load(folder, dtype="float32"), batch_size=2, lengths=(16, 192))


def answers(engine, samples, method):
    found = list(engine.run(samples, method))
    for answer in found:
        if answer.error is not None:
            raise answer.error
    return found


PASSES = {"rel_att": ("read", 2), "grad_att": ("gradient", 1), "pure_grad": ("gradient", 2)}
"""What serves each map, and how often for each tile: the table of costs in ViCrop and FOCUS."""


@pytest.mark.parametrize("kind", MAPS)
def test_logical_passes_are_the_papers(engine, kind):
    """Whole, and in two and six tiles; the answer is the last pass."""
    served, times = PASSES[kind]
    images = {1: picture((60, 40)), 2: picture((340, 170)), 6: picture((510, 340))}
    for maps, tiles in ((kind, dict.fromkeys(images, 1)), (f"{kind}_high", {n: n for n in images})):
        samples = [Sample(image, "What is it?", id=str(n)) for n, image in images.items()]
        method = Vicrop(maps, base=30, max_new_tokens=4)
        for n, answer in zip(images, answers(engine, samples, method), strict=True):
            assert tuple(answer.forward_passes) == (times * tiles[n], 1)
            assert answer.cost.passes == {served: times * tiles[n], "generate": 1}
            assert answer.grid.size == 16 * tiles[n] and np.isfinite(answer.grid).all() and np.ptp(answer.grid) > 0
            x1, y1, x2, y2 = answer.boxes[0]
            assert 0 <= x1 < x2 <= images[n].width and 0 <= y1 < y2 <= images[n].height


def test_the_maps_of_gradients_are_the_papers_equations(engine):
    """From the whole gradients, in NumPy."""
    sample, read = Sample(picture((60, 40)), "What is it?"), {}

    def whole(sample):
        asked, general = (VICROP.prompt(text, 1) for text in (sample.question, GENERAL_QUESTION))
        read["rows"], read["slopes"], *read["pixels"] = yield [
            Read(sample.images, asked, ReadSpec((1,), frozenset({"rows"}), heads="all")),
            Gradient(sample.images, asked, layers=(1,)),
            Gradient(sample.images, asked, wrt="pixels"),
            Gradient(sample.images, general, wrt="pixels"),
        ]
        return Answer("done")

    answers(engine, [sample], whole)
    options = {"base": 30, "max_new_tokens": 4, "layer": 1}
    (weighted,), (pixels,) = (answers(engine, [sample], Vicrop(maps, **options)) for maps in ("grad_att", "pure_grad"))

    start, length = engine.default.tokenise(VICROP.prompt(sample.question, 1), 1).image_spans[0]
    rows, slopes = (x[0, :, 0, start : start + length] for x in (read["rows"].value.rows, read["slopes"].value))
    expected = (rows * np.maximum(slopes, 0)).mean(0).reshape(4, 4)
    np.testing.assert_allclose(weighted.grid, expected, rtol=1e-4, atol=1e-8)

    asked, general = (np.linalg.norm(reading.value[0], axis=-1) for reading in read["pixels"])
    detail, mask = high_pass(sample.image, (56, 38)), np.zeros((56, 56), bool)
    mask[9:47] = detail > np.median(detail)  # 60 x 40, padded: the rows from 9.3 to 46.7
    expected = (asked / general * mask).reshape(4, 14, 4, 14).mean((1, 3))
    np.testing.assert_allclose(pixels.grid, expected, rtol=1e-3, atol=1e-6)
