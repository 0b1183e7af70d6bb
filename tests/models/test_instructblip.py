"""InstructBLIP without a reference: processing, odd input, what may be read and edited, and its folders."""

import functools
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny import write_json
from tiny_instructblip import tiny_instructblip

from jaxvqa import sharding
from jaxvqa.convert import ConversionError, convert, export_hf, load
from jaxvqa.convert import instructblip as tables
from jaxvqa.convert.tables import expected_names, flatten, leaves
from jaxvqa.errors import JaxVQAError, UserError
from jaxvqa.models import instructblip
from jaxvqa.models.instructblip import Asked, InstructBlipConfig, specs
from jaxvqa.taps import ReadSpec, Taps
from jaxvqa.transforms.query_map import query_map

IMAGES, LENGTH, QUESTION = 2, 24, 9
"""Of the batch that the tests share, padding included: images of a row, tokens, tokens for the Q-Former."""
TOLERANCE = 1e-5
CROSS = ReadSpec((0, 1), frozenset({"rows", "values"}), heads="all")


@dataclass(frozen=True, eq=False)
class Model:
    folder: Any
    config: InstructBlipConfig
    params: Any
    processor: Any
    tokenizer: Any
    """The Q-Former's."""

    def process(self, *size: int):
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
        return instructblip.process(self.config, self.processor, Image.fromarray(pixels), (1,))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    from transformers import AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    folder = tiny_instructblip(tmp_path_factory.mktemp("instructblip"))
    config, params, _ = load(folder, dtype="float32")
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return Model(folder, config, params, processor, AutoTokenizer.from_pretrained(folder / "qformer_tokenizer"))


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (2, 3000), (641, 479)])
def test_an_image_of_any_size_is_squashed(model, size):
    made = model.process(*size)
    assert made.arrays.shape == (24, 24, 3) and made.arrays.dtype == np.float32 and np.isfinite(made.arrays).all()
    assert (made.tokens, made.capacity, made.cells.size) == (6, 10, 0)
    place = made.geometry
    assert place == instructblip.geometry_of(model.config, model.processor, size, (1,))
    assert (place.mode, place.image_size, place.grid) == ("squash", size, (3, 3)) and place.valid().all()
    centres = (place.cell_boxes()[..., :2] + place.cell_boxes()[..., 2:]) / 2
    np.testing.assert_array_equal(place.cells_at(centres), np.moveaxis(np.indices((3, 3)), 0, -1))
    np.testing.assert_allclose(place.from_encoder(place.to_encoder(centres)), centres)


def test_a_processor_of_another_size_is_refused(model):
    instructblip.check_processor(model.config, model.processor)
    other = SimpleNamespace(size={"height": 32, "width": 32}, do_resize=True)
    with pytest.raises(JaxVQAError, match=r"'height': 32.*needs 24x24"):
        instructblip.check_processor(model.config, other)


def test_the_text_for_the_qformer_has_limits(model):
    ids = instructblip.ask(model.config, model.tokenizer, "Is it red?")
    assert ids.dtype == np.int32 and model.tokenizer.decode(ids) == "[CLS] is it red? [SEP]"
    with pytest.raises(UserError, match=r"52 tokens for the Q-Former, which reads 40; shorten"):
        instructblip.ask(model.config, model.tokenizer, "red " * 50)
    with pytest.raises(JaxVQAError, match=r"gives id 5000.*expected the tokenizer of the folder qformer_tokenizer"):
        instructblip.ask(model.config, lambda text: {"input_ids": [5000]}, "red")


# ---- the prompt's program ----


