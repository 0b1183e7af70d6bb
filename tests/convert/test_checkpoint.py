"""Loading HF and original LLaVA folders: every layout gives the same parameters; all faults come in one error."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import LAYOUTS, tiny_llava, write_json, write_weights
from tiny_instructblip import tiny_instructblip
from tiny_internvl import tiny_internvl
from tiny_onevision import tiny_onevision
from tiny_qwen import tiny_qwen
from tiny_qwen3 import tiny_qwen3

from jaxvqa.convert import ConversionError, convert, load
from jaxvqa.convert.tables import flatten
from jaxvqa.errors import JaxVQAError

HF_LAYOUTS = [layout for layout in LAYOUTS if layout != "liuhaotian"]
Q0 = "language_model.model.layers.0.self_attn.q_proj.weight"
NORM = "language_model.model.norm.weight"


def params_of(folder, dtype=None, **kwargs):
    return {path: np.asarray(x) for path, x in flatten(load(folder, dtype=dtype, **kwargs)[1]).items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        assert np.array_equal(a[path], b[path]), path


def edit(folder, change, file="model.safetensors"):
    """Rewrite the folder's weights after `change(tensors)`."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | changes)


def faults_of(folder, **kwargs):
    with pytest.raises(ConversionError) as e:
        load(folder, **kwargs)
    return str(e.value)


@pytest.mark.parametrize("layout", HF_LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_and_sharding_gives_the_same_parameters(tmp_path, layout, shards):
    expected = params_of(tiny_llava(tmp_path / "a", num_kv_heads=2))
    assert_same(params_of(tiny_llava(tmp_path / "b", num_kv_heads=2, layout=layout, shards=shards)), expected)


def test_each_tensor_lands_where_it_belongs(tmp_path):
    """The expected values are rearranged here by hand, layer by layer."""
    folder = tiny_llava(tmp_path / "a", num_kv_heads=2)
    raw, params = load_file(folder / "model.safetensors"), params_of(folder)
    for i in range(3):
        layer = f"language_model.model.layers.{i}."
        for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
            w = raw[f"{layer}self_attn.{name}.weight"]
            assert np.array_equal(params[f"decoder.layers.{name}"][i], w.reshape(heads, 8, 32).transpose(2, 0, 1))
        w = raw[layer + "self_attn.o_proj.weight"]
        assert np.array_equal(params["decoder.layers.o_proj"][i], w.reshape(32, 4, 8).transpose(1, 2, 0))
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert np.array_equal(params[f"decoder.layers.{name}"][i], raw[f"{layer}mlp.{name}.weight"].T)
        assert np.array_equal(params["decoder.layers.attn_norm"][i], raw[layer + "input_layernorm.weight"])
        assert np.array_equal(params["decoder.layers.mlp_norm"][i], raw[layer + "post_attention_layernorm.weight"])
        layer = f"vision_tower.encoder.layers.{i}."
        for name in "qkv":
            w, b = (raw[f"{layer}self_attn.{name}_proj.{kind}"] for kind in ("weight", "bias"))
            assert np.array_equal(params[f"vision.layers.{name}_proj"][i], w.reshape(2, 16, 32).transpose(2, 0, 1))
            assert np.array_equal(params[f"vision.layers.{name}_bias"][i], b.reshape(2, 16))
        for name in ("fc1", "fc2"):
            assert np.array_equal(params[f"vision.layers.{name}"][i], raw[f"{layer}mlp.{name}.weight"].T)
        assert np.array_equal(params["vision.layers.norm2.bias"][i], raw[layer + "layer_norm2.bias"])
    w = raw["vision_tower.embeddings.patch_embedding.weight"]
    assert np.array_equal(params["vision.patch_embed"], w.transpose(1, 2, 3, 0))
    assert np.array_equal(params["decoder.lm_head"], raw["language_model.lm_head.weight"].T)
    assert np.array_equal(params["projector.fc1"], raw["multi_modal_projector.linear_1.weight"].T)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16", None])
def test_any_float_dtype_goes_in_and_out(tmp_path, stored, wanted):
    folder = tiny_llava(tmp_path / "a", dtype=stored)
    raw = load_file(folder / "model.safetensors")[NORM]
    norm = params_of(folder, wanted)["decoder.norm"]
    assert norm.dtype == np.dtype(wanted or stored)
    assert np.array_equal(norm, raw.astype(np.dtype(wanted or stored)))


def test_one_file_may_mix_dtypes(tmp_path):
    """Stored in f16 and bf16, a stacked parameter keeps both exactly only in f32."""
    folder = tiny_llava(tmp_path / "a", dtype="bfloat16")
    edit(folder, lambda t: t.update({Q0: t[Q0].astype(np.float16)}))
    params = params_of(folder)
    assert params["decoder.layers.q_proj"].dtype == np.float32
    assert params["decoder.layers.k_proj"].dtype == ml_dtypes.bfloat16


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="'int8': expected float32, float16, bfloat16"):
        load(tiny_llava(tmp_path / "a"), dtype="int8")


