"""InternVL without a reference: tiles and their geometry, buckets, layouts of checkpoints, odd images and configs."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_internvl import VOCABULARY, tiny_internvl

import jaxvqa
from jaxvqa import convert, sharding
from jaxvqa.convert import ConversionError
from jaxvqa.convert import internvl as names
from jaxvqa.convert.tables import expected_names, flatten, plan, read_params
from jaxvqa.convert.tensors import folder_tensors, read_json
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.models import internvl
from jaxvqa.models.internvl import InternVLConfig

SIDE, BUCKETS = 28, (1, 3, 5, 7, 10, 13)
LARGE = dict(text="qwen2", norm="rms_norm", tied=True, num_kv_heads=4, head_dim=8, feature_layer=-2, image_size=42)
# OpenGVLab/InternVL3_5-8B-HF
PUBLISHED = dict(
    image_token_id=151671,
    vision_config=dict(attention_bias=True, image_size=[448, 448], patch_size=[14, 14]),
    text_config=dict(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, rope_theta=1e6,
        tie_word_embeddings=False,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_internvl(tmp_path_factory.mktemp("internvl") / "tiny", max_position_embeddings=256)


@pytest.fixture(scope="module")
def vlm(folder):
    return jaxvqa.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def processor(folder):
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.fixture(scope="module")
def config(folder):
    return InternVLConfig.from_hf(read_json(folder / "config.json"))


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def test_each_cell_is_shown_by_the_token_that_sees_it(config, processor):
    """Means of the cells of the whole resized canvas, against those of the patches behind each cell's token."""
    image = picture((90, 61))
    made = internvl.process(config, processor, image, BUCKETS)
    rows, columns = made.geometry.grid
    canvas = processor(
        images=[image], size=dict(height=rows // 2 * SIDE, width=columns // 2 * SIDE), crop_to_patches=False,
        return_tensors="np",
    )["pixel_values"][0]  # fmt: skip
    half = SIDE // 2
    seen = canvas.reshape(3, rows, half, columns, half).mean(axis=(2, 4)).transpose(1, 2, 0)
    tokens = made.arrays.reshape(-1, 2, half, 2, half, 3).mean(axis=(2, 4)).reshape(-1, 3)
    np.testing.assert_allclose(tokens[made.cells], seen.reshape(-1, 3), atol=1e-5)
    assert made.geometry.grid == (4, 6) and made.tokens == 7 * 4 and len(set(made.cells)) == 24
    assert len(made.arrays) == 7 and made.capacity == 7 * 4


def test_a_small_square_image_has_one_tile_and_no_thumbnail(config, processor):
    made = internvl.process(config, processor, picture((SIDE, SIDE)), BUCKETS)
    assert made.tokens == made.capacity == config.image_tokens == 4
    assert made.geometry.grid == config.grid
    assert made.cells.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [(1, 1), (97, 55), (1, 1000), (3, 1), (641, 479)])
