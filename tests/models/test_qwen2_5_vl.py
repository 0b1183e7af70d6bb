"""Qwen2.5-VL and Qwen2-VL without torch: grids, buckets, padding, geometry, checkpoints, configurations, odd input."""

import functools
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
from tiny_qwen import END, IMAGE_PAD, VIDEO_PAD, tiny_qwen

import jaxvqa
from jaxvqa import sharding
from jaxvqa.attention import Mask, attend
from jaxvqa.convert import export_hf, load
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.models import qwen2_5_vl
from jaxvqa.models.qwen2_5_vl import QwenVLConfig
from jaxvqa.vision import qwen
from jaxvqa.vlm import collate

BUCKETS = (32, 64)
KINDS = {"2.5": {}, "2": dict(kind="qwen2_vl", vision_layers=2)}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """model_of(kind): (config, parameters, image processor, folder), made once."""

    @functools.cache
    def make(kind):
        folder = tiny_qwen(tmp_path_factory.mktemp(kind), **KINDS[kind])
        config, params, _ = load(folder, dtype="float32")
        return config, params, processor_of(folder), folder

    return make


def processor_of(folder):
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, backend="pil")


def processor(fewest, most, **options):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(size=dict(shortest_edge=fewest, longest_edge=most), **options)


def picture(width, height, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@given(
    size=st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
    tokens=st.tuples(st.integers(1, 300), st.integers(0, 3000)),
    patch=st.sampled_from([14, 16]),
)
def test_grids_are_those_of_the_hf_processor_and_fit_the_largest_bucket(size, tokens, patch):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    (W, H), unit = size, 2 * patch
    fewest, most = tokens[0] * unit**2, (tokens[0] + tokens[1]) * unit**2
    made = processor(fewest, most, patch_size=patch)
    if max(W, H) > 200 * min(W, H):
        with pytest.raises(UserError, match=rf"an image of {W} x {H} pixels is more than 200 times as long as wide"):
            qwen.patch_grid(made, (W, H))
        return
    rows, columns = qwen.patch_grid(made, (W, H))
    assert (rows * patch, columns * patch) == smart_resize(H, W, unit, fewest, most)
    assert rows * columns // 4 <= qwen.token_buckets(made)[-1]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((4, 16384), (128, 256, 512, 1024, 2048, 4096, 8192, 16384)),  # the published processor
        ((4, 1280), (20, 40, 80, 160, 320, 640, 1280)),
        ((4, 256), (16, 32, 64, 128, 256)),
        ((4, 8), (20, 40)),  # an image of 1 x 200 pixels has 40 tokens in one row
    ],
)
def test_default_buckets_are_few_and_end_at_what_the_processor_can_give(tokens, expected):
    assert qwen.token_buckets(processor(*(n * 28**2 for n in tokens))) == expected


def test_limits_of_an_image_are_found_under_either_spelling():
    old, new = processor(None, None, min_pixels=3136, max_pixels=50176), processor(3136, 50176)
    assert qwen.pixel_limits(old) == qwen.pixel_limits(new) == (3136, 50176)
    new.size = dict(height=224, width=224)
    with pytest.raises(JaxVQAError, match=r"size .*height.*expected 0 < shortest_edge <= longest_edge"):
        qwen.pixel_limits(new)


@given(h=st.integers(1, 17), w=st.integers(1, 17), window=st.sampled_from([None, 1, 3, 4]))
def test_every_token_has_its_place_and_every_window_its_patches(h, w, window):
    values = np.arange(h * w * 4, dtype=np.float32)[:, None].repeat(3 * 2 * 2 * 2, axis=1)
    x = qwen.lay_out(values, (h, w), h * w + 3, patch_size=2, merge_size=2, window=window)
    n = 4 * h * w
    tokens = x.pixels[:n, 0, 0, 0].reshape(-1, 4)[x.places[: h * w]].ravel()
    np.testing.assert_array_equal(tokens, np.arange(n))
    side = 2 * (window or 100)
    there = x.positions[:n] // side
    whose = there[:, 0] * 100 + there[:, 1]
    assert all(len(set(whose[x.window[:n] == i])) == 1 for i in range(1, x.window.max() + 1))
    assert len(set(whose)) == x.window.max() and (np.diff(x.window[:n]) >= 0).all()
    assert (x.window[n:] == -1).all() and sorted(x.places) == list(range(h * w + 3))


