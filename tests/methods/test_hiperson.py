"""HiPerson as its paper tells it, driven by hand; then both of its models end to end."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small import cells_from

import jaxvqa
from jaxvqa import methods
from jaxvqa.bundled import SPECKS_BLIP, SPECKS_LLAVA, VLMS
from jaxvqa.engine import ask_many
from jaxvqa.errors import UserError
from jaxvqa.geometry import for_crop, for_pad, for_squash
from jaxvqa.methods.controls import OtherMap, RandomCrop, TruthCrop
from jaxvqa.methods.hiperson import MATCH_MAPS, HiPerson, focus, marked
from jaxvqa.prompts import render
from jaxvqa.requests import Continue, Generate, Gradient, Read, Reading, Reply, Row
from jaxvqa.specks.strata import samples
from jaxvqa.specks.tokenizer import STEPWISE
from jaxvqa.taps import Readouts
from tests.methods.driven import FACTS, drive, picture, sample_of

GRID = (24, 24)
SHORT = "Answer the question using a single word or phrase."
SQUARE = picture((1008, 1008))  # 42 pixels to a cell
FLAT = np.ones(GRID, np.float32)
NAMED = Reply("1) A plate. 2) It lies left. 3) Answer: K.", (1,))
UNNAMED = Reply("It is a plate.", (1,))
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def spike(row, column, height=1.0, grid=GRID):
    heatmap = np.full(grid, 0.01, np.float32)
    heatmap[row, column] = height
    return heatmap


def peaks(heatmap):
    """The cells (row, column) in which one of the maps has its largest value, 1."""
    return [tuple(cell) for cell in np.argwhere(heatmap > 0.999).tolist()]


def bound(facts=FACTS, **options):
    return methods.bind(HiPerson(**options), facts)


def views(size, mode=for_pad):
    """Where LLaVA's tokens and BLIP's patches look."""
    return mode(*size, 336, GRID), for_squash(*size, 384, GRID)


def searched(method, sample, focus=FLAT, reference=FLAT, match=FLAT, *replies, mode=for_pad):
    """A method's requests and its answer, for such maps; `focus` and `reference` [h, w] or [C, h, w]."""
    llava, blip = views(sample.image.size, mode)
    layered = [np.broadcast_to(x, (1, *GRID)) if x.ndim == 2 else x for x in (focus, reference)]
    found = [Reading(x, (llava,)) for x in layered] if method.maps != "grad" else []
    found += [Reading(match, (blip,))] if method.maps != "rel" else []
    return drive(method, sample, found, *(replies or (NAMED,)))


# ---- what it asks ----


def test_the_maps_are_asked_for_together_and_in_the_papers_words():
    (search, _), _ = searched(bound(), sample_of(SQUARE, "What is on the sign?"))
    question, reference, match = search
    assert question.prompt.text == f"{SYSTEM}USER: <image>\nWhat is on the sign?\n{SHORT} ASSISTANT:"
    assert reference.prompt.text == f"{SYSTEM}USER: <image>\nDescribe this image\n{SHORT} ASSISTANT:"
    for read in (question, reference):
        assert isinstance(read, Read) and read.spec.layers == (31,) and read.rows == "question"
        assert read.images == (SQUARE,) and read.reduce is focus
    assert isinstance(match, Gradient) and (match.of, match.wrt, match.layers) == ("match", "attention", (-1,))
    assert match.images == (SQUARE,) and match.prompt == "What is on the sign?" and match.model == "matcher"
    assert match.reduce is MATCH_MAPS["enc", "sum"]


