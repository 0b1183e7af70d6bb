"""FOCUS driven by hand: what it asks, which regions it verifies and keeps, what it shows; and run on a small model."""

import json
from math import dist

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example as case
from hypothesis import given
from hypothesis import strategies as st
from small import cells_from
from tiny import tiny_llava

import jaxvqa
from jaxvqa import methods
from jaxvqa.bundled import SPECKS_LLAVA
from jaxvqa.engine import Engine
from jaxvqa.errors import UserError
from jaxvqa.geometry import covers
from jaxvqa.images import crop
from jaxvqa.methods.focus import Focus, corners_of, joined, odd, token_maps, window
from jaxvqa.methods.targets import EXAMPLES, Target
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.regions.canvas import paste
from jaxvqa.requests import Generate, Read, Reading, Reply, Row, Sample, Score, YesNo
from jaxvqa.specks.strata import samples
from jaxvqa.taps import Readouts, ReadSpec
from tests.methods.driven import FACTS, picture, sample_of

SQUARE = picture((480, 480))
GRID = FACTS.grid
SPECKS = FACTS._replace(name="small", num_layers=6, image_side=128, grid=(16, 16))


def bound(facts=FACTS, **options):
    return methods.bind(Focus(**options), facts)


def bump(row, column, height=1.0, grid=GRID):
    y, x = np.mgrid[: grid[0], : grid[1]]
    return (height * np.exp(-((x - column) ** 2 + (y - row) ** 2) / 8)).astype(np.float32)


def play(method, sample, *, maps=None, confidence=lambda request: 1.0, reply="", scores=()):
    """Run a method by hand. maps: by target, one of a token. Returns what each yield asked for, and the answer."""

    def serve(request):
        match request:
            case Read():
                target = next(
                    c for c, role in zip(request.prompt.chunks, request.prompt.roles, strict=True) if role == "user"
                )
                return Reading((maps[target][None], np.ones(1, bool)), ())
            case YesNo():
                return confidence(request)
            case Score():
                return np.array(scores, np.float32)
            case Generate(images=()):
                return Reply(reply, ())
        return Reply("42", ())

    generator, asked, result = method(sample), [], None
    try:
        while True:
            now = generator.send(result)
            asked.append(now if isinstance(now, list) else [now])
            result = [serve(request) for request in now] if isinstance(now, list) else serve(now)
    except StopIteration as stop:
        return asked, stop.value


def kinds(asked):
    return [[type(request).__name__ for request in together] for together in asked]


def told(*needs):
    return f"So I need the information about the following objects: {' and '.join(needs)}."


def boxes_of(answer):
    return answer.boxes.round().astype(int).tolist()


# ---- what is looked for ----------------------------------------------------------------------------------------------


def test_extraction_asks_after_the_examples_in_the_models_template_and_is_no_pass():
    sample = sample_of(SQUARE, "<image>\nWhat is on the hat?\n(A) dog (B) cat")
    asked, answer = play(bound(n_steps=2), sample, maps={"hat": bump(10, 10)}, reply=told("hat"))
    (extraction,), (read,), verified, (final,) = asked
    text = extraction.prompt.text
    assert text.startswith("A chat between") and text.count(" USER: Question: ") == 1 and text.count("</s>USER: ") == 6
    assert f"{EXAMPLES.response_list[5]}</s>USER: Question: What is on the hat?\nIf you want" in text
    assert text.endswith("which objects' information do you need? ASSISTANT:") and "(A)" not in text
    assert (extraction.images, extraction.max_new_tokens, extraction.passes) == ((), 256, 0)
    assert [request.passes for request in (read, *verified, final)] == [1, 1, 1, 1]
    assert answer.text == "42" and answer.status == "ok"


def test_the_target_alone_is_read_even_where_its_letters_stand_elsewhere(tiny):
    """ "hat" is also in the system prompt's "A chat"."""
    prompt = bound().existence(Target("hat with a man"))
    assert prompt.text.endswith("USER: <image>\nIs there a hat with a man in the image? Answer Yes or No. ASSISTANT:")
    start = prompt.text.index("hat with")
    tokens = tiny.tokenise(prompt, 1)
    np.testing.assert_array_equal(tokens.indices("user"), tokens.span((start, start + len("hat with a man"))))
    assert tiny.tokenizer.decode(tokens.ids[tokens.indices("user")]).strip() == "hat with a man"