def example(c, rows=2, images=IMAGES, length=LENGTH, question=QUESTION, seed=0):
    """Random ids, features [B, I·S, Dv] and texts: row 0 has `images` images, the last row one; both are padded."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 290, (rows, length)).astype(np.int32)
    features = rng.standard_normal((rows, images * c.image_states, c.vision.width)).astype(np.float32)
    slots = np.full((rows, length), -1, np.int32)
    for row, count in ((0, images), (rows - 1, 1)):
        slots[row, : count * c.image_tokens] = np.arange(count * c.image_tokens)
    asked = Asked(rng.integers(5, 90, (rows, question)).astype(np.int32), np.array([question, 4][:rows], np.int32))
    return ids, np.array([length, length - 5][:rows], np.int32), features, slots, asked


@functools.partial(jax.jit, static_argnames=("cross", "capacity"))
def prefill(
    params, c, ids, lengths, features=None, slots=None, asked=None, bias=None, cross=ReadSpec(), capacity=None, **kw
):
    return instructblip.prefill(
        params, c, ids, lengths, features, slots, asked=asked, bias=bias, cross=cross, capacity=capacity, **kw
    )


def test_padding_never_changes_a_row(model):
    """The row with one image and a short text, beside one with two and a long one, and alone."""
    c, (ids, lengths, features, slots, asked) = model.config, example(model.config)
    together = prefill(model.params, c, ids, lengths, features, slots, asked, cross=CROSS)
    short = slice(1, 2)
    alone = prefill(
        model.params, c, ids[short, : lengths[1]], lengths[short], features[short, : c.image_states],
        slots[short, : lengths[1]], Asked(asked.ids[short, :4], asked.lengths[short]), cross=CROSS,
    )  # fmt: skip
    np.testing.assert_allclose(together.logits[1], alone.logits[0], atol=TOLERANCE)
    np.testing.assert_allclose(together.readouts.cross[:, 1, 0], alone.readouts.cross[:, 0, 0], atol=TOLERANCE)


def test_rows_without_images_are_text_alone(model):
    """In one batch with images that nobody has, not even finite ones, and without any."""
    c, (ids, lengths, features, _, asked) = model.config, example(model.config)
    features, slots = np.full_like(features, np.inf), np.full_like(ids, -1)
    mixed = prefill(model.params, c, ids, lengths, features, slots, asked, cross=CROSS)
    np.testing.assert_array_equal(mixed.logits, prefill(model.params, c, ids, lengths).logits)


def test_a_further_turn_may_show_an_image(model):
    c, (ids, lengths, features, slots, asked) = model.config, example(model.config)
    whole = np.concatenate([ids[:, :7], ids], axis=1)
    later = np.pad(slots, ((0, 0), (7, 0)), constant_values=-1)
    expected = prefill(model.params, c, whole, lengths + 7, features, later, asked, cross=CROSS)
    first = prefill(model.params, c, ids[:, :7], np.full_like(lengths, 7), capacity=7 + LENGTH)
    extend = jax.jit(functools.partial(instructblip.extend, cross=CROSS))
    got = extend(model.params, c, ids, lengths, first.cache, features, slots, asked=asked)
    np.testing.assert_allclose(got.logits, expected.logits, atol=TOLERANCE)
    np.testing.assert_allclose(got.readouts.cross, expected.readouts.cross, atol=TOLERANCE)


def test_a_bias_of_zero_is_the_identity_and_lambda_is_a_power(model):
    """Probabilities of the first cross-attention, whose input no bias has touched: p·λ^m, renormalised."""
    c, batch = model.config, example(model.config)
    weight = np.random.default_rng(1).random((2, IMAGES, 1, c.image_states)).astype(np.float32)
    plain = prefill(model.params, c, *batch, cross=CROSS)
    same = prefill(model.params, c, *batch, bias=np.zeros_like(weight), cross=CROSS)
    np.testing.assert_allclose(plain.logits, same.logits, atol=TOLERANCE)
    biased = prefill(model.params, c, *batch, bias=np.log(np.float32(22)) * weight, cross=CROSS)
    expected = np.asarray(plain.readouts.cross[0]) * 22 ** weight[:, :, :, None]
    expected /= expected.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(biased.readouts.cross[0], expected, atol=TOLERANCE)
    assert np.abs(biased.logits - plain.logits).max() > 100 * TOLERANCE


def test_readouts_reach_the_image_through_the_queries(model):
    """Decoder row times cross-attention, heads averaged, of the second image."""
    c, (ids, lengths, features, slots, asked) = model.config, example(model.config)
    mean, spec = replace(CROSS, layers=(1,), heads="mean"), ReadSpec((1,), frozenset({"rows"}))
    read = jax.jit(functools.partial(instructblip.prefill, cross=mean, taps=Taps(), spec=spec))
    out = read(model.params, c, ids, lengths, features, slots, asked=asked).readouts
    every = prefill(model.params, c, ids, lengths, features, slots, asked, cross=CROSS).readouts
    np.testing.assert_allclose(out.cross[0], every.cross[1].mean(axis=2), atol=1e-6)
    np.testing.assert_allclose(out.cross.sum(axis=-1), 1, atol=1e-5)
    Q = c.image_tokens
    seen = query_map(out.rows[0, 0, 0, Q : 2 * Q], out.cross[0, 0, 1])
    assert seen.shape == c.grid
    np.testing.assert_allclose(
        seen.ravel(), np.asarray(out.rows[0, 0, 0, Q : 2 * Q]) @ out.cross[0, 0, 1, :, 1:], rtol=1e-5
    )


def test_what_cannot_be_asked_is_refused(model):
    c, (ids, lengths, features, slots, asked) = model.config, example(model.config)
    run = functools.partial(prefill, model.params, c, ids, lengths)
    with pytest.raises(JaxVQAError, match="prompts with images need `asked`"):
        run(features, slots)
    with pytest.raises(JaxVQAError, match="without images has no cross-attention"):
        run(cross=CROSS)
    with pytest.raises(JaxVQAError, match=r"cross-attentions \[2\]: the Q-Former has 2, 0 to 1"):
        run(features, slots, asked=asked, cross=replace(CROSS, layers=(0, 2)))
    with pytest.raises(JaxVQAError, match=r"rows and values to read: found \['hidden'\]"):
        run(features, slots, asked=asked, cross=replace(CROSS, read=frozenset({"hidden"})))
    with pytest.raises(JaxVQAError, match="1 perturbations for 2 cross-attentions"):
        run(features, slots, asked=asked, cross=CROSS, perturb=np.zeros((1, 2, IMAGES, 6, 3, 8), np.float32))
    with pytest.raises(JaxVQAError, match="text of 41 tokens: the Q-Former has 40 positions"):
        run(features, slots, asked=replace(asked, ids=np.zeros((2, 41), np.int32)))


def test_flops_are_those_of_the_program():
    """At the published size, where elementwise work is little: XLA's own count of the program, before optimisation."""
    c = InstructBlipConfig.from_hf(dict(
        image_token_index=32000, vision_config={}, qformer_config={"vocab_size": 30523},
        text_config={"model_type": "llama", "num_hidden_layers": 1},
    ))  # fmt: skip
    params, text = sharding.abstract(specs(c)), jax.ShapeDtypeStruct((1, 20), jnp.int32)
    features = jax.ShapeDtypeStruct((1, c.image_states, c.vision.width), jnp.float32)
    asked = Asked(text, jax.ShapeDtypeStruct((1,), jnp.int32))
    lowered = jax.jit(instructblip.query_images).lower(params, c, features, asked)
    assert instructblip.query_flops(c, 20) == pytest.approx(lowered.cost_analysis()["flops"], rel=0.03)
    # Per block 4·D² of projections and 2·D·F of the network for each of 257 tokens, and two products of 257 × 257 × D.
    block = 257 * (4 * 1408**2 + 2 * 1408 * 6144) + 2 * 257**2 * 1408
    assert instructblip.image_flops(c) == 2 * (39 * block + 257 * 588 * 1408)