def test_the_crop_comes_first_and_then_the_image_in_three_steps():
    (_, final), answer = searched(bound(), sample_of(SQUARE, "What is it?"), spike(12, 20))
    assert isinstance(final, Generate) and final.max_new_tokens == 512
    assert final.prompt.text == (
        f"{SYSTEM}USER: <image>\n"
        "1) Observe the cropped image above and provide a brief description.\n"
        "2) Now observe the original full image below:\n"
        "<image>\n"
        "Re-describe the content of the cropped region using the full image for context.\n"
        "3) Based on the information from both images, answer the question:\n"
        "What is it? ASSISTANT:"
    )
    near, whole = final.images
    assert whole is SQUARE
    np.testing.assert_array_equal(near, np.asarray(SQUARE.crop(tuple(map(int, answer.boxes[0])))))
    assert (answer.text, answer.reasoning, answer.status) == ("K", NAMED.text, "ok")


def test_the_prompt_is_the_one_that_the_bundled_model_was_trained_on():
    (_, final), _ = searched(bound(), sample_of(SQUARE, "What is it?"))
    middle, last = STEPWISE
    assert final.prompt.text == f"{SYSTEM}USER: <image>{middle}<image>{last}What is it? ASSISTANT:"


def test_the_template_is_that_of_the_image_setup():
    cropped = bound(FACTS._replace(template="vicrop_hf", view="crop"))
    (search, final), _ = searched(cropped, sample_of(SQUARE, "Q?"), mode=for_crop)
    assert search[0].prompt.text == f"<image>\nUSER: Q? {SHORT}\nASSISTANT:"
    assert final.prompt.text.startswith("USER: <image>\n1) Observe the cropped image above")
    assert final.prompt.text.endswith("answer the question:\nQ?\nASSISTANT:")


@pytest.mark.parametrize(
    ("options", "text", "cropped"),
    [
        ({"prompt": "single"}, "<image>\n<image>\nBased on the cropped image and the full image above, answer the"
         " question:\nQ?", 0),
        ({"prompt": "single", "image_order": "full_first"}, "<image>\n<image>\nBased on", 1),
        ({"prompt": "vicrop"}, f"<image>\n<image>\nQ?\n{SHORT} ASSISTANT:", 1),
        ({"prompt": "vicrop", "image_order": "crop_first"}, f"<image>\n<image>\nQ?\n{SHORT} ASSISTANT:", 0),
        ({"image_order": "full_first"}, "<image>\n<image>\n1) Observe the cropped image above and provide a brief "
         "description.\n2) Now observe the original full image below:\nRe-describe", 1),
        ({}, "<image>\n1) Observe", 0),
    ],
)  # fmt: skip
def test_each_prompt_has_its_images_in_its_order(options, text, cropped):
    (_, final), _ = searched(bound(**options), sample_of(SQUARE, "Q?"), spike(12, 20))
    assert final.prompt.text.startswith(f"{SYSTEM}USER: {text}")
    assert final.images[1 - cropped] is SQUARE and final.images[cropped].size != SQUARE.size


def test_a_question_with_options_is_mapped_by_its_stem_and_asked_in_full():
    inline = "What is it?\n(A) a bird\n(B) a cat\nAnswer with the letter."
    for question, options, asked in (
        (inline, (), inline),
        ("What is it?", ("a bird", "a cat"), "What is it?\n(A) a bird\n(B) a cat\nAnswer with the option's letter"),
    ):
        sample = replace(sample_of(SQUARE, question), options=options)
        ((q, _, match), final), _ = searched(bound(), sample)
        assert f"<image>\nWhat is it?\n{SHORT}" in q.prompt.text and match.prompt == "What is it?"
        assert f"answer the question:\n{asked}" in final.prompt.text


def test_markers_in_the_question_are_left_out_of_every_prompt():
    ((q, _, match), final), _ = searched(bound(), sample_of(SQUARE, "<image>\nWhat?"))
    assert q.prompt.num_images == 1 and match.prompt == "What?" and final.prompt.num_images == 2


def test_further_images_are_looked_at_with_the_first_and_shown_with_it():
    images = (SQUARE, picture((40, 30)))
    ((q, _, match), final), _ = searched(bound(), sample_of(images))
    assert q.images == images and q.prompt.num_images == 2 and match.images == (SQUARE,)
    assert final.images[1:] == images and "below:\n<image><image>\nRe-describe" in final.prompt.text


