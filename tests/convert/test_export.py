"""Export: an HF folder that holds the same bits, for `load` and for transformers."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import tiny_llava

from jaxvqa.convert import ConversionError, export_hf, load
from jaxvqa.convert.tables import flatten


def export(source, out, **kwargs):
    config, params, folder = load(source, dtype=None)
    return export_hf(config, params, out, processor_folder=folder, **kwargs)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 2, "tied": True}, {"dtype": "bfloat16", "select": "full", "feature_layer": (-2, -1)}],
)
def test_the_round_trip_is_bit_equal(tmp_path, options):
    source = tiny_llava(tmp_path / "a", **options)
    out = export(source, tmp_path / "b")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert np.array_equal(before[name], after[name]), name
    assert load(out)[0] == load(source)[0]
    assert {p.name for p in out.iterdir()} == {p.name for p in source.iterdir()}


def test_large_models_are_written_in_shards(tmp_path):
    source = tiny_llava(tmp_path / "a")
    out = export(source, tmp_path / "b", shard_bytes=40_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert not (out / "model.safetensors").exists()
    before, after = (flatten(load(folder, dtype=None)[1]) for folder in (source, out))
    assert all(np.array_equal(before[p], after[p]) for p in before)


def test_an_image_token_without_a_row_gets_one_that_is_never_chosen(tmp_path):
    """transformers looks the image token's id up, which the original checkpoints have no row for."""
    source = tiny_llava(tmp_path / "a", layout="liuhaotian")
    out = export(source, tmp_path / "b")
    config, params, _ = load(out, dtype=None)
    assert config.image_token_id == 298
    assert config.decoder.vocab_size == 299
    head = np.asarray(params.decoder.lm_head)
    logits = np.random.default_rng(0).standard_normal((100, 32)).astype(np.float32) @ head
    assert (logits.argmax(axis=1) != 298).all()
    assert np.array_equal(head[:, :298], np.asarray(load(source, dtype=None)[1].decoder.lm_head))


def test_parameters_of_another_model_are_refused(tmp_path):
    config, _, folder = load(tiny_llava(tmp_path / "a"))
    _, params, _ = load(tiny_llava(tmp_path / "b", num_kv_heads=2))
    with pytest.raises(
        ConversionError, match=r"decoder.layers.k_proj: found \[3, 32, 2, 8\], expected \[3, 32, 4, 8\]"
    ):
        export_hf(config, params, tmp_path / "c", processor_folder=folder)
    assert not (tmp_path / "c").exists()


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["v5", "liuhaotian"])
def test_transformers_loads_what_is_exported(tmp_path, layout):
    torch = pytest.importorskip("torch")
    from transformers import LlavaForConditionalGeneration

    source = tiny_llava(tmp_path / "a", layout=layout, num_kv_heads=2)
    out = export(source, tmp_path / "b")
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    params = load(source, dtype=None)[1]
    weight = model.model.language_model.layers[1].self_attn.k_proj.weight.detach().numpy()
    assert np.array_equal(weight.reshape(2, 8, 32).transpose(2, 0, 1), np.asarray(params.decoder.layers.k_proj[1]))