def test_maps_are_read_from_the_values_of_the_papers_layers():
    (_, (read,), *_), _ = play(bound(), sample_of(SQUARE), maps={"dog": bump(10, 10)}, reply=told("dog"))
    assert read.spec == ReadSpec(tuple(range(14, 32)), frozenset({"values"})) and read.images == (SQUARE,)
    keys = bound(feature="key_no_rope", layer_start=0, layer_end=14, targets=("dog",))
    ((read,), *_), _ = play(keys, sample_of(SQUARE), maps={"dog": bump(10, 10)})
    assert read.spec == ReadSpec(tuple(range(14)), frozenset({"keys"}))


def test_targets_may_be_given_or_found_by_rules_without_a_pass():
    maps = {"red dog": bump(10, 10), "blue cat": bump(3, 20)}
    for options in ({"targets": ("red dog", "blue cat")}, {"extraction": "rules"}):
        sample = sample_of(SQUARE, "Is the red dog left of the blue cat?")
        asked, _ = play(bound(n_steps=1, **options), sample, maps=maps)
        assert kinds(asked) == [["Read"] * 2, ["YesNo"] * 2, ["Generate"]]


@pytest.mark.parametrize("reply", ["I do not know.", told("his hat"), ""])
def test_without_a_target_the_whole_image_is_asked_about(reply):
    asked, answer = play(bound(), sample_of(SQUARE), reply=reply)
    assert kinds(asked) == [["Generate"], ["Generate"]] and asked[1][0].images[0].size == SQUARE.size
    assert (answer.status, len(answer.boxes), answer.grid) == ("no target", 0, None)


# ---- which regions ---------------------------------------------------------------------------------------------------


def example():
    """The worked example: two peaks, 24 x 24, in an image of 20 pixels per cell."""
    y, x = np.mgrid[:24, :24]
    heat = np.exp(-((x - 6) ** 2 + (y - 6) ** 2) / 8) + 0.8 * np.exp(-((x - 17) ** 2 + (y - 15) ** 2) / 2)
    return {"dog": heat.astype(np.float32)}


EXAMPLE = [(80, 80, 180, 180), (320, 280, 380, 340), (80, 20, 180, 120), (20, 80, 120, 180)]
"""Its regions in pixels, best first, for four anchors three cells apart."""


def scored(*confidences):
    """A confidence for each region of the worked example, whatever the order in which they are asked for."""
    crops = [SQUARE.crop(box).tobytes() for box in EXAMPLE]
    return lambda request: confidences[crops.index(request.images[0].tobytes())]


def search(*confidences, target="dog", **options):
    method = bound(targets=(target,), n_anchors=4, **options)
    return play(method, sample_of(SQUARE), maps=example(), confidence=scored(*confidences))


def test_the_most_confident_of_the_first_regions_is_shown():
    ((read,), verified, (final,)), answer = search(-0.5, 0.2, 0.9, 1.0, n_steps=3)
    assert [request.images[0].tobytes() for request in verified] == [SQUARE.crop(box).tobytes() for box in EXAMPLE[:3]]
    assert {request.prompt.text for request in verified} == {read.prompt.text}
    assert boxes_of(answer) == [list(EXAMPLE[2])] and answer.scores.tolist() == pytest.approx([0.9])
    assert final.images[0].tobytes() == SQUARE.crop(EXAMPLE[2]).tobytes()
    expected = example()["dog"] / example()["dog"].sum()
    np.testing.assert_allclose(answer.grid, expected, rtol=1e-5)
    assert answer.heatmap.shape == (480, 480)


def test_equal_confidences_go_by_relevance():
    assert boxes_of(search(0.1, 0.5, 0.5, 0.5)[1]) == [list(EXAMPLE[1])]


def test_one_step_without_overrun_verifies_nothing():
    asked, answer = search(n_steps=1, overrun=False)
    assert kinds(asked) == [["Read"], ["Generate"]] and boxes_of(answer) == [list(EXAMPLE[0])]
    assert np.isnan(answer.scores).tolist() == [True] and answer.record()["scores"] == [None]