def test_cells_map_to_pixels_and_back(config, processor, size):
    place = internvl.geometry_of(config, processor, size, BUCKETS)
    boxes = place.cell_boxes()
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    assert np.array_equal(place.cells_at(centres), np.stack(np.indices(place.grid), -1))
    assert place.valid().all()
    np.testing.assert_allclose(place.from_encoder(place.to_encoder(centres)), centres)
    h, w = place.grid
    assert place.to_encoder(np.array(size)).tolist() == [w // 2 * SIDE, h // 2 * SIDE]


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_tokens_are_counted_as_hf_counts_them(config, processor, width, height):
    rows, columns = internvl.canvas_of(processor, (width, height))
    tiles = rows * columns + (rows * columns > 1)
    assert tiles == processor.get_number_of_image_patches(height, width, dict(crop_to_patches=True))
    place = internvl.geometry_of(config, processor, (width, height), BUCKETS)
    assert place.capacity >= tiles * config.image_tokens


def test_the_geometry_of_a_size_is_that_of_an_image(config, processor):
    for size in ((90, 61), (20, 300)):
        made = internvl.process(config, processor, picture(size), BUCKETS)
        assert made.geometry == internvl.geometry_of(config, processor, size, BUCKETS)


@pytest.mark.parametrize(
    ("most", "expected"), [(12, BUCKETS), (1, (1,)), (2, (1, 3)), (8, (1, 3, 5, 7, 9)), (40, (*BUCKETS, 21, 41))]
)
def test_default_buckets_hold_every_image(config, processor, most, expected):
    other = type(processor)(size=dict(processor.size), max_patches=most)
    assert internvl.default_buckets(config, other) == expected
    most_tiles = max(
        (n := rows * columns) + (n > 1)
        for w in (1, 2, 3, 5, 8, 13, 40)
        for h in (1, 2, 3, 5, 8, 13, 40)
        for rows, columns in [internvl.canvas_of(other, (100 * w, 100 * h))]
    )
    assert most_tiles == expected[-1]


def test_padding_to_a_bucket_changes_nothing(vlm):
    image = picture((60, 30))
    encode = jax.jit(internvl.encode_images)
    small, large = (vlm.process(image, bucket) for bucket in (3, 13))
    a, b = (np.asarray(encode(vlm.params, vlm.config, i.arrays[None]))[0] for i in (small, large))
    assert len(a) == small.capacity == small.tokens == large.tokens == 12
    assert len(b) == large.capacity == 52
    np.testing.assert_allclose(a, b[:12], atol=1e-5)


def test_a_bucket_that_is_too_small_is_a_clear_error(config, processor):
    with pytest.raises(UserError, match="6 tiles and a thumbnail needs 7, more than the largest bucket"):
        internvl.process(config, processor, picture((90, 61)), (1, 3, 5))


@pytest.mark.parametrize(("size", "tiles"), [((1, 1), 1), ((1, 1000), 13), ((1000, 1), 13), ((3, 1), 4), ((1, 3), 4)])
def test_tiny_and_extreme_images_are_encoded(vlm, size, tiles):
    """An image 1 or 3 pixels high is not taken for one with its channels first."""
    made = vlm.process(Image.new("RGB", size, (255, 0, 0)), 13)
    assert made.tokens == 4 * tiles
    red = (np.array([1, 0, 0]) - vlm.image_processor.image_mean) / vlm.image_processor.image_std
    np.testing.assert_allclose(made.arrays[:tiles], np.broadcast_to(red, (tiles, SIDE, SIDE, 3)), atol=1e-5)
    features = jax.jit(internvl.encode_images)(vlm.params, vlm.config, made.arrays[None])
    assert np.isfinite(features).all()


def test_text_only_rows_stand_beside_rows_with_images(vlm):
    rows = [
        vlm.encode([picture((60, 30))], "What is this?", 13),
        vlm.encode([], "Name two colours."),
        vlm.encode([picture((28, 28)), picture((30, 90))], "Compare.", 13),
    ]
    together = vlm.prefill(jaxvqa.collate(rows, length=128)).logits
    for row, expected in zip(rows, together, strict=True):
        # Alone, a row has as many images as it has: another program, whose sums have another order.
        alone = vlm.prefill(jaxvqa.collate([row], length=128)).logits[0]
        np.testing.assert_allclose(alone, expected, atol=1e-4)


def test_more_images_than_the_context_holds_is_a_clear_error(vlm):
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, the context of tiny 256"):
        vlm.encode([picture((90, 61))] * 10, "Compare.")


def load_original(folder):
    hf = names.assemble(read_json(folder / "config.json"), folder)
    config = InternVLConfig.from_hf(hf)
    tensors, faults = folder_tensors(folder, False, "")
    leaves, more = plan(names.original_tensors(tensors), names.TABLE, names.specs(config))
    assert not faults and not more
    return config, read_params(leaves, names.specs(config))


@pytest.mark.parametrize("kind", [dict(), LARGE])
def test_all_layouts_give_the_same_parameters(tmp_path, kind):
    config, params, _ = convert.load(tiny_internvl(tmp_path / "hf", **kind), dtype=None)
    others = [
        convert.load(tiny_internvl(tmp_path / "modules", layout="modules", **kind), dtype=None)[:2],
        load_original(tiny_internvl(tmp_path / "original", layout="original", **kind)),
    ]
    for other_config, other in others:
        assert other_config == config
        jax.tree.map(np.testing.assert_array_equal, other, params)
    assert params.vision.layers.q_proj.shape == (2, 24, 2, 12)


def test_the_original_cuts_the_same_tiles(tmp_path, processor):
    from transformers import AutoImageProcessor, AutoTokenizer

    folder = tiny_internvl(tmp_path / "original", layout="original")
    (tmp_path / "out").mkdir()
    names.write_processor(folder, read_json(folder / "config.json"), tmp_path / "out")
    made = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    image = picture((90, 61))
    a, b = (p(images=[image], crop_to_patches=True, return_tensors="np")["pixel_values"] for p in (made, processor))
    np.testing.assert_array_equal(a, b)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == VOCABULARY


def test_an_original_config_names_all_that_is_not_supported(tmp_path):
    folder = tiny_internvl(tmp_path, layout="original")
    hf = read_json(folder / "config.json")
    del hf["vision_config"]["norm_type"]
    hf |= dict(ps_version="v1", use_thumbnail=False, force_image_size=224)
    with pytest.raises(ConversionError) as e:
        names.assemble(hf, folder)
    for fault in ("vision_config.norm_type", "ps_version 'v1'", "use_thumbnail False", "force_image_size 224"):
        assert fault in str(e.value)


def test_the_image_token_of_an_original_is_the_tokenizers(tmp_path):
    folder = tiny_internvl(tmp_path, layout="original")
    hf = read_json(folder / "config.json")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConversionError, match="no token <IMG_CONTEXT>"):
        names.assemble(hf, folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 7}))
    assert names.assemble(hf, folder)["image_token_id"] == 7


