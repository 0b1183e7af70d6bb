"""Converted folders: they load like their source, are whole or not there, and say what is wrong with them."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny import tiny_llava, write_json

from jaxvqa.convert import ConversionError, convert, load
from jaxvqa.convert.tables import flatten


def params_of(folder, dtype=None):
    return {path: np.asarray(x) for path, x in flatten(load(folder, dtype=dtype)[1]).items()}


def refused(*args, **kwargs):
    with pytest.raises(ConversionError) as e:
        load(*args, **kwargs)
    return str(e.value)


@pytest.fixture
def source(tmp_path):
    return tiny_llava(tmp_path / "source", num_kv_heads=2)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_converted_folder_loads_like_its_source(tmp_path, source, dtype):
    out = convert(source, tmp_path / "out", dtype=dtype)
    assert out == tmp_path / "out"
    config, expected, _ = load(source, dtype=dtype)
    again, params, folder = load(out, dtype=None)
    assert again == config
    assert folder == out
    expected, params = flatten(expected), flatten(params)
    assert expected.keys() == params.keys()
    for path in expected:
        assert params[path].dtype == expected[path].dtype
        assert np.array_equal(params[path], expected[path])


def test_it_says_what_it_is(tmp_path, source):
    about = json.loads((convert(source, tmp_path / "out", dtype="bfloat16") / "jaxvqa.json").read_text())
    assert about == {"format": 1, "source": str(source), "revision": None, "dtype": ["bfloat16"]}


def test_its_processor_loads_in_transformers(tmp_path, source):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(convert(source, tmp_path / "out"), backend="pil")
    assert type(processor).__name__ == "LlavaProcessor"
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == 298


def test_an_original_checkpoint_converts_with_tower_and_processor(tmp_path):
    source = tiny_llava(tmp_path / "source", layout="liuhaotian")
    out = convert(source, tmp_path / "out")
    expected, params = params_of(source), params_of(out)
    assert all(np.array_equal(params[p], expected[p]) for p in expected)
    assert {"tokenizer.json", "processor_config.json", "config.json"} <= {p.name for p in out.iterdir()}


def test_another_dtype_can_be_had_on_loading(tmp_path, source):
    out = convert(source, tmp_path / "out")
    expected, params = params_of(source, "bfloat16"), params_of(out, "bfloat16")
    assert all(np.array_equal(params[p], expected[p]) for p in expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, source, monkeypatch, error):
    def interrupt(*args):
        raise error

    monkeypatch.setattr("jaxvqa.convert.converted.copy_processor", interrupt)
    with pytest.raises(error):
        convert(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_killed_conversion_leaves_nothing_that_looks_complete(tmp_path, source):
    """SIGKILL once the weights are on disk: what is left has another name, and `load` says what it lacks."""
    program = (
        "import sys, time\n"
        "from jaxvqa.convert import convert, converted\n"
        "converted.copy_processor = lambda *args: (print('written', flush=True), time.sleep(600))\n"
        "convert(sys.argv[1], sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    (left,) = (p for p in tmp_path.iterdir() if p.name != "source")
    assert left.name.startswith(".out.incomplete-")
    message = refused(left)
    assert "an incomplete converted folder, jaxvqa.json, config.json missing" in message
    assert "\n" not in message
    assert convert(source, tmp_path / "out").exists()


@pytest.mark.parametrize("lost", ["jaxvqa.json", "config.json", "params/_METADATA"])
def test_a_partial_folder_says_what_is_missing(tmp_path, source, lost):
    out = convert(source, tmp_path / "out")
    (out / lost).unlink()
    assert f"{lost} missing" in refused(out)


def test_another_format_version_is_refused(tmp_path, source):
    out = convert(source, tmp_path / "out")
    write_json(out / "jaxvqa.json", {"format": 99})
    assert "format version 99, expected 1" in refused(out)


def test_parameters_that_do_not_fit_the_config_are_listed(tmp_path, source):
    out = convert(source, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["text_config"] |= {"intermediate_size": 40, "tie_word_embeddings": True}
    write_json(out / "config.json", config | {"tie_word_embeddings": True})
    message = refused(out)
    assert "unknown: decoder.lm_head: found [32, 300], expected none" in message
    assert "misshapen: decoder.layers.up_proj: found [3, 32, 48], expected [3, 32, 40]" in message


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    convert(source, out)  # empty: nothing to lose
    before = time.time_ns()
    with pytest.raises(ConversionError, match="exists and is not empty"):
        convert(source, out)
    assert (out / "jaxvqa.json").stat().st_mtime_ns < before
    convert(source, out, overwrite=True)
    assert (out / "jaxvqa.json").stat().st_mtime_ns > before
    assert {p.name for p in tmp_path.iterdir()} == {"out", "source"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="is a file"):
        convert(source, tmp_path / "file", overwrite=True)


def test_a_failed_overwrite_keeps_what_was_there(tmp_path, source, monkeypatch):
    out = convert(source, tmp_path / "out")
    monkeypatch.setattr("jaxvqa.convert.converted.copy_processor", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(source, out, overwrite=True)
    params_of(out)


def test_an_overflow_on_loading_is_named(tmp_path, source):
    from test_checkpoint import NORM, edit

    edit(source, lambda t: t.update({NORM: t[NORM] * 1e5}))
    out = convert(source, tmp_path / "out")
    assert "decoder.norm: found infinite values" in refused(out, dtype="float16")