@given(st.lists(st.sampled_from([-0.9, -0.5, 0.0, 0.5, 0.9]), min_size=4, max_size=4), st.integers(1, 6), st.booleans())
@case([-0.5, 0.0, 0.5, 0.9], 1, True)
def test_verification_goes_on_one_by_one_to_the_first_yes(confidences, n_steps, overrun):
    asked, answer = search(*confidences, n_steps=n_steps, overrun=overrun)
    seen = confidences[: n_steps if n_steps > 1 or overrun else 0]
    if overrun and max(seen) < 0:
        for confidence in confidences[n_steps:]:
            seen = [*seen, confidence]
            if confidence > 0:
                break
    verified = [len(together) for together in asked[1:-1]]
    assert sum(verified) == len(seen) and verified[1:] == [1] * (len(seen) - min(n_steps, 4) if seen else 0)
    best = seen.index(max(seen)) if seen else 0
    assert boxes_of(answer) == [list(EXAMPLE[best])]


def test_overrun_is_each_targets_own():
    """The first has no yes at all (4 regions), the second one at once, the third one at its second step of overrun."""
    answers = {"dog": [-1, -1, -1, -1], "cat": [1, -1, -1, -1], "cow": [-1, -1, 1, 1]}
    maps = {name: example()["dog"] for name in answers}
    given = {name: iter(values) for name, values in answers.items()}

    def confidence(request):
        return next(given[next(name for name in answers if f"a {name} in" in request.prompt.text)])

    method = bound(targets=tuple(answers), n_anchors=4, n_steps=1)
    asked, _ = play(method, sample_of(SQUARE), maps=maps, confidence=confidence)
    assert [len(together) for together in asked] == [3, 3, 2, 2, 1, 1]


def test_all_of_a_kind_are_verified_kept_above_the_threshold_and_pasted():
    asked, answer = search(0.61, 0.9, 0.6, -0.2, target="all dogs", n_steps=1, overrun=False)
    assert kinds(asked)[1] == ["YesNo"] * 4, "whatever n_steps says"
    assert boxes_of(answer) == [list(EXAMPLE[1]), list(EXAMPLE[0])]
    assert answer.scores.tolist() == pytest.approx([0.9, 0.61])
    assert asked[-1][0].images[0].tobytes() == paste(SQUARE, [EXAMPLE[1], EXAMPLE[0]]).image.tobytes()
    # Boxes 0 and 2 overlap: one region of both, which is cropped.
    asked, answer = search(0.9, 0.2, 0.7, 0.2, target="all dogs")
    assert boxes_of(answer) == [[80, 20, 180, 180]] and asked[-1][0].images[0].size == (100, 160)
    assert answer.scores.tolist() == pytest.approx([0.9]), "the better of the two"
    assert boxes_of(search(0.9, 0.8, 0.2, 0.2, target="all dogs", merge_dilation=150.0)[1]) == [[80, 80, 380, 340]]


def test_where_none_of_a_kind_is_above_the_threshold_the_best_is_shown():
    _, answer = search(0.1, 0.3, 0.2, 0.0, target="all dogs")
    assert boxes_of(answer) == [list(EXAMPLE[1])] and answer.status == "no dog above the threshold"
    assert len(search(0.1, 0.3, 0.2, 0.0, target="all dogs", t_type2=0.15)[1].boxes) == 2


def test_one_target_and_all_of_a_kind_are_shown_together():
    maps = example() | {"cat": bump(20, 3)}
    method = bound(targets=("cat", "all dogs"), n_anchors=4, n_steps=1)
    confidence = scored(0.9, 0.8, 0.0, 0.0)
    asked, answer = play(
        method, sample_of(SQUARE), maps=maps, confidence=lambda r: 0.5 if "a cat" in r.prompt.text else confidence(r)
    )
    assert boxes_of(answer) == [[20, 360, 120, 460], list(EXAMPLE[0]), list(EXAMPLE[1])]
    assert asked[-1][0].images[0].size == (672, 672)


# ---- what is shown ---------------------------------------------------------------------------------------------------

WIDE = picture((2400, 600))
TWO = {"dog": bump(12, 3), "cat": bump(12, 20)}
"""Centres 1700 pixels apart in `WIDE`."""


def shown(image=WIDE, maps=TWO, question="What?", **options):
    method = bound(targets=tuple(maps), n_steps=1, overrun=False, **options)
    asked, answer = play(method, sample_of(image, question), maps=maps)
    return asked[-1][0], answer


