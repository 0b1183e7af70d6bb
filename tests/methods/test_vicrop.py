"""ViCrop as its paper tells it, driven by hand: what it asks, in which words, and what it makes of the replies."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxvqa.geometry import for_crop, for_pad
from jaxvqa.methods.vanilla import Vanilla
from jaxvqa.methods.vicrop import Vicrop, attention_on_image, preview_size
from jaxvqa.requests import Generate, Read, Reading, Reply, Row, Sample
from jaxvqa.taps import Readouts

GRID = (24, 24)
SUFFIX = "Answer the question using a single word or phrase."
VICROP = Vicrop(layer=14, base=336)


def picture(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def spike(row, column):
    grid = np.full(GRID, 0.01, np.float32)
    grid[row, column] = 1.0
    return grid


def drive(method, sample, question_map, reference_map, geometry):
    """Run a method against made-up maps: (requests of the search, final request, answer)."""
    generator = method(sample)
    search = generator.send(None)
    final = generator.send([Reading(question_map, (geometry,)), Reading(reference_map, (geometry,))])
    with pytest.raises(StopIteration) as stop:
        generator.send(Reply("42", (1,)))
    return search, final, stop.value.value


def test_prompts_layers_and_lengths_are_those_of_the_release():
    sample = Sample(picture(672, 672), "What is on the sign?")
    flat = np.full(GRID, 0.5, np.float32)
    search, final, _ = drive(VICROP, sample, spike(4, 20), flat, for_pad(672, 672, 336, GRID))
    assert [request.prompt.text for request in search] == [
        f"<image>\nUSER: What is on the sign? {SUFFIX}\nASSISTANT:",
        f"<image>\nUSER: Write a general description of the image. {SUFFIX}\nASSISTANT:",
    ]
    assert all(isinstance(request, Read) and request.spec.layers == (14,) for request in search)
    assert {request.rows for request in search} == {"last"}
    assert isinstance(final, Generate)
    assert final.prompt.text == f"<image><image>\nUSER: What is on the sign? {SUFFIX}\nASSISTANT:"
    assert (final.max_new_tokens, final.temperature) == (20, 0.0)


def test_the_crop_lies_where_the_ratio_of_the_maps_peaks_and_keeps_the_images_resolution():
    """The question's own peak is explained away by the reference; what stands out is elsewhere."""
    sample = Sample(picture(672, 672), "?")
    question = spike(2, 2) + spike(18, 20)
    _, final, answer = drive(VICROP, sample, question, spike(2, 2), for_pad(672, 672, 336, GRID))
    [box] = answer.boxes.tolist()
    x1, y1, x2, y2 = box
    assert x1 <= 20.5 * 28 <= x2 and y1 <= 18.5 * 28 <= y2
    assert x2 - x1 == y2 - y1 and x2 - x1 >= 336
    whole, crop = final.images
    assert whole is sample.image
    np.testing.assert_array_equal(np.asarray(crop), np.asarray(sample.image.crop(tuple(map(int, box)))))
    np.testing.assert_allclose(answer.grid, question / spike(2, 2))
    assert answer.text == "42"


def test_corrected_alignment_follows_the_preprocessing_and_official_the_release():
    """1024 x 768, centre-cropped: cell (20, 21) looks at x 800..832; laid over the whole image, at x 896..939."""
    sample = Sample(picture(1024, 768), "?")
    question, flat = spike(20, 21), np.full(GRID, 0.01, np.float32)
    geometry = for_crop(1024, 768, 336, GRID)
    maps = {}
    for alignment, x in (("corrected", 816), ("official", 917)):
        method = Vicrop(layer=14, base=100, ratios=(1.0,), alignment=alignment)
        _, _, answer = drive(method, sample, question, flat, geometry)
        x1, _, x2, _ = answer.boxes[0]
        assert x1 <= x <= x2
        maps[alignment] = answer.heatmap
        assert answer.heatmap.shape == (384, 512)
        assert abs(int(answer.heatmap.max(0).argmax()) * 2 - x) < 45
    assert (maps["corrected"][:, :60] == maps["corrected"].min()).all(), "what the encoder did not see stays cold"


def test_further_images_are_shown_before_the_crop():
    images = (picture(672, 672), picture(40, 30))
    geometry = for_pad(672, 672, 336, GRID)
    search, final, _ = drive(VICROP, Sample(images, "?"), spike(3, 3), np.ones(GRID, np.float32), geometry)
    assert search[0].images == images and search[0].prompt.num_images == 2
    assert final.images[:2] == images and final.prompt.num_images == 3


def test_the_reduction_reads_the_first_images_cells():
    rows = Readouts(rows=jnp.arange(10.0)[None, None])
    row = Row(jnp.array([3]), jnp.int32(10), jnp.zeros(1, int), jnp.ones(1, bool), rows, None, (2, 2), 10)
    np.testing.assert_array_equal(attention_on_image(row), [[3, 4], [5, 6]])


def test_vanilla_asks_once_with_the_short_ending():
    generator = Vanilla(template="vicuna_v1")(Sample(picture(30, 30), "What?"))
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
