"""LLaVA-OneVision and LLaVA-NeXT without torch: layouts of images, buckets, geometry, odd input, checkpoints."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file
from tiny import write_json
from tiny_onevision import tiny_onevision

import jaxvqa
from jaxvqa.convert import export_hf, load
from jaxvqa.convert.tables import flatten
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.models import config_from_hf, llava_onevision
from jaxvqa.models.llava_onevision import LlavaOnevisionConfig, default_buckets, geometry_of, plan, specs
from jaxvqa.prompts import render
from jaxvqa.sharding import count

SIGLIP = dict(
    model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=26,
    num_attention_heads=16, image_size=384, patch_size=14, vision_use_head=False,
)  # fmt: skip
CLIP = dict(
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, image_size=336, patch_size=14,
)  # fmt: skip
QWEN = dict(
    model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, vocab_size=152064, rope_theta=1000000.0,
)  # fmt: skip
PUBLISHED = {
    "7b": (8_030_348_832, dict(model_type="llava_onevision", text_config=QWEN, vision_config=SIGLIP)),
    "vicuna-7b": (
        7_063_431_168,
        dict(
            model_type="llava_next", text_config=dict(model_type="llama", vocab_size=32064, rms_norm_eps=1e-5),
            vision_config=CLIP,
        ),
    ),
    "mistral-7b": (
        7_566_747_648,
        dict(
            model_type="llava_next", vision_config=CLIP,
            text_config=dict(model_type="mistral", vocab_size=32064, sliding_window=None, rope_theta=1000000.0),
        ),
    ),
}  # fmt: skip
"""Parameters and config.json of llava-onevision-qwen2-7b-ov-hf, llava-v1.6-vicuna-7b-hf and -mistral-7b-hf."""
ONEVISION = config_from_hf(PUBLISHED["7b"][1])
BUCKETS = default_buckets(ONEVISION, None)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """Tiles of 30 pixels and 4 x 4 cells, canvases of up to 3 x 3, grids of at most 2 tiles' cells."""
    return jaxvqa.load(tiny_onevision(tmp_path_factory.mktemp("onevision")), dtype="float32", offline=True)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name):
    total, hf = PUBLISHED[name]
    config = config_from_hf(hf)
    assert count(specs(config)) == total
    assert config.decoder.max_length == {"7b": 32768, "vicuna-7b": 2048, "mistral-7b": 131072}[name]


@pytest.mark.parametrize(
    ("size", "canvas", "grid"),
    [
        ((2246, 1582), (2304, 1920), (96, 68)),
        ((4024, 3503), (2304, 2304), (86, 75)),
        ((7431, 5358), (2304, 1920), (95, 68)),
        ((7680, 3840), (2304, 1152), (114, 57)),
        ((2836, 1566), (2304, 1536), (108, 60)),
        ((1000, 800), (1152, 1152), (81, 65)),
        ((336, 336), (384, 384), (27, 27)),
    ],
)
def test_canvases_and_grids_of_the_published_model(size, canvas, grid):
    """Width x height; worked out by hand from the rules of anyres_max_9."""
    made = plan(ONEVISION, size)
    assert (384 * made.tiles[1], 384 * made.tiles[0]) == canvas
    assert made.grid[::-1] == grid
    assert made.tokens == 729 + grid[1] * (grid[0] + 1)


sides = st.integers(1, 9000)


@given(sides, sides, st.sampled_from(["hf", "pad"]))
def test_any_image_fits_its_bucket_and_its_cells_cover_it(width, height, setup):
    made = plan(ONEVISION, (width, height), setup)
    geometry = geometry_of(ONEVISION, None, (width, height), BUCKETS, setup)
    tiles = 1 + made.tiles[0] * made.tiles[1]
    cells, tokens = llava_onevision._room(ONEVISION, min(n for n in BUCKETS if n >= tiles))
    assert made.tokens <= tokens
    assert made.grid[0] * made.grid[1] <= cells == geometry.capacity
    h, w = geometry.grid
    assert geometry.cell_boxes().shape == (h, w, 4)
    # Un-padding may take up to half a cell of the canvas from each side.
    (x, y), (x_size, y_size) = geometry.origin, geometry.extent
    cell = max(x_size / made.kept[1], y_size / made.kept[0]) / 2 + 1e-6
    assert x <= cell and y <= cell and x + x_size >= width - cell and y + y_size >= height - cell
    points = geometry.from_encoder(geometry.to_encoder(np.array([[0.0, 0.0], [width / 2, height / 3]])))
    np.testing.assert_allclose(points, [[0, 0], [width / 2, height / 3]], atol=1e-6)


