"""Qwen3-VL without torch: DeepStack, padding, interpolated positions, checkpoints, configurations, odd input."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType
from PIL import Image
from safetensors.numpy import load_file
from tiny_qwen import END, VIDEO_PAD
from tiny_qwen3 import tiny_qwen3

import jaxvqa
from jaxvqa import sharding
from jaxvqa.convert import ConversionError, export_hf, load
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.models import config_from_hf, qwen3_vl
from jaxvqa.models.qwen3_vl import Qwen3VLConfig
from jaxvqa.taps import Plugin, ReadSpec
from jaxvqa.vision import qwen, qwen3
from jaxvqa.vlm import collate

SMALL, LARGE = 16, 32
CUTS = 2
"""DeepStack features of the tiny model: added before layers 1 and 2 of 4."""


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tiny_qwen3(tmp_path_factory.mktemp("qwen3"), patch_size=4, pixels=(4 * 8**2, LARGE * 8**2))
    return jaxvqa.load(folder, dtype="float32", image_buckets=(SMALL, LARGE), offline=True)


def picture(width, height, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@functools.partial(jax.jit, static_argnums=1)
def encode(params, c, arrays):
    return qwen3_vl.encode_images(params, c, arrays)


def test_neither_the_bucket_nor_company_changes_an_image(vlm):
    """One image alone in the small bucket; in the large one, beside another and an empty row."""
    small, large = (vlm.process(picture(40, 24), bucket) for bucket in (None, LARGE))
    assert (small.capacity, small.tokens, small.geometry.grid) == (SMALL, 15, (3, 5))
    alone = np.asarray(encode(vlm.params, vlm.config, jax.tree.map(lambda x: x[None], small.arrays)))[0]
    assert alone.shape == (SMALL, (1 + CUTS) * vlm.config.decoder.width)
    other = vlm.process(picture(30, 60), LARGE).arrays
    batch = jax.tree.map(lambda *x: np.stack(x), other, jax.tree.map(np.zeros_like, other), large.arrays)
    together = np.asarray(encode(vlm.params, vlm.config, batch))
    assert np.isfinite(together).all()
    np.testing.assert_allclose(together[2, :15], alone[:15], atol=1e-5)


def test_images_of_one_pixel_and_thin_ones_are_encoded(vlm):
    buckets = qwen3_vl.default_buckets(vlm.config, vlm.image_processor)
    for size, grid in (((1, 1), (2, 2)), ((1, 200), (29, 1)), ((3, 1), (2, 4)), ((20000, 100), (1, 80))):
        made = qwen3_vl.process(vlm.config, vlm.image_processor, Image.new("RGB", size, (9, 99, 199)), buckets)
        assert made.geometry.grid == grid and made.tokens == len(made.cells) == grid[0] * grid[1]
    with pytest.raises(UserError, match="an image of 201 x 1 pixels is more than 200 times as long as wide"):
        vlm.process(Image.new("RGB", (201, 1)))
    with pytest.raises(UserError, match=r"an image of 64 x 40 pixels needs \d+, more than the largest bucket \(16\)"):
        vlm.process(picture(64, 40), SMALL)


@given(grid=st.tuples(st.integers(1, 40), st.integers(1, 40)), side=st.integers(1, 48))
def test_positions_are_interpolated_between_the_corners_of_the_square(grid, side):
    """Bilinear weights reproduce what is linear: here the rows and the columns themselves."""
    places = np.stack(np.indices(grid, np.int32), axis=-1).reshape(-1, 2)
    corners, weights = qwen3.interpolation(places, grid, side)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert weights.dtype == np.float32 and weights.min() >= 0 and corners.min() >= 0 and corners.max() < side**2
    for axis, length in enumerate(grid):
        seen = (np.divmod(corners, side)[axis] * weights).sum(axis=1).reshape(grid)
        expected = np.linspace(0, side - 1, length) if length > 1 else np.zeros(1)
        np.testing.assert_allclose(seen, np.expand_dims(expected, 1 - axis) + np.zeros(grid), atol=1e-4)


def test_a_grid_of_the_learned_size_has_the_learned_positions():
    places = np.stack(np.indices((6, 6), np.int32), axis=-1).reshape(-1, 2)
    corners, weights = qwen3.interpolation(places, (6, 6), 6)
    np.testing.assert_array_equal(corners[:, 0], np.arange(36))
    np.testing.assert_array_equal(weights[:, 0], 1)


def keep(params, cut, stream, carry):
    """A plugin that notes the states that it sees."""
    return stream, (*carry, stream.hidden), ()


@functools.partial(jax.jit, static_argnames=("c", "spec"))
def prefill(params, c, inputs, features, plugins=(), spec=ReadSpec()):
    return qwen3_vl.prefill(
        params, c, inputs.ids, inputs.lengths, features, inputs.slots, inputs.positions, plugins=plugins, spec=spec
    )


@pytest.fixture(scope="module")
def batch(vlm):
    """A batch of an image's question and one without image, and its features [B, S, W]."""
    rows = [vlm.encode([picture(40, 24)], "What is it?"), vlm.encode([], "What is the character on the red plate?")]
    inputs = collate(rows)
    arrays = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), inputs.images)
    return inputs, encode(vlm.params, vlm.config, arrays)


