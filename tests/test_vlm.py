"""The facade: what `encode`, `prefill` and `decode` do with images, prompts and the context's limits."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_llava

import jaxvqa
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.geometry import for_crop, for_pad
from jaxvqa.images import pad_to_square
from jaxvqa.taps import Edit, ReadSpec, Tap, Taps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("vlm") / "tiny", max_position_embeddings=256)


@pytest.fixture(scope="module")
def vlm(folder):
    return jaxvqa.load(folder)


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))


def test_hf_setup_gives_the_processors_own_pixels(folder, image):
    vlm = jaxvqa.load(folder, image_setup="hf")
    made = vlm.process(image)
    pixels, where = made.arrays, made.geometry
    theirs = vlm.image_processor(images=[image], return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(pixels, theirs.transpose(1, 2, 0))
    assert where == for_crop(90, 60, 56, (4, 4))


def test_pad_setup_shows_the_whole_image_on_the_mean_colour(vlm, image):
    made = vlm.process(image)
    pixels, where = made.arrays, made.geometry
    theirs = vlm.image_processor(images=[pad_to_square(image)], return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(pixels, theirs.transpose(1, 2, 0))
    assert where == for_pad(90, 60, 56, (4, 4))
    assert np.abs(pixels[0]).max() < 0.02, "the first row is padding: the mean colour, normalised to zero"


def test_each_image_fills_its_own_places_of_the_prompt(vlm, image):
    """Two images in the other order are another input, and each span is as long as the image has tokens."""
    other = Image.new("RGB", (40, 80), (250, 10, 10))
    one = vlm.encode([image, other], "Compare.")
    two = vlm.encode([other, image], "Compare.")
    (a, length), (b, _) = one.tokens.image_spans
    assert length == vlm.config.image_tokens == 16
    assert b >= a + length
    assert (one.tokens.ids == two.tokens.ids).all()
    logits = vlm.prefill(jaxvqa.collate([one, two])).logits
    assert jnp.abs(logits[0] - logits[1]).max() > 1e-4


def test_a_row_with_fewer_images_is_untouched_by_its_neighbours_images(vlm, image):
    one = vlm.encode([image], "What is this?")
    two = vlm.encode([image, image], "What is this?")
    alone = vlm.prefill(jaxvqa.collate([one], length=160)).logits[0]
    beside = vlm.prefill(jaxvqa.collate([two, one], length=160)).logits[1]
    np.testing.assert_allclose(alone, beside, atol=1e-5)


def test_text_only_prompts_work(vlm):
    encoded = vlm.encode([], "Name two colours.")
    assert encoded.tokens.image_spans == ()
    assert len(vlm.decode(vlm.prefill(encoded), max_new_tokens=4)) == 1


def test_a_text_with_markers_is_the_whole_prompt(vlm, image):
    encoded = vlm.encode(image, "Look: <image> What?")
    assert encoded.tokens.text == "Look: <image> What?"


def test_a_reply_ends_before_the_first_stop_string(vlm):
    ids = vlm.tokenizer.encode("the plate is left of the blue one", add_special_tokens=False)
    assert vlm.text(ids, ("blue", "left")) == "the plate is"
    assert vlm.text(ids) == "the plate is left of the blue one"


def test_decode_refuses_more_tokens_than_the_cache_has_room_for(vlm, image):
    out = vlm.prefill(vlm.encode(image, "What is this?"), max_new_tokens=8)
    with pytest.raises(UserError, match="room for 9"):
        vlm.decode(out, max_new_tokens=64)


def test_edits_can_hold_while_decoding_as_well(vlm, image):
    """A key bias that hides the image from every row: with the same edit in decode, replies match a longer prefill."""
    encoded = vlm.encode(image, "What is this?")
    start, length = encoded.tokens.image_spans[0]
    bias = jnp.zeros((1, 1, 1, len(encoded.tokens.ids))).at[..., start : start + length].set(-1e30)
    taps = Taps((Edit(Tap(key_bias=bias), 0, vlm.config.decoder.num_layers),))
    out = vlm.prefill(encoded, taps=taps, max_new_tokens=8)
    other = vlm.prefill(vlm.encode(Image.new("RGB", image.size), "What is this?"), taps=taps, max_new_tokens=8)
    assert vlm.decode(out, max_new_tokens=8, taps=taps) == vlm.decode(other, max_new_tokens=8, taps=taps)


def test_sampling_is_reproducible_from_its_key(vlm, image):
    out = vlm.prefill(vlm.encode(image, "What is this?"))

    def sample(seed):
        return vlm.decode(out, max_new_tokens=8, key=jax.random.key(seed))

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_prefill_reads_what_it_is_asked_to(vlm, image):
    encoded = vlm.encode(image, "What is this?")
    out = vlm.prefill(encoded, spec=ReadSpec((1,), frozenset({"rows"}), stop=2))
    assert out.logits.shape == (1, 0), "a pass that stops early has no logits"
    assert out.readouts.rows.shape == (1, 1, 1, len(encoded.tokens.ids))
    np.testing.assert_allclose(out.readouts.rows.sum(-1), 1, atol=1e-5)


def test_a_question_longer_than_the_context_is_refused_with_both_lengths(vlm, image):
    with pytest.raises(UserError, match=r"tokens, the context of tiny 256; shorten the question or give fewer images"):
        vlm.encode(image, "why " * 300)


def test_prompt_and_images_must_agree_in_number(vlm, image):
    with pytest.raises(UserError, match="1 image places, 2 images"):
        vlm.encode([image, image], "<image> What?")


@pytest.mark.parametrize(
    ("option", "match"), [({"image_setup": "stretch"}, "pad, hf"), ({"attention": "flash"}, "auto")]
)
def test_unknown_settings_name_the_known_ones(folder, option, match):
    with pytest.raises(UserError, match=match):
        jaxvqa.load(folder, **option)


def test_a_processor_of_another_size_than_the_tower_is_refused(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    for path in broken.glob("*processor_config.json"):
        config = json.loads(path.read_text())
        inner = config.get("image_processor", config)
        inner.update(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112})
        path.write_text(json.dumps(config))
    with pytest.raises(JaxVQAError, match="the vision tower needs 56x56"):
        jaxvqa.load(broken)


def test_decoding_never_turns_nan_into_an_answer(vlm, image):
    out = vlm.prefill(vlm.encode(image, "What is this?"))
    params = vlm.params
    try:
        vlm.params = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), params)
        out = vlm.prefill(vlm.encode(image, "What is this?"))
        with pytest.raises(JaxVQAError, match=r"logits of rows \[0\] are not finite"):
            vlm.decode(out, max_new_tokens=4)
    finally:
        vlm.params = params