TIED = {
    "llava": (tiny_llava, {}, "language_model.model.embed_tokens", "language_model.lm_head"),
    "llava-modules": (tiny_llava, {"layout": "v5-modules"}, "model.language_model.embed_tokens", "lm_head"),
    "llava-original": (tiny_llava, {"layout": "liuhaotian"}, "model.embed_tokens", "lm_head"),
    "llava_onevision": (tiny_onevision, {}, "language_model.model.embed_tokens", "language_model.lm_head"),
    "qwen2_5_vl": (tiny_qwen, {}, "model.embed_tokens", "lm_head"),
    "qwen3_vl": (tiny_qwen3, {}, "model.language_model.embed_tokens", "lm_head"),
    "internvl": (tiny_internvl, {}, "language_model.model.embed_tokens", "language_model.lm_head"),
    "internvl-original": (
        tiny_internvl, {"layout": "original"}, "language_model.model.embed_tokens", "language_model.lm_head"
    ),
    "instructblip": (tiny_instructblip, {}, "language_model.model.embed_tokens", "language_model.lm_head"),
}  # fmt: skip
"""A folder of each family and layout, and the names of its embedding and its output head."""


@pytest.mark.parametrize("name", TIED)
def test_a_stored_head_beside_a_tied_config_is_dropped_if_equal_and_used_if_not(tmp_path, name):
    """As transformers 5 does; what is converted says what it holds."""
    make, options, embed, head = TIED[name]
    folder = make(tmp_path / "a", tied=True, **options)
    expected = params_of(folder)
    assert "decoder.lm_head" not in expected
    edit(folder, lambda t: t.update({head + ".weight": t[embed + ".weight"]}))
    assert load(folder)[0].decoder.tied
    assert_same(params_of(folder), expected)

    edit(folder, lambda t: t.update({head + ".weight": t[embed + ".weight"] * 2}))
    untied = params_of(folder)
    assert np.array_equal(untied.pop("decoder.lm_head"), 2 * expected["decoder.embed"].T)
    assert_same(untied, expected)
    config = load(folder)[0]
    assert not config.decoder.tied
    assert load(convert(folder, tmp_path / "b"))[0] == config


def test_old_buffers_are_left_unread(tmp_path):
    folder = tiny_llava(tmp_path / "a", layout="v4")
    expected = params_of(folder)
    buffers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "vision_tower.vision_model.embeddings.position_ids": np.arange(17),
    }
    edit(folder, lambda t: t.update(buffers))
    assert_same(params_of(folder), expected)


# ---- the original layout


def test_the_original_layout_gives_the_same_parameters(tmp_path):
    """With its vision tower in another folder, as part of a whole CLIP. The vocabulary alone is smaller."""
    hf = load(tiny_llava(tmp_path / "a"), dtype=None)
    original = load(tiny_llava(tmp_path / "b", layout="liuhaotian", shards=2), dtype=None)
    ours, theirs = flatten(original[1]), flatten(hf[1])
    for path in ours:
        if path.startswith(("vision.", "projector.")):
            assert np.array_equal(ours[path], theirs[path]), path
    assert ours["decoder.layers.q_proj"].shape == theirs["decoder.layers.q_proj"].shape
    assert original[0].vision == hf[0].vision
    assert (original[0].feature_layers, original[0].select) == (hf[0].feature_layers, hf[0].select)
    assert original[0].image_token_id == original[0].decoder.vocab_size == 298


def test_the_vision_tower_can_be_named(tmp_path):
    folder = tiny_llava(tmp_path / "b", layout="liuhaotian")
    expected = params_of(folder)
    clip = shutil.move(tmp_path / "b-clip", tmp_path / "elsewhere")
    assert str(tmp_path / "b-clip") in faults_of(folder)
    assert_same(params_of(folder, vision_tower=clip), expected)