# ---- folders ----


def test_every_declared_parameter_has_its_tensors(model):
    declared = leaves(specs(model.config))
    assert {path for path, _ in expected_names(tables.TABLE, specs(model.config)).values()} == declared.keys()
    assert expected_names(tables.TABLE, specs(model.config)).keys() == {
        name.replace("self_attn.qkv.", f"self_attn.{part}.")
        for name in load_file(model.folder / "model.safetensors")
        for part in (("query", "key", "value") if "qkv" in name else ("",))
    }
    assert InstructBlipConfig.from_hf(tables.to_hf(model.config)) == model.config


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"every": 3, "qformer_layers": 5, "tied": True, "num_kv_heads": 2}]
)
def test_the_round_trip_is_bit_equal(tmp_path, options):
    source = tiny_instructblip(tmp_path / "a", **options)
    config, params, folder = load(source, dtype=None)
    assert config.qformer.cross_layers == ((0, 3) if "every" in options else (0, 2))
    out = export_hf(config, params, tmp_path / "b", processor_folder=folder)
    before, after = (load_file(f / "model.safetensors") for f in (source, out))
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype and np.array_equal(before[name], after[name]), name
    assert load(out)[0] == config


def test_a_converted_folder_loads_as_its_source(model, tmp_path):
    out = convert(model.folder, tmp_path / "b")
    config, params, _ = load(out, dtype=None)
    before, after = flatten(model.params), flatten(params)
    assert config == model.config and before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_a_cross_attention_that_the_config_does_not_have_is_named(tmp_path):
    folder = tiny_instructblip(tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    name = "qformer.encoder.layer.{}.crossattention.attention.key.bias"
    tensors[name.format(1)] = tensors.pop(name.format(2))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError) as error:
        load(folder)
    assert f"unknown: {name.format(1)}" in str(error.value) and f"missing: {name.format(2)}" in str(error.value)


@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [
        (None, {"image_token_index": None}, "lacks image_token_index.*current revision"),
        ("text_config", {"model_type": "t5"}, "text model type 't5' is not supported"),
        ("vision_config", {"model_type": "clip_vision_model"}, "supported is instructblip_vision_model"),
        ("vision_config", {"qkv_bias": False}, "qkv_bias false"),
        ("vision_config", {"image_size": [24, 32]}, r"image_size \[24, 32\], patch_size 8: expected a number"),
        (
            "qformer_config",
            {"cross_attention_frequency": 0, "hidden_act": "relu", "num_attention_heads": 5},
            "hidden_act 'relu'.*hidden_size 24 .not a multiple of 5 heads.*cross_attention_frequency 0",
        ),
        ("qformer_config", {"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
    ],
)
def test_another_architecture_is_refused(model, tmp_path, where, changes, message):
    config = json.loads((model.folder / "config.json").read_text())
    (config if where is None else config[where]).update(changes)
    write_json(tmp_path / "config.json", config)
    with pytest.raises(JaxVQAError, match=message):
        load(tmp_path)


def test_a_config_without_parts_is_refused():
    with pytest.raises(JaxVQAError, match="lacks vision_config, qformer_config"):
        InstructBlipConfig.from_hf({"text_config": {}})