@pytest.mark.parametrize(
    ("grid", "window", "capacity"), [((1, 1), 4, 1), ((3, 5), 2, 16), ((13, 1), 2, 20), ((9, 10), 4, 97)]
)
def test_windows_are_attended_to_as_by_a_mask(grid, window, capacity):
    """Whole windows and those that the image's edge cuts, padding, and an image that is almost all padding."""

    def windows_of(h, w):
        pixels = np.zeros((4 * h * w, 3 * 2 * 2 * 2), np.float32)
        return qwen.lay_out(pixels, (h, w), capacity, patch_size=2, merge_size=2, window=window).window

    windows = jnp.stack([windows_of(*grid), windows_of(1, 1)])
    q, k, v = jax.random.normal(jax.random.key(0), (3, *windows.shape, 2, 8))
    got = qwen.attend_windows(q, k, v, windows, 4 * window**2, scale=0.5, backend="xla")
    order = jnp.zeros_like(windows)
    expected = attend(q, k, v, Mask(order, order, windows, windows), scale=0.5, backend="xla")
    np.testing.assert_allclose(got[windows > 0], expected[windows > 0], atol=1e-6)
    assert np.isfinite(got).all()


def test_windows_cost_as_much_as_there_are_patches():
    def work(patches):
        x, windows = (jax.ShapeDtypeStruct((1, patches, *n), t) for n, t in (((2, 8), np.float32), ((), np.int32)))
        made = jax.jit(lambda *qkvw: qwen.attend_windows(*qkvw, 16, scale=1.0)).lower(x, x, x, windows).compile()
        return np.array([made.cost_analysis()["flops"], made.memory_analysis().temp_size_in_bytes])

    assert (work(2048) / work(1024) < 2.1).all()


@functools.partial(jax.jit, static_argnums=1)
def encode(params, c, patches):
    return qwen2_5_vl.encode_images(params, c, patches)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_bucket_nor_company_changes_an_image(kind, model_of):
    """One image alone in the small bucket; in the large one, beside others and an empty row."""
    c, params, processor, _ = model_of(kind)
    small = qwen2_5_vl.process(c, processor, picture(150, 90), BUCKETS)
    assert (small.capacity, small.tokens, small.geometry.grid) == (32, 15, (3, 5))
    alone = np.asarray(encode(params, c, jax.tree.map(lambda x: x[None], small.arrays)))[0]
    others = [qwen2_5_vl.process(c, processor, picture(150 + n, 90 * n), BUCKETS[1:]) for n in (1, 3)]
    empty = jax.tree.map(np.zeros_like, others[0].arrays)
    batch = jax.tree.map(lambda *x: np.stack(x), others[1].arrays, empty, others[0].arrays)
    again = qwen2_5_vl.process(c, processor, picture(150, 90), BUCKETS[1:])
    batch = jax.tree.map(lambda x, y: np.concatenate([x, y[None]]), batch, again.arrays)
    together = np.asarray(encode(params, c, batch))
    assert np.isfinite(together).all()
    np.testing.assert_allclose(together[3, :15], alone[:15], atol=1e-5)


def test_each_cell_is_a_rectangle_of_the_image(model_of):
    """Odd sizes: every pixel has one cell, and the centre of a cell lies in it."""
    c, _, processor, _ = model_of("2.5")
    for size in ((1, 1), (1, 200), (333, 77), (640, 480), (5000, 26)):
        place = qwen2_5_vl.geometry_of(c, processor, size, (128,))
        h, w = place.grid
        boxes = place.cell_boxes()
        assert place.valid().all() and place.capacity == 128 and place.encoder_size == (28 * w, 28 * h)
        assert np.isclose(np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1).sum(), size[0] * size[1])
        centres = (boxes[..., 2:] + boxes[..., :2]) / 2
        np.testing.assert_array_equal(place.cells_at(centres), np.moveaxis(np.indices((h, w)), 0, -1))
        np.testing.assert_allclose(place.from_encoder(place.to_encoder(centres)), centres)


def test_images_of_one_pixel_and_thin_ones_are_encoded(model_of):
    c, _, processor, _ = model_of("2.5")
    buckets = qwen2_5_vl.default_buckets(c, processor)
    assert buckets[-1] == 113  # 1 x 200 pixels, at 64 tokens' area and no less than one row
    for size, grid in (((1, 1), (2, 2)), ((1, 200), (29, 1)), ((200, 1), (1, 29)), ((20000, 100), (1, 113))):
        ready = qwen2_5_vl.process(c, processor, Image.new("RGB", size, (9, 99, 199)), buckets)
        assert ready.geometry.grid == grid and ready.tokens == len(ready.cells) == grid[0] * grid[1]
    with pytest.raises(UserError, match=r"an image of 640 x 480 pixels needs 54, more than the largest bucket \(32\)"):
        qwen2_5_vl.process(c, processor, picture(640, 480), (16, 32))