def test_a_vision_model_alone_is_a_tower(tmp_path):
    """CLIPVisionModel's own folder: a flat config, and names without `vision_model.` (transformers 5)."""
    folder = tiny_llava(tmp_path / "b", layout="liuhaotian")
    expected = params_of(folder)
    clip = tmp_path / "b-clip"
    config = json.loads((clip / "config.json").read_text())["vision_config"]
    write_json(clip / "config.json", config)
    tensors = load_file(clip / "model.safetensors")
    prefix = "vision_model."
    write_weights(clip, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    assert_same(params_of(folder), expected)


def test_a_tower_that_was_trained_along_comes_from_the_checkpoint(tmp_path):
    folder = tiny_llava(tmp_path / "b", layout="liuhaotian")
    tower = load_file(tmp_path / "b-clip" / "model.safetensors")
    trained = {"model.vision_tower.vision_tower." + n: 2 * t for n, t in tower.items() if n.startswith("vision_model.")}
    before = params_of(folder)
    edit(folder, lambda t: t.update(trained))
    assert np.array_equal(params_of(folder)["vision.class_embed"], 2 * before["vision.class_embed"])


def test_the_original_layout_gets_a_processor(tmp_path):
    from transformers import AutoImageProcessor, AutoTokenizer

    config, _, processor = load(tiny_llava(tmp_path / "b", layout="liuhaotian"))
    tokenizer = AutoTokenizer.from_pretrained(processor)
    ids = tokenizer("USER: <image>\nhi")["input_ids"]
    assert ids.count(config.image_token_id) == 1
    assert tokenizer.decode(ids) == "<s>USER: <image>\nhi"
    images = AutoImageProcessor.from_pretrained(processor, backend="pil")
    assert dict(images.crop_size) == {"height": 56, "width": 56}


@pytest.mark.parametrize(
    "change",
    [{"mm_projector_type": "linear"}, {"mm_use_im_start_end": True}, {"image_aspect_ratio": "anyres"},
     {"mm_vision_select_feature": "pooled"}],
)  # fmt: skip
def test_other_originals_than_llava_1_5_are_refused(tmp_path, change):
    folder = tiny_llava(tmp_path / "b", layout="liuhaotian")
    edit_config(folder, **change)
    ((key, value),) = change.items()
    message = faults_of(folder)
    assert key in message
    assert str(value) in message or str(value).lower() in message


# ---- faults


def test_all_faults_are_listed_in_one_error(tmp_path):
    folder = tiny_llava(tmp_path / "a", shards=2)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    in_first = {name for name, file in weight_map.items() if file == first}

    lost = "multi_modal_projector.linear_2.weight"
    misshapen, integer = "language_model.model.layers.2.input_layernorm.weight", NORM
    duplicate = next(n for n in sorted(in_first) if n.endswith("0.self_attn.k_proj.weight"))
    file_of = {n: first if n in in_first else second for n in (lost, misshapen, integer)}
    edit(folder, lambda t: t.pop(lost), file_of[lost])
    edit(folder, lambda t: t.update({misshapen: np.zeros(31, np.float32)}), file_of[misshapen])
    edit(folder, lambda t: t.update({integer: np.zeros(32, np.int64)}), file_of[integer])
    extra = np.zeros((48, 32), np.float32)
    edit(folder, lambda t: t.update({"language_model.model.layers.9.mlp.up_proj.weight": extra}), first)
    edit(folder, lambda t: t.update({"model.language_model.layers.1.mlp.up_proj.weight": extra}), second)
    edit(folder, lambda t: t.update({duplicate: load_file(folder / first)[duplicate]}), second)

    message = faults_of(folder)
    for kind, name, found, expected in (
        ("unknown", "language_model.model.layers.9.mlp.up_proj.weight", "[48, 32]", "no such tensor"),
        ("duplicate", "model.language_model.layers.1.mlp.up_proj.weight", "[48, 32]", "expected once"),
        ("duplicate", duplicate, "[32, 32]", "expected once"),
        ("misshapen", misshapen, "[31]", "expected [32]"),
        ("dtype", integer, "I64", "expected F32, F16, BF16"),
        ("missing", lost, "none", "expected [32, 32]"),
        ("index", lost, "no such tensor", "where the index expects it"),
        ("index", duplicate, f"found in {second}", f"the index expects it in {first}"),
    ):
        lines = [line for line in message.splitlines() if line.strip().startswith(f"{kind}: ") and name in line]
        assert any(found in line and expected in line for line in lines), (kind, name, message)
    assert "fetch the checkpoint again" in message.splitlines()[-1]


def test_a_missing_shard_and_a_shard_outside_are_named(tmp_path):
    folder = tiny_llava(tmp_path / "a", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = "../other.safetensors"
    write_json(folder / "model.safetensors.index.json", index)
    message = faults_of(folder)
    assert "shard model-00002-of-00002.safetensors does not exist" in message
    assert "'../other.safetensors' lies outside the folder" in message


def test_a_config_for_other_weights_lists_what_differs(tmp_path):
    folder = tiny_llava(tmp_path / "a", tied=True)
    edit_config(folder, tie_word_embeddings=False, text_config=json.loads((folder / "config.json").read_text())
                ["text_config"] | {"tie_word_embeddings": False, "num_hidden_layers": 2})  # fmt: skip
    message = faults_of(folder)
    assert "missing: language_model.lm_head.weight: found none, expected [300, 32]" in message
    assert "unknown: language_model.model.layers.2.mlp.up_proj.weight: found [48, 32] F32" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_that_are_not_finite_are_all_named(tmp_path, value, dtype):
    folder = tiny_llava(tmp_path / "a", dtype=dtype)

    def spoil(tensors):
        tensors[Q0][3, 4] = value
        tensors[NORM][:2] = value

    edit(folder, spoil)
    message = faults_of(folder)
    assert "2 tensors hold values that are not finite" in message
    assert f"{Q0}: found 1 values that are NaN or infinite in model.safetensors" in message
    assert f"{NORM}: found 2 values" in message


def test_an_overflow_of_the_wanted_dtype_is_named(tmp_path):
    folder = tiny_llava(tmp_path / "a")
    edit(folder, lambda t: t.update({NORM: t[NORM] * 1e5}))
    load(folder, dtype="bfloat16")
    assert f"{NORM}: found 32 values that overflow float16" in faults_of(folder, dtype="float16")


def test_pickled_weights_are_refused_with_a_command_that_works(tmp_path):
    folder = tiny_llava(tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = faults_of(folder)
    assert "pytorch_model.bin" in message
    assert f"jaxvqa convert --from-pickle {folder} OUT" in message
    assert "\n" not in message


def test_a_pickled_part_names_the_command_for_the_whole(tmp_path):
    """A CLIP of pickles cannot be converted by itself: the command is that of the model which needs it."""
    folder = tiny_llava(tmp_path / "a", layout="liuhaotian")
    (tmp_path / "a-clip" / "model.safetensors").rename(tmp_path / "a-clip" / "pytorch_model.bin")
    assert f"jaxvqa convert --from-pickle {folder} OUT" in faults_of(folder)
    tower = tmp_path / "a-clip"
    command = f"jaxvqa convert --from-pickle --vision-tower {tower} {folder} OUT"
    assert command in faults_of(folder, vision_tower=tower)


@pytest.mark.parametrize(
    "architecture", ["MllamaForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration", "LlamaForCausalLM"]
)
def test_an_unsupported_architecture_is_named_with_those_supported(tmp_path, architecture):
    folder = tiny_llava(tmp_path / "a")
    edit_config(folder, architectures=[architecture])
    message = faults_of(folder)
    assert architecture in message
    assert "supported: LlavaForConditionalGeneration" in message
    assert "\n" not in message


def test_a_quantised_checkpoint_is_refused(tmp_path):
    folder = tiny_llava(tmp_path / "a")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "a quantised checkpoint (gptq)" in faults_of(folder)


def test_folders_without_config_or_weights_are_refused_in_one_line(tmp_path):
    folder = tiny_llava(tmp_path / "a")
    (folder / "model.safetensors").rename(tmp_path / "w")
    assert "no weights; expected model.safetensors" in faults_of(folder)
    (folder / "config.json").unlink()
    message = faults_of(folder)
    assert "no config.json" in message
    assert "\n" not in message


def test_broken_files_are_named(tmp_path):
    folder = tiny_llava(tmp_path / "a")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors: not a complete safetensors file" in faults_of(folder)
    (folder / "config.json").write_text('{"architectures": [')
    assert "config.json: cannot be read as JSON" in faults_of(folder)
    (folder / "config.json").write_text("[]")
    assert "holds a JSON list; expected an object" in faults_of(folder)


def test_options_that_do_not_fit_the_source_are_refused(tmp_path):
    folder = tiny_llava(tmp_path / "a")
    with pytest.raises(JaxVQAError, match="holds its own"):
        load(folder, vision_tower=tmp_path)
    with pytest.raises(JaxVQAError, match="this is no adapter"):
        load(folder, base=tmp_path)


def test_parameters_are_on_one_device_by_default(tmp_path):
    _, params, _ = load(tiny_llava(tmp_path / "a"))
    assert all(x.devices() == {jax.devices()[0]} for x in jax.tree.leaves(params))