def test_deepstack_adds_to_image_tokens_alone_before_other_plugins_and_is_gone_after(vlm, batch):
    inputs, features = batch
    spec = ReadSpec((0, 1, 2), frozenset({"hidden"}))
    out = prefill(vlm.params, vlm.config, inputs, features, (Plugin(keep, (1, 2, 3), carry=()),), spec)
    assert [plugin.step for plugin in out.plugins] == [keep]
    D, image = vlm.config.decoder.width, np.asarray(inputs.slots) >= 0
    assert image.sum() == 15 and not image[1].any()
    for depth, (state, seen) in enumerate(zip(out.readouts.hidden, out.plugins[0].carry, strict=True), 1):
        added = np.asarray(seen - state)
        expected = np.asarray(features)[0, :15, depth * D : (depth + 1) * D] if depth <= CUTS else 0
        np.testing.assert_allclose(added[image], np.broadcast_to(expected, (15, D)), atol=1e-5)
        assert not added[~image].any()


def test_a_row_without_images_is_the_same_beside_one_with_an_image_and_in_a_batch_without(vlm, batch):
    inputs, features = batch
    mixed = prefill(vlm.params, vlm.config, inputs, features)
    words = replace(inputs, images=None, slots=None)
    plain = prefill(vlm.params, vlm.config, words, None)
    assert plain.plugins == ()
    np.testing.assert_allclose(mixed.logits[1], plain.logits[1], atol=1e-5)
    assert np.abs(mixed.logits[0] - plain.logits[0]).max() > 0.1


def test_going_on_above_deepstack_is_exact_and_below_it_is_refused(vlm, batch):
    inputs, features = batch
    c, params = vlm.config, vlm.params
    whole = prefill(params, c, inputs, features).logits
    stopped = prefill(params, c, inputs, features, spec=ReadSpec(stop=CUTS + 1))
    resume = functools.partial(qwen3_vl.resume, params, c, stopped.hidden, jnp.asarray(inputs.lengths))
    on = jax.jit(lambda positions: resume(ReadSpec(start=CUTS + 1), positions))(inputs.positions)
    np.testing.assert_allclose(on.logits, whole, atol=1e-5)
    for start in (1, CUTS):
        with pytest.raises(
            JaxVQAError, match=f"cannot go on from layer {start}.*before layers 1 to 2.*stop at layer 3"
        ):
            resume(ReadSpec(start=start))


def test_questions_about_images_are_answered_and_too_many_images_refused(vlm):
    images = [picture(40, 24), picture(30, 60, 1)]
    inputs = collate(
        [vlm.encode(images, "Which one?", LARGE), vlm.encode([], "Is it red?"), vlm.encode(images[:1], "?", LARGE)]
    )
    out = vlm.prefill(inputs, max_new_tokens=4)
    # The text goes on behind the larger side of each image, not behind its tokens.
    np.testing.assert_array_equal(out.cache.shift < 0, [True, False, True])
    assert len(vlm.decode(out, max_new_tokens=4)) == 3
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, the context of .* 2048.*fewer images"):
        vlm.encode([Image.new("RGB", (40, 40))] * 90, "Is it red?", LARGE)
    with pytest.raises(UserError, match=rf"video tokens \(id {VIDEO_PAD}\): images only"):
        qwen3_vl.positions(vlm.config, np.array([END, VIDEO_PAD], np.int32), [])


@pytest.mark.parametrize(
    "options",
    [{}, dict(published=False, tied=True, num_kv_heads=4, head_dim=12, sections=(2, 2, 2), deepstack=(1,)),
     dict(deepstack=())],
)  # fmt: skip
def test_a_folder_is_read_and_written_back_bit_for_bit(options, tmp_path):
    source = tiny_qwen3(tmp_path / "a", **options, shards=2)
    config, params, _ = load(source, dtype="float32")
    out = export_hf(config, params, tmp_path / "b", processor_folder=source)
    theirs = functools.reduce(dict.__or__, (load_file(file) for file in source.glob("*.safetensors")))
    written = load_file(out / "model.safetensors")
    assert written.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(written[name], tensor)
    assert load(out)[0] == config and config.decoder.tied == options.get("tied", False)


PUBLISHED = {
    "2B": (2048, 6144, 28, 16, True, dict(depth=24, hidden_size=1024, intermediate_size=4096), (5, 11, 17)),
    "4B": (2560, 9728, 36, 32, True, dict(depth=24, hidden_size=1024, intermediate_size=4096), (5, 11, 17)),
    "8B": (4096, 12288, 36, 32, False, dict(depth=27, hidden_size=1152, intermediate_size=4304), (8, 16, 24)),
    "32B": (5120, 25600, 64, 64, False, dict(depth=27, hidden_size=1152, intermediate_size=4304), (8, 16, 24)),
}
PARAMETERS = {"2B": 2_127_532_032, "4B": 4_437_815_808, "8B": 8_767_123_696, "32B": 33_357_390_064}


