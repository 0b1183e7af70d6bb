"""BLIP folders: the fused vision tensors, both ways; faults; and the table against the declared parameters."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny import tiny_llava, write_json
from tiny_blip import tiny_blip

from jaxvqa.convert import ConversionError, blip_itm, convert, export_hf, load
from jaxvqa.convert.tables import Part, expected_names, flatten, join_fused, leaves, split_fused
from jaxvqa.errors import JaxVQAError
from jaxvqa.matcher import load_matcher
from jaxvqa.models.blip_itm import BlipItmConfig, specs

QKV = "vision_model.encoder.layers.1.self_attn.qkv.weight"

FUSED = {".qkv.": (".q.", ".k.", ".v.")}


class InMemory:
    name, file, dtype = "a.qkv.weight", "model.safetensors", "F32"

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def read(self, index):
        return self.values[index]


def params_of(folder, **kwargs):
    return {path: np.asarray(x) for path, x in flatten(load(folder, dtype=None, **kwargs)[1]).items()}


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_every_declared_parameter_has_its_tensors(tmp_path):
    config = load(tiny_blip(tmp_path / "a"))[0]
    assert {path for path, _ in expected_names(blip_itm.TABLE, specs(config)).values()} == leaves(specs(config)).keys()
    assert BlipItmConfig.from_hf(blip_itm.to_hf(config)) == config


@given(data=st.data())
def test_a_part_of_a_fused_tensor_is_read_without_reading_more(data):
    values = np.arange(60.0).reshape(12, 5)
    parts = dict(split_fused([("a.qkv.weight", InMemory(values))], FUSED))
    assert list(parts) == ["a.q.weight", "a.k.weight", "a.v.weight"]
    number = data.draw(st.integers(0, 2))
    part = parts[f"a.{'qkv'[number]}.weight"]
    assert isinstance(part, Part) and part.shape == (4, 5)
    start = data.draw(st.integers(0, 3))
    stop = data.draw(st.integers(start + 1, 4))
    expected = values[4 * number + start : 4 * number + stop, 1:3]
    assert np.array_equal(part.read((slice(start, stop), slice(1, 3))), expected)
    whole = {name: p.read((slice(0, 4), slice(0, 5))) for name, p in parts.items()}
    assert np.array_equal(join_fused(whole, FUSED)["a.qkv.weight"], values)


def test_queries_keys_and_values_are_the_thirds_of_qkv_by_head(tmp_path):
    folder = tiny_blip(tmp_path / "a")
    theirs, ours = load_file(folder / "model.safetensors"), params_of(folder)
    thirds = theirs[QKV].reshape(3, 2, 8, 16)  # [3, N, H, D]
    for name, third in zip("qkv", thirds, strict=True):
        assert np.array_equal(ours[f"vision.layers.{name}_proj"][1], third.transpose(2, 0, 1))
    bias = theirs[QKV.replace("weight", "bias")].reshape(3, 2, 8)
    assert np.array_equal(ours["vision.layers.v_bias"][1], bias[2])


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "shards": 3}, {"position_ids": True}])
def test_the_round_trip_is_bit_equal(tmp_path, options):
    source = tiny_blip(tmp_path / "a", **options)
    config, params, folder = load(source, dtype=None)
    out = export_hf(config, params, tmp_path / "b", processor_folder=folder)
    before = {n: t for file in source.glob("*.safetensors") for n, t in load_file(file).items()}
    before.pop("text_encoder.embeddings.position_ids", None)
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype and np.array_equal(before[name], after[name]), name
    assert json.loads((out / "config.json").read_text())["dtype"] == options.get("dtype", "float32")
    assert load(out)[0] == config


def test_a_converted_folder_loads_as_its_source(tmp_path):
    source = tiny_blip(tmp_path / "a")
    out = convert(source, tmp_path / "b")
    before, after = params_of(source), params_of(out)
    assert before.keys() == after.keys() and all(np.array_equal(before[p], after[p]) for p in before)
    assert load_matcher(out).config == load_matcher(source).config


def test_every_fault_is_named(tmp_path):
    """The contrastive projections belong to the checkpoint, although matching does not read them."""
    folder = tiny_blip(tmp_path / "a")

    def change(tensors):
        tensors[QKV] = tensors[QKV][:-3].copy()
        del tensors["text_proj.bias"]
        tensors["itm_head.scale"] = np.ones(2, np.float32)

    edit(folder, change)
    with pytest.raises(ConversionError) as error:
        load(folder)
    message = str(error.value)
    assert f"misshapen: {QKV} (part 1 of 3): found [15, 16]" in message
    assert "missing: text_proj.bias" in message and "unknown: itm_head.scale" in message


@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [
        ("text_config", {"is_decoder": False}, "no cross-attention"),
        ("text_config", {"hidden_act": "relu"}, "text hidden_act 'relu'"),
        ("text_config", {"num_attention_heads": 5}, "text hidden_size 24: expected a multiple of the 5 heads"),
        ("text_config", {"model_type": "bert"}, "text model type 'bert'"),
        ("vision_config", {"model_type": "clip_vision_model"}, "supported is blip_vision_model"),
    ],
)
def test_another_architecture_is_refused(tmp_path, where, changes, message):
    folder = tiny_blip(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    config[where] |= changes
    write_json(folder / "config.json", config)
    with pytest.raises(JaxVQAError, match=message.replace("[", r"\[")):
        load(folder)


def test_a_captioning_blip_is_refused(tmp_path):
    folder = tiny_blip(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BlipForConditionalGeneration"]}
    write_json(folder / "config.json", config)
    with pytest.raises(ConversionError, match="BlipForConditionalGeneration is not supported"):
        load(folder)


def test_a_model_that_answers_is_no_matcher(tmp_path):
    with pytest.raises(JaxVQAError, match=r"use jaxvqa\.load"):
        load_matcher(tiny_llava(tmp_path / "a"))