@pytest.mark.parametrize(
    ("maps", "kinds"), [("rel", [Read, Read]), ("grad", [Gradient]), ("both", [Read, Read, Gradient])]
)
def test_a_map_that_is_not_wanted_is_not_asked_for(maps, kinds):
    (search, _), answer = searched(bound(maps=maps), sample_of(SQUARE), spike(3, 3), FLAT, spike(20, 20))
    assert [type(request) for request in search] == kinds
    expected = {"rel": [(3, 3)], "grad": [(20, 20)], "both": [(3, 3), (20, 20)]}[maps]
    assert peaks(answer.grid) == expected


# ---- what it reads off ----


def row_of(rows, wanted, grid=(2, 2), **fields):
    return Row(
        cells_from([3], grid), jnp.int32(10), jnp.zeros(len(wanted), int), jnp.asarray(wanted),
        Readouts(rows=jnp.asarray(rows, jnp.float32)), None, grid, rows.shape[-1], **fields,
    )  # fmt: skip


@given(arrays(np.float32, (2, 4, 10), elements=st.floats(0, 1, width=32)), st.integers(1, 4))
def test_the_focus_is_the_mean_over_the_wanted_rows_on_the_images_cells(rows, count):
    ours = focus(row_of(rows, np.arange(4) < count))
    np.testing.assert_allclose(ours, rows[:, :count, 3:7].mean(1).reshape(2, 2, 2), atol=1e-6)


@pytest.mark.parametrize("length", [4, 6])
def test_the_gradient_map_is_equation_4_on_the_first_row_or_lavis_on_the_texts(length):
    rng = np.random.default_rng(0)
    attention, gradient = rng.random((3, 6, 6), np.float32), rng.standard_normal((3, 6, 6)).astype(np.float32)
    row = row_of(attention[None], np.arange(6) < length, (2, 3), gradient=jnp.asarray(gradient)[None])
    row = replace(row, length=jnp.int32(length))
    product, positive = attention * gradient, attention * np.maximum(gradient, 0)
    text = slice(1, length - 1)
    expected = {
        ("enc", "sum"): np.maximum(product.sum(0), 0)[0],
        ("enc", "grad"): positive.mean(0)[0],
        ("tokens_mean", "sum"): np.maximum(product.sum(0), 0)[text].mean(0),
        ("tokens_mean", "grad"): positive.mean(0)[text].mean(0),
    }
    for name, heatmap in expected.items():
        np.testing.assert_allclose(MATCH_MAPS[name](row), heatmap.reshape(2, 3), atol=1e-5)


def test_include_template_reads_all_text_after_the_image():
    (search, _), _ = searched(bound(include_template=True), sample_of(SQUARE, "Q?"))
    assert search[0].rows == f"\nQ?\n{SHORT} ASSISTANT:" and search[1].rows.startswith("\nDescribe this image")
    (search, _), _ = searched(bound(include_template=True, query_rows="last"), sample_of(SQUARE, "Q?"))
    assert search[0].rows == "last"


def test_a_question_of_options_alone_is_an_error():
    with pytest.raises(UserError, match="question 1 is empty"):
        searched(bound(), sample_of(SQUARE, "\n(A) a bird\n(B) a cat"))


# ---- what it makes of the maps ----


def test_the_ratio_explains_the_references_peak_away_and_both_maps_count_alike():
    _, answer = searched(
        bound(), sample_of(SQUARE), spike(2, 2) + spike(18, 20), spike(2, 2), spike(6, 9, 1000.0), mode=for_pad
    )
    expected = np.zeros(GRID)
    ratio = (spike(2, 2) + spike(18, 20)) / spike(2, 2)
    expected += (ratio - ratio.min()) / (ratio.max() - ratio.min())
    expected[6, 9] += 1
    np.testing.assert_allclose(answer.grid, expected, atol=1e-5)
    np.testing.assert_array_equal(answer.heatmap, for_squash(1008, 1008, 336, GRID).to_image(answer.grid, (512, 512)))