def test_near_targets_share_a_crop_and_far_ones_a_canvas():
    final, answer = shown()
    assert final.images[0].tobytes() == paste(WIDE, answer.boxes).image.tobytes() and len(final.images) == 1
    (x, y), (u, v) = ((box[:2] + box[2:]) / 2 for box in answer.boxes)
    assert dist((x, y), (u, v)) == pytest.approx(1700, abs=60)
    near = SQUARE, {"dog": bump(12, 3), "cat": bump(12, 20)}
    assert shown(*near)[0].images[0].size == (440, 100)
    assert shown(*near, t_obj_dist=300.0)[0].images[0].size == (672, 672)
    assert shown(final="crop")[0].images[0].size == (2200, 500)


def test_the_grid_is_the_largest_over_the_targets():
    _, answer = shown()
    np.testing.assert_allclose(answer.grid, np.maximum(*(heat / heat.sum() for heat in TWO.values())), rtol=1e-5)
    assert answer.heatmap.shape == (128, 512)


def test_two_images_are_zoomeyes_main_image_and_crops():
    final, answer = shown(SQUARE, {"dog": bump(10, 10)}, final="two_image")
    assert final.prompt.text.endswith(
        "USER: <image>\nThis is the main image, and the section enclosed by the red rectangle is the focus region.\n"
        "<image>\nThis is the zoomed-in view of the focus region.\nWhat?\n"
        "Answer the question using a single word or phrase. ASSISTANT:"
    )
    main, close = final.images
    (x1, y1, x2, y2) = boxes_of(answer)[0]
    assert main.size == SQUARE.size and main.getpixel((x1 - 1, y1)) == (255, 0, 0)
    np.testing.assert_array_equal(np.asarray(close), np.asarray(SQUARE)[y1:y2, x1:x2])
    np.testing.assert_array_equal(np.asarray(main)[y1:y2, x1:x2], np.asarray(close))


def test_several_targets_are_outlined_in_the_part_around_them():
    final, answer = shown(final="two_image", question="Is the red rectangle <image> big?")
    assert final.prompt.text.count("This is the zoomed-in view of the focus region.") == 2
    assert "enclosed by the blue rectangle" in final.prompt.text and final.prompt.num_images == 3
    main, first, second = final.images
    assert main.size == (2200, 500) and first.size == second.size == (500, 500)
    x1, _, x2, _ = boxes_of(answer)[1]
    assert main.getpixel((x1 - boxes_of(answer)[0][0] - 1, 250)) == (0, 0, 255)
    np.testing.assert_array_equal(np.asarray(second)[50:-50, 50:-50], np.asarray(main)[50:-50, x1 - x2 + 50 : -50])


def test_further_images_are_shown_after_the_view_and_searched_never():
    other = picture((40, 30))
    sample = Sample((SQUARE, other), "Which?")
    for final, count in (("canvas", 2), ("two_image", 3)):
        asked, _ = play(bound(targets=("dog",), final=final), sample, maps={"dog": bump(10, 10)})
        assert asked[0][0].images == (SQUARE,) and all(len(request.images) == 1 for request in asked[1])
        assert asked[-1][0].images[-1] is other and asked[-1][0].prompt.num_images == count


def test_options_are_listed_in_the_end_or_scored():
    sample = Sample(SQUARE, "What?", options=("a dog", "a cat"))
    like = Vanilla(ending="mcq_letter")
    asked, _ = play(bound(like=like), sample, maps={"dog": bump(10, 10)}, reply=told("dog"))
    assert "A. a dog" not in asked[0][0].prompt.text and "\nA. a dog\nB. a cat\nAnswer with" in asked[-1][0].prompt.text
    asked, answer = play(
        bound(logits_match=True, targets=("dog",)), sample, maps={"dog": bump(10, 10)}, scores=(-2.0, -1.0)
    )
    assert isinstance(asked[-1][0], Score) and asked[-1][0].options == sample.options
    assert asked[-1][0].prompt.text.endswith("USER: <image>\nWhat? ASSISTANT:") and answer.text == "a cat"
    with pytest.raises(UserError, match="has no options"):
        play(bound(logits_match=True), sample_of(SQUARE))


def test_an_open_question_ends_with_the_question():
    assert shown(like=Vanilla(ending="open"))[0].prompt.text.endswith("USER: <image>\nWhat? ASSISTANT:")


def test_a_region_may_be_verified_in_a_larger_crop():
    asked, _ = play(bound(targets=("dog",), n_steps=1, min_crop=True), sample_of(SQUARE), maps=example())
    assert asked[1][0].images[0].size == (336, 336), "moved in at the left and upper border"
    assert asked[-1][0].images[0].size == (100, 100)


