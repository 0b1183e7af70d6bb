"""LoRA adapters merged at load, against W + scale · B·A written out here."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny_llava, write_json

from jaxvqa.convert import ConversionError, convert, load
from jaxvqa.convert.tables import flatten

MODULES = {
    "layers.0.self_attn.q_proj": (32, 32),
    "layers.0.self_attn.k_proj": (16, 32),
    "layers.2.mlp.down_proj": (32, 48),
}
RANK = 4


def adapter(folder, base, prefix="language_model.model.", extra=None, **changes):
    """A random PEFT adapter for `MODULES`; returns its tensors."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    tensors = {}
    for module, (out, into) in MODULES.items():
        name = f"base_model.model.{prefix}{module}"
        tensors[name + ".lora_A.weight"] = rng.standard_normal((RANK, into)).astype(np.float32)
        tensors[name + ".lora_B.weight"] = rng.standard_normal((out, RANK)).astype(np.float32)
    tensors |= extra or {}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = dict(peft_type="LORA", base_model_name_or_path=str(base), r=RANK, lora_alpha=8, bias="none",
                  target_modules=["q_proj", "k_proj", "down_proj"], fan_in_fan_out=False)  # fmt: skip
    write_json(folder / "adapter_config.json", config | changes)
    return tensors


def params_of(*args, **kwargs):
    return {
        path: np.asarray(x) for path, x in flatten(load(*args, dtype=kwargs.pop("dtype", None), **kwargs)[1]).items()
    }


def expected_weights(base, tensors, scale, prefix="language_model.model."):
    """The base's weights in HF's form, with the adapter added."""
    raw = load_file(base / "model.safetensors")
    result = {}
    for module in MODULES:
        a, b = (tensors[f"base_model.model.{prefix}{module}.lora_{k}.weight"] for k in "AB")
        result[module] = raw[f"{prefix}{module}.weight"].astype(np.float32) + scale * (b @ a)
    return result


def check(params, weights, rtol=1e-6):
    q, k, down = (weights[m] for m in MODULES)
    close = dict(rtol=rtol, atol=rtol)
    np.testing.assert_allclose(params["decoder.layers.q_proj"][0], q.reshape(4, 8, 32).transpose(2, 0, 1), **close)
    np.testing.assert_allclose(params["decoder.layers.k_proj"][0], k.reshape(2, 8, 32).transpose(2, 0, 1), **close)
    np.testing.assert_allclose(params["decoder.layers.down_proj"][2], down.T, **close)


def test_an_adapter_is_merged_into_its_base(tmp_path):
    base = tiny_llava(tmp_path / "base", num_kv_heads=2)
    tensors = adapter(tmp_path / "lora", base)
    params, plain = params_of(tmp_path / "lora"), params_of(base)
    check(params, expected_weights(base, tensors, 8 / RANK))
    touched = {"decoder.layers.q_proj", "decoder.layers.k_proj", "decoder.layers.down_proj"}
    assert all(np.array_equal(params[p], plain[p]) for p in plain.keys() - touched)
    assert np.array_equal(params["decoder.layers.q_proj"][1], plain["decoder.layers.q_proj"][1])


def test_rslora_and_patterns_scale_as_in_peft(tmp_path):
    base = tiny_llava(tmp_path / "base", num_kv_heads=2)
    tensors = adapter(tmp_path / "lora", base, use_rslora=True)
    check(params_of(tmp_path / "lora"), expected_weights(base, tensors, 8 / RANK**0.5))
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    patterns = dict(r=16, rank_pattern={"q_proj|k_proj|down_proj": RANK}, alpha_pattern={r"layers\.\d\..*_proj": 2})
    write_json(tmp_path / "lora" / "adapter_config.json", config | patterns | {"use_rslora": False})
    check(params_of(tmp_path / "lora"), expected_weights(base, tensors, 2 / RANK))


def test_the_sum_is_made_in_f32_and_rounded_once(tmp_path):
    base = tiny_llava(tmp_path / "base", num_kv_heads=2, dtype="bfloat16")
    tensors = adapter(tmp_path / "lora", base)
    params = params_of(tmp_path / "lora")
    assert params["decoder.layers.q_proj"].dtype == np.dtype("bfloat16")
    q = expected_weights(base, tensors, 8 / RANK)["layers.0.self_attn.q_proj"].reshape(4, 8, 32).transpose(2, 0, 1)
    # One rounding to bf16 is at most 2**-8 relative; rounding the product as well would exceed it.
    np.testing.assert_allclose(params["decoder.layers.q_proj"][0].astype(np.float32), q, rtol=2**-8, atol=1e-6)