def test_several_layers_give_the_mean_of_their_ratios():
    layers = np.stack([spike(1, 1, 3.0), spike(5, 5, 7.0)])
    method = bound(layer=(3, -1), maps="rel", eps=0.0)
    (search, _), answer = searched(method, sample_of(SQUARE), layers, np.full((2, *GRID), 0.5, np.float32))
    assert search[0].spec.layers == (3, 31)
    mean = layers.mean(0)
    np.testing.assert_allclose(answer.grid, (mean - mean.min()) / (mean.max() - mean.min()), atol=1e-6)


@given(arrays(np.float32, GRID, elements=st.floats(2.0**-10, 1, width=32)), st.data())
def test_a_question_that_is_the_reference_leaves_the_gradient_map_alone(heatmap, data):
    match = spike(data.draw(st.integers(0, 23)), data.draw(st.integers(0, 23)), 5.0)
    _, both = searched(bound(eps=0.0), sample_of(SQUARE), heatmap, heatmap, match)
    _, alone = searched(bound(maps="grad"), sample_of(SQUARE), match=match)
    np.testing.assert_array_equal(both.grid, alone.grid)
    np.testing.assert_array_equal(both.boxes, alone.boxes)


@pytest.mark.parametrize("mode", [for_pad, for_crop])
def test_both_maps_are_laid_on_one_grid_over_the_image(mode):
    """A thing at x 500, y 400 of 1400 × 700 pixels: both maps point at it, from different cells of their own."""
    size, at = (1400, 700), (500.0, 400.0)
    llava, blip = views(size, mode)
    cells = [tuple(view.cells_at(np.array(at)).tolist()) for view in (llava, blip)]
    assert cells[0] != cells[1]
    sample = sample_of(picture(size))
    focus, match = (spike(*cell) for cell in cells)
    _, answer = searched(bound(), sample, focus, FLAT, match, mode=mode)
    over = for_squash(*size, 336, GRID)
    assert tuple(over.cells_at(np.array(at))) == np.unravel_index(answer.grid.argmax(), GRID)
    x1, y1, x2, y2 = answer.boxes[0]
    assert x1 <= at[0] <= x2 and y1 <= at[1] <= y2

    _, literal = searched(bound(align="none"), sample, focus, FLAT, match, mode=mode)
    assert peaks(literal.grid) == sorted(cells)


def test_cells_that_a_map_does_not_cover_get_its_minimum():
    """LLaVA's centre crop of 1024 × 768 does not see the outer three of 24 columns."""
    sample = sample_of(picture((1024, 768)))
    rel = np.random.default_rng(0).random(GRID, np.float32) + 1
    _, answer = searched(bound(maps="rel"), sample, rel, FLAT, mode=for_crop)
    np.testing.assert_array_equal(answer.grid[:, [0, 1, 2, 21, 22, 23]], 0)
    assert (answer.grid[:, 3:21].max(0) > 0).all()


def test_without_alignment_maps_of_two_sizes_are_refused():
    sample, small = sample_of(SQUARE), np.ones((8, 8), np.float32)
    llava, _ = views(SQUARE.size)
    found = [Reading(FLAT[None], (llava,))] * 2 + [Reading(small, (for_squash(1008, 1008, 64, (8, 8)),))]
    with pytest.raises(UserError, match="use 'resample'"):
        drive(bound(align="none"), sample, found, NAMED)
    _, answer = drive(bound(), sample, found, NAMED)
    assert answer.grid.shape == GRID


# ---- the window ----


