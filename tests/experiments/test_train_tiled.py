"""Rows of tiled images that are trained on are the prompts that the library makes of such images; without a model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from jaxvqa.bundled import SPECKS_LLAVA
from jaxvqa.methods.focus import side_by_side
from jaxvqa.models.llava import LlavaConfig
from jaxvqa.prompts import render, tokenise
from jaxvqa.specks.questions import SHORT, Question
from jaxvqa.specks.scenes import SIZE
from jaxvqa.training import specks
from jaxvqa.vlm import slots_of

QUESTION = "What character is on the yellow cross?"


@pytest.fixture(scope="module")
def script():
    folder = str(Path(__file__).parents[2] / "experiments" / "specks")
    sys.path.insert(0, folder)
    try:
        import train_tiled
    finally:
        sys.path.remove(folder)
    return train_tiled


@pytest.fixture(scope="module")
def config(script):
    return script.tiled_config(LlavaConfig.from_hf(json.loads((SPECKS_LLAVA / "config.json").read_text())))


@pytest.fixture(scope="module")
def processor(script, config):
    return script.image_processor(config)


@pytest.fixture(scope="module")
def layout(script, config, processor):
    return script.Layout.of(config, processor)


def asked(tokenizer, config, image, prompt):
    """Ids and slots of a prompt whose images are all like this one."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    tokens = tokenise(fast, prompt, config.image_token_id, [image.tokens] * prompt.num_images)
    return np.asarray(tokens.ids), slots_of(tokens, [image] * prompt.num_images)


@pytest.mark.parametrize("form", ["one image", "two images", "in the words of FOCUS"])
@pytest.mark.parametrize("sparse", [False, True])
def test_packed_tokens_stand_where_those_of_a_prompt_stand(script, config, processor, layout, form, sparse):
    picture = Image.new("RGB", (SIZE, SIZE))
    image = script.process(config, processor, picture)
    tokenizer = Tokenizer.from_file(str(SPECKS_LLAVA / "tokenizer.json"))
    template = specks.VICROP if form == "two images" else specks.VICUNA
    question, ending = QUESTION, "short"
    text = specks.turn(template, f"{QUESTION}{template.ending_break}{SHORT}")
    prefix = [specks.head(template), None] + [None] * (form == "two images")
    row = prefix, [specks.Ask(text, "K", "read")]
    if form == "in the words of FOCUS":
        _, question = side_by_side(picture, np.array([[10, 10, 90, 90]]), QUESTION, 1)
        row = script.zoomed(([*prefix, "\n", None], row[1]))
    images = row[0].count(None)
    ids, slots = asked(tokenizer, config, image, render(template, question, num_images=images, ending=ending))

    keep = None
    if sparse:
        made, views = script.scene_of(0)
        rng = np.random.default_rng(0)
        keep = np.concatenate([script.sample(layout, made, view, rng) for view in views[:images]])
    packed = specks.Packer(tokenizer, layout.tokens, 2800).row(*row, keep=keep)

    # The answer (two tokens) follows the prompt; the rest of the row is empty.
    length = len(ids) - (0 if keep is None else int((keep == 0).sum()))
    position, patch = packed["position"][:length], packed["patch"][:length]
    np.testing.assert_array_equal(packed["ids"][:length], ids[position])
    np.testing.assert_array_equal(patch, slots[position])
    assert position[-1] == len(ids) - 1 and (np.diff(position) > 0).all()
    assert packed["position"][length : length + 2].tolist() == [len(ids), len(ids) + 1]
    assert (packed["segment"][length + 2 :] == 0).all() and (packed["patch"][length:] == -1).all()
    np.testing.assert_allclose(
        packed["bias"][:length], np.log(np.where(patch < 0, 1, 1 if keep is None else keep[patch]))
    )


def test_a_sample_of_tokens_stands_for_all_of_them(script, layout):
    for number in range(3):
        made, views = script.scene_of(number)
        for view in views:
            keep = script.sample(layout, made, view, np.random.default_rng(number))
            base, cells, newlines = keep[: layout.base**2], keep[layout.cells], keep[layout.newlines]
            assert [x.sum() for x in (base, cells, newlines)] == pytest.approx([256, 1024, 32])
            assert (keep > 0).sum() < 0.2 * layout.tokens


def test_questions_aim_at_the_cells_that_show_their_target(script, config, processor, layout):
    made, (whole, _) = script.scene_of(0)
    image = script.process(config, processor, Image.new("RGB", (SIZE, SIZE)))
    x, y = image.geometry.edges()
    for plate in made.plates:
        cells = specks.target_cells(Question("read", QUESTION, SHORT, plate.character, (plate,)), whole)
        read = script.aimed(layout, specks.Ask("", "K", "read", cells=cells)).cells
        assert not read[: layout.base**2].any() and not read[layout.newlines].any()
        rows, columns = np.nonzero(read[image.cells].reshape(image.geometry.grid))
        left, top, right, bottom = plate.box
        step = x[2] - x[0]  # cells are marked in pairs, as the base view has them
        assert x[columns].min() >= left - step and x[columns + 1].max() <= right + step
        assert y[rows].min() >= top - step and y[rows + 1].max() <= bottom + step
        where = script.aimed(layout, specks.Ask("", "K", "where", cells=cells)).cells
        np.testing.assert_array_equal(where[: layout.base**2], cells)
        assert not where[layout.base**2 :].any()


def test_plates_of_a_tiled_view_are_legible_at_half_the_size(script):
    made, (whole, _) = script.scene_of(0)  # a small scene: characters of 14 to 20 of 896 pixels
    heights = [plate.character_box[3] - plate.character_box[1] for plate in made.plates]
    assert [plate.legible(whole) for plate in made.plates] == [height * 256 / SIZE >= 4.5 for height in heights]