@given(st.integers(20, 200), st.integers(20, 200), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["hf", "pad"]))
def test_what_a_cell_sees_is_where_its_geometry_says(vlm, width, height, right, down, setup):
    """A white spot on black, followed through resizing, tiles, un-padding and assembly: its centroid stays in place."""
    c, spot = vlm.config, max(width, height) // 2
    x, y = int(right * max(width - spot, 0)), int(down * max(height - spot, 0))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y : y + spot, x : x + spot] = 255
    image = llava_onevision.process(c, vlm.image_processor, Image.fromarray(pixels), vlm.image_buckets, setup)
    tiles, (gh, gw), p = image.arrays, c.vision.grid, c.vision.patch_size
    patches = tiles.pixels[:, : gh * p, : gw * p].reshape(-1, gh, p, gw, p, 3).mean(axis=(2, 4, 5))
    # Black is -1 and white 1; the square's padding is grey, 0.
    features = np.append(np.maximum(patches - (0.1 if setup == "pad" else -1), 0), 0)
    shown = (features[tiles.index] * tiles.weights).sum(axis=1)[image.cells].reshape(image.geometry.grid)
    true = (x + min(x + spot, width)) / 2, (y + min(y + spot, height)) / 2
    for axis, edges, at in zip((0, 1), image.geometry.edges(), true, strict=True):
        centroid = shown.sum(axis) @ (edges[1:] + edges[:-1]) / 2 / shown.sum()
        assert abs(centroid - at) < edges[1] - edges[0]


def test_cells_skip_the_base_view_and_the_newlines(vlm):
    image = vlm.process(noise(64, 100))
    h, w = image.geometry.grid
    cells = image.cells.reshape(h, w)
    assert cells[0, 0] == 16 and cells[1, 0] == 16 + w + 1 and cells[-1, -1] == image.tokens - 2
    index, newline = image.arrays.index, len(image.arrays.pixels) * 16
    newlines = [cells[row, -1] + 1 for row in range(h)]
    assert (index[newlines, 0] == newline).all() and not (index[image.cells, 0] == newline).any()


def test_buckets_are_few_and_the_largest_holds_every_canvas():
    assert BUCKETS == (1, 2, 4, 7, 13, 21, 37)
    assert default_buckets(config_from_hf(PUBLISHED["vicuna-7b"][1]), None) == (1, 3, 5)


def test_a_larger_bucket_gives_the_same_tokens(vlm):
    encode = jax.jit(llava_onevision.encode_images)
    tokens = []
    for bucket in (5, 10):
        image = vlm.process(noise(50, 31), bucket)
        one = jax.tree.map(lambda x: x[None], image.arrays)
        found = np.asarray(encode(vlm.params, vlm.config, one))[0]
        assert found.shape[0] == image.capacity and not found[image.tokens :].any()
        tokens.append(found[: image.tokens])
    np.testing.assert_allclose(*tokens, atol=1e-5)
    assert llava_onevision.image_flops(vlm.config, image.arrays) % 10 == 0


def test_no_batch_with_text_alone_changes_an_answer(vlm):
    """An image of many tiles, one of few, and no image, in one batch: each row as alone."""
    asked = [([noise(90, 90)], "What is it?"), ([noise(31, 50)], "Is it red?"), ([], "What is a plate?")]
    rows = [vlm.encode(images, render("qwen_1_5", q, num_images=len(images)), bucket=10) for images, q in asked]
    together = np.asarray(vlm.prefill(jaxvqa.collate(rows)).logits)
    length = max(len(row.tokens.ids) for row in rows)
    for row, logits in zip(rows, together, strict=True):
        alone = vlm.prefill(jaxvqa.collate([row], length=length))
        np.testing.assert_allclose(np.asarray(alone.logits)[0], logits, atol=1e-4)