@pytest.mark.parametrize(
    ("options", "box"),
    [({}, (1176, 367, 1512, 703)), ({"area_norm": False}, (1076, 236, 1612, 772))],
)
def test_the_window_is_that_of_the_tables_gaussian(options, box):
    """2016 × 1512: the literal equation prefers the larger window."""
    y, x = np.mgrid[:24, :24]
    heat = np.exp(-((x - 15.5) ** 2 + (y - 7.5 - 2e-6) ** 2) / 18).astype(np.float32)
    _, answer = searched(bound(maps="grad", **options), sample_of(picture((2016, 1512))), match=heat)
    assert tuple(answer.boxes[0].tolist()) == box


def test_the_options_of_the_window_reach_it():
    heat = np.zeros(GRID, np.float32)
    heat[8:14, 10:16] = 1  # the table's block: 1.6 is as wide as it
    sample = sample_of(picture((2016, 2016)))
    for options, side in (({}, 536), ({"betas": (1.0, 1.2)}, 336), ({"base": 500, "betas": (1.0,)}, 500)):
        _, answer = searched(bound(maps="grad", **options), sample, match=heat)
        x1, y1, x2, y2 = answer.boxes[0]
        assert (x2 - x1, y2 - y1) == (side, side)
    boxes = set()
    heat = np.random.default_rng(5).random(GRID, np.float32)
    for neighbourhood in (4, 8):
        _, answer = searched(bound(maps="grad", neighbourhood=neighbourhood), sample, match=heat)
        boxes.add(tuple(answer.boxes[0].tolist()))
    assert len(boxes) == 2


@pytest.mark.parametrize("size", [(336, 336), (300, 200)])
def test_an_image_no_larger_than_the_window_is_shown_twice_or_asked_about_directly(size):
    sample = sample_of(picture(size), "Q?")
    (_, final), answer = searched(bound(), sample, spike(3, 3))
    assert answer.boxes.tolist() == [[0, 0, *size]] and [image.size for image in final.images] == [size, size]
    (_, final), answer = searched(bound(skip_if_full=True), sample, spike(3, 3), FLAT, FLAT, Reply("42", ()))
    assert final.images == (sample.image,) and (answer.text, answer.reasoning) == ("42", "42")
    assert final.prompt.text == render("vicuna_v1", "Q?", ending="short").text
    (_, final), _ = searched(bound(skip_if_full=True), sample_of(SQUARE), spike(3, 3))
    assert len(final.images) == 2


def test_one_axis_covered_by_the_window_leaves_the_other_to_search():
    _, answer = searched(bound(maps="grad", betas=(1.0,)), sample_of(picture((300, 2400))), match=spike(23, 12))
    assert answer.boxes.tolist() == [[0, 2064, 300, 2400]]


def test_a_window_smaller_than_a_cell_is_one_cell():
    method = bound(maps="grad", base=10, betas=(1.0,))
    _, answer = searched(method, sample_of(SQUARE), match=spike(3, 20))
    assert answer.boxes.tolist() == [[20 * 42 + 21 - 5, 3 * 42 + 21 - 5, 20 * 42 + 21 + 5, 3 * 42 + 21 + 5]]


def test_constant_maps_take_the_first_window():
    _, answer = searched(bound(), sample_of(SQUARE))
    assert answer.boxes.tolist() == [[0, 0, 336, 336]] and not answer.grid.any()


def test_an_attention_that_underflows_leaves_the_map_finite():
    zero = np.zeros(GRID, np.float32)
    for focused in (zero, spike(4, 4)):
        _, answer = searched(bound(), sample_of(SQUARE), focused, zero)
        assert np.isfinite(answer.grid).all()