def test_text_alone_beside_images_and_more_images_than_fit(model_of):
    """A row without images in a batch with two has the logits that it has alone."""
    vlm = jaxvqa.load(model_of("2.5")[3], dtype="float32", image_buckets=BUCKETS, offline=True)
    pictures = [picture(150, 90), picture(61, 200)]
    seen, alone = vlm.encode(pictures, "Is it red?", bucket=32), vlm.encode([], "Is it red?")
    assert [image.tokens for image in seen.images] == [15, 14] and alone.positions[-1, 0] == len(alone.tokens.ids) - 1
    together = vlm.prefill(collate([seen, alone]), max_new_tokens=1).logits
    apart = vlm.prefill(alone, max_new_tokens=1).logits
    np.testing.assert_allclose(together[1], apart[0], atol=1e-5)
    assert np.abs(np.asarray(together[0] - together[1])).max() > 0.1
    with pytest.raises(UserError, match=r"the prompt has 2\d{3} tokens, the context of .* 2048; .*give fewer images"):
        vlm.encode(pictures * 70, "Is it red?")


def test_a_processor_for_another_tower_is_refused_with_all_that_differs(model_of):
    c, _, good, _ = model_of("2.5")
    qwen2_5_vl.check_processor(c, good)
    bad = processor(784, 7840, patch_size=16, do_resize=False)
    with pytest.raises(JaxVQAError, match=r"patch_size 16, not 14; do_resize False, not True"):
        qwen2_5_vl.check_processor(c, bad)


def test_positions_count_rows_and_columns_and_go_on_behind_the_larger_side(model_of):
    c, _, processor, _ = model_of("2.5")
    wide, tall = (qwen2_5_vl.geometry_of(c, processor, size, (64,)) for size in ((84, 56), (28, 112)))
    ids = np.array([5, *[IMAGE_PAD] * 6, 6, 7, *[IMAGE_PAD] * 4], np.int32)
    got = qwen2_5_vl.positions(c, ids, [wide, tall])
    image = [[1, 1, 1], [1, 1, 2], [1, 1, 3], [1, 2, 1], [1, 2, 2], [1, 2, 3]]
    assert got.tolist() == [[0] * 3, *image, [4] * 3, [5] * 3, [6, 6, 6], [6, 7, 6], [6, 8, 6], [6, 9, 6]]
    words = qwen2_5_vl.positions(c, np.array([3, 1, 4], np.int32), [])
    assert words.tolist() == [[0] * 3, [1] * 3, [2] * 3]


def test_positions_refuse_video_and_images_that_do_not_fit(model_of):
    c = model_of("2.5")[0]
    with pytest.raises(UserError, match=rf"video tokens \(id {VIDEO_PAD}\): images only"):
        qwen2_5_vl.positions(c, np.array([END, VIDEO_PAD], np.int32), [])
    with pytest.raises(JaxVQAError, match="the prompt has 1 image tokens; its 0 images need 0"):
        qwen2_5_vl.positions(c, np.array([END, IMAGE_PAD], np.int32), [])


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(published=False, tied=True, num_heads=3, num_kv_heads=1, patch_size=8, window_size=48, full_layers=(0,)),
        dict(kind="qwen2_vl", tied=True),
        dict(kind="qwen2_vl", published=False),
    ],
)
def test_a_folder_is_read_and_written_back_bit_for_bit(options, tmp_path):
    source = tiny_qwen(tmp_path / "a", **options, shards=2)
    config, params, _ = load(source, dtype="float32")
    out = export_hf(config, params, tmp_path / "b", processor_folder=source)
    theirs = functools.reduce(dict.__or__, (load_file(file) for file in source.glob("*.safetensors")))
    renamed = {
        k.replace("model.visual.", "visual.").replace("model.language_model.", "model."): v for k, v in theirs.items()
    }
    written = load_file(out / "model.safetensors")
    assert written.keys() == renamed.keys()
    for name, tensor in renamed.items():
        np.testing.assert_array_equal(written[name], tensor)
    assert load(out)[0] == config and config.decoder.tied == options.get("tied", False)