# ---- odd images and maps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "status"), [((10, 8), "ok"), ((3000, 20), "ok"), ((20, 3000), "ok"), ((1, 1), "no region for dog")]
)
def test_images_of_odd_sizes_are_searched_as_far_as_they_go(size, status):
    image = picture(size)
    asked, answer = play(bound(targets=("dog",)), sample_of(image), maps={"dog": bump(12, 12)})
    assert answer.status == status and answer.heatmap is not None
    if status == "ok":
        [(x1, y1, x2, y2)] = answer.boxes.tolist()
        assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]
    else:
        assert kinds(asked) == [["Read"], ["Generate"]] and asked[-1][0].images[0].size == size


@pytest.mark.parametrize("value", [0.0, 2.0, np.nan, np.inf])
def test_a_map_that_says_nothing_is_even_and_said_to_be(value):
    _, answer = play(bound(targets=("dog",)), sample_of(SQUARE), maps={"dog": np.full(GRID, value, np.float32)})
    np.testing.assert_allclose(answer.grid, 1 / 576, rtol=1e-5)
    assert answer.status == "even map" and len(answer.boxes) == 1


def test_padding_may_be_left_out():
    """480 x 240: the first and the last six rows see nothing of the image."""
    maps, image = {"dog": bump(2, 10) + bump(12, 10, 0.5)}, picture((480, 240))
    plain, masked = (
        play(bound(targets=("dog",), n_anchors=1, mask_padding=mask), sample_of(image), maps=maps)[1]
        for mask in (False, True)
    )
    assert plain.status == "no region for dog" and len(plain.boxes) == 0
    assert boxes_of(masked) == [[160, 80, 260, 180]]


def test_a_random_map_takes_no_pass_and_depends_on_the_sample_and_the_seed():
    def grid(id="7", **options):
        sample = sample_of(SQUARE, id=id)
        asked, answer = play(bound(targets=("dog", "cat"), feature="random", **options), sample)
        assert kinds(asked) == [["YesNo"] * 16, ["Generate"]]
        return answer.grid

    first = grid()
    np.testing.assert_array_equal(grid(), first)
    assert (grid(seed=1) != first).any() and (grid(id="8") != first).any()


# ---- the map of a finer grid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(480, 480), (480, 60), (60, 480)])
def test_windows_slide_by_half_of_themselves_and_skip_mere_padding(size):
    """Three of five rows of windows see any of an image that is eight times as wide as high."""
    image = picture(size)
    asked, answer = play(bound(targets=("dog",), windows=5, n_steps=1), sample_of(image), maps={"dog": bump(5, 5)})
    assert len(asked[0]) == (25 if size == (480, 480) else 15) and answer.grid.shape == (72, 72)
    assert {request.images[0].size for request in asked[0]} == {(160, 160)}
    if size == (480, 480):
        for number, request in enumerate(asked[0]):
            y, x = divmod(number, 5)
            expected = np.asarray(image)[y * 80 :, x * 80 :][:160, :160]
            np.testing.assert_array_equal(np.asarray(request.images[0]), expected)


def test_a_window_shows_the_mean_colour_beyond_the_image():
    image, method = picture((960, 96)), bound(windows=3)
    view = method.view_of(image)
    part = np.asarray(window(image, view, corners_of(view, 3)[3], GRID))
    # The image lies at rows 432 to 528 of the square, the window at 240 to 720.
    np.testing.assert_array_equal(part[192:288], np.asarray(image)[:, :480])
    assert (part[:192] == (122, 116, 104)).all() and (part[288:] == (122, 116, 104)).all()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_windows_of_one_map_join_to_it(count):
    view = bound(windows=count).view_of(SQUARE)
    corners = corners_of(view, count)
    assert view.grid == (12 * (count + 1),) * 2 and len(corners) == count**2
    whole = np.random.default_rng(0).random((2, *view.grid), np.float32)
    parts = np.stack([whole[:, row : row + 24, column : column + 24] for row, column in corners])
    np.testing.assert_allclose(joined(parts, corners, view.grid), whole, rtol=1e-6)


def test_overlapping_windows_are_averaged_and_missing_ones_are_zero():
    parts = np.stack([np.full((1, 2, 2), value, np.float32) for value in (1, 3)])
    np.testing.assert_array_equal(joined(parts, [(0, 0), (0, 1)], (3, 3)), [[[1, 2, 3], [1, 2, 3], [0, 0, 0]]])