@pytest.mark.parametrize("mode", [for_pad, for_crop])
def test_tiles_are_looked_at_one_by_one_and_their_maps_put_together(mode):
    """2250 × 1500 in two rows of three tiles of 750 × 750; the thing is in the fourth tile."""
    image = picture((2250, 1500))
    method = bound(tiling=1024)
    generator = method(sample_of(image, "Q?"))
    asked = generator.send(None)
    assert len(asked) == 13 and all(request.images[0].size == (750, 750) for request in asked[:12])
    np.testing.assert_array_equal(asked[3].images[0], np.asarray(image)[750:, :750])
    assert {request.prompt.text for request in asked[:6]} == {f"{SYSTEM}USER: <image>\nQ?\n{SHORT} ASSISTANT:"}
    assert {request.prompt.text.count("Describe this image") for request in asked[6:12]} == {1}
    view, maps = mode(750, 750, 336, GRID), [FLAT[None] / 100] * 6 + [FLAT[None]] * 6
    maps[3] = spike(6, 12)[None]  # x 375..406, y 937..968
    found = [Reading(heatmap, (view,)) for heatmap in maps] + [Reading(FLAT, (for_squash(2250, 1500, 384, GRID),))]
    generator.send(found)
    with pytest.raises(StopIteration) as stop:
        generator.send(NAMED)
    answer = stop.value.value
    assert answer.grid.shape == (48, 72) and answer.grid[24 + 6, 12] == answer.grid.max()
    x1, y1, x2, y2 = answer.boxes[0]
    assert x1 <= 375 and x2 >= 406 and y1 <= 937 and y2 >= 968


# ---- the answer ----


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("1) A. 2) B. 3) Answer: K", "K"),
        ("Answer: no. Answer:  two words. ", "two words"),
        ("Answer: K.\nThat is certain.", "K"),
        ("Answer: 3.5.", "3.5"),
        ("The answer is K.", None),
        ("Answer:\nK", None),
        ("Answer: .", None),
        ("", None),
    ],
)
def test_the_answer_is_what_follows_the_last_marker_on_its_line(reply, answer):
    assert marked(reply) == answer


def test_a_reply_that_names_no_answer_is_asked_for_one():
    (_, first, second), answer = searched(
        bound(), sample_of(SQUARE, "Q?"), FLAT, FLAT, FLAT, UNNAMED, Reply("a plate.", ())
    )
    assert first.keep and isinstance(second, Continue) and second.of is UNNAMED and second.max_new_tokens == 20
    turn = first.prompt.text
    assert second.prompt.text == f"{turn} It is a plate.</s>USER: {SHORT} ASSISTANT:"
    assert (answer.text, answer.reasoning, answer.status) == ("a plate", "It is a plate.", "second turn")


def test_the_answer_may_always_be_asked_for_or_be_the_whole_reply():
    (_, _, second), answer = searched(
        bound(extract="second_turn"), sample_of(SQUARE), FLAT, FLAT, FLAT, NAMED, Reply("K", ())
    )
    assert isinstance(second, Continue) and (answer.text, answer.status) == ("K", "ok")
    for options in ({"extract": "whole"}, {"prompt": "vicrop"}):
        (_, final), answer = searched(bound(**options), sample_of(SQUARE))
        assert answer.text == NAMED.text and not final.keep


# ---- options ----


def test_what_is_left_open_follows_the_preset_and_the_model():
    default, literal, middle, vicrop = (
        bound(preset=preset) for preset in ("default", "literal", "middle", "vicrop_like")
    )

    def told(method):
        return method.layer, method.query_rows, method.area_norm, method.neighbourhood, method.q_ref, method.align

    neutral, general = "Describe this image", "Write a general description of the image."
    assert told(default) == ((31,), "question", True, 4, neutral, "resample")
    assert told(literal) == ((31,), "question", False, 8, neutral, "resample")
    assert told(middle) == ((14,), "question", True, 4, neutral, "resample")
    assert told(vicrop) == ((14,), "last", True, 4, general, "none")
    assert bound(FACTS._replace(num_layers=40), preset="middle").layer == (18,)
    assert bound(preset="literal", area_norm=True).area_norm is True
    assert (default.base, default.betas, default.eps) == (336, (1.0, 1.2, 1.4, 1.6, 1.8, 2.0), 1e-8)