def test_an_adapter_of_the_other_key_layout_fits_too(tmp_path):
    base = tiny_llava(tmp_path / "base", num_kv_heads=2, layout="v4")
    tensors = adapter(tmp_path / "lora", base, prefix="model.language_model.")
    renamed = {n.replace("model.model.language_model.", "model.language_model.model."): t for n, t in tensors.items()}
    check(params_of(tmp_path / "lora"), expected_weights(base, renamed, 8 / RANK))


def test_modules_to_save_replace_the_base(tmp_path):
    base = tiny_llava(tmp_path / "base", num_kv_heads=2)
    new = np.full((32, 32), 0.5, np.float32)
    for name in (
        "multi_modal_projector.linear_2.weight",
        "multi_modal_projector.linear_2.modules_to_save.default.weight",
    ):
        folder = tmp_path / name
        adapter(folder, base, extra={"base_model.model." + name: new})
        assert np.array_equal(params_of(folder)["projector.fc2"], new.T)


def test_the_original_layout_takes_adapters(tmp_path):
    base = tiny_llava(tmp_path / "base", num_kv_heads=2, layout="liuhaotian")
    tensors = adapter(tmp_path / "lora", base, prefix="model.")
    check(params_of(tmp_path / "lora"), expected_weights(base, tensors, 8 / RANK, prefix="model."))


def test_a_base_can_be_named(tmp_path):
    base = tiny_llava(tmp_path / "base", num_kv_heads=2)
    tensors = adapter(tmp_path / "lora", tmp_path / "gone")
    with pytest.raises(ConversionError, match="gone"):
        load(tmp_path / "lora")
    check(params_of(tmp_path / "lora", base=base), expected_weights(base, tensors, 2))


def test_a_merged_adapter_converts(tmp_path):
    base = tiny_llava(tmp_path / "base", num_kv_heads=2)
    tensors = adapter(tmp_path / "lora", base)
    check(params_of(convert(tmp_path / "lora", tmp_path / "out")), expected_weights(base, tensors, 2))


def test_faults_of_an_adapter_are_all_listed(tmp_path):
    base = tiny_llava(tmp_path / "base", num_kv_heads=2)
    q, k, down = (f"base_model.model.language_model.model.{m}" for m in MODULES)
    adapter(tmp_path / "lora", base, extra={
        q + ".lora_A.weight": np.zeros((RANK, 31), np.float32),
        k + ".lora_B.weight": np.full((16, RANK), np.nan, np.float32),
        "base_model.model.language_model.model.layers.7.mlp.up_proj.lora_A.weight": np.zeros((RANK, 32), np.float32),
        "base_model.model.language_model.model.layers.7.mlp.up_proj.lora_B.weight": np.zeros((48, RANK), np.float32),
        "base_model.model.language_model.model.layers.1.mlp.up_proj.lora_A.weight": np.zeros((RANK, 32), np.float32),
        "base_model.model.something.weight": np.zeros(3, np.float32),
    })  # fmt: skip
    with pytest.raises(ConversionError) as e:
        load(tmp_path / "lora")
    for fault in (
        f"misshapen: {q}.lora_A.weight: found [4, 31], expected [4, 32]",
        f"not finite: {k}.lora_B.weight",
        "layers.7.mlp.up_proj.lora_A.weight: the base model has no",
        "missing: lora_B of language_model.model.layers.1.mlp.up_proj.weight",
        "unknown: base_model.model.something.weight",
    ):
        assert fault in str(e.value)
    assert down not in str(e.value)


@pytest.mark.parametrize(
    "change",
    [{"peft_type": "IA3"}, {"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa"}, {"r": None},
     {"lora_alpha": "x"}, {"lora_bias": True}],
)  # fmt: skip
def test_adapters_that_are_more_than_a_sum_are_refused(tmp_path, change):
    base = tiny_llava(tmp_path / "base", num_kv_heads=2)
    adapter(tmp_path / "lora", base, **change)
    with pytest.raises(ConversionError, match=next(iter(change))):
        load(tmp_path / "lora")


def test_a_pickled_projector_beside_an_adapter_is_not_passed_over(tmp_path):
    base = tiny_llava(tmp_path / "base", num_kv_heads=2)
    adapter(tmp_path / "lora", base)
    (tmp_path / "lora" / "non_lora_trainables.bin").write_bytes(b"PK")
    with pytest.raises(ConversionError, match="--from-pickle"):
        load(tmp_path / "lora")