PUBLISHED = {
    # vocab_size is that of the published config.json, larger than the tokenizer.
    "Qwen2.5-VL-3B": ("qwen2_5_vl", 2048, 11008, 36, 16, 2, 151936, True, 3_754_622_976),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", 3584, 18944, 28, 28, 4, 152064, False, 8_292_166_656),
    "Qwen2-VL-2B": ("qwen2_vl", 1536, 8960, 28, 12, 2, 151936, True, 2_208_985_600),
    "Qwen2-VL-7B": ("qwen2_vl", 3584, 18944, 28, 28, 4, 152064, False, 8_291_375_616),
}


def published(name) -> dict:
    kind, width, mlp, layers, heads, kv_heads, vocabulary, tied, _ = PUBLISHED[name]
    new = dict(hidden_size=1280, out_hidden_size=width, intermediate_size=3420, window_size=112)
    vision = new if kind == "qwen2_5_vl" else dict(embed_dim=1280, hidden_size=width)
    return dict(
        model_type=kind, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, hidden_act="silu",
        max_position_embeddings=128000 if kind == "qwen2_5_vl" else 32768, rms_norm_eps=1e-6, rope_theta=1000000.0,
        use_sliding_window=False, sliding_window=32768, image_token_id=151655, video_token_id=151656,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]), vision_config=vision | dict(depth=32, in_chans=3),
    )  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_published_number_of_parameters(name):
    assert sharding.count(qwen2_5_vl.specs(QwenVLConfig.from_hf(published(name)))) == PUBLISHED[name][-1]


def test_the_7b_model_traces_on_a_mesh():
    """Two prompts of 300 tokens, each with an image of 256 tokens: shapes and shardings, no arithmetic."""
    c = QwenVLConfig.from_hf(published("Qwen2.5-VL-7B"))
    specs = qwen2_5_vl.specs(c)
    mesh = AbstractMesh((1, 2, 4), ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3)

    def shape(spec, placed):
        return jax.ShapeDtypeStruct(spec.shape, np.float32, sharding=placed)

    params = jax.tree.map(
        shape, specs, sharding.shardings(specs, mesh), is_leaf=lambda x: isinstance(x, sharding.ArraySpec)
    )
    B, T, C = 2, 300, 256
    patches = qwen.Patches(
        jax.ShapeDtypeStruct((B, 4 * C, 3, 14, 14), np.float32),
        *(jax.ShapeDtypeStruct(shape, np.int32) for shape in ((B, 4 * C, 2), (B, 4 * C), (B, C))),
    )
    ids, lengths, positions = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((B, T), (B,), (B, T, 3)))

    def forward(params, patches, ids, lengths, positions):
        features = qwen2_5_vl.encode_images(params, c, patches)
        return qwen2_5_vl.prefill(params, c, ids, lengths, features, ids, positions, capacity=T).logits

    with jax.sharding.use_abstract_mesh(mesh):
        assert jax.eval_shape(forward, params, patches, ids, lengths, positions).shape == (B, c.decoder.vocab_size)
    # A token of text costs 2 FLOPs per weight, one of an image 4 patches through the tower.
    weights = 2 * (sharding.count(specs.decoder.layers) + sharding.count(specs.decoder.lm_head))
    assert qwen2_5_vl.flops(c, 1, 1) == pytest.approx(weights, rel=1e-3)
    tower = 2 * (4 * C * sharding.count(specs.vision.blocks) + C * sharding.count(specs.vision.merger))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), patches)
    assert 1 < qwen2_5_vl.image_flops(c, one) / tower < 1.2


def test_all_faults_of_a_configuration_are_named_at_once():
    hf = published("Qwen2.5-VL-7B")
    hf["vision_config"] |= dict(hidden_act="gelu", window_size=27, in_chans=4, rope_parameters=dict(rope_type="yarn"))
    with pytest.raises(JaxVQAError, match=r"hidden_act 'gelu'.*in_channels 4.*rope type 'yarn'.*window_size 27 "):
        QwenVLConfig.from_hf(hf)
    wrong = published("Qwen2.5-VL-7B") | dict(vision_config=dict(out_hidden_size=100))
    with pytest.raises(JaxVQAError, match="image tokens of width 100 for a decoder of width 3584"):
        QwenVLConfig.from_hf(wrong)
    with pytest.raises(JaxVQAError, match="lacks vision_config"):
        QwenVLConfig.from_hf(dict(model_type="qwen2_vl"))
    c = QwenVLConfig.from_hf(published("Qwen2.5-VL-3B"))
    assert (
        c.grid == (8, 8) and c.image_tokens == 64 and c.vision.window == 4 and c.vision.full_layers == (7, 15, 23, 31)
    )
    assert replace(c.vision, window=None) != c.vision and hash(c)