@pytest.mark.parametrize("kind", [dict(), LARGE])
def test_an_exported_folder_loads_again(tmp_path, kind):
    source = tiny_internvl(tmp_path / "source", **kind)
    config, params, folder = convert.load(source, dtype=None)
    out = convert.export_hf(config, params, tmp_path / "out", processor_folder=folder)
    again, same, _ = convert.load(out, dtype=None)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_the_published_8b_has_its_published_size():
    """841 tensors, 8,528,318,464 parameters, of which the tower has 304,012,288."""
    config = InternVLConfig.from_hf(PUBLISHED)
    specs = internvl.specs(config)
    assert sharding.count(specs) == 8_528_318_464
    assert sharding.count(specs.vision) == 304_012_288
    assert len(expected_names(names.TABLE, specs)) == 841
    assert (config.grid, config.image_tokens) == ((16, 16), 256)
    assert InternVLConfig.from_hf(names.to_hf(config)) == config


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("vision_config", dict(use_mean_pooling=False), "use_mean_pooling False"),
        ("vision_config", dict(use_absolute_position_embeddings=False), "use_absolute_position_embeddings False"),
        ("vision_config", dict(norm_type="batch"), "norm_type 'batch'"),
        ("vision_config", dict(image_size=[448, 224]), "image_size"),
        ("vision_config", dict(image_size=[450, 450]), "image_size"),
        ("vision_config", dict(num_attention_heads=15), "not a multiple of 15 heads"),
        (None, dict(vision_feature_select_strategy="full"), "vision_feature_select_strategy 'full'"),
        (None, dict(downsample_ratio=0.3), "downsample_ratio 0.3"),
        (None, dict(vision_feature_layer=[-1, -2]), "vision_feature_layer"),
        (None, dict(projector_hidden_act="relu"), "projector_hidden_act 'relu'"),
        (None, dict(vision_feature_layer=40), "vision_feature_layer 40"),
    ],
)
def test_an_option_that_is_not_supported_is_named(part, change, said):
    hf = PUBLISHED | change if part is None else PUBLISHED | {part: PUBLISHED[part] | change}
    with pytest.raises(JaxVQAError, match=said.replace("[", r"\[")):
        InternVLConfig.from_hf(hf)


def test_all_faults_of_a_config_are_named_at_once():
    hf = PUBLISHED | {"vision_config": dict(norm_type="batch", num_channels=1, use_mask_token=True)}
    with pytest.raises(JaxVQAError, match=r"norm_type 'batch'.*num_channels 1.*use_mask_token True"):
        InternVLConfig.from_hf(hf)
    outer = PUBLISHED | dict(downsample_ratio=0.3, projector_hidden_act="relu")
    with pytest.raises(JaxVQAError, match=r"downsample_ratio 0\.3.*projector_hidden_act 'relu'"):
        InternVLConfig.from_hf(outer)


def test_dynamic_rope_scaling_is_none_within_the_context():
    dynamic = dict(rope_scaling=dict(factor=2.0, rope_type="dynamic", type="dynamic"))
    scaled = PUBLISHED | dict(text_config=PUBLISHED["text_config"] | dynamic)
    assert InternVLConfig.from_hf(scaled) == InternVLConfig.from_hf(PUBLISHED)
    inside = dict(rope_parameters=dict(factor=2.0, rope_type="dynamic", rope_theta=1e6), rope_theta=None)
    inner = PUBLISHED | dict(text_config=PUBLISHED["text_config"] | inside)
    assert InternVLConfig.from_hf(inner) == InternVLConfig.from_hf(PUBLISHED)


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [(None, None, True), (None, False, False), (None, True, True), (True, False, True), (False, True, False)],
)
def test_the_outer_key_ties_the_output_head_before_the_inner_one(outer, inner, tied):
    """transformers 5 reads the outer key and defaults to tied; transformers 4 wrote the inner one only."""
    text = PUBLISHED["text_config"] | dict(tie_word_embeddings=inner)
    hf = PUBLISHED | dict(text_config=text, tie_word_embeddings=outer)
    assert InternVLConfig.from_hf(hf).decoder.tied == tied


def test_another_image_processor_is_refused(config, processor):
    internvl.check_processor(config, processor)
    with pytest.raises(JaxVQAError, match="GotOcr2ImageProcessor, with the tower's tiles of 28x28"):
        internvl.check_processor(config, type(processor)(size=dict(height=56, width=56)))


def test_flops_grow_with_the_tiles(config):
    one, all_tiles = (internvl.image_flops(config, np.zeros((t, SIDE, SIDE, 3))) for t in (1, 13))
    assert all_tiles == 13 * one
    shallow = replace(config, feature_layer=1)
    assert internvl.image_flops(shallow, np.zeros((1, SIDE, SIDE, 3))) < one
    # The tower of the published model is known: 304M parameters on 1025 patches, twice.
    big = InternVLConfig.from_hf(PUBLISHED)
    assert 1.0 < internvl.image_flops(big, np.zeros(1)) / (2 * 1025 * 304e6) < 1.3


def test_every_parameter_has_a_name(config):
    specs = internvl.specs(config)
    assert {path for path, _ in expected_names(names.TABLE, specs).values()} == set(
        flatten(specs, lambda x: isinstance(x, sharding.ArraySpec))
    )