# ---- options ---------------------------------------------------------------------------------------------------------


def test_options_follow_the_model():
    llava, specks = bound(), bound(SPECKS)
    sizes = [(m.layer_start, m.layer_end, m.s_min, m.s_max, m.s_dist, m.n_anchors) for m in (llava, specks)]
    assert sizes == [(14, 32, 3, 5, 3, 30), (3, 6, 3, 3, 2, 30)]
    assert (llava.t_obj_dist, round(specks.t_obj_dist)) == (1200, 457)
    assert (bound(FACTS._replace(num_layers=40)).layer_start, bound(windows=3).s_max) == (18, 11)
    assert [odd(cells) for cells in (0.1, 1.9, 2, 3, 3.9, 4, 10)] == [1, 1, 3, 3, 3, 5, 11]


@pytest.mark.parametrize(("n_steps", "switch", "anchors"), [(3, 4, 15), (4, 4, 30), (3, 3, 30), (2, 3, 15)])
def test_few_steps_have_fewer_anchors(n_steps, switch, anchors):
    assert bound(n_steps=n_steps, n_anchors_switch=switch).n_anchors == anchors
    assert bound(n_steps=n_steps, n_anchors=7).n_anchors == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "n_steps=0"),
        ({"windows": 0}, "windows=0"),
        ({"feature": "key"}, "feature='key'; expected one of value, key_no_rope, random"),
        ({"extraction": "guess"}, "extraction='guess'"),
        ({"final": "collage"}, "final='collage'"),
        ({"layer_start": 32}, "layer_start=32, layer_end=32; llava-1.5-7b has 32 layers"),
        ({"layer_end": 33}, "layer_end=33"),
        ({"s_min": 7, "s_max": 5}, "s_min=7, s_max=5"),
        ({"n_anchors": 0}, "n_anchors=0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        bound(**options)


def test_windows_need_an_even_grid():
    with pytest.raises(UserError, match="overlap by half"):
        bound(FACTS._replace(grid=(27, 27)), windows=2)


# ---- on the device, and through the engine ---------------------------------------------------------------------------


@pytest.mark.parametrize("feature", ["value", "key_no_rope"])
def test_the_reduction_compares_with_the_images_cells_over_all_tokens(feature):
    read = np.random.default_rng(0).normal(0.5, 1, (2, 12, 2, 4)).astype(np.float32)
    unit = read[:, :10] / np.linalg.norm(read[:, :10], axis=-1, keepdims=True)
    expected = sum(
        (u := np.einsum("IKH,JKH->IJ", layer, layer) + np.eye(10)) / u.sum(1, keepdims=True) for layer in unit
    )
    readouts = Readouts(**{{"value": "values", "key_no_rope": "keys"}[feature]: jnp.asarray(read)})
    row = Row(
        cells_from([3], (2, 2)), jnp.int32(10), jnp.array([8, 9]), jnp.array([True, False]), readouts, None, (2, 2), 12
    )
    maps, wanted = token_maps(row, feature, "row")
    np.testing.assert_allclose(maps, expected[[8, 9], 3:7].reshape(2, 2, 2), atol=1e-5)
    assert wanted.tolist() == [True, False]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tiny_llava(tmp_path_factory.mktemp("focus") / "tiny", text_layers=3, vision_layers=2, feature_layer=-1)
    return jaxvqa.load(folder, dtype="float32")


def run(vlm, samples, batch_size=2, lengths=(64, 96, 128, 192, 256, 512), **options):
    method = Focus(like=Vanilla(max_new_tokens=4), n_anchors=3, s_dist=1.0, **options)
    answers = list(Engine(vlm, batch_size=batch_size, lengths=lengths).run(samples, method))
    for answer in answers:
        if answer.error is not None:
            raise answer.error
        json.dumps(answer.record())
    return answers


def plain_map(vlm, image, name, layers, what="values", column=False):
    """The pseudocode of Figure 7 on a whole prompt's S x S similarities."""
    encoded = vlm.encode(image, bound().existence(Target(name)))
    start, length = encoded.tokens.image_spans[0]
    read = getattr(vlm.prefill(encoded, spec=ReadSpec(layers, frozenset({what}))).readouts, what)
    read = np.asarray(read, np.float64)[:, 0, : len(encoded.tokens.ids)]
    unit = (read / np.linalg.norm(read, axis=-1, keepdims=True)).reshape(*read.shape[:2], -1)
    heat = 1
    at = encoded.tokens.text.index(name)
    for token in encoded.tokens.span((at, at + len(name))):
        total = 0
        for layer in unit:
            alike = (layer @ layer.T + np.eye(len(layer))) / 2
            alike = alike / (alike.sum(1) if column else alike.sum(1)[:, None])
            total = total + alike[token, start : start + length]
        heat = heat * np.maximum(total / total.sum(), 0)
    return (heat / heat.sum()).reshape(vlm.config.grid)


def test_passes_are_a_map_and_its_regions_for_each_target(tiny, tmp_path):
    """T (1 + n) without overrun, the extraction and the answer apart."""
    chosen = [sample_of(picture((60, 40), n), id=str(n)) for n in range(3)]
    for answer in run(tiny, chosen, targets=("hat", "red plate"), n_steps=2, overrun=False):
        assert answer.forward_passes == (2 * (1 + 2), 1)
    [answer] = run(tiny, chosen[:1], targets=("all plates",), n_steps=1)
    assert answer.forward_passes == (1 + 3, 1)
    # What this model says names nothing.
    file = tmp_path / "examples.json"
    file.write_text(json.dumps({"question_template": "{}", "question_list": ["Hi?"], "response_list": ["Yes"]}))
    [answer] = run(tiny, chosen[:1], icl_examples=str(file))
    assert answer.status == "no target" and answer.forward_passes == (0, 1) and len(answer.log) == 2
    assert "USER: Hi? ASSISTANT: Yes</s>USER: What? ASSISTANT:" in answer.log[0].prompt


@pytest.mark.parametrize(
    ("options", "what", "column"),
    [
        ({"layer_start": 0, "layer_end": 2}, "values", False),
        ({"norm": "column"}, "values", True),
        ({"feature": "key_no_rope"}, "keys", False),
    ],
)
def test_the_map_is_the_pseudocodes(tiny, options, what, column):
    image = picture((60, 40))
    [answer] = run(tiny, [sample_of(image)], targets=("red plate",), n_steps=1, overrun=False, **options)
    layers = tuple(range(options.get("layer_start", 1), options.get("layer_end", 3)))
    expected = plain_map(tiny, image, "red plate", layers, what, column)
    np.testing.assert_allclose(answer.grid, expected, rtol=1e-4, atol=1e-6)


def test_confidences_of_a_batch_of_regions_are_those_of_each_crop(tiny):
    image = picture((60, 40))
    [answer] = run(tiny, [sample_of(image)], targets=("all plates",), n_steps=1, t_type2=-1.0)
    found = sorted((float(entry.result) for entry in answer.log if entry.kind == "YesNo"), reverse=True)
    yes, no = (tiny.reply_ids(word)[0] for word in ("Yes", "No"))
    for box, confidence in zip(answer.boxes, found, strict=True):
        logits = tiny.prefill(tiny.encode(crop(image, box), bound().existence(Target("plate")))).logits[0]
        assert confidence == pytest.approx(np.tanh((logits[yes] - logits[no]) / 2), abs=1e-5)


@pytest.mark.slow
def test_the_bundled_model_names_and_finds_what_is_asked_for(measured):
    chosen = list(samples("small", "dev", 12))
    vlm = jaxvqa.load(str(SPECKS_LLAVA))
    answers = list(Engine(vlm, batch_size=8).run(chosen, Focus(n_steps=4)))
    assert all(answer.error is None for answer in answers)
    named = []
    for sample, answer in zip(chosen, answers, strict=True):
        name = sample.question.removeprefix("What character is on the ").removesuffix("?")
        named.append(any(f"Is there a {name} in the image?" in entry.prompt for entry in answer.log))
        counted = sum(entry.kind in ("Read", "YesNo") for entry in answer.log)
        assert answer.forward_passes == (counted, 1)
    found = np.mean([covers(answer.boxes[0], sample.boxes[0]) for sample, answer in zip(chosen, answers, strict=True)])
    measured("FOCUS on the bundled model: targets named as asked", np.mean(named))
    measured("FOCUS on the bundled model: boxes that hold the target, 4 steps", found)
    assert np.mean(named) >= 0.6 and found >= 0.5
