"""The references reproduce what can be worked out by hand, and the outputs of public code, before they judge others."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

import torch
from cof_reference import cells, parse, pixels
from focus_reference import compose, iou, merge, product, propose, similarity
from hiperson_reference import minmax, resample
from plain import Llava, attention, view_of
from tiny import tiny_llava
from vicrop_reference import high_pass, window
from vif_reference import inject, mixture

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    torch.set_num_threads(1)
    return Llava(tiny_llava(tmp_path_factory.mktemp("llava")))


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_an_attention_that_edits_nothing_is_that_of_transformers(llava):
    text = "USER: <image>\nWhat? ASSISTANT:"
    plain = llava.run([noise(90, 60)], text)
    with attention():
        edited = llava.run([noise(90, 60)], text)
    torch.testing.assert_close(edited.logits, plain.logits, rtol=0, atol=1e-5)
    with attention(scores=lambda layer, x: 2 * x):
        assert not torch.allclose(llava.run([noise(90, 60)], text).logits, plain.logits, atol=1e-2)


def test_the_greedy_reply_is_that_of_transformers_own_loop(llava):
    text = "USER: <image>\nWhat is red? ASSISTANT:"
    ids = torch.tensor([llava.tokens(text)[0]])
    found = llava.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=llava.pixels([noise(90, 60)]),
        max_new_tokens=9,
        do_sample=False,
    )
    theirs = llava.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert llava.generate([noise(90, 60)], text, 9) == theirs


def test_tokens_of_a_phrase_are_found_around_images(llava):
    text = "USER: <image>\nIs there a red plate? ASSISTANT:"
    ids = llava.tokens(text)[0]
    assert llava.tokenizer.decode([ids[i] for i in llava.positions(text, "red plate")]).strip() == "red plate"
    columns = llava.columns(text)
    assert columns == list(range(columns[0], columns[0] + 16))


def test_views_follow_the_worked_example_of_a_1024_by_768_image():
    padded, cropped = (view_of(setup, (1024, 768), 336, (24, 24)) for setup in ("pad", "hf"))
    assert padded.origin == (0, -128) and padded.extent == (1024, 1024)
    np.testing.assert_allclose((*cropped.origin, *cropped.cell), (128, 0, 32, 32))


def test_windows_are_those_of_the_public_code():
    for case in json.loads((GOLDEN / "vicrop_bbox.json").read_text())["bbox"]:
        r, (h, w) = np.random.RandomState(case["seed"]), case["map_shape"]
        heat = r.rand(h, w)
        if case["blob"]:
            cy, cx, s = r.rand() * h, r.rand() * w, 1 + 3 * r.rand()
            y, x = np.mgrid[:h, :w]
            heat += 8 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * s * s))
        size = case["image_size"]
        assert list(window(heat, (0, 0), size, size, case["base"])[0]) == case["bbox"], case


def test_high_pass_masks_are_those_of_the_public_code():
    case = json.loads((GOLDEN / "vicrop_highpass.json").read_text())["cases"][2]
    r, (w, h) = np.random.RandomState(case["seed"]), case["size"]
    coarse = r.randint(0, 256, (h // 25 + 1, w // 25 + 1, 3)).repeat(25, axis=0).repeat(25, axis=1)[:h, :w]
    image = np.clip(coarse + r.randint(-20, 21, (h, w, 3)), 0, 255).astype(np.uint8)
    busy = high_pass(Image.fromarray(image), (case["res"],) * 2)
    assert abs(np.median(busy) - case["median"]) < 1e-6 and abs(busy.mean() - case["mean"]) < 1e-6


@pytest.mark.parametrize("area_norm, box", [(True, (1176, 367, 1512, 703)), (False, (1076, 236, 1612, 772))])
def test_without_area_normalisation_the_larger_window_wins(area_norm, box):
    y, x = np.mgrid[:24, :24]
    heat = np.exp(-((x - 15.5) ** 2 + (y - 7.5) ** 2) / 18)
    assert window(heat, (0, 0), (2016, 1512), (2016, 1512), 336, area_norm=area_norm)[0] == box


def test_maps_are_stretched_and_resampled_by_area():
    np.testing.assert_allclose(
        minmax(np.array([[1, 2], [3, 5]])) + minmax(np.array([[0, 4], [2, 4]])), [[0, 1.25], [1, 2]]
    )
    assert not minmax(np.full((2, 2), 3.0)).any()
    # Half of a padded square's height is the image's: its 2 inner rows of 4, each seen by two rows of the result.
    heat = np.arange(16.0).reshape(4, 4)
    got = resample(heat, view_of("pad", (80, 40), 0, (4, 4)), (4, 4))
    np.testing.assert_allclose(got, heat[[1, 1, 2, 2]])
    np.testing.assert_allclose(
        resample(heat, view_of("squash", (80, 40), 0, (4, 4)), (2, 2)), [[2.5, 4.5], [10.5, 12.5]]
    )


@pytest.mark.parametrize(
    "box, alpha, strict, count",
    [
        ((0.4, 0.4, 0.6, 0.6), 1.0, True, 25),
        ((0.31, 0.2, 0.55, 0.8), 1.0, True, 576),
        ((0.31, 0.2, 0.55, 0.8), 1.0, False, 225),
        ((0.31, 0.2, 0.55, 0.8), 1.3, False, 361),
        ((0.55, 0.35, 0.9, 0.7), 1.3, True, 156),
        ((0.55, 0.35, 0.9, 0.7), 1.3, False, 132),
        ((0.45, 0.3, 0.5, 0.7), 1.3, True, 408),
        ((0.45, 0.3, 0.5, 0.7), 1.3, False, 169),
        ((0.5, 0.5, 0.5, 0.5), 1.3, False, 1),
        ((0.6, 0.6, 0.4, 0.4), 1.0, True, 0),
    ],
)
def test_boxes_cover_as_many_cells_as_worked_out(box, alpha, strict, count):
    assert len(cells(box, alpha, 24, strict)) == count


def test_replies_are_parsed_as_the_paper_and_as_the_release_do():
    three = '{"a": [0, 0.2, 0.6, 0.8], "b": [0.55, 0.35, 0.9, 0.7], "c": [0.8, 0.4, 1, 0.6]}'
    assert parse(three, 500, True) == [(0.55, 0.35, 0.9, 0.7)]
    assert parse(three, 500, False) == [(0, 0.2, 0.6, 0.8), (0.55, 0.35, 0.9, 0.7), (0.8, 0.4, 1, 0.6)]
    assert parse("[0.1,0.2,0.3,0.4]", 500, True) == []
    assert parse("[120, 40, 300, 200]", 500, False) == [(0.24, 0.08, 0.6, 0.4)]
    assert parse("[0.6, -0.1, 0.4, 0.2]", 500, False) == [(0.4, 0, 0.6, 0.2)]
    assert parse("[0.1, 0.2, 0.3] and 0.1, 0.2, 0.3, 0.4", 500, False) == []
    assert pixels([(0.25, 0.25, 0.5, 0.9)], (400, 300)) == [(100, 50, 200, 300)]


ANGLES = {
    "A": ((0, 30, 60, 90, 0, 45), (0, 0, 90, 180, 30, 90)),
    "B": ((10, 20, 30, 40, 20, 30), (0, 90, 45, 0, 0, 60)),
}


@pytest.mark.parametrize(
    "layers, norm, want",
    [
        ("A", "row", (0.266108, 0.337411, 0.396481, 0)),
        ("A", "column", (0.329123, 0.319540, 0.351337, 0)),
        ("AB", "row", (0.291186, 0.285670, 0.376073, 0.047070)),
        ("AB", "column", (0.332275, 0.324388, 0.343337, 0)),
    ],
)
def test_value_similarity_of_vectors_at_known_angles(layers, norm, want):
    scale, rows = np.random.default_rng(0).uniform(0.1, 9, (6, 2, 1)), 0
    for layer in layers:
        angle = np.deg2rad(np.array(ANGLES[layer]).T)
        rows = rows + similarity(scale * np.stack([np.cos(angle), np.sin(angle)], axis=-1), norm)[4:, :4]
    np.testing.assert_allclose(product(rows, clip=True), want, atol=2e-6)


@pytest.mark.parametrize(
    "s_dist, rois",
    [
        (2, [(4, 4, 9, 9), (16, 14, 19, 17)]),
        (3, [(4, 4, 9, 9), (16, 14, 19, 17), (4, 1, 9, 6), (1, 4, 6, 9)]),
    ],
)
def test_regions_grow_around_two_peaks(s_dist, rois):
    y, x = np.mgrid[:24, :24]
    heat = np.exp(-((x - 6) ** 2 + (y - 6) ** 2) / 8) + 0.8 * np.exp(-((x - 17) ** 2 + (y - 15) ** 2) / 2)
    assert propose(heat, 4, 3, 5, s_dist, 0.5, 0.3)[0] == rois
    assert round(iou((0, 0, 5, 5), (2, 1, 7, 6)), 3) == 0.316


@pytest.mark.parametrize("centres, tops", [((500, 700), (68, 268)), ((500, 1000), (0, 336)), ((700, 500), (268, 68))])
def test_two_far_regions_stand_side_by_side(centres, tops):
    image = Image.new("RGB", (4000, 1200))
    seen = np.asarray(
        compose(
            image, [(3000, centres[1] - 9, 3050, centres[1] + 9), (9, centres[0] - 9, 50, centres[0] + 9)], 1200, 336
        )
    )
    assert [int(np.argmax(seen[:, x].sum(axis=-1) == 0)) for x in (5, 400)] == list(tops)


def test_boxes_that_touch_nothing_stay_apart():
    assert merge([(0, 0, 4, 4), (10, 0, 14, 4), (3, 3, 11, 9)], 0) == [(0, 0, 14, 9)]
    assert len(merge([(0, 0, 4, 4), (4, 0, 8, 4)], 0)) == 2
    assert len(merge([(0, 0, 4, 4), (10, 0, 14, 4)], 4)) == 1


@pytest.mark.parametrize(
    "spread, norm, entropy, peak",
    [(0.035, "sum", 2.4039, 141.46), (0.1, "sum", 4.5037, 17.33), (0.1, "softmax", 6.3373, 2.526)],
)
def test_one_gaussian_has_the_entropy_worked_out(spread, norm, entropy, peak):
    heat = mixture([(11 / 23, 11 / 23)], [spread], [1.0], (24, 24), norm)
    assert -(heat * np.log(heat + 1e-300)).sum() == pytest.approx(entropy, abs=1e-4)
    assert heat.max() * 576 == pytest.approx(peak, rel=1e-4)


def test_a_map_is_mixed_into_the_rows_that_see_it():
    probs = torch.tensor([[[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.4, 0.3, 0.2, 0.1]]])
    mixed = inject(probs, [0.75, 0.25], [1, 2], [0, 3], 0.5)
    want = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.2, 0.525, 0.225, 0.05]])
    torch.testing.assert_close(mixed[0], want)
    assert math.isclose(inject(probs[:, 3:], [0.75, 0.25], [1, 2], [0], 0.5)[0, 0, 1], 0.525, rel_tol=1e-6)