@pytest.mark.parametrize(
    ("folder", "layer"), list(zip(VLMS, (5, 3), strict=True)), ids=[folder.name for folder in VLMS]
)
def test_the_matcher_and_its_layer_go_with_the_model(folder, layer):
    small = FACTS._replace(name=folder.name)
    assert (bound().matcher, bound().itm_layer) == ("Salesforce/blip-itm-large-coco", -1)
    assert bound(itm_rows="tokens_mean").itm_layer == 6
    assert (bound(small).matcher, bound(small).itm_layer) == (str(SPECKS_BLIP), 0)
    assert bound(small, matcher="mine").itm_layer == -1 and bound(small, itm_layer=2).itm_layer == 2
    assert bound(maps="rel").matcher is None
    assert (bound(small).layer, bound(small).query_rows) == ((layer,), "last")
    assert bound(small, preset="literal").layer == (31,) and bound(small, query_rows="question").layer == (layer,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 32}, "layer=32; llava-1.5-7b has layers 0 to 31"),
        ({"layer": ()}, "layers 0 to 31"),
        ({"itm_layer": -1, "itm_rows": "tokens_mean"}, "only the \\[ENC\\] row has a gradient"),
        ({"preset": "loose"}, "preset='loose'"),
        ({"maps": "none"}, "maps='none'"),
        ({"extract": "all"}, "extract='all'"),
        ({"neighbourhood": 6}, "expected 4 or 8"),
        ({"tiling": 0}, "expected at least 1 pixel"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        bound(**options)


def test_the_mean_over_tokens_of_a_last_layer_is_refused_whatever_its_number():
    with pytest.raises(UserError, match=r"itm_layer=11 with itm_rows='tokens_mean' gives no map"):
        searched(bound(itm_layer=11, itm_rows="tokens_mean"), sample_of(SQUARE), match=np.zeros(GRID, np.float32))


def test_controls_work_on_it():
    """A random crop, another question's map, the true crop: each with the steps that follow a found one."""
    sample = sample_of(SQUARE, "Q?", boxes=((600, 600, 640, 640),), other="Where?")
    llava, blip = views(SQUARE.size)
    maps = [Reading(spike(3, 3)[None], (llava,)), Reading(FLAT[None], (llava,)), Reading(FLAT, (blip,))]
    (_, own), found = drive(bound(), sample, maps, NAMED)
    (_, moved), random = drive(RandomCrop(bound()), sample, maps, NAMED)
    (other, _), _ = drive(OtherMap(bound()), sample, maps, NAMED)
    (true,), _ = drive(TruthCrop(bound()), sample, NAMED)
    assert moved.prompt == own.prompt == true.prompt and random.text == found.text == "K"
    assert (random.boxes != found.boxes).any() and other[0].prompt.text.count("Where?") == 1
    np.testing.assert_array_equal(true.images[0], np.asarray(SQUARE)[452:788, 452:788])


# ---- end to end ----


@pytest.mark.slow
def test_on_the_bundled_models_it_reads_small_characters():
    asked = list(samples("small", "dev", 12))
    answers = list(ask_many(jaxvqa.load(SPECKS_LLAVA), asked, "hiperson", batch_size=12, max_new_tokens=48))
    assert all(answer.error is None for answer in answers), answers[0].error
    assert sum(answer.text == sample.answer for answer, sample in zip(answers, asked, strict=True)) >= 9
    for answer in answers:
        assert answer.reasoning.startswith("1) ") and answer.reasoning.endswith(f"Answer: {answer.text}")
        assert answer.grid.shape == (16, 16) and answer.status == "ok" and answer.forward_passes == (2, 1)
        assert answer.cost.passes == {"read": 2, "match_gradient": 1, "generate": 1} and json.dumps(answer.record())