def test_images_beyond_the_context_are_refused(vlm):
    with pytest.raises(UserError, match="the context of"):
        vlm.encode([noise(90, 90)] * 200, "What is it?")


@pytest.mark.parametrize("size", [(1, 1), (1500, 1), (1, 1500), (1000, 8), (2, 3)])
@pytest.mark.parametrize("setup", ["hf", "pad"])
def test_odd_sizes_have_cells_inside_them(vlm, size, setup):
    image = llava_onevision.process(vlm.config, vlm.image_processor, noise(*size), vlm.image_buckets, setup)
    assert image.geometry.valid().any()
    assert len(image.cells) == image.geometry.grid[0] * image.geometry.grid[1]
    assert image.cells.max() < image.tokens <= image.capacity


def test_a_grid_that_resizing_would_leave_no_row_is_refused():
    vision = replace(ONEVISION.vision, image_size=42)  # 3 x 3 cells
    config = replace(ONEVISION, vision=vision, canvases=((42, 42), (42, 210)), max_tiles=1)
    with pytest.raises(UserError, match="200x10 pixels is too long and narrow"):
        plan(config, (200, 10))
    assert plan(config, (50, 50)).grid == (3, 3)


def test_an_image_that_no_bucket_holds_is_refused(vlm):
    with pytest.raises(UserError, match="tiles of an image needs 10"):
        vlm.process(noise(90, 90), 4)


def test_options_that_are_not_supported_are_named_at_once():
    hf = PUBLISHED["7b"][1] | dict(
        vision_aspect_ratio="anyres", projector_hidden_act="relu", image_grid_pinpoints=[[384, 400]],
        vision_feature_select_strategy="default",
    )  # fmt: skip
    with pytest.raises(JaxVQAError) as error:
        LlavaOnevisionConfig.from_hf(hf)
    for name in ("'anyres'", "'relu'", "(384, 400)", "'default'"):
        assert name in str(error.value)
    with pytest.raises(JaxVQAError, match="lacks text_config"):
        LlavaOnevisionConfig.from_hf(dict(model_type="llava_onevision", vision_config=SIGLIP))
    window = dict(model_type="mistral", vocab_size=32064)
    with pytest.raises(JaxVQAError, match="sliding_window 4096"):
        config_from_hf(PUBLISHED["mistral-7b"][1] | dict(text_config=window))


@pytest.mark.parametrize(
    ("changed", "said"),
    [(dict(size={"height": 28, "width": 28}), "30x30"), (dict(image_grid_pinpoints=[[30, 30]]), "differ")],
)
def test_a_processor_of_other_tiles_is_refused(tmp_path, changed, said):
    folder = tiny_onevision(tmp_path)
    file = folder / "preprocessor_config.json"
    write_json(file, jaxvqa.convert.tensors.read_json(file) | changed)
    with pytest.raises(JaxVQAError, match=said):
        jaxvqa.load(folder, dtype="float32", offline=True)


@pytest.mark.parametrize("is_next", [False, True])
def test_every_spelling_of_the_names_gives_the_same_parameters(tmp_path, is_next):
    options = dict(is_next=is_next, image_size=28, tied=True, use_head=not is_next)
    found = []
    for layout in ("v4", "v5", "v5-modules"):
        _, params, _ = load(tiny_onevision(tmp_path / layout, layout=layout, **options), dtype=None)
        found.append(flatten(params))
    for other in found[1:]:
        assert all(np.array_equal(found[0][path], other[path]) for path in found[0])


@pytest.mark.parametrize("options", [{}, dict(is_next=True, text_model="llama", image_size=28, dtype="bfloat16")])
def test_the_round_trip_is_bit_equal(tmp_path, options):
    source = tiny_onevision(tmp_path / "a", layout="v5", feature_layer=[-2, -1], **options)
    config, params, folder = load(source, dtype=None)
    out = export_hf(config, params, tmp_path / "b", processor_folder=folder)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and np.array_equal(before[name], after[name]) for name in before)
    assert load(out)[0] == config