def published(name) -> dict:
    width, mlp, layers, heads, tied, vision, deepstack = PUBLISHED[name]
    text = dict(
        model_type="qwen3_vl_text", hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, vocab_size=151936, hidden_act="silu",
        max_position_embeddings=262144, rms_norm_eps=1e-6, rope_theta=5000000, attention_bias=False,
        rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
    )  # fmt: skip
    vision = vision | dict(
        model_type="qwen3_vl", num_heads=16, hidden_act="gelu_pytorch_tanh", in_channels=3, patch_size=16,
        spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=width, num_position_embeddings=2304,
        deepstack_visual_indexes=list(deepstack),
    )  # fmt: skip
    return dict(
        model_type="qwen3_vl", architectures=["Qwen3VLForConditionalGeneration"], text_config=text,
        vision_config=vision, tie_word_embeddings=tied, image_token_id=151655, video_token_id=151656,
    )  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_published_number_of_parameters(name):
    c = config_from_hf(published(name))
    assert sharding.count(qwen3_vl.specs(c)) == PARAMETERS[name]
    assert (c.grid, c.image_tokens, c.vision.image_size) == ((24, 24), 576, 768)


def test_the_8b_model_traces_on_a_mesh():
    """Two prompts of 300 tokens, each with an image of 256 tokens: shapes and shardings, no arithmetic."""
    c = Qwen3VLConfig.from_hf(published("8B"))
    specs = qwen3_vl.specs(c)
    mesh = AbstractMesh((1, 2, 4), ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3)

    def shape(spec, placed):
        return jax.ShapeDtypeStruct(spec.shape, np.float32, sharding=placed)

    params = jax.tree.map(
        shape, specs, sharding.shardings(specs, mesh), is_leaf=lambda x: isinstance(x, sharding.ArraySpec)
    )
    B, T, C = 2, 300, 256
    P = 4 * C
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
    patches = qwen.Patches(
        jax.ShapeDtypeStruct((B, P, 3, 16, 16), np.float32), ints((B, P, 2)), ints((B, P)), ints((B, C))
    )
    arrays = qwen3.PlacedPatches(patches, ints((B, P, 4)), jax.ShapeDtypeStruct((B, P, 4), np.float32))

    def forward(params, arrays, ids, lengths, positions):
        features = qwen3_vl.encode_images(params, c, arrays)
        return qwen3_vl.prefill(params, c, ids, lengths, features, ids, positions, capacity=T).logits

    with jax.sharding.use_abstract_mesh(mesh):
        logits = jax.eval_shape(forward, params, arrays, ints((B, T)), ints((B,)), ints((B, T, 3)))
    assert logits.shape == (B, c.decoder.vocab_size)
    # One of an image is 4 patches through the tower, and once through each merger.
    vision = specs.vision
    mergers = sharding.count(vision.tower.merger) + sharding.count(vision.deepstack)
    tower = 2 * (P * sharding.count(vision.tower.blocks) + C * mergers)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), arrays)
    assert 1 < qwen3_vl.image_flops(c, one) / tower < 1.2


def test_all_faults_of_a_configuration_are_named_at_once():
    hf = published("8B")
    hf["vision_config"] |= dict(hidden_act="relu", in_channels=4, num_position_embeddings=10)
    hf["vision_config"] |= dict(deepstack_visual_indexes=[3, 40], rope_parameters=dict(rope_type="yarn"))
    with pytest.raises(JaxVQAError, match=r"'relu'.*in_channels 4.*embeddings 10.*'yarn'.*\[3, 40\] .*27 blocks"):
        Qwen3VLConfig.from_hf(hf)
    hf = published("8B")
    hf["vision_config"] |= dict(out_hidden_size=100)
    hf["text_config"] |= dict(num_hidden_layers=3)
    with pytest.raises(JaxVQAError, match=r"width 100 for a decoder of width 4096; 3 DeepStack features .* 3 layers"):
        Qwen3VLConfig.from_hf(hf)
    with pytest.raises(JaxVQAError, match="lacks text_config, vision_config"):
        Qwen3VLConfig.from_hf(dict(model_type="qwen3_vl"))


def test_mixtures_of_experts_are_refused_by_name(tmp_path):
    hf = published("8B") | dict(model_type="qwen3_vl_moe", architectures=["Qwen3VLMoeForConditionalGeneration"])
    with pytest.raises(JaxVQAError, match="'qwen3_vl_moe' is not supported"):
        config_from_hf(hf)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ConversionError, match="Qwen3VLMoeForConditionalGeneration is not supported"):
        load(tmp_path)
    hf = published("8B")
    hf["text_config"]["model_type"] = "qwen3_vl_moe_text"
    with pytest.raises(JaxVQAError, match="'qwen3_vl_moe_text' is not supported"):
        Qwen3VLConfig.from_hf(hf)
